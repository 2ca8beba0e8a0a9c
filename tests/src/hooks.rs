//! The hooks around containerd's start, as its unit runs them, and a client's view of what they
//! saved.

use std::fs;
use std::path::PathBuf;

use serde::Deserialize;

use crate::container::{Container, Task};
use crate::containerd::Containerd;
use crate::node::Node;
use crate::process::Process;
use crate::wait::wait_for;

/// What `recoverd pre-start --strict` said.
#[derive(Debug)]
pub struct PreStart {
    /// Its exit code.
    pub exit: i32,
    /// Its one line.
    pub line: String,
    /// What it wrote beside it.
    pub stderr: String,
}

/// What `recoverd post-start --strict -o json` said.
#[derive(Debug)]
pub struct PostStart {
    /// Its exit code.
    pub exit: i32,
    /// Every task.
    pub tasks: Vec<Fate>,
    /// Its one line.
    pub summary: String,
}

/// What became of one task.
#[derive(Debug, Deserialize)]
pub struct Fate {
    /// containerd's namespace.
    pub namespace: String,
    /// The container's id.
    pub id: String,
    /// `kept`, `adopted`, `exited`, `lost`, `new`.
    pub became: String,
    /// Its living init.
    pub pid: Option<u32>,
    /// Its exit status.
    pub exit: Option<u32>,
    /// Execs before and still alive.
    pub execs: (usize, usize),
    /// Why.
    pub why: String,
}

#[derive(Deserialize)]
struct Report {
    schema: String,
    tasks: Vec<Fate>,
    summary: String,
}

impl PostStart {
    /// One task's fate.
    #[track_caller]
    pub fn fate(&self, id: &str) -> &Fate {
        let found = self.tasks.iter().find(|fate| fate.id == id);
        found.unwrap_or_else(|| panic!("no task {id} in {self:#?}"))
    }
}

impl Containerd {
    /// The hook before its start, which must not find it running.
    #[track_caller]
    pub fn pre_start(&self) -> PreStart {
        let mut args = self.flags();
        args.extend(["pre-start", "--strict"].map(str::to_owned));
        let output = self.node().recoverd(&args);
        PreStart {
            exit: output.status.code().unwrap_or(-1),
            line: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    /// The hook after its start.
    #[track_caller]
    pub fn post_start(&self) -> PostStart {
        let mut args = self.flags();
        args.extend(["post-start", "--strict", "-o", "json"].map(str::to_owned));
        let output = self.node().recoverd(&args);
        let report: Report = serde_json::from_slice(&output.stdout)
            .unwrap_or_else(|error| panic!("post-start's report {output:?}: {error}"));
        assert_eq!(report.schema, "recoverd/post-start/1");
        PostStart {
            exit: output.status.code().unwrap_or(-1),
            tasks: report.tasks,
            summary: report.summary,
        }
    }
}

impl Container {
    /// With the node's folder at `/mnt`.
    pub fn shares(self, node: &Node) -> Container {
        let folder = node.folder().display();
        self.option(&[
            "--mount",
            &format!("type=bind,src={folder},dst=/mnt,options=rbind:rw"),
        ])
    }
}

impl Node {
    /// The fifo that `ctr` made for a process's stdout, as this test reaches it.
    #[track_caller]
    pub fn stdout_of(&self, process: &str) -> PathBuf {
        let found = self.shell(&format!("ls -d /run/containerd/fifo/*/{process}-stdout"));
        self.path(found.trim())
    }

    /// Makes the file that containers wait for at `/mnt/NAME` (see [`Container::shares`]).
    pub fn tell(&self, name: &str) {
        let path = self.folder().join(name);
        fs::write(&path, "").unwrap_or_else(|error| panic!("write {}: {error}", path.display()));
    }

    /// What a writer of [`crate::numbers`] said in the end.
    #[track_caller]
    pub fn count_in(&self, name: &str) -> u64 {
        wait_for("a writer's count", || {
            let text = fs::read_to_string(self.folder().join(name)).ok()?;
            text.strip_suffix('\n')?.parse().ok()
        })
    }

    /// The shell in the node with this word among its arguments.
    #[track_caller]
    pub fn shell_with(&self, word: &str) -> Process {
        wait_for("a process in the container", || {
            let all = self.processes().into_iter();
            all.filter(|process| process.program() == "sh")
                .find(|process| process.argv.iter().any(|w| w == word))
        })
    }
}

impl Task {
    /// The shim that serves it now, whoever started it.
    #[track_caller]
    pub fn shim_now(&self) -> Process {
        let answer: recoverd_common::pb::task::ConnectResponse = self
            .call(
                "Connect",
                &recoverd_common::pb::task::ConnectRequest {
                    id: self.id().into(),
                },
            )
            .unwrap_or_else(|error| panic!("Connect of {}: {error}", self.name()));
        let shim = self.node().process(answer.shim_pid);
        shim.unwrap_or_else(|| panic!("{answer:?} names no process"))
    }
}

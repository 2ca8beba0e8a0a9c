//! The hooks around containerd's start, as its unit runs them, and a client's view of what they
//! saved.

use std::fs;

use serde::Deserialize;

use crate::container::Task;
use crate::containerd::Containerd;
use crate::process::Process;
use crate::releases::Release;

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
        self.pre_start_with(&[])
    }

    /// The same, told that this release is about to start.
    #[track_caller]
    pub fn pre_start_of(&self, release: &Release) -> PreStart {
        let program = release.folder.join("containerd").display().to_string();
        // Its first start reads all of it from a disk that may be busy.
        self.node().run(&program, ["--version"]);
        self.pre_start_with(&["--containerd", &program])
    }

    #[track_caller]
    fn pre_start_with(&self, words: &[&str]) -> PreStart {
        // What is proven here is what it does; how long it takes is the benchmarks' to say.
        let config = self.node().folder().join("hook.toml");
        fs::write(&config, "[adopt]\ndeadline = \"60s\"\n")
            .unwrap_or_else(|error| panic!("write {}: {error}", config.display()));
        let mut args = vec!["--config".to_owned(), config.display().to_string()];
        args.extend(self.flags());
        let hook = ["pre-start", "--strict", "--deadline", "120s"];
        args.extend(hook.map(str::to_owned));
        args.extend(words.iter().map(|word| (*word).to_owned()));
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

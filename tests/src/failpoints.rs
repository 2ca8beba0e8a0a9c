//! Places in the binaries under test where a process dies as if by `kill -9`; see
//! `recoverd_common::failpoint`. They are compiled into builds of their own, which `tests/run`
//! makes beside the usual ones.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::node::Node;
use crate::process::Process;
use crate::wait::wait_for;

/// The binaries that have failpoints.
#[derive(Clone, Debug)]
pub struct Failpoints {
    folder: PathBuf,
}

impl Failpoints {
    /// Where `tests/run` has built them; why not, if they are not there.
    pub fn find() -> Result<Failpoints, String> {
        let test = std::env::current_exe().map_err(|error| error.to_string())?;
        let target = test.ancestors().nth(3).unwrap_or(Path::new("/nonexistent"));
        let folder = target.join("failpoints/debug");
        let found = Failpoints { folder };
        match [found.shim(), found.recoverd()]
            .iter()
            .find(|path| !path.exists())
        {
            None => Ok(found),
            Some(path) => Err(format!(
                "{} is not built: tests/run does it",
                path.display()
            )),
        }
    }

    /// Our shim with failpoints.
    pub fn shim(&self) -> PathBuf {
        self.folder.join("containerd-shim-recoverd-v1")
    }

    /// `recoverd` with failpoints.
    pub fn recoverd(&self) -> PathBuf {
        self.folder.join("recoverd")
    }

    /// Every point of both, sorted.
    pub fn names(&self) -> Result<Vec<String>, String> {
        let mut names = Vec::new();
        for (binary, word) in [
            (self.shim(), "-failpoints"),
            (self.recoverd(), "failpoints"),
        ] {
            let output = Command::new(&binary)
                .arg(word)
                .output()
                .map_err(|error| format!("start {}: {error}", binary.display()))?;
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            let mut own: Vec<String> = text.lines().map(str::to_owned).collect();
            let listed = own.len();
            own.dedup();
            if !output.status.success() || own.is_empty() || own.len() != listed {
                return Err(format!("{} lists {output:?}", binary.display()));
            }
            names.extend(own);
        }
        // Both have what is in the common library.
        names.sort();
        names.dedup();
        Ok(names)
    }
}

/// A point at which the first process dies that comes by for the Nth time.
#[derive(Debug)]
pub struct Armed {
    point: String,
    /// Made by who dies there.
    said: PathBuf,
    /// Names a process that is ended right before.
    also: PathBuf,
}

impl Armed {
    /// `point`, or `point:N`.
    pub fn new(node: &Node, point: &str) -> Armed {
        let file = |kind: &str| node.folder().join(format!("{point}.{kind}"));
        let armed = Armed {
            point: point.to_owned(),
            said: file("said"),
            also: file("also"),
        };
        for path in [&armed.said, &armed.also] {
            let _not_there = fs::remove_file(path);
        }
        armed
    }

    /// This process is ended right before.
    pub fn and(&self, process: &Process) {
        fs::write(&self.also, process.pid.to_string())
            .unwrap_or_else(|error| panic!("write {}: {error}", self.also.display()));
    }

    /// The environment of those who may die.
    pub fn environment(&self) -> Vec<(String, String)> {
        let path = |path: &Path| path.display().to_string();
        vec![
            ("RECOVERD_FAILPOINT".into(), self.point.clone()),
            ("RECOVERD_FAILPOINT_FILE".into(), path(&self.said)),
            ("RECOVERD_FAILPOINT_ALSO".into(), path(&self.also)),
        ]
    }

    /// Whether somebody has died there; gone by then.
    #[track_caller]
    pub fn was_hit(&self, node: &Node) -> bool {
        if !self.said.exists() {
            return false;
        }
        let pid = wait_for("the pid of who died", || {
            let text = fs::read_to_string(&self.said).ok()?;
            text.strip_suffix('\n')?.split(' ').nth(1)?.parse().ok()
        });
        wait_for(&format!("the end of {pid} at {}", self.point), || {
            let process: Option<Process> = node.process(pid);
            process
                .is_none_or(|process| process.state == 'Z')
                .then_some(())
        });
        true
    }
}

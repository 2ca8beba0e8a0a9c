//! `recoverd supervise` in a node.

use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;

use serde_json::Value;

use crate::node::{Node, Running};
use crate::process::Process;
use crate::wait::wait_for;

/// Where a supervisor tells its metrics.
pub(crate) const METRICS: &str = "/run/recoverd/metrics.sock";

/// A supervisor that serves. Killed when dropped.
pub struct Supervisor {
    node: Arc<Node>,
    running: Running,
}

impl Node {
    /// Starts one; serving when this returns.
    #[track_caller]
    pub fn supervise(self: &Arc<Node>) -> Supervisor {
        self.supervise_with("")
    }

    /// The same, configured by these lines.
    #[track_caller]
    pub fn supervise_with(self: &Arc<Node>, config: &str) -> Supervisor {
        let file = self.folder().join("supervise.toml");
        fs::write(&file, config).unwrap_or_else(|e| panic!("write {}: {e}", file.display()));
        let args = [Path::new("--config"), &file, Path::new("supervise")];
        let mut running = self.spawn(self.built("recoverd"), args);
        wait_for("a supervisor that serves", || {
            assert!(running.is_running(), "it ended: {}", running.text());
            running.text().contains("supervisor serves").then_some(())
        });
        Supervisor {
            node: Arc::clone(self),
            running,
        }
    }

    /// What supervisors have seen in this node so far.
    #[track_caller]
    pub fn witnessed(&self) -> Value {
        let path = self.path("/run/recoverd/witnessed.json");
        let text = fs::read(&path).unwrap_or_else(|e| panic!("read {}: {e}", path.display()));
        serde_json::from_slice(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
    }
}

impl Supervisor {
    /// Its process.
    pub fn process(&self) -> &Process {
        &self.running.process
    }

    /// What it wrote.
    pub fn text(&self) -> String {
        self.running.text()
    }

    /// SIGKILLs it.
    #[track_caller]
    pub fn kill(self) {
        self.node.kill(&self.running.process);
    }

    /// Asks it to stop; it must, with success.
    #[track_caller]
    pub fn stop(mut self) {
        self.node.signal(&self.running.process, "TERM");
        let status = self.running.wait();
        assert!(status.success(), "{status}: {}", self.running.text());
    }

    /// Its metrics.
    #[track_caller]
    pub fn metrics(&self) -> String {
        // It gives up on who asks when it has itself been kept waiting for long.
        wait_for("metrics", || metrics(&self.node.path(METRICS)).ok())
    }

    /// The value of one metric, its labels as printed; 0 when it is not there.
    #[track_caller]
    pub fn metric(&self, name: &str) -> f64 {
        value_in(&self.metrics(), name)
    }

    /// How many descriptors of this kind it keeps.
    #[track_caller]
    pub fn kept(&self, what: &str) -> f64 {
        self.metric(&format!("recoverd_kept_descriptors{{what=\"{what}\"}}"))
    }

    /// Waits until it would see the end of each of these: it learns of a process some milliseconds
    /// after its shim has written it down.
    #[track_caller]
    pub fn wait_watches(&self, processes: &[&Process]) {
        let infos = format!("cat /proc/{}/fdinfo/* 2>/dev/null || :", self.process().pid);
        wait_for(&format!("{processes:?} to be watched"), || {
            let text = self.node.shell(&infos);
            let watched = |process: &&Process| {
                let line = format!("Pid:\t{}", process.pid);
                text.lines().any(|found| found == line)
            };
            processes.iter().all(watched).then_some(())
        });
    }

    /// Waits until it watches so many shims of ours or stock ones.
    #[track_caller]
    pub fn wait_watching(&self, kind: &str, shims: usize) {
        let name = format!("recoverd_supervised_shims{{kind=\"{kind}\"}}");
        let shims = f64::from(u32::try_from(shims).unwrap_or(u32::MAX));
        wait_for(&format!("{shims} {kind} shims to be watched"), || {
            (self.metric(&name) == shims).then_some(())
        });
    }
}

/// One metric of the node's supervisor; none when nobody answers.
pub fn metric(node: &Node, name: &str) -> Option<f64> {
    metric_at(&node.path(METRICS), name)
}

/// One metric of the supervisor that has this socket for them; none when nobody answers.
pub(crate) fn metric_at(socket: &Path, name: &str) -> Option<f64> {
    Some(value_in(&metrics(socket).ok()?, name))
}

fn metrics(socket: &Path) -> io::Result<String> {
    let mut stream = UnixStream::connect(socket)?;
    let mut text = String::new();
    stream.write_all(b"GET /metrics HTTP/1.1\r\n\r\n")?;
    stream.read_to_string(&mut text)?;
    match text.starts_with("HTTP/1.1 200 OK\r\n") {
        true => Ok(text),
        false => Err(io::Error::other(text)),
    }
}

#[track_caller]
fn value_in(metrics: &str, name: &str) -> f64 {
    let line = metrics
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    line.map_or(0.0, |value| {
        value
            .parse()
            .unwrap_or_else(|e| panic!("value of {name} {value:?}: {e}"))
    })
}

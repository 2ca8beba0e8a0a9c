//! What containers leave on a host: looked at before and after.

use std::collections::BTreeSet;
use std::fs;
use std::time::Instant;

use crate::node::Node;
use crate::wait::{BETWEEN_LOOKS, USUAL};

/// Everything on a node that a task may leave there.
///
/// Not looked at: containerd's own files, and the fifos of `ctr`, which leaves them behind itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Traces(BTreeSet<String>);

/// Socket folder, bundles, work folders, runc's state, and what is mounted there. A client's fifos
/// are its own; everybody else's are looked for everywhere. Folders vanish while they are read.
const FILES: &str = "
    for folder in /run/containerd/s /run/containerd*/io.containerd.runtime.v2.task/* \
        /var/lib/containerd*/io.containerd.runtime.v2.task/* /run/containerd/runc/* /run/of-type/* \
        /run/runc; do
        if [ -d $folder ]; then find $folder -mindepth 1 -maxdepth 1 2>/dev/null || :; fi
    done
    find /run -type p ! -path '/run/containerd/fifo/*' ! -path '/run/containerd-*/fifo/*' 2>/dev/null || :
    find /sys/fs/cgroup -mindepth 3 -type d 2>/dev/null || :";

impl Traces {
    /// What is there now.
    #[track_caller]
    pub fn of(node: &Node) -> Traces {
        let mut all: BTreeSet<String> = node
            .shell(FILES)
            .lines()
            .map(|line| format!("file {line}"))
            .collect();
        for process in node.processes() {
            // Tools that this test runs come and go.
            if !matches!(process.program(), "containerd" | "ctr") {
                all.insert(format!(
                    "process {} (started {}) {}",
                    process.pid,
                    process.start_time,
                    process.argv.join(" ")
                ));
            }
        }
        let mounts = fs::read_to_string(node.path("/proc/1/mountinfo"))
            .unwrap_or_else(|error| panic!("read the node's mounts: {error}"));
        for line in mounts.lines() {
            let point = line.split(' ').nth(4).unwrap_or(line);
            all.insert(format!("mount {point}"));
        }
        Traces(all)
    }

    /// What is there now and was not then.
    #[track_caller]
    pub fn new_since(&self, node: &Node) -> Vec<String> {
        Traces::of(node).0.difference(&self.0).cloned().collect()
    }

    /// Fails unless everything new goes away.
    #[track_caller]
    pub fn wait_restored(&self, node: &Node) {
        self.wait_until_none(node, |_| true);
    }

    /// The same but for mounts: the test itself has made one.
    #[track_caller]
    pub fn wait_restored_but_mounts(&self, node: &Node) {
        self.wait_until_none(node, |trace| !trace.starts_with("mount "));
    }

    #[track_caller]
    fn wait_until_none(&self, node: &Node, counts: impl Fn(&String) -> bool) {
        let began = Instant::now();
        loop {
            let mut new = self.new_since(node);
            new.retain(&counts);
            if new.is_empty() {
                return;
            }
            assert!(
                began.elapsed() < USUAL,
                "left behind:\n  {}",
                new.join("\n  ")
            );
            std::thread::sleep(BETWEEN_LOOKS);
        }
    }
}

//! The model: what each workload must have done.

use std::collections::BTreeMap;
use std::fs;

use recoverd_tests::{Node, Process, Reader, Task};

/// A process: it writes numbered lines to its stdout until SIGTERM, then ends with its code.
pub struct Work {
    pub process: Process,
    pub code: u32,
    pub ended: Option<u32>,
    name: String,
    /// Until it has ended and was judged.
    stream: Option<Reader>,
}

/// A task.
pub struct Run {
    pub task: Task,
    /// By whose name its shim goes.
    pub group: String,
    pub init: Work,
    pub execs: BTreeMap<String, Work>,
}

/// The line of shell of one process. It waits with its first line for its reader: `ctr` itself reads
/// while it starts a detached one.
pub fn line(name: &str, code: u32) -> String {
    format!(
        "trap 'stop=1' TERM; until [ -e /mnt/{name}.go ]; do usleep 50000; done; n=0; while [ -z \"$stop\" ]; do \
         i=0; while [ $i -lt 20 ]; do i=$((i+1)); n=$((n+1)); echo $n; done; \
         usleep 100000; done; echo $n >/mnt/{name}.part; mv /mnt/{name}.part /mnt/{name}; exit {code}"
    )
}

impl Work {
    /// One that runs; its stdout is read from now on, if its client has left it.
    pub fn new(node: &Node, name: &str, process: Process, code: u32) -> Work {
        let fifos = node.shell(&format!(
            "ls -d /run/containerd/fifo/*/{name}-stdout 2>/dev/null || true"
        ));
        let fifo = fifos.lines().next();
        let stream = fifo.map(|fifo| Reader::open(&node.path(fifo)));
        node.tell(&format!("{name}.go"));
        Work {
            process,
            code,
            ended: None,
            name: name.to_owned(),
            stream,
        }
    }

    fn has_ended(&mut self, status: u32) {
        self.ended = Some(status);
    }

    /// Its reader goes away, as one does whose daemon has died, or comes back.
    pub fn away(&self, away: bool) {
        match &self.stream {
            Some(stream) if away => stream.away(),
            Some(stream) => stream.back(),
            None => {}
        }
    }

    /// Whether all lines are there, in order, once each, and how many if it has said that.
    #[track_caller]
    fn judge(&mut self, node: &Node) {
        match self.ended {
            None => {
                if let Some(stream) = &self.stream {
                    stream.last();
                }
            }
            Some(_) => {
                let Some(stream) = self.stream.take() else {
                    return;
                };
                let last = stream.end();
                let said = fs::read_to_string(node.folder().join(&self.name));
                if let Ok(said) = said {
                    assert_eq!(said.trim(), last.to_string(), "lines of {}", self.name);
                }
            }
        }
    }
}

impl Run {
    /// Its init and its execs.
    pub fn all(&mut self) -> impl Iterator<Item = &mut Work> {
        std::iter::once(&mut self.init).chain(self.execs.values_mut())
    }

    /// Ends its init or an exec, which with its init ends as well.
    #[track_caller]
    pub fn end(&mut self, node: &Node, exec_id: Option<&str>, kill: bool) {
        let work = match exec_id {
            None => Some(&mut self.init),
            Some(exec_id) => self.execs.get_mut(exec_id),
        };
        let Some(work) = work else {
            return;
        };
        node.signal(&work.process, if kill { "KILL" } else { "TERM" });
        node.wait_gone(&work.process);
        let status = if kill { 137 } else { work.code };
        work.has_ended(status);
        if exec_id.is_none() {
            for exec in self.execs.values_mut().filter(|exec| exec.ended.is_none()) {
                // With its pid namespace.
                node.wait_gone(&exec.process);
                exec.has_ended(137);
            }
        }
    }

    pub fn living_execs(&self) -> Vec<String> {
        let living = self.execs.iter().filter(|(_, exec)| exec.ended.is_none());
        living.map(|(exec_id, _)| exec_id.clone()).collect()
    }

    /// How its init (empty) or an exec has ended.
    pub fn ended(&self, exec_id: &str) -> Option<u32> {
        match exec_id {
            "" => self.init.ended,
            exec_id => self.execs.get(exec_id)?.ended,
        }
    }

    /// Whoever waits for it is told.
    #[track_caller]
    pub fn assert_told(&self, exec_id: Option<&str>) {
        let work = match exec_id {
            None => Some(&self.init),
            Some(exec_id) => self.execs.get(exec_id),
        };
        let told = self.task.wait(exec_id.unwrap_or_default()).exit_status;
        assert_eq!(Some(told), work.and_then(|work| work.ended), "{exec_id:?}");
    }

    /// Every output is what it must be.
    #[track_caller]
    pub fn assert_output(&mut self, node: &Node) {
        for work in self.all() {
            work.judge(node);
        }
    }
}

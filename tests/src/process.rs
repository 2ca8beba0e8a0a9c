//! Processes of a node, read from its own `/proc`.

use std::fs;
use std::path::{Path, PathBuf};

use crate::wait::wait_for;

/// One process as its node numbers it, as it was when it was read. Two with the same pid and start
/// time are the same process, and equal, whatever it does meanwhile.
#[derive(Clone, Debug, Eq)]
pub struct Process {
    /// Its pid in the node.
    pub pid: u32,
    /// Clock ticks since boot, field 22 of `stat`.
    pub start_time: u64,
    /// Parent in the node; 0 for one that was started from outside.
    pub parent: u32,
    /// `R`, `S`, `T`, `Z`, …
    pub state: char,
    /// Its command line.
    pub argv: Vec<String>,
}

impl PartialEq for Process {
    fn eq(&self, other: &Process) -> bool {
        (self.pid, self.start_time) == (other.pid, other.start_time)
    }
}

impl Process {
    /// Reads one process; `None` if it is not there (any more).
    pub fn read(proc: &Path, pid: u32) -> Option<Process> {
        let folder = proc.join(pid.to_string());
        let stat = fs::read_to_string(folder.join("stat")).ok()?;
        // The name is in parentheses and may hold anything, also parentheses.
        let (_, after_name) = stat.rsplit_once(") ")?;
        let fields: Vec<&str> = after_name.split(' ').collect();
        let argv = fs::read(folder.join("cmdline")).ok()?;
        Some(Process {
            pid,
            state: fields.first()?.chars().next()?,
            parent: fields.get(1)?.parse().ok()?,
            start_time: fields.get(19)?.parse().ok()?,
            argv: argv
                .split(|byte| *byte == 0)
                .filter(|word| !word.is_empty())
                .map(|word| String::from_utf8_lossy(word).into_owned())
                .collect(),
        })
    }

    /// Every process of the node, by pid.
    pub fn all(proc: &Path) -> Vec<Process> {
        let mut all: Vec<Process> = fs::read_dir(proc)
            .unwrap_or_else(|error| panic!("read {}: {error}", proc.display()))
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
            .filter_map(|pid| Process::read(proc, pid))
            .collect();
        all.sort_by_key(|process| process.pid);
        all
    }

    /// Waits until it has said what SIGTERM does: the init of a pid namespace is deaf to it before that,
    /// and an exec would end in another way.
    #[track_caller]
    pub(crate) fn wait_trap(&self, proc: &Path) {
        const TERM: u64 = 1 << (15 - 1);
        wait_for(&format!("a trap for SIGTERM of {self:?}"), || {
            let Ok(status) = fs::read_to_string(proc.join(format!("{}/status", self.pid))) else {
                // It has ended; that is the caller's matter.
                return Some(());
            };
            let field = |name| status.lines().find_map(|line| line.strip_prefix(name));
            let mask = |name| u64::from_str_radix(field(name)?.trim(), 16).ok();
            // runc, which becomes the program, handles every signal.
            let is_runc = field("Name:")?.trim().starts_with("runc");
            let handled = mask("SigCgt:")? | mask("SigBlk:")?;
            (!is_runc && handled & TERM != 0).then_some(())
        });
    }

    /// The file name of its program, from its command line.
    pub fn program(&self) -> &str {
        let first = self.argv.first().map_or("", String::as_str);
        first.rsplit('/').next().unwrap_or(first)
    }

    /// The word that follows `flag` on its command line.
    pub fn flag(&self, flag: &str) -> Option<&str> {
        let at = self.argv.iter().position(|word| word == flag)?;
        self.argv.get(at + 1).map(String::as_str)
    }

    /// Whether it is a shim process that serves (and not a short-lived `start` or `delete`).
    pub fn is_shim(&self) -> bool {
        self.program().starts_with("containerd-shim-")
            && self.state != 'Z'
            && !matches!(
                self.argv.last().map(String::as_str),
                Some("start" | "delete" | "adopt" | "tell" | "copy" | "hold")
            )
    }
}

/// Where a process's executable is, as the kernel says it (with ` (deleted)`, if it is).
pub(crate) fn executable(proc: &Path, pid: u32) -> Option<PathBuf> {
    fs::read_link(proc.join(pid.to_string()).join("exe")).ok()
}

//! How a process ended that somebody else is the parent of; see the module of the same name in
//! `common`. The shim's own word for a process is another one than the record's.

use std::os::fd::OwnedFd;

pub use recoverd_common::witness::{await_end, has_ended};
use recoverd_common::{proc::Proc, record, witness};

use crate::tasks::Process;

fn recorded(process: Process) -> record::Process {
    record::Process {
        pid: process.pid,
        start_time: process.start_time,
    }
}

/// A descriptor of `process`, if this very process is there, dead or alive; else why not.
pub fn open(proc: &Proc, process: Process) -> Result<OwnedFd, String> {
    witness::open(proc, recorded(process))
}

/// How a process that has ended did it, if the kernel still says so.
pub fn status(proc: &Proc, process: Process, pidfd: &OwnedFd) -> Option<u32> {
    witness::status(proc, recorded(process), pidfd)
}

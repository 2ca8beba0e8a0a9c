//! How a process ended that somebody else is the parent of; see the module of the same name in
//! `common`. The shim's own word for a process is another one than the record's.

use std::{os::fd::OwnedFd, time::Duration};

pub use recoverd_common::witness::{Answer, Teller, await_end, has_ended};
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

/// How a process that was seen to have ended, so long ago, did it.
pub fn answer(
    teller: &mut Teller,
    proc: &Proc,
    process: Process,
    pidfd: &OwnedFd,
    ago: Duration,
) -> Answer {
    teller.answer(proc, recorded(process), pidfd, ago)
}

/// As [`answer`], waiting for it.
pub fn await_answer(teller: &mut Teller, proc: &Proc, process: Process, pidfd: &OwnedFd) -> Answer {
    teller.await_answer(proc, recorded(process), pidfd)
}

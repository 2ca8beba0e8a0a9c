//! Messages of the process-events connector, and what follows from them. Pure.
//!
//! ```text
//! nlmsghdr   0 length u32   4 type u16   6 flags u16   8 sequence u32   12 port u32
//! cn_msg    16 group u32   20 value u32  24 sequence u32  28 acknowledged u32  32 length u16  34 flags u16
//! event     36 what u32    40 cpu u32    44 time u64
//!           52 error u32                                         of an answer
//!           52 pid u32     56 tgid u32                           of an exec
//!           52 pid u32     56 tgid u32     60 status u32         of an exit
//! ```
//!
//! All in the machine's own byte order (`linux/cn_proc.h`, `linux/connector.h`).

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::Told;

/// `CN_IDX_PROC`: the multicast group, and its bit.
pub const GROUP: u32 = 1;
/// `CN_VAL_PROC`.
const VALUE: u32 = 1;
/// `PROC_CN_MCAST_LISTEN`.
pub const LISTEN: u32 = 1;
/// `PROC_CN_MCAST_IGNORE`.
pub const IGNORE: u32 = 2;

/// `PROC_EVENT_NONE`: the answer to a request.
const ANSWER: u32 = 0;
/// `PROC_EVENT_EXEC`.
const EXEC: u32 = 2;
/// `PROC_EVENT_EXIT`.
const EXIT: u32 = 0x8000_0000;

/// `NLMSG_DONE`, as which connectors mark all their messages.
const DONE: u16 = 3;
const HEADER: usize = 16;
/// Where what an event says begins.
const BODY: usize = HEADER + 20;
const WHAT: u32 = 36;
const TGID: u32 = 56;

/// What a message says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// To a request of the process `to`: 0, or why not.
    Answer {
        /// What it had in the place of what it acknowledges. Newer kernels put a number of their own
        /// into that of the sequence.
        to: u32,
        /// An errno.
        error: i32,
    },
    /// A process has become another program: it has one thread now.
    Exec {
        /// Its pid.
        tgid: i32,
    },
    /// A thread has ended.
    Exit {
        /// Its own number: that of the process for the first one.
        pid: i32,
        /// That of its process.
        tgid: i32,
        /// As `wait` gives it.
        status: i32,
    },
}

/// A request as older kernels know it, too; the newer one of 6.6 would filter in the kernel what a
/// socket filter does as well, and would be ignored by older ones without a word.
pub fn request(operation: u32, from: u32) -> Vec<u8> {
    const LENGTH: u32 = 40;
    const PAYLOAD: u16 = 4;
    let mut bytes = Vec::with_capacity(40);
    bytes.extend(LENGTH.to_ne_bytes());
    bytes.extend(DONE.to_ne_bytes());
    bytes.extend(0_u16.to_ne_bytes());
    for number in [0, 0, GROUP, VALUE, 0, from] {
        bytes.extend(number.to_ne_bytes());
    }
    bytes.extend(PAYLOAD.to_ne_bytes());
    bytes.extend(0_u16.to_ne_bytes());
    bytes.extend(operation.to_ne_bytes());
    bytes
}

/// The events in what one read gave. What is not understood is left out.
pub fn parse(bytes: &[u8]) -> Vec<Event> {
    let mut events = Vec::new();
    let mut rest = bytes;
    while let Some(length) = number(rest, 0) {
        let length = usize::try_from(length).unwrap_or(usize::MAX);
        let Some(message) = rest.get(..length).filter(|_| length >= HEADER) else {
            break;
        };
        events.extend(parse_one(message));
        // Each begins at a multiple of 4.
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    events
}

fn parse_one(message: &[u8]) -> Option<Event> {
    let kind = message.get(4..6)?.try_into().ok().map(u16::from_ne_bytes)?;
    let ours = kind == DONE && number(message, 16)? == GROUP && number(message, 20)? == VALUE;
    let length = message
        .get(32..34)?
        .try_into()
        .ok()
        .map(u16::from_ne_bytes)?;
    let body = message.get(BODY..)?.get(..usize::from(length))?;
    // As in the table above, but from where the event begins.
    let signed = |at| number(body, at).map(u32::cast_signed);
    match number(body, 0).filter(|_| ours)? {
        ANSWER => Some(Event::Answer {
            to: number(message, 28)?.wrapping_sub(1),
            error: signed(16)?,
        }),
        EXEC => Some(Event::Exec { tgid: signed(20)? }),
        EXIT => Some(Event::Exit {
            pid: signed(16)?,
            tgid: signed(20)?,
            status: signed(24)?,
        }),
        _ => None,
    }
}

fn number(bytes: &[u8], at: usize) -> Option<u32> {
    let bytes = bytes.get(at..)?.first_chunk::<4>()?;
    Some(u32::from_ne_bytes(*bytes))
}

/// Longest program the kernel takes.
const MAX_PROGRAM: usize = 4096;

/// Lets exits and execs through: all, and answers to requests with them, or those of the given
/// processes. Of too many processes all are let through.
pub fn filter(pids: Option<&[i32]>) -> Vec<libc::sock_filter> {
    const LOAD: u32 = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
    const EQUAL: u32 = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
    const RETURN: u32 = libc::BPF_RET | libc::BPF_K;
    let step = |code: u32, k: u32, jt: u8, jf: u8| libc::sock_filter {
        code: u16::try_from(code).unwrap_or(0),
        jt,
        jf,
        k,
    };
    // The machine loads words as the network orders them.
    let word = |value: u32| u32::from_be_bytes(value.to_ne_bytes());
    let all = step(RETURN, u32::MAX, 0, 0);
    let none = step(RETURN, 0, 0, 0);
    let answers = pids.is_none();
    let pids = pids.filter(|pids| pids.len().saturating_mul(2) < MAX_PROGRAM - 8);
    let mut program = vec![step(LOAD, WHAT, 0, 0)];
    if answers {
        program.extend([step(EQUAL, word(ANSWER), 0, 1), all]);
    }
    // Past the next two, or past the next one.
    program.extend([
        step(EQUAL, word(EXIT), 2, 0),
        step(EQUAL, word(EXEC), 1, 0),
        none,
    ]);
    match pids {
        None => program.push(all),
        Some(pids) => {
            program.push(step(LOAD, TGID, 0, 0));
            for pid in pids {
                program.extend([step(EQUAL, word(pid.cast_unsigned()), 0, 1), all]);
            }
            program.push(none);
        }
    }
    program
}

/// What is known of the ends of processes.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Ledger {
    answer: Option<i32>,
    ends: BTreeMap<i32, End>,
    lost: bool,
}

/// Of one process since its last exec. Its wait status is that of its first thread, unless the
/// process was ended as a whole by another thread later: then it is that one's. All threads that
/// end because of that have the same status.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
struct End {
    first_thread: i32,
    /// Another thread has ended later, with another status.
    differs: bool,
}

impl Ledger {
    /// Takes an event in, in the order in which they come.
    pub fn take(&mut self, event: Event) {
        match event {
            Event::Answer { error, .. } => self.answer = Some(error),
            // The first thread has ended for another one to take its number, and goes on.
            Event::Exec { tgid } => {
                self.ends.remove(&tgid);
            }
            Event::Exit { pid, tgid, status } if pid == tgid => {
                let end = End {
                    first_thread: status,
                    differs: false,
                };
                self.ends.insert(tgid, end);
            }
            Event::Exit { tgid, status, .. } => {
                if let Some(end) = self.ends.get_mut(&tgid) {
                    end.differs |= end.first_thread != status;
                }
            }
        }
    }

    /// Events were lost: what is known may be outdated, an exec or another end may be among them.
    pub fn lose(&mut self) {
        self.ends.clear();
        self.lost = true;
    }

    /// True after [`Ledger::lose`].
    pub fn has_lost(&self) -> bool {
        self.lost
    }

    /// The kernel's answer to a request: an errno, or 0.
    pub fn answer(&self) -> Option<i32> {
        self.answer
    }

    /// Forgets all processes but these.
    pub fn keep(&mut self, pids: &[i32]) {
        self.ends.retain(|pid, _| pids.contains(pid));
    }

    /// Forgets this one.
    pub fn forget(&mut self, pid: i32) {
        self.ends.remove(&pid);
    }

    /// What is known of a process that has ended.
    pub fn told(&self, pid: i32) -> Told {
        match self.ends.get(&pid) {
            None => Told::Nothing,
            Some(End { differs: true, .. }) => Told::Unclear,
            Some(End { first_thread, .. }) => Told::Status(*first_thread),
        }
    }
}

#[cfg(test)]
mod tests;

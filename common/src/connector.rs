//! Exits of processes whose parent we are not, from the kernel's process-events connector. It tells
//! every exit when it happens, before the parent can collect it; so whoever wants to know of one
//! listens first, and proves whose process it is then. Only for kernels whose pidfds do not tell
//! (before 6.15), and only where the connector is: in the machine's first network and pid
//! namespaces.
//!
//! ```text
//! events    (below)      messages → ledger → what is known of one process; pure
//! open      socket, filter for exits, subscription, the kernel's word that it stands
//! narrow    from then on the kernel wakes us for these processes only
//! ```
//!
//! A listener that is too slow loses events, and is told that it did: what it knows by then of
//! processes that have not been asked about yet is forgotten, as what came later may be missing.

mod events;

use std::{
    collections::BTreeSet,
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{MsgFlags, NetlinkAddr, bind, recvfrom, sendto, setsockopt, sockopt},
};

use self::events::Event;
pub use self::events::Ledger;
use crate::sys;

/// The kernel answers before the call that asks has returned; this is for a busy one.
const ANSWERS: Duration = Duration::from_millis(500);
/// Queued between subscription and [`Connector::narrow`]: so many processes may end meanwhile,
/// at about 1 KiB each.
const QUEUE: usize = 4 << 20;
/// Longest message that is looked at, bytes; an event has 76.
const MESSAGE: usize = 4096;

/// What is known of a process that has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Told {
    /// Its wait status.
    Status(i32),
    /// Its threads ended one by one, with different codes: which of them counts is not told.
    Unclear,
    /// Nothing, so far.
    Nothing,
}

/// A subscription.
#[derive(Debug)]
pub struct Connector {
    socket: OwnedFd,
    ledger: Ledger,
    subscribed: bool,
    /// Of which processes something is wanted; none: of all. The kernel may tell of more.
    only: Option<BTreeSet<i32>>,
}

impl Drop for Connector {
    /// Older kernels count who listens, and go on to make events for those that merely left. One
    /// that was not counted must not be subtracted: others would hear nothing any more.
    fn drop(&mut self) {
        if self.subscribed {
            let _ = self.ask(events::IGNORE);
        }
    }
}

impl AsFd for Connector {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Connector {
    /// Subscribes to all exits; why not, in a few words.
    pub fn open() -> Result<Connector, String> {
        Self::with_queue(QUEUE)
    }

    /// As [`Connector::open`]; events that are not read yet may take so many bytes.
    pub fn with_queue(bytes: usize) -> Result<Connector, String> {
        let failed = |what: &str, e: io::Error| format!("{what} process events: {e}");
        let socket = sys::connector_socket().map_err(|e| failed("open", e))?;
        let mut connector = Connector {
            socket,
            ledger: Ledger::default(),
            subscribed: false,
            only: None,
        };
        connector
            .filter(&events::filter(None))
            .map_err(|e| failed("filter", e))?;
        let socket = connector.socket.as_raw_fd();
        bind(socket, &NetlinkAddr::new(0, events::GROUP))
            .map_err(|e| failed("bind to", e.into()))?;
        // Past the limit of unprivileged users, or up to it.
        let forced = setsockopt(&connector.socket, sockopt::RcvBufForce, &bytes);
        let _ = forced.or_else(|_| setsockopt(&connector.socket, sockopt::RcvBuf, &bytes));
        match connector.ask(events::LISTEN) {
            Ok(()) => {}
            Err(Errno::ECONNREFUSED) => {
                return Err(
                    "process events are told in the machine's first network namespace only"
                        .to_owned(),
                );
            }
            Err(e) => return Err(failed("subscribe to", e.into())),
        }
        let until = Instant::now() + ANSWERS;
        loop {
            connector.read();
            match connector.ledger.answer() {
                Some(0) => {
                    connector.subscribed = true;
                    return Ok(connector);
                }
                Some(errno) => {
                    let error = io::Error::from_raw_os_error(errno);
                    return Err(failed("subscribe to", error));
                }
                None if connector.await_more(until) => {}
                // From another pid namespace the kernel does not even answer.
                None => return Err("the kernel does not tell us process events".to_owned()),
            }
        }
    }

    /// That of an earlier image of this process, and what it knew.
    pub fn carried(socket: OwnedFd, ledger: Ledger) -> Connector {
        Connector {
            socket,
            ledger,
            subscribed: true,
            only: None,
        }
    }

    /// What is known by now; for an image that comes.
    pub fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    /// From now on only of these processes. They may be others than before, if each new one was
    /// [forgotten](Connector::forget) first.
    pub fn narrow(&mut self, pids: &[u32]) -> io::Result<()> {
        let pids: BTreeSet<i32> = pids
            .iter()
            .filter_map(|pid| i32::try_from(*pid).ok())
            .collect();
        let list: Vec<i32> = pids.iter().copied().collect();
        // A long one may be more than the kernel lets a socket have, and the one before it would
        // hide the new processes.
        let filtered = self
            .filter(&events::filter(Some(&list)))
            .or_else(|_| self.filter(&events::filter(None)));
        self.only = Some(pids);
        // What was queued before the filter was.
        self.read();
        self.ledger.keep(&list);
        filtered
    }

    /// What is known of `pid` is of another process that had this number.
    pub fn forget(&mut self, pid: u32) {
        self.read();
        if let Ok(pid) = i32::try_from(pid) {
            self.ledger.forget(pid);
        }
    }

    /// What is known by now of process `pid`, which has ended and was not collected when this
    /// listened already.
    pub fn told(&mut self, pid: u32) -> Told {
        self.read();
        i32::try_from(pid).map_or(Told::Nothing, |pid| self.ledger.told(pid))
    }

    /// True if events were lost since this listens.
    pub fn has_lost(&self) -> bool {
        self.ledger.has_lost()
    }

    fn filter(&self, program: &[libc::sock_filter]) -> io::Result<()> {
        sys::attach_filter(self.socket.as_fd(), program)
    }

    fn ask(&self, operation: u32) -> Result<(), Errno> {
        let message = events::request(operation, std::process::id());
        let kernel = NetlinkAddr::new(0, 0);
        let socket = self.socket.as_raw_fd();
        sendto(socket, &message, &kernel, MsgFlags::MSG_DONTWAIT).map(drop)
    }

    /// True when there is something to read.
    fn await_more(&self, until: Instant) -> bool {
        let left = until.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        let mut wait = [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)];
        poll(&mut wait, timeout).is_ok_and(|count| count > 0)
    }

    /// Takes in what has come.
    pub fn read(&mut self) {
        let mut lost = false;
        let mut bytes = [0; MESSAGE];
        loop {
            match recvfrom::<NetlinkAddr>(self.socket.as_raw_fd(), &mut bytes) {
                // Anybody who may bind such a socket may send to it; the kernel is port 0.
                Ok((count, Some(from))) if from.pid() == 0 => {
                    let message = bytes.get(..count).unwrap_or_default();
                    for event in events::parse(message) {
                        self.take(event);
                    }
                }
                Ok(_) | Err(Errno::EINTR) => {}
                // Told before what was queued before the loss.
                Err(Errno::ENOBUFS) => lost = true,
                Err(_) => break,
            }
        }
        if lost {
            self.ledger.lose();
        }
    }

    fn take(&mut self, event: Event) {
        match event {
            // Of others that subscribe at this moment, too.
            Event::Answer { to, .. } if to != std::process::id() => {}
            Event::Exit { tgid, .. } | Event::Exec { tgid } if !self.wants(tgid) => {}
            event => self.ledger.take(event),
        }
    }

    fn wants(&self, pid: i32) -> bool {
        let only = self.only.as_ref();
        only.is_none_or(|only| only.contains(&pid))
    }
}

//! Processes that are watched for their end, and how they did it.
//!
//! Where the kernel's pidfds do not tell that, its process-events connector does, some moments
//! later: until then what has ended waits here. Members are told before their shim, whose successor
//! is to know how they ended.

use std::{
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use nix::sys::epoll::{EpollEvent, EpollFlags};
use recoverd_common::{
    failpoint,
    proc::Proc,
    record::Process,
    seen::Seen,
    supervision,
    timestamp::Timestamp,
    witness::{self, Answer, Teller},
};

use super::{
    super::decide::{How, Input, Kind, Member, Output},
    Daemon,
    peers::Peer,
};
use crate::witnessed::SeenExit;

/// How a shim ended decides whether it has a successor, and somebody waits for that one: who cannot
/// be asked within this time is taken for crashed.
const PATIENCE: Duration = Duration::from_millis(100);

/// A process that is watched for its end.
#[derive(Debug)]
pub(super) struct Watch {
    pub(super) socket: PathBuf,
    /// None: it is a shim.
    pub(super) member: Option<Member>,
    pub(super) process: Process,
    pub(super) pidfd: OwnedFd,
}

/// This very process is not there, for certain.
fn is_gone(proc: &Proc, process: Process) -> bool {
    let Ok(pid) = i32::try_from(process.pid) else {
        // No process has this number.
        return true;
    };
    match proc.stat(pid) {
        Seen::Present(stat) => stat.id.start_time != process.start_time,
        Seen::Absent => true,
        Seen::Unknown(_) => false,
    }
}

/// One that has ended, and nobody knows yet how.
#[derive(Debug)]
pub(super) struct Ended {
    watch: Watch,
    namespace: String,
    /// When it was seen.
    at: Timestamp,
    since: Instant,
}

impl Ended {
    /// When its teller is asked again.
    pub(super) fn due(&self) -> Option<Instant> {
        self.since.checked_add(Teller::again(self.since.elapsed()))
    }
}

impl Daemon {
    /// False: it is not there any more.
    pub(super) fn watch(
        &mut self,
        socket: &Path,
        member: Option<Member>,
        process: Process,
    ) -> bool {
        let key = (process.pid, process.start_time, member.is_none());
        let ended = |ended: &Ended| ended.watch.process == process;
        if self.tokens.contains_key(&key) || self.unanswered.iter().any(ended) {
            return true;
        }
        let watched = self.watches.values();
        let watched = watched.chain(self.unanswered.iter().map(|ended| &ended.watch));
        let pids = watched.map(|watch| watch.process.pid);
        let pids: Vec<u32> = pids.chain([process.pid]).collect();
        self.teller.add(&pids, process.pid);
        let pidfd = match witness::open(&self.proc, process) {
            Ok(pidfd) => pidfd,
            Err(_) if is_gone(&self.proc, process) => return false,
            Err(why) => {
                // We are short of descriptors, for one.
                tracing::error!(pid = process.pid, why, "watch process");
                self.unwatched.insert(key, (socket.to_owned(), member));
                return true;
            }
        };
        self.last = self.last.saturating_add(1);
        let token = self.last;
        let event = EpollEvent::new(EpollFlags::EPOLLIN, token);
        if let Err(error) = self.epoll.add(&pidfd, event) {
            tracing::error!(pid = process.pid, %error, "watch process");
            self.unwatched.insert(key, (socket.to_owned(), member));
            return true;
        }
        self.tokens.insert(key, token);
        let watch = Watch {
            socket: socket.to_owned(),
            member,
            process,
            pidfd,
        };
        self.watches.insert(token, watch);
        true
    }

    /// Tries again with those who could not be watched.
    pub(super) fn watch_the_rest(&mut self) {
        for ((pid, start_time, _), (socket, member)) in std::mem::take(&mut self.unwatched) {
            let process = Process { pid, start_time };
            self.perform(match member {
                Some(member) => Output::WatchMember(socket, member, process),
                None => Output::WatchShim(socket, process),
            });
        }
    }

    /// One has ended.
    pub(super) fn ended(&mut self, token: u64) {
        let Some(watch) = self.watches.remove(&token) else {
            return;
        };
        let _ = self.epoll.delete(&watch.pidfd);
        let process = watch.process;
        let key = (process.pid, process.start_time, watch.member.is_none());
        self.tokens.remove(&key);
        let since = Instant::now();
        if watch.member.is_none() {
            self.ends.insert(watch.socket.clone(), since);
        }
        let sighting = self.state.sighting(&watch.socket);
        self.unanswered.push(Ended {
            namespace: sighting.map_or_else(String::new, |s| s.namespace.clone()),
            watch,
            at: Timestamp::now(),
            since,
        });
    }

    /// Asks how those ended of whom it is not known.
    pub(super) fn ask_teller(&mut self) {
        if self.unanswered.is_empty() {
            return;
        }
        let all = std::mem::take(&mut self.unanswered);
        let (members, shims): (Vec<_>, Vec<_>) = all
            .into_iter()
            .partition(|ended| ended.watch.member.is_some());
        for ended in members {
            let Watch { process, pidfd, .. } = &ended.watch;
            let ago = ended.since.elapsed();
            match self.teller.answer(&self.proc, *process, pidfd, ago) {
                Answer::NotYet => self.unanswered.push(ended),
                Answer::Status(status) => self.member_ended(ended, Some(status)),
                Answer::Unknown(_) => self.member_ended(ended, None),
            }
        }
        for ended in shims {
            let Watch {
                socket,
                process,
                pidfd,
                ..
            } = &ended.watch;
            let ago = ended.since.elapsed();
            let one_thread = self
                .state
                .sighting(socket)
                .is_some_and(|s| s.kind == Kind::Ours);
            let answer = if one_thread {
                let teller = &mut self.teller;
                teller.answer_of_one_thread(&self.proc, *process, pidfd, ago)
            } else {
                self.teller.answer(&self.proc, *process, pidfd, ago)
            };
            let of_it = |other: &Ended| &other.watch.socket == socket;
            let waits = answer == Answer::NotYet || self.unanswered.iter().any(of_it);
            match answer {
                _ if waits && ago < PATIENCE => self.unanswered.push(ended),
                Answer::Status(status) => self.shim_ended(ended.watch, Some(status)),
                Answer::NotYet | Answer::Unknown(_) => self.shim_ended(ended.watch, None),
            }
        }
    }

    /// For a successor that has come too late to see it, and whose order was written before.
    pub(super) fn how_ended(&self, process: Process) -> supervision::Answer {
        let named = (process.pid, process.start_time);
        let status = self.witnessed.exit_of(named).and_then(|exit| exit.status);
        let waits = |ended: &Ended| ended.watch.process == process;
        let is_watched = self.tokens.contains_key(&(named.0, named.1, false));
        let soon = is_watched || self.unanswered.iter().any(waits);
        supervision::Answer::Ended { status, soon }
    }

    fn member_ended(&mut self, ended: Ended, status: Option<u32>) {
        let Watch {
            socket,
            member,
            process,
            ..
        } = ended.watch;
        let Some(member) = member else {
            return;
        };
        failpoint!("supervise.exit.before");
        self.metrics.exited(status.is_some());
        self.witnessed.exited(SeenExit {
            namespace: ended.namespace,
            id: member.id.clone(),
            exec_id: member.exec_id.clone(),
            process: (process.pid, process.start_time),
            status,
            at: ended.at,
        });
        self.dirty = true;
        self.inbox.push(Input::MemberEnded(socket, member, process));
    }

    fn shim_ended(&mut self, watch: Watch, status: Option<u32>) {
        let Watch {
            socket, process, ..
        } = watch;
        failpoint!("supervise.death.before");
        // What it said and wrote last: on a connection that it made a moment ago, it may be, which is
        // not accepted yet, or on which it was not heard to say who it is.
        self.accept();
        let may_be = |peer: &Peer| peer.socket.as_ref().is_none_or(|whose| *whose == socket);
        let peers: Vec<u64> = self
            .peers
            .iter()
            .filter(|(_, peer)| may_be(peer))
            .map(|(token, _)| *token)
            .collect();
        for peer in peers {
            self.hear(peer);
        }
        self.read_record(&socket);
        let how = How::of_status(status);
        self.inbox.push(Input::ShimEnded(socket, process, how));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn who_cannot_be_seen_is_not_gone() {
        let own = Proc::new("/proc");
        let pid = i32::try_from(std::process::id()).unwrap();
        let Seen::Present(stat) = own.stat(pid) else {
            panic!("no word of ourselves");
        };
        let this = Process {
            pid: pid.unsigned_abs(),
            start_time: stat.id.start_time,
        };
        assert!(!is_gone(&own, this));
        let another = Process {
            start_time: this.start_time + 1,
            ..this
        };
        assert!(is_gone(&own, another));
        let dir = tempfile::tempdir().unwrap();
        let proc = Proc::new(dir.path());
        assert!(is_gone(&proc, this));
        // Nothing that could be read.
        fs::create_dir_all(dir.path().join(pid.to_string()).join("stat")).unwrap();
        assert!(!is_gone(&proc, this));
    }
}

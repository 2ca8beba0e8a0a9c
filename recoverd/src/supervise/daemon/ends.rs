//! Processes that are watched for their end, and what is told of it.

use std::{
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    time::Instant,
};

use nix::sys::epoll::{EpollEvent, EpollFlags};
use recoverd_common::{failpoint, record::Process, timestamp::Timestamp, witness};

use super::{
    super::decide::{How, Input, Member},
    Daemon,
};
use crate::witnessed::SeenExit;

/// A process that is watched for its end.
#[derive(Debug)]
pub(super) struct Watch {
    pub(super) socket: PathBuf,
    /// None: it is a shim.
    pub(super) member: Option<Member>,
    pub(super) process: Process,
    pub(super) pidfd: OwnedFd,
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
        if self.tokens.contains_key(&key) {
            return true;
        }
        let Ok(pidfd) = witness::open(&self.proc, process) else {
            return false;
        };
        self.last = self.last.saturating_add(1);
        let token = self.last;
        let event = EpollEvent::new(EpollFlags::EPOLLIN, token);
        if let Err(error) = self.epoll.add(&pidfd, event) {
            tracing::error!(pid = process.pid, %error, "watch process");
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

    pub(super) fn ended(&mut self, token: u64) {
        let Some(watch) = self.watches.remove(&token) else {
            return;
        };
        let _ = self.epoll.delete(&watch.pidfd);
        let Watch {
            socket,
            member,
            process,
            pidfd,
        } = watch;
        let key = (process.pid, process.start_time, member.is_none());
        self.tokens.remove(&key);
        let status = witness::status(&self.proc, process, &pidfd);
        match member {
            Some(member) => {
                failpoint!("supervise.exit.before");
                self.metrics.exited(status.is_some());
                let namespace = self.state.sighting(&socket).map(|s| s.namespace.clone());
                self.witnessed.exited(SeenExit {
                    namespace: namespace.unwrap_or_default(),
                    id: member.id.clone(),
                    exec_id: member.exec_id.clone(),
                    process: (process.pid, process.start_time),
                    status,
                    at: Timestamp::now(),
                });
                self.dirty = true;
                self.inbox.push(Input::MemberEnded(socket, member, process));
            }
            None => {
                failpoint!("supervise.death.before");
                self.ends.insert(socket.clone(), Instant::now());
                // What it said and wrote last.
                let peers: Vec<u64> = self
                    .peers
                    .iter()
                    .filter(|(_, peer)| peer.socket.as_ref() == Some(&socket))
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
    }
}

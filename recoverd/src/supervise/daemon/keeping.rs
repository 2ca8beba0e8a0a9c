//! What is kept: taken in, watched for its end, given up; here, and with the service manager.

use std::{os::fd::OwnedFd, path::Path};

use nix::sys::epoll::{EpollEvent, EpollFlags};
use recoverd_common::{failpoint, seen::Seen};

use super::{
    super::{
        bag::{CONNECTION, Kept},
        catch::{self, Of},
        decide::Kind,
        look, store,
    },
    Daemon,
};

impl Daemon {
    /// What the shim at `socket` has that we do not keep.
    pub(super) fn catch_up(&mut self, socket: &Path) {
        let Some(sighting) = self.state.sighting(socket) else {
            return;
        };
        let (kind, shim) = (sighting.kind, sighting.shim);
        let Some(watch) = self
            .tokens
            .get(&(shim.pid, shim.start_time, true))
            .and_then(|token| self.watches.get(token))
        else {
            return;
        };
        let members: Vec<Of> = match kind {
            Kind::Ours => match look::record(socket) {
                Seen::Present(record) if record.shim.process == shim => catch::members(&record),
                Seen::Present(_) | Seen::Absent | Seen::Unknown(_) => return,
            },
            Kind::Stock => sighting
                .members
                .iter()
                .map(|(member, process)| Of {
                    member: member.clone(),
                    process: *process,
                    stdio: Default::default(),
                })
                .collect(),
        };
        let Ok(pid) = i32::try_from(shim.pid) else {
            return;
        };
        let has = |inode| self.bag.has(socket, inode);
        let whose = (pid, &watch.pidfd);
        let caught = catch::catch_up(&self.proc, kind, whose, socket, &members, has);
        failpoint!("supervise.catch.after");
        for (name, fd) in caught {
            self.keep(socket, &name, fd);
        }
    }

    pub(super) fn keep(&mut self, socket: &Path, name: &str, fd: OwnedFd) {
        failpoint!("supervise.keep.before");
        let change = match self.bag.keep(socket, name, fd) {
            Ok(change) => change,
            Err(error) => {
                tracing::warn!(socket = %socket.display(), name, %error, "not kept");
                return;
            }
        };
        self.given_up(socket, change.replaced);
        if let Some(kept) = change.new {
            if is_watched(&kept) {
                // No events but those of an end, which are always told.
                let event = EpollEvent::new(EpollFlags::empty(), kept.token);
                if let Err(error) = self.epoll.add(&*kept.fd, event) {
                    tracing::warn!(%error, "watch descriptor");
                }
            }
            failpoint!("supervise.store.before");
            store::store(&mut self.masters, socket, &kept);
            failpoint!("supervise.store.after");
        }
    }

    pub(super) fn given_up(&mut self, socket: &Path, given: Vec<Kept>) {
        for kept in given {
            if is_watched(&kept) {
                // A try may have a duplicate of it: closing alone would not end the watch.
                let _ = self.epoll.delete(&*kept.fd);
            }
            failpoint!("supervise.drop.before");
            store::remove(&mut self.masters, socket, &kept);
            failpoint!("supervise.drop.after");
        }
    }
}

/// Whose end shows: a peer's of a connection, the reader's of a stdin. A terminal that nobody has
/// open looks ended, and a fifo may find another reader.
fn is_watched(kept: &Kept) -> bool {
    kept.name == CONNECTION || kept.what() == "stdin"
}

//! The service manager: what it is told, and the descriptors that it keeps for us while we are not
//! there. Without one (no NOTIFY_SOCKET) nothing happens.
//!
//! It gives descriptors back in any order, so each carries in its name what it is and whose. All
//! names come back in one environment variable, which may hold 128 KiB, or we would not be started
//! again at all: so they are short, a socket is named by the beginning of its own name, and there is
//! an end to the terminals, whose names have their container's in them. No write end is given to it: it cannot be asked
//! to let one go, and a reader would wait for its end while we are being restarted. Nor what can be
//! had again as long as its process lives: a read end of an output.

use std::{
    collections::BTreeSet,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    time::Duration,
};

use recoverd_common::{paths, sys};
use sd_notify::NotifyState;

use super::bag::{CONNECTION, Kept, LISTENER};

/// Longest name of a descriptor there (systemd.exec(5), FDNAME).
const MAX_NAME: usize = 255;
/// Digits of a socket's name: one of a million sockets shares them with another one in 300 million.
const DIGITS: usize = 12;
/// What a master's name begins with there; in full.
const MASTER: &str = "master:";

/// All names of masters together, bytes, each with the colon after it. Our unit lets 4096 descriptors
/// be stored: were all others listeners and connections, of 15 bytes each, 60 KiB would go to them.
const MAX_MASTERS: usize = 64 << 10;

/// The masters that are stored, by their names there.
#[derive(Debug, Default)]
pub struct Masters {
    names: BTreeSet<String>,
    bytes: usize,
    refused: bool,
}

impl Masters {
    /// Whether this one may be stored, as from now on it is.
    fn take(&mut self, name: &str) -> bool {
        let bytes = self.bytes.saturating_add(name.len()).saturating_add(1);
        if self.names.contains(name) {
            return true;
        }
        if bytes > MAX_MASTERS {
            if !std::mem::replace(&mut self.refused, true) {
                let count = self.names.len();
                tracing::warn!(
                    count,
                    "no more terminals are stored with the service manager: what is kept of others \
                     is lost if the supervisor ends before their shims"
                );
            }
            return false;
        }
        self.bytes = bytes;
        self.names.insert(name.to_owned())
    }

    /// It is stored no longer.
    fn give(&mut self, name: &str) {
        if self.names.remove(name) {
            let bytes = self.bytes.saturating_sub(name.len());
            self.bytes = bytes.saturating_sub(1);
        }
    }
}

/// The name of what is kept of `socket`, if it is to be stored at all. A colon is not allowed in it.
pub fn stored_name(socket: &Path, name: &str) -> Option<String> {
    let hash = socket.file_name()?.to_str()?;
    let hash = hash.get(..DIGITS).filter(|_| paths::is_socket_name(hash))?;
    let name = match name {
        LISTENER => format!("{hash}+l"),
        CONNECTION => format!("{hash}+c"),
        name => format!("{hash}+m{}", name.strip_prefix(MASTER)?),
    };
    (name.len() <= MAX_NAME && name.is_ascii()).then_some(name)
}

/// Socket and name of what was stored under this name: one of `sockets`.
pub fn restored_name(sockets: &[PathBuf], stored: &str) -> Option<(PathBuf, String)> {
    let (hash, name) = stored.split_once('+')?;
    if hash.len() != DIGITS {
        return None;
    }
    let name = match name {
        "l" => LISTENER.to_owned(),
        "c" => CONNECTION.to_owned(),
        name => format!("{MASTER}{}", name.strip_prefix('m')?),
    };
    let begins = |path: &&PathBuf| {
        let file = path.file_name().and_then(|name| name.to_str());
        file.is_some_and(|file| file.starts_with(hash))
    };
    let mut found = sockets.iter().filter(begins);
    match (found.next(), found.next()) {
        (Some(socket), None) => Some((socket.clone(), name)),
        _ => None,
    }
}

/// What was stored by our predecessor. Called once, before anything is opened.
pub fn restore(sockets: &[PathBuf]) -> Vec<(PathBuf, String, OwnedFd)> {
    let Ok(all) = sd_notify::listen_fds_with_names() else {
        return Vec::new();
    };
    all.filter_map(|(number, name)| {
        // The service manager has opened it for us, and nobody has taken it yet.
        let fd = sys::received(&[number]).pop()?;
        // What bears no name of ours is closed.
        let (socket, name) = restored_name(sockets, &name)?;
        Some((socket, name, fd))
    })
    .collect()
}

/// Stores one. A service manager that takes none, or no more, is no error.
pub fn store(masters: &mut Masters, socket: &Path, kept: &Kept) {
    let Some(name) = stored_name(socket, &kept.name) else {
        return;
    };
    let mut states = vec![NotifyState::FdStore, NotifyState::FdName(&name)];
    if kept.what() == "master" {
        if !masters.take(&name) {
            return;
        }
        // A terminal that nobody has open at the moment looks like one that has ended.
        states.push(NotifyState::Custom("FDPOLL=0"));
    }
    if let Err(error) = sd_notify::notify_with_fds(&states, &[kept.fd.as_fd()]) {
        tracing::warn!(%error, "store descriptor");
    }
}

/// Gives up what is stored, but for a connection: one that has ended the service manager drops by
/// itself, and all connections of a shim have one name.
pub fn remove(masters: &mut Masters, socket: &Path, kept: &Kept) {
    if kept.name == CONNECTION {
        return;
    }
    if let Some(name) = stored_name(socket, &kept.name) {
        masters.give(&name);
        forget(&name);
    }
}

/// Gives up all connections of a shim.
pub fn remove_connections(socket: &Path) {
    if let Some(name) = stored_name(socket, CONNECTION) {
        forget(&name);
    }
}

fn forget(name: &str) {
    tell(&[NotifyState::FdStoreRemove, NotifyState::FdName(name)]);
}

/// Says something to the service manager.
pub fn tell(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::warn!(%error, "notify service manager");
    }
}

/// How often the service manager wants to hear of us; none: never.
pub fn watchdog() -> Option<Duration> {
    sd_notify::watchdog_enabled()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_come_back_as_they_were_and_no_write_end_is_stored() {
        let socket = |digits: &str| PathBuf::from("/s").join(digits.repeat(32));
        let sockets = [socket("0a"), socket("0b")];
        let first = &sockets[0];
        for name in ["listener", "connection", "master:a/", "master:a/e"] {
            let stored = stored_name(first, name).unwrap();
            assert!(!stored.contains(':') && stored.len() < 24, "{stored}");
            let back = restored_name(&sockets, &stored);
            assert_eq!(back, Some((first.clone(), name.to_owned())));
            assert_eq!(restored_name(&sockets[1..], &stored), None);
            let twice = [first.clone(), first.clone()];
            assert_eq!(restored_name(&twice, &stored), None);
        }
        for name in ["stdin:a/", "stdin-fifo:a/", "output:a/@7", ""] {
            assert_eq!(stored_name(first, name), None, "{name}");
        }
        let longest = format!("master:{}/{}", "a".repeat(76), "b".repeat(76));
        assert!(stored_name(first, &longest).is_some());
        assert_eq!(stored_name(Path::new("/s/x"), "listener"), None);
        for bad in ["", "listener", "0a+l", "0a0a0a0a0a0a+", "0a0a0a0a0a0a+x"] {
            assert_eq!(restored_name(&sockets, bad), None, "{bad}");
        }
    }

    #[test]
    fn names_of_terminals_never_fill_the_variable_that_they_come_back_in() {
        const VARIABLE: usize = 128 << 10;
        const DESCRIPTORS: usize = 4096;
        let socket = PathBuf::from("/s").join("0a".repeat(32));
        let short = stored_name(&socket, "connection").unwrap().len() + 1;
        // As Kubernetes names containers and their sessions.
        let name = |n: usize| {
            let of = format!("master:{n:064x}/{n:064x}");
            stored_name(&socket, &of).unwrap()
        };
        let mut masters = Masters::default();
        let stored: Vec<String> = (0..DESCRIPTORS)
            .map(name)
            .filter(|name| masters.take(name))
            .collect();
        let bytes: usize = stored.iter().map(|name| name.len() + 1).sum();
        let others = (DESCRIPTORS - stored.len()) * short;
        assert!(bytes + others < VARIABLE, "{} masters", stored.len());
        assert!(stored.len() > 400);
        assert!(masters.take(&stored[0]), "it is stored already");
        assert!(!masters.take(&name(DESCRIPTORS)));
        // What goes makes room, and what was never there does not.
        masters.give(&name(DESCRIPTORS));
        assert!(!masters.take(&name(DESCRIPTORS)));
        masters.give(&stored[0]);
        assert!(masters.take(&name(DESCRIPTORS)));
        assert!(!masters.take(&stored[0]));
    }
}

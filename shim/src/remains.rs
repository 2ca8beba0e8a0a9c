//! Removes what a group leaves beside its socket.

use std::{
    fs,
    path::{Path, PathBuf},
};

use recoverd_common::{failpoint, paths::Beside};

use crate::event_log;

/// Events that nobody has acknowledged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unsent {
    /// Somebody sends them: the next shim of the group, or who is at it already.
    Keep,
    /// They are worth nothing. Those that a shim without tasks is still sending stay.
    Remove,
}

/// Removes the socket and the files beside it. Only for who holds the lock; the lock file goes
/// last, so that nobody else is responsible before everything else is gone. What cannot be
/// removed stays: the next `start` of the group replaces it.
pub fn remove_group(socket: &Path, unsent: Unsent) {
    let beside = Beside::of(socket);
    let events = beside.events.clone();
    let wanted = event_log::is_wanted(&events, unsent == Unsent::Keep);
    let files = beside.all();
    for path in std::iter::once(socket).chain(files.iter().map(PathBuf::as_path)) {
        if wanted && path == events {
            continue;
        }
        let _ = fs::remove_file(path);
        // Each time that a process comes by, one more of them is gone.
        failpoint!("remains.file.after");
    }
}

//! Removes what a group leaves beside its socket.

use std::{fs, path::Path};

use recoverd_common::{failpoint, paths::Beside, record::store};

use crate::event_log;

/// Events that nobody has acknowledged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unsent {
    /// The next shim of the group sends them.
    Keep,
    /// The group is closed for good. Those that a shim without tasks is still sending stay.
    Remove,
}

/// Removes the socket and the files beside it. Only for who holds the lock; the lock file goes
/// last, so that nobody else is responsible before everything else is gone. What cannot be
/// removed stays: the next `start` of the group replaces it.
pub fn remove_group(socket: &Path, unsent: Unsent) {
    let beside = Beside::of(socket);
    let spare = store::spare(&beside.record);
    let begun = event_log::begun(&beside.events);
    let mut files = vec![socket, &beside.record, &spare, &begun, &beside.requests];
    if !event_log::is_wanted(&beside.events, unsent == Unsent::Keep) {
        files.push(&beside.events);
    }
    files.push(&beside.lock);
    for path in files {
        let _ = fs::remove_file(path);
        // Each time that a process comes by, one more of them is gone.
        failpoint!("remains.file.after");
    }
}

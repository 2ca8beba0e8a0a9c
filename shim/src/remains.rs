//! Removes what a group leaves beside its socket.

use std::{fs, path::Path};

use recoverd_common::{failpoint, paths::Beside, record::store};

use crate::event_log;

/// Removes the socket and the files beside it. Only for who holds the lock; the lock file goes
/// last, so that nobody else is responsible before everything else is gone. What cannot be
/// removed stays: the next `start` of the group replaces it.
pub fn remove_group(socket: &Path) {
    let beside = Beside::of(socket);
    let spare = store::spare(&beside.record);
    let begun = event_log::begun(&beside.events);
    for path in [
        socket,
        &beside.record,
        &spare,
        &beside.events,
        &begun,
        &beside.requests,
        &beside.lock,
    ] {
        let _ = fs::remove_file(path);
        // Each time that a process comes by, one more of them is gone.
        failpoint!("remains.file.after");
    }
}

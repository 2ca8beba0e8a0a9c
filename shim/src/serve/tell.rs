//! Sends the events that a dead shim had not sent: a process without tasks, socket or lock, which
//! leaves when containerd has acknowledged them. `delete` starts it, because it is the last to come
//! by; containerd may be away for long yet, and at its start it listens only after it has run every
//! `delete`. Should a new shim of the group come first, that one takes the events over.

use std::{
    error::Error,
    fs::{self, File},
    io,
    path::PathBuf,
    thread,
    time::{Duration, Instant},
};

use nix::sys::signalfd::SignalFd;
use recoverd_common::{paths::Beside, seen::Seen};

use super::{Shim, failed, prepare};
use crate::{
    args::Flags,
    event_log,
    lock::{self, Attempt},
    log::Log,
};

/// For the `delete` that started us to be gone with its share of the lock.
const ALONE: Duration = Duration::from_secs(5);

/// Does it; returns when nothing is left to send, or somebody else sends it.
pub fn tell(flags: &Flags) -> Result<(), Box<dyn Error>> {
    let socket = flags.socket.clone().ok_or("no -socket")?;
    if let Some((mut shim, signals)) = take_over(flags, socket)? {
        shim.serve(&signals)?;
    }
    Ok(())
}

/// Makes the log of events ours, as a shim does that has retired with events unsent.
fn take_over(flags: &Flags, socket: PathBuf) -> Result<Option<(Shim, SignalFd)>, Box<dyn Error>> {
    let beside = Beside::of(&socket);
    // While we replace the log no shim of the group may come up, nor another one of us.
    let Some(lock) = locked(&beside).map_err(failed("lock"))? else {
        return Ok(None);
    };
    let nothing = match event_log::read(&beside.events) {
        Seen::Present(kept) => kept.is_empty() || event_log::is_wanted(&beside.events, false),
        Seen::Absent | Seen::Unknown(_) => true,
    };
    let begun = if nothing {
        None
    } else {
        let (namespace, group) = (flags.namespace.as_str(), flags.group());
        let (mut shim, signals) = prepare(namespace, group, &flags.address, socket, Log::none())?;
        shim.take_over_events().map_err(failed("write events"))?;
        shim.event_log.stay().map_err(failed("hold events"))?;
        shim.state.linger();
        shim.retired = true;
        // There is no record to write.
        shim.state.tasks.take_dirty();
        Some((shim, signals))
    };
    // Held: removed by nobody else meanwhile.
    let _ = fs::remove_file(&beside.lock);
    drop(lock);
    Ok(begun)
}

/// The group's lock; none when somebody is responsible for the group, or about to be.
fn locked(beside: &Beside) -> io::Result<Option<File>> {
    let until = Instant::now() + ALONE;
    loop {
        match lock::attempt(&beside.lock)? {
            Attempt::Taken(lock) if beside.record.exists() => {
                drop(lock);
                return Ok(None);
            }
            Attempt::Taken(lock) => return Ok(Some(lock)),
            Attempt::Held if Instant::now() >= until => return Ok(None),
            Attempt::Held => thread::sleep(Duration::from_millis(20)),
        }
    }
}

//! Binding the shim's socket: mode 0600 from its first moment.

use std::{fs, io, os::unix::net::UnixListener, path::Path};

use nix::sys::stat::{Mode, umask};

/// Longest path of a unix socket, bytes (`sun_path` with its final zero).
pub const MAX_PATH: usize = 107;

/// Binds and listens at `path`, which must not exist. The process must have one thread: the file
/// creation mask is changed for a moment, because a mode that is set after `bind` leaves a moment
/// in which others may connect.
pub fn bind(path: &Path) -> io::Result<UnixListener> {
    let before = umask(Mode::from_bits_truncate(0o177));
    let bound = UnixListener::bind(path);
    umask(before);
    bound
}

/// Makes the folder for sockets if it is missing; one that exists keeps its mode (containerd or
/// another shim made it). 0711: others may not list it, and pass to a socket only by its mode.
pub fn ensure_folder(folder: &Path) -> io::Result<()> {
    use std::os::unix::fs::DirBuilderExt as _;
    match fs::metadata(folder) {
        Ok(meta) if meta.is_dir() => return Ok(()),
        Ok(_) => return Err(io::Error::from(io::ErrorKind::NotADirectory)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
        Err(e) => return Err(e),
    }
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o711)
        .create(folder)
}

//! Loop devices: a file that is mounted as if it were a disk, which the mount option `loop` asks for
//! (as the images of containerd's snapshotter `blockfile` do).
//!
//! A device clears itself with its last user. Until it is mounted that is the child that made it:
//! killed at any instant it leaves none, and nobody has to undo one after the mount is gone.

use std::{
    fs::File,
    io,
    os::fd::AsFd,
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use nix::errno::Errno;

use crate::sys;

const CONTROL: &str = "/dev/loop-control";
/// The kernel only names a device that was free; others take it first. As often as containerd.
const TRIES: u64 = 100;

/// A device that shows a file.
#[derive(Debug)]
pub(super) struct LoopDevice {
    path: PathBuf,
    /// Held until it is mounted.
    _open: File,
}

impl LoopDevice {
    /// Has a free device show `image`.
    pub(super) fn of(image: &Path, read_only: bool) -> io::Result<LoopDevice> {
        let open = |path: &Path| {
            let file = File::options().read(true).write(!read_only).open(path);
            file.map_err(|e| io::Error::other(format!("open {}: {e}", path.display())))
        };
        let content = open(image)?;
        let mut tried = 0;
        loop {
            let path = free()?;
            let device = open(&path)?;
            match sys::set_loop_device(device.as_fd(), content.as_fd(), image, read_only) {
                Ok(()) => {
                    let _open = device;
                    return Ok(LoopDevice { path, _open });
                }
                Err(e) if e.raw_os_error() == Some(Errno::EBUSY as i32) && tried < TRIES => {
                    // Longer each time, and not as long as others who wait for the same.
                    let own = u64::from(std::process::id() % 8);
                    thread::sleep(Duration::from_millis((tried + own).min(50)));
                    tried += 1;
                }
                Err(e) => {
                    let text = format!("have {} show the image: {e}", path.display());
                    return Err(io::Error::other(text));
                }
            }
        }
    }

    /// What to mount.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }
}

/// A device that nobody used just now.
fn free() -> io::Result<PathBuf> {
    let failed = |e: io::Error| io::Error::other(format!("find a free loop device: {e}"));
    let control = File::options().read(true).write(true).open(CONTROL);
    let number = control.and_then(|control| sys::free_loop_device(control.as_fd()));
    let number = number.map_err(failed)?;
    Ok(PathBuf::from(format!("/dev/loop{number}")))
}

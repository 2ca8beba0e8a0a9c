//! The only `unsafe` of this crate.

use std::{io, os::fd::OwnedFd};

use tokio::io::unix::AsyncFd;

/// Has the event loop wait for a descriptor.
pub fn awaited(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` always gives the same descriptor, and it is open until it is dropped,
    // which happens after `AsyncFd` has taken it out of the loop.
    unsafe { AsyncFd::register(fd) }.map_err(io::Error::from)
}

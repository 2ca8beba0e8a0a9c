//! Mounts with mapped ids: the root of a user namespace owns the files of its image, and nothing on
//! disk changes its owner. containerd asks for them by the mount options `uidmap=` and `gidmap=`
//! where its kernel can (overlay from Linux 5.19 on).
//!
//! What an overlay maps are its lower folders. They are mapped where they are, in a mount namespace
//! that dies with this child: killed at any instant it leaves no mount behind.

use std::{
    fs::{self, File},
    io::{self, Read, Write},
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::OpenOptionsExt,
    },
    path::Path,
};

use nix::{
    errno::Errno,
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, setns, unshare},
    sys::wait::waitpid,
    unistd::{ForkResult, Pid, chroot, fchdir},
};

use crate::sys;

/// Which ids a mount shows for which, as `/proc/PID/uid_map` takes them.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct IdMap {
    uids: String,
    gids: String,
}

impl IdMap {
    /// From the values of `uidmap=` and `gidmap=`: `container:host:size`, several with commas.
    pub(super) fn parse(uids: &str, gids: &str) -> Result<IdMap, String> {
        Ok(IdMap {
            uids: lines(uids)?,
            gids: lines(gids)?,
        })
    }

    /// A user namespace with these maps. Made by a process of its own: who enters one may not write
    /// its maps, and this one has mounts to make.
    pub(super) fn namespace(&self) -> Result<OwnedFd, String> {
        let failed = |e: io::Error| format!("make a user namespace: {e}");
        let (mut said, says) = io::pipe().map_err(failed)?;
        let (mut held, holds) = io::pipe().map_err(failed)?;
        match sys::fork().map_err(failed)? {
            ForkResult::Child => {
                drop((said, holds));
                let done = unshare(CloneFlags::CLONE_NEWUSER);
                let word = done.err().unwrap_or(Errno::from_raw(0)) as i32;
                let mut says = says;
                let _ = says.write_all(&word.to_ne_bytes());
                // Until it is no longer needed, or its parent is killed.
                let _ = held.read(&mut [0]);
                sys::last_words(-1, b"", 0)
            }
            ForkResult::Parent { child } => {
                drop((says, held));
                let mut word = [0; 4];
                let entered =
                    said.read_exact(&mut word)
                        .and_then(|()| match i32::from_ne_bytes(word) {
                            0 => Ok(()),
                            errno => Err(io::Error::from_raw_os_error(errno)),
                        });
                let namespace = entered
                    .and_then(|()| self.write(child))
                    .and_then(|()| File::open(format!("/proc/{child}/ns/user")));
                drop(holds);
                let _ = waitpid(child, None);
                namespace.map(OwnedFd::from).map_err(failed)
            }
        }
    }

    fn write(&self, of: Pid) -> io::Result<()> {
        // One write each: the kernel takes no second one.
        fs::write(format!("/proc/{of}/uid_map"), &self.uids)?;
        fs::write(format!("/proc/{of}/gid_map"), &self.gids)
    }
}

fn lines(maps: &str) -> Result<String, String> {
    let line = |map: &str| {
        let numbers: Vec<u32> = map
            .split(':')
            .map(|number| number.parse().ok())
            .collect::<Option<_>>()?;
        let [inside, outside, size] = numbers.try_into().ok()?;
        inside.checked_add(size)?;
        outside.checked_add(size)?;
        Some(format!("{inside} {outside} {size}\n"))
    };
    let all: Option<String> = maps.split(',').map(line).collect();
    all.ok_or_else(|| format!("id mapping {maps:?} is not container-id:host-id:size"))
}

/// Makes an overlay at `target` by `make`, with the ids of its `lower` folders mapped.
pub(super) fn overlay(
    map: &IdMap,
    lower: &[&Path],
    target: &Path,
    make: impl FnOnce() -> Result<(), Errno>,
) -> Result<(), String> {
    let namespace = map.namespace()?;
    let place = |path: &Path| {
        File::options()
            .read(true)
            .custom_flags(libc::O_PATH | libc::O_DIRECTORY | libc::O_CLOEXEC)
            .open(path)
    };
    let outside = (|| Ok((File::open("/proc/self/ns/mnt")?, place(Path::new("/"))?)))();
    let (home, root) = outside.map_err(|e: io::Error| format!("remember the mounts: {e}"))?;
    let target_outside = place(target).map_err(|e| e.to_string())?;

    let none: Option<&str> = None;
    unshare(CloneFlags::CLONE_NEWNS)
        .and_then(|()| mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none))
        .map_err(|e| format!("make a mount namespace: {}", io::Error::from(e)))?;
    for folder in lower {
        let mapped = || {
            let tree = sys::clone_mount(folder)?;
            sys::map_ids(tree.as_fd(), namespace.as_fd(), true)?;
            sys::attach_mount(tree.as_fd(), place(folder)?.as_fd())
        };
        mapped().map_err(|e| format!("map the ids of {}: {e}", folder.display()))?;
    }
    make().map_err(|e| io::Error::from(e).to_string())?;
    let made = sys::clone_mount(target).map_err(|e| format!("take it out: {e}"))?;

    // Back; the namespace's own root need not be ours.
    setns(home, CloneFlags::CLONE_NEWNS)
        .and_then(|()| fchdir(&root))
        .and_then(|()| chroot("."))
        .map_err(|e| format!("return to the mounts: {}", io::Error::from(e)))?;
    sys::attach_mount(made.as_fd(), target_outside.as_fd()).map_err(|e| e.to_string())
}

/// Maps the ids of what is already mounted at `target`.
pub(super) fn mounted(map: &IdMap, target: &Path) -> Result<(), String> {
    let namespace = map.namespace()?;
    let mapped = || {
        let tree = sys::clone_mount(target)?;
        sys::map_ids(tree.as_fd(), namespace.as_fd(), false)?;
        // In the place of the other, not on top of it.
        umount2(target, MntFlags::UMOUNT_NOFOLLOW)?;
        sys::attach_mount(tree.as_fd(), File::open(target)?.as_fd())
    };
    mapped().map_err(|e| format!("map its ids: {e}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mapping_is_three_numbers_that_fit() {
        let map = IdMap::parse("0:65536:65536", "0:1000:1,1:2000:10").unwrap();
        assert_eq!(map.uids, "0 65536 65536\n");
        assert_eq!(map.gids, "0 1000 1\n1 2000 10\n");
        for wrong in [
            "",
            "0",
            "0:1",
            "0:1:2:3",
            "0:1:x",
            "-1:0:1",
            "0:1:2,",
            "0:4294967295:1",
            "4294967295:0:1",
            "0:1:4294967296",
        ] {
            assert!(IdMap::parse(wrong, "0:0:1").is_err(), "{wrong}");
            assert!(IdMap::parse("0:0:1", wrong).is_err(), "{wrong}");
        }
    }
}

//! Mounting and unmounting a container's root file system. Runs in short-lived children only:
//! every call here may wait for a device.

use std::{
    io,
    path::{Component, Path, PathBuf},
    thread,
    time::Duration,
};

use nix::{
    errno::Errno,
    mount::{MntFlags, MsFlags, mount, umount2},
};
use recoverd_common::{mounts, seen::Seen};

use crate::service::Mount;

mod helper;
mod idmap;
mod loop_device;

use idmap::IdMap;
use loop_device::LoopDevice;

/// The kernel takes one page of options; some room is left for what it adds, as containerd does.
const MAX_OPTIONS: usize = 4096 - 512;
/// As containerd: a mount that is busy is tried again this often, 50 ms apart.
const BUSY_TRIES: u32 = 50;

/// What a list of `mount -o` words means.
#[derive(Debug, PartialEq, Eq)]
struct Parsed {
    flags: MsFlags,
    data: Vec<String>,
    ids: Option<IdMap>,
    /// The source is a file to be mounted as a disk.
    looped: bool,
}

fn parse(options: &[String]) -> Result<Parsed, String> {
    let mut flags = MsFlags::empty();
    let mut data = Vec::new();
    let (mut uids, mut gids) = (None, None);
    let mut looped = false;
    for word in options {
        let (set, flag) = match word.as_str() {
            "async" => (false, MsFlags::MS_SYNCHRONOUS),
            "atime" => (false, MsFlags::MS_NOATIME),
            "bind" => (true, MsFlags::MS_BIND),
            "defaults" => continue,
            "dev" => (false, MsFlags::MS_NODEV),
            "diratime" => (false, MsFlags::MS_NODIRATIME),
            "dirsync" => (true, MsFlags::MS_DIRSYNC),
            "exec" => (false, MsFlags::MS_NOEXEC),
            "mand" => (true, MsFlags::MS_MANDLOCK),
            "noatime" => (true, MsFlags::MS_NOATIME),
            "nodev" => (true, MsFlags::MS_NODEV),
            "nodiratime" => (true, MsFlags::MS_NODIRATIME),
            "noexec" => (true, MsFlags::MS_NOEXEC),
            "nomand" => (false, MsFlags::MS_MANDLOCK),
            "norelatime" => (false, MsFlags::MS_RELATIME),
            "nostrictatime" => (false, MsFlags::MS_STRICTATIME),
            "nosuid" => (true, MsFlags::MS_NOSUID),
            "private" => (true, MsFlags::MS_PRIVATE),
            "rbind" => (true, MsFlags::MS_BIND.union(MsFlags::MS_REC)),
            "relatime" => (true, MsFlags::MS_RELATIME),
            "remount" => (true, MsFlags::MS_REMOUNT),
            "ro" => (true, MsFlags::MS_RDONLY),
            "rprivate" => (true, MsFlags::MS_PRIVATE.union(MsFlags::MS_REC)),
            "rshared" => (true, MsFlags::MS_SHARED.union(MsFlags::MS_REC)),
            "rslave" => (true, MsFlags::MS_SLAVE.union(MsFlags::MS_REC)),
            "runbindable" => (true, MsFlags::MS_UNBINDABLE.union(MsFlags::MS_REC)),
            "rw" => (false, MsFlags::MS_RDONLY),
            "shared" => (true, MsFlags::MS_SHARED),
            "slave" => (true, MsFlags::MS_SLAVE),
            "strictatime" => (true, MsFlags::MS_STRICTATIME),
            "suid" => (false, MsFlags::MS_NOSUID),
            "sync" => (true, MsFlags::MS_SYNCHRONOUS),
            "unbindable" => (true, MsFlags::MS_UNBINDABLE),
            "loop" => {
                looped = true;
                continue;
            }
            // For containerd's own mount code.
            word if word.starts_with("X-containerd.") => continue,
            word => {
                if let Some(map) = word.strip_prefix("uidmap=") {
                    uids = Some(map);
                } else if let Some(map) = word.strip_prefix("gidmap=") {
                    gids = Some(map);
                } else {
                    data.push(word.to_owned());
                }
                continue;
            }
        };
        flags.set(flag, set);
    }
    let ids = match (uids, gids) {
        (Some(uids), Some(gids)) => Some(IdMap::parse(uids, gids)?),
        (None, None) => None,
        _ => return Err("only uids and gids together can be mapped".to_owned()),
    };
    Ok(Parsed {
        flags,
        data,
        ids,
        looped,
    })
}

/// Overlays of many layers have options longer than a page: names the lower folders relative to
/// the folder that they share. Gives that folder, which has to become the working directory.
fn compact(data: &[String]) -> Option<(PathBuf, Vec<String>)> {
    let lower = data
        .iter()
        .find_map(|word| word.strip_prefix("lowerdir="))?;
    let folders: Vec<&Path> = lower.split(':').map(Path::new).collect();
    let mut shared = folders.first()?.parent()?.to_path_buf();
    while !folders.iter().all(|folder| folder.starts_with(&shared)) {
        shared = shared.parent()?.to_path_buf();
    }
    let short: Vec<_> = folders
        .iter()
        .map(|folder| Some(folder.strip_prefix(&shared).ok()?.to_str()?.to_owned()))
        .collect::<Option<_>>()?;
    let data = data
        .iter()
        .map(|word| {
            if word.starts_with("lowerdir=") {
                format!("lowerdir={}", short.join(":"))
            } else {
                word.clone()
            }
        })
        .collect();
    Some((shared, data))
}

/// Mounts `mount` on `rootfs`, or below it.
pub fn apply(wanted: &Mount, rootfs: &Path) -> Result<(), String> {
    let below = Path::new(wanted.target.trim_start_matches('/'));
    let inside = |part: Component<'_>| matches!(part, Component::Normal(_));
    if !below.components().all(inside) {
        return Err(format!(
            "mount target {:?} leaves the rootfs",
            wanted.target
        ));
    }
    let target = if wanted.target.is_empty() {
        rootfs.to_path_buf()
    } else {
        rootfs.join(below)
    };
    let at = |cause: &dyn std::fmt::Display| {
        format!(
            "mount {} {} on {}: {cause}",
            wanted.kind,
            wanted.source,
            target.display()
        )
    };
    if let Some(mounted) = helper::mount(wanted, &target) {
        return mounted.map_err(|e| at(&e));
    }
    let mut parsed = parse(&wanted.options).map_err(|e| at(&e))?;
    let device = if parsed.looped {
        let read_only = parsed.flags.contains(MsFlags::MS_RDONLY);
        let image = Path::new(&wanted.source);
        Some(LoopDevice::of(image, read_only).map_err(|e| at(&e))?)
    } else {
        None
    };
    let source = match &device {
        Some(device) => device.path(),
        None => Path::new(&wanted.source),
    };
    let ids = parsed.ids.take();
    // Absolute, whatever is made of the words below.
    let lower = parsed
        .data
        .iter()
        .find_map(|word| word.strip_prefix("lowerdir="))
        .map(str::to_owned);
    if parsed.data.join(",").len() > MAX_OPTIONS
        && let Some((shared, short)) = compact(&parsed.data)
    {
        std::env::set_current_dir(&shared).map_err(|e| at(&e))?;
        parsed.data = short;
    }
    let make = || mount_with(&wanted.kind, source, &target, &parsed);
    match (ids, lower) {
        (Some(ids), Some(lower)) if wanted.kind == "overlay" => {
            let lower: Vec<&Path> = lower.split(':').map(Path::new).collect();
            idmap::overlay(&ids, &lower, &target, make).map_err(|e| at(&e))
        }
        (ids, _) => {
            make().map_err(|e| at(&io::Error::from(e)))?;
            ids.map_or(Ok(()), |ids| idmap::mounted(&ids, &target))
                .map_err(|e| at(&e))
        }
    }
}

/// The three calls that one `mount` may need, in containerd's order.
fn mount_with(kind: &str, source: &Path, target: &Path, parsed: &Parsed) -> Result<(), Errno> {
    let kinds =
        MsFlags::MS_SHARED | MsFlags::MS_PRIVATE | MsFlags::MS_SLAVE | MsFlags::MS_UNBINDABLE;
    let data = parsed.data.join(",");
    let plain = parsed.flags.difference(kinds);
    let none: Option<&Path> = None;
    if !plain.contains(MsFlags::MS_REMOUNT) || !data.is_empty() {
        mount(Some(source), target, Some(kind), plain, Some(data.as_str()))?;
    }
    if parsed.flags.intersects(kinds) {
        let propagation = parsed.flags & (kinds | MsFlags::MS_REC | MsFlags::MS_SILENT);
        mount(none, target, none, propagation, none)?;
    }
    // A read-only bind mount takes a second call.
    if plain.contains(MsFlags::MS_BIND | MsFlags::MS_RDONLY) {
        mount(none, target, none, plain | MsFlags::MS_REMOUNT, none)?;
    }
    Ok(())
}

/// Unmounts everything on and below `rootfs`, the last mounted first. What is not mounted is no
/// error.
pub fn undo(rootfs: &Path) -> Result<(), String> {
    // Without the list the rootfs itself is tried, which is the usual case anyway.
    let mounted = points(rootfs).unwrap_or_else(|_| vec![rootfs.to_path_buf()]);
    let mut failed = None;
    for target in mounted.iter().rev() {
        if let Err(errno) = unmount(target) {
            let cause = io::Error::from(errno);
            failed.get_or_insert(format!("unmount {}: {cause}", target.display()));
        }
    }
    failed.map_or(Ok(()), Err)
}

fn unmount(target: &Path) -> Result<(), Errno> {
    for _ in 0..BUSY_TRIES {
        match umount2(target, MntFlags::UMOUNT_NOFOLLOW) {
            Err(Errno::EBUSY) => thread::sleep(Duration::from_millis(50)),
            // Not a mount point, or gone.
            Err(Errno::EINVAL | Errno::ENOENT) => return Ok(()),
            other => return other,
        }
    }
    Err(Errno::EBUSY)
}

/// Mount points on or below `rootfs`, in the order of mounting.
pub fn points(rootfs: &Path) -> Result<Vec<PathBuf>, String> {
    let mounts = match mounts::read(Path::new("/proc")) {
        Seen::Present(mounts) => mounts,
        Seen::Absent => return Err("/proc shows no mounts".into()),
        Seen::Unknown(why) => return Err(format!("the mount table {why}")),
    };
    // The kernel has resolved every link on the way. A rootfs that is itself a link is not
    // followed: it may lead to mounts that are the host's.
    let parent = rootfs
        .parent()
        .and_then(|parent| parent.canonicalize().ok());
    let resolved = parent.zip(rootfs.file_name());
    let resolved = resolved.map(|(parent, name)| parent.join(name));
    Ok(below(mounts, resolved.as_deref().unwrap_or(rootfs)))
}

fn below(mounts: Vec<mounts::Mount>, rootfs: &Path) -> Vec<PathBuf> {
    let points = mounts.into_iter().map(|mount| mount.point);
    points.filter(|point| point.starts_with(rootfs)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(list: &[&str]) -> Vec<String> {
        list.iter().map(|word| (*word).to_owned()).collect()
    }

    #[test]
    fn words_become_flags_or_data_and_later_ones_win() {
        let parsed = parse(&words(&["rbind", "ro", "rw", "nosuid", "lowerdir=/a:/b"])).unwrap();
        assert_eq!(
            parsed.flags,
            MsFlags::MS_BIND | MsFlags::MS_REC | MsFlags::MS_NOSUID
        );
        assert_eq!(parsed.data, words(&["lowerdir=/a:/b"]));
        assert!(!parsed.looped && parse(&words(&["loop"])).unwrap().looped);
    }

    #[test]
    fn lower_folders_are_named_from_the_folder_that_they_share() {
        let data = words(&["upperdir=/s/9/fs", "lowerdir=/s/10/fs:/s/1/fs"]);
        let (shared, short) = compact(&data).unwrap();
        assert_eq!(shared, Path::new("/s"));
        assert_eq!(short, words(&["upperdir=/s/9/fs", "lowerdir=10/fs:1/fs"]));
        let (shared, short) = compact(&words(&["lowerdir=/s/1/fs"])).unwrap();
        assert_eq!((shared, short), ("/s/1".into(), words(&["lowerdir=fs"])));
        assert_eq!(compact(&words(&["lowerdir=a:b"])).map(|_| ()), Some(()));
    }

    #[test]
    fn only_mounts_of_this_rootfs_are_found() {
        let text =
            b"36 35 98:0 / /b/rootfs rw - overlay o rw\n37 36 0:1 / /b/rootfs/a\\040b rw - x y z\n\
                    38 35 0:1 / /b/rootfs2 rw - x y z\nbroken\n";
        assert_eq!(
            below(mounts::parse(text), Path::new("/b/rootfs")),
            [PathBuf::from("/b/rootfs"), "/b/rootfs/a b".into()]
        );
    }

    #[test]
    fn a_target_cannot_leave_the_rootfs() {
        let mount = Mount {
            kind: "bind".into(),
            source: "/x".into(),
            target: "a/../../b".into(),
            options: Vec::new(),
        };
        assert!(
            apply(&mount, Path::new("/b"))
                .unwrap_err()
                .contains("leaves")
        );
    }
}

//! What containerd reads of a bundle at its start: where the shim listens, and whose `delete` is
//! run when it does not. Written for every generation of containerd.

use std::{
    fs::{self, File},
    io::{self, Write},
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::Path,
};

use recoverd_common::{
    failpoint,
    read::{read_file, read_text},
    seen::Seen,
};

use crate::start;

/// Longest file that names an address, bytes.
const MAX_ADDRESS: u64 = 4096;

/// Makes `bundle` name the shim at `socket` and the executable `exe`. Files that say so already
/// are left alone; what could not be written is told.
pub fn write(bundle: &Path, socket: &Path, exe: &Path) -> Vec<String> {
    let address = format!("unix://{}", socket.display());
    let exe = exe.to_string_lossy();
    let files = [
        ("address", address.clone(), 0o644),
        ("bootstrap.json", start::json(&address, 2), 0o644),
        ("shim-binary-path", exe.into_owned(), 0o600),
    ];
    files
        .into_iter()
        .filter_map(|(name, text, mode)| {
            let path = bundle.join(name);
            let result = replace(&path, text.as_bytes(), mode);
            let error = result.err()?;
            Some(format!("write {}: {error}", path.display()))
        })
        .collect()
}

/// Makes `bundle` name no shim, if it names the one at `socket`, which does not know its task: to
/// containerd it is then one whose Create has failed half-way. Found at a shim that answers, release
/// 1.6 would list a task that is none, for ever.
pub fn forget(bundle: &Path, socket: &Path) -> Vec<String> {
    let address = format!("unix://{}", socket.display());
    ["address", "bootstrap.json"]
        .into_iter()
        .filter_map(|name| {
            let path = bundle.join(name);
            let text = match read_text(&path, MAX_ADDRESS) {
                Seen::Present(text) => text,
                Seen::Absent | Seen::Unknown(_) => return None,
            };
            let named = text == address || text == start::json(&address, 2);
            let error = named.then(|| fs::remove_file(&path))?.err()?;
            Some(format!("remove {}: {error}", path.display()))
        })
        .collect()
}

/// Whole or not at all: containerd may read meanwhile. On a full disk the old file's own room is
/// used, which is better than leaving what is wrong.
fn replace(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    // A file of any size may be there: never more than ours is long, and never through a link.
    let there = read_file(path, bytes.len() as u64);
    if there.present().is_some_and(|there| there == bytes) {
        return Ok(());
    }
    let temporary = path.with_extension("recoverd");
    let _ = fs::remove_file(&temporary);
    let written = File::options()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(&temporary)
        .and_then(|mut file| file.write_all(bytes))
        .and_then(|()| {
            failpoint!("adopt.bundle.written");
            fs::rename(&temporary, path)
        });
    failpoint!("adopt.bundle.after");
    let Err(error) = written else {
        return Ok(());
    };
    let _ = fs::remove_file(&temporary);
    if error.kind() != io::ErrorKind::StorageFull {
        return Err(error);
    }
    let file = File::options()
        .write(true)
        .custom_flags(libc::O_NOFOLLOW)
        .open(path)?;
    file.write_all_at(bytes, 0)?;
    file.set_len(bytes.len() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_bundle_forgets_only_the_shim_that_it_named() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), "/run/s/0".as_ref(), "/opt/ours".as_ref());
        let files = || fs::read_dir(dir.path()).unwrap().count();
        assert_eq!(forget(dir.path(), "/run/s/1".as_ref()), [""; 0]);
        assert_eq!(files(), 3);
        assert_eq!(forget(dir.path(), "/run/s/0".as_ref()), [""; 0]);
        assert_eq!(files(), 1);
        assert_eq!(forget(dir.path(), "/run/s/0".as_ref()), [""; 0]);
    }

    #[test]
    fn a_stock_shims_bundle_becomes_ours_for_every_containerd() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("shim-binary-path"), "/usr/bin/stock").unwrap();
        for _ in 0..2 {
            let remarks = write(dir.path(), "/run/s/0".as_ref(), "/opt/ours".as_ref());
            assert_eq!(remarks, [""; 0]);
        }
        let read = |name| fs::read_to_string(dir.path().join(name)).unwrap();
        assert_eq!(read("address"), "unix:///run/s/0");
        assert_eq!(read("shim-binary-path"), "/opt/ours");
        assert!(read("bootstrap.json").contains("\"version\":2"));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 3);
        let meta = fs::metadata(dir.path().join("shim-binary-path")).unwrap();
        assert_eq!(meta.permissions().mode() & 0o777, 0o600);
        assert_eq!(
            write("/no/such".as_ref(), "/s".as_ref(), "/e".as_ref()).len(),
            3
        );
    }
}

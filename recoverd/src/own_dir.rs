//! Folders of recoverd's own. Root's alone: what stands in them decides what root does later.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io,
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt},
    path::Path,
};

/// Makes `dir` (0700) if it is missing and opens it. One that is a symlink, is somebody else's or
/// that others may write to is refused: they could put a file of theirs in the place of ours.
pub fn open(dir: &Path) -> io::Result<File> {
    if fs::symlink_metadata(dir).is_err_and(|error| error.kind() == io::ErrorKind::NotFound) {
        let made = DirBuilder::new().recursive(true).mode(0o700).create(dir);
        // Two recoverds at once: the other one made it.
        made.or_else(|error| match error.kind() {
            io::ErrorKind::AlreadyExists => Ok(()),
            _ => Err(error),
        })?;
    }
    let folder = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_DIRECTORY | libc::O_NOFOLLOW)
        .open(dir)?;
    let meta = folder.metadata()?;
    if meta.uid() != nix::unistd::geteuid().as_raw() {
        return Err(io::Error::other("belongs to another user"));
    }
    if meta.mode() & 0o022 != 0 {
        return Err(io::Error::other("others may write to it"));
    }
    Ok(folder)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_folder_is_made_for_its_owner_only_and_others_are_refused() {
        let temporary = tempfile::tempdir().unwrap();
        let dir = temporary.path().join("a/b");
        let made = open(&dir).unwrap();
        assert_eq!(made.metadata().unwrap().mode() & 0o777, 0o700);
        assert!(open(&dir).is_ok());
        let link = temporary.path().join("link");
        std::os::unix::fs::symlink(&dir, &link).unwrap();
        assert!(open(&link).is_err());
        fs::write(temporary.path().join("file"), "").unwrap();
        assert!(open(&temporary.path().join("file")).is_err());
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o777)).unwrap();
        assert!(open(&dir).is_err());
    }
}

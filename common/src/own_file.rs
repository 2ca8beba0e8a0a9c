//! Opening a file of our own, which stands where others may have put something else: never through a
//! symlink, never waiting for the other end of a fifo, and a regular file or nothing.

use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::OpenOptionsExt,
    path::Path,
};

use nix::fcntl::OFlag;

/// Opens it with `options`; one that is made by it is root's alone.
pub fn open(options: &mut OpenOptions, path: &Path) -> io::Result<File> {
    let file = options
        .mode(0o600)
        .custom_flags((OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK).bits())
        .open(path)?;
    if file.metadata()?.is_file() {
        Ok(file)
    } else {
        Err(io::Error::other("is not a regular file"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{fs, os::unix::fs::PermissionsExt};

    #[test]
    fn links_and_fifos_are_not_followed_and_not_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        let mut options = File::options();
        let options = options.read(true).write(true).create(true);
        let file = open(options, &path("file")).unwrap();
        let mode = file.metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        fs::write(path("file"), "as it was").unwrap();
        std::os::unix::fs::symlink(path("file"), path("link")).unwrap();
        nix::unistd::mkfifo(&path("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        open(options, &path("link")).unwrap_err();
        let refused = open(options, &path("fifo")).unwrap_err();
        assert_eq!(refused.to_string(), "is not a regular file");
        open(File::options().read(true), dir.path()).unwrap_err();
        assert_eq!(fs::read(path("file")).unwrap(), b"as it was");
    }
}

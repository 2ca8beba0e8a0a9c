//! Reading files that anybody may have put there: bounded, regular files only, never through a
//! symlink, never blocking on a fifo.

use std::{
    fs::File,
    io::{self, Read},
    os::unix::fs::OpenOptionsExt,
    path::Path,
};

use crate::seen::Seen;

/// No file is read beyond this, whatever it is (SPEC: a gigantic file is a finding).
pub const MAX_FILE: u64 = 16 << 20;

/// Read at once where a file does not tell its length, bytes.
const PAGE: u64 = 4096;

/// Reads the regular file at `path`, at most `limit` bytes (capped at [`MAX_FILE`]).
///
/// *Absent* only when the file is definitely not there. A symlink, a fifo, a device, a directory
/// or a file larger than `limit` is *unknown*, with the reason. Only the last component is
/// guarded against symlinks: callers list directories that containerd (root) owns.
pub fn read_file(path: &Path, limit: u64) -> Seen<Vec<u8>> {
    let limit = limit.min(MAX_FILE);
    let file = match open_file(path) {
        Ok(file) => file,
        Err(error) => return absent_or_unknown(&error),
    };
    let meta = match file.metadata() {
        Ok(meta) => meta,
        Err(error) => return Seen::Unknown(error.to_string()),
    };
    if !meta.is_file() {
        return Seen::Unknown("is not a regular file".into());
    }
    if meta.len() > limit {
        return Seen::Unknown(format!("is {} bytes long, more than {limit}", meta.len()));
    }
    // Files of /proc and cgroups have no length; most of them fit into a page.
    let expected = if meta.len() == 0 {
        PAGE
    } else {
        meta.len() + 1
    };
    let mut bytes = Vec::with_capacity(usize::try_from(expected.min(limit + 1)).unwrap_or(0));
    // One more than allowed: a file that grows while it is read is noticed, not cut.
    match file.take(limit + 1).read_to_end(&mut bytes) {
        Ok(n) if n as u64 > limit => Seen::Unknown(format!("is more than {limit} bytes long")),
        Ok(_) => Seen::Present(bytes),
        Err(error) => absent_or_unknown(&error),
    }
}

/// As [`read_file`], for text; invalid UTF-8 is *unknown*.
pub fn read_text(path: &Path, limit: u64) -> Seen<String> {
    read_file(path, limit).and_then(|bytes| match String::from_utf8(bytes) {
        Ok(text) => Seen::Present(text),
        Err(_) => Seen::Unknown("is not valid UTF-8".into()),
    })
}

fn open_file(path: &Path) -> io::Result<File> {
    // O_NONBLOCK: opening a fifo for reading would otherwise wait for a writer.
    let flags = nix::fcntl::OFlag::O_NOFOLLOW | nix::fcntl::OFlag::O_NONBLOCK;
    File::options()
        .read(true)
        .custom_flags(flags.bits())
        .open(path)
}

/// Sorts an error into *absent* (it is not there, or its process went away) and *unknown*.
pub fn absent_or_unknown<T>(error: &io::Error) -> Seen<T> {
    const ESRCH: i32 = nix::errno::Errno::ESRCH as i32;
    const ELOOP: i32 = nix::errno::Errno::ELOOP as i32;
    match error.raw_os_error() {
        Some(ESRCH) => Seen::Absent,
        Some(ELOOP) => Seen::Unknown("is a symlink".into()),
        _ if error.kind() == io::ErrorKind::NotFound => Seen::Absent,
        _ => Seen::Unknown(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn only_regular_files_of_bounded_size_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::write(at("file"), "text").unwrap();
        std::os::unix::fs::symlink(at("file"), at("link")).unwrap();
        nix::unistd::mkfifo(&at("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        File::create(at("giant")).unwrap().set_len(1 << 30).unwrap();
        fs::write(at("latin"), b"\xe4").unwrap();

        assert_eq!(read_text(&at("file"), 4), Seen::Present("text".into()));
        assert_eq!(read_file(&at("none"), 4), Seen::Absent);
        for (name, limit) in [
            ("file", 3),
            ("link", 9),
            ("fifo", 9),
            ("giant", 1 << 40),
            (".", 9),
        ] {
            assert!(
                matches!(read_file(&at(name), limit), Seen::Unknown(_)),
                "{name}"
            );
        }
        assert!(matches!(read_text(&at("latin"), 9), Seen::Unknown(_)));
    }
}

//! The tar that a dump goes into, and what could not go into it. Entries are bounded, each and
//! all together, and no read may hang: a dump is made of what is ill, and reading `/proc` of a
//! process that waits for a device can wait with it.

use std::{
    io::{self, Write},
    path::{Path, PathBuf},
    sync::mpsc,
    thread,
    time::Duration,
};

use recoverd_common::{
    read::{MAX_FILE, read_file},
    seen::Seen,
};

/// How long one file may take.
const READ: Duration = Duration::from_secs(2);
/// How large a tar may become, bytes.
const MAX_ARCHIVE: u64 = 128 << 20;

/// A tar being written.
pub struct Archive<W: Write> {
    tar: tar::Builder<W>,
    folder: String,
    mtime: u64,
    room: u64,
    missing: Vec<String>,
}

impl<W: Write> Archive<W> {
    /// Everything goes below `folder`; `mtime` is in seconds after 1970.
    pub fn new(out: W, folder: String, mtime: u64) -> Self {
        Self {
            tar: tar::Builder::new(out),
            folder,
            mtime,
            room: MAX_ARCHIVE,
            missing: Vec::new(),
        }
    }

    /// Adds a file of this content.
    pub fn add(&mut self, name: &str, content: &[u8]) -> io::Result<()> {
        let length = content.len() as u64;
        let Some(room) = self.room.checked_sub(length) else {
            self.miss(name, "the archive is full");
            return Ok(());
        };
        self.room = room;
        let mut header = tar::Header::new_gnu();
        header.set_size(length);
        header.set_mtime(self.mtime);
        // It says much about a node; whoever unpacks it decides who else reads it.
        header.set_mode(0o600);
        let path = format!("{}/{name}", self.folder);
        self.tar.append_data(&mut header, path, content)
    }

    /// Notes what is not in it, and why.
    pub fn miss(&mut self, what: &str, why: &str) {
        let line = format!("{what}: {why}");
        self.missing.push(line.replace(char::is_control, " "));
    }

    /// Adds the file at `path`, whole. One that is not there is noted, and so is one that cannot
    /// be read or is too large.
    pub fn file(&mut self, name: &str, path: &Path) -> io::Result<()> {
        match read(path) {
            Seen::Present(content) => self.add(name, &content),
            Seen::Absent => {
                self.miss(name, "is not there");
                Ok(())
            }
            Seen::Unknown(why) => {
                self.miss(name, &why);
                Ok(())
            }
        }
    }

    /// Adds the list of what is missing, ends the tar, and gives the output back.
    pub fn finish(mut self) -> io::Result<W> {
        let mut text = match self.missing.is_empty() {
            true => "nothing".to_owned(),
            false => self.missing.join("\n"),
        };
        text.push('\n');
        // The list itself must not fall to a full archive.
        self.room = self.room.max(text.len() as u64);
        self.add("missing.txt", text.as_bytes())?;
        self.tar.into_inner()
    }
}

/// Reads a regular file within [`READ`].
pub fn read(path: &Path) -> Seen<Vec<u8>> {
    let path = path.to_owned();
    within(move || read_regular(&path))
}

/// Looks before it opens: opening a fifo, if only to find out that it is one, would for a moment
/// make us its reader.
fn read_regular(path: &PathBuf) -> Seen<Vec<u8>> {
    match std::fs::symlink_metadata(path) {
        Ok(meta) if meta.is_file() => read_file(path, MAX_FILE),
        Ok(_) => Seen::Unknown("is not a regular file".into()),
        Err(error) => recoverd_common::read::absent_or_unknown(&error),
    }
}

/// Does `look` in a thread and waits for it at most [`READ`]. A thread that hangs is left
/// behind: it holds nothing, and ends with this process.
pub fn within<T: Send + 'static>(look: impl FnOnce() -> Seen<T> + Send + 'static) -> Seen<T> {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        // Nobody listens any more when it took too long.
        let _ = sender.send(look());
    });
    match receiver.recv_timeout(READ) {
        Ok(seen) => seen,
        Err(_) => Seen::Unknown(format!("took longer than {} s", READ.as_secs())),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    #[test]
    fn what_goes_in_comes_out_and_what_cannot_is_said() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        std::fs::write(at("file"), "text").unwrap();
        std::os::unix::fs::symlink(at("file"), at("link")).unwrap();
        nix::unistd::mkfifo(&at("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        let giant = std::fs::File::create(at("giant")).unwrap();
        giant.set_len(MAX_FILE + 1).unwrap();

        let folder = format!("recoverd-dump-{}", "x".repeat(150));
        let mut archive = Archive::new(Vec::new(), folder.clone(), 7);
        for name in ["file", "link", "fifo", "giant", "none"] {
            archive.file(name, &at(name)).unwrap();
        }
        archive.room = 3;
        archive.add("late", b"four").unwrap();
        let bytes = archive.finish().unwrap();

        let mut tar = tar::Archive::new(bytes.as_slice());
        let mut found = Vec::new();
        for entry in tar.entries().unwrap() {
            let mut entry = entry.unwrap();
            assert_eq!(entry.header().mode().unwrap(), 0o600);
            let path = entry.path().unwrap().into_owned();
            let mut text = String::new();
            entry.read_to_string(&mut text).unwrap();
            found.push((path, text));
        }
        assert_eq!(found[0], (Path::new(&folder).join("file"), "text".into()));
        assert_eq!(found.len(), 2);
        let missing: Vec<&str> = found[1].1.lines().collect();
        assert_eq!(missing.len(), 5, "{missing:?}");
        for (line, word) in missing
            .iter()
            .zip(["regular", "regular", "bytes", "not", "full"])
        {
            assert!(line.contains(word), "{line}");
        }
    }
}

//! `<socket>.events`: events accepted and not yet acknowledged by containerd, in order, so that a
//! successor can send what its predecessor could not. How it looks and is read is in
//! [`recoverd_common::event_log`].
//!
//! Entries are appended; one is acknowledged by setting a flag in place, and when all are, the
//! file begins anew, at the length that it is asked to keep. Room for later events is made before
//! something runs that will cause them: a full `/run` loses none.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

pub use recoverd_common::event_log::{Kept, read};
use recoverd_common::{
    event_log::{ACKNOWLEDGED, ECHO, HEAD, MAGIC, sum},
    failpoint, own_file,
    seen::Seen,
};

use serde::{Deserialize, Serialize};

use crate::{
    carry, lock,
    sys::{self, Hold},
};

/// Room is made in steps of this, bytes.
const GRAIN: u64 = 4096;
/// Room beyond what is needed that is not given back, bytes.
const SLACK: u64 = 64 << 10;

/// The log's writer.
#[derive(Debug, Serialize, Deserialize)]
pub struct EventLog {
    path: PathBuf,
    #[serde(with = "carry::maybe_fd")]
    file: Option<File>,
    /// Where the next entry goes.
    end: u64,
    /// Bytes that the file has for sure.
    room: u64,
    /// Offsets of entries not acknowledged, with their flags.
    open: BTreeMap<u64, (u64, u32)>,
}

/// Whether the log at `path` holds events that are worth keeping: somebody is at work on them, or
/// `unsent` ones count too and there are some.
pub fn is_wanted(path: &Path, unsent: bool) -> bool {
    let Ok(file) = own_file::open(File::options().read(true), path) else {
        return false;
    };
    // Released with the file. An error is no reason to remove what may be wanted.
    !sys::try_lock(&file, Hold::Shared).unwrap_or(false)
        || unsent && matches!(read(path), Seen::Present(kept) if !kept.is_empty())
}

/// Where a log is that takes the place of the one at `path` when it is whole, as
/// [`recoverd_common::paths::Beside`] has it.
fn begun(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".new");
    name.into()
}

impl EventLog {
    /// A writer for `path`; what is there is replaced by the first write.
    pub fn new(path: &Path) -> Self {
        Self {
            path: path.to_owned(),
            file: None,
            end: MAGIC.len() as u64,
            room: 0,
            open: BTreeMap::new(),
        }
    }

    /// Begins with what a predecessor left. Written beside its log, which is there until the new
    /// one is whole: a SIGKILL in between loses nothing.
    pub fn take_over(&mut self, kept: &[Kept], room: u64) -> io::Result<()> {
        let beside = begun(&self.path);
        let mut new = Self::new(&beside);
        new.remove()?;
        new.reserve(room)?;
        for (number, echo, payload) in kept {
            new.append(*number, *echo, payload)?;
        }
        failpoint!("events.takeover.before");
        fs::rename(&beside, &self.path)?;
        failpoint!("events.takeover.after");
        new.path.clone_from(&self.path);
        *self = new;
        Ok(())
    }

    fn file(&mut self) -> io::Result<&File> {
        if self.file.is_none() {
            let mut options = File::options();
            options.write(true).create(true).truncate(false);
            let file = own_file::open(&mut options, &self.path)?;
            failpoint!("events.open.before");
            // The end of an empty log before its head: never a head over old entries.
            file.write_all_at(&[0; 8], MAGIC.len() as u64)?;
            failpoint!("events.open.between");
            file.write_all_at(MAGIC, 0)?;
            self.file = Some(file);
        }
        self.file
            .as_ref()
            .ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    /// Makes sure that `bytes` more can be appended on a file system that is then full.
    pub fn reserve(&mut self, bytes: u64) -> io::Result<()> {
        let wanted = (self.end + bytes).next_multiple_of(GRAIN);
        let (end, room) = (self.end, self.room);
        if wanted <= room {
            return Ok(());
        }
        let file = self.file()?;
        let length = file.metadata()?.len().max(end + 8);
        let missing = usize::try_from(wanted.saturating_sub(length)).unwrap_or(0);
        file.write_all_at(&vec![0; missing], length)?;
        failpoint!("events.reserve.after");
        self.room = wanted;
        Ok(())
    }

    /// Appends an event. The entry is valid with its last byte, and the end after it is in the
    /// same write.
    pub fn append(&mut self, number: u64, echo: bool, payload: &[u8]) -> io::Result<()> {
        let flags = if echo { ECHO } else { 0 };
        let length = u32::try_from(payload.len()).map_err(io::Error::other)?;
        let padded = payload.len().next_multiple_of(8);
        let mut bytes = Vec::with_capacity(HEAD + padded + 8);
        bytes.extend_from_slice(&length.to_le_bytes());
        bytes.extend_from_slice(&sum(number, payload).to_le_bytes());
        bytes.extend_from_slice(&number.to_le_bytes());
        bytes.extend_from_slice(&flags.to_le_bytes());
        bytes.extend_from_slice(payload);
        bytes.resize(HEAD + padded, 0);
        let whole = bytes.len() as u64;
        bytes.extend_from_slice(&[0; 8]);
        let at = self.end;
        failpoint!("events.append.before");
        self.file()?.write_all_at(&bytes, at)?;
        failpoint!("events.append.after");
        self.open.insert(number, (at, flags));
        self.end = at + whole;
        Ok(())
    }

    /// An event needs no second sending.
    pub fn acknowledge(&mut self, number: u64) -> io::Result<()> {
        let Some((at, flags)) = self.open.remove(&number) else {
            return Ok(());
        };
        if self.open.is_empty() {
            self.end = MAGIC.len() as u64;
            let end = self.end;
            failpoint!("events.anew.before");
            self.file()?.write_all_at(&[0; 8], end)?;
            failpoint!("events.anew.after");
            return Ok(());
        }
        let flags = flags | ACKNOWLEDGED;
        failpoint!("events.acknowledge.before");
        self.file()?.write_all_at(&flags.to_le_bytes(), at + 16)?;
        failpoint!("events.acknowledge.after");
        Ok(())
    }

    /// Gives back room beyond `keep` bytes, when nothing is waiting any more. Not for a little: it
    /// would be asked for again at once.
    pub fn shrink(&mut self, keep: u64) -> io::Result<()> {
        let wanted = self.end.saturating_add(keep).next_multiple_of(GRAIN);
        if !self.open.is_empty() || self.room <= wanted.saturating_add(SLACK) {
            return Ok(());
        }
        self.file()?.set_len(wanted)?;
        self.room = wanted;
        Ok(())
    }

    /// Shows others that this log is still worked on, though nobody is responsible for its group:
    /// see [`is_wanted`]. Ends with this process.
    pub fn stay(&mut self) -> io::Result<()> {
        let file = self.file()?;
        sys::try_lock(file, Hold::Alone).map(drop)
    }

    /// False when a new shim of the group has taken over what was in it.
    pub fn is_in_place(&self) -> bool {
        match &self.file {
            Some(file) => lock::is_at(file, &self.path).unwrap_or(true),
            None => true,
        }
    }

    /// Removes the file.
    pub fn remove(&self) -> io::Result<()> {
        match fs::remove_file(&self.path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(path: &Path) -> Vec<u64> {
        let Seen::Present(kept) = read(path) else {
            panic!("unreadable")
        };
        kept.into_iter().map(|(number, ..)| number).collect()
    }

    #[test]
    fn what_is_not_acknowledged_is_read_back_in_order() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.events");
        let mut log = EventLog::new(&path);
        for number in 1..=4 {
            let payload = vec![7; usize::try_from(number).unwrap() * 5];
            log.append(number, number == 2, &payload).unwrap();
        }
        log.acknowledge(1).unwrap();
        log.acknowledge(3).unwrap();
        let expected = vec![(2, true, vec![7; 10]), (4, false, vec![7; 20])];
        assert_eq!(read(&path), Seen::Present(expected));
        log.acknowledge(2).unwrap();
        log.acknowledge(4).unwrap();
        assert_eq!(numbers(&path), [0; 0]);
        log.append(5, false, b"anew").unwrap();
        assert_eq!(numbers(&path), [5]);
        log.remove().unwrap();
        assert_eq!(read(&path), Seen::Absent);
    }

    #[test]
    fn a_take_over_replaces_the_log_when_the_new_one_is_whole() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.events");
        EventLog::new(&path).append(7, true, b"left").unwrap();
        let Seen::Present(kept) = read(&path) else {
            panic!("unreadable")
        };
        // One that was killed at it has left its beginnings, and no place to write to.
        fs::create_dir(begun(&path)).unwrap();
        assert!(EventLog::new(&path).take_over(&kept, 5000).is_err());
        assert_eq!(numbers(&path), [7]);
        fs::remove_dir(begun(&path)).unwrap();
        fs::write(begun(&path), "rcvd-ev1 and more").unwrap();
        let mut log = EventLog::new(&path);
        log.take_over(&kept, 5000).unwrap();
        assert_eq!(numbers(&path), [7]);
        assert_eq!(fs::metadata(&path).unwrap().len(), 8192);
        log.append(8, false, b"new").unwrap();
        log.acknowledge(7).unwrap();
        assert_eq!(numbers(&path), [8]);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_log_of_any_length_is_read_back_whole() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.events");
        let mut log = EventLog::new(&path);
        let payload = vec![7; 1 << 20];
        for number in 1..=20 {
            log.append(number, false, &payload).unwrap();
        }
        assert!(fs::metadata(&path).unwrap().len() > recoverd_common::read::MAX_FILE);
        assert_eq!(numbers(&path), (1..=20).collect::<Vec<_>>());
        let Seen::Present(kept) = read(&path) else {
            panic!("unreadable")
        };
        let mut next = EventLog::new(&path);
        next.take_over(&kept, 4096).unwrap();
        assert_eq!(numbers(&path).len(), 20);
    }

    #[test]
    fn an_empty_log_gives_back_its_room_but_for_what_is_promised() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.events");
        let length = || fs::metadata(&path).unwrap().len();
        let mut log = EventLog::new(&path);
        log.reserve(1 << 20).unwrap();
        log.append(1, true, b"waits").unwrap();
        log.shrink(5000).unwrap();
        assert!(length() > 1 << 20, "an event is still waiting");
        log.acknowledge(1).unwrap();
        log.shrink(5000).unwrap();
        assert_eq!(length(), 8192);
        // Room is made again when it is asked for.
        log.reserve(50_000).unwrap();
        assert!(length() >= 50_000);
        log.shrink(5000).unwrap();
        assert!(length() >= 50_000, "it goes to and fro");
        log.append(2, false, b"more").unwrap();
        assert_eq!(numbers(&path), [2]);
    }

    #[test]
    fn who_still_works_on_a_log_shows_it_and_sees_a_new_one_in_its_place() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.events");
        assert!(!is_wanted(&path, true));
        let mut old = EventLog::new(&path);
        old.append(1, false, b"left").unwrap();
        assert!(!is_wanted(&path, false) && is_wanted(&path, true));
        old.stay().unwrap();
        assert!(is_wanted(&path, false) && old.is_in_place());
        let Seen::Present(kept) = read(&path) else {
            panic!("unreadable")
        };
        let mut new = EventLog::new(&path);
        new.take_over(&kept, 0).unwrap();
        assert!(!old.is_in_place() && new.is_in_place());
        old.acknowledge(1).unwrap();
        assert_eq!(numbers(&path), [1]);
        new.acknowledge(1).unwrap();
        assert!(!is_wanted(&path, true));
    }

    #[test]
    fn a_cut_at_any_byte_loses_the_cut_entry_only() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.events");
        let mut log = EventLog::new(&path);
        log.append(1, true, b"first").unwrap();
        let after_first = fs::read(&path).unwrap().len();
        log.append(2, true, b"second one").unwrap();
        let whole = fs::read(&path).unwrap();
        for cut in after_first..whole.len() {
            fs::write(&path, &whole[..cut]).unwrap();
            let found = numbers(&path);
            assert_eq!(found[0], 1);
            // The padding and the end may be missing.
            assert_eq!(found.len() == 2, cut >= whole.len() - 8 - 6, "{cut}");
        }
    }

    #[test]
    fn a_new_writer_begins_anew_and_reserved_room_is_real() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.events");
        let mut log = EventLog::new(&path);
        log.append(1, true, &[1; 100]).unwrap();
        let mut log = EventLog::new(&path);
        log.reserve(5000).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().len(), 8192);
        assert_eq!(numbers(&path), [0; 0]);
        log.append(2, false, b"x").unwrap();
        assert_eq!(numbers(&path), [2]);
        assert_eq!(fs::metadata(&path).unwrap().len(), 8192);
        fs::write(&path, "something else").unwrap();
        assert!(matches!(read(&path), Seen::Unknown(_)));
    }
}

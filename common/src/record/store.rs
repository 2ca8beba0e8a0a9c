//! Reading the record, and replacing it whole.
//!
//! The writer keeps two files of one size, `<socket>.record` and `<socket>.record.spare`: it
//! writes the spare and exchanges the names. So a reader sees the old record or the new one,
//! and a state change needs no new block and no new inode of a full `/run`: what it will need is
//! asked for by [`Store::reserve`] before anything runs. The rest of a file is blanks, which
//! JSON allows. Nothing is synced: a machine crash makes the record void anyway (boot id).

use std::{
    fs::{self, File},
    io::{self, Write},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    fcntl::{AT_FDCWD, RenameFlags, renameat2},
};

use super::{Record, version};
use crate::{
    failpoint, own_file,
    read::{MAX_FILE, read_file},
    seen::Seen,
};

/// Reads the record at `path`. *Absent* only if there is definitely none; everything that makes
/// it useless (a symlink, too large, cut, corrupt, from the future) is *unknown* with its reason,
/// and the file is left as it is.
pub fn read(path: &Path) -> Seen<Record> {
    read_file(path, MAX_FILE).and_then(|bytes| match version::decode(&bytes) {
        Ok(record) => Seen::Present(record),
        Err(why) => Seen::Unknown(why.to_string()),
    })
}

/// The name of the second file, as [`crate::paths::Beside`] has it.
fn spare(record: &Path) -> PathBuf {
    let mut name = record.as_os_str().to_owned();
    name.push(".spare");
    PathBuf::from(name)
}

/// The one writer of a record.
#[derive(Debug)]
pub struct Store {
    path: PathBuf,
    spare: PathBuf,
    /// Bytes that each of the two files has for sure.
    room: usize,
}

/// Files grow by this, bytes: one page, so that a small change needs no new one.
const GRAIN: usize = 4096;

impl Store {
    /// A writer for `path`, which need not exist. Nothing is touched yet.
    pub fn new(path: &Path) -> Self {
        Self {
            path: path.to_owned(),
            spare: spare(path),
            room: 0,
        }
    }

    /// The room that both files have by now, bytes.
    pub fn length(&self) -> usize {
        let length = |path: &Path| fs::symlink_metadata(path).map_or(0, |meta| meta.len());
        let both = length(&self.path).min(length(&self.spare));
        usize::try_from(both).unwrap_or(0)
    }

    /// Makes sure that a record of `bytes` can be written later, twice over, on a file system
    /// that is then full.
    pub fn reserve(&mut self, bytes: usize) -> io::Result<()> {
        let room = bytes
            .checked_next_multiple_of(GRAIN)
            .filter(|room| *room as u64 <= MAX_FILE)
            .ok_or_else(|| io::Error::from(io::ErrorKind::FileTooLarge))?;
        if room <= self.room {
            return Ok(());
        }
        for path in [&self.path, &self.spare] {
            let file = open(path)?;
            let length = usize::try_from(file.metadata()?.len()).unwrap_or(usize::MAX);
            // Real bytes, not holes: posix_fallocate may be emulated, writing never lies.
            let missing = vec![b' '; room.saturating_sub(length)];
            file.write_all_at(&missing, length as u64)?;
            failpoint!("record.reserve.between");
        }
        failpoint!("record.reserve.after");
        self.room = room;
        Ok(())
    }

    /// Replaces the record.
    pub fn write(&mut self, record: &Record) -> io::Result<()> {
        self.write_bytes(version::encode(record), self.room)
    }

    /// As [`Store::write`], for a record already encoded. From now on room for `keep` bytes is
    /// enough; what was reserved beyond is given back.
    pub fn write_bytes(&mut self, mut bytes: Vec<u8>, keep: usize) -> io::Result<()> {
        if bytes.len() as u64 > MAX_FILE {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        let keep = keep.min(self.room).max(bytes.len());
        self.room = self.room.min(keep.next_multiple_of(GRAIN));
        bytes.resize(keep.next_multiple_of(GRAIN), b' ');
        failpoint!("record.write.before");
        let mut file = open(&self.spare)?;
        failpoint!("record.write.opened");
        file.write_all(&bytes)?;
        failpoint!("record.write.written");
        // A longer spare of before; never shorter than what is reserved.
        file.set_len(bytes.len() as u64)?;
        drop(file);
        failpoint!("record.exchange.before");
        match renameat2(
            AT_FDCWD,
            &self.spare,
            AT_FDCWD,
            &self.path,
            RenameFlags::RENAME_EXCHANGE,
        ) {
            Ok(()) => {
                failpoint!("record.exchange.after");
                Ok(())
            }
            // No record yet (the first write), or a file system that cannot exchange: the spare
            // is made anew by the next write.
            Err(Errno::ENOENT | Errno::EINVAL | Errno::ENOSYS) => {
                fs::rename(&self.spare, &self.path)?;
                failpoint!("record.rename.after");
                Ok(())
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Removes both files; what is not there is no error.
    pub fn remove(&self) -> io::Result<()> {
        let spare = remove(&self.spare);
        failpoint!("record.remove.between");
        spare.and(remove(&self.path))
    }
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Opens for writing in place.
fn open(path: &Path) -> io::Result<File> {
    own_file::open(
        File::options().write(true).create(true).truncate(false),
        path,
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::tests::full;
    use std::os::unix::fs::{MetadataExt, symlink};

    #[test]
    fn a_record_is_read_as_it_was_written_and_old_ones_leave_nothing_behind() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.record");
        assert_eq!(read(&path), Seen::Absent);
        let mut store = Store::new(&path);
        let mut record = full();
        for length in [5000, 0, 9000, 10] {
            record.shim.exe = "x".repeat(length);
            store.write(&record).unwrap();
            assert_eq!(read(&path), Seen::Present(record.clone()), "{length}");
        }
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        store.remove().unwrap();
        store.remove().unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_longer_spare_of_before_is_overwritten_whole() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.record");
        fs::write(spare(&path), vec![b'x'; 50_000]).unwrap();
        let mut store = Store::new(&path);
        store.write(&full()).unwrap();
        assert_eq!(read(&path), Seen::Present(full()));
    }

    #[test]
    fn reserved_room_makes_both_files_that_large_with_real_bytes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.record");
        let mut store = Store::new(&path);
        store.reserve(10_000).unwrap();
        store.write(&full()).unwrap();
        store.write(&full()).unwrap();
        for path in [path.clone(), spare(&path)] {
            assert_eq!(fs::metadata(&path).unwrap().len(), 12_288);
        }
        // Both fall back when less is enough.
        for _ in 0..2 {
            store.write_bytes(version::encode(&full()), 5000).unwrap();
        }
        for path in [path.clone(), spare(&path)] {
            assert_eq!(fs::metadata(&path).unwrap().len(), 8192);
        }
        assert!(store.reserve(usize::MAX).is_err());
        assert!(store.reserve(17 << 20).is_err());
    }

    #[test]
    fn what_cannot_be_used_is_unknown_with_a_reason_and_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.record");
        fs::write(&path, "{\"format\": 9, \"tasks\": \"?\"}").unwrap();
        let Seen::Unknown(why) = read(&path) else {
            panic!("it was read");
        };
        assert_eq!(why, "has format 9, newer than 1");
        assert!(path.exists());
        let link = dir.path().join("y.record");
        symlink(&path, &link).unwrap();
        assert!(matches!(read(&link), Seen::Unknown(_)));
        // Neither does the writer follow it.
        symlink(&path, spare(&link)).unwrap();
        assert!(Store::new(&link).write(&full()).is_err());
    }
}

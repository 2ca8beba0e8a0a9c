//! What recoverd did: `/var/lib/recoverd/history.jsonl`, one JSON object a line, only appended to.
//!
//! Several recoverds may write at once (a hook, a repair, the daemon): a line is one `write` to a
//! file opened for appending, so lines do not mix. A machine that dies may leave a cut line; the
//! next writer begins a new one, and a reader skips what is no object and says so. When the file
//! is large it becomes `….1`, that one `….2`, and so on; the oldest goes.
//!
//! Nothing is decided by what stands here: it is for people.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::{FileExt, MetadataExt},
    path::{Path, PathBuf},
    time::Duration,
};

use nix::fcntl::{Flock, FlockArg};
use recoverd_common::{
    failpoint, own_file,
    read::{MAX_FILE, read_file},
    seen::Seen,
    timestamp::Timestamp,
};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::{
    config::parse_duration,
    facts::{Gap, one_line},
    own_dir,
};

/// From this size on the file is set aside, bytes: some ten thousand lines.
const FULL: u64 = 4 << 20;
/// How many older files are kept.
const KEPT: u32 = 4;

/// What kind of line it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// A command begins to act.
    Began,
    /// It is about to do this. With nothing after it, it was killed meanwhile.
    Intended,
    /// This was done, and what it promised holds.
    Done,
    /// This was not done: what it required had changed, or a word was missing.
    Skipped,
    /// This was tried, and what it promised does not hold.
    Failed,
    /// Something was seen.
    Noted,
    /// The command came to its end.
    Ended,
}

impl Event {
    /// The word.
    pub fn word(self) -> &'static str {
        match self {
            Event::Began => "began",
            Event::Intended => "intended",
            Event::Done => "done",
            Event::Skipped => "skipped",
            Event::Failed => "failed",
            Event::Noted => "noted",
            Event::Ended => "ended",
        }
    }
}

/// One line.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Entry {
    /// When.
    pub at: Timestamp,
    /// Which run of recoverd: lines of one run belong together.
    pub run: String,
    /// The command: `repair`, `pre-start`…
    pub command: String,
    /// One of [`Event`]'s words; a later version may know more.
    pub event: String,
    /// About what: `NS/ID`, `shim PID`, a path; empty for the run itself.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub subject: String,
    /// What happened, one line.
    pub text: String,
    /// What a program may want to know beside it.
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    pub details: Map<String, Value>,
}

/// The history as one run of a command writes it.
#[derive(Debug)]
pub struct History {
    path: PathBuf,
    run: String,
    command: &'static str,
    full: u64,
}

/// A line could not be written.
#[derive(Debug, thiserror::Error)]
#[error("write history {}: {error}", .path.display())]
pub struct NotWritten {
    path: PathBuf,
    error: io::Error,
}

impl History {
    /// For this run of `command`. Nothing is opened yet.
    pub fn new(path: &Path, command: &'static str) -> Self {
        let now = Timestamp::now();
        Self {
            path: path.to_owned(),
            // Two runs differ in pid or, after a reboot or a full round of pids, in time.
            run: format!("{:x}-{:x}", now.seconds, std::process::id()),
            command,
            full: FULL,
        }
    }

    /// Which run this is.
    pub fn run(&self) -> &str {
        &self.run
    }

    /// Appends a line.
    pub fn tell(
        &self,
        event: Event,
        subject: &str,
        text: &str,
        details: Map<String, Value>,
    ) -> Result<(), NotWritten> {
        let entry = Entry {
            at: Timestamp::now(),
            run: self.run.clone(),
            command: self.command.into(),
            event: event.word().into(),
            subject: one_line(subject),
            text: one_line(text),
            details,
        };
        self.append(&entry).map_err(|error| NotWritten {
            path: self.path.clone(),
            error,
        })
    }

    fn append(&self, entry: &Entry) -> io::Result<()> {
        if let Some(dir) = self.path.parent() {
            own_dir::open(dir)?;
        }
        let mut file = open(&self.path)?;
        if file.metadata()?.len() >= self.full {
            file = self.rotate(file)?;
        }
        let mut line = Vec::with_capacity(512);
        let length = file.metadata()?.len();
        if let Some(last) = length.checked_sub(1) {
            let mut byte = [b'\n'];
            file.read_at(&mut byte, last)?;
            if byte != [b'\n'] {
                line.push(b'\n');
            }
        }
        serde_json::to_writer(&mut line, entry)?;
        line.push(b'\n');
        failpoint!("history.append.before");
        let written = file.write_all(&line);
        failpoint!("history.append.after");
        written
    }

    /// Sets the full file aside and opens a new one. Whoever else is at it just now writes on to
    /// the one that it has: no line is lost, it stands in the older file.
    fn rotate(&self, file: File) -> io::Result<File> {
        let file = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(file) => file,
            Err((file, _)) => return Ok(file),
        };
        let there = fs::symlink_metadata(&self.path)?;
        let mine = file.metadata()?;
        if (there.dev(), there.ino()) == (mine.dev(), mine.ino()) {
            for number in (1..KEPT).rev() {
                let newer = numbered(&self.path, number);
                match fs::rename(newer, numbered(&self.path, number.saturating_add(1))) {
                    Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                    Ok(()) | Err(_) => {}
                }
                failpoint!("history.rotate.between");
            }
            fs::rename(&self.path, numbered(&self.path, 1))?;
            failpoint!("history.rotate.after");
        }
        open(&self.path)
    }
}

fn open(path: &Path) -> io::Result<File> {
    own_file::open(
        OpenOptions::new().read(true).append(true).create(true),
        path,
    )
}

fn numbered(path: &Path, number: u32) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{number}"));
    name.into()
}

/// From when on somebody wants to read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Since {
    /// From this moment on.
    Moment(Timestamp),
    /// Not longer ago than this.
    Ago(Duration),
}

impl Since {
    /// As it is typed.
    pub fn parse(text: &str) -> Result<Self, String> {
        if let Ok(at) = text.parse() {
            return Ok(Since::Moment(at));
        }
        parse_duration(text)
            .map(Since::Ago)
            .map_err(|_| "must be a time such as 2026-11-24T05:00:00Z or 90s, 10m, 2h".into())
    }

    /// The moment, seen from `now`.
    pub fn moment(self, now: Timestamp) -> Timestamp {
        match self {
            Since::Moment(at) => at,
            Since::Ago(time) => {
                let seconds = i64::try_from(time.as_secs()).unwrap_or(i64::MAX);
                Timestamp {
                    seconds: now.seconds.saturating_sub(seconds),
                    ..now
                }
            }
        }
    }
}

/// Everything that is kept, oldest first, and what of it could not be read.
pub fn read(path: &Path) -> (Vec<Entry>, Vec<Gap>) {
    let (mut entries, mut gaps) = (Vec::new(), Vec::new());
    let older = (1..=KEPT).rev().map(|number| numbered(path, number));
    for file in older.chain([path.to_owned()]) {
        let name = file.display().to_string();
        let bytes = match read_file(&file, MAX_FILE) {
            Seen::Present(bytes) => bytes,
            Seen::Absent => continue,
            Seen::Unknown(why) => {
                gaps.push(Gap::new(name, why));
                continue;
            }
        };
        let mut bad = 0_u64;
        for line in bytes.split(|byte| *byte == b'\n') {
            if line.is_empty() {
                continue;
            }
            match serde_json::from_slice::<Entry>(line) {
                Ok(entry) => entries.push(entry),
                Err(_) => bad = bad.saturating_add(1),
            }
        }
        if bad > 0 {
            let plural = if bad == 1 { "line is" } else { "lines are" };
            gaps.push(Gap::new(
                name,
                format!("{bad} {plural} cut or no entry, skipped"),
            ));
        }
    }
    (entries, gaps)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn history(path: &Path) -> History {
        History::new(path, "repair")
    }

    fn tell(history: &History, text: &str) {
        let details = [("signal".to_owned(), Value::from("SIGKILL"))];
        let details = details.into_iter().collect();
        history.tell(Event::Done, "ns/a", text, details).unwrap();
    }

    fn texts(path: &Path) -> Vec<String> {
        read(path).0.into_iter().map(|entry| entry.text).collect()
    }

    #[test]
    fn a_line_is_read_as_it_was_told() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lib/history.jsonl");
        assert_eq!(read(&path), (Vec::new(), Vec::new()));
        let history = history(&path);
        tell(&history, "one\nline");
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        let (entries, gaps) = read(&path);
        assert_eq!((entries.len(), gaps.len()), (1, 0));
        let entry = &entries[0];
        assert_eq!(
            (entry.command.as_str(), entry.event.as_str()),
            ("repair", "done")
        );
        assert_eq!(
            (entry.subject.as_str(), entry.run.as_str()),
            ("ns/a", history.run())
        );
        assert_eq!(entry.text, "one\u{fffd}line");
        assert_eq!(entry.details["signal"], "SIGKILL");
    }

    #[test]
    fn a_cut_line_costs_itself_only_and_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("history.jsonl");
        tell(&history(&path), "first");
        let mut file = open(&path).unwrap();
        file.write_all(br#"{"at":"2026-11-2"#).unwrap();
        assert_eq!(texts(&path), ["first"]);
        assert_eq!(read(&path).1.len(), 1);
        tell(&history(&path), "second");
        let (entries, gaps) = read(&path);
        assert_eq!(entries.len(), 2);
        assert_eq!(gaps[0].why, "1 line is cut or no entry, skipped");
    }

    #[test]
    fn writers_at_once_lose_and_mix_no_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("history.jsonl");
        std::thread::scope(|scope| {
            for writer in 0..4 {
                let path = &path;
                scope.spawn(move || {
                    let mut history = history(path);
                    // Small enough for some rotations while they write.
                    history.full = 20_000;
                    for line in 0..100 {
                        tell(&history, &format!("{writer}-{line}"));
                    }
                });
            }
        });
        let (entries, gaps) = read(&path);
        assert_eq!(gaps, []);
        assert_eq!(entries.len(), 400);
        for writer in 0..4 {
            let prefix = format!("{writer}-");
            let lines = entries.iter().filter(|e| e.text.starts_with(&prefix));
            assert_eq!(lines.count(), 100);
        }
    }

    #[test]
    fn the_oldest_file_goes_when_there_are_too_many() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("history.jsonl");
        let mut history = history(&path);
        history.full = 1;
        for number in 0..10 {
            tell(&history, &number.to_string());
        }
        assert_eq!(texts(&path), ["5", "6", "7", "8", "9"]);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 5);
    }

    #[test]
    fn since_is_a_moment_or_so_long_ago() {
        let now = Timestamp {
            seconds: 1_795_449_900,
            nanos: 0,
        };
        let moment = |text| Since::parse(text).unwrap().moment(now).seconds;
        assert_eq!(moment("2026-11-23T16:04:00Z"), 1_795_449_840);
        assert_eq!(moment("2m"), 1_795_449_780);
        assert!(moment("8760h") > 0);
        assert!(Since::parse("yesterday").is_err());
    }

    #[test]
    fn a_symlink_is_neither_written_to_nor_read() {
        let dir = tempfile::tempdir().unwrap();
        let (path, target) = (dir.path().join("link"), dir.path().join("target"));
        fs::write(&target, "").unwrap();
        std::os::unix::fs::symlink(&target, &path).unwrap();
        let refused = history(&path).tell(Event::Noted, "", "x", Map::new());
        assert!(
            refused
                .unwrap_err()
                .to_string()
                .starts_with("write history")
        );
        assert_eq!(fs::read(&target).unwrap(), b"");
        assert_eq!(read(&path).1[0].why, "is a symlink");
    }
}

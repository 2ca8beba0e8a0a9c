//! Lines for containerd's log, by the fifo `log` in the bundle. Never waits, never kills: opened
//! read-write, so that a containerd that is away is no EPIPE, and without blocking, so that a
//! containerd that is hung costs a line and not the shim.

use std::{
    fs::File,
    io::Write,
    os::{
        fd::AsFd,
        unix::fs::{FileTypeExt, OpenOptionsExt},
    },
    path::Path,
};

use nix::fcntl::OFlag;
use recoverd_common::timestamp::Timestamp;

use crate::sys;

/// A shim's voice.
#[derive(Debug)]
pub struct Log {
    fifo: Option<File>,
    debug: bool,
}

/// How much a line matters, in containerd's words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Level {
    /// With `-debug` only.
    Debug,
    /// As it goes.
    Info,
    /// Something is not as it should be.
    Warning,
    /// Something is lost.
    Error,
}

impl Level {
    fn word(self) -> &'static str {
        match self {
            Level::Debug => "debug",
            Level::Info => "info",
            Level::Warning => "warning",
            Level::Error => "error",
        }
    }
}

impl Log {
    /// Opens `<bundle>/log`; without it the shim is mute, which is no reason not to serve.
    pub fn open(bundle: &Path, debug: bool) -> Self {
        let flags = OFlag::O_NONBLOCK | OFlag::O_NOFOLLOW;
        let fifo = File::options()
            .read(true)
            .write(true)
            .custom_flags(flags.bits())
            .open(bundle.join("log"))
            .ok()
            .filter(|file| file.metadata().is_ok_and(|meta| meta.file_type().is_fifo()));
        if let Some(fifo) = &fifo {
            sys::become_stderr(fifo.as_fd());
        }
        Self { fifo, debug }
    }

    /// Of a process that belongs to no bundle.
    pub fn none() -> Self {
        Self {
            fifo: None,
            debug: false,
        }
    }

    /// Writes a line, if anybody could ever read it.
    pub fn say(&self, level: Level, text: &str) {
        if level == Level::Debug && !self.debug {
            return;
        }
        let Some(mut fifo) = self.fifo.as_ref() else {
            return;
        };
        let line = line(Timestamp::now(), level, text);
        // One write, shorter than PIPE_BUF: whole or not at all.
        let _ = fifo.write(line.as_bytes());
    }
}

fn line(at: Timestamp, level: Level, text: &str) -> String {
    let text: String = text.chars().take(1000).collect();
    format!(
        "time=\"{at}\" level={} msg={text:?} runtime=io.containerd.recoverd.v1\n",
        level.word()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_one_line_whatever_the_text() {
        let at = Timestamp {
            seconds: 0,
            nanos: 0,
        };
        let text = line(at, Level::Error, &"a\n\"b\"".repeat(5000));
        assert_eq!(text.matches('\n').count(), 1);
        assert!(
            text.starts_with("time=\"1970-01-01T00:00:00Z\" level=error msg=\"a\\n\\\"b\\\"a\\n")
        );
        assert!(text.len() < 4096);
    }

    #[test]
    fn a_full_or_missing_fifo_costs_lines_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        Log {
            fifo: None,
            debug: true,
        }
        .say(Level::Info, "x");
        nix::unistd::mkfifo(&dir.path().join("log"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        let fifo = File::options()
            .read(true)
            .write(true)
            .custom_flags(OFlag::O_NONBLOCK.bits())
            .open(dir.path().join("log"))
            .unwrap();
        let log = Log {
            fifo: Some(fifo),
            debug: false,
        };
        for _ in 0..10_000 {
            log.say(Level::Info, "a line that nobody reads");
        }
    }
}

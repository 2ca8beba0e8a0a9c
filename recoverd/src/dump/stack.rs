//! `dump --stack`: has a Go shim write the stacks of its goroutines, and catches them where they
//! can be caught without taking them from anybody.
//!
//! The shim writes into the bundle's `log` fifo. While containerd is up, it reads that fifo and
//! copies it to its own standard error; a second reader would steal from it, so the stacks are
//! to be looked for in containerd's log (`collect` brings its tail). While containerd is down
//! the fifo has no reader and the shim's writes fail; then we are the reader for a moment.

use std::{
    fs::File,
    io::{self, Read},
    os::fd::AsFd,
    os::unix::fs::{FileTypeExt, OpenOptionsExt},
    path::Path,
    thread,
    time::{Duration, Instant},
};

use nix::sys::signal::Signal;
use recoverd_common::{
    proc::{Proc, ProcessId},
    read::read_text,
    seen::Seen,
    sys,
};

use crate::{correlate::Kind, facts::Shim};

/// How long a shim may take to begin; on a loaded node a second is nothing.
const BEGIN: Duration = Duration::from_secs(3);
/// So long without a byte after the first: it has ended.
const QUIET: Duration = Duration::from_millis(300);
const POLL: Duration = Duration::from_millis(20);
/// Most of it that is kept, bytes; the Go shim cuts at 1 MiB by itself.
const MAX_STACKS: usize = 4 << 20;

/// What came of it.
#[derive(Debug, PartialEq, Eq)]
pub enum Outcome {
    /// No signal was sent, because.
    NotSent(String),
    /// It was sent; the stacks go to containerd's standard error.
    ToContainerd,
    /// It was sent, and this is what the shim wrote.
    Caught(Vec<u8>),
}

/// Asks the shim, if it is one that can be asked. `reader_is_up`: a containerd reads the fifo, or
/// may.
pub fn ask(
    proc: &Proc,
    shim: &Shim,
    kind: Option<Kind>,
    bundle: Option<&Path>,
    reader_is_up: bool,
) -> Outcome {
    if let Err(why) = can_be_asked(proc, shim, kind) {
        return Outcome::NotSent(why);
    }
    // Opened before the signal: what is written without a reader is lost.
    let mut fifo = match (reader_is_up, bundle) {
        (true, _) => None,
        (false, Some(bundle)) => match open_fifo(&bundle.join("log")) {
            Ok(fifo) => Some(fifo),
            Err(error) => {
                let why = format!("containerd is down and the bundle's log: {error}");
                return Outcome::NotSent(why);
            }
        },
        (false, None) => {
            let why = "containerd is down and there is no bundle: nobody would read the stacks";
            return Outcome::NotSent(why.into());
        }
    };
    if let Err(why) = send(proc, shim.id) {
        return Outcome::NotSent(why);
    }
    match &mut fifo {
        None => {
            // containerd's copy goes through two pipes; then its log is read.
            thread::sleep(Duration::from_secs(1));
            Outcome::ToContainerd
        }
        Some(fifo) => Outcome::Caught(catch(fifo)),
    }
}

/// Only a stock Go shim writes stacks at SIGUSR1. Any other program may end by it, and the
/// workload with it, so there has to be proof, not a name alone.
fn can_be_asked(proc: &Proc, shim: &Shim, kind: Option<Kind>) -> Result<(), String> {
    match kind {
        Some(Kind::Stock) => {}
        Some(Kind::Ours) => return Err("it is a recoverd shim, which has no goroutines".into()),
        Some(Kind::Foreign) | None => return Err("it is not known to be a runc shim".into()),
    }
    if !shim.name.starts_with("containerd-shim-runc-v") {
        return Err(format!("{} may not be written in Go", shim.name));
    }
    let status = match read_text(&proc.path(shim.id.pid, "status"), 64 << 10) {
        Seen::Present(status) => status,
        Seen::Absent => return Err("it has ended".into()),
        Seen::Unknown(why) => return Err(format!("read its status: {why}")),
    };
    catches_as_go_does(&status)?;
    match status_field(&status, "State:").and_then(|state| state.chars().next()) {
        Some('R' | 'S') => Ok(()),
        Some(state) => Err(format!("it is in state {state} and would not react")),
        None => Err("its status has no state".into()),
    }
}

/// A Go program catches nearly all signals, SIGURG (which stops goroutines) among them; a
/// program that does not catch SIGUSR1 is ended by it.
fn catches_as_go_does(status: &str) -> Result<(), String> {
    let caught = status_field(status, "SigCgt:")
        .and_then(|field| u64::from_str_radix(field, 16).ok())
        .ok_or("its status does not tell which signals it catches")?;
    for signal in [Signal::SIGUSR1, Signal::SIGURG] {
        let bit = (signal as u32).saturating_sub(1);
        if caught & (1 << bit) == 0 {
            return Err(format!("it does not catch {signal:?}, so it is no Go shim"));
        }
    }
    Ok(())
}

fn status_field<'a>(status: &'a str, name: &str) -> Option<&'a str> {
    let line = status.lines().find_map(|line| line.strip_prefix(name))?;
    Some(line.trim())
}

/// Sends SIGUSR1 to this very process and no other.
fn send(proc: &Proc, id: ProcessId) -> Result<(), String> {
    let pidfd = sys::pidfd_open(id.pid).map_err(|error| format!("open {}: {error}", id.pid))?;
    // After opening: from here on the descriptor means the process that is checked now.
    match proc.living(id) {
        Seen::Present(_) => {}
        Seen::Absent => return Err("it has ended".into()),
        Seen::Unknown(why) => return Err(format!("read its start time: {why}")),
    }
    sys::pidfd_signal(pidfd.as_fd(), Signal::SIGUSR1 as libc::c_int)
        .map_err(|error| format!("signal {}: {error}", id.pid))
}

fn open_fifo(path: &Path) -> io::Result<File> {
    let flags = nix::fcntl::OFlag::O_NOFOLLOW | nix::fcntl::OFlag::O_NONBLOCK;
    let file = File::options()
        .read(true)
        .custom_flags(flags.bits())
        .open(path)?;
    match file.metadata()?.file_type().is_fifo() {
        true => Ok(file),
        false => Err(io::Error::other("is no fifo")),
    }
}

/// Reads until nothing more comes.
fn catch(fifo: &mut File) -> Vec<u8> {
    let mut caught = Vec::new();
    let mut until = Instant::now() + BEGIN;
    let mut buffer = [0; 16 << 10];
    while Instant::now() < until && caught.len() < MAX_STACKS {
        match fifo.read(&mut buffer) {
            // Nobody has it open for writing (any more): the shim may still come.
            Ok(0) => thread::sleep(POLL),
            Ok(count) => {
                caught.extend(buffer.iter().take(count));
                until = Instant::now() + QUIET;
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => thread::sleep(POLL),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => break,
        }
    }
    caught
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_catches_signals_as_go_does_is_asked() {
        // A stock shim of containerd 1.6.20 and a Rust shim, from /proc/<pid>/status.
        let go = "State:\tS (sleeping)\nSigCgt:\tfffffffd7fc1feff\n";
        let rust = "State:\tS (sleeping)\nSigCgt:\t0000000000000440\n";
        assert_eq!(catches_as_go_does(go), Ok(()));
        assert!(catches_as_go_does(rust).unwrap_err().contains("SIGUSR1"));
        // SIGUSR1 alone proves nothing about its author's language.
        let usr1 = "SigCgt:\t0000000000000200\n";
        assert!(catches_as_go_does(usr1).unwrap_err().contains("SIGURG"));
        assert!(catches_as_go_does("").is_err() && catches_as_go_does("SigCgt: x").is_err());
    }

    #[test]
    fn what_a_shim_writes_is_caught_to_its_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let mut fifo = open_fifo(&path).unwrap();
        let text = "goroutine 1 [running]:\n".repeat(20_000);
        let writer = {
            let (path, text) = (path.clone(), text.clone());
            thread::spawn(move || std::fs::write(path, text).unwrap())
        };
        assert_eq!(catch(&mut fifo), text.as_bytes());
        writer.join().unwrap();
        std::fs::write(dir.path().join("file"), "").unwrap();
        std::os::unix::fs::symlink(&path, dir.path().join("link")).unwrap();
        assert!(open_fifo(&dir.path().join("file")).is_err());
        assert!(open_fifo(&dir.path().join("link")).is_err());
    }

    #[test]
    fn a_process_with_another_start_time_gets_no_signal() {
        let mut child = std::process::Command::new("sleep")
            .arg("300")
            .spawn()
            .unwrap();
        let proc = Proc::new("/proc");
        let pid = i32::try_from(child.id()).unwrap();
        let id = proc.stat(pid).present().unwrap().id;
        let other = ProcessId {
            start_time: id.start_time + 1,
            ..id
        };
        assert_eq!(send(&proc, other), Err("it has ended".into()));
        assert!(child.try_wait().unwrap().is_none());
        assert_eq!(send(&proc, id), Ok(()));
        assert!(!child.wait().unwrap().success());
    }
}

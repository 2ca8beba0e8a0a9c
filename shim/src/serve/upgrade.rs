//! Becoming another executable in the same process: see `recoverd_common::handoff`.
//!
//! ```text
//! asked ── trial: a child reads the real message ── due ── message, exec ═══▶ go_on ── answered
//!   └ not an executable: refused   └ it cannot: refused     └ exec fails: refused
//! ```
//!
//! Whatever is refused, nothing has changed. Nothing is waited for: children at work go on, they
//! are the next image's children too.

use std::{
    collections::BTreeSet,
    error::Error,
    ffi::CString,
    fs::{self, File},
    io::{self, Read, Seek, Write},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd},
        unix::{ffi::OsStrExt, fs::MetadataExt},
    },
    path::{Path, PathBuf},
};

use nix::{
    fcntl::{FcntlArg, FdFlag, SealFlag, fcntl},
    sys::{
        epoll::{EpollEvent, EpollFlags},
        memfd::{MFdFlags, memfd_create},
    },
    unistd::{Pid, execv},
};
use recoverd_common::{failpoint, handoff};

use super::{EVENTS, Shim, failed, now, prepare};
use crate::{
    args::Flags,
    carry::{self, Coming, Leaving, Numbered},
    children::{self, ChildFile, Plan, Spawned},
    info,
    log::{Level, Log},
    reaper,
    state::Input,
    sys,
};

/// For a new executable to read the message; a healthy one takes ten milliseconds.
const TRIAL_MS: u64 = 5_000;
/// Longest message, bytes.
const MAX_MESSAGE: u64 = 64 << 20;

/// A file as it was when it was tried: what is executed is what was tried.
type Identity = (u64, u64, i64, i64, u64);

/// A new executable that is being tried.
#[derive(Debug)]
pub struct Trial {
    executable: PathBuf,
    identity: Identity,
    pid: Pid,
    words: Option<OwnedFd>,
    until: u64,
    /// It can read our message: it is its turn.
    passed: bool,
}

impl Trial {
    /// When it has taken too long.
    pub fn deadline(&self) -> u64 {
        self.until
    }
}

fn identity(path: &Path) -> io::Result<Identity> {
    let meta = fs::metadata(path)?;
    if !meta.is_file() || meta.mode() & 0o111 == 0 {
        return Err(io::Error::other("is not an executable file"));
    }
    let changed = (meta.mtime(), meta.mtime_nsec());
    Ok((meta.dev(), meta.ino(), changed.0, changed.1, meta.size()))
}

/// `-handoff-check`: whether this executable can read the message on its standard input.
pub fn check() -> Result<(), Box<dyn Error>> {
    let mut bytes = Vec::new();
    io::stdin().take(MAX_MESSAGE).read_to_end(&mut bytes)?;
    carry::check(&bytes)?;
    let mut out = io::stdout().lock();
    writeln!(out, "{}{}", handoff::READS, info::VERSION_NUMBER)?;
    Ok(out.flush()?)
}

/// `-handoff`: serves on, as the next image of this process.
pub fn go_on(flags: &Flags, message: RawFd) -> Result<(), Box<dyn Error>> {
    failpoint!("upgrade.image.before");
    let message = sys::inherited(message).ok_or("the message is not there")?;
    let mut bytes = Vec::new();
    File::from(message)
        .take(MAX_MESSAGE)
        .read_to_end(&mut bytes)?;
    let coming = carry::take(&bytes)?;
    drop(bytes);
    failpoint!("upgrade.taken.after");
    let log = Log::open(Path::new("."), flags.debug);
    let (namespace, socket) = (flags.namespace.as_str(), coming.socket.clone());
    let (mut shim, signals) = prepare(namespace, flags.group(), &flags.address, socket, log)?;
    let lock = shim.restore(coming)?;
    failpoint!("upgrade.restored.after");
    failpoint!("upgrade.record.before");
    shim.write_record();
    failpoint!("upgrade.record.after");
    let text = format!("version {} serves on", info::VERSION_NUMBER);
    shim.log.say(Level::Info, &text);
    let version = info::VERSION_NUMBER.to_owned();
    shim.handle(Input::Upgraded(Ok(version)));
    failpoint!("upgrade.answer.after");
    // What ended meanwhile is a pending signal, or was one before the other image looked.
    shim.reap();
    shim.run(&signals, lock)
}

impl Shim {
    /// Lets a child try whether it can go on from here.
    pub(super) fn try_executable(&mut self, executable: PathBuf) {
        match self.start_trial(executable) {
            Ok(trial) => self.trial = Some(trial),
            Err(why) => self.inbox.push_back(Input::Upgraded(Err(why))),
        }
    }

    fn start_trial(&self, executable: PathBuf) -> Result<Trial, String> {
        let named = |e: io::Error| format!("{}: {e}", executable.display());
        if !executable.is_absolute() {
            return Err(named(io::Error::other("is not an absolute path")));
        }
        let identity = identity(&executable).map_err(named)?;
        let (bytes, _) = self.message()?;
        let message =
            children::memory_file(&bytes).map_err(|e| format!("pass the message: {e}"))?;
        let plan = Plan {
            files: vec![ChildFile::Fd(message), ChildFile::Words, ChildFile::Words],
            folder: "/".into(),
            steps: Vec::new(),
            to_the_end: false,
            program: None,
            argv: vec![
                executable.to_string_lossy().into_owned(),
                "-handoff-check".to_owned(),
            ],
            env: None,
            extra_env: None,
        };
        failpoint!("upgrade.trial.before");
        let Spawned { pid, words, gate } =
            children::spawn(plan).map_err(|e| format!("fork: {e}"))?;
        // It reads, and says what it thinks of it: should we die now, nobody listens.
        gate.open();
        failpoint!("upgrade.trial.after");
        Ok(Trial {
            executable,
            identity,
            pid,
            words: Some(words),
            until: now().mono_ms.saturating_add(TRIAL_MS),
            passed: false,
        })
    }

    /// True if the child that tries has ended: looked at, and collected.
    pub(super) fn trial_ended(&mut self) -> bool {
        let Some(trial) = self.trial.as_mut().filter(|trial| !trial.passed) else {
            return false;
        };
        let Some(ended) = reaper::peek(Some(trial.pid)) else {
            return false;
        };
        reaper::collect(trial.pid);
        failpoint!("upgrade.tried.after");
        let said = trial.words.take().map(children::words_of);
        let said = said.unwrap_or_default();
        // Anything may end with 0.
        if ended.status == 0 && said.starts_with(handoff::READS) {
            trial.passed = true;
            return true;
        }
        let why = match said.as_str() {
            "" => format!("ended with status {}", ended.status),
            said => said.to_owned(),
        };
        self.refuse_trial(&format!("it cannot go on from here: {why}"));
        true
    }

    fn refuse_trial(&mut self, why: &str) {
        if let Some(trial) = self.trial.take() {
            let why = format!("{}: {why}", trial.executable.display());
            self.handle(Input::Upgraded(Err(why)));
        }
    }

    /// To be called between two inputs: becomes the new executable, if that has passed.
    pub(super) fn upgrade_if_due(&mut self) {
        let Some(trial) = &self.trial else {
            return;
        };
        if trial.passed {
            let why = match identity(&trial.executable) {
                Ok(found) if found == trial.identity => self.become_it(&trial.executable),
                Ok(_) => "it was replaced meanwhile".to_owned(),
                Err(e) => e.to_string(),
            };
            return self.refuse_trial(&why);
        }
        if trial.until <= now().mono_ms {
            // Our child, and not reaped: the number is its own.
            self.end_child(trial.pid);
            self.refuse_trial("it took too long to read the message");
        }
    }

    /// Comes back only with why not.
    fn become_it(&self, executable: &Path) -> String {
        let prepared = self.sealed_message().and_then(|(message, numbers)| {
            let argv = self.argv(executable, message.as_raw_fd())?;
            let path = CString::new(executable.as_os_str().as_bytes())
                .map_err(|e| format!("execute: {e}"))?;
            Ok((message, numbers, path, argv))
        });
        let (message, numbers, path, argv) = match prepared {
            Ok(prepared) => prepared,
            Err(why) => return why,
        };
        let all = || numbers.iter().copied().chain([message.as_raw_fd()]);
        let why = match all().try_for_each(|number| keep_over_exec(number, true)) {
            Ok(()) => {
                failpoint!("upgrade.exec.before");
                match execv(&path, &argv) {
                    Ok(never) => match never {},
                    Err(errno) => format!("execute: {errno}"),
                }
            }
            Err(e) => format!("hand on descriptors: {e}"),
        };
        for number in all() {
            // The children must not get them.
            let _ = keep_over_exec(number, false);
        }
        why
    }

    fn argv(&self, executable: &Path, message: RawFd) -> Result<Vec<CString>, String> {
        let mut words = vec![executable.as_os_str().as_bytes().to_vec()];
        // As it was started, which is how tools find it; without what an earlier image was told.
        let own = fs::read("/proc/self/cmdline").map_err(|e| format!("read own flags: {e}"))?;
        let own = own.split(|byte| *byte == 0).skip(1);
        words.extend(own.filter(|word| is_lasting(word)).map(<[u8]>::to_vec));
        words.push(format!("-handoff={message}").into_bytes());
        let words = words.into_iter().map(CString::new);
        words
            .collect::<Result<_, _>>()
            .map_err(|e| format!("execute: {e}"))
    }

    fn message(&self) -> Result<(Vec<u8>, BTreeSet<RawFd>), String> {
        let (Some(lock), Some(listener)) = (&self.lock, &self.listener) else {
            return Err("this shim is leaving".to_owned());
        };
        let streams = self.sockets.values().map(|socket| &socket.stream);
        let leaving = Leaving {
            socket: &self.socket,
            state: &self.state,
            lock: Numbered(lock),
            listener: Numbered(listener),
            connections: streams.map(Numbered).collect(),
            events: self.events.as_ref().map(Numbered),
            events_unsent: &self.events_unsent,
            event_log: &self.event_log,
            children: &self.children,
            stdio: &self.stdio,
            oom: self
                .oom
                .iter()
                .map(|(id, (_, watch))| (id.clone(), watch.seen()))
                .collect(),
            witnesses: self.witnesses.values().collect(),
            teller: &self.teller,
        };
        carry::write(&leaving).map_err(|e| format!("write the message: {e}"))
    }

    fn sealed_message(&self) -> Result<(OwnedFd, BTreeSet<RawFd>), String> {
        let (bytes, numbers) = self.message()?;
        let sealed = || -> io::Result<OwnedFd> {
            let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
            let mut file = File::from(memfd_create(c"handoff", flags)?);
            file.write_all(&bytes)?;
            file.rewind()?;
            let seals = SealFlag::F_SEAL_WRITE
                | SealFlag::F_SEAL_GROW
                | SealFlag::F_SEAL_SHRINK
                | SealFlag::F_SEAL_SEAL;
            fcntl(&file, FcntlArg::F_ADD_SEALS(seals))?;
            Ok(file.into())
        };
        let file = sealed().map_err(|e| format!("write the message: {e}"))?;
        Ok((file, numbers))
    }

    /// Makes what another image of this process has left ours; gives the lock.
    fn restore(&mut self, coming: Coming) -> Result<File, super::StartError> {
        self.state = coming.state;
        for Numbered(stream) in coming.connections {
            self.connected(stream);
        }
        if let Some(Numbered(stream)) = coming.events {
            // An event may be half written: when there is room, the rest of it goes, or none is.
            let flags = EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT;
            self.epoll
                .add(&stream, EpollEvent::new(flags, EVENTS))
                .map_err(failed("watch event service"))?;
            self.events = Some(stream);
        }
        self.events_unsent = coming.events_unsent;
        self.event_log = coming.event_log;
        self.children = coming.children;
        self.stdio = coming.stdio;
        self.stdio
            .watch(&self.epoll)
            .map_err(failed("watch stdio"))?;
        for (id, seen) in coming.oom {
            self.watch_oom(id, Some(seen));
        }
        self.listen_to(coming.teller);
        for witness in coming.witnesses {
            self.watch_witness(witness);
        }
        self.journal.take_over();
        let requests = self.requests.take_over().map(drop);
        self.noted(requests);
        self.listen(coming.listener.0)?;
        Ok(coming.lock.0)
    }
}

/// What a daemon's own flags were, but for how it came to its tasks.
fn is_lasting(word: &[u8]) -> bool {
    !word.is_empty() && word != b"-adopt" && !word.starts_with(b"-handoff")
}

/// A descriptor that is open stays open in the next image, or does not.
fn keep_over_exec(number: RawFd, keep: bool) -> io::Result<()> {
    let flags = if keep {
        FdFlag::empty()
    } else {
        FdFlag::FD_CLOEXEC
    };
    let fd: BorrowedFd<'_> = sys::kept(number);
    fcntl(fd.as_fd(), FcntlArg::F_SETFD(flags))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_stay_as_they_were_however_often_the_image_changes() {
        let words = ["-namespace", "ns", "-group=g", "-adopt", "-handoff=9", ""];
        let stay = words.into_iter().filter(|word| is_lasting(word.as_bytes()));
        assert_eq!(stay.collect::<Vec<_>>(), ["-namespace", "ns", "-group=g"]);
    }
}

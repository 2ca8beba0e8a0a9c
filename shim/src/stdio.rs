//! Where init and execs read and write (SPEC 5.1), and the descriptors that it takes.
//!
//! | process, wish | it gets | we hold |
//! | --- | --- | --- |
//! | init, fifo | the fifo itself, read-write | a write end, until it is drained or read |
//! | exec, fifo | a pipe of ours, read-write | its read end, spliced to the fifo |
//! | any, `file://` | a pipe to a copier, read-write | a read end, in case the copier dies |
//! | any, a file | the file | nothing |
//! | any, `binary://` | a pipe to the logger, read-write | a read end, in case the logger dies |
//! | any, terminal | a pty's slave | its master, spliced to and from the fifos |
//! | terminal, `file://` or a file | a pty's slave | its master, spliced to a pipe of a copier |
//! | any, stdin | a pipe of ours | its write end, and the client's fifo spliced to it |
//!
//! What a client reads and only we write to is held by a holder too, lest our death be its end.
//!
//! *Read-write*: the writer is its own reader, so neither a dead client nor a dead shim can raise
//! SIGPIPE; when nobody reads, it waits.

mod adopted;
mod console;
mod holder;
mod logger;
mod open;
mod pipes;
mod relay;
mod target;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    io,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::{fs::FileTypeExt, net::UnixListener},
    },
    path::{Path, PathBuf},
};

use nix::{
    sys::epoll::{Epoll, EpollEvent, EpollFlags},
    unistd::Pid,
};

use crate::{carry, reaper, service::Key, supervised::Tell, sys, tasks::Process, witness};
pub use adopted::{Living, stdin_has_ended};
use console::{Console, Progress};
use holder::Holder;
pub use holder::{end as end_holder, hold};
use logger::Copies;
pub use open::{Opened, Wanted};
use pipes::{Hold, has_ended, is_done, is_pipe, last_words, set_nonblocking};
use recoverd_common::proc::Proc;
use relay::{End, Relay, RelayKind, Turn};
use serde::{Deserialize, Serialize};
use target::Target;

/// How often a fifo with last words is looked at, whether they are read, milliseconds: at first (a
/// client that waits for their end is at it), at most.
const LOOK_MS: (u64, u64) = (2, 1_000);
/// The last words of one output may keep the end of another this long from a client, milliseconds:
/// mostly they are read by then, and no other holder is needed for what remains.
const SHRINK_MS: u64 = 64;
/// A logger that was asked to end has this long, as with the stock shim.
const LOGGER_END_MS: u64 = 12_000;
/// Of a logger that is not killed, or was.
const NEVER: u64 = u64::MAX;

/// What happened to stdio that others must hear of.
#[derive(Debug, PartialEq, Eq)]
pub enum Heard {
    /// Nothing more to carry.
    Drained(Key),
    /// For the log.
    Warning(String),
}

/// A logger process; one without `argv` is of ours: a copier, which writes to a file, or a holder.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Logger {
    /// Its pid.
    #[serde(with = "carry::pid")]
    pub pid: Pid,
    /// Field 22 of its `stat`.
    pub start_time: u64,
    /// How it was started.
    pub argv: Vec<String>,
}

impl Logger {
    fn copier(pid: Pid) -> Self {
        Self {
            pid,
            start_time: reaper::start_time(pid),
            argv: Vec::new(),
        }
    }

    fn signal(&self, number: libc::c_int) {
        let process = Process {
            pid: u32::try_from(self.pid.as_raw()).unwrap_or(0),
            start_time: self.start_time,
        };
        signal(process, number);
    }
}

/// One that we have adopted is not our child, and its number may be somebody else's by now.
fn signal(process: Process, number: libc::c_int) {
    if let Ok(pidfd) = witness::open(&Proc::new("/proc"), process) {
        // It may have ended meanwhile: that is what is wanted.
        let _ = sys::pidfd_signal(pidfd.as_fd(), number);
    }
}

/// All of one process.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Held {
    relays: Vec<u64>,
    holds: Vec<Hold>,
    console: Option<(u64, Console, PathBuf)>,
    /// Where the terminal's output goes and its input comes from, until the master is here.
    #[serde(with = "carry::maybe_fd")]
    output: Option<OwnedFd>,
    #[serde(with = "carry::maybe_fd")]
    input: Option<OwnedFd>,
    #[serde(with = "carry::maybe_fd")]
    master: Option<OwnedFd>,
    logger: Option<Logger>,
    /// Read ends of the logger's pipes.
    #[serde(with = "carry::fds")]
    logged: Vec<OwnedFd>,
    /// If its logger is a copier.
    #[serde(default)]
    copies: Option<Copies>,
    /// Holds what its client reads.
    #[serde(default)]
    holder: Option<Holder>,
    /// Earlier ones, which end when the one that came after them is on record.
    #[serde(default)]
    relieved: Vec<Process>,
    /// When another one is due, which holds less.
    #[serde(default)]
    shrink_at: Option<u64>,
    /// When the start of another one is tried again. Another image tries at once.
    #[serde(skip)]
    retry_at: Option<u64>,
    /// The process has exited.
    finishing: bool,
    told: bool,
}

/// The descriptors of every process.
#[derive(Debug, Serialize, Deserialize)]
pub struct Stdio {
    #[serde(with = "carry::pairs")]
    held: BTreeMap<Key, Held>,
    relays: BTreeMap<u64, Relay>,
    last: u64,
    /// Loggers whose task has gone, and when they are killed.
    dismissed: Vec<(Logger, u64)>,
    look_at: Option<(u64, u64)>,
    /// Whose outputs have begun or ended since [`Stdio::hold`].
    #[serde(default)]
    unheld: BTreeSet<Key>,
    /// What a supervisor is to be told, before the next answer.
    #[serde(skip)]
    tell: Vec<Tell>,
}

/// The path behind a wish for output, if the process may have got what is there itself.
pub fn path_of(uri: &str) -> Option<PathBuf> {
    match Target::parse(uri) {
        Ok(Target::Path(path)) => Some(path),
        Ok(Target::None | Target::File(_) | Target::Binary(_)) | Err(_) => None,
    }
}

/// Tokens that this file gives to epoll carry this bit.
pub const TOKEN: u64 = 1 << 60;

impl Stdio {
    /// Nothing open.
    pub fn new() -> Self {
        Self {
            held: BTreeMap::new(),
            relays: BTreeMap::new(),
            last: TOKEN,
            dismissed: Vec::new(),
            look_at: None,
            unheld: BTreeSet::new(),
            tell: Vec::new(),
        }
    }

    /// Watches what it holds: it comes from another image of this process.
    pub fn watch(&mut self, epoll: &Epoll) -> io::Result<()> {
        self.renew_holders();
        for (number, relay) in &mut self.relays {
            let end = relay.watched.take();
            let held = self.held.get(&relay.key);
            let master = held.and_then(|held| held.master.as_ref());
            relay.watch(end, *number, epoll, master)?;
        }
        let consoles = self.held.values().filter_map(|held| held.console.as_ref());
        for (number, console, _) in consoles {
            console.watch(*number, epoll)?;
        }
        Ok(())
    }

    fn next(&mut self) -> u64 {
        self.last += 1;
        self.last
    }

    fn relay(
        &mut self,
        key: &Key,
        from: impl Into<Option<OwnedFd>>,
        to: Option<OwnedFd>,
        kind: RelayKind,
        epoll: &Epoll,
    ) -> io::Result<()> {
        let number = self.next();
        let from = from.into();
        self.tell_ends(key, from.as_ref(), to.as_ref(), kind);
        self.unheld.insert(key.clone());
        let mut relay = Relay {
            key: key.clone(),
            from,
            to,
            kind,
            pending: Vec::new(),
            watched: None,
            room: None,
            refused: None,
        };
        let mut held = self.held.get_mut(key);
        let master = held.as_ref().and_then(|held| held.master.as_ref());
        relay.watch(Some(End::From), number, epoll, master)?;
        self.relays.insert(number, relay);
        if let Some(held) = &mut held {
            held.relays.push(number);
        }
        Ok(())
    }

    /// What only we hold of a relay: the client's stdin, whose other end would see us die, the write
    /// end of that of the process, and the read end of an output, whose writer may leave bytes in it
    /// and end while we are dead. Not the pipe of a logger or copier: it gets a new one.
    fn tell_ends(
        &mut self,
        key: &Key,
        from: Option<&OwnedFd>,
        to: Option<&OwnedFd>,
        kind: RelayKind,
    ) {
        let key = handoff_key(key);
        let mut keep = |name: String, fd: &OwnedFd| {
            // Out of descriptors: then it is caught up by looking.
            if let Ok(fd) = fd.try_clone() {
                self.tell.push(Tell::Keep(name, fd));
            }
        };
        match kind {
            RelayKind::Input(true) => {}
            RelayKind::Input(false) => {
                if let Some(from) = from {
                    keep(format!("stdin-fifo:{key}"), from);
                }
                if let Some(to) = to.filter(|to| sys::terminal_number(to.as_fd()).is_none()) {
                    keep(format!("stdin:{key}"), to);
                }
            }
            RelayKind::Output => {
                if to.is_some_and(is_named_fifo)
                    && let Some(from) = from.filter(|from| is_pipe(from))
                {
                    keep(output_name(&key, from), from);
                }
            }
        }
    }

    fn tell_end_of(&mut self, relay: &Relay) {
        let key = handoff_key(&relay.key);
        match relay.kind {
            RelayKind::Output => {
                let name = relay.from.as_ref().map(|from| output_name(&key, from));
                self.tell.extend(name.map(Tell::Drop));
            }
            RelayKind::Input(_) => {
                let ends = ["stdin", "stdin-fifo"].map(|what| format!("{what}:{key}"));
                self.tell.extend(ends.map(Tell::Drop));
            }
        }
    }

    /// What a supervisor has to be told before the next answer.
    pub fn take_tell(&mut self) -> Vec<Tell> {
        std::mem::take(&mut self.tell)
    }

    /// A socket in the bundle, by a name that has no length limit for us (`/proc/self/fd`) and
    /// none for the runtime (it is relative to its working directory).
    fn listen(&mut self, bundle: &Path, epoll: &Epoll) -> io::Result<((u64, Console), PathBuf)> {
        let number = self.next();
        let folder = File::open(bundle)?;
        let name = PathBuf::from(format!("console-{}.sock", number & !TOKEN));
        let path = PathBuf::from(format!("/proc/self/fd/{}", folder.as_raw_fd())).join(&name);
        match fs::remove_file(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        let listener = UnixListener::bind(&path)?;
        listener.set_nonblocking(true)?;
        epoll.add(&listener, EpollEvent::new(EpollFlags::EPOLLIN, number))?;
        Ok(((number, Console::Listening(listener)), name))
    }

    /// Something is ready.
    pub fn ready(&mut self, token: u64, epoll: &Epoll) -> Vec<Heard> {
        let mut heard = Vec::new();
        if self.relays.contains_key(&token) {
            self.copy(token, epoll, &mut heard);
            return heard;
        }
        let key = self.held.iter().find_map(|(key, held)| {
            let (number, ..) = held.console.as_ref()?;
            (*number == token).then(|| key.clone())
        });
        if let Some(key) = key {
            self.receive(&key, epoll, &mut heard);
        }
        heard
    }

    /// Takes the terminal's master, if the runtime has sent it. Asked for once more when the
    /// runtime has ended.
    pub fn receive(&mut self, key: &Key, epoll: &Epoll, heard: &mut Vec<Heard>) {
        let Some(held) = self.held.get_mut(key) else {
            return;
        };
        let Some((number, console, path)) = held.console.take() else {
            return;
        };
        match console.advance(number, epoll) {
            Ok(Progress::Waits(console)) => held.console = Some((number, console, path)),
            Ok(Progress::Got(master)) => {
                let _ = fs::remove_file(&path);
                if let Err(e) = self.terminal(key, master, epoll) {
                    heard.push(Heard::Warning(format!(
                        "set up terminal of {}: {e}",
                        key.id
                    )));
                }
            }
            Err(e) => {
                let _ = fs::remove_file(&path);
                heard.push(Heard::Warning(format!(
                    "receive terminal of {}: {e}",
                    key.id
                )));
            }
        }
    }

    fn terminal(&mut self, key: &Key, master: OwnedFd, epoll: &Epoll) -> io::Result<()> {
        set_nonblocking(&master);
        let Some(held) = self.held.get_mut(key) else {
            return Ok(());
        };
        let (output, input) = (held.output.take(), held.input.take());
        let name = format!("master:{}", handoff_key(key));
        // Out of descriptors: then without a spare, as in `tell_ends`, and not without the terminal.
        if let Ok(spare) = master.try_clone() {
            self.tell.push(Tell::Keep(name, spare));
        }
        held.master = Some(master);
        // Without an output it still has to be read, or the terminal fills up and stops.
        self.relay(key, None, output, RelayKind::Output, epoll)?;
        if let Some(input) = input {
            self.relay(key, input, None, RelayKind::Input(false), epoll)?;
        }
        Ok(())
    }

    fn copy(&mut self, number: u64, epoll: &Epoll, heard: &mut Vec<Heard>) {
        let Some(relay) = self.relays.get_mut(&number) else {
            return;
        };
        let held = self.held.get(&relay.key);
        let master = held.and_then(|held| held.master.as_ref());
        let refused = relay.refused;
        let turn = relay.turn(master);
        // Once: a disk that is full is so for long.
        if refused.is_none()
            && let Some(why) = relay.refused
        {
            let id = &relay.key.id;
            let text = format!("write output of {id}: {why}; what is not written is dropped");
            heard.push(Heard::Warning(text));
        }
        match turn {
            Turn::Again => {}
            Turn::Wait(end) => {
                if let Err(e) = relay.watch(Some(end), number, epoll, master) {
                    heard.push(Heard::Warning(format!("watch stdio: {e}")));
                    self.end_relay(number, epoll, heard);
                }
            }
            Turn::Over => self.end_relay(number, epoll, heard),
        }
    }

    /// A relay has nothing more to carry: an output leaves its fifo to last words.
    fn end_relay(&mut self, number: u64, epoll: &Epoll, heard: &mut Vec<Heard>) {
        let Some(mut relay) = self.relays.remove(&number) else {
            return;
        };
        let held = self.held.get(&relay.key);
        let master = held.and_then(|held| held.master.as_ref());
        let _ = relay.watch(None, number, epoll, master);
        self.tell_end_of(&relay);
        self.unheld.insert(relay.key.clone());
        let Some(held) = self.held.get_mut(&relay.key) else {
            return;
        };
        held.relays.retain(|other| *other != number);
        if relay.kind == RelayKind::Output
            && let Some(fifo) = relay.to
        {
            held.holds.extend(last_words(fifo));
        }
        let key = relay.key;
        self.look_soon();
        self.check(&key, heard);
    }

    fn look_soon(&mut self) {
        let waits = self
            .held
            .values()
            .flat_map(|held| &held.holds)
            .any(|hold| hold.last_words);
        self.look_at = waits.then_some((0, LOOK_MS.0));
    }

    /// The process has exited: nobody reads its stdin, and what it wrote waits for a reader.
    pub fn finish(&mut self, key: &Key, epoll: &Epoll) -> Vec<Heard> {
        let mut heard = Vec::new();
        let Some(held) = self.held.get_mut(key) else {
            return vec![Heard::Drained(key.clone())];
        };
        held.finishing = true;
        held.input = None;
        // What a logger leaves is read by nobody; what a copier leaves, by the next one.
        if held.copies.is_none() {
            held.logged.clear();
        }
        let holds = std::mem::take(&mut held.holds);
        for hold in holds {
            if hold.last_words {
                // Its relay ended first; opened for writing once more, it would seem readerless.
                held.holds.push(hold);
            } else {
                held.holds.extend(last_words(hold.fifo));
            }
        }
        self.unheld.insert(key.clone());
        let relays = held.relays.clone();
        for number in relays {
            let input = self
                .relays
                .get(&number)
                .is_some_and(|relay| relay.kind != RelayKind::Output);
            if input {
                self.end_relay(number, epoll, &mut heard);
            } else {
                // What is in the pipe goes at once, not at the next turn of the loop.
                self.copy(number, epoll, &mut heard);
            }
        }
        self.look_soon();
        self.check(key, &mut heard);
        heard
    }

    fn check(&mut self, key: &Key, heard: &mut Vec<Heard>) {
        let Some(held) = self.held.get_mut(key) else {
            return;
        };
        let carries = held
            .relays
            .iter()
            .filter_map(|number| self.relays.get(number))
            .any(|relay| relay.kind == RelayKind::Output);
        let copies = held.copies.as_ref();
        let copied = copies.is_none_or(|copies| copies.again_at.is_none());
        if held.finishing && !held.told && !carries && held.logger.is_none() && copied {
            held.told = true;
            heard.push(Heard::Drained(key.clone()));
        }
    }

    /// CloseIO: what the client has written is carried, then the process reads the end.
    pub fn close_stdin(&mut self, key: &Key, epoll: &Epoll) -> Vec<Heard> {
        let mut heard = Vec::new();
        let numbers = self
            .held
            .get(key)
            .map(|held| held.relays.clone())
            .unwrap_or_default();
        for number in numbers {
            if let Some(relay) = self.relays.get_mut(&number)
                && matches!(relay.kind, RelayKind::Input(_))
            {
                relay.kind = RelayKind::Input(true);
                // A spare write end would keep the process from reading the end.
                let key = handoff_key(key);
                let ends = ["stdin", "stdin-fifo"].map(|what| format!("{what}:{key}"));
                self.tell.extend(ends.map(Tell::DropFirst));
                self.copy(number, epoll, &mut heard);
            }
        }
        heard
    }

    /// Sets a terminal's size.
    pub fn resize(&self, key: &Key, width: u16, height: u16) -> io::Result<()> {
        match self.held.get(key).and_then(|held| held.master.as_ref()) {
            Some(master) => sys::set_window_size(master.as_fd(), width, height),
            None => Ok(()),
        }
    }

    /// Closes everything of a process. Its logger is asked to end.
    pub fn close(&mut self, key: &Key, now: u64) {
        let Some(mut held) = self.held.remove(key) else {
            return;
        };
        let name = handoff_key(key);
        if held.master.is_some() {
            self.tell.push(Tell::Drop(format!("master:{name}")));
        }
        self.end_holders(&mut held);
        for number in held.relays {
            // Closing a descriptor that nobody else holds takes it out of epoll; the terminal's
            // master has gone with `held`.
            if let Some(relay) = self.relays.remove(&number) {
                self.tell_end_of(&relay);
            }
        }
        if let Some((_, _, path)) = held.console {
            let _ = fs::remove_file(path);
        }
        if let Some(logger) = held.logger {
            // Its pipes have ended or end now; most loggers have gone before this. A copier ends
            // by itself, when its device has taken everything.
            let at = if logger.argv.is_empty() {
                NEVER
            } else {
                logger.signal(libc::SIGTERM);
                now.saturating_add(LOGGER_END_MS)
            };
            self.dismissed.push((logger, at));
        }
    }

    /// The logger of a process, for the record.
    pub fn logger(&self, key: &Key) -> Option<&Logger> {
        self.held.get(key)?.logger.as_ref()
    }

    /// The pipes of a process whose bytes go to a fifo, for the record: the inode of each, and of
    /// its fifo. Whoever has them can go on with it when we have died.
    pub fn carried(&self, key: &Key) -> Vec<(u64, u64)> {
        let held = self.held.get(key);
        let numbers = held.map(|held| held.relays.as_slice()).unwrap_or_default();
        let relays = numbers.iter().filter_map(|number| self.relays.get(number));
        relays.filter_map(Relay::carries).collect()
    }

    /// Every logger and holder that runs, those of deleted tasks too.
    pub fn loggers(&self) -> impl Iterator<Item = Pid> {
        let held = self.held.values().filter_map(|held| held.logger.as_ref());
        let holders = self.held.values().filter_map(|held| held.holder.as_ref());
        let dismissed = self.dismissed.iter().map(|(logger, _)| logger.pid);
        held.map(|logger| logger.pid)
            .chain(holders.map(Holder::pid))
            .chain(dismissed)
    }

    /// A process has exited, a child of ours if its status is known; true if it was a logger or a
    /// holder.
    pub fn logger_exited(
        &mut self,
        pid: Pid,
        status: Option<u32>,
        now: u64,
        epoll: &Epoll,
        heard: &mut Vec<Heard>,
    ) -> bool {
        let mut dismissed = self.dismissed.iter();
        if let Some(at) = dismissed.position(|(other, _)| other.pid == pid) {
            self.dismissed.remove(at);
            return true;
        }
        if self.holder_exited(pid, now, heard) {
            return true;
        }
        let found = self.held.iter_mut().find_map(|(key, held)| {
            held.logger.take_if(|logger| logger.pid == pid)?;
            held.logged.retain(|pipe| !has_ended(pipe));
            Some((key.clone(), held))
        });
        let Some((key, held)) = found else {
            return false;
        };
        let mut logged = Vec::new();
        match &mut held.copies {
            _ if held.logged.is_empty() => {}
            Some(copies) if status != Some(logger::FAILED) => {
                copies.again(now);
                heard.push(Heard::Warning(format!(
                    "copier of {} has ended, another one comes",
                    key.id
                )));
            }
            // With its process has gone who would have to wait.
            Some(_) if held.finishing => held.logged.clear(),
            Some(_) | None => {
                logged = std::mem::take(&mut held.logged);
                heard.push(Heard::Warning(format!(
                    "logger of {} has ended, output goes nowhere",
                    key.id
                )));
            }
        }
        // A dead logger costs no container: its output is read and dropped.
        for from in logged {
            set_nonblocking(&from);
            if let Err(e) = self.relay(&key, from, None, RelayKind::Output, epoll) {
                heard.push(Heard::Warning(format!("watch stdio: {e}")));
            }
        }
        self.check(&key, heard);
        true
    }

    /// When [`Stdio::tick`] is due.
    pub fn deadline(&self) -> Option<u64> {
        let kills = self.dismissed.iter().map(|(_, at)| *at);
        let holders = self.held.values().filter_map(Held::holder_due_at);
        let copiers = self
            .held
            .values()
            .filter_map(|held| held.copies.as_ref()?.again_at);
        let looks = self.look_at.map(|(at, _)| at);
        let due = kills.chain(looks).chain(holders).chain(copiers);
        due.filter(|at| *at != NEVER).min()
    }

    /// Looks whether last words are read, and ends loggers that did not end. [`Stdio::hold`] and
    /// [`Stdio::copy_again`] are due after it.
    pub fn tick(&mut self, now: u64) {
        let due = self.held.iter().filter(|(_, held)| {
            let at = held.holder_due_at();
            at.is_some_and(|at| at <= now)
        });
        self.unheld.extend(due.map(|(key, _)| key.clone()));
        for (logger, at) in &mut self.dismissed {
            if *at <= now {
                logger.signal(libc::SIGKILL);
                *at = NEVER;
            }
        }
        let Some((at, pause)) = self.look_at else {
            return;
        };
        if at > now {
            return;
        }
        for (key, held) in &mut self.held {
            let before = held.holds.len();
            held.holds
                .retain(|hold| !(hold.last_words && is_done(&hold.fifo)));
            if held.holds.len() < before {
                self.unheld.insert(key.clone());
            }
        }
        self.look_soon();
        if let Some((at, next)) = &mut self.look_at {
            *at = now.saturating_add(pause);
            *next = pause.saturating_mul(2).min(LOOK_MS.1);
        }
    }
}

/// A process, in the names of what is kept of it.
fn handoff_key(key: &Key) -> String {
    format!("{}/{}", key.id, key.exec_id)
}

/// The two outputs of a process end each by itself.
fn output_name(key: &str, pipe: &OwnedFd) -> String {
    format!("output:{key}@{}", inode_of(pipe))
}

fn inode_of(fd: &OwnedFd) -> u64 {
    nix::sys::stat::fstat(fd).map_or(0, |stat| stat.st_ino)
}

/// A fifo that a client knows by its name, and no pipe.
fn is_named_fifo(fd: &OwnedFd) -> bool {
    let link = format!("/proc/self/fd/{}", fd.as_raw_fd());
    let name = fs::read_link(link).unwrap_or_default();
    let pipe = name.to_string_lossy().starts_with("pipe:");
    !pipe && fs::metadata(name).is_ok_and(|meta| meta.file_type().is_fifo())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_takes_nothing_is_told_of_once() {
        let epoll = Epoll::new(nix::sys::epoll::EpollCreateFlags::EPOLL_CLOEXEC).unwrap();
        let (from, source) = nix::unistd::pipe().unwrap();
        set_nonblocking(&from);
        let full = File::options().append(true).open("/dev/full").unwrap();
        let mut stdio = Stdio::new();
        let key = Key::init("c");
        stdio.held.insert(key.clone(), Held::default());
        let to = Some(full.into());
        stdio
            .relay(&key, from, to, RelayKind::Output, &epoll)
            .unwrap();
        let token = stdio.last;
        let mut heard = Vec::new();
        for _ in 0..2 {
            nix::unistd::write(&source, b"lost").unwrap();
            heard.extend(stdio.ready(token, &epoll));
        }
        let text = "write output of c: ENOSPC: No space left on device; \
                    what is not written is dropped";
        assert_eq!(heard, [Heard::Warning(text.into())]);
        assert!(stdio.relays.contains_key(&token));
    }

    #[test]
    fn a_logger_is_asked_to_end_and_the_owner_of_its_reused_pid_is_not() {
        for reused in [false, true] {
            let mut process = std::process::Command::new("sleep")
                .arg("60")
                .spawn()
                .unwrap();
            let pid = Pid::from_raw(process.id().try_into().unwrap());
            let key = Key {
                id: "c".into(),
                exec_id: String::new(),
            };
            let logger = Logger {
                pid,
                start_time: reaper::start_time(pid) + u64::from(reused),
                argv: vec!["sleep".into()],
            };
            let mut stdio = Stdio::new();
            let held = Held {
                logger: Some(logger),
                ..Held::default()
            };
            stdio.held.insert(key.clone(), held);
            stdio.close(&key, 0);
            if reused {
                stdio.tick(LOGGER_END_MS);
                assert!(process.try_wait().unwrap().is_none());
                process.kill().unwrap();
            }
            let ended = process.wait().unwrap();
            let signal = std::os::unix::process::ExitStatusExt::signal(&ended);
            // Of the stranger it is the test's own SIGKILL.
            let expected = if reused { libc::SIGKILL } else { libc::SIGTERM };
            assert_eq!(signal, Some(expected));
        }
    }
}

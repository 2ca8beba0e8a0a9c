//! A process of ours that has the write ends of a client's fifos, beside us, and does nothing else:
//! a client sees the end of its output the moment the last of them is closed, so somebody has to
//! have one while a dead shim has no successor yet. Not the supervisor: it would have to be asked
//! for each end, and could hang. This one is ended with SIGKILL when the output has ended.
//!
//! An init that is no terminal needs none: it has its fifo itself. While we live it only waits for
//! our death; after that it goes as soon as nobody reads and nothing is there to be read, so that
//! mostly nobody has to find it: with the last end of a fifo, what is in it is gone.

use std::{
    collections::BTreeMap,
    io,
    os::fd::{AsFd, OwnedFd},
    thread,
    time::Duration,
};

use nix::{
    errno::Errno,
    fcntl::OFlag,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::stat::fstat,
    unistd::Pid,
};
use recoverd_common::failpoint;
use serde::{Deserialize, Serialize};

use super::{
    Heard, Held, Logger, NEVER, RelayKind, SHRINK_MS, Stdio, inode_of, is_named_fifo,
    pipes::{is_done, reopen},
    signal,
};
use crate::{
    carry,
    children::{self, ChildFile, Gate, Plan, Spawned},
    reaper,
    service::Key,
    sys,
    tasks::Process,
};

/// The process, and what it holds.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Holder {
    #[serde(with = "carry::pid")]
    pid: Pid,
    start_time: u64,
    /// Inodes.
    fifos: Vec<u64>,
    /// Until its pid is on record.
    #[serde(skip)]
    gate: Option<Gate>,
}

/// One that cannot be started, for want of memory, descriptors or pids, is tried again after this
/// long, milliseconds.
const RETRY_MS: u64 = 1_000;
/// One that has ended, and was not to, is started again after this long, milliseconds: whoever ends
/// it again and again would have us start others all the time. So is one that could not be put on
/// record.
const AGAIN_MS: u64 = 10_000;
/// So often one without its shim looks whether what is unread has been read.
const LOOK: Duration = Duration::from_secs(1);
/// The inode of no file: a holder that has it holds more than is to be held.
const NO_FIFO: u64 = 0;

/// Fifos that a client reads, by inode.
type Fifos<'a> = BTreeMap<u64, &'a OwnedFd>;

/// Which holder a process needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Need {
    /// The one that it has, if any.
    Same,
    /// The one that it has, for a moment: it holds more than is to be held.
    Fewer,
    /// A new one.
    Another,
    /// None any more.
    None,
}

/// What is held, what is to be held, and whether one that holds more has stayed its moment.
fn need<T>(holds: &[u64], fifos: &BTreeMap<u64, T>, due: bool) -> Need {
    let all = fifos.keys().all(|inode| holds.contains(inode));
    match (all, holds.len() > fifos.len()) {
        (true, false) => Need::Same,
        (true, true) if fifos.is_empty() => Need::None,
        (true, true) if !due => Need::Fewer,
        (true, true) | (false, _) => Need::Another,
    }
}

impl Holder {
    /// Starts one for these fifos of a process. It goes on only when it is [let go](Self::let_go).
    fn start(key: &Key, namespace: &str, fifos: &Fifos<'_>) -> io::Result<Self> {
        failpoint!("stdio.hold.before");
        let mut files = vec![ChildFile::Null, ChildFile::Null, ChildFile::Null];
        files.push(ChildFile::Fd(sys::pidfd_open(Pid::this().as_raw())?));
        for fifo in fifos.values() {
            // One that could be read from would be a reader that does not read.
            let writer = match reopen(fifo, false, true, OFlag::O_NONBLOCK) {
                Ok(writer) => writer,
                // Without a reader, ours is write-only already.
                Err(e) if e.raw_os_error() == Some(libc::ENXIO) => fifo.try_clone()?,
                Err(e) => return Err(e),
            };
            files.push(ChildFile::Fd(writer));
        }
        let plan = Plan {
            files,
            folder: "/".into(),
            steps: Vec::new(),
            to_the_end: false,
            // As a copier: a program of its own, of this very image.
            program: children::OURSELVES,
            argv: children::ourselves(namespace, &key.id, "hold"),
            env: None,
            extra_env: None,
        };
        // Its words would be of a failure to execute, and its exit tells that too.
        let Spawned { pid, gate, .. } = children::spawn(plan)?;
        failpoint!("stdio.hold.after");
        Ok(Self {
            pid,
            start_time: reaper::start_time(pid),
            fifos: fifos.keys().copied().collect(),
            gate: Some(gate),
        })
    }

    /// It is on record.
    fn let_go(&mut self) {
        if let Some(gate) = self.gate.take() {
            gate.open();
        }
    }

    pub(super) fn pid(&self) -> Pid {
        self.pid
    }

    fn process(&self) -> Process {
        Process {
            pid: u32::try_from(self.pid.as_raw()).unwrap_or(0),
            start_time: self.start_time,
        }
    }

    /// Who has to be waited for when it ends.
    fn dismissed(self) -> Logger {
        Logger {
            pid: self.pid,
            start_time: self.start_time,
            argv: Vec::new(),
        }
    }
}

impl Held {
    /// Earlier holders have one that took their place.
    fn may_relieve(&self) -> bool {
        !self.relieved.is_empty() && self.retry_at.is_none()
    }

    /// Another holder may be due, for one reason or the other.
    pub(super) fn holder_due_at(&self) -> Option<u64> {
        self.shrink_at.into_iter().chain(self.retry_at).min()
    }
}

impl Stdio {
    /// Has the outputs held that have begun, and those no longer that have ended. True: the record
    /// has to say so, and then [`Stdio::let_go`].
    pub fn hold(&mut self, namespace: &str, now: u64, heard: &mut Vec<Heard>) -> bool {
        let mut changed = false;
        for key in std::mem::take(&mut self.unheld) {
            let result = self.hold_of(&key, namespace, now);
            let Some(held) = self.held.get_mut(&key) else {
                continue;
            };
            let tried = std::mem::take(&mut held.retry_at).is_some();
            if let Err(e) = result {
                // All else goes on; what is lost is lost with our death only.
                held.shrink_at = None;
                held.retry_at = Some(now.saturating_add(RETRY_MS));
                if !tried {
                    let text = format!("hold output of {} {}: {e}", key.id, key.exec_id);
                    heard.push(Heard::Warning(text));
                }
            }
            let begins = held.holder.as_ref().is_some_and(|h| h.gate.is_some());
            changed |= begins || held.may_relieve();
        }
        changed
    }

    /// The same for one process.
    pub(super) fn hold_of(&mut self, key: &Key, namespace: &str, now: u64) -> io::Result<()> {
        self.unheld.remove(key);
        let Some(held) = self.held.get(key) else {
            return Ok(());
        };
        let fifos = self.read_by_client(held);
        let holds = held.holder.as_ref().map(|holder| holder.fifos.as_slice());
        let due = held.shrink_at.is_some_and(|at| at <= now);
        let need = need(holds.unwrap_or_default(), &fifos, due);
        let next = match need {
            Need::Another => Some(Holder::start(key, namespace, &fifos)?),
            Need::Same | Need::Fewer | Need::None => None,
        };
        let Some(held) = self.held.get_mut(key) else {
            return Ok(());
        };
        held.shrink_at = match need {
            Need::Fewer => held.shrink_at.or(Some(now.saturating_add(SHRINK_MS))),
            Need::Same | Need::Another | Need::None => None,
        };
        if matches!(need, Need::Same | Need::Fewer) {
            return Ok(());
        }
        if let Some(old) = std::mem::replace(&mut held.holder, next) {
            match held.holder {
                Some(_) => held.relieved.push(old.process()),
                None => end(old.process()),
            }
            self.dismissed.push((old.dismissed(), NEVER));
        }
        Ok(())
    }

    /// The fifos that nobody would write to any more, were we dead.
    fn read_by_client<'a>(&'a self, held: &'a Held) -> Fifos<'a> {
        let relays = held.relays.iter().filter_map(|at| self.relays.get(at));
        let outputs = relays.filter(|relay| relay.kind == RelayKind::Output);
        let last_words = held.holds.iter().filter(|hold| hold.last_words);
        outputs
            .filter_map(|relay| relay.to.as_ref())
            .chain(&held.output)
            .chain(last_words.map(|hold| &hold.fifo))
            .filter(|fd| is_named_fifo(fd))
            .map(|fd| (inode_of(fd), fd))
            .collect()
    }

    /// Another image has come: its own are to take the places of the holders that there are, if the
    /// one before it had any. Not at once: it has to answer first.
    pub(super) fn renew_holders(&mut self) {
        for (key, held) in &mut self.held {
            if let Some(holder) = &mut held.holder
                && !holder.fifos.contains(&NO_FIFO)
            {
                holder.fifos.push(NO_FIFO);
            }
            self.unheld.insert(key.clone());
        }
    }

    /// What [`Stdio::hold`] has done is on record.
    pub fn let_go(&mut self) {
        for (key, held) in &mut self.held {
            if let Some(holder) = &mut held.holder {
                holder.let_go();
            }
            // Whoever is to take its place may not have been started yet.
            if !self.unheld.contains(key) && held.may_relieve() {
                held.relieved.drain(..).for_each(end);
            }
        }
    }

    /// The record could not be written: who is not on it does not begin, for nobody would find it. It
    /// would wait with copies of all that the shim has open. Another one is tried later.
    pub fn hold_back(&mut self, now: u64) {
        for held in self.held.values_mut() {
            if let Some(waits) = held.holder.take_if(|holder| holder.gate.is_some()) {
                end(waits.process());
                self.dismissed.push((waits.dismissed(), NEVER));
                held.retry_at = Some(now.saturating_add(AGAIN_MS));
            }
        }
    }

    /// A predecessor's holder, which ends when one of ours has taken its place.
    pub fn relieve(&mut self, key: &Key, process: Process) {
        match self.held.get_mut(key) {
            Some(held) => {
                held.relieved.push(process);
                self.unheld.insert(key.clone());
            }
            // The output has ended.
            None => end(process),
        }
    }

    /// Those of a process, for the record.
    pub fn holders(&self, key: &Key) -> Vec<Process> {
        let held = self.held.get(key);
        let own = held.and_then(|held| held.holder.as_ref());
        let relieved = held.into_iter().flat_map(|held| &held.relieved).copied();
        own.map(Holder::process)
            .into_iter()
            .chain(relieved)
            .collect()
    }

    /// Those of processes that are not `known` any more, for the record.
    pub fn holders_but(&self, known: impl Fn(&Key) -> bool) -> impl Iterator<Item = Process> {
        let others = self.held.keys().filter(move |key| !known(key));
        others.flat_map(|key| self.holders(key))
    }

    /// We end as is meant: so do the outputs.
    pub fn end_all_holders(&mut self) {
        for mut held in std::mem::take(&mut self.held).into_values() {
            self.end_holders(&mut held);
        }
    }

    pub(super) fn end_holders(&mut self, held: &mut Held) {
        held.relieved.drain(..).for_each(end);
        if let Some(holder) = held.holder.take() {
            end(holder.process());
            self.dismissed.push((holder.dismissed(), NEVER));
        }
    }

    /// True if it was one that still held something.
    pub(super) fn holder_exited(&mut self, pid: Pid, now: u64, heard: &mut Vec<Heard>) -> bool {
        let found = self.held.iter_mut().find_map(|(key, held)| {
            held.holder.take_if(|holder| holder.pid == pid)?;
            held.retry_at = Some(now.saturating_add(AGAIN_MS));
            Some(key)
        });
        if let Some(key) = found {
            let text = format!(
                "the holder of the output of {} {} has ended",
                key.id, key.exec_id
            );
            heard.push(Heard::Warning(text));
        }
        found.is_some()
    }
}

/// Ends one; it is gone if it is not this very process.
pub fn end(process: Process) {
    failpoint!("stdio.let_go.before");
    signal(process, libc::SIGKILL);
    failpoint!("stdio.let_go.after");
}

/// What it does: waits for the end of the process whose pidfd is at 3, then for the readers of the
/// fifos from 4 on to be gone, and for what is in them to be read.
pub fn hold() -> io::Result<()> {
    let shim = sys::inherited(3).ok_or(io::ErrorKind::NotFound)?;
    let mut fifos: Vec<OwnedFd> = (4..).map_while(sys::inherited).collect();
    wait(&[&shim], PollFlags::POLLIN)?;
    loop {
        let all: Vec<&OwnedFd> = fifos.iter().collect();
        let mut readerless = wait(&all, PollFlags::empty())?.into_iter();
        let mut looks_again = false;
        fifos.retain(|fifo| {
            let read = readerless.next() == Some(false);
            let stays = read || !is_over(fifo);
            looks_again |= stays && !read;
            stays
        });
        if fifos.is_empty() {
            return Ok(());
        }
        // That a reader comes is nothing that can be waited for.
        if looks_again {
            thread::sleep(LOOK);
        }
    }
}

/// Nobody can read anything of it any more, or ever: a name that was removed is opened by nobody.
fn is_over(fifo: &OwnedFd) -> bool {
    let nameless = fstat(fifo).is_ok_and(|stat| stat.st_nlink == 0);
    nameless || is_done(fifo)
}

/// Until one of them is as asked for, or has no other end; says of each whether it is.
fn wait(files: &[&OwnedFd], flags: PollFlags) -> io::Result<Vec<bool>> {
    let mut entries: Vec<PollFd<'_>> = files
        .iter()
        .map(|file| PollFd::new(file.as_fd(), flags))
        .collect();
    loop {
        match poll(&mut entries, PollTimeout::NONE) {
            Ok(0) | Err(Errno::EINTR) => {}
            Ok(_) => break,
            Err(e) => return Err(e.into()),
        }
    }
    let seen = entries.iter().map(|entry| entry.any().unwrap_or(true));
    Ok(seen.collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::{
        resource::{Resource, getrlimit, setrlimit},
        signal::{Signal, kill},
        wait::waitpid,
    };
    use std::{
        env,
        process::{Child, Command},
    };

    fn key() -> Key {
        Key {
            id: "c".into(),
            exec_id: "e".into(),
        }
    }

    /// Of a process whose client reads the fifo at `path`, which a predecessor's holder holds.
    fn stdio(path: &std::path::Path, earlier: &Child) -> Stdio {
        nix::unistd::mkfifo(path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let mut stdio = Stdio::new();
        let held = Held {
            output: Some(super::super::pipes::open_fifo(path, (0, 0)).unwrap()),
            ..Held::default()
        };
        stdio.held.insert(key(), held);
        let pid = i32::try_from(earlier.id()).unwrap();
        let earlier = Process {
            pid: earlier.id(),
            start_time: reaper::start_time(Pid::from_raw(pid)),
        };
        stdio.relieve(&key(), earlier);
        stdio
    }

    /// The predecessor's holder, and the first one of ours, which waits for the record.
    fn begun(dir: &std::path::Path) -> (Child, Stdio, Pid) {
        let earlier = sleeper();
        let mut stdio = stdio(&dir.join("fifo"), &earlier);
        let mut heard = Vec::new();
        assert!(stdio.hold("ns", 0, &mut heard) && heard.is_empty());
        let first = stdio.held[&key()].holder.as_ref().unwrap().pid();
        (earlier, stdio, first)
    }

    fn sleeper() -> Child {
        Command::new("sleep").arg("60").spawn().unwrap()
    }

    /// While no descriptor is to be had.
    fn without_descriptors<T>(act: impl FnOnce() -> T) -> T {
        let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        setrlimit(Resource::RLIMIT_NOFILE, 0, hard).unwrap();
        let done = act();
        setrlimit(Resource::RLIMIT_NOFILE, soft, hard).unwrap();
        done
    }

    #[test]
    fn one_that_cannot_be_started_is_tried_again_later_and_its_predecessor_stays() {
        // The limit is the whole process's: it is one of its own.
        const ALONE: &str = "RECOVERD_TEST_ALONE";
        if env::var_os(ALONE).is_none() {
            let name = "stdio::holder::tests::one_that_cannot_be_started_is_tried_again_later_and_its_predecessor_stays";
            let mut alone = Command::new(env::current_exe().unwrap());
            let output = alone.args(["--exact", name]).env(ALONE, "1").output();
            let said = String::from_utf8(output.unwrap().stdout).unwrap();
            assert!(said.contains("1 passed"), "{said}");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let mut earlier = sleeper();
        let mut stdio = stdio(&dir.path().join("fifo"), &earlier);
        let mut heard = Vec::new();
        for now in [7, 7 + RETRY_MS] {
            assert!(stdio.unheld.contains(&key()));
            let before = heard.len();
            assert!(!without_descriptors(|| stdio.hold("ns", now, &mut heard)));
            stdio.let_go();
            assert_eq!(heard.len() - before, usize::from(now == 7), "{heard:?}");
            let due = now + RETRY_MS;
            assert_eq!(stdio.deadline(), Some(due), "not at once");
            stdio.tick(due - 1);
            assert!(stdio.unheld.is_empty());
            stdio.tick(due);
        }
        assert!(earlier.try_wait().unwrap().is_none());
        assert!(stdio.hold("ns", 9_000, &mut heard));
        assert_eq!(stdio.deadline(), None);
        assert_eq!(stdio.holders(&key()).len(), 2);
        stdio.let_go();
        assert_eq!(stdio.holders(&key()).len(), 1);
        earlier.wait().unwrap();
        stdio.close(&key(), 0);
    }

    #[test]
    fn one_that_is_on_no_record_ends_and_another_one_comes_later() {
        let dir = tempfile::tempdir().unwrap();
        let (mut earlier, mut stdio, first) = begun(dir.path());
        let mut heard = Vec::new();
        stdio.hold_back(5);
        waitpid(first, None).unwrap();
        stdio.let_go();
        assert_eq!(stdio.holders(&key()).len(), 1, "the predecessor's stays");
        assert_eq!(stdio.deadline(), Some(5 + AGAIN_MS));
        stdio.tick(5 + AGAIN_MS);
        assert!(stdio.hold("ns", 5 + AGAIN_MS, &mut heard));
        stdio.let_go();
        earlier.wait().unwrap();
        stdio.hold_back(6 + AGAIN_MS);
        assert_eq!(stdio.holders(&key()).len(), 1, "it is on record");
        stdio.close(&key(), 0);
    }

    #[test]
    fn one_that_somebody_has_ended_is_started_again_and_not_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let (mut earlier, mut stdio, first) = begun(dir.path());
        let mut heard = Vec::new();
        kill(first, Signal::SIGKILL).unwrap();
        waitpid(first, None).unwrap();
        assert!(stdio.holder_exited(first, 5, &mut heard));
        assert_eq!(heard.len(), 1);
        stdio.let_go();
        assert_eq!(stdio.holders(&key()).len(), 1, "the predecessor's stays");
        assert!(!stdio.hold("ns", 6, &mut heard));
        assert_eq!(stdio.deadline(), Some(5 + AGAIN_MS));
        stdio.tick(5 + AGAIN_MS);
        assert!(stdio.hold("ns", 5 + AGAIN_MS, &mut heard));
        stdio.let_go();
        let second = stdio.held[&key()].holder.as_ref().unwrap().pid();
        assert_ne!(first, second);
        assert_eq!(heard.len(), 1);
        earlier.wait().unwrap();
        stdio.close(&key(), 0);
    }

    #[test]
    fn what_is_to_be_held_is_held_and_what_has_ended_only_for_a_moment() {
        let fifos = |inodes: &[u64]| inodes.iter().map(|inode| (*inode, ())).collect();
        for (holds, wanted, due, expected) in [
            (&[][..], &[][..], false, Need::Same),
            (&[1, 2], &[1, 2], true, Need::Same),
            (&[], &[1], false, Need::Another),
            (&[1], &[2], false, Need::Another),
            (&[1], &[1, 2], false, Need::Another),
            (&[1, 2], &[2], false, Need::Fewer),
            (&[1, 2], &[2], true, Need::Another),
            (&[1, 2], &[], false, Need::None),
        ] {
            let need = need(holds, &fifos(wanted), due);
            assert_eq!(need, expected, "{holds:?} {wanted:?} {due}");
        }
    }
}

//! The daemon that takes over: from the lock to the first request. In this order, so that a death
//! in between leaves what a next one can adopt: the lock, the record, the socket, the bundles.

use std::{
    collections::BTreeMap,
    error::Error,
    fs::{self, File},
    io::{Read, Write},
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixListener,
    },
    path::Path,
    time::Duration,
};

use nix::{
    sys::epoll::{EpollEvent, EpollFlags},
    unistd::Pid,
};
use recoverd_common::{
    adoption::{Adopted, AdoptedTask, Adoption},
    cgroup::Roots,
    failpoint,
    proc::Proc,
    record::{self, Record},
};

use serde::{Deserialize, Serialize};

use super::{Shim, StartError, TELLER, failed, now};
use crate::{
    adopt::{self, Claimed, Decision, Kept, Look, Loot},
    args::Flags,
    carry, context,
    log::{Level, Log},
    reaper,
    service::Key,
    socket,
    state::Input,
    stdio::{self, Living, Logger, Wanted, end_holder},
    sys,
    tasks::{Adoptee, Event, ExecPhase, Phase, Process},
    witness::{self, Answer, Teller},
};

/// A process whose parent we are not, watched for its end.
#[derive(Debug, Serialize, Deserialize)]
pub struct Witness {
    whose: Whose,
    process: Process,
    #[serde(with = "carry::fd")]
    pidfd: OwnedFd,
    /// When it was seen to have ended: from then on its teller is asked how.
    ended: Option<u64>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
enum Whose {
    Member(Key),
    Logger,
}

/// The daemon's word to the verb, which waits for it.
struct Word(Option<File>);

impl Word {
    /// Nobody may listen any more: the tasks are ours all the same.
    fn say(&mut self, kind: u8, text: &[u8]) {
        if let Some(mut pipe) = self.0.take() {
            let _ = pipe.write_all(&[&[kind], text].concat());
        }
    }
}

/// Takes over and serves; see `adopt`.
pub fn adopt_and_serve(flags: &Flags) -> Result<(), Box<dyn Error>> {
    let (message, tells) = (sys::inherited(3), sys::inherited(4));
    let mut word = Word(tells.map(File::from));
    match take_over(flags, message, &mut word) {
        Ok(()) => Ok(()),
        Err(why) => {
            word.say(adopt::REFUSED, why.to_string().as_bytes());
            Err(why)
        }
    }
}

fn take_over(
    flags: &Flags,
    message: Option<OwnedFd>,
    word: &mut Word,
) -> Result<(), Box<dyn Error>> {
    let mut bytes = Vec::new();
    if let Some(message) = message {
        File::from(message).read_to_end(&mut bytes)?;
    }
    let adoption = Adoption::decode(&bytes).map_err(|e| format!("adoption {e}"))?;
    let descriptors = adopt::inherited(5, adoption.descriptors.len())?;
    let namespace = flags.namespace.as_str();
    let place = adoption.socket.clone();
    let predecessor = adoption.predecessor.map(|process| Process {
        pid: process.pid,
        start_time: process.start_time,
    });
    let mut kept = Kept::sort(descriptors, &adoption.descriptors, &place);
    let listener = kept.listener.take();
    let id = flags.id.as_str();
    let claim = match adopt::claim(&place, namespace, id, predecessor, listener.is_some())? {
        Claimed::Ours(claim) => claim,
        Claimed::StandBack(why) => {
            word.say(adopt::BACK, why.as_bytes());
            return Ok(());
        }
    };
    // A stock shim has no record of its own.
    let copies = adoption.record.is_some();
    // Read under the lock: it does not change any more, but for what its stopped writer does.
    let record = match adopt::record_of(&adoption, flags) {
        Ok(record) => record,
        Err(why) => {
            claim.give_up();
            return Err(why.into());
        }
    };
    if record.tasks.is_empty() {
        claim.give_up();
        word.say(adopt::BACK, b"no task is left to adopt");
        return Ok(());
    }
    let roots = Roots::default();
    let mut look = adopt::look(
        &roots,
        &record,
        Teller::find(),
        &adoption.observed,
        std::mem::take(&mut kept.pidfds),
    );
    let (lock, loot, mut remarks) = claim.enforce(copies)?;
    kept.loot.append(loot);
    failpoint!("adopt.running.before");
    look.await_running();
    failpoint!("adopt.running.after");
    remarks.extend(context::restore(&roots, &record.context).0);
    failpoint!("adopt.context.after");

    let log = Log::open(Path::new("."), flags.debug);
    let (mut shim, signals) =
        super::prepare(namespace, flags.group(), &flags.address, place.clone(), log)?;
    for remark in &remarks {
        shim.log.say(Level::Warning, remark);
    }
    let tasks = shim.take_over(&record, look, kept);
    // Whoever had the lock before us may have taken the socket for stale.
    let listener = match listener.filter(|_| place.exists()) {
        Some(listener) => listener,
        None => bind_anew(&place)?,
    };
    shim.listen(listener)?;
    let exe = adopt::executable()?;
    let mut told: Vec<AdoptedTask> = Vec::new();
    for (id, mut said) in tasks {
        if let Some(task) = shim.state.tasks.get(&id) {
            let bundle = Path::new(&task.bundle);
            said.extend(match task.phase {
                Phase::Creating => adopt::forget_bundle(bundle, &place),
                _ => adopt::write_bundle(bundle, &place, &exe),
            });
        }
        for line in &said {
            shim.log.say(Level::Warning, &format!("{id}: {line}"));
        }
        told.extend(shim.tell(id, said));
    }
    let adopted = Adopted {
        shim: record::Process {
            pid: std::process::id(),
            start_time: reaper::start_time(Pid::this()),
        },
        tasks: told,
        remarks,
    };
    failpoint!("adopt.word.before");
    word.say(adopt::ADOPTED, &adopted.encode());
    failpoint!("adopt.word.after");
    let text = format!("shim of {} serves, adopted", flags.id);
    shim.log.say(Level::Info, &text);
    shim.run(&signals, lock)
}

fn bind_anew(place: &Path) -> Result<UnixListener, StartError> {
    failpoint!("adopt.socket.before");
    match fs::remove_file(place) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            return Err(failed("remove stale socket")(e));
        }
        _ => {}
    }
    failpoint!("adopt.socket.between");
    let listener = socket::bind(place).map_err(failed("bind"))?;
    failpoint!("adopt.socket.after");
    Ok(listener)
}

impl Shim {
    /// Makes the tasks of `record` ours; gives what there is to say about each.
    fn take_over(
        &mut self,
        record: &Record,
        mut look: Look,
        mut kept: Kept,
    ) -> BTreeMap<String, Vec<String>> {
        let mut said: BTreeMap<String, Vec<String>> = BTreeMap::new();
        let mut adoptees = Vec::new();
        for task in &record.tasks {
            let facts = look.facts(&self.roots, record, task);
            match adopt::decide(task, record, facts) {
                Decision::Adopt(adoptee) => adoptees.push(*adoptee),
                Decision::Drop(why) => {
                    let text = format!("{} is not adopted: {why}", task.id);
                    self.log.say(Level::Warning, &text);
                    adopt::forget_bundle(Path::new(&task.bundle), &self.socket);
                }
            }
        }
        failpoint!("adopt.events.before");
        // A full disk costs the events that come, not the tasks.
        if let Err(e) = self.take_over_events() {
            self.log.say(Level::Error, &format!("write events: {e}"));
        }
        failpoint!("adopt.events.after");
        self.journal.take_over();
        failpoint!("adopt.stdio.before");
        let mut draining = Vec::new();
        for adoptee in &mut adoptees {
            let mut lines = self.reopen(adoptee, record, &mut look, &mut kept.loot);
            let (keys, remarks) = self.carry_on(adoptee, record, &look, &kept.loot);
            lines.extend(remarks);
            draining.extend(keys);
            said.insert(adoptee.id.clone(), lines);
        }
        for (key, holder) in std::mem::take(&mut look.holders) {
            self.stdio.relieve(&key, holder);
        }
        look.strays.drain(..).for_each(end_holder);
        let members = std::mem::take(&mut look.members);
        let pids: Vec<u32> = members.values().map(|(process, _)| process.pid).collect();
        look.teller.narrow(&pids);
        self.listen_to(std::mem::take(&mut look.teller));
        failpoint!("adopt.record.before");
        let connections = std::mem::take(&mut kept.connections);
        let resume = self.resume(connections, adoptees, record);
        self.handle(Input::Resume(Box::new(resume)));
        failpoint!("adopt.record.after");
        for key in draining {
            let heard = self.stdio.finish(&key, &self.epoll);
            self.hear(heard);
        }
        self.work_off();
        for (key, (process, found)) in members {
            if let Ok(pidfd) = found {
                self.witness(Whose::Member(key), process, pidfd);
            }
        }
        for (process, pidfd) in std::mem::take(&mut look.loggers).into_values() {
            self.witness(Whose::Logger, process, pidfd);
        }
        said
    }

    /// Reopens the stdio of every process of a task that lives.
    fn reopen(
        &mut self,
        adoptee: &mut Adoptee,
        record: &Record,
        look: &mut Look,
        loot: &mut Loot,
    ) -> Vec<String> {
        let mut lines = Vec::new();
        let init = (Key::init(&adoptee.id), &mut adoptee.init);
        let execs = adoptee.execs.iter_mut().map(|(exec_id, exec)| {
            let key = Key {
                id: adoptee.id.clone(),
                exec_id: exec_id.clone(),
            };
            let lives = matches!(exec.phase, ExecPhase::Starting | ExecPhase::Running);
            (lives, (key, &mut exec.member))
        });
        let init_lives = adoptee.phase != Phase::Creating;
        for (lives, (key, member)) in std::iter::once((init_lives, init)).chain(execs) {
            let alive = look
                .members
                .get(&key)
                .is_some_and(|(_, found)| found.as_ref().is_ok_and(|fd| !witness::has_ended(fd)));
            let Some(process) = member.process.filter(|_| lives && alive) else {
                continue;
            };
            if !member.stdio.terminal && !member.stdio.stdin.is_empty() {
                let proc = &self.roots.proc;
                member.stdin_closed |= stdio::stdin_has_ended(proc, process.pid, loot);
            }
            let wanted = Wanted {
                key: &key,
                wish: &member.stdio,
                stdin_closed: member.stdin_closed,
                bundle: Path::new(&adoptee.bundle),
                namespace: &self.namespace,
                owner: (adoptee.options.io_uid, adoptee.options.io_gid),
                memory_limit: adoptee.memory_limit,
            };
            let logger = look.loggers.get(&key).map(|(process, _)| Logger {
                pid: Pid::from_raw(i32::try_from(process.pid).unwrap_or(0)),
                start_time: process.start_time,
                argv: logger_argv(record, &key),
            });
            let living = Living {
                wanted,
                pid: process.pid,
                logger,
            };
            let whose = match key.exec_id.as_str() {
                "" => String::new(),
                exec_id => format!("exec {exec_id}: "),
            };
            let found = self
                .stdio
                .adopt(living, loot, &self.roots.proc, &self.epoll);
            lines.extend(found.into_iter().map(|line| format!("{whose}{line}")));
        }
        lines
    }

    /// Goes on with what those processes of a task have left that have ended; gives those of which
    /// something is still to be carried although their end was told.
    fn carry_on(
        &mut self,
        adoptee: &mut Adoptee,
        record: &Record,
        look: &Look,
        loot: &Loot,
    ) -> (Vec<Key>, Vec<String>) {
        let (mut draining, mut lines) = (Vec::new(), Vec::new());
        let owner = (adoptee.options.io_uid, adoptee.options.io_gid);
        let execs = adoptee.execs.iter_mut().filter(|(_, exec)| {
            // What there was of one that never ran has gone with its start.
            !matches!(exec.phase, ExecPhase::Added | ExecPhase::Failed)
        });
        let execs = execs.map(|(exec_id, exec)| (exec_id.as_str(), &mut exec.member));
        for (exec_id, member) in std::iter::once(("", &mut adoptee.init)).chain(execs) {
            let key = Key {
                id: adoptee.id.clone(),
                exec_id: exec_id.to_owned(),
            };
            let Some(recorded) = recorded_stdio(record, &key) else {
                continue;
            };
            let wanted = Wanted {
                key: &key,
                wish: &member.stdio,
                stdin_closed: member.stdin_closed,
                bundle: Path::new(&adoptee.bundle),
                namespace: &self.namespace,
                owner,
                memory_limit: adoptee.memory_limit,
            };
            let carried = &recorded.carried;
            let found = self.stdio.carry_on(&wanted, carried, loot, &self.epoll);
            lines.extend(found.into_iter().map(|line| match exec_id {
                "" => line,
                exec_id => format!("exec {exec_id}: {line}"),
            }));
            if member.exit.is_some() && !self.stdio.carried(&key).is_empty() {
                member.draining = true;
                draining.push(key.clone());
            }
            // Surely: of one that may live nothing is given up.
            let seen = look.members.get(&key).map(|(_, found)| found);
            let has_ended = |fd: &OwnedFd| witness::has_ended(fd);
            let ended = seen.is_some_and(|found| found.as_ref().is_ok_and(has_ended));
            if ended || member.exit.is_some() {
                self.stdio.adopt_ended(&wanted, carried);
            }
        }
        (draining, lines)
    }

    /// Has a teller wake us when there is something to hear.
    pub(super) fn listen_to(&mut self, teller: Teller) {
        if let Teller::Nobody(why) = &teller {
            let text = format!("exit statuses may remain unknown: {why}");
            self.log.say(Level::Warning, &text);
        }
        if let Some(descriptor) = teller.descriptor()
            && let Err(e) = self
                .epoll
                .add(descriptor, EpollEvent::new(EpollFlags::EPOLLIN, TELLER))
        {
            self.log
                .say(Level::Error, &format!("watch process events: {e}"));
        }
        self.teller = teller;
    }

    fn witness(&mut self, whose: Whose, process: Process, pidfd: OwnedFd) {
        self.watch_witness(Witness {
            whose,
            process,
            pidfd,
            ended: None,
        });
    }

    pub(super) fn watch_witness(&mut self, witness: Witness) {
        self.last_witness += 1;
        let token = self.last_witness;
        let event = EpollEvent::new(EpollFlags::EPOLLIN, token);
        if let Err(e) = self.epoll.add(&witness.pidfd, event) {
            let text = format!("watch process {}: {e}", witness.process.pid);
            self.log.say(Level::Error, &text);
            return;
        }
        self.witnesses.insert(token, witness);
    }

    /// A process has ended whose parent we are not.
    pub(super) fn witnessed(&mut self, token: u64) {
        let Some(witness) = self.witnesses.get_mut(&token) else {
            return;
        };
        let _ = self.epoll.delete(witness.pidfd.as_fd());
        witness.ended = Some(now().mono_ms);
        let pid = Pid::from_raw(i32::try_from(witness.process.pid).unwrap_or(0));
        match witness.whose {
            Whose::Logger => {
                self.witnesses.remove(&token);
                let mut heard = Vec::new();
                let at = super::now().mono_ms;
                self.stdio
                    .logger_exited(pid, None, at, &self.epoll, &mut heard);
                self.hear(heard);
                self.work_off();
            }
            Whose::Member(_) => self.ask_teller(),
        }
    }

    /// The teller has something to say.
    pub(super) fn told(&mut self) {
        self.teller.hear();
        self.ask_teller();
    }

    /// When the teller is to be asked again, whether or not it has said anything.
    pub(super) fn teller_deadline(&self) -> Option<u64> {
        let now = now().mono_ms;
        let ends = self.witnesses.values().filter_map(|witness| witness.ended);
        let again = |ended: u64| {
            let ago = Teller::again(Duration::from_millis(now.saturating_sub(ended)));
            ended.saturating_add(u64::try_from(ago.as_millis()).unwrap_or(u64::MAX))
        };
        ends.map(again).min()
    }

    /// Hears how those ended that have.
    pub(super) fn ask_teller(&mut self) {
        let proc = Proc::new(&self.roots.proc);
        let now = now().mono_ms;
        let mut known = Vec::new();
        for (token, witness) in &self.witnesses {
            let (Whose::Member(key), Some(ended)) = (&witness.whose, witness.ended) else {
                continue;
            };
            let (process, pidfd) = (witness.process, &witness.pidfd);
            let ago = Duration::from_millis(now.saturating_sub(ended));
            let status = match witness::answer(&mut self.teller, &proc, process, pidfd, ago) {
                Answer::Status(status) => Ok(status),
                Answer::Unknown(why) => Err(why),
                Answer::NotYet => continue,
            };
            known.push((*token, key.clone(), status));
        }
        for (token, key, status) in known {
            self.witnesses.remove(&token);
            if key.is_init() {
                // The exit may be seen before what caused it.
                self.look_for_oom(&key.id.clone());
            }
            self.handle(Input::Event(Event::Ended { key, status }));
        }
    }

    /// What has become of a task, for the verb's answer.
    fn tell(&self, id: String, remarks: Vec<String>) -> Option<AdoptedTask> {
        let record = self.journal.task(&id, &self.state, &self.stdio)?;
        Some(AdoptedTask {
            id,
            phase: record.phase,
            init: record.init,
            exit: record.exit,
            remarks,
        })
    }
}

fn recorded_stdio<'a>(record: &'a Record, key: &Key) -> Option<&'a record::Stdio> {
    let task = record.tasks.iter().find(|task| task.id == key.id)?;
    if key.is_init() {
        return Some(&task.stdio);
    }
    let exec = task.execs.iter().find(|exec| exec.id == key.exec_id);
    exec.map(|exec| &exec.stdio)
}

fn logger_argv(record: &Record, key: &Key) -> Vec<String> {
    let stdio = recorded_stdio(record, key);
    let logger = stdio.and_then(|stdio| stdio.logger.as_ref());
    logger.map(|logger| logger.argv.clone()).unwrap_or_default()
}

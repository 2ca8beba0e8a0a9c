//! What the supervisor watches, whom it gives a successor and when, and what it keeps no longer.
//! Pure.
//!
//! ```text
//!            shim ended, by a signal or nobody knows how
//!  Serves ──────────────────────────────────────────────▶ Resumes ──adopted──▶ Serves
//!    ▲  │                                                  ▲   │ failed (¼, 1, 4, 15 s),
//!    │  │ ended with 0, or it was announced, or it     due │   ▼ or ended again (0, 0, ¼, 1 s)
//!    │  │ is a stock one, or no task is left             Waits
//!    │  ▼                                                  │ five ends in a minute, or five
//!    │ Ended                                               ▼ tries in a row that failed
//!    └──────────── another shim is seen there ──────── GivenUp
//! ```
//!
//! A stock shim has no successor while it is watched: its unanswered requests are known to nobody,
//! so its containerd would wait for ever for answers that never come.

use std::{
    collections::{BTreeMap, VecDeque},
    path::{Path, PathBuf},
};

use recoverd_common::record::{Process, Record};

/// Ends within this time count together, milliseconds.
const MINUTE_MS: u64 = 60_000;
/// So many of them are enough.
const ENOUGH: usize = 5;
/// Before the first, second, third and fourth try within a minute, milliseconds. A crash is mostly
/// the only one: containerd is waiting.
const PAUSES_MS: [u64; ENOUGH - 1] = [0, 0, 250, 1_000];
/// After each try in a row that failed, milliseconds. No end of a shim is counted for it: what
/// is installed may be no good at the moment, while a package is replaced for one.
const AFTER_FAILURE_MS: [u64; ENOUGH - 1] = [250, 1_000, 4_000, 15_000];

/// Whose shim it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// It keeps a record and tells us what it has.
    Ours,
    /// It knows nothing of us.
    Stock,
}

impl Kind {
    /// As metrics say it.
    pub fn word(self) -> &'static str {
        match self {
            Kind::Ours => "ours",
            Kind::Stock => "stock",
        }
    }
}

/// An init (without exec) or an exec.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Member {
    /// The container.
    pub id: String,
    /// The exec; empty for the init.
    pub exec_id: String,
}

impl Member {
    /// The name under which its descriptors are kept: `<id>/<exec>`.
    pub fn key(&self) -> String {
        format!("{}/{}", self.id, self.exec_id)
    }
}

/// What was seen of one shim and its tasks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sighting {
    /// Whose.
    pub kind: Kind,
    /// containerd's namespace.
    pub namespace: String,
    /// The containerd's address.
    pub address: String,
    /// The id of its group.
    pub group: String,
    /// The shim, as its record or its own answer names it.
    pub shim: Process,
    /// Every process that has not ended, as far as is known.
    pub members: BTreeMap<Member, Process>,
    /// Tasks that are not deleted: somebody may still ask for them.
    pub tasks: usize,
}

impl Sighting {
    /// What a record says.
    pub fn of_record(record: &Record) -> Self {
        let mut members = BTreeMap::new();
        for task in &record.tasks {
            let init = (String::new(), task.init.filter(|_| task.exit.is_none()));
            let execs = task.execs.iter().map(|exec| {
                let process = exec.process.filter(|_| exec.exit.is_none());
                (exec.id.clone(), process)
            });
            for (exec_id, process) in std::iter::once(init).chain(execs) {
                let member = Member {
                    id: task.id.clone(),
                    exec_id,
                };
                members.extend(process.map(|process| (member, process)));
            }
        }
        Self {
            kind: Kind::Ours,
            namespace: record.shim.namespace.clone(),
            address: record.shim.containerd_address.clone(),
            group: record.shim.group_id.clone(),
            shim: record.shim.process,
            members,
            tasks: record.tasks.len(),
        }
    }
}

/// How a shim ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum How {
    /// It exited with this code.
    Exited(u32),
    /// This signal ended it.
    Signalled(u32),
    /// Nobody can say.
    Unknown,
}

impl How {
    /// Of a status as shells write it; none: unknown.
    pub fn of_status(status: Option<u32>) -> Self {
        match status {
            Some(status @ 129..) => How::Signalled(status.saturating_sub(128)),
            Some(code) => How::Exited(code),
            None => How::Unknown,
        }
    }

    /// In words.
    pub fn text(self) -> String {
        match self {
            How::Exited(code) => format!("exited with {code}"),
            How::Signalled(signal) => format!("was ended by signal {signal}"),
            How::Unknown => "ended, nobody can say how".into(),
        }
    }
}

/// What became of a try.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tried {
    /// This one serves.
    Serves(Process),
    /// Somebody else does, or nothing is left.
    StoodBack,
    /// Nobody does.
    Failed,
}

/// What is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Input {
    /// This is there.
    Seen(PathBuf, Sighting),
    /// More of a shim that tells nobody what it has: one task of a stock shim.
    SeenAlso(PathBuf, Sighting),
    /// There is nothing any more.
    Gone(PathBuf),
    /// A task of a stock shim is not there any more.
    TaskGone(PathBuf, String),
    /// A shim has ended.
    ShimEnded(PathBuf, Process, How),
    /// An init or exec has ended.
    MemberEnded(PathBuf, Member, Process),
    /// A try to give this shim a successor has come to its end.
    Tried(PathBuf, Process, Tried),
    /// This shim's end will be meant.
    Leave(PathBuf, Process),
    /// Time has passed.
    Tick,
}

/// What is to be done, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Output {
    /// Tell when this shim has ended, and catch up with what it has.
    WatchShim(PathBuf, Process),
    /// Tell when this process has ended.
    WatchMember(PathBuf, Member, Process),
    /// It is of no interest any more.
    Unwatch(Process),
    /// Start a successor with everything that is kept.
    Resume(PathBuf),
    /// Keep nothing of this shim any longer.
    DropAll(PathBuf),
    /// Keep nothing of this member any longer.
    DropMember(PathBuf, Member),
    /// Nobody will accept what is waiting there: whoever looks is to see that nobody listens.
    DropListener(PathBuf),
    /// A shim ended; what follows.
    Died(PathBuf, Process, How, Follows),
    /// Read again what is there.
    Look(PathBuf),
}

/// What follows a shim's end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Follows {
    /// It was meant.
    Nothing,
    /// A successor, now or after a pause.
    Successor,
    /// It has ended too often: somebody has to look.
    GivenUp,
    /// No successor of it came up: somebody has to look.
    NoneCame,
    /// Its containerd, if it runs, ends the workload: it is a stock shim.
    Loss,
}

impl Follows {
    /// The word.
    pub fn word(self) -> &'static str {
        match self {
            Follows::Nothing => "nothing",
            Follows::Successor => "successor",
            Follows::GivenUp | Follows::NoneCame => "given-up",
            Follows::Loss => "loss",
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Serves,
    Waits(u64),
    Resumes,
    GivenUp,
    Ended,
}

/// One shim and its tasks.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Group {
    sighting: Sighting,
    stage: Stage,
    /// When it ended, the last times.
    ends: VecDeque<u64>,
    /// Whose end was the last of these before a restart: found dead after it, it is the same end.
    remembered: Option<Process>,
    /// How it ended, the last time.
    how: How,
    /// Tries to start a successor that have failed since.
    failures: usize,
    /// Whose end was announced, and until when that counts: whoever has announced it may have died
    /// before it came.
    meant: Option<(Process, u64)>,
    /// The one that ended as was meant: its record, read again, is what it left.
    left: Option<Process>,
    /// The serving shim's record has gone. It retires, and has nothing that lives; or somebody
    /// took it away.
    recordless: bool,
}

impl Group {
    fn new(sighting: Sighting, stage: Stage) -> Self {
        Self {
            sighting,
            stage,
            ends: VecDeque::new(),
            remembered: None,
            how: How::Unknown,
            failures: 0,
            meant: None,
            left: None,
            recordless: false,
        }
    }

    /// Its record has gone, and nobody is left who serves or could be served.
    fn is_over(&self) -> bool {
        self.recordless
            && match self.stage {
                // What it has announced is dropped with its end, if it retires.
                Stage::Serves | Stage::Resumes => self.sighting.kind == Kind::Stock,
                // Who has not had a successor yet is to have one, with or without its record.
                Stage::Waits(_) | Stage::GivenUp => self.sighting.members.is_empty(),
                Stage::Ended => true,
            }
    }

    /// This shim has ended. When the next try is due; none: enough.
    fn next_try(&mut self, process: Process, now: u64) -> Option<u64> {
        if self.remembered.take() != Some(process) {
            self.ends.push_back(now);
        }
        let old = |at: &u64| at.saturating_add(MINUTE_MS) <= now;
        while self.ends.front().is_some_and(old) {
            self.ends.pop_front();
        }
        let pause = PAUSES_MS.get(self.ends.len().saturating_sub(1))?;
        Some(now.saturating_add(*pause))
    }
}

/// Everything that is watched.
#[derive(Debug, Default)]
pub struct State {
    groups: BTreeMap<PathBuf, Group>,
}

/// Numbers for the metrics.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Count {
    /// Shims that serve.
    pub shims: usize,
    /// Inits that have not ended.
    pub inits: usize,
    /// Groups that have ended too often.
    pub given_up: usize,
}

impl State {
    /// An end of this shim, as remembered from before a restart: `at` by the clock of
    /// [`State::step`], and the word for what followed. It counts as it did then: one that was
    /// meant does not, and that no successor came up is not another one. Nothing is watched yet.
    pub fn remember(&mut self, socket: &Path, sighting: Sighting, at: u64, follows: &str) {
        if follows == Follows::Nothing.word() {
            return;
        }
        let group = self.groups.entry(socket.to_owned());
        let group = group.or_insert_with(|| Group::new(sighting.clone(), Stage::Ended));
        if group.remembered.replace(sighting.shim) != Some(sighting.shim) {
            group.ends.push_back(at);
        }
        group.sighting = sighting;
    }

    /// When [`Input::Tick`] is due.
    pub fn deadline(&self) -> Option<u64> {
        let waits = |group: &Group| match group.stage {
            Stage::Waits(at) => Some(at),
            Stage::Serves | Stage::Resumes | Stage::GivenUp | Stage::Ended => None,
        };
        self.groups.values().filter_map(waits).min()
    }

    /// What was seen last at `socket`.
    pub fn sighting(&self, socket: &Path) -> Option<&Sighting> {
        self.groups.get(socket).map(|group| &group.sighting)
    }

    /// All sockets.
    pub fn sockets(&self) -> impl Iterator<Item = (&PathBuf, Kind)> {
        self.groups
            .iter()
            .map(|(socket, group)| (socket, group.sighting.kind))
    }

    /// For the metrics.
    pub fn count(&self, kind: Kind) -> Count {
        let of_kind = self.groups.values().filter(|g| g.sighting.kind == kind);
        of_kind.fold(Count::default(), |mut count, group| {
            let inits = group.sighting.members.keys();
            count.inits += inits.filter(|member| member.exec_id.is_empty()).count();
            count.shims += usize::from(group.stage == Stage::Serves);
            count.given_up += usize::from(group.stage == Stage::GivenUp);
            count
        })
    }

    /// Takes one input.
    pub fn step(&mut self, input: Input, now: u64) -> Vec<Output> {
        let mut out = Vec::new();
        match input {
            Input::Seen(socket, sighting) => self.seen(socket, sighting, &mut out),
            Input::SeenAlso(socket, mut sighting) => {
                if let Some(group) = self.groups.get(&socket) {
                    let old = &group.sighting;
                    if old.kind == Kind::Ours && group.stage != Stage::Ended {
                        // Its own record says more.
                        return out;
                    }
                    if old.kind == sighting.kind {
                        for (member, process) in &old.members {
                            let known = sighting.members.entry(member.clone());
                            known.or_insert(*process);
                        }
                        sighting.tasks = sighting.members.len();
                    }
                }
                self.seen(socket, sighting, &mut out);
            }
            Input::Gone(socket) => {
                if let Some(group) = self.groups.get_mut(&socket) {
                    group.recordless = true;
                }
                self.forget_if_over(socket, &mut out);
            }
            Input::TaskGone(socket, id) => {
                let Some(group) = self.groups.get_mut(&socket) else {
                    return out;
                };
                let members = &mut group.sighting.members;
                members.retain(|member, process| {
                    let gone = member.id == id;
                    if gone {
                        out.push(Output::Unwatch(*process));
                        out.push(Output::DropMember(socket.clone(), member.clone()));
                    }
                    !gone
                });
                group.sighting.tasks = members.len();
                if group.stage == Stage::Ended
                    && members.is_empty()
                    && let Some(group) = self.groups.remove(&socket)
                {
                    forget(socket, &group, &mut out);
                }
            }
            Input::ShimEnded(socket, process, how) => {
                self.shim_ended(&socket, process, how, now, &mut out);
            }
            Input::MemberEnded(socket, member, process) => {
                if let Some(group) = self.groups.get_mut(&socket)
                    && group.sighting.members.get(&member) == Some(&process)
                {
                    group.sighting.members.remove(&member);
                    if group.sighting.kind == Kind::Stock {
                        // A stock shim cannot say that it has closed them, and nobody is there
                        // any more who would write.
                        out.push(Output::DropMember(socket.clone(), member));
                    }
                    self.forget_if_over(socket, &mut out);
                }
            }
            Input::Tried(socket, of, tried) => self.tried(&socket, of, tried, now, &mut out),
            Input::Leave(socket, process) => {
                if let Some(group) = self.groups.get_mut(&socket) {
                    group.meant = Some((process, now.saturating_add(MINUTE_MS)));
                }
            }
            Input::Tick => {
                for (socket, group) in &mut self.groups {
                    if let Stage::Waits(at) = group.stage
                        && at <= now
                    {
                        group.stage = Stage::Resumes;
                        out.push(Output::Resume(socket.clone()));
                    }
                }
            }
        }
        out
    }

    fn seen(&mut self, socket: PathBuf, sighting: Sighting, out: &mut Vec<Output>) {
        let watch_members = |old: &BTreeMap<Member, Process>, out: &mut Vec<Output>| {
            for (member, process) in &sighting.members {
                if old.get(member) != Some(process) {
                    let watch = Output::WatchMember(socket.clone(), member.clone(), *process);
                    out.push(watch);
                }
            }
        };
        let Some(group) = self.groups.get_mut(&socket) else {
            out.push(Output::WatchShim(socket.clone(), sighting.shim));
            watch_members(&BTreeMap::new(), out);
            let group = Group::new(sighting, Stage::Serves);
            self.groups.insert(socket, group);
            return;
        };
        if group.stage == Stage::Ended && group.left == Some(sighting.shim) {
            return;
        }
        let old = &group.sighting;
        for (member, process) in &old.members {
            if sighting.members.get(member) != Some(process) {
                // Its exit is on record now, or it is deleted. What is kept of it, a shim of ours
                // has said itself.
                out.push(Output::Unwatch(*process));
                if sighting.kind == Kind::Stock {
                    out.push(Output::DropMember(socket.clone(), member.clone()));
                }
            }
        }
        let another = old.shim != sighting.shim;
        if another || group.stage == Stage::Ended {
            // While a successor is being started, its own word for it comes as well.
            if another && group.stage == Stage::Serves {
                out.push(Output::Unwatch(old.shim));
            }
            group.stage = Stage::Serves;
            out.push(Output::WatchShim(socket.clone(), sighting.shim));
        }
        watch_members(&old.members, out);
        group.sighting = sighting;
        group.recordless = false;
    }

    fn shim_ended(
        &mut self,
        socket: &Path,
        process: Process,
        how: How,
        now: u64,
        out: &mut Vec<Output>,
    ) {
        let Some(group) = self.groups.get_mut(socket) else {
            return;
        };
        if group.sighting.shim != process || group.stage != Stage::Serves {
            // Somebody else serves already.
            return;
        }
        let announced = |(announced, until): (Process, u64)| announced == process && now < until;
        let living = !group.sighting.members.is_empty();
        // A stock shim that is told to end by SIGTERM does so with 0, and leaves its containers.
        let orderly = how == How::Exited(0) && (group.sighting.kind == Kind::Ours || !living);
        let meant = group.meant.is_some_and(announced) || orderly;
        // One that retires has nothing that lives. Whose record was taken away has.
        let retired = group.recordless && !living;
        let nothing = group.sighting.tasks == 0 || retired;
        let follows = match group.sighting.kind {
            _ if meant || nothing => Follows::Nothing,
            Kind::Stock => Follows::Loss,
            Kind::Ours => match group.next_try(process, now) {
                Some(at) if at <= now => {
                    group.stage = Stage::Resumes;
                    Follows::Successor
                }
                Some(at) => {
                    group.stage = Stage::Waits(at);
                    Follows::Successor
                }
                None => {
                    group.stage = Stage::GivenUp;
                    out.push(Output::DropListener(socket.to_owned()));
                    Follows::GivenUp
                }
            },
        };
        group.how = how;
        group.failures = 0;
        let starts = group.stage == Stage::Resumes;
        if starts {
            // Before anything else is done about it: containerd is waiting.
            out.push(Output::Resume(socket.to_owned()));
        }
        out.push(Output::Died(socket.to_owned(), process, how, follows));
        match follows {
            Follows::Successor | Follows::GivenUp | Follows::NoneCame => {}
            // What the workload reads and writes is kept on, for an adoption by hand or before
            // containerd's next start.
            Follows::Loss => group.stage = Stage::Ended,
            Follows::Nothing => {
                group.stage = Stage::Ended;
                group.left = Some(process);
                out.push(Output::DropAll(socket.to_owned()));
                if nothing && let Some(group) = self.groups.remove(socket) {
                    forget(socket.to_owned(), &group, out);
                }
            }
        }
    }

    fn tried(&mut self, socket: &Path, of: Process, tried: Tried, now: u64, out: &mut Vec<Output>) {
        let Some(group) = self.groups.get_mut(socket) else {
            return;
        };
        // A successor's own word may come first, and its end with it: then another try is under
        // way, of which this one says nothing.
        if group.stage != Stage::Resumes || group.sighting.shim != of {
            return;
        }
        match tried {
            Tried::Serves(shim) => {
                group.stage = Stage::Serves;
                group.sighting.shim = shim;
                out.push(Output::WatchShim(socket.to_owned(), shim));
            }
            Tried::StoodBack => group.stage = Stage::Ended,
            Tried::Failed => match AFTER_FAILURE_MS.get(group.failures) {
                Some(pause) => {
                    group.failures += 1;
                    group.stage = Stage::Waits(now.saturating_add(*pause));
                }
                None => {
                    group.stage = Stage::GivenUp;
                    out.push(Output::DropListener(socket.to_owned()));
                    out.push(Output::Died(
                        socket.to_owned(),
                        group.sighting.shim,
                        group.how,
                        Follows::NoneCame,
                    ));
                }
            },
        }
        out.push(Output::Look(socket.to_owned()));
    }

    fn forget_if_over(&mut self, socket: PathBuf, out: &mut Vec<Output>) {
        if self.groups.get(&socket).is_some_and(Group::is_over)
            && let Some(group) = self.groups.remove(&socket)
        {
            forget(socket, &group, out);
        }
    }
}

fn forget(socket: PathBuf, group: &Group, out: &mut Vec<Output>) {
    for process in group.sighting.members.values() {
        out.push(Output::Unwatch(*process));
    }
    if group.stage == Stage::Serves {
        out.push(Output::Unwatch(group.sighting.shim));
    }
    out.push(Output::DropAll(socket));
}

#[cfg(test)]
#[path = "decide_tests.rs"]
mod tests;

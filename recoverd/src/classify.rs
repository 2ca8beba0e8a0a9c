//! Judges cases and leftovers: one function for each finding of the contract. Pure.
//!
//! Two rules hold for all of them. *Unknown* is no finding: what could not be seen is a gap. And
//! what is normal for a moment (a task being created or deleted, a client that has made its fifos
//! and not yet its task) must be told from what stays: by age, by a verb that runs right now, or
//! by [`Hold`], which asks for another look.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use recoverd_common::{paths, proc::ProcessId, seen::Seen, timestamp::Timestamp};

use crate::{
    correlate::{Case, Cases, Init, Kind, Known, ShimOf, kind},
    facts::{
        Address, Answer, Api, Connection, Gap, Instance, Look, Phase, Reply, Shim, TaskName,
        one_line,
    },
    findings::{Code, Evidence, Finding, Subject},
};

/// Ages and limits that decide.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    /// Leaked resources younger than this are not reported.
    pub min_age: Duration,
    /// A shim without task, or a phase that contradicts the kernel, is normal for this long.
    pub settle: Duration,
    /// Percent of a file system in use.
    pub run_full: u64,
}

/// How often a finding must be seen before it is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hold {
    /// Once: it is no matter of moments.
    Once,
    /// In a second look too.
    Twice,
    /// In every look for as long as [`Settings::settle`].
    Settle,
}

/// A finding, if it stays.
#[derive(Debug, Clone)]
pub struct Suspicion {
    /// What it would be.
    pub finding: Finding,
    /// How often it must be seen.
    pub hold: Hold,
    /// The socket to ask again, when the shim's answers are part of it.
    pub address: Option<Address>,
    /// Its containerd, when known.
    pub instance: Option<usize>,
}

/// A shim that uses more than this is bloated. Stock shims measured: 5 MiB private, 12 threads,
/// 32 descriptors with one container; several more of each for every exec under way.
const BLOATED_PRIVATE_KIB: u64 = 64 << 10;
const BLOATED_THREADS: u32 = 128;
const BLOATED_DESCRIPTORS: usize = 1024;
/// A created task that nobody starts for this long is stuck.
const CREATED_TOO_LONG: Duration = Duration::from_secs(600);

/// Judges everything.
pub fn classify(look: &Look, cases: &Cases<'_>, settings: &Settings) -> Vec<Suspicion> {
    let context = Context { look, settings };
    let mut found = Vec::new();
    for case in &cases.cases {
        found.extend(context.orphaned_task(case));
        found.extend(context.unresponsive(case));
        found.extend(context.second_init(case));
        found.extend(context.socket_missing(case));
        found.extend(context.task_unknown(case));
        found.extend(context.leaked_shim(case));
        found.extend(context.stuck_task(case));
        found.extend(context.exit_unreported(case));
        found.extend(context.stale_bundle(case));
    }
    found.extend(context.duplicates(cases));
    for shim in &look.shims {
        found.extend(context.outdated(shim, cases));
        found.extend(context.bloated(shim, cases));
    }
    for shim in &cases.idle_shims {
        found.extend(context.idle_shim(shim));
    }
    found.extend(context.stale_sockets(cases));
    found.extend(context.records(cases));
    found.extend(context.mounts(cases));
    found.extend(context.cgroups(cases));
    found.extend(context.fifos(cases));
    found.extend(context.runc_states(cases));
    found.extend(context.full());
    found.extend(context.execs(cases));
    found.sort_by(|a, b| {
        let key = |s: &Suspicion| {
            (
                s.finding.severity,
                s.finding.code,
                s.finding.subject.clone(),
            )
        };
        key(a).cmp(&key(b))
    });
    found
}

fn evidence(by: &'static str, fact: impl Into<String>) -> Evidence {
    Evidence {
        by,
        fact: one_line(&fact.into()),
    }
}

fn task_subject(name: &TaskName) -> Subject {
    Subject::Task {
        namespace: name.0.clone(),
        id: name.1.clone(),
    }
}

fn path_subject(path: &Path) -> Subject {
    Subject::Path {
        path: path.display().to_string(),
    }
}

struct Context<'a> {
    look: &'a Look,
    settings: &'a Settings,
}

impl Context<'_> {
    fn suspicion(
        &self,
        code: Code,
        subject: Subject,
        hold: Hold,
        evidence: Vec<Evidence>,
        action: impl Into<String>,
    ) -> Suspicion {
        Suspicion {
            finding: Finding {
                code,
                severity: code.severity(),
                subject,
                evidence,
                action: action.into(),
            },
            hold,
            address: None,
            instance: None,
        }
    }

    /// A suspicion about a case.
    fn about(
        &self,
        case: &Case<'_>,
        code: Code,
        hold: Hold,
        evidence: Vec<Evidence>,
        action: impl Into<String>,
    ) -> Suspicion {
        Suspicion {
            address: case.address.clone(),
            instance: case.instance,
            ..self.suspicion(code, task_subject(&case.name), hold, evidence, action)
        }
    }

    fn instance(&self, case: &Case<'_>) -> Option<&Instance> {
        self.look.instances.get(case.instance?)
    }

    fn when(&self, time: SystemTime) -> String {
        Timestamp::from(time).to_string()
    }

    fn process(&self, what: &str, id: ProcessId) -> Evidence {
        let since = self.when(self.look.host.started_at(id));
        evidence("kernel", format!("{what} {} lives since {since}", id.pid))
    }

    fn age(&self, time: SystemTime) -> Duration {
        self.look.at.duration_since(time).unwrap_or_default()
    }

    fn age_of(&self, id: ProcessId) -> Duration {
        self.age(self.look.host.started_at(id))
    }

    /// Old enough to be a leak; what has no age any more went away.
    fn old(&self, changed_at: Option<SystemTime>) -> bool {
        changed_at.is_some_and(|at| self.age(at) >= self.settings.min_age)
    }

    fn said_by_containerd(&self, case: &Case<'_>) -> Evidence {
        let fact = match (case.containerd, self.instance(case)) {
            (Known::Yes(task), _) => format!("lists the task as {}", task.phase.word()),
            (Known::No, Some(i)) => format!("at {} is up and does not list the task", i.address),
            (Known::No, None) => "does not list the task".into(),
            (Known::CannotSay, Some(i)) => match &i.api {
                Api::Down => format!("at {} is down", i.address),
                Api::Unknown(why) => format!("at {} cannot be asked: {why}", i.address),
                Api::Up(_) => format!("at {} did not list its tasks in time", i.address),
            },
            (Known::CannotSay, None) => "is not known: no bundle or shim names it".into(),
        };
        evidence("containerd", fact)
    }

    fn orphaned_task(&self, case: &Case<'_>) -> Option<Suspicion> {
        let init = case.init.alive()?;
        if !matches!(case.shim, ShimOf::None) || case.answered() {
            return None;
        }
        let mut facts = vec![self.process("init", init)];
        if let Some(address) = &case.address {
            facts.push(evidence("kernel", format!("nobody listens on {address}")));
        }
        facts.push(evidence("kernel", "no shim process serves the task"));
        match case.bundle {
            Some(bundle) => facts.push(evidence("bundle", bundle.path.display().to_string())),
            None => facts.push(self.no_bundle(case)),
        }
        facts.push(self.said_by_containerd(case));
        Some(self.about(
            case,
            Code::OrphanedTask,
            Hold::Twice,
            facts,
            "adopt it before containerd starts: that start ends the workload",
        ))
    }

    /// Why a case has no bundle.
    fn no_bundle(&self, case: &Case<'_>) -> Evidence {
        let named = case
            .runc
            .and_then(|entry| entry.state.present()?.bundle.as_deref());
        match (case.instance, named) {
            (None, Some(path)) => evidence(
                "runc",
                format!(
                    "its bundle is {}, of a containerd that is not known here",
                    path.display()
                ),
            ),
            (Some(_), _) | (None, None) => evidence("bundle", "there is none"),
        }
    }

    /// What its shim failed to answer, if it did.
    fn unanswered(answer: &Answer) -> Option<String> {
        if answer.connection == Connection::QueueFull {
            return Some("accepts no connection any more: its queue is full".into());
        }
        match &answer.greeting {
            Reply::Silent => {
                return Some(format!(
                    "did not answer Connect, asked {} times",
                    answer.asked
                ));
            }
            Reply::Garbage(why) => return Some(format!("answered Connect with no answer: {why}")),
            Reply::Said(_) | Reply::Error(..) | Reply::NotAsked => {}
        }
        answer.states.iter().find_map(|(id, reply)| match reply {
            Reply::Silent => Some(format!("answered Connect and did not answer State of {id}")),
            Reply::Garbage(why) => Some(format!("answered State of {id} with no answer: {why}")),
            Reply::Said(_) | Reply::Error(..) | Reply::NotAsked => None,
        })
    }

    fn unresponsive(&self, case: &Case<'_>) -> Option<Suspicion> {
        let answer = case.answer?;
        let missed = Self::unanswered(answer)?;
        // Not asked in time for want of descriptors or budget is a gap, not a fault of the shim.
        let address = case.address.as_deref().unwrap_or_default();
        let mut facts = vec![evidence("shim", format!("at {address} {missed}"))];
        match &case.shim {
            ShimOf::Lives(shim) => facts.push(self.state_of(shim)),
            ShimOf::Stranger(pids) => facts.push(evidence(
                "kernel",
                format!("listener {pids:?} has no shim's command line"),
            )),
            ShimOf::Unknown(_) => {}
            // It died while it was asked: the second look says what is left.
            ShimOf::None => return None,
        }
        // Silence to Connect was waited for twice. What else may be a moment's: a closed
        // connection or a full queue, of a shim that leaves; one State on a busy node.
        let waited = answer.greeting == Reply::Silent && answer.patient;
        let hold = if waited { Hold::Once } else { Hold::Twice };
        if case.kind() == Some(Kind::Foreign) {
            return Some(self.about(
                case,
                Code::Foreign,
                hold,
                facts,
                "look at it with its own runtime's tools: it is not a runc shim",
            ));
        }
        if let Some(init) = case.init.alive() {
            facts.push(self.process("init", init));
        }
        facts.push(self.said_by_containerd(case));
        Some(self.about(
            case,
            Code::UnresponsiveShim,
            hold,
            facts,
            "do not restart containerd while it hangs: that start ends the workload",
        ))
    }

    fn state_of(&self, shim: &Shim) -> Evidence {
        let pid = shim.id.pid;
        let fact = match (shim.state, shim.cpu_ticks_after) {
            ('T', _) => format!("shim {pid} is stopped (state T)"),
            ('t', _) => format!("shim {pid} is stopped by a tracer (state t)"),
            (state, Some(after)) if after > shim.cpu_ticks => {
                let used = after.saturating_sub(shim.cpu_ticks);
                format!("shim {pid} is busy (state {state}, {used} ticks of CPU meanwhile)")
            }
            (state, _) => format!("shim {pid} is idle (state {state})"),
        };
        evidence("kernel", fact)
    }

    /// A living init in the container's cgroup that is not the task's.
    fn second_init(&self, case: &Case<'_>) -> Option<Suspicion> {
        let cgroup = case.cgroup?;
        let processes = cgroup.processes.present()?;
        let members: BTreeSet<i32> = processes.iter().map(|process| process.id.pid).collect();
        let own = match &case.init {
            Init::Alive(id) => id.pid,
            // With nothing that names an init, nothing tells which one would be the other.
            Init::None if case.runc.is_none() && case.bundle.is_none() => 0,
            Init::None | Init::Dead(..) | Init::Unknown(_) => return None,
        };
        let shim = case.shim.process().map_or(0, |shim| shim.id.pid);
        let other = processes.iter().find(|process| {
            // Deeper pid namespaces have their first process below one of the container's own.
            process.first_of_namespace
                && process.id.pid != own
                && process.id.start_time != 0
                && process.ppid != shim
                && !members.contains(&process.ppid)
        })?;
        Some(self.about(
            case,
            Code::DuplicateWorkload,
            Hold::Twice,
            vec![
                self.process("a second init", other.id),
                evidence("kernel", format!("it is in cgroup {}", cgroup.path)),
                evidence(
                    "kernel",
                    format!("its parent {} is not the task's shim", other.ppid),
                ),
            ],
            "find out which one is meant to run, and end the other by hand",
        ))
    }

    /// Two living inits for one container of one pod.
    fn duplicates(&self, cases: &Cases<'_>) -> Vec<Suspicion> {
        let mut by_name: BTreeMap<(Option<usize>, &str, &str), Vec<&Case<'_>>> = BTreeMap::new();
        for case in &cases.cases {
            let Some(pod) = &case.pod else { continue };
            // The sandbox has no container name, and its group is its own id.
            if case.init.alive().is_some() && !pod.container.is_empty() {
                by_name
                    .entry((case.instance, &case.group, &pod.container))
                    .or_default()
                    .push(case);
            }
        }
        let mut found = Vec::new();
        for ((_, group, container), same) in by_name {
            let [first, .., last] = same.as_slice() else {
                continue;
            };
            let facts = same
                .iter()
                .filter_map(|case| {
                    let init = case.init.alive()?;
                    Some(self.process(&format!("{}: init", case.name.1), init))
                })
                .chain([evidence(
                    "bundle",
                    format!("all are container {container} of sandbox {group}"),
                )])
                .collect();
            // The newest is the one that the kubelet means; the finding names the oldest.
            let oldest = if self.started(first) <= self.started(last) {
                first
            } else {
                last
            };
            found.push(self.about(
                oldest,
                Code::DuplicateWorkload,
                Hold::Twice,
                facts,
                "find out which one is meant to run, and end the other by hand",
            ));
        }
        found
    }

    fn started(&self, case: &Case<'_>) -> u64 {
        case.init.alive().map_or(0, |id| id.start_time)
    }

    fn socket_missing(&self, case: &Case<'_>) -> Option<Suspicion> {
        let shim = case.shim.process()?;
        if case.kind() == Some(Kind::Foreign) {
            return None;
        }
        if let Some(other) = self.wrong_address(case, shim) {
            return Some(other);
        }
        let address = case.address.as_deref()?;
        if address.starts_with('@') || !shim.listens.iter().any(|a| a == address) {
            return None;
        }
        let answer = case.answer?;
        let gone = match answer.connection {
            Connection::NoFile => "there is no such file",
            Connection::Refused => "another file stands in its place",
            Connection::Made | Connection::QueueFull | Connection::Failed(_) => return None,
        };
        Some(self.about(
            case,
            Code::SocketMissing,
            Hold::Twice,
            vec![
                self.process("shim", shim.id),
                evidence("kernel", format!("it listens on {address}")),
                evidence("kernel", format!("{address}: {gone}")),
                self.said_by_containerd(case),
            ],
            "do not restart containerd: it cannot reach the shim, and its start ends the workload",
        ))
    }

    /// The shim listens, but not where containerd will look at its next start.
    fn wrong_address(&self, case: &Case<'_>, shim: &Shim) -> Option<Suspicion> {
        let bundle = case.bundle?;
        case.init.alive()?;
        let listens = shim.listens.first()?;
        let says = match &case.written {
            Some(written) if shim.listens.contains(written) => return None,
            Some(written) => format!("{} names {written}", bundle.path.display()),
            // What cannot be read is a gap, and containerd may read it well.
            None if matches!(bundle.bootstrap, Seen::Unknown(_))
                || matches!(bundle.address, Seen::Unknown(_)) =>
            {
                return None;
            }
            None => format!("{} names no address", bundle.path.display()),
        };
        Some(self.about(
            case,
            Code::SocketMissing,
            Hold::Twice,
            vec![
                self.process("shim", shim.id),
                evidence("kernel", format!("it listens on {listens}")),
                evidence("bundle", says),
                self.said_by_containerd(case),
            ],
            "do not restart containerd: it looks for the shim elsewhere, and its start ends the workload",
        ))
    }

    fn task_unknown(&self, case: &Case<'_>) -> Option<Suspicion> {
        let init = case.init.alive()?;
        let shim = case.shim.process()?;
        if case.containerd != Known::No || case.kind() == Some(Kind::Foreign) {
            return None;
        }
        // A task being created is not listed yet. One that was started is.
        match case.state().map(|state| state.phase) {
            Some(Phase::Running | Phase::Paused | Phase::Pausing) => {}
            Some(Phase::Created | Phase::Stopped | Phase::Unknown) | None => {
                if self.age_of(init) < self.settings.settle {
                    return None;
                }
            }
        }
        // A shim that answers nothing is another finding, and its task is known to nobody then.
        if case
            .answer
            .is_some_and(|answer| Self::unanswered(answer).is_some())
        {
            return None;
        }
        Some(self.about(
            case,
            Code::TaskUnknownToContainerd,
            Hold::Twice,
            vec![
                self.process("init", init),
                self.process("shim", shim.id),
                match case.bundle {
                    Some(bundle) => evidence("bundle", bundle.path.display().to_string()),
                    None => evidence("bundle", "there is none"),
                },
                self.said_by_containerd(case),
            ],
            "nobody can stop it through containerd; end it by hand if it is not wanted",
        ))
    }

    fn leaked_shim(&self, case: &Case<'_>) -> Option<Suspicion> {
        let shim = case.shim.process()?;
        let none_lives = matches!(case.init, Init::None | Init::Dead(..));
        if !none_lives || case.containerd != Known::No || case.kind() == Some(Kind::Foreign) {
            return None;
        }
        let answer = case.answer?;
        match answer.states.get(&case.name.1) {
            // It still holds a task that containerd does not know: no step of a normal delete.
            Some(Reply::Said(_)) => {}
            Some(Reply::Error(..) | Reply::NotAsked) | None => {
                if self.age_of(shim.id) < self.settings.settle {
                    return None;
                }
            }
            Some(Reply::Silent | Reply::Garbage(_)) => return None,
        }
        self.leaked(shim, Some(case), &case.name)
    }

    /// A shim that serves no task that anything names.
    fn idle_shim(&self, shim: &Shim) -> Option<Suspicion> {
        let name = (shim.namespace.clone(), shim.task.clone());
        let at = self
            .look
            .instances
            .iter()
            .position(|i| i.is(&shim.address))?;
        let tasks = self.look.instances.get(at)?.api.up()?.tasks.as_ref()?;
        let young = self.age_of(shim.id) < self.settings.settle;
        if tasks.contains_key(&name) || young || kind(&shim.name, false) == Kind::Foreign {
            return None;
        }
        let mut suspicion = self.leaked(shim, None, &name)?;
        suspicion.instance = Some(at);
        Some(suspicion)
    }

    fn leaked(&self, shim: &Shim, case: Option<&Case<'_>>, name: &TaskName) -> Option<Suspicion> {
        // A pod's shim is leaked only when none of its tasks lives; and a living child of it, an
        // exec or runc at work, is a living process too.
        let table = self.look.processes.present()?;
        let child = table
            .values()
            .any(|stat| stat.ppid == shim.id.pid && stat.alive());
        let serves = self.look.runc.iter().filter_map(|entry| {
            let init = entry.state.present()?.init?;
            table
                .get(&init.pid)
                .filter(|stat| stat.id == init && stat.alive())
        });
        let group_lives = serves.into_iter().any(|stat| stat.ppid == shim.id.pid);
        if child || group_lives {
            return None;
        }
        let mut facts = vec![
            self.process("shim", shim.id),
            evidence("kernel", "it has no living process"),
        ];
        facts.push(match case {
            Some(case) => self.said_by_containerd(case),
            None => evidence(
                "containerd",
                format!(
                    "at {} is up and does not list {}/{}",
                    shim.address, name.0, name.1
                ),
            ),
        });
        let subject = match case {
            Some(case) => task_subject(&case.name),
            None => Subject::Shim { shim: shim.id.pid },
        };
        let action = "end the shim: nothing depends on it";
        let mut suspicion = self.suspicion(Code::LeakedShim, subject, Hold::Twice, facts, action);
        suspicion.address = case.and_then(|case| case.address.clone());
        suspicion.instance = case.and_then(|case| case.instance);
        Some(suspicion)
    }

    fn stuck_task(&self, case: &Case<'_>) -> Option<Suspicion> {
        if case.kind() == Some(Kind::Foreign) {
            return None;
        }
        let state = case.state()?;
        let shim_says = evidence("shim", format!("the task is {}", state.phase.word()));
        let (facts, hold, action) = match (state.phase, &case.init, case.containerd) {
            (Phase::Running, Init::Dead(_, why), Known::Yes(task))
                if task.phase == Phase::Running =>
            {
                (
                    vec![evidence("kernel", format!("the init ended: {why}"))],
                    Hold::Settle,
                    "publish the exit, if it was observed",
                )
            }
            (Phase::Stopped, Init::Dead(_, why), Known::Yes(task))
                if task.phase == Phase::Running =>
            {
                (
                    vec![evidence("kernel", format!("the init ended: {why}"))],
                    Hold::Twice,
                    "publish the exit that the shim observed",
                )
            }
            (Phase::Stopped, Init::Dead(..), Known::Yes(task)) if task.phase == Phase::Stopped => {
                let left = case.cgroup?.processes.present()?;
                if left.is_empty() {
                    return None;
                }
                let pids: Vec<String> = left
                    .iter()
                    .take(10)
                    .map(|process| process.id.pid.to_string())
                    .collect();
                (
                    vec![evidence(
                        "kernel",
                        format!(
                            "its cgroup still holds {} processes: {}",
                            left.len(),
                            pids.join(" ")
                        ),
                    )],
                    Hold::Twice,
                    "delete the task; what is left in its cgroup is named here",
                )
            }
            (Phase::Created, Init::Alive(init), Known::Yes(_) | Known::CannotSay)
                if self.age_of(*init) >= CREATED_TOO_LONG =>
            {
                (
                    vec![self.process("init", *init)],
                    Hold::Once,
                    "start or delete the task: its client went away",
                )
            }
            (Phase::Paused | Phase::Pausing, Init::Dead(_, why), _) => (
                vec![evidence("kernel", format!("the init ended: {why}"))],
                Hold::Twice,
                "resume the task: its exit waits for that",
            ),
            (
                Phase::Running
                | Phase::Stopped
                | Phase::Created
                | Phase::Paused
                | Phase::Pausing
                | Phase::Unknown,
                Init::None | Init::Alive(_) | Init::Dead(..) | Init::Unknown(_),
                Known::Yes(_) | Known::No | Known::CannotSay,
            ) => return None,
        };
        let mut all = vec![shim_says];
        all.extend(facts);
        all.push(self.said_by_containerd(case));
        Some(self.about(case, Code::StuckTask, hold, all, action))
    }

    fn exit_unreported(&self, case: &Case<'_>) -> Option<Suspicion> {
        let state = case.state()?;
        let down = matches!(self.instance(case)?.api, Api::Down);
        let ended = matches!(case.init, Init::Dead(..));
        // Ours names a pid to containerd until the task is deleted, so that no release takes it
        // for leaked, and keeps its events until they are acknowledged: nothing is lost.
        let keeps = matches!(case.kind(), Some(Kind::Ours | Kind::Foreign));
        if state.phase != Phase::Stopped || !down || !ended || keeps {
            return None;
        }
        let at = state.exited_at.map_or_else(String::new, |seconds| {
            format!(" at {}", Timestamp { seconds, nanos: 0 })
        });
        Some(self.about(
            case,
            Code::ExitUnreported,
            Hold::Twice,
            vec![
                evidence(
                    "shim",
                    format!("the task exited with {}{at}", state.exit_status),
                ),
                self.said_by_containerd(case),
            ],
            "note its status now: containerd 1.7 and later forget it at their start",
        ))
    }

    fn outdated(&self, shim: &Shim, cases: &Cases<'_>) -> Option<Suspicion> {
        let why = outdated(shim)?;
        let case = served(cases, shim);
        let kind = case
            .and_then(Case::kind)
            .unwrap_or_else(|| kind(&shim.name, false));
        let action = match kind {
            Kind::Ours => "upgrade it in place",
            Kind::Stock => "restart the container when convenient: only that renews a stock shim",
            Kind::Foreign => return None,
        };
        let facts = vec![evidence("kernel", format!("shim {} {why}", shim.id.pid))];
        Some(self.of_shim(shim, case, Code::OutdatedShim, facts, action))
    }

    fn bloated(&self, shim: &Shim, cases: &Cases<'_>) -> Option<Suspicion> {
        let mut facts = Vec::new();
        if let Some(memory) = shim.memory.present()
            && memory.private_kib > BLOATED_PRIVATE_KIB
        {
            facts.push(evidence(
                "kernel",
                format!("{} KiB of private memory", memory.private_kib),
            ));
        }
        if shim.threads > BLOATED_THREADS {
            facts.push(evidence("kernel", format!("{} threads", shim.threads)));
        }
        if let Some(open) = shim.descriptors
            && open > BLOATED_DESCRIPTORS
        {
            facts.push(evidence("kernel", format!("{open} open descriptors")));
        }
        let case = served(cases, shim);
        let kind = case
            .and_then(Case::kind)
            .unwrap_or_else(|| kind(&shim.name, false));
        if facts.is_empty() || kind == Kind::Foreign {
            return None;
        }
        facts.insert(0, self.process("shim", shim.id));
        let action = match kind {
            Kind::Ours => "upgrade it in place",
            Kind::Stock | Kind::Foreign => {
                "look for execs that never end; only a restart of the container renews it"
            }
        };
        Some(self.of_shim(shim, case, Code::BloatedShim, facts, action))
    }

    fn of_shim(
        &self,
        shim: &Shim,
        case: Option<&Case<'_>>,
        code: Code,
        facts: Vec<Evidence>,
        action: &str,
    ) -> Suspicion {
        match case {
            Some(case) => self.about(case, code, Hold::Once, facts, action),
            None => Suspicion {
                instance: self.look.instances.iter().position(|i| i.is(&shim.address)),
                ..self.suspicion(
                    code,
                    Subject::Shim { shim: shim.id.pid },
                    Hold::Once,
                    facts,
                    action,
                )
            },
        }
    }

    fn stale_bundle(&self, case: &Case<'_>) -> Option<Suspicion> {
        let bundle = case.bundle?;
        let gone = match &case.init {
            Init::None => "nothing names an init".to_owned(),
            Init::Dead(_, why) => format!("the init ended: {why}"),
            Init::Alive(_) | Init::Unknown(_) => return None,
        };
        let listed = matches!(case.containerd, Known::Yes(_));
        let busy = self.look.busy_verbs.contains(&case.name);
        if !matches!(case.shim, ShimOf::None) || case.answered() || listed || busy {
            return None;
        }
        let mut facts = vec![
            evidence("bundle", bundle.path.display().to_string()),
            evidence("kernel", gone),
            evidence(
                "kernel",
                "no shim process serves it and nobody listens on its socket",
            ),
        ];
        facts.push(self.said_by_containerd(case));
        let action = if bundle.empty {
            "remove it: an empty bundle makes a new task of this id fail"
        } else {
            "remove it, once nothing uses it"
        };
        Some(self.about(case, Code::StaleBundle, Hold::Twice, facts, action))
    }

    fn stale_sockets(&self, cases: &Cases<'_>) -> Vec<Suspicion> {
        // What an orphaned task's socket is needed for, adoption says.
        let mut owners: BTreeMap<&str, &Case<'_>> = BTreeMap::new();
        for case in &cases.cases {
            if let Some(address) = &case.address {
                let lives = !matches!(case.init, Init::Dead(..) | Init::None);
                if lives || !owners.contains_key(address.as_str()) {
                    owners.insert(address, case);
                }
            }
        }
        let records = self.owners_by_record();
        let Some(listeners) = self.look.listeners.present() else {
            return Vec::new();
        };
        let mut found = Vec::new();
        for file in &self.look.sockets {
            let address = file.path.display().to_string();
            let answered = self
                .look
                .answers
                .get(&address)
                .is_some_and(|answer| answer.connection != Connection::Refused);
            if !file.is_socket || listeners.contains_key(&address) || answered {
                continue;
            }
            let owner = match owners.get(address.as_str()) {
                Some(case) if !matches!(case.init, Init::Dead(..) | Init::None) => continue,
                Some(case) => Some((case.instance, case.name.clone())),
                None => records
                    .get(&address)
                    .map(|(at, name)| (Some(*at), name.clone())),
            };
            // A shim being started has made its socket and does not listen yet.
            let starting = owner
                .as_ref()
                .is_some_and(|(_, n)| self.look.busy_verbs.contains(n));
            if starting {
                continue;
            }
            let (instance, fact, action) = match owner {
                Some((instance, name)) => (
                    instance,
                    evidence(
                        "recoverd",
                        format!("its name is that of {}/{}", name.0, name.1),
                    ),
                    "remove it",
                ),
                None if file
                    .changed_at
                    .is_some_and(|at| self.age(at) >= self.settings.min_age) =>
                {
                    (
                        None,
                        evidence(
                            "recoverd",
                            "no bundle or container that is known gives this name",
                        ),
                        "remove it by hand if no containerd that recoverd does not see owns it",
                    )
                }
                None => continue,
            };
            let facts = vec![
                evidence("kernel", format!("nobody listens on {address}")),
                fact,
            ];
            let subject = path_subject(&file.path);
            found.push(Suspicion {
                instance,
                ..self.suspicion(Code::StaleSocket, subject, Hold::Twice, facts, action)
            });
        }
        found
    }

    /// Socket names of every container that some containerd has a record of.
    fn owners_by_record(&self) -> BTreeMap<Address, (usize, TaskName)> {
        let Some(dir) = self
            .look
            .sockets
            .first()
            .and_then(|file| file.path.parent())
        else {
            return BTreeMap::new();
        };
        let mut found = BTreeMap::new();
        for (at, instance) in self.look.instances.iter().enumerate() {
            let containers = instance.api.up().map(|api| &api.containers);
            for (name, container) in containers.into_iter().flatten() {
                let group = container.group.as_deref().unwrap_or(&name.1);
                for spelling in instance.spellings() {
                    let address = paths::socket(dir, spelling, &name.0, group);
                    let address = address.to_string_lossy().into_owned();
                    found.insert(address, (at, name.clone()));
                }
            }
        }
        found
    }

    fn records(&self, cases: &Cases<'_>) -> Vec<Suspicion> {
        let mut found = Vec::new();
        for file in &self.look.records {
            let subject = path_subject(&file.path);
            let case = cases
                .cases
                .iter()
                .find(|case| case.address.as_ref() == Some(&file.socket));
            let suspicion = match &file.record {
                Seen::Absent => continue,
                Seen::Unknown(why) => self.suspicion(
                    Code::UnreadableRecord,
                    subject,
                    Hold::Twice,
                    vec![evidence("record", format!("{} {why}", file.path.display()))],
                    "set it aside: its tasks can be adopted from runc's state",
                ),
                Seen::Present(record) => {
                    let other_boot = self
                        .look
                        .host
                        .boot_id
                        .as_ref()
                        .is_some_and(|id| *id != record.boot_id);
                    let lives = self
                        .look
                        .shims
                        .iter()
                        .any(|s| s.listens.contains(&file.socket));
                    let socket = self
                        .look
                        .sockets
                        .iter()
                        .any(|s| s.path.to_string_lossy() == file.socket.as_str());
                    let init_lives =
                        case.is_some_and(|case| !matches!(case.init, Init::Dead(..) | Init::None));
                    let why = if other_boot {
                        "it is from another boot of this machine"
                    } else if !lives && !socket && !init_lives {
                        "neither its socket nor a process of it is there"
                    } else {
                        continue;
                    };
                    self.suspicion(
                        Code::StaleRecord,
                        subject,
                        Hold::Twice,
                        vec![evidence("record", why)],
                        "remove it",
                    )
                }
            };
            found.push(Suspicion {
                instance: case.and_then(|case| case.instance),
                ..suspicion
            });
        }
        found
    }

    /// Names of tasks that live, may live, or are served by somebody.
    fn in_use<'c>(&self, cases: &'c Cases<'_>) -> BTreeSet<&'c TaskName> {
        let used = |case: &&Case<'_>| {
            let gone = matches!(case.init, Init::Dead(..) | Init::None);
            let listed = matches!(case.containerd, Known::Yes(_));
            !gone || listed || !matches!(case.shim, ShimOf::None)
        };
        cases
            .cases
            .iter()
            .filter(used)
            .map(|case| &case.name)
            .collect()
    }

    fn mounts(&self, cases: &Cases<'_>) -> Vec<Suspicion> {
        let Some(mounts) = self.look.mounts.present() else {
            return Vec::new();
        };
        let used = self.in_use(cases);
        let mut found = Vec::new();
        for mount in mounts {
            let Some((at, name)) = self.bundle_of(&mount.point) else {
                continue;
            };
            let age = self.look.mount_ages.get(&mount.point).copied();
            if used.contains(&name) || self.look.busy_verbs.contains(&name) || !self.old(age) {
                continue;
            }
            found.push(Suspicion {
                instance: Some(at),
                ..self.suspicion(
                    Code::LeakedMount,
                    path_subject(&mount.point),
                    Hold::Twice,
                    vec![
                        evidence("kernel", format!("{} is mounted there", mount.kind)),
                        evidence("recoverd", format!("task {}/{} is gone", name.0, name.1)),
                    ],
                    "unmount it",
                )
            });
        }
        found
    }

    /// The task in whose bundle a path is.
    fn bundle_of(&self, path: &Path) -> Option<(usize, TaskName)> {
        self.look
            .instances
            .iter()
            .enumerate()
            .find_map(|(at, instance)| {
                let top: PathBuf = instance.state.as_ref()?.join(paths::TASK_PLUGIN);
                let mut parts = path.strip_prefix(&top).ok()?.iter();
                let namespace = parts.next()?.to_str()?.to_owned();
                let id = parts.next()?.to_str()?.to_owned();
                Some((at, (namespace, id)))
            })
    }

    fn cgroups(&self, cases: &Cases<'_>) -> Vec<Suspicion> {
        let used = self.in_use(cases);
        let mut found = Vec::new();
        for cgroup in &self.look.cgroups {
            let Some(name) = &cgroup.name else { continue };
            let Some(processes) = cgroup.processes.present() else {
                continue;
            };
            let busy = self.look.busy_verbs.contains(name);
            if used.contains(name) || !processes.is_empty() || busy || !self.old(cgroup.changed_at)
            {
                // Processes without a task are told by `second_init` where they are an init.
                continue;
            }
            let subject = match cgroup.folders.as_slice() {
                [only] => path_subject(only),
                _ => Subject::Path {
                    path: cgroup.path.clone(),
                },
            };
            let in_folders: Vec<String> = cgroup
                .folders
                .iter()
                .map(|folder| folder.display().to_string())
                .collect();
            found.push(Suspicion {
                instance: self.owner(cases, name),
                ..self.suspicion(
                    Code::LeakedCgroup,
                    subject,
                    Hold::Twice,
                    vec![
                        evidence(
                            "kernel",
                            format!("no process is in {}", in_folders.join(" ")),
                        ),
                        evidence("recoverd", format!("task {}/{} is gone", name.0, name.1)),
                    ],
                    "remove it",
                )
            });
        }
        found
    }

    /// Whose a task is or was: its case's containerd, or the one that has its record.
    fn owner(&self, cases: &Cases<'_>, name: &TaskName) -> Option<usize> {
        let of_case = cases.cases.iter().find(|case| case.name == *name);
        of_case.and_then(|case| case.instance).or_else(|| {
            self.look.instances.iter().position(|instance| {
                instance
                    .api
                    .up()
                    .is_some_and(|api| api.containers.contains_key(name))
            })
        })
    }

    fn fifos(&self, cases: &Cases<'_>) -> Vec<Suspicion> {
        let used: BTreeSet<&str> = self
            .in_use(cases)
            .into_iter()
            .map(|name| name.1.as_str())
            .collect();
        let mut found = Vec::new();
        for folder in &self.look.fifos {
            let taken = folder.ids.iter().any(|id| used.contains(id.as_str()));
            let free = folder.users.present().is_some_and(Vec::is_empty);
            if taken || !free || !self.old(folder.changed_at) || self.fifo_of_exec(cases, folder) {
                continue;
            }
            let files: Vec<String> = folder
                .ids
                .iter()
                .map(|id| format!("{}/{id}-std*", folder.path.display()))
                .collect();
            let owner = folder.ids.iter().find_map(|id| {
                self.look.instances.iter().position(|instance| {
                    let known = |api: &crate::facts::ApiFacts| {
                        api.containers.keys().any(|name| name.1 == *id)
                    };
                    instance.api.up().is_some_and(known)
                })
            });
            found.push(Suspicion {
                instance: folder.instance.or(owner),
                ..self.suspicion(
                    Code::LeakedFifo,
                    path_subject(&folder.path),
                    Hold::Twice,
                    vec![
                        evidence("kernel", format!("nobody has {} open", files.join(", "))),
                        evidence("recoverd", "no task of that name is there"),
                    ],
                    "remove them",
                )
            });
        }
        found
    }

    /// An exec's fifos bear the exec's id, which no list of tasks has: they are in use while their
    /// shim has them open, and `users` says that. So here only: an exec that is known to live.
    fn fifo_of_exec(&self, _cases: &Cases<'_>, folder: &crate::facts::FifoFolder) -> bool {
        self.look
            .execs
            .iter()
            .any(|exec| exec.fifos.iter().any(|fifo| fifo.starts_with(&folder.path)))
    }

    fn runc_states(&self, cases: &Cases<'_>) -> Vec<Suspicion> {
        let mut found = Vec::new();
        for case in &cases.cases {
            let Some(entry) = case.runc else { continue };
            let gone = match &case.init {
                Init::Dead(_, why) => why,
                Init::None | Init::Alive(_) | Init::Unknown(_) => continue,
            };
            let served = !matches!(case.shim, ShimOf::None);
            let listed = matches!(case.containerd, Known::Yes(_));
            let busy = self.look.busy_verbs.contains(&case.name);
            // With its bundle it is part of a stale bundle.
            if case.bundle.is_some() || served || listed || busy || !self.old(entry.changed_at) {
                continue;
            }
            found.push(Suspicion {
                instance: case.instance,
                ..self.suspicion(
                    Code::LeakedRuncState,
                    path_subject(&entry.path),
                    Hold::Twice,
                    vec![
                        evidence("runc", format!("{} is there", entry.path.display())),
                        evidence("kernel", format!("the init ended: {gone}")),
                        evidence("bundle", "there is none"),
                    ],
                    "remove it: a new task of this id fails while it is there",
                )
            });
        }
        found
    }

    fn full(&self) -> Vec<Suspicion> {
        let nearly = |system: &&crate::facts::Filesystem| {
            system.tmpfs && system.used_percent() >= self.settings.run_full
        };
        self.look
            .filesystems
            .iter()
            .filter(nearly)
            .map(|system| {
                let mut facts = vec![evidence(
                    "kernel",
                    format!(
                        "{} of {} KiB and {} of {} inodes are free",
                        system.bytes.1 / 1024,
                        system.bytes.0 / 1024,
                        system.inodes.1,
                        system.inodes.0
                    ),
                )];
                facts.extend(system.eaters.iter().map(|(path, size)| {
                    evidence(
                        "kernel",
                        format!("{} holds {} KiB", path.display(), size / 1024),
                    )
                }));
                self.suspicion(
                    Code::RunNearlyFull,
                    path_subject(&system.path),
                    Hold::Once,
                    facts,
                    "make room: no task can be created, and none recorded, when it is full",
                )
            })
            .collect()
    }

    fn execs(&self, cases: &Cases<'_>) -> Vec<Suspicion> {
        let mut found = Vec::new();
        for exec in &self.look.execs {
            let alone = exec.fifo_users.present().is_some_and(Vec::is_empty);
            let old = self.age_of(exec.id) >= self.settings.min_age;
            if exec.fifos.is_empty() || !alone || !old {
                continue;
            }
            let Some(case) = cases.cases.iter().find(|case| case.name == exec.name) else {
                continue;
            };
            let id = exec.exec_id.as_deref().unwrap_or("unknown");
            let fifos: Vec<String> = exec.fifos.iter().map(|f| f.display().to_string()).collect();
            found.push(self.about(
                case,
                Code::LeakedExec,
                Hold::Twice,
                vec![
                    self.process(&format!("exec {id}: process"), exec.id),
                    evidence(
                        "kernel",
                        format!("only shim {} has {} open", exec.shim, fifos.join(", ")),
                    ),
                ],
                "end the exec if it is not wanted: its client went away",
            ));
        }
        found
    }
}

/// What the joined facts leave unknown, beside what the look itself could not see.
pub fn gaps(look: &Look, cases: &Cases<'_>) -> Vec<Gap> {
    let mut found = look.gaps.clone();
    // Without the right to look, one reason says it all.
    if !look.host.root {
        return found;
    }
    for case in &cases.cases {
        let instance = case.instance.and_then(|at| look.instances.get(at));
        let mut gap = |what: String, why: &str| {
            found.push(Gap {
                instance: instance.map(|instance| instance.address.clone()),
                ..Gap::new(what, why)
            });
        };
        if let Some(bundle) = case.bundle {
            for (file, why) in bundle.unreadable() {
                gap(bundle.path.join(file).display().to_string(), why);
            }
        }
        if let Some(entry) = case.runc
            && let Seen::Unknown(why) = &entry.state
        {
            gap(entry.path.join("state.json").display().to_string(), why);
        }
        if let Init::Unknown(why) = &case.init {
            gap(format!("init of {}/{}", case.name.0, case.name.1), why);
        }
        if let (Some(address), Some(answer)) = (&case.address, case.answer)
            && let Connection::Failed(why) = &answer.connection
        {
            gap(address.clone(), why);
        }
    }
    for instance in &look.instances {
        if instance.api.up().is_some_and(|api| api.tasks.is_none()) {
            let what = format!("tasks of containerd at {}", instance.address);
            found.push(Gap::of(instance, what, "it did not list them in time"));
        }
    }
    found.sort();
    found.dedup();
    found
}

/// Why a shim's executable is not the installed one, if it is not.
pub fn outdated(shim: &Shim) -> Option<String> {
    let exe = shim.exe.present()?;
    match &shim.installed {
        Seen::Present(installed) if *installed == exe.file => None,
        Seen::Present(_) => Some(format!(
            "runs another file than the one that is {} now",
            exe.path.display()
        )),
        Seen::Absent => Some(format!("runs {}, which was deleted", exe.path.display())),
        Seen::Unknown(_) if exe.deleted => {
            Some(format!("runs {}, which was deleted", exe.path.display()))
        }
        Seen::Unknown(_) => None,
    }
}

fn served<'c, 'a>(cases: &'c Cases<'a>, shim: &Shim) -> Option<&'c Case<'a>> {
    // The task that the shim was started for, if it is still there.
    let mut all = cases
        .cases
        .iter()
        .filter(|c| c.shim.process().is_some_and(|s| s.id == shim.id));
    let first = all.clone().find(|case| case.name.1 == shim.task);
    first.or_else(|| all.next())
}

//! What is wrong with a shim process: it does not answer, cannot be reached, serves nothing, is of
//! another version than the installed one, or costs too much.

use recoverd_common::seen::Seen;

use crate::{
    adopt::decide::{Stillness, stillness, unreachable},
    correlate::{Case, Cases, Init, Kind, Known, ShimOf, kind},
    facts::{Answer, Api, Connection, Reply, Shim, TaskName},
    findings::{Code, Evidence, Subject},
    permit::Word,
};

use super::{Context, Hold, Suspicion, action, evidence, task_subject};

/// A shim that uses more than this is bloated. Stock shims measured: 5 MiB private, 12 threads,
/// 32 descriptors with one container; several more of each for every exec under way.
const BLOATED_PRIVATE_KIB: u64 = 64 << 10;
const BLOATED_THREADS: u32 = 128;
const BLOATED_DESCRIPTORS: usize = 1024;

impl Context<'_> {
    pub(super) fn unresponsive(&self, case: &Case<'_>) -> Option<Suspicion> {
        let answer = case.answer?;
        let missed = unanswered(answer)?;
        // Not asked in time for want of descriptors or budget is a gap, not a fault of the shim.
        let address = case.address.as_deref().unwrap_or_default();
        let mut facts = vec![evidence("shim", format!("at {address} {missed}"))];
        match &case.shim {
            ShimOf::Lives(shim) => facts.push(state_of(shim)),
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
            return Some(Suspicion::about(
                case,
                Code::Foreign,
                hold,
                facts,
                "look at it with its own runtime's tools; pre-start.foreign = true lets \
                 recoverd pre-start end one that hangs",
            ));
        }
        if let Some(init) = case.init.alive() {
            facts.push(self.process("init", init));
        }
        facts.push(self.said_by_containerd(case));
        Some(Suspicion::about(
            case,
            Code::UnresponsiveShim,
            hold,
            facts,
            self.replace(case),
        ))
    }

    pub(super) fn socket_missing(&self, case: &Case<'_>) -> Option<Suspicion> {
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
        Some(Suspicion::about(
            case,
            Code::SocketMissing,
            Hold::Twice,
            vec![
                self.process("shim", shim.id),
                evidence("kernel", format!("it listens on {address}")),
                evidence("kernel", format!("{address}: {gone}")),
                self.said_by_containerd(case),
            ],
            self.replace(case),
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
        Some(Suspicion::about(
            case,
            Code::SocketMissing,
            Hold::Twice,
            vec![
                self.process("shim", shim.id),
                evidence("kernel", format!("it listens on {listens}")),
                evidence("bundle", says),
                self.said_by_containerd(case),
            ],
            "recoverd pre-start between containerd's stop and start, as its hook does: it writes the \
             right address; else containerd's start ends the workload",
        ))
    }

    /// What to do about a shim that containerd cannot talk to, and whose task lives.
    fn replace(&self, case: &Case<'_>) -> String {
        const ENDS: &str = "containerd's start ends the workload";
        let Some(shim) = case.shim.process() else {
            return format!("do not restart containerd while it hangs: {ENDS}");
        };
        let busy = match stillness(shim) {
            Stillness::Stopped | Stillness::Idle => false,
            Stillness::Busy => !unreachable(case),
            Stillness::Device => true,
        };
        if busy {
            return format!("wait until it answers, and do not restart containerd before: {ENDS}");
        }
        let replace = action::repair_task(&case.name, Some(Word::Kill));
        let down = self
            .instance(case)
            .is_some_and(|i| matches!(i.api, Api::Down) && i.daemon.is_none());
        match down {
            true => format!("{replace}, before containerd starts: {ENDS}"),
            false => format!("stop containerd, {replace}, start it; without that, {ENDS}"),
        }
    }

    pub(super) fn leaked_shim(&self, case: &Case<'_>, cases: &Cases<'_>) -> Option<Suspicion> {
        let shim = case.shim.process()?;
        let none_lives = matches!(case.init, Init::None | Init::Dead(..));
        if !none_lives || case.containerd != Known::No || case.kind() == Some(Kind::Foreign) {
            return None;
        }
        if !self.owns(case, shim) {
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
        // A pod's shim is leaked only when all its tasks are gone. An adopted init is no child of
        // its shim, so the cases count, and not only the process table.
        let depends = |other: &Case<'_>| {
            let gone = matches!(other.init, Init::None | Init::Dead(..));
            !gone || other.containerd != Known::No
        };
        let mut served = cases.cases.iter().filter(|other| serves(other, shim));
        if served.any(depends) {
            return None;
        }
        self.leaked(shim, Some(case), &case.name)
    }

    /// The shim's command line names the containerd of the case: no other one's word counts.
    pub(super) fn owns(&self, case: &Case<'_>, shim: &Shim) -> bool {
        self.instance(case).is_some_and(|i| i.is(&shim.address))
    }

    /// A shim that serves no task that anything names.
    pub(super) fn idle_shim(&self, shim: &Shim) -> Option<Suspicion> {
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
        // A living child, an exec or runc at work, is a living process too.
        let table = self.look.processes.present()?;
        let mut processes = table.values();
        if processes.any(|stat| stat.ppid == shim.id.pid && stat.alive()) {
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
        let end = match case {
            Some(case) => action::repair_task(&case.name, Some(Word::Kill)),
            None => action::repair_all(Code::LeakedShim, Some(Word::Kill)),
        };
        let remedy = format!("{end}: nothing depends on it");
        let mut suspicion = Suspicion::new(Code::LeakedShim, subject, Hold::Twice, facts, remedy);
        suspicion.address = case.and_then(|case| case.address.clone());
        suspicion.instance = case.and_then(|case| case.instance);
        Some(suspicion)
    }

    pub(super) fn outdated(&self, shim: &Shim, cases: &Cases<'_>) -> Option<Suspicion> {
        let why = outdated(shim)?;
        let case = served(cases, shim);
        let kind = case
            .and_then(Case::kind)
            .unwrap_or_else(|| kind(&shim.name, false));
        let action = match kind {
            Kind::Ours => action::upgrade(case.map(|case| &case.name)),
            Kind::Stock => {
                "restart the container when convenient: only that renews a stock shim".to_owned()
            }
            Kind::Foreign => return None,
        };
        let facts = vec![evidence("kernel", format!("shim {} {why}", shim.id.pid))];
        Some(self.of_shim(shim, case, Code::OutdatedShim, facts, &action))
    }

    pub(super) fn bloated(&self, shim: &Shim, cases: &Cases<'_>) -> Option<Suspicion> {
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
            Kind::Ours => action::upgrade(case.map(|case| &case.name)),
            Kind::Stock | Kind::Foreign => {
                "look for execs that never end; only a restart of the container renews it"
                    .to_owned()
            }
        };
        Some(self.of_shim(shim, case, Code::BloatedShim, facts, &action))
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
            Some(case) => Suspicion::about(case, code, Hold::Once, facts, action),
            None => Suspicion {
                instance: self.look.instances.iter().position(|i| i.is(&shim.address)),
                ..Suspicion::new(
                    code,
                    Subject::Shim { shim: shim.id.pid },
                    Hold::Once,
                    facts,
                    action,
                )
            },
        }
    }
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

/// What its shim failed to answer, if it did.
pub(super) fn unanswered(answer: &Answer) -> Option<String> {
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

fn state_of(shim: &Shim) -> Evidence {
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

fn served<'c, 'a>(cases: &'c Cases<'a>, shim: &Shim) -> Option<&'c Case<'a>> {
    // The task that the shim was started for, if it is still there.
    let mut all = cases.cases.iter().filter(|case| serves(case, shim));
    let first = all.clone().find(|case| case.name.1 == shim.task);
    first.or_else(|| all.next())
}

fn serves(case: &Case<'_>, shim: &Shim) -> bool {
    case.shim.process().is_some_and(|found| found.id == shim.id)
}

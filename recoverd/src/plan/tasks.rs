//! Steps for tasks and their shims: adopt, replace, end, publish.

use std::path::Path;

use recoverd_common::{proc::ProcessId, record::Exit, timestamp::Timestamp};

use super::{Act, Answer, Exited, Planner, Promise, Requirement, by_hand, listed_as_running};
use crate::{
    adopt::Order,
    classify::Suspicion,
    correlate::{Case, Init, Kind, Known},
    facts::{Api, Phase, Shim, TaskName},
    findings::{Code, Subject},
    permit::Word,
};

/// So many shims may be replaced in one run, or a quarter of them if that is more: when many do not
/// answer, it is the node that is slow.
const REPLACED_AT_ONCE: usize = 5;

impl Planner<'_, '_> {
    pub(super) fn adopt(&mut self, suspicion: &Suspicion) -> Answer {
        let (Some(case), Some(instance)) = (self.case(suspicion), self.instance(suspicion)) else {
            return by_hand("its containerd is not known here");
        };
        let mut orders = self.input.adoption.orders.iter();
        let of_it = |order: &&Order| {
            instance.is(&order.address) && order.members.iter().any(|m| m.name == case.name)
        };
        let Some(order) = orders.find(of_it) else {
            let refused = self.input.adoption.refused.iter();
            let why = refused.filter(|refused| refused.name == case.name);
            return by_hand(match why.map(|refused| refused.why.as_str()).next() {
                Some(why) => format!("cannot be adopted: {why}"),
                None => suspicion.finding.action.clone(),
            });
        };
        if self.adopted.contains(&order.adoption.socket) {
            return Answer::Covered;
        }
        let living = order.members.iter().filter_map(|member| member.init);
        let lives: Vec<ProcessId> = living.collect();
        let mut requires: Vec<Requirement> =
            lives.iter().copied().map(Requirement::Lives).collect();
        let mut promises: Vec<Promise> = lives.iter().copied().map(Promise::Lives).collect();
        promises.push(Promise::Served(order.adoption.socket.clone()));
        let socket = order.adoption.socket.clone();
        let task = Some(case.name.clone());
        let Some(predecessor) = order.adoption.predecessor else {
            requires.push(Requirement::NobodyListens(socket.display().to_string()));
            let act = Act::Adopt(Box::new(order.clone()));
            self.adopted.insert(socket);
            return self.step(suspicion, task, requires, act, promises, None);
        };
        // containerd ends the workload of a shim whose connection it loses.
        match &instance.api {
            Api::Down if instance.daemon.is_none() => {}
            Api::Down | Api::Up(_) | Api::Unknown(_) => {
                return by_hand(
                    "a living containerd may be connected to the shim; stop containerd first, \
                     and repair (or pre-start) replaces the shim",
                );
            }
        }
        let most = REPLACED_AT_ONCE.max(self.look().shims.len() / 4);
        if self.replaced >= most {
            return by_hand(format!(
                "{most} shims are replaced at once and no more: run again"
            ));
        }
        let Some(shim) = self
            .look()
            .shims
            .iter()
            .map(|shim| shim.id)
            .find(|id| same(*id, predecessor))
        else {
            return by_hand("the shim is not there any more");
        };
        requires.push(Requirement::Lives(shim));
        requires.push(Requirement::Down(instance.address.clone()));
        promises.push(Promise::Gone(shim));
        self.adopted.insert(socket);
        self.replaced = self.replaced.saturating_add(1);
        let act = Act::Replace(Box::new(order.clone()), shim);
        self.step(suspicion, task, requires, act, promises, Some(Word::Kill))
    }

    pub(super) fn end_init(&self, suspicion: &Suspicion) -> Answer {
        let (Some(case), Some(instance)) = (self.case(suspicion), self.instance(suspicion)) else {
            return by_hand("its containerd is not known here");
        };
        let Some(init) = case.init.alive() else {
            return by_hand("whether its init lives is unknown");
        };
        let Some(unlisted @ Requirement::Unlisted(..)) = self.not_in_use(instance, &case.name)
        else {
            return by_hand("containerd has to be up and to say that it does not know the task");
        };
        self.step(
            suspicion,
            Some(case.name.clone()),
            vec![Requirement::Lives(init), unlisted],
            Act::EndInit(init),
            vec![Promise::Gone(init)],
            Some(Word::Kill),
        )
    }

    pub(super) fn end_shim(&self, suspicion: &Suspicion) -> Answer {
        let Some(instance) = self.instance(suspicion) else {
            return by_hand("its containerd is not known here");
        };
        let Some(shim) = self.shim(suspicion) else {
            return by_hand("the shim is not there any more");
        };
        let mut names: Vec<TaskName> = vec![(shim.namespace.clone(), shim.task.clone())];
        for case in &self.input.cases.cases {
            if case.shim.process().is_some_and(|found| found.id == shim.id) {
                // The finding says so; a plan says it again, because it kills.
                if !matches!(case.init, Init::None | Init::Dead(..)) {
                    return by_hand("one of its tasks lives or may live");
                }
                if case.kind() == Some(Kind::Foreign) {
                    return by_hand(
                        "foreign, never touched: by one of its tasks it is no runc shim",
                    );
                }
                names.push(case.name.clone());
            }
        }
        names.sort();
        names.dedup();
        let mut requires = vec![Requirement::Lives(shim.id), Requirement::Childless(shim.id)];
        for name in &names {
            match self.not_in_use(instance, name) {
                Some(unlisted @ Requirement::Unlisted(..)) => requires.push(unlisted),
                Some(_) | None => {
                    return by_hand("containerd has to be up and to say that it does not know it");
                }
            }
        }
        match self.input.grounds.connected.get(&shim.id.pid) {
            Some(recoverd_common::seen::Seen::Present(0)) => {}
            Some(recoverd_common::seen::Seen::Present(count)) => {
                return by_hand(format!(
                    "{count} connections to it are open: if it ends, a containerd that holds one \
                     runs `shim delete` for its task's id; stop that containerd first"
                ));
            }
            Some(_) | None => return by_hand("who is connected to it is unknown"),
        }
        for address in &shim.listens {
            requires.push(Requirement::NobodyConnected(address.clone()));
        }
        self.step(
            suspicion,
            names.into_iter().next(),
            requires,
            Act::EndShim(shim.id),
            vec![Promise::Gone(shim.id)],
            Some(Word::Kill),
        )
    }

    fn shim(&self, suspicion: &Suspicion) -> Option<&Shim> {
        match &suspicion.finding.subject {
            Subject::Shim { shim } => self.look().shims.iter().find(|s| s.id.pid == *shim),
            Subject::Task { .. } => self.case(suspicion)?.shim.process(),
            Subject::Path { .. } => None,
        }
    }

    pub(super) fn publish(&self, suspicion: &Suspicion) -> Answer {
        let (Some(case), Some(instance)) = (self.case(suspicion), self.instance(suspicion)) else {
            return by_hand("its containerd is not known here");
        };
        if suspicion.finding.code == Code::ExitUnreported && matches!(instance.api, Api::Down) {
            return by_hand(
                "containerd is down and can be told nothing; its status stands in the evidence",
            );
        }
        let (Init::Dead(Some(init), _), true) = (&case.init, listed_as_running(case)) else {
            return by_hand(suspicion.finding.action.clone());
        };
        if case.kind() == Some(Kind::Ours) {
            return by_hand("our shim tells it itself, for as long as it takes");
        }
        let Some((status, at)) = self.observed(case, *init) else {
            return by_hand("nobody observed how it exited: there is nothing true to publish");
        };
        let shim = case.shim.process().map(|shim| shim.id.pid);
        let Some(ttrpc) = shim.and_then(|pid| self.input.grounds.ttrpc.get(&pid)) else {
            return by_hand("its shim's environment does not say where containerd takes events");
        };
        if self.input.told.contains(&(case.name.clone(), *init)) {
            return by_hand("containerd was told before, and has not drawn the consequence");
        }
        let running = Requirement::Running(instance.address.clone(), case.name.clone());
        self.step(
            suspicion,
            Some(case.name.clone()),
            vec![Requirement::Gone(*init), running],
            Act::Publish(Exited {
                ttrpc: ttrpc.clone(),
                name: case.name.clone(),
                init: *init,
                status,
                at,
            }),
            vec![Promise::Told],
            None,
        )
    }

    /// How the init ended, if somebody saw it: its shim, a record of this boot, or the kernel, while
    /// nobody has waited for it.
    fn observed(&self, case: &Case<'_>, init: ProcessId) -> Option<(u32, Option<Timestamp>)> {
        if let Some(state) = case.state()
            && state.phase == Phase::Stopped
        {
            let at = state
                .exited_at
                .map(|seconds| Timestamp { seconds, nanos: 0 });
            return Some((state.exit_status, at));
        }
        if let Some(Exit::Observed { status, at, .. }) = self.recorded_exit(case) {
            return Some((*status, Some(*at)));
        }
        let stat = self.look().processes.present()?.get(&init.pid)?;
        let zombie = stat.id == init && stat.state == 'Z';
        (zombie && self.look().host.root).then(|| (status_of(stat.exit_code), None))
    }

    /// The exit that a record of this boot has for a task.
    pub(super) fn recorded_exit(&self, case: &Case<'_>) -> Option<&Exit> {
        let look = self.look();
        let address = case.address.as_ref()?;
        let file = look.records.iter().find(|file| file.socket == *address)?;
        let record = file.record.present()?;
        if look.host.boot_id.as_deref() != Some(record.boot_id.as_str()) {
            return None;
        }
        let task = record.tasks.iter().find(|task| task.id == case.name.1)?;
        task.exit.as_ref()
    }

    /// The socket of a case whose files are kept together.
    pub(super) fn socket_of(case: &Case<'_>) -> Option<std::path::PathBuf> {
        let address = case.address.as_deref()?;
        let path = Path::new(address);
        path.is_absolute().then(|| path.to_owned())
    }

    /// containerd does not list the task, or is down.
    pub(super) fn known_no(case: &Case<'_>) -> bool {
        case.containerd == Known::No
    }
}

/// A raw wait status as containerd counts it.
pub(super) fn status_of(raw: i32) -> u32 {
    let raw = raw.unsigned_abs();
    match raw & 0x7f {
        0 => (raw >> 8) & 0xff,
        signal => signal.saturating_add(128),
    }
}

fn same(id: ProcessId, other: recoverd_common::record::Process) -> bool {
    u32::try_from(id.pid) == Ok(other.pid) && id.start_time == other.start_time
}

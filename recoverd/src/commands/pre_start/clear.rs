//! What stands in the way of the containerd that is about to start, and is not to be mended:
//! foreign shims that hang, and bundles whose shim it would wait for in vain.

use std::{collections::BTreeSet, time::Duration};

use nix::sys::signal::Signal;
use recoverd_common::{
    proc::{FileId, Proc, ProcessId},
    record,
    seen::Seen,
    supervision,
};
use serde_json::Map;

use super::{super::adopt::Complaint, Hook};
use crate::{
    adopt::Outcome,
    correlate::Cases,
    ending::{self, NotEnded},
    facts::{Look, Shim, TaskName},
    history::Event,
    hooks::{
        baseline::Baseline,
        foreign::{self, Foreigner},
        stoppers,
    },
    permit::{Permits, Word},
    quarantine,
};

/// A process that was sent SIGKILL has this long to be gone.
const GONE_WITHIN: Duration = Duration::from_secs(1);

/// What was taken out of containerd's way.
#[derive(Default)]
pub(super) struct SetAside {
    /// Whose bundles; why, each.
    pub(super) bundles: Vec<(TaskName, String)>,
    /// Shims that were ended.
    pub(super) shims: BTreeSet<ProcessId>,
}

impl Hook<'_> {
    /// Foreign shims that hang, and whether they are to be ended.
    pub(super) fn foreign(
        &self,
        look: &Look,
        cases: &Cases<'_>,
        at: usize,
        hung: &BTreeSet<ProcessId>,
        at_once: usize,
    ) -> Vec<Foreigner> {
        let Some(instance) = look.instances.get(at) else {
            return Vec::new();
        };
        let of_instance = cases.cases.iter().filter(|case| case.instance == Some(at));
        let allowed = self.config.pre_start.foreign;
        foreign::foreigners(instance, of_instance, hung, allowed, at_once)
    }

    /// Ends those; how many. What becomes of their tasks is containerd's and their runtime's.
    pub(super) fn end_foreign(
        &self,
        foreigners: &[Foreigner],
        baseline: &mut Baseline,
        complaint: &mut Complaint,
    ) -> usize {
        let allowed: &[Word] = match self.config.pre_start.foreign {
            true => &[Word::Kill],
            false => &[],
        };
        let permits = Permits::of(allowed);
        let proc = Proc::new(&self.plan.roots.proc);
        let mut ended = 0_usize;
        for one in foreigners {
            let pid = one.shim.pid;
            let names: Vec<String> = one
                .tasks
                .iter()
                .map(|t| format!("{}/{}", t.0, t.1))
                .collect();
            let subject = names.join(" ");
            let mut tell = |event, text: &str| {
                complaint.of(self.history.tell(event, &subject, text, Map::new()));
            };
            let why = match (&one.left, permits.kill()) {
                (Some(why), _) => why.clone(),
                // `left` says so as well.
                (None, Err(missing)) => missing.to_string(),
                (None, Ok(leave)) => match self.goes_on() {
                    Err(why) => format!("foreign shim {pid} does not answer: {why}"),
                    Ok(()) => {
                        let what = format!("{} {pid}, which does not answer", one.runtime);
                        tell(Event::Intended, &format!("send SIGKILL to {what}"));
                        let kill = [Signal::SIGKILL];
                        match ending::end(&proc, one.shim, &kill, GONE_WITHIN, leave) {
                            Ok(_) => {
                                ended = ended.saturating_add(1);
                                tell(Event::Done, &format!("ended {what}"));
                                format!("its foreign shim {pid} did not answer, and was ended")
                            }
                            Err(why @ NotEnded::Changed { .. }) => {
                                tell(Event::Skipped, &why.to_string());
                                why.to_string()
                            }
                            Err(why @ NotEnded::Failed(_)) => {
                                tell(Event::Failed, &why.to_string());
                                why.to_string()
                            }
                        }
                    }
                },
            };
            for name in &one.tasks {
                if let Some(task) = baseline.task_mut(name) {
                    task.why.clone_from(&why);
                }
            }
        }
        ended
    }

    /// Sets bundles aside that would stop containerd, and ends those of their shims that serve
    /// nothing. The shim goes first: whoever dies in between leaves a bundle that stops nobody.
    pub(super) fn set_aside(
        &self,
        look: &Look,
        cases: &Cases<'_>,
        at: usize,
        hung: &BTreeSet<ProcessId>,
        outcomes: &[Outcome],
        complaint: &mut Complaint,
    ) -> SetAside {
        let served: BTreeSet<&TaskName> = outcomes
            .iter()
            .filter(|outcome| outcome.verdict.may_serve())
            .flat_map(|outcome| outcome.order.members.iter().map(|member| &member.name))
            .collect();
        let mut done = SetAside::default();
        let Some(instance) = look.instances.get(at) else {
            return done;
        };
        let Some(state) = &instance.state else {
            return done;
        };
        let left = cases
            .cases
            .iter()
            .filter(|case| case.instance == Some(at) && !served.contains(&case.name));
        let proc = Proc::new(&self.plan.roots.proc);
        for stopper in stoppers::stoppers(look, left, hung) {
            let subject = format!("{}/{}", stopper.name.0, stopper.name.1);
            let mut tell = |event, text: &str| {
                complaint.of(self.history.tell(event, &subject, text, Map::new()));
            };
            let (shim, pid) = (stopper.shim, stopper.shim.id.pid);
            let mut why = stopper.why;
            if !done.shims.contains(&shim.id) {
                if let Err(why) = self.goes_on() {
                    tell(Event::Skipped, &format!("not set aside: {why}"));
                    continue;
                }
                let still = proc
                    .living(shim.id)
                    .present()
                    .map(|now| stoppers::is_still(shim, now));
                if still != Some(true) {
                    tell(
                        Event::Skipped,
                        &format!("shim {pid} is not what it was: not set aside"),
                    );
                    continue;
                }
                if stoppers::serves_nothing(look, &cases.cases, instance, shim) {
                    tell(
                        Event::Intended,
                        &format!("send SIGKILL to shim {pid}: {why}"),
                    );
                    match self.end_stopper(&proc, shim) {
                        Ok(()) => {
                            tell(Event::Done, &format!("ended shim {pid}"));
                            why.push_str("; it was ended");
                            done.shims.insert(shim.id);
                        }
                        Err(failed) => tell(Event::Failed, &failed.to_string()),
                    }
                }
            }
            // By its identity now: whatever stands there later stays.
            let Seen::Present(file) = FileId::of_entry(&stopper.bundle) else {
                continue;
            };
            let thing = quarantine::Thing {
                path: &stopper.bundle,
                file,
                name: &format!("{}-{}", stopper.name.0, stopper.name.1),
                why: &why,
                run: self.history.run(),
            };
            match quarantine::set_aside(state, &thing) {
                Ok(path) => {
                    tell(
                        Event::Done,
                        &format!("set aside as {}: {why}", path.display()),
                    );
                    done.bundles.push((stopper.name, why));
                }
                Err(kept) => tell(Event::Failed, &kept.to_string()),
            }
        }
        done
    }

    /// What is asked for by running the hook: SPEC lets it replace such a shim, and there is nothing
    /// to put in its place.
    fn end_stopper(&self, proc: &Proc, shim: &Shim) -> Result<(), NotEnded> {
        let permits = Permits::of(&[Word::Kill]);
        let leave = permits
            .kill()
            .map_err(|missing| NotEnded::Failed(missing.to_string()))?;
        let process = record::Process {
            pid: shim.id.pid.unsigned_abs(),
            start_time: shim.id.start_time,
        };
        for socket in &shim.listens {
            supervision::announce_end(&self.config.run_dir, socket.as_ref(), process);
        }
        ending::end(proc, shim.id, &[Signal::SIGKILL], GONE_WITHIN, leave).map(drop)
    }
}

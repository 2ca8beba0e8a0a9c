//! What the hook did: in the baseline, and in its one line.

use crate::{
    Verdict,
    adopt::{self, Decision, Outcome},
    facts::TaskName,
    hooks::baseline::{Baseline, Did},
};

/// Notes in the baseline what was done.
pub(super) fn note(baseline: &mut Baseline, decision: &Decision, outcomes: &[Outcome]) {
    for outcome in outcomes {
        let lived = outcome.order.adoption.predecessor.is_some();
        for member in &outcome.order.members {
            let Some(task) = baseline.task_mut(&member.name) else {
                continue;
            };
            (task.did, task.why) = match &outcome.verdict {
                adopt::Verdict::Adopted(adopted) => {
                    let did = if lived { Did::Replaced } else { Did::Adopted };
                    let mut remarks = Vec::new();
                    let of_task = adopted.tasks.iter().filter(|t| t.id == member.name.1);
                    for adopted in of_task {
                        remarks.extend(adopted.remarks.iter().cloned());
                    }
                    (did, remarks.join("; "))
                }
                adopt::Verdict::StoodBack(why) => (Did::Nothing, why.clone()),
                adopt::Verdict::Failed(why) => (Did::Failed, why.to_string()),
            };
        }
    }
    for refused in &decision.refused {
        if let Some(task) = baseline.task_mut(&refused.name) {
            task.why.clone_from(&refused.why);
        }
    }
}

/// What the one line counts.
#[derive(Default)]
pub(super) struct Tally {
    tasks: usize,
    adopted: usize,
    replaced: usize,
    set_aside: usize,
    pub(super) hung: usize,
    pub(super) foreign: usize,
    lost: usize,
    pub(super) twins: usize,
    pub(super) not_adopted: Vec<(TaskName, String)>,
}

impl Tally {
    pub(super) fn of(baseline: &Baseline, decision: &Decision) -> Self {
        let did = |did| baseline.tasks.iter().filter(|task| task.did == did).count();
        let mut not_adopted: Vec<(TaskName, String)> = baseline
            .tasks
            .iter()
            .filter(|task| task.did == Did::Failed)
            .map(|task| ((task.namespace.clone(), task.id.clone()), task.why.clone()))
            .collect();
        // The baseline knows more of it, where something was done about it.
        not_adopted.extend(decision.refused.iter().map(|refused| {
            let task = baseline.task(&refused.name);
            let why = task
                .map(|task| task.why.as_str())
                .filter(|why| !why.is_empty());
            (refused.name.clone(), why.unwrap_or(&refused.why).to_owned())
        }));
        Self {
            tasks: baseline.tasks.len(),
            adopted: did(Did::Adopted),
            replaced: did(Did::Replaced),
            set_aside: did(Did::SetAside),
            lost: decision.refused.iter().filter(|r| r.lost).count(),
            not_adopted,
            ..Self::default()
        }
    }

    pub(super) fn verdict(&self) -> Verdict {
        if self.not_adopted.is_empty() {
            Verdict::Clean
        } else {
            Verdict::Unkept
        }
    }

    pub(super) fn line(&self, remarks: &[String]) -> String {
        const SHOWN: usize = 5;
        let mut line = format!("{} tasks", self.tasks);
        let others = self.not_adopted.len().saturating_sub(self.lost);
        for (count, word) in [
            (self.adopted, "adopted"),
            (self.replaced, "replaced"),
            (self.twins, "address files written"),
            (self.set_aside, "bundles set aside"),
            (self.hung, "hung shims ended"),
            (self.foreign, "foreign shims ended"),
            (self.lost, "lost before"),
            (others, "not adopted"),
        ] {
            if count > 0 {
                line.push_str(&format!(", {count} {word}"));
            }
        }
        let whys = self.not_adopted.iter().take(SHOWN);
        let mut told: Vec<String> = whys
            .map(|(name, why)| format!("{}/{}: {why}", name.0, name.1))
            .collect();
        told.extend(remarks.iter().cloned());
        if !told.is_empty() {
            line.push_str(&format!(" ({})", told.join("; ")));
        }
        line
    }
}

//! Looks, judges, and looks again before it says that something is wrong: one look at a node
//! that does not hold still shows things that were never there.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use crate::{
    classify::{self, Hold, Settings, Suspicion},
    correlate::{self, Cases},
    facts::{Gap, Look},
    findings::{Code, Subject},
    observe::{self, Plan, Scope},
};

/// A node as it is.
pub struct Examined {
    /// The look that the cases come from.
    pub look: Look,
    /// What stayed.
    pub suspicions: Vec<Suspicion>,
    /// What could not be seen.
    pub gaps: Vec<Gap>,
    /// How long it all took.
    pub took: Duration,
}

impl Examined {
    /// The cases of the look.
    pub fn cases<'a>(&'a self, plan: &Plan) -> Cases<'a> {
        correlate::correlate(&self.look, &plan.roots.socket_dir)
    }
}

/// Which suspicions are worth another look.
#[derive(Debug, Clone, Copy)]
pub enum Again {
    /// All that ask for one.
    All,
    /// Those with these codes; the others are dropped unless one look was enough for them. For a
    /// command that has little time and acts on these alone.
    Only(&'static [Code]),
}

/// What makes two findings of two looks the same: code, subject and containerd. The latter by its
/// address, as places in the list move when a containerd comes or goes.
fn key<'a>(look: &'a Look, suspicion: &'a Suspicion) -> (Code, &'a Subject, Option<&'a str>) {
    let instance = suspicion.instance.and_then(|at| look.instances.get(at));
    let finding = &suspicion.finding;
    (
        finding.code,
        &finding.subject,
        instance.map(|i| i.address.as_str()),
    )
}

/// Looks at the node as often as what it sees requires.
pub async fn examine(
    plan: &Plan,
    settings: &Settings,
    second_look: Duration,
    again: Again,
    progress: &(dyn Fn(&str) + Sync),
) -> Examined {
    let began = Instant::now();
    let look = observe::look(plan, &Scope::Full, progress).await;
    let (mut suspicions, gaps) = judge(&look, plan, settings);
    if let Again::Only(codes) = again {
        suspicions.retain(|s| s.hold == Hold::Once || codes.contains(&s.finding.code));
    }
    // At most one wait per kind of hold, whatever the number of suspects.
    if suspicions.iter().any(|s| s.hold != Hold::Once) {
        progress("suspects again");
        // Two misses of one shim are to be a second apart.
        let missed = |s: &Suspicion| {
            s.hold == Hold::Twice
                && matches!(s.finding.code, Code::UnresponsiveShim | Code::Foreign)
        };
        let wait = if suspicions.iter().any(missed) {
            second_look.max(Duration::from_secs(1))
        } else {
            second_look
        };
        tokio::time::sleep(wait).await;
        suspicions = confirm(plan, settings, &look, suspicions, progress).await;
    }
    if suspicions.iter().any(|s| s.hold == Hold::Settle) {
        progress("a phase that contradicts the kernel");
        tokio::time::sleep(settings.settle.saturating_sub(began.elapsed())).await;
        let (settling, rest): (Vec<_>, Vec<_>) =
            suspicions.into_iter().partition(|s| s.hold == Hold::Settle);
        suspicions = rest;
        suspicions.extend(confirm(plan, settings, &look, settling, progress).await);
    }
    Examined {
        look,
        suspicions,
        gaps,
        took: began.elapsed(),
    }
}

fn judge(look: &Look, plan: &Plan, settings: &Settings) -> (Vec<Suspicion>, Vec<Gap>) {
    let cases = correlate::correlate(look, &plan.roots.socket_dir);
    let suspicions = classify::classify(look, &cases, settings);
    (suspicions, classify::gaps(look, &cases))
}

/// Looks again and keeps, of what needs it, what is still there, with the new evidence.
async fn confirm(
    plan: &Plan,
    settings: &Settings,
    before: &Look,
    suspicions: Vec<Suspicion>,
    progress: &(dyn Fn(&str) + Sync),
) -> Vec<Suspicion> {
    let ask = suspicions.iter().filter(|s| s.hold != Hold::Once);
    let sockets: BTreeSet<String> = ask.filter_map(|s| s.address.clone()).collect();
    let again = observe::look(plan, &Scope::Again(sockets), progress).await;
    let (fresh, _) = judge(&again, plan, settings);
    suspicions
        .into_iter()
        .filter_map(|old| match old.hold {
            Hold::Once => Some(old),
            Hold::Twice | Hold::Settle => {
                let wanted = key(before, &old);
                let new = fresh.iter().find(|new| key(&again, new) == wanted)?;
                // The report's places are those of the first look.
                Some(Suspicion {
                    instance: old.instance,
                    ..new.clone()
                })
            }
        })
        .collect()
}

//! Adoption, recoverd's side of it: which groups of tasks need a successor of their shim, what that
//! successor has to know, and starting it. What the successor does is the shim's own verb `adopt`
//! (see `recoverd_common::adoption`).
//!
//! ```text
//! look + cases ──decide::select──▶ groups ──clues::observe──▶ clues
//!                                    └─────orders::orders◀──────┘ ──▶ Order ──run──▶ Outcome
//! ```
//!
//! A group is what one shim serves: all tasks whose bundles name one socket. It is adopted whole.

pub mod clues;
pub mod decide;
pub mod orders;
pub mod run;

use std::path::PathBuf;

use recoverd_common::{adoption::Adoption, proc::ProcessId};

use crate::{
    correlate::Cases,
    facts::{Look, TaskName},
    observe::Roots,
};

pub use decide::{Decision, Wish};
pub use run::{How, Kept, Outcome, Verdict, run, run_with};

/// One group to be adopted, with all that its successor needs.
#[derive(Debug, Clone, PartialEq)]
pub struct Order {
    /// The containerd's gRPC address.
    pub address: String,
    /// Its state folder.
    pub state: Option<PathBuf>,
    /// The containerd namespace.
    pub namespace: String,
    /// The group's id: its first container, a pod's sandbox.
    pub group: String,
    /// What the successor is told.
    pub adoption: Adoption,
    /// A record in its way that cannot be read: to be set aside first.
    pub unreadable: Option<PathBuf>,
    /// Its tasks.
    pub members: Vec<Member>,
    /// Why, one line each.
    pub because: Vec<String>,
}

/// A task of an [`Order`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// Its name.
    pub name: TaskName,
    /// Its living init, which must be the same afterwards.
    pub init: Option<ProcessId>,
}

impl Order {
    /// Its successor is to take the place of this living shim.
    pub fn replaces(&self, shim: ProcessId) -> bool {
        self.adoption.predecessor.is_some_and(|predecessor| {
            predecessor.pid == shim.pid.unsigned_abs() && predecessor.start_time == shim.start_time
        })
    }

    /// Living inits in it: what it is worth.
    pub fn living(&self) -> usize {
        self.members.iter().filter(|m| m.init.is_some()).count()
    }
}

/// Who is to be adopted, and how: looks at what only adoption needs, changes nothing.
pub fn decide(roots: &Roots, look: &Look, cases: &Cases<'_>, wish: &Wish<'_>) -> Decision {
    let selection = decide::select(look, cases, wish);
    let clues = clues::observe(roots, look, &selection.groups, wish.unit);
    orders::orders(look, selection, &clues)
}

#[cfg(test)]
mod random;
#[cfg(test)]
mod tests;

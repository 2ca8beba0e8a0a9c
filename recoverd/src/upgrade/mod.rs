//! Upgrade of our shims in place, recoverd's side of it: which shims run what, which of them are to
//! become which executable, and asking them one by one. What a shim does then is its own business
//! (see `recoverd_common::handoff`).
//!
//! ```text
//! look + cases ──decide──▶ Candidate ──run──▶ Outcome
//!                              │                 ▲
//!                              └── it dies of it ┘ back: its old executable adopts what was kept
//! ```

pub mod back;
pub mod decide;
pub mod run;

pub use decide::{Candidate, Choice, Refused, candidates};
pub use run::{Outcome, Verdict, run};

//! `recoverd supervise`: the daemon that lets no shim be lost.
//!
//! ```text
//! shims ──words, descriptors──▶ (daemon) ──▶ bag        what must outlive its shim
//! records, bundles ──look──▶ decide ──▶ (daemon) ──▶ adopt::run   a successor, with the bag
//! pidfds ──an end──▶ witnessed          who ended how, on disk
//!                    metrics, store     Prometheus, the service manager
//! ```
//!
//! One thread, one loop. Deciding is in `decide`; `daemon`, with a file for each subject, performs
//! and has no policy; `catch` and `look` read. Everything that it knows can be had again by looking,
//! but for what only a dead shim had, and that is why it exists. It ends no process and removes
//! nothing but its own files.

mod bag;
mod catch;
mod daemon;
mod decide;
mod look;
mod metrics;
mod serve_metrics;
mod store;

use std::path::{Path, PathBuf};

use recoverd_common::supervision;

pub use daemon::{Setup, run};

/// Where the supervisor's socket is bound before it is renamed to its place: the kernel goes on
/// naming it so.
pub fn bound_at(run_dir: &Path) -> PathBuf {
    let mut beside = supervision::path(run_dir).into_os_string();
    beside.push(".new");
    beside.into()
}

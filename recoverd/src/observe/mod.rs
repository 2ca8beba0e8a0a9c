//! One look at a node. Reads, asks and notes what could not be seen; judges nothing and changes
//! nothing: opens no file for writing, follows no symlink out of a bundle, sends no signal.
//!
//! Order matters, because a node does not hold still: first what names tasks (bundles, runc's
//! state), then the process table, then everything that is looked up by it. What is created or
//! deleted in between looks odd in one look and well in the next, which is why suspects are
//! looked at twice (`verify`).

mod answers;
mod bundles;
mod cgroups;
pub mod command;
pub mod containerd;
pub mod grounds;
mod host;
pub mod instances;
mod leftovers;
pub mod premises;
pub mod processes;
pub mod unit;

use std::{collections::BTreeSet, path::PathBuf, time::Duration};

use recoverd_common::{proc::Proc, seen::Seen};

use crate::{
    facts::{Address, Gap, Host, Look},
    supervise,
    witnessed::{self, Witnessed},
};

/// Where to look.
#[derive(Debug, Clone)]
pub struct Roots {
    /// `/proc`.
    pub proc: PathBuf,
    /// `/sys/fs/cgroup`.
    pub cgroup: PathBuf,
    /// `/run/containerd/s`.
    pub socket_dir: PathBuf,
    /// `/run/containerd/runc`.
    pub runc_root: PathBuf,
    /// `/run/containerd/fifo`, where clients make fifos.
    pub fifo_dir: PathBuf,
    /// `/run/recoverd`, our own runtime files.
    pub run_dir: PathBuf,
}

/// A containerd that the command line or the configuration names.
#[derive(Debug, Clone, Default)]
pub struct NamedInstance {
    /// Its gRPC address.
    pub address: Option<PathBuf>,
    /// Its state folder.
    pub state: Option<PathBuf>,
    /// Its root folder.
    pub root: Option<PathBuf>,
    /// Whose word this is.
    pub source: String,
}

impl NamedInstance {
    /// Its address; containerd's own default where only a folder was named.
    pub fn address_or_default(&self) -> String {
        match &self.address {
            Some(address) => address.to_string_lossy().into_owned(),
            None => instances::DEFAULT_ADDRESS.to_owned(),
        }
    }
}

/// How long to wait.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// For one shim, in all: it is asked twice, half of this apart.
    pub shim_deadline: Duration,
    /// For all of them and containerd's API together.
    pub budget: Duration,
    /// Percent of a file system in use from which on its eaters are looked for.
    pub run_full: u64,
}

/// How much to look at.
#[derive(Debug, Clone)]
pub enum Scope {
    /// Everything.
    Full,
    /// A second look: ask these sockets only, measure no memory.
    Again(BTreeSet<Address>),
}

/// What [`look`] is told.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Where.
    pub roots: Roots,
    /// Containerds that were named, the command line's first.
    pub named: Vec<NamedInstance>,
    /// How long.
    pub limits: Limits,
}

/// The result of a task of our own. None is ever aborted, so the only failure is a panic, which
/// goes on.
fn joined<T>(result: Result<T, tokio::task::JoinError>) -> T {
    match result {
        Ok(value) => value,
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}

/// What a supervisor has seen, whether it runs or not. One that never ran is no gap.
fn witnessed(roots: &Roots, host: &Host, gaps: &mut Vec<Gap>) -> Witnessed {
    let boot_id = host.boot_id.as_deref().unwrap_or_default();
    match witnessed::read(&roots.run_dir, boot_id) {
        Seen::Present(witnessed) => witnessed,
        Seen::Absent => Witnessed::default(),
        Seen::Unknown(why) => {
            if host.root {
                let path = roots.run_dir.join(witnessed::FILE);
                gaps.push(Gap::new(path.display().to_string(), why));
            }
            Witnessed::default()
        }
    }
}

/// The state folder of every containerd of the node: a walk over all processes.
pub fn states(plan: &Plan) -> BTreeSet<PathBuf> {
    let proc = Proc::new(&plan.roots.proc);
    let mut gaps = Vec::new();
    let host = host::observe(&plan.roots, &mut gaps);
    let seen = processes::observe(&proc, &plan.roots, &host, None, &mut gaps);
    let instances = instances::observe(plan, &seen, &mut gaps);
    instances.into_iter().filter_map(|i| i.state).collect()
}

/// The process of the containerd at `address`, which need not listen there yet, or any more.
fn containerd_at(roots: &Roots, address: &str) -> Seen<i32> {
    let proc = Proc::new(&roots.proc);
    let mut gaps = Vec::new();
    let host = host::observe(roots, &mut Vec::new());
    let seen = processes::observe(&proc, roots, &host, None, &mut gaps);
    if let Some(gap) = gaps.pop() {
        return Seen::Unknown(format!("{}: {}", gap.what, gap.why));
    }
    instances::daemon_at(&seen.daemons, address)
}

/// Whether the containerd at `address` is down: nobody listens there, and no process is it. `Err`
/// says why that is not so, or not known.
pub fn down(roots: &Roots, address: &str) -> Result<(), String> {
    grounds::nobody_listens(address)?;
    // While it starts it listens nowhere, and is connected to shims already.
    match containerd_at(roots, address) {
        Seen::Absent => Ok(()),
        Seen::Present(pid) => Err(format!("{pid} starts or ends")),
        Seen::Unknown(why) => Err(why),
    }
}

/// Looks once. `progress` is told, in a few words, what is being looked at.
pub async fn look(plan: &Plan, scope: &Scope, progress: &(dyn Fn(&str) + Sync)) -> Look {
    let at = std::time::SystemTime::now();
    let roots = &plan.roots;
    let proc = Proc::new(&roots.proc);
    let mut gaps = Vec::new();

    progress("processes and bundles");
    let host = host::observe(roots, &mut gaps);
    // The daemons and shims that name instances; the table that counts is read again below.
    let first = processes::observe(&proc, roots, &host, None, &mut Vec::new());
    let mut instances = instances::observe(plan, &first, &mut gaps);
    let bundles = bundles::observe(&instances, &mut gaps);
    let runc = bundles::observe_runc(roots, &bundles, &mut gaps);
    let seen = processes::observe(&proc, roots, &host, Some(&first), &mut gaps);
    let mut shims = seen.shims;
    let listeners = processes::listeners(&proc, roots, &host, &mut shims, &mut gaps);

    progress("shims and containerd");
    let questions = answers::questions(&instances, &bundles, &runc, &shims, roots);
    // Asking runs beside the reading below, which blocks this thread.
    let answers = tokio::spawn(answers::ask(questions, scope.clone(), plan.limits));
    let apis = tokio::spawn(containerd::ask(instances.clone(), plan.limits));
    let (memory, rest) = tokio::task::block_in_place(|| {
        let memory = match scope {
            Scope::Full => processes::memory(&proc, &shims),
            Scope::Again(_) => Vec::new(),
        };
        let rest = leftovers::observe(plan, &instances, &mut gaps);
        (memory, rest)
    });
    let (answers, apis) = (joined(answers.await), joined(apis.await));
    for (shim, memory) in shims.iter_mut().zip(memory) {
        shim.memory = memory;
    }
    for (instance, api) in instances.iter_mut().zip(apis) {
        if let crate::facts::Api::Unknown(why) = &api {
            let what = format!("containerd at {}", instance.address);
            gaps.push(Gap::of(instance, what, why));
        }
        instance.api = api;
    }
    processes::look_at_cpu_again(&proc, &mut shims, &answers);

    let table = if host.root {
        recoverd_common::seen::Seen::Present(seen.table)
    } else {
        recoverd_common::seen::Seen::Unknown("needs root".into())
    };
    let cgroups = cgroups::observe(&proc, roots, &instances, &bundles, &runc, &table);
    let memberships = cgroups::memberships(roots, &bundles, &runc);
    progress("execs and fifos");
    let execs = leftovers::execs(&proc, &shims, &bundles, &runc, &table, &cgroups);
    let fifos = leftovers::fifo_users(&proc, rest.fifos, &bundles, &runc, &table);
    let records = bundles::observe_records(roots);
    let witnessed = witnessed(roots, &host, &mut gaps);
    let supervised = supervise::bound_at(&roots.run_dir);
    let supervisors = listeners
        .present()
        .and_then(|all| all.get(&*supervised.to_string_lossy()))
        .cloned()
        .unwrap_or_default();

    gaps.sort();
    gaps.dedup();
    Look {
        at,
        host,
        instances,
        shims,
        busy_verbs: seen.busy_verbs,
        bundles,
        runc,
        sockets: rest.sockets,
        supervisors,
        listeners,
        answers,
        processes: table,
        memberships,
        mounts: rest.mounts,
        mount_ages: rest.mount_ages,
        cgroups,
        fifos,
        execs,
        records,
        witnessed,
        filesystems: rest.filesystems,
        gaps,
    }
}

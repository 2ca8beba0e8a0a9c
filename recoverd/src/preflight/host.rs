//! What does not belong to one bundle: the hop between the two releases, sandboxes, the state
//! folder, room on its file system, and the systemd unit.

use std::{collections::BTreeMap, time::Duration};

use recoverd_common::seen::Seen;

use super::{Check, Judge};
use crate::{
    correlate::Case,
    facts::{Connection, Filesystem, Instance, Reply, Sandbox, Unit},
    findings::Severity,
    hooks::downgrade,
    release::{Release, unsupported},
};

/// How long containerd waits for each shim's answer at its start
/// (`io.containerd.timeout.shim.load`).
const LOAD: Duration = Duration::from_secs(5);
/// Less than this free, and not even the small files of a start can be written.
const LAST_BYTES: u64 = 1 << 20;
/// As [`LAST_BYTES`], in files.
const LAST_INODES: u64 = 64;

impl Judge<'_> {
    pub(super) fn hop(
        &mut self,
        instance: &Instance,
        running: Option<&str>,
        from: Option<Release>,
        to: Option<Release>,
    ) {
        let what = format!("the release of containerd at {}", instance.address);
        match (running, from, to) {
            (_, Some(from), Some(to)) => {
                if let Some(why) = unsupported(from, to) {
                    self.add(Severity::Warning, Check::Hop, instance.address.clone(), why);
                }
            }
            (Some(running), None, _) => {
                self.gap(what, format!("{running:?} is no release that we know"));
            }
            (None, _, Some(_)) => self.gap(what, "it does not say, so the hop cannot be judged"),
            (None, _, None) => {
                self.gap(what, "it does not say; name the one to start with --to");
            }
            (Some(_), Some(_), None) => {}
        }
    }

    /// What pre-start would do about shims that the release cannot speak to. That each of their
    /// tasks is lost without it is said of each.
    pub(super) fn unheard(&mut self, at: usize, instance: &Instance, to: Option<Release>) {
        let Some(to) = to.filter(|to| to.is_1()) else {
            return;
        };
        let suspects = downgrade::suspects(self.input.look, self.input.cases, at);
        let tasks: usize = suspects.iter().map(|suspect| suspect.tasks.len()).sum();
        if tasks > 0 {
            let why = format!(
                "{tasks} tasks have shims that containerd {to} cannot speak to: `recoverd pre-start`, \
                 which learns the release from --unit or --containerd, replaces these by ours before"
            );
            self.add(
                Severity::Info,
                Check::Protocol,
                instance.address.clone(),
                why,
            );
        }
    }

    pub(super) fn sandboxes(&mut self, at: usize, instance: &Instance, to: Option<Release>) {
        let subject = || instance.address.clone();
        match self.input.premises.sandboxes.get(at) {
            Some(Seen::Present(sandboxes)) => self.sandbox_names(instance, sandboxes),
            Some(Seen::Absent) => {}
            Some(Seen::Unknown(why)) => {
                let what = format!("names of the sandboxes of {}", instance.address);
                self.gap(what, why.clone());
            }
            None => self.gap(format!("sandboxes of {}", instance.address), "not asked"),
        }
        if to.is_some_and(|to| to.minor() == (2, 0)) {
            match self.input.premises.shim_sandboxes.get(at) {
                Some(Seen::Present(0) | Seen::Absent) => {}
                Some(Seen::Present(count)) => {
                    let why = format!(
                        "{count} sandboxes are run by a shim's sandbox service: every 2.0 \
                         confuses state and root at its start and destroys them; use 2.1 or later"
                    );
                    self.add(Severity::Critical, Check::ShimSandbox, subject(), why);
                }
                Some(Seen::Unknown(why)) => {
                    let why = why.clone();
                    self.gap(format!("shim sandboxes of {}", instance.address), why);
                }
                None => self.gap(
                    format!("shim sandboxes of {}", instance.address),
                    "not asked",
                ),
            }
        }
    }

    fn sandbox_names(&mut self, instance: &Instance, sandboxes: &[Sandbox]) {
        let mut by_name: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for sandbox in sandboxes {
            by_name.entry(&sandbox.name).or_default().push(&sandbox.id);
        }
        for (name, ids) in by_name {
            if ids.len() > 1 {
                let why = format!(
                    "the sandbox name {name} is reserved by {}: the CRI plugin fails to recover \
                     and ends containerd; remove the one that is not wanted first",
                    ids.join(" and ")
                );
                let subject = instance.address.clone();
                self.add(Severity::Critical, Check::SandboxName, subject, why);
            }
        }
        let tasks = instance.api.up().and_then(|api| api.tasks.as_ref());
        for sandbox in sandboxes {
            // Where containerd did not list its tasks, the look has a gap that says so.
            let has_task = tasks.is_none_or(|tasks| tasks.keys().any(|(_, id)| *id == sandbox.id));
            if !has_task {
                let why = format!(
                    "sandbox {} has no task but still reserves the name {}",
                    sandbox.id, sandbox.name
                );
                let subject = instance.address.clone();
                self.add(Severity::Info, Check::SandboxName, subject, why);
            }
        }
    }

    pub(super) fn state_folder(&mut self, instance: &Instance) {
        let Some(state) = &instance.state else {
            let what = format!("the state folder of {}", instance.address);
            return self.gap(what, "nothing says where it is; name it with --state");
        };
        let Seen::Present(mounts) = &self.input.look.mounts else {
            // The look has a gap for it.
            return;
        };
        let top = mounts
            .iter()
            .filter(|mount| state.starts_with(&mount.point))
            // A later mount on the same point hides the earlier one, and max_by_key takes the last.
            .max_by_key(|mount| mount.point.components().count());
        if let Some(top) = top.filter(|top| !in_memory(&top.kind)) {
            let why = format!(
                "is on {}, not on tmpfs: bundles and sockets outlive a reboot of the machine, \
                 and containerd's start after it runs `delete` for each",
                top.kind
            );
            let subject = state.display().to_string();
            self.add(Severity::Info, Check::StateFolder, subject, why);
        }
    }

    pub(super) fn room(&mut self, filesystem: &Filesystem) {
        let subject = filesystem.path.display().to_string();
        let full = u64::from(self.input.run_full);
        for (what, (size, free), last) in [
            ("bytes", filesystem.bytes, LAST_BYTES),
            ("inodes", filesystem.inodes, LAST_INODES),
        ] {
            // Size 0: this file system does not count them.
            if size == 0 {
                continue;
            }
            let used = percent_used(size, free);
            if free < last {
                let why = format!("{free} of {size} {what} are free: containerd cannot start");
                self.add(Severity::Critical, Check::StateFolder, subject.clone(), why);
            } else if used >= full {
                let why =
                    format!("{used} % of its {what} are used: new tasks may fail after the start");
                self.add(Severity::Warning, Check::StateFolder, subject.clone(), why);
            }
        }
    }

    pub(super) fn unit(&mut self, to: Option<Release>) {
        let unit = match &self.input.premises.unit {
            Seen::Present(unit) => unit,
            // systemd does not run this machine: nothing of it can hurt.
            Seen::Absent => return,
            Seen::Unknown(why) => {
                let why = why.clone();
                return self.gap("the unit that runs containerd", why);
            }
        };
        if unit.load_state != "loaded" {
            let why = format!(
                "is {}; name the one that runs containerd with --unit",
                unit.load_state
            );
            return self.gap(format!("unit {}", unit.name), why);
        }
        let name = || unit.name.clone();
        match unit.kill_mode.as_str() {
            "process" => {}
            "control-group" | "mixed" => {
                let why = format!(
                    "KillMode={}: a restart of the unit ends every shim, and the start after it \
                     kills their workloads; it must be process",
                    unit.kill_mode
                );
                self.add(Severity::Critical, Check::Unit, name(), why);
            }
            "none" => {
                let why = "KillMode=none: a stop of the unit leaves containerd itself running; \
                           it must be process";
                self.add(Severity::Warning, Check::Unit, name(), why);
            }
            other => {
                let why = format!("KillMode={other} is unknown");
                self.gap(format!("unit {}", unit.name), why);
            }
        }
        if !unit.delegate {
            let why = "Delegate is off: systemd may move shims and containers to other cgroups \
                       when it reloads; it must be on";
            self.add(Severity::Warning, Check::Unit, name(), why);
        }
        self.start_timeout(unit, to);
    }

    /// Whether the unit's start timeout leaves time for the shims that do not answer.
    fn start_timeout(&mut self, unit: &Unit, to: Option<Release>) {
        let Some(limit) = unit.start_timeout else {
            return;
        };
        let hung = self.hung_bundles(unit);
        // From 2.2 on as many at once as there are processors, before one after another.
        let parallel = match to {
            Some(to) if to.minor() >= (2, 2) => self.input.premises.cpus.max(1),
            Some(_) | None => 1,
        };
        let rounds = u32::try_from(hung.div_ceil(parallel)).unwrap_or(u32::MAX);
        let needed = LOAD.saturating_mul(rounds);
        if rounds > 0 && needed >= limit {
            let why = format!(
                "TimeoutStartSec is {} s, but containerd waits 5 s for each of {hung} tasks \
                 whose shim does not answer, {} s in all: systemd ends it before it is up",
                limit.as_secs(),
                needed.as_secs()
            );
            self.add(Severity::Critical, Check::Unit, unit.name.clone(), why);
        }
    }

    /// Bundles whose shim is silent, of the instance that the unit runs; the most of any when
    /// that cannot be told. Every bundle counts: containerd asks once for each.
    fn hung_bundles(&self, unit: &Unit) -> usize {
        let look = self.input.look;
        let silent = |case: &&Case<'_>| {
            case.bundle.is_some()
                && case.answer.is_some_and(|answer| {
                    answer.connection == Connection::Made && answer.greeting == Reply::Silent
                })
        };
        let of = |at: usize| {
            let cases = self.input.cases.iter().filter(silent);
            cases.filter(|case| case.instance == Some(at)).count()
        };
        let runs = |instance: &Instance| {
            unit.main_pid.is_some() && instance.daemon.map(|id| id.pid) == unit.main_pid
        };
        match look.instances.iter().position(runs) {
            Some(at) => of(at),
            None => (0..look.instances.len()).map(of).max().unwrap_or(0),
        }
    }
}

fn in_memory(kind: &str) -> bool {
    matches!(kind, "tmpfs" | "ramfs")
}

/// Rounded up: 90 means that 10 percent or less are free.
fn percent_used(size: u64, free: u64) -> u64 {
    let used = u128::from(size.saturating_sub(free));
    let percent = (used * 100).div_ceil(u128::from(size.max(1)));
    u64::try_from(percent).unwrap_or(100)
}

//! Will a start of containerd be harmless now? Follows, for each bundle, the steps that
//! containerd takes at its start, and says what it would do (pure: facts in, reasons out).
//!
//! ```text
//! bundle ─▶ shim-binary-path ─▶ address or bootstrap.json ─▶ Connect (5 s) ─▶ Pids (1.7+)
//!   │ empty    │ missing, binary gone   │ missing, not understood  │ no answer    │ none
//!   ▼          ▼                        ▼                          ▼              ▼
//! dropped    dropped                  killed                     killed         deleted
//! ```
//!
//! *Dropped*: the workload goes on, unknown to containerd. *Killed*: `<shim> delete` ends it.
//! What cannot be seen is a gap; it never counts as fine.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    time::Duration,
};

use recoverd_common::{
    bundle::{Bootstrap, Bundle},
    seen::Seen,
};
use serde::Serialize;

use crate::{
    correlate::{Case, Init, Kind},
    facts::{
        Answer, Api, Connection, Filesystem, Gap, Instance, Look, Phase, Premises, Reply, Sandbox,
        TaskName, Unit, address_of, one_line,
    },
    findings::{Code, Finding, Severity, Subject},
};

/// How long containerd waits for each shim's answer at its start
/// (`io.containerd.timeout.shim.load`).
const LOAD: Duration = Duration::from_secs(5);
/// Less than this free, and not even the small files of a start can be written.
const LAST_BYTES: u64 = 1 << 20;
/// As [`LAST_BYTES`], in files.
const LAST_INODES: u64 = 64;

/// A release of containerd.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Release {
    major: u32,
    minor: u32,
    /// Not known when only `2.1` was said.
    patch: Option<u32>,
}

impl Release {
    /// From `2.1`, `1.7.24`, or what packages make of it: `v2.4.0-beta.0`, `1.7.24~ds1`.
    pub fn parse(text: &str) -> Option<Self> {
        let text = text.strip_prefix('v').unwrap_or(text);
        let end = text.find(|c: char| !c.is_ascii_digit() && c != '.');
        let (numbers, rest) = text.split_at(end.unwrap_or(text.len()));
        if !rest.is_empty() && !rest.starts_with(['-', '~', '+']) {
            return None;
        }
        let mut parts = numbers.split('.');
        let release = Self {
            major: parts.next()?.parse().ok()?,
            minor: parts.next()?.parse().ok()?,
            patch: parts.next().map(str::parse).transpose().ok()?,
        };
        parts.next().is_none().then_some(release)
    }

    /// As [`Release::parse`], for the command line.
    pub fn of_word(text: &str) -> Result<Self, String> {
        Self::parse(text).ok_or_else(|| "must be a release, such as 2.1 or 1.7.24".to_owned())
    }

    fn minor(self) -> (u32, u32) {
        (self.major, self.minor)
    }

    fn is_1_6(self) -> bool {
        self.minor() <= (1, 6)
    }

    fn is_1(self) -> bool {
        self.major <= 1
    }
}

impl fmt::Display for Release {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)?;
        match self.patch {
            Some(patch) => write!(f, ".{patch}"),
            None => Ok(()),
        }
    }
}

/// What a reason is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Check {
    /// A finding of the scan.
    Finding,
    /// The bundle itself.
    Bundle,
    /// The binary that containerd would run.
    ShimBinary,
    /// Where containerd would look for the shim.
    ShimAddress,
    /// Whether shim and containerd understand each other.
    Protocol,
    /// What the shim answers.
    ShimAnswer,
    /// How far the task is.
    Phase,
    /// The CRI's names of sandboxes.
    SandboxName,
    /// Sandboxes that a shim's sandbox service runs.
    ShimSandbox,
    /// The two releases.
    Hop,
    /// The systemd unit.
    Unit,
    /// The state folder's file system.
    StateFolder,
}

impl Check {
    /// The word.
    pub fn word(self) -> &'static str {
        match self {
            Check::Finding => "finding",
            Check::Bundle => "bundle",
            Check::ShimBinary => "shim-binary",
            Check::ShimAddress => "shim-address",
            Check::Protocol => "protocol",
            Check::ShimAnswer => "shim-answer",
            Check::Phase => "phase",
            Check::SandboxName => "sandbox-name",
            Check::ShimSandbox => "shim-sandbox",
            Check::Hop => "hop",
            Check::Unit => "unit",
            Check::StateFolder => "state-folder",
        }
    }
}

/// Why a start would not be harmless; of severity info when it is only worth knowing.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Reason {
    /// Critical: a workload is lost, or containerd does not start.
    pub severity: Severity,
    /// About what.
    pub check: Check,
    /// About whom: a task, an instance, a unit, a folder.
    pub subject: String,
    /// One line.
    pub why: String,
}

/// A containerd and the release that it is now and that is to start.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Hop {
    /// Which containerd.
    pub address: String,
    /// What runs now, as it says.
    pub from: Option<String>,
    /// What is to start.
    pub to: Option<String>,
}

/// What preflight found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Report {
    /// The containerds that were judged.
    pub instances: Vec<Hop>,
    /// Worst first.
    pub reasons: Vec<Reason>,
    /// What could not be seen.
    pub gaps: Vec<Gap>,
}

impl Report {
    /// Reasons against a start: those that are not only worth knowing.
    pub fn against(&self) -> usize {
        let against = |reason: &&Reason| match reason.severity {
            Severity::Critical | Severity::Warning => true,
            Severity::Info => false,
        };
        self.reasons.iter().filter(against).count()
    }

    /// 0 harmless, 1 reasons against, 3 could not see everything.
    pub fn exit_code(&self) -> u8 {
        match (self.gaps.is_empty(), self.against()) {
            (false, _) => 3,
            (true, 0) => 0,
            (true, _) => 1,
        }
    }
}

/// What is judged.
#[derive(Debug)]
pub struct Input<'a> {
    /// One look.
    pub look: &'a Look,
    /// Its tasks.
    pub cases: &'a [Case<'a>],
    /// What the scan finds in it.
    pub findings: &'a [Finding],
    /// What it could not see.
    pub gaps: &'a [Gap],
    /// The address of the only containerd to judge.
    pub only: Option<&'a str>,
    /// What only preflight looks at.
    pub premises: &'a Premises,
    /// The release that is to start; else the one that runs.
    pub to: Option<Release>,
    /// Percent from which on a file system is nearly full.
    pub run_full: u8,
}

/// Judges.
pub fn judge(input: &Input<'_>) -> Report {
    let mut judge = Judge {
        input,
        reasons: BTreeSet::new(),
        gaps: input.gaps.iter().cloned().collect(),
        told: told(input.findings),
    };
    if input.look.instances.is_empty() {
        judge.gap(
            "containerd",
            "none was found; name it with --address and --state",
        );
    }
    let mut hops = Vec::new();
    let mut latest = None;
    for (at, instance) in input.look.instances.iter().enumerate() {
        if input.only.is_some_and(|only| only != instance.address) {
            continue;
        }
        if judge.is_empty_place(at, instance) {
            continue;
        }
        let running = instance.api.up().map(|api| api.version.as_str());
        let from = running.and_then(Release::parse);
        let to = input.to.or(from);
        latest = latest.max(to);
        judge.hop(instance, running, from, to);
        judge.sandboxes(at, instance, to);
        judge.state_folder(instance);
        for case in input.cases.iter().filter(|case| case.instance == Some(at)) {
            if let Some(bundle) = case.bundle {
                judge.bundle(instance, case, bundle, to);
            }
        }
        hops.push(Hop {
            address: instance.address.clone(),
            from: running.map(str::to_owned),
            to: to.map(|release| release.to_string()),
        });
    }
    for finding in input.findings {
        judge.finding(finding, input.to.or(latest));
    }
    for (namespace, id) in &input.look.busy_verbs {
        let why = "its shim runs `start` or `delete` right now: wait until it is done";
        judge.add(Severity::Warning, Check::Phase, task(namespace, id), why);
    }
    for filesystem in &input.look.filesystems {
        judge.room(filesystem);
    }
    judge.unit(input.to.or(latest));
    Report {
        instances: hops,
        reasons: judge.reasons.into_iter().collect(),
        gaps: judge.gaps.into_iter().collect(),
    }
}

/// Tasks of which a finding already says that containerd's start ends them because of their shim.
fn told(findings: &[Finding]) -> BTreeSet<TaskName> {
    let ends = |code: Code| {
        matches!(
            code,
            Code::OrphanedTask | Code::UnresponsiveShim | Code::SocketMissing
        )
    };
    let named = |finding: &Finding| match &finding.subject {
        Subject::Task { namespace, id } => Some((namespace.clone(), id.clone())),
        Subject::Shim { .. } | Subject::Path { .. } => None,
    };
    let ending = findings.iter().filter(|finding| ends(finding.code));
    ending.filter_map(named).collect()
}

fn task(namespace: &str, id: &str) -> String {
    format!("{namespace}/{id}")
}

/// What would happen to a workload that may be alive.
#[derive(Debug, Clone, Copy)]
enum Fate {
    Killed,
    Dropped,
}

struct Judge<'a> {
    input: &'a Input<'a>,
    reasons: BTreeSet<Reason>,
    gaps: BTreeSet<Gap>,
    told: BTreeSet<TaskName>,
}

impl Judge<'_> {
    fn add(&mut self, severity: Severity, check: Check, subject: String, why: impl Into<String>) {
        self.reasons.insert(Reason {
            severity,
            check,
            subject: one_line(&subject),
            why: one_line(&why.into()),
        });
    }

    fn gap(&mut self, what: impl Into<String>, why: impl Into<String>) {
        self.gaps.insert(Gap::new(what, why));
    }

    /// One of several places of containerd at which none runs and nothing is left: no start of it
    /// can cost anything.
    fn is_empty_place(&self, at: usize, instance: &Instance) -> bool {
        let bundle = |case: &Case<'_>| case.instance == Some(at) && case.bundle.is_some();
        self.input.look.instances.len() > 1
            && self.input.only.is_none()
            && matches!(instance.api, Api::Down)
            && instance.daemon.is_none()
            && !self.input.cases.iter().any(bundle)
    }

    fn hop(
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

    fn sandboxes(&mut self, at: usize, instance: &Instance, to: Option<Release>) {
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

    fn state_folder(&mut self, instance: &Instance) {
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

    fn room(&mut self, filesystem: &Filesystem) {
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

    fn unit(&mut self, to: Option<Release>) {
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

    /// One bundle, as containerd goes through it at its start.
    fn bundle(
        &mut self,
        instance: &Instance,
        case: &Case<'_>,
        bundle: &Bundle,
        to: Option<Release>,
    ) {
        if bundle.empty {
            return self.lost(case, Check::Bundle, Fate::Dropped, "its bundle is empty");
        }
        if !self.shim_binary(instance, case, bundle) {
            return;
        }
        let Some(address) = self.shim_address(case, bundle, to) else {
            return;
        };
        let Some(answer) = self.input.look.answers.get(&address_of(&address)) else {
            let what = format!("the shim of {}", task(&case.name.0, &case.name.1));
            return self.gap(what, format!("{address} was not asked"));
        };
        if self.greeting(case, answer) {
            self.protocol(case, bundle, answer, to);
            self.phase(case, bundle, answer, to);
        }
    }

    /// Says that a workload would be lost, if there may be one and no finding says so already.
    fn lost(&mut self, case: &Case<'_>, check: Check, fate: Fate, because: &str) {
        if self.told.contains(&case.name) {
            return;
        }
        let subject = task(&case.name.0, &case.name.1);
        let fate = match fate {
            Fate::Killed => "containerd's start kills",
            Fate::Dropped => "containerd's start drops and no longer knows",
        };
        match living(case) {
            Life::Yes => {
                let why = format!("{because}: {fate} the workload");
                self.add(Severity::Critical, check, subject, why);
            }
            Life::CannotSay(unsure) => {
                let why = format!("{because}: {fate} the workload if it is alive ({unsure})");
                self.add(Severity::Critical, check, subject, why);
            }
            Life::No => {}
        }
    }

    /// Steps 2 and 3. False when containerd goes no further.
    fn shim_binary(&mut self, instance: &Instance, case: &Case<'_>, bundle: &Bundle) -> bool {
        let what = || format!("the shim binary of {}", task(&case.name.0, &case.name.1));
        let path = match &bundle.shim_binary {
            Seen::Present(path) if path.is_absolute() => path,
            // containerd looks such a name up in a PATH that only it knows.
            Seen::Present(path) => {
                self.gap(what(), format!("{} is no absolute path", path.display()));
                return true;
            }
            Seen::Absent => return self.container_record(instance, case),
            Seen::Unknown(why) => {
                self.gap(what(), format!("shim-binary-path: {why}"));
                return true;
            }
        };
        match self.input.premises.binaries.get(path) {
            Some(Seen::Present(true)) => true,
            Some(Seen::Present(false)) => {
                let why = format!(
                    "{} is not executable: containerd can neither clean up nor reap this task",
                    path.display()
                );
                let subject = task(&case.name.0, &case.name.1);
                self.add(Severity::Warning, Check::ShimBinary, subject, why);
                true
            }
            Some(Seen::Absent) => {
                let because = format!("its shim's binary {} is gone", path.display());
                self.lost(case, Check::ShimBinary, Fate::Dropped, &because);
                false
            }
            Some(Seen::Unknown(why)) => {
                let why = format!("{}: {why}", path.display());
                self.gap(what(), why);
                true
            }
            None => {
                self.gap(what(), format!("{} was not looked at", path.display()));
                true
            }
        }
    }

    /// Without `shim-binary-path` the container's record must name the runtime.
    fn container_record(&mut self, instance: &Instance, case: &Case<'_>) -> bool {
        match instance.api.up() {
            Some(api) if api.containers.contains_key(&case.name) => true,
            Some(_) => {
                let because = "its bundle has no shim-binary-path and containerd no record of \
                               the container";
                self.lost(case, Check::ShimBinary, Fate::Dropped, because);
                false
            }
            None => {
                let what = format!("the shim binary of {}", task(&case.name.0, &case.name.1));
                let why = "its bundle has no shim-binary-path, and whether containerd has a \
                           record of the container cannot be asked";
                self.gap(what, why);
                true
            }
        }
    }

    /// Step 4: the address that containerd would connect to.
    fn shim_address(
        &mut self,
        case: &Case<'_>,
        bundle: &Bundle,
        to: Option<Release>,
    ) -> Option<String> {
        match address(bundle, to) {
            Place::At(address) => Some(address),
            Place::None(because) => {
                self.lost(case, Check::ShimAddress, Fate::Killed, &because);
                None
            }
            Place::Unreadable(why) => {
                let subject = task(&case.name.0, &case.name.1);
                self.gap(format!("the shim's address of {subject}"), why.clone());
                // Root reads what containerd reads: what is no good for us is none for it.
                if self.input.look.host.root {
                    let because = format!("its shim's address cannot be read ({why})");
                    self.lost(case, Check::ShimAddress, Fate::Killed, &because);
                }
                None
            }
        }
    }

    /// Step 5: connect, and `Connect`. False when containerd goes no further.
    fn greeting(&mut self, case: &Case<'_>, answer: &Answer) -> bool {
        let unseen = |why: String| (None, Some(why));
        let (because, gap) = match &answer.connection {
            Connection::Refused => (Some("nobody listens on its shim's socket".into()), None),
            Connection::NoFile => (Some("its shim's socket is gone".into()), None),
            Connection::QueueFull => (
                Some("its shim has not accepted connections for long".into()),
                None,
            ),
            Connection::Failed(why) => unseen(format!("connect: {why}")),
            Connection::Made => match &answer.greeting {
                Reply::Said(_) => return true,
                Reply::Error(code, text) => (
                    Some(format!(
                        "its shim answers Connect with error {code}, {text}"
                    )),
                    None,
                ),
                Reply::Silent => (Some("its shim does not answer Connect".into()), None),
                Reply::Garbage(why) => (Some(format!("its shim speaks no ttrpc ({why})")), None),
                Reply::NotAsked => unseen("was not asked".into()),
            },
        };
        if let Some(because) = because {
            self.lost(case, Check::ShimAnswer, Fate::Killed, &because);
        }
        if let Some(why) = gap {
            let what = format!("the shim of {}", task(&case.name.0, &case.name.1));
            self.gap(what, why);
        }
        false
    }

    /// Whether the containerd that is to start and the shim speak the same task API.
    fn protocol(&mut self, case: &Case<'_>, bundle: &Bundle, answer: &Answer, to: Option<Release>) {
        let Some(to) = to else { return };
        let subject = task(&case.name.0, &case.name.1);
        let kind = case.kind();
        match (answer.api, kind) {
            // Serves both.
            (_, Some(Kind::Ours)) => {}
            (None, _) => self.gap(
                format!("the task API of {subject}"),
                "its shim did not say which it speaks",
            ),
            (Some(3), Some(Kind::Stock)) if to.is_1() => {
                let because = format!("its shim speaks task API 3 only, containerd {to} speaks 2");
                self.lost(case, Check::Protocol, Fate::Killed, &because);
            }
            (Some(3), Some(Kind::Foreign) | None) if to.is_1() => self.gap(
                format!("the task API of {subject}"),
                format!(
                    "its shim answers on version 3; whether also on 2, as {to} needs, is unknown"
                ),
            ),
            (Some(2), _) if no_downgrade(to) && bundle.api_version() == Some(3) => {
                let because = format!(
                    "bootstrap.json says task API 3, its shim speaks 2, and containerd {to} may \
                     not try the other (2.0.6 and later do)"
                );
                self.lost(case, Check::Protocol, Fate::Killed, &because);
            }
            (Some(_), _) => {}
        }
    }

    /// Step 7, and what the CRI does afterwards.
    fn phase(&mut self, case: &Case<'_>, bundle: &Bundle, answer: &Answer, to: Option<Release>) {
        const NOT_FOUND: i32 = 5;
        let subject = task(&case.name.0, &case.name.1);
        // A release that nobody named may be any: judged as the less forgiving ones.
        let asks_pids = !to.is_some_and(Release::is_1_6);
        let ours = case.kind() == Some(Kind::Ours);
        match answer.states.get(&case.name.1) {
            Some(Reply::Said(state)) => match state.phase {
                Phase::Running => {}
                Phase::Stopped if asks_pids && !ours => {
                    let why = format!(
                        "it has exited with status {} and was not deleted: containerd from 1.7 \
                         on deletes it at its start, and status and events are lost",
                        state.exit_status
                    );
                    self.add(Severity::Warning, Check::Phase, subject, why);
                }
                Phase::Stopped => {}
                Phase::Paused | Phase::Pausing => {
                    let why = "it is paused: if its shim hangs over the frozen cgroup when asked \
                               for pids, containerd from 1.7 on waits for it without end; resume \
                               it first";
                    self.add(Severity::Warning, Check::Phase, subject, why);
                }
                Phase::Created if is_cri(bundle) => {
                    let why = "it is created and not started: the CRI plugin ends such a \
                               container at its start";
                    self.add(Severity::Warning, Check::Phase, subject, why);
                }
                Phase::Created => {}
                Phase::Unknown => {
                    self.gap(format!("the phase of {subject}"), "its shim says unknown");
                }
            },
            Some(Reply::Error(NOT_FOUND, _)) if asks_pids => {
                let because = "its shim answers, but does not know the task";
                self.lost(case, Check::ShimAnswer, Fate::Killed, because);
            }
            // 1.6 takes any shim that answers Connect.
            Some(Reply::Error(NOT_FOUND, _)) => {}
            Some(Reply::Error(code, text)) => {
                let why = format!("its shim answers with error {code}, {text}");
                self.gap(format!("the phase of {subject}"), why);
            }
            Some(Reply::Silent) if asks_pids => {
                if !self.told.contains(&case.name) {
                    let why = "its shim answers Connect but not State: if it does not answer Pids \
                               either, containerd from 1.7 on never finishes its start";
                    self.add(Severity::Critical, Check::ShimAnswer, subject, why);
                }
            }
            Some(Reply::Silent | Reply::NotAsked | Reply::Garbage(_)) | None => {
                self.gap(format!("the phase of {subject}"), "its shim did not say");
            }
        }
    }

    fn finding(&mut self, finding: &Finding, to: Option<Release>) {
        let asks_pids = !to.is_some_and(Release::is_1_6);
        let effect = match finding.code {
            Code::OrphanedTask | Code::SocketMissing => {
                Some((Severity::Critical, "containerd's start kills the workload"))
            }
            Code::UnresponsiveShim => Some((
                Severity::Critical,
                "containerd's start waits 5 s for it, then kills the workload",
            )),
            Code::DuplicateWorkload => Some((
                Severity::Warning,
                "containerd knows one of the two at most; end the other one first",
            )),
            Code::StuckTask => Some((
                Severity::Warning,
                "containerd's start may drop it with its exit status",
            )),
            Code::ExitUnreported if asks_pids => Some((
                Severity::Warning,
                "containerd's start deletes it and its exit status is lost",
            )),
            // 1.6 asks the shim and keeps the status.
            Code::ExitUnreported => None,
            Code::UnreadableRecord => Some((
                Severity::Warning,
                "should its shim die, nobody can take over from this record",
            )),
            // Told with numbers by `room`.
            Code::RunNearlyFull => None,
            // A start changes nothing for these, or cleans them without anybody's loss.
            Code::TaskUnknownToContainerd
            | Code::LeakedShim
            | Code::OutdatedShim
            | Code::StaleBundle
            | Code::StaleSocket
            | Code::StaleRecord
            | Code::LeakedMount
            | Code::LeakedCgroup
            | Code::LeakedFifo
            | Code::LeakedRuncState
            | Code::LeakedExec
            | Code::BloatedShim
            | Code::Foreign => None,
        };
        if let Some((severity, effect)) = effect {
            let why = format!("{}: {effect}", finding.code.word());
            self.add(severity, Check::Finding, finding.subject.text(), why);
        }
    }
}

enum Life {
    Yes,
    No,
    CannotSay(String),
}

/// Whether a case has a workload that could be lost: the kernel's word, and for shims that are
/// not runc's the shim's.
fn living(case: &Case<'_>) -> Life {
    match &case.init {
        Init::Alive(_) => Life::Yes,
        Init::Dead(..) => Life::No,
        Init::Unknown(why) => Life::CannotSay(why.clone()),
        Init::None => match case.state().map(|state| state.phase) {
            Some(Phase::Created | Phase::Running | Phase::Paused | Phase::Pausing) => Life::Yes,
            Some(Phase::Stopped) => Life::No,
            Some(Phase::Unknown) => Life::CannotSay("its shim says unknown".into()),
            // Neither runc nor a shim knows a process: nothing was created yet, or all is gone.
            None if case.shim.process().is_none() => Life::No,
            None => Life::CannotSay("nothing names its init".into()),
        },
    }
}

/// Where containerd would look for a shim.
enum Place {
    At(String),
    None(String),
    Unreadable(String),
}

/// The address that a release reads in a bundle. Without a release, what any would find.
fn address(bundle: &Bundle, to: Option<Release>) -> Place {
    let text = |release: &str| match &bundle.address {
        Seen::Present(text) if text.is_empty() => Place::None("its file address is empty".into()),
        Seen::Present(text) => Place::At(text.clone()),
        Seen::Absent => Place::None(format!(
            "its bundle has no file address, which containerd {release} needs"
        )),
        Seen::Unknown(why) => Place::Unreadable(format!("address: {why}")),
    };
    let Some(to) = to else {
        return match bundle.socket_address() {
            Some(address) => Place::At(address),
            None => match (&bundle.address, &bundle.bootstrap) {
                (Seen::Unknown(why), _) | (_, Seen::Unknown(why)) => Place::Unreadable(why.clone()),
                (Seen::Absent | Seen::Present(_), Seen::Absent | Seen::Present(_)) => {
                    Place::None("its bundle does not say where its shim listens".into())
                }
            },
        };
    };
    let json = |text: &str| serde_json::from_str::<Bootstrap>(text).ok();
    let release = to.to_string();
    if !to.is_1() {
        return match &bundle.bootstrap {
            Seen::Present(bootstrap) if bootstrap.address.is_empty() => {
                Place::None("its bootstrap.json names no address".into())
            }
            Seen::Present(bootstrap) => Place::At(bootstrap.address.clone()),
            Seen::Absent => match text(&release) {
                Place::At(text) if json(&text).is_some() => Place::None(format!(
                    "its file address holds JSON, which containerd {to} takes for a name"
                )),
                other => other,
            },
            Seen::Unknown(why) => Place::Unreadable(format!("bootstrap.json: {why}")),
        };
    }
    match text(&release) {
        Place::At(text) => match json(&text) {
            Some(_) if to.is_1_6() => Place::None(format!(
                "its file address holds JSON, which containerd {to} takes for a name"
            )),
            Some(json) if json.version > 2 => Place::None(format!(
                "its file address says version {}, which containerd {to} refuses",
                json.version
            )),
            Some(json) if json.address.is_empty() => {
                Place::None("its file address names no address".into())
            }
            Some(json) => Place::At(json.address),
            None => Place::At(text),
        },
        other => other,
    }
}

/// 2.0.0 to 2.0.5 do not try task API 2 when 3 is not served.
fn no_downgrade(to: Release) -> bool {
    to.minor() == (2, 0) && to.patch.is_none_or(|patch| patch < 6)
}

/// The container was made by the CRI plugin.
fn is_cri(bundle: &Bundle) -> bool {
    bundle.config.present().is_some_and(|config| {
        config
            .annotations
            .contains_key("io.kubernetes.cri.container-type")
    })
}

/// Why containerd does not support going from one release to the other.
fn unsupported(from: Release, to: Release) -> Option<String> {
    let next = match from.minor() {
        (1, minor @ 0..=6) => vec![(1, minor + 1)],
        // Long-term releases, one to the next.
        (1, 7) => vec![(2, 0), (2, 3)],
        (2, minor) => vec![(2, minor.saturating_add(1))],
        _ => Vec::new(),
    };
    if from.minor() == to.minor() || next.contains(&to.minor()) {
        return None;
    }
    if to.minor() < from.minor() {
        return Some(format!(
            "going back from {from} to {to} is not supported by containerd; its database and \
             what newer shims left in their bundles may not be understood"
        ));
    }
    let allowed: Vec<String> = next.iter().map(|(a, b)| format!("{a}.{b}")).collect();
    Some(match allowed.is_empty() {
        true => format!("the way from {from} to {to} is not known to this recoverd"),
        false => format!(
            "containerd supports going from {from} to {} only, not to {to}",
            allowed.join(" or ")
        ),
    })
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

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;
    use crate::{
        correlate::{Known, ShimOf},
        facts::{
            ApiFacts, ContainerdTask, Shim,
            fixture::{self, BINARY, C1, SOCKET, mount, process},
        },
    };

    /// One healthy task of one containerd; tests break one thing each.
    struct Node {
        look: Look,
        bundle: Bundle,
        init: Init,
        shim: Shim,
        premises: Premises,
        findings: Vec<Finding>,
        to: Option<Release>,
    }

    fn release(text: &str) -> Release {
        Release::parse(text).unwrap()
    }

    fn answer(api: u8, phase: Phase) -> Answer {
        Answer {
            api: Some(api),
            ..fixture::answer(&C1, phase)
        }
    }

    fn shim(name: &str) -> Shim {
        Shim {
            name: name.into(),
            ..fixture::shim(&C1)
        }
    }

    impl Node {
        /// A task of containerd 1.7 whose shim left both files, as ours does.
        fn new() -> Self {
            let mut look = fixture::empty();
            look.api(0).containers.insert(C1.name(), Default::default());
            look.answers
                .insert(SOCKET.into(), answer(2, Phase::Running));
            let premises = Premises {
                unit: Seen::Present(Unit {
                    name: "containerd.service".into(),
                    load_state: "loaded".into(),
                    kill_mode: "process".into(),
                    delegate: true,
                    start_timeout: Some(Duration::from_secs(90)),
                    main_pid: Some(5),
                }),
                binaries: BTreeMap::from([(BINARY.into(), Seen::Present(true))]),
                sandboxes: vec![Seen::Absent],
                shim_sandboxes: vec![Seen::Absent],
                cpus: 2,
            };
            Self {
                look,
                bundle: fixture::bundle(&C1),
                init: Init::Alive(process(C1.init, fixture::OLD)),
                shim: shim("containerd-shim-runc-v2"),
                premises,
                findings: Vec::new(),
                to: None,
            }
        }

        fn api(&mut self) -> &mut ApiFacts {
            self.look.api(0)
        }

        fn unit(&mut self) -> &mut Unit {
            match &mut self.premises.unit {
                Seen::Present(unit) => unit,
                Seen::Absent | Seen::Unknown(_) => panic!("is there"),
            }
        }

        fn answer(&mut self) -> &mut Answer {
            self.look.answers.get_mut(SOCKET).unwrap()
        }

        fn report(&self) -> Report {
            self.report_of(1)
        }

        /// With so many tasks alike.
        fn report_of(&self, count: usize) -> Report {
            let case = || Case {
                written: None,
                name: ("default".into(), "c1".into()),
                instance: Some(0),
                bundle: Some(&self.bundle),
                runc: None,
                init: self.init.clone(),
                address: Some(SOCKET.into()),
                shim: ShimOf::Lives(&self.shim),
                answer: self.look.answers.get(SOCKET),
                cgroup: None,
                containerd: Known::CannotSay,
                pod: None,
            };
            let cases: Vec<Case<'_>> = (0..count).map(|_| case()).collect();
            judge(&Input {
                look: &self.look,
                cases: &cases,
                findings: &self.findings,
                gaps: &self.look.gaps,
                only: None,
                premises: &self.premises,
                to: self.to,
                run_full: 90,
            })
        }
    }

    type Break = fn(&mut Node);

    #[test]
    fn a_healthy_node_is_harmless() {
        let report = Node::new().report();
        assert_eq!(report.reasons, []);
        assert_eq!(report.gaps, []);
        assert_eq!(report.exit_code(), 0);
        assert_eq!(report.instances[0].to.as_deref(), Some("1.7.24"));
    }

    #[test]
    fn every_way_to_lose_a_workload_is_a_reason_with_its_check() {
        use Check::*;
        let rows: &[(&str, Check, Severity, Break)] = &[
            ("shim binary gone", ShimBinary, Severity::Critical, |n| {
                n.premises.binaries.insert(BINARY.into(), Seen::Absent);
            }),
            (
                "shim binary not executable",
                ShimBinary,
                Severity::Warning,
                |n| {
                    n.premises
                        .binaries
                        .insert(BINARY.into(), Seen::Present(false));
                },
            ),
            (
                "no shim-binary-path and no record",
                ShimBinary,
                Severity::Critical,
                |n| {
                    n.bundle.shim_binary = Seen::Absent;
                    n.api().containers.clear();
                },
            ),
            ("empty bundle", Bundle, Severity::Critical, |n| {
                n.bundle.empty = true
            }),
            (
                "no address file for 1.7",
                ShimAddress,
                Severity::Critical,
                |n| {
                    n.bundle.address = Seen::Absent;
                },
            ),
            (
                "neither file for 2.1",
                ShimAddress,
                Severity::Critical,
                |n| {
                    n.bundle.address = Seen::Absent;
                    n.bundle.bootstrap = Seen::Absent;
                    n.to = Some(release("2.0.6"));
                },
            ),
            ("empty address", ShimAddress, Severity::Critical, |n| {
                n.bundle.address = Seen::Present(String::new());
            }),
            (
                "JSON of version 3 in address",
                ShimAddress,
                Severity::Critical,
                |n| {
                    let text = format!(r#"{{"version":3,"address":"unix://{SOCKET}"}}"#);
                    n.bundle.address = Seen::Present(text);
                },
            ),
            (
                "any JSON in address for 1.6",
                ShimAddress,
                Severity::Critical,
                |n| {
                    let text = format!(r#"{{"version":2,"address":"unix://{SOCKET}"}}"#);
                    n.bundle.address = Seen::Present(text);
                    n.api().version = "1.6.20".into();
                },
            ),
            (
                "v3-only shim under 1.7",
                Protocol,
                Severity::Critical,
                |n| {
                    n.answer().api = Some(3);
                },
            ),
            (
                "wrong bootstrap.json under 2.0.5",
                Protocol,
                Severity::Critical,
                |n| {
                    if let Seen::Present(bootstrap) = &mut n.bundle.bootstrap {
                        bootstrap.version = 3;
                    }
                    n.to = Some(release("2.0.5"));
                },
            ),
            ("nobody listens", ShimAnswer, Severity::Critical, |n| {
                n.answer().connection = Connection::Refused;
            }),
            ("socket gone", ShimAnswer, Severity::Critical, |n| {
                n.answer().connection = Connection::NoFile;
            }),
            ("queue full", ShimAnswer, Severity::Critical, |n| {
                n.answer().connection = Connection::QueueFull;
            }),
            ("Connect silent", ShimAnswer, Severity::Critical, |n| {
                n.answer().greeting = Reply::Silent;
            }),
            ("Connect refused", ShimAnswer, Severity::Critical, |n| {
                n.answer().greeting = Reply::Error(2, "no".into());
            }),
            ("garbage", ShimAnswer, Severity::Critical, |n| {
                n.answer().greeting = Reply::Garbage("x".into());
            }),
            ("State silent", ShimAnswer, Severity::Critical, |n| {
                n.answer().states.insert("c1".into(), Reply::Silent);
            }),
            ("State not found", ShimAnswer, Severity::Critical, |n| {
                n.answer()
                    .states
                    .insert("c1".into(), Reply::Error(5, "none".into()));
            }),
            (
                "maybe alive counts as alive",
                ShimAnswer,
                Severity::Critical,
                |n| {
                    n.init = Init::Unknown("hidden".into());
                    n.answer().connection = Connection::Refused;
                },
            ),
            ("paused", Phase, Severity::Warning, |n| {
                *n.answer() = answer(2, super::Phase::Paused);
            }),
            ("stopped", Phase, Severity::Warning, |n| {
                *n.answer() = answer(2, super::Phase::Stopped);
                n.init = Init::Dead(None, "gone".into());
            }),
            ("busy", Phase, Severity::Warning, |n| {
                n.look.busy_verbs.insert(("default".into(), "c2".into()));
            }),
            ("orphaned", Finding, Severity::Critical, |n| {
                n.findings.push(finding(Code::OrphanedTask));
            }),
            ("exit unreported", Finding, Severity::Warning, |n| {
                n.findings.push(finding(Code::ExitUnreported));
            }),
            (
                "same sandbox name twice",
                SandboxName,
                Severity::Critical,
                |n| {
                    n.premises.sandboxes = vec![Seen::Present(vec![sandbox("a"), sandbox("b")])];
                    for id in ["a", "b"] {
                        let task = ContainerdTask {
                            phase: super::Phase::Running,
                            pid: 7,
                        };
                        let tasks = n.api().tasks.as_mut().unwrap();
                        tasks.insert(("k8s.io".into(), id.into()), task);
                    }
                },
            ),
            ("sandbox without task", SandboxName, Severity::Info, |n| {
                n.premises.sandboxes = vec![Seen::Present(vec![sandbox("a")])];
            }),
            (
                "shim sandboxes under 2.0",
                ShimSandbox,
                Severity::Critical,
                |n| {
                    n.premises.shim_sandboxes = vec![Seen::Present(1)];
                    n.to = Some(release("2.0.11"));
                },
            ),
            ("skips a minor", Hop, Severity::Warning, |n| {
                n.to = Some(release("2.1"))
            }),
            ("KillMode=mixed", Unit, Severity::Critical, |n| {
                n.unit().kill_mode = "mixed".into();
            }),
            ("KillMode=none", Unit, Severity::Warning, |n| {
                n.unit().kill_mode = "none".into()
            }),
            ("Delegate off", Unit, Severity::Warning, |n| {
                n.unit().delegate = false
            }),
            ("disk", StateFolder, Severity::Info, |n| {
                n.look.mounts = Seen::Present(vec![mount("/", "ext4")]);
            }),
            ("nearly full", StateFolder, Severity::Warning, |n| {
                n.look.filesystems[0].bytes = (100 << 20, 10 << 20);
            }),
            ("no inodes", StateFolder, Severity::Critical, |n| {
                n.look.filesystems[0].inodes = (1000, 3);
            }),
        ];
        for (what, check, severity, breaks) in rows {
            let mut node = Node::new();
            breaks(&mut node);
            let report = node.report();
            let found = |r: &&Reason| r.check == *check && r.severity == *severity;
            assert!(
                report.reasons.iter().any(|r| found(&r)),
                "{what}: {report:?}"
            );
            assert_eq!(report.reasons.len(), 1, "{what}: {report:?}");
            assert_eq!(report.gaps, [], "{what}");
            let expected = u8::from(*severity != Severity::Info);
            assert_eq!(report.exit_code(), expected, "{what}");
        }
    }

    #[test]
    fn what_cannot_be_seen_is_never_harmless() {
        let rows: &[(&str, Break)] = &[
            ("containerd is down", |n| {
                n.look.instances[0].api = Api::Down
            }),
            ("no containerd", |n| n.look.instances.clear()),
            ("odd release", |n| n.api().version = "unknown".into()),
            ("state folder", |n| n.look.instances[0].state = None),
            ("shim binary not looked at", |n| n.premises.binaries.clear()),
            ("shim binary hidden", |n| {
                let hidden = Seen::Unknown("hidden".into());
                n.premises.binaries.insert(BINARY.into(), hidden);
            }),
            ("shim binary relative", |n| {
                n.bundle.shim_binary = Seen::Present("shim".into())
            }),
            ("shim-binary-path hidden", |n| {
                n.bundle.shim_binary = Seen::Unknown("hidden".into());
            }),
            ("address hidden", |n| {
                n.look.host.root = false;
                n.bundle.address = Seen::Unknown("hidden".into());
            }),
            ("not asked", |n| n.look.answers.clear()),
            ("not connected", |n| {
                n.answer().connection = Connection::Failed("EPERM".into())
            }),
            ("not greeted", |n| n.answer().greeting = Reply::NotAsked),
            ("api", |n| n.answer().api = None),
            ("state not asked", |n| n.answer().states.clear()),
            ("state unknown", |n| {
                *n.answer() = answer(2, super::Phase::Unknown)
            }),
            ("foreign shim on version 3", |n| {
                n.shim = shim("containerd-shim-kata-v2");
                n.answer().api = Some(3);
            }),
            ("sandboxes", |n| {
                n.premises.sandboxes = vec![Seen::Unknown("hidden".into())]
            }),
            ("sandboxes not asked", |n| n.premises.sandboxes.clear()),
            ("shim sandboxes", |n| {
                n.premises.shim_sandboxes = vec![Seen::Unknown("hidden".into())];
                n.to = Some(release("2.0"));
            }),
            ("unit", |n| n.premises.unit = Seen::Unknown("hidden".into())),
            ("unit not found", |n| {
                n.unit().load_state = "not-found".into()
            }),
            ("KillMode", |n| n.unit().kill_mode = "new".into()),
            ("the look's own gaps", |n| {
                n.look.gaps.push(super::Gap::new("mounts", "hidden"));
            }),
        ];
        for (what, hides) in rows {
            let mut node = Node::new();
            hides(&mut node);
            let report = node.report();
            assert_eq!(report.exit_code(), 3, "{what}: {report:?}");
        }
    }

    #[test]
    fn what_costs_nobody_anything_is_no_reason() {
        let rows: &[(&str, Break)] = &[
            ("a dead bundle", |n| {
                n.init = Init::Dead(None, "gone".into());
                n.answer().connection = Connection::Refused;
            }),
            ("a stopped task under 1.6", |n| {
                n.api().version = "1.6.20".into();
                *n.answer() = answer(2, super::Phase::Stopped);
                n.init = Init::Dead(None, "gone".into());
                n.findings.push(finding(Code::ExitUnreported));
            }),
            ("a stopped task of our shim", |n| {
                n.shim = shim("containerd-shim-recoverd-v1");
                *n.answer() = answer(2, super::Phase::Stopped);
            }),
            ("our shim on version 3, going back to 1.7", |n| {
                n.shim = shim("containerd-shim-recoverd-v1");
                n.answer().api = Some(3);
            }),
            ("no shim-binary-path, but a record", |n| {
                n.bundle.shim_binary = Seen::Absent
            }),
            ("bootstrap.json only, for 2.x", |n| {
                n.bundle.address = Seen::Absent;
                n.answer().api = Some(3);
                n.api().version = "2.1.9".into();
            }),
            ("address only, for 2.x", |n| {
                n.bundle.bootstrap = Seen::Absent;
                n.api().version = "2.1.9".into();
            }),
            ("no systemd", |n| n.premises.unit = Seen::Absent),
            ("an outdated shim", |n| {
                n.findings.push(finding(Code::OutdatedShim))
            }),
            ("the next long-term release", |n| {
                n.to = Some(release("2.3"))
            }),
            ("endless start", |n| n.unit().start_timeout = None),
            ("a place where no containerd is any more", |n| {
                let gone = Instance {
                    address: "/run/docker/containerd/containerd.sock".into(),
                    daemon: None,
                    api: Api::Down,
                    ..n.look.instances[0].clone()
                };
                n.look.instances.push(gone);
            }),
        ];
        for (what, changes) in rows {
            let mut node = Node::new();
            changes(&mut node);
            let report = node.report();
            assert_eq!(report.exit_code(), 0, "{what}: {report:?}");
        }
    }

    #[test]
    fn a_task_that_a_finding_names_is_told_once() {
        let mut node = Node::new();
        node.answer().greeting = Reply::Silent;
        node.findings.push(finding(Code::UnresponsiveShim));
        let report = node.report();
        assert_eq!(report.reasons.len(), 1, "{report:?}");
        assert_eq!(report.reasons[0].check, Check::Finding);
    }

    #[test]
    fn hung_shims_must_fit_into_the_start_timeout() {
        let mut node = Node::new();
        node.answer().greeting = Reply::Silent;
        node.findings.push(finding(Code::UnresponsiveShim));
        let too_many = |node: &Node, count| {
            let report = node.report_of(count);
            report.reasons.iter().any(|r| r.check == Check::Unit)
        };
        assert!(!too_many(&node, 17) && too_many(&node, 18));
        node.to = Some(release("2.1"));
        assert!(too_many(&node, 18));
        // Two processors: half the time.
        node.to = Some(release("2.2"));
        assert!(!too_many(&node, 34) && too_many(&node, 35));
        node.unit().start_timeout = None;
        assert!(!too_many(&node, 10_000));
    }

    #[test]
    fn releases_are_read_as_packages_write_them() {
        for (text, release) in [
            ("2.1", Some((2, 1, None))),
            ("1.7.24", Some((1, 7, Some(24)))),
            ("v2.4.0-beta.0", Some((2, 4, Some(0)))),
            ("1.6.20~ds1", Some((1, 6, Some(20)))),
            ("1.7.24+unknown", Some((1, 7, Some(24)))),
            ("2", None),
            ("", None),
            ("2.", None),
            ("2.1.", None),
            ("2.1.0.1", None),
            ("2.1 beta", None),
            ("two.one", None),
            ("99999999999.1", None),
        ] {
            let read = Release::parse(text).map(|r| (r.major, r.minor, r.patch));
            assert_eq!(read, release, "{text:?}");
        }
    }

    #[test]
    fn hops_are_supported_from_minor_to_minor_and_between_long_term_releases() {
        for (from, to, word) in [
            ("1.6.20", "1.6.39", None),
            ("1.6.39", "1.6.20", None),
            ("1.6", "1.7", None),
            ("1.7.24", "2.0.11", None),
            ("1.7", "2.3", None),
            ("2.0", "2.1", None),
            ("2.3", "2.4", None),
            ("1.6", "2.0", Some("to 1.7 only")),
            ("1.7", "2.1", Some("2.0 or 2.3 only")),
            ("2.0", "2.3", Some("2.1 only")),
            ("2.1", "1.7", Some("going back")),
            ("3.0", "3.1", Some("not known")),
            ("2.4", "3.0", Some("2.5 only")),
        ] {
            let said = unsupported(release(from), release(to));
            match word {
                None => assert_eq!(said, None, "{from} to {to}"),
                Some(word) => assert!(said.unwrap().contains(word), "{from} to {to}"),
            }
        }
    }

    #[test]
    fn what_a_hostile_bundle_says_stays_one_line() {
        let mut node = Node::new();
        let path = PathBuf::from("/x\u{1b}[31m\ny");
        node.bundle.shim_binary = Seen::Present(path.clone());
        node.premises.binaries.insert(path, Seen::Absent);
        let report = node.report();
        assert!(!report.reasons[0].why.contains(char::is_control));
        node.answer().greeting = Reply::Error(2, "x\n".repeat(1 << 20));
        node.bundle.shim_binary = Seen::Present(BINARY.into());
        assert!(node.report().reasons[0].why.len() < 4200);
    }

    fn finding(code: Code) -> Finding {
        Finding {
            code,
            severity: code.severity(),
            subject: Subject::Task {
                namespace: "default".into(),
                id: "c1".into(),
            },
            evidence: Vec::new(),
            action: String::new(),
        }
    }

    fn sandbox(id: &str) -> Sandbox {
        Sandbox {
            id: id.into(),
            name: "web_default_9f_0".into(),
        }
    }
}

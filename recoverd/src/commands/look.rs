//! What every command that looks does first: turn flags and configuration into a plan, look, and
//! narrow.

use std::{io::Write as _, path::PathBuf, time::Duration};

use recoverd_common::ids::{Id, Namespace};

use crate::{
    Failure,
    classify::Settings,
    cli::Global,
    config::Config,
    correlate::Case,
    facts::TaskName,
    observe::{Limits, NamedInstance, Plan, Roots},
    report::{Narrow, Report, progress::Progress},
    verify::{self, Again, Examined},
};

/// Where and how long to look.
pub fn plan(global: &Global, config: &Config) -> Plan {
    let mut named = Vec::new();
    if names_one(global) {
        named.push(NamedInstance {
            address: global.address.clone(),
            state: global.state.clone(),
            root: global.root.clone(),
            source: "command line".into(),
        });
    }
    named.extend(config.containerd.iter().map(|c| NamedInstance {
        address: Some(PathBuf::from(&c.address)),
        state: c.state.clone(),
        root: c.root.clone(),
        source: "recoverd's configuration".into(),
    }));
    Plan {
        roots: Roots {
            proc: config.proc.clone(),
            cgroup: config.cgroup.clone(),
            socket_dir: config.socket_dir.clone(),
            runc_root: config.runc_root.clone(),
            fifo_dir: config.fifo_dir.clone(),
            run_dir: config.run_dir.clone(),
        },
        named,
        limits: Limits {
            shim_deadline: config.scan.shim_deadline,
            budget: config.scan.budget,
            run_full: u64::from(config.scan.run_full),
        },
    }
}

/// The same for a command that acts on one containerd: the one that the flags name, or the default
/// one. With its address.
pub fn plan_of_one(global: &Global, config: &Config) -> (Plan, String) {
    let mut plan = plan(global, config);
    if !names_one(global) {
        let default = NamedInstance {
            source: "default".into(),
            ..NamedInstance::default()
        };
        plan.named.insert(0, default);
    }
    let first = plan.named.first();
    let address = first.map_or_else(String::new, NamedInstance::address_or_default);
    (plan, address)
}

/// Whether the flags narrow everything to one containerd.
fn names_one(global: &Global) -> bool {
    global.address.is_some() || global.state.is_some() || global.root.is_some()
}

/// Ages and limits that decide.
pub fn settings(config: &Config) -> Settings {
    Settings {
        min_age: config.scan.min_age,
        settle: config.scan.settle,
        run_full: u64::from(config.scan.run_full),
    }
}

/// What the flags narrow the report to.
pub fn narrow(global: &Global, plan: &Plan) -> Narrow {
    Narrow {
        // The command line's own instance is the first that is named.
        address: plan
            .named
            .first()
            .filter(|_| names_one(global))
            .map(NamedInstance::address_or_default),
        namespace: global.namespace.clone(),
    }
}

/// Threads for asking many at once while reading.
pub fn runtime() -> Result<tokio::runtime::Runtime, Failure> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|error| Failure::Blind(format!("start threads: {error}")))
}

/// Looks at the node.
pub fn examine(plan: &Plan, config: &Config) -> Result<Examined, Failure> {
    Ok(examine_in(&runtime()?, plan, config))
}

/// As [`examine`], for a command that asks more afterwards.
pub fn examine_in(runtime: &tokio::runtime::Runtime, plan: &Plan, config: &Config) -> Examined {
    give_up_after(config.scan.budget + config.scan.settle + STUCK);
    examine_again(runtime, plan, config, Again::All)
}

/// As [`examine_in`], for a command that wants another look at little or nothing.
pub fn examine_once(
    runtime: &tokio::runtime::Runtime,
    plan: &Plan,
    config: &Config,
    again: Again,
) -> Examined {
    give_up_after(config.scan.budget + STUCK);
    examine_again(runtime, plan, config, again)
}

/// Looks, without a word on how long that may take: the caller watches over it.
pub fn examine_again(
    runtime: &tokio::runtime::Runtime,
    plan: &Plan,
    config: &Config,
    again: Again,
) -> Examined {
    raise_descriptor_limit();
    runtime.block_on(async {
        let progress = Progress::start();
        let tell = |stage: &str| {
            tracing::info!("looking at {stage}");
            progress.stage(stage);
        };
        let settings = settings(config);
        verify::examine(plan, &settings, config.scan.second_look, again, &tell).await
    })
}

/// Beyond the time that a look may take, this much more means that it will never end.
const STUCK: Duration = Duration::from_secs(30);

/// Ends this process if the look never ends: a read of `/proc` waits for ever where a process hangs
/// in the kernel, and such nodes are what a look is for. A thread in that state cannot be stopped.
fn give_up_after(limit: Duration) {
    std::thread::spawn(move || {
        std::thread::sleep(limit);
        let seconds = limit.as_secs();
        let _ = writeln!(
            std::io::stderr(),
            "recoverd: gave up after {seconds} s: a read of the host does not return (look for processes in state D)"
        );
        std::process::exit(3);
    });
}

/// `NS/ID`, as it is typed.
pub fn task_name(text: &str) -> Result<TaskName, Failure> {
    let refuse = |why: &str| Failure::Usage(format!("{text:?} is no task: {why}"));
    let (namespace, id) = text
        .split_once('/')
        .ok_or_else(|| refuse("write NAMESPACE/ID"))?;
    let namespace = Namespace::new(namespace).map_err(|e| refuse(&e.to_string()))?;
    let id = Id::new(id).map_err(|e| refuse(&e.to_string()))?;
    Ok((namespace.into(), id.into()))
}

/// The cases of that name: one, or one for each containerd that has a task of that name.
pub fn cases_named<'a>(report: &Report<'a>, name: &TaskName) -> Result<Vec<&'a Case<'a>>, Failure> {
    let found: Vec<&Case<'_>> = report
        .cases
        .iter()
        .copied()
        .filter(|case| case.name == *name)
        .collect();
    if !found.is_empty() {
        return Ok(found);
    }
    let what = format!(
        "no bundle, shim, runc or containerd knows a task {}/{}",
        name.0, name.1
    );
    Err(if report.gaps.is_empty() {
        Failure::Usage(what)
    } else {
        Failure::Blind(format!("{what}, and not everything could be seen"))
    })
}

/// Every shim that is asked takes a descriptor, and a login shell's limit is 1,024.
fn raise_descriptor_limit() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    // With the limit as it is, fewer are asked at once than would fit: no error.
    if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE)
        && soft < hard.min(4096)
    {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard.min(4096), hard);
    }
}

//! What every command that looks does first: turn flags and configuration into a plan, look, and
//! narrow.

use std::path::PathBuf;

use crate::{
    Failure,
    classify::Settings,
    cli::Global,
    config::Config,
    observe::{Limits, NamedInstance, Plan, Roots},
    report::{Narrow, progress::Progress},
    verify::{self, Examined},
};

/// Where and how long to look.
pub fn plan(global: &Global, config: &Config) -> Plan {
    let mut named = Vec::new();
    if global.address.is_some() || global.state.is_some() || global.root.is_some() {
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
        },
        named,
        limits: Limits {
            shim_deadline: config.scan.shim_deadline,
            budget: config.scan.budget,
            run_full: u64::from(config.scan.run_full),
        },
    }
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
    let instance = global.address.is_some() || global.state.is_some() || global.root.is_some();
    Narrow {
        // The command line's own instance is the first that is named.
        address: plan
            .named
            .first()
            .filter(|_| instance)
            .map(crate::observe::NamedInstance::address_or_default),
        namespace: global.namespace.clone(),
    }
}

/// Looks at the node.
pub fn examine(plan: &Plan, config: &Config) -> Result<Examined, Failure> {
    raise_descriptor_limit();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|error| Failure::Blind(format!("start threads: {error}")))?;
    runtime.block_on(async {
        let progress = Progress::start();
        let tell = |stage: &str| progress.stage(stage);
        let settings = settings(config);
        Ok(verify::examine(plan, &settings, config.scan.second_look, &tell).await)
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

//! `recoverd supervise`: starts the daemon.

use nix::sys::resource::{Resource, getrlimit, setrlimit};

use super::look;
use crate::{
    Failure, Verdict,
    adopt::run::find_binary,
    cli::Global,
    config::Config,
    lock,
    supervise::{self, Setup},
};

/// Descriptors: some six for each task.
const DESCRIPTORS: u64 = 65_536;

/// Runs until it is asked to stop.
pub fn run(global: &Global, config: &Config) -> Result<Verdict, Failure> {
    let blind = |why: String| Failure::Blind(why);
    if !nix::unistd::geteuid().is_root() {
        return Err(blind("supervising needs root".into()));
    }
    let binary = find_binary(config.adopt.binary.as_deref()).map_err(blind)?;
    let taken = lock::take_named(&config.run_dir, "supervise.lock", "supervise");
    let _lock = taken.map_err(|refused| match refused {
        lock::Refused::Held { .. } => Failure::Held(refused.to_string()),
        lock::Refused::Failed { .. } => Failure::Blind(refused.to_string()),
    })?;
    // Successors get the limits that their predecessors had, from the record.
    if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
        let wanted = hard.min(DESCRIPTORS);
        if soft < wanted {
            let _ = setrlimit(Resource::RLIMIT_NOFILE, wanted, hard);
        }
    }
    let setup = Setup {
        plan: look::plan(global, config),
        run_dir: config.run_dir.clone(),
        history: config.history.clone(),
        binary,
        deadline: config.adopt.deadline,
        metrics_tcp: config.supervise.metrics_listen,
        textfile: config.supervise.textfile.clone(),
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(16)
        .build()
        .map_err(|error| blind(format!("start event loop: {error}")))?;
    let result = runtime.block_on(supervise::run(setup));
    // A shim that does not answer a question may hold a thread for two seconds.
    runtime.shutdown_background();
    result.map_err(|error| blind(format!("supervise: {error}")))?;
    Ok(Verdict::Clean)
}

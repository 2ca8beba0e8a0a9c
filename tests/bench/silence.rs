//! How long shims are silent: the measuring half of `tests/bench/upgrade` and `tests/bench/supervise`.
//! Runs on their host, as containerd would: on one connection to each shim, which stays.
//!
//!   bench-silence watch STOP ID       asks ID's shim until STOP exists: the longest answer, us
//!   bench-silence kill ID...          SIGKILLs all their shims at once, and asks on the same
//!                                     connections: the last successor's first answer, us

use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use recoverd_common::bundle::Bundle;
use recoverd_common::ids::{Id, Namespace};
use recoverd_common::seen::Seen;
use recoverd_common::shim_client::ShimClient;

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

const BUNDLES: &str = "/run/containerd/io.containerd.runtime.v2.task/bench";
const NAMESPACE: &str = "bench";
/// Nothing here takes so long.
const LONGEST: Duration = Duration::from_secs(120);
/// Between two questions: little beside what is measured, and enough to leave the shim its core.
const PAUSE: Duration = Duration::from_micros(200);

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    let took = match words.as_slice() {
        ["watch", stop, id] => watch(Path::new(stop), id),
        ["kill", ids @ ..] if !ids.is_empty() => kill_all(ids),
        _ => Err("arguments are watch STOP ID, or kill ID...".into()),
    };
    match took {
        Ok(took) => {
            println!("{}", took.as_micros());
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("bench-silence: {error}");
            ExitCode::FAILURE
        }
    }
}

fn connect(id: &str) -> Result<ShimClient> {
    let (namespace, name) = (Namespace::new(NAMESPACE)?, Id::new(id)?);
    let bundle = match Bundle::read(Path::new(BUNDLES).join(id), namespace, name) {
        Seen::Present(bundle) => bundle,
        other => return Err(format!("bundle of {id}: {other:?}").into()),
    };
    let address = bundle.socket_address().ok_or("no address")?;
    let socket = PathBuf::from(address.trim_start_matches("unix://"));
    Ok(ShimClient::connect(
        &socket,
        NAMESPACE,
        Instant::now() + LONGEST,
    )?)
}

fn watch(stop: &Path, id: &str) -> Result<Duration> {
    let mut client = connect(id)?;
    let mut longest = Duration::ZERO;
    while !stop.exists() {
        let began = Instant::now();
        client.connect_task(id)?;
        longest = longest.max(began.elapsed());
        thread::sleep(PAUSE);
    }
    Ok(longest)
}

fn kill_all(ids: &[&str]) -> Result<Duration> {
    let mut shims = Vec::new();
    for id in ids {
        let mut client = connect(id)?;
        let pid = client.connect_task(id)?.shim_pid;
        shims.push((*id, client, pid));
    }
    let ready = Barrier::new(shims.len().saturating_add(1));
    thread::scope(|scope| {
        let mut asking = Vec::new();
        let pids: Vec<u32> = shims.iter().map(|(_, _, pid)| *pid).collect();
        for (id, mut client, old) in shims {
            let ready = &ready;
            asking.push(scope.spawn(move || -> Result<Instant> {
                ready.wait();
                let new = client.connect_task(id)?.shim_pid;
                if new == old {
                    return Err(format!("{id} was answered by the shim that was killed").into());
                }
                Ok(Instant::now())
            }));
        }
        let began = Instant::now();
        let killed = pids
            .into_iter()
            .map(|pid| kill(Pid::from_raw(pid.cast_signed()), Signal::SIGKILL));
        let killed: nix::Result<()> = killed.collect();
        // Whatever came of it: they wait for this.
        ready.wait();
        killed?;
        let mut last = began;
        for answer in asking {
            let at = answer.join().map_err(|_| "a thread panicked")??;
            last = last.max(at);
        }
        Ok(last.duration_since(began))
    })
}

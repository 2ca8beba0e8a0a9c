//! Asks one shim to become another executable, and finds out what has become of it. Whom, is
//! decided in `decide`.

use std::{
    fs::{self, File},
    os::{fd::OwnedFd, unix::fs::MetadataExt},
    path::{Path, PathBuf},
    sync::mpsc::{self, RecvTimeoutError},
    thread,
    time::{Duration, Instant},
};

use recoverd_common::{
    failpoint,
    handoff::{SERVICE, UPGRADE, UpgradeRequest, UpgradeResponse},
    proc::Proc,
    record,
    shim_client::{CallError, ShimClient},
    witness,
};

use super::{Candidate, back};

/// A shim has so long to try the new executable and to serve as it; its own limit for the trial is
/// half of that.
const ANSWERS: Duration = Duration::from_secs(10);
/// How often a shim that is asked is looked at.
const LOOK: Duration = Duration::from_millis(10);
/// For a process that has closed its connections to be gone.
const ENDS: Duration = Duration::from_secs(2);
/// A new shim is asked this long after it said that it serves.
const VERIFY: Duration = Duration::from_secs(2);

/// What became of one shim.
#[derive(Debug)]
pub struct Outcome {
    /// Which.
    pub candidate: Candidate,
    /// What it was to become.
    pub to: PathBuf,
    /// What became of it.
    pub verdict: Verdict,
    /// How long it took.
    pub took: Duration,
}

/// What became of a shim.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// It serves as this version, in the same process.
    Upgraded(String),
    /// It runs that executable already.
    Current,
    /// It is as it was; why.
    Refused(String),
    /// The same, because the new executable is no good: it would be none for others either.
    Unfit(String),
    /// The new image died or hung; the old executable serves, as this process.
    CameBack(u32, String),
    /// It is not known to serve.
    Failed(String),
}

/// How to do it.
#[derive(Debug)]
pub struct How {
    /// Where processes are seen.
    pub proc: PathBuf,
}

/// Upgrades `candidate` to the executable at `to`.
pub fn run(candidate: Candidate, to: PathBuf, how: &How) -> Outcome {
    let began = Instant::now();
    let verdict = upgrade(&candidate, &to, how).unwrap_or_else(Verdict::Failed);
    tracing::info!(group = candidate.group, ?verdict, "upgraded");
    Outcome {
        candidate,
        to,
        verdict,
        took: began.elapsed(),
    }
}

/// What is needed to have the old image back.
struct Old {
    pid: i32,
    pidfd: OwnedFd,
    executable: File,
    kept: back::Kept,
}

fn upgrade(candidate: &Candidate, to: &Path, how: &How) -> Result<Verdict, String> {
    let Some(socket) = &candidate.socket else {
        let why = "its record cannot be read".to_owned();
        return Ok(Verdict::Refused(why));
    };
    let Some(old) = old(candidate, how)? else {
        return Ok(Verdict::Refused("it has ended".to_owned()));
    };
    if is_same(&old.executable, to) {
        // It may be an image that hung when whoever had asked for it was killed: that says nothing
        // about others.
        return Ok(match verify(candidate, socket) {
            Ok(()) => Verdict::Current,
            Err(why) => Verdict::Refused(format!("runs that executable already, but {why}")),
        });
    }
    failpoint!("upgrade.ask.before");
    let asked = ask_while_it_lives(candidate, socket, to, &old);
    failpoint!("upgrade.ask.after");
    match asked {
        Ok(version) => match verify(candidate, socket) {
            Ok(()) => Ok(Verdict::Upgraded(version)),
            Err(why) => Err(format!("says that it serves as {version}, but {why}")),
        },
        Err(CallError::Status { code, message }) => Ok(match code {
            recoverd_common::ttrpc::code::FAILED_PRECONDITION => Verdict::Unfit(message),
            recoverd_common::ttrpc::code::UNIMPLEMENTED => {
                let why = "this version of it cannot be upgraded in place".to_owned();
                Verdict::Refused(why)
            }
            _ => Verdict::Refused(message),
        }),
        Err(error) => {
            let closed = matches!(error, CallError::Closed);
            let (why, hung) = match gone(&old, closed, &how.proc) {
                Gone::Died => (format!("died of becoming {}", to.display()), None),
                Gone::Hung => {
                    tracing::warn!(pid = old.pid, to = %to.display(), "a new image does not serve");
                    let why = format!("did not serve as {} in time, and was ended", to.display());
                    (why, Some(process(candidate)))
                }
                Gone::No => return Err(format!("talk to it: {error}; nothing was done about it")),
            };
            let successor = back::start(candidate, socket, &old.executable, &old.kept, hung, how);
            let pid = successor.map_err(|e| format!("{why}; start the old one: {e}"))?;
            Ok(Verdict::CameBack(pid, why))
        }
    }
}

/// None: it is not there any more.
fn old(candidate: &Candidate, how: &How) -> Result<Option<Old>, String> {
    let proc = Proc::new(&how.proc);
    let pid = candidate.shim.pid;
    let Ok(pidfd) = witness::open(&proc, process(candidate)) else {
        return Ok(None);
    };
    let path = proc.path(pid, "exe");
    let executable = File::open(&path).map_err(|e| format!("open {}: {e}", path.display()))?;
    let kept = back::keep(&proc, pid, &pidfd);
    Ok((!witness::has_ended(&pidfd)).then_some(Old {
        pid,
        pidfd,
        executable,
        kept,
    }))
}

fn process(candidate: &Candidate) -> record::Process {
    record::Process {
        pid: candidate.shim.pid.unsigned_abs(),
        start_time: candidate.shim.start_time,
    }
}

fn is_same(executable: &File, path: &Path) -> bool {
    let id = |meta: fs::Metadata| (meta.dev(), meta.ino());
    let there = fs::metadata(path).map(id);
    let own = executable.metadata().map(id);
    matches!((there, own), (Ok(there), Ok(own)) if there == own)
}

/// Its end may not be the end of the connection: somebody may have kept that.
fn ask_while_it_lives(
    candidate: &Candidate,
    socket: &Path,
    to: &Path,
    old: &Old,
) -> Result<String, CallError> {
    let (tell, told) = mpsc::channel();
    let (socket, namespace) = (socket.to_owned(), candidate.namespace.clone());
    let to = to.to_owned();
    thread::spawn(move || {
        // Nobody may want to know any more.
        let _ = tell.send(ask(&socket, &namespace, &to));
    });
    loop {
        match told.recv_timeout(LOOK) {
            Ok(asked) => return asked,
            Err(RecvTimeoutError::Timeout) if !witness::has_ended(&old.pidfd) => {}
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
                return Err(CallError::Closed);
            }
        }
    }
}

fn ask(socket: &Path, namespace: &str, to: &Path) -> Result<String, CallError> {
    let mut client = ShimClient::connect(socket, namespace, Instant::now() + ANSWERS)?;
    let request = UpgradeRequest {
        executable: to.to_string_lossy().into_owned(),
    };
    let response: UpgradeResponse = client.call(SERVICE, UPGRADE, &request)?;
    Ok(response.version)
}

enum Gone {
    /// By itself.
    Died,
    /// The new image does not say that it serves.
    Hung,
    /// It is there, and still the old one.
    No,
}

/// What has become of a shim that gave no answer.
fn gone(old: &Old, closed: bool, proc: &Path) -> Gone {
    // One that is on its way has let go of its connections before.
    let longest = if closed { ENDS } else { Duration::ZERO };
    if witness::await_end(&old.pidfd, longest) {
        return Gone::Died;
    }
    let still_old = is_same(&old.executable, &Proc::new(proc).path(old.pid, "exe"));
    // One that has just ended has no executable to be looked at.
    match (witness::has_ended(&old.pidfd), still_old) {
        (true, _) => Gone::Died,
        (false, true) => Gone::No,
        (false, false) => Gone::Hung,
    }
}

/// Asks the new image what containerd may ask.
fn verify(candidate: &Candidate, socket: &Path) -> Result<(), String> {
    let said = |what: &str, error: CallError| format!("{what}: {error}");
    let mut client = ShimClient::connect(socket, &candidate.namespace, Instant::now() + VERIFY)
        .map_err(|error| said("connect", error))?;
    for (_, id) in &candidate.tasks {
        let greeting = client
            .connect_task(id)
            .map_err(|error| said(&format!("Connect of {id}"), error))?;
        if greeting.shim_pid != candidate.shim.pid.unsigned_abs() {
            let pid = greeting.shim_pid;
            return Err(format!("shim {pid} answers, not {}", candidate.shim.pid));
        }
    }
    Ok(())
}

//! Starts successors: our shim's verb `adopt`, one process for each group, many at once, each
//! within a deadline; then asks the new shim itself whether it serves what it should. Whom, and
//! with what, is decided in `decide`.

use std::{
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    process::Stdio,
    sync::Arc,
    time::{Duration, Instant},
};

use recoverd_common::{
    adoption::{Adopted, Misunderstood, STOOD_BACK},
    failpoint,
    pb::task::Status,
    proc::FileId,
    record::Phase,
    seen::Seen,
    shim_client::{CallError, ShimClient},
    supervision, sys,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    process::{Child, Command},
    time::{self, timeout_at},
};

use super::Order;
use crate::{facts::one_line, quarantine};

/// The shim's file name.
pub const BINARY: &str = "containerd-shim-recoverd-v1";
/// What says where it is, if not beside us or in PATH.
pub const KEY: &str = "adopt.binary";
/// A new shim is asked this long after it said that it serves.
const VERIFY: Duration = Duration::from_secs(2);
/// Longest answer or complaint that is read, bytes: a pod of a thousand tasks says some 300 KiB.
const MAX_ANSWER: u64 = 4 << 20;

/// How to start successors.
#[derive(Debug, Clone)]
pub struct How {
    /// The shim's binary.
    pub binary: PathBuf,
    /// For one of them.
    pub deadline: Duration,
    /// For all; whatever has not begun by then does not begin.
    pub until: Instant,
    /// At the same time.
    pub at_once: usize,
    /// Which run of which command, as the history says it.
    pub run: String,
    /// Below it a supervisor may have kept descriptors.
    pub run_dir: PathBuf,
}

/// For a supervisor to hand out what it keeps.
const FETCH: Duration = Duration::from_secs(1);

/// Descriptors with their names.
pub type Kept = Vec<(String, Arc<OwnedFd>)>;

/// What became of one order.
#[derive(Debug)]
pub struct Outcome {
    /// Which.
    pub order: Order,
    /// What became of it.
    pub verdict: Verdict,
    /// How long it took.
    pub took: Duration,
}

/// What became of an order.
#[derive(Debug)]
pub enum Verdict {
    /// The successor serves, and was asked.
    Adopted(Adopted),
    /// Somebody else serves the tasks, or nothing is left; nothing was touched.
    StoodBack(String),
    /// It could not.
    Failed(Failed),
}

impl Verdict {
    /// Whether somebody serves the tasks, or may: a successor that was not understood has begun.
    pub fn may_serve(&self) -> bool {
        match self {
            Verdict::Adopted(_) | Verdict::StoodBack(_) => true,
            Verdict::Failed(failed) => match failed {
                Failed::Start { .. } | Failed::Late(_) | Failed::NoTime | Failed::Refused(_) => {
                    false
                }
                Failed::Answer(_) | Failed::Verify(_) | Failed::Talk(_) => true,
            },
        }
    }
}

/// Why a group was not adopted.
#[derive(Debug, thiserror::Error)]
pub enum Failed {
    /// The binary could not be started.
    #[error("start {}: {cause}", binary.display())]
    Start {
        /// Which.
        binary: PathBuf,
        /// The kernel's answer.
        cause: std::io::Error,
    },
    /// It was still at work at its deadline, and was ended.
    #[error("was not done in {} ms", .0.as_millis())]
    Late(Duration),
    /// There was no time left to begin.
    #[error("no time was left for it")]
    NoTime,
    /// It refused.
    #[error("{0}")]
    Refused(String),
    /// Its answer is none.
    #[error("its answer {0}")]
    Answer(#[from] Misunderstood),
    /// It says that it serves, and does not.
    #[error("says that it serves, but {0}")]
    Verify(String),
    /// Talking to it failed.
    #[error("talk to it: {0}")]
    Talk(#[from] std::io::Error),
}

/// The shim's binary: as configured, else beside our own executable, else in PATH.
pub fn find_binary(configured: Option<&Path>) -> Result<PathBuf, String> {
    if let Some(path) = configured {
        return usable(path)
            .then(|| path.to_owned())
            .ok_or_else(|| format!("{KEY} {}: no executable file", path.display()));
    }
    let beside = std::env::current_exe()
        .ok()
        .and_then(|exe| Some(exe.parent()?.join(BINARY)));
    let path = std::env::var_os("PATH").unwrap_or_default();
    let in_path = std::env::split_paths(&path).map(|folder| folder.join(BINARY));
    beside
        .into_iter()
        .chain(in_path)
        .find(|path| usable(path))
        .ok_or_else(|| format!("{BINARY} is neither beside recoverd nor in PATH: set {KEY}"))
}

fn usable(path: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    path.metadata()
        .is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}

/// Starts all successors, in order, `how.at_once` at a time. The outcomes are in the same order.
pub async fn run(orders: Vec<Order>, how: &How) -> Vec<Outcome> {
    let places = std::sync::Arc::new(tokio::sync::Semaphore::new(how.at_once.max(1)));
    let mut running = Vec::new();
    for order in orders {
        let (places, how) = (std::sync::Arc::clone(&places), how.clone());
        running.push(tokio::spawn(async move {
            let began = Instant::now();
            let until = time::Instant::from_std(how.until);
            // Nobody closes the semaphore: the only error is the time.
            let verdict = match timeout_at(until, places.acquire()).await {
                Ok(_place) => {
                    let kept = fetch(&order, &how).await;
                    one(&order, &kept, &how).await
                }
                Err(_) => Verdict::Failed(Failed::NoTime),
            };
            tracing::info!(group = order.group, ?verdict, "adopted");
            Outcome {
                order,
                verdict,
                took: began.elapsed(),
            }
        }));
    }
    let mut outcomes = Vec::with_capacity(running.len());
    for task in running {
        match task.await {
            Ok(outcome) => outcomes.push(outcome),
            // None is ever aborted: a panic of ours.
            Err(error) => std::panic::resume_unwind(error.into_panic()),
        }
    }
    outcomes
}

/// Starts one successor with what the caller has kept.
pub async fn run_with(order: Order, kept: &Kept, how: &How) -> Outcome {
    let began = Instant::now();
    let verdict = one(&order, kept, how).await;
    Outcome {
        order,
        verdict,
        took: began.elapsed(),
    }
}

/// What a supervisor keeps of the group. It is told of a predecessor's end, so that it does not
/// start a successor of its own.
async fn fetch(order: &Order, how: &How) -> Kept {
    let socket = order.adoption.socket.clone();
    let (run_dir, predecessor) = (how.run_dir.clone(), order.adoption.predecessor);
    let asked = tokio::task::spawn_blocking(move || {
        if let Some(predecessor) = predecessor {
            supervision::announce_end(&run_dir, &socket, predecessor);
        }
        supervision::fetch(&run_dir, &socket, FETCH)
    });
    match asked.await {
        Ok(kept) => kept.into_iter().map(|(n, fd)| (n, Arc::new(fd))).collect(),
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}

async fn one(order: &Order, kept: &Kept, how: &How) -> Verdict {
    let left = how.until.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return Verdict::Failed(Failed::NoTime);
    }
    let deadline = how.deadline.min(left);
    clear(order, &how.run);
    failpoint!("order.start.before");
    let done = match ask(order, kept, how, deadline).await {
        Ok(done) => done,
        Err(failed) => return Verdict::Failed(failed),
    };
    failpoint!("order.done.after");
    let said = last_line(&done.complaint);
    match done.code {
        Some(0) => {}
        Some(code) if code == i32::from(STOOD_BACK) => return Verdict::StoodBack(said),
        Some(_) | None => return Verdict::Failed(Failed::Refused(said)),
    }
    let adopted = match Adopted::decode(&done.answer) {
        Ok(adopted) => adopted,
        Err(why) => return Verdict::Failed(why.into()),
    };
    let (order, asked) = (order.clone(), adopted.clone());
    let verified = tokio::task::spawn_blocking(move || verify(&order, &asked)).await;
    match verified {
        Ok(Ok(())) => Verdict::Adopted(adopted),
        Ok(Err(why)) => Verdict::Failed(Failed::Verify(why)),
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}

/// Sets a record aside that cannot be read: the successor's would overwrite it, and somebody may
/// want to know what it was. That this fails keeps nobody from living on.
fn clear(order: &Order, run: &str) {
    let (Some(path), Some(state)) = (&order.unreadable, &order.state) else {
        return;
    };
    let Seen::Present(file) = FileId::of_entry(path) else {
        return;
    };
    let thing = quarantine::Thing {
        path,
        file,
        name: &path.file_name().unwrap_or_default().to_string_lossy(),
        why: "the record cannot be read; its tasks are adopted from bundle and runc",
        run,
    };
    match quarantine::set_aside(state, &thing) {
        Ok(there) => {
            tracing::info!(record = %path.display(), there = %there.display(), "set aside")
        }
        Err(kept) => tracing::warn!(record = %path.display(), %kept, "not set aside"),
    }
}

/// What the verb said.
struct Done {
    code: Option<i32>,
    answer: Vec<u8>,
    complaint: String,
}

async fn ask(order: &Order, kept: &Kept, how: &How, deadline: Duration) -> Result<Done, Failed> {
    let mut command = Command::new(&how.binary);
    command
        .args(["-namespace", &order.namespace])
        .args(["-address", &order.address])
        .args(["-id", &order.group])
        .arg("adopt")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        // It would take its service manager's messages for its own.
        .env_remove("NOTIFY_SOCKET")
        .env_remove("WATCHDOG_USEC")
        .env_remove("WATCHDOG_PID")
        .env_remove("LISTEN_FDS")
        .env_remove("LISTEN_PID")
        .env_remove("LISTEN_FDNAMES")
        .current_dir("/")
        .kill_on_drop(true);
    let failed = |cause| Failed::Start {
        binary: how.binary.clone(),
        cause,
    };
    let files: Vec<&OwnedFd> = kept.iter().map(|(_, fd)| &**fd).collect();
    sys::give(command.as_std_mut(), &files, false).map_err(failed)?;
    let mut child = command.spawn().map_err(failed)?;
    // Its duplicates of what is kept.
    drop(command);
    let mut adoption = order.adoption.clone();
    adoption.descriptors = kept.iter().map(|(name, _)| name.clone()).collect();
    let message = adoption.encode();
    failpoint!("order.start.after");
    match time::timeout(deadline, talk(&mut child, &message)).await {
        Ok(done) => done,
        Err(_) => {
            // The verb, a child of ours, and not what it may have started: a successor that serves
            // keeps serving, and one that does not is finished or undone by the next run.
            child.kill().await?;
            Err(Failed::Late(deadline))
        }
    }
}

async fn talk(child: &mut Child, message: &[u8]) -> Result<Done, Failed> {
    let stdin = child.stdin.take();
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let tell = async {
        if let Some(mut stdin) = stdin {
            // A verb that refuses its arguments does not read; what it says then counts.
            let _ = stdin.write_all(message).await;
            failpoint!("order.told.after");
        }
    };
    let (mut answer, mut complaint) = (Vec::new(), Vec::new());
    let hear = async {
        match stdout {
            Some(stdout) => stdout.take(MAX_ANSWER).read_to_end(&mut answer).await,
            None => Ok(0),
        }
    };
    let overhear = async {
        match stderr {
            Some(stderr) => stderr.take(MAX_ANSWER).read_to_end(&mut complaint).await,
            None => Ok(0),
        }
    };
    let ((), heard, overheard) = tokio::join!(tell, hear, overhear);
    heard?;
    overheard?;
    let status = child.wait().await?;
    Ok(Done {
        code: status.code(),
        answer,
        complaint: String::from_utf8_lossy(&complaint).into_owned(),
    })
}

fn last_line(text: &str) -> String {
    let line = text.lines().rev().find(|line| !line.trim().is_empty());
    match line {
        Some(line) => one_line(line.trim()),
        None => "it said nothing".into(),
    }
}

/// Asks the new shim, as containerd will.
fn verify(order: &Order, adopted: &Adopted) -> Result<(), String> {
    let deadline = Instant::now() + VERIFY;
    let socket = &order.adoption.socket;
    let talk = |what: &str, error: CallError| format!("{what}: {error}");
    let mut client = ShimClient::connect(socket, &order.namespace, deadline)
        .map_err(|error| talk("connect", error))?;
    // What was half made is undone: nobody may know of it.
    let unmade = |id: &str| {
        let mut tasks = adopted.tasks.iter();
        tasks.any(|task| task.id == id && task.phase == Phase::Creating)
    };
    let living = order.members.iter().filter_map(|m| Some((m, m.init?)));
    for (member, init) in living.filter(|(member, _)| !unmade(&member.name.1)) {
        let id = &member.name.1;
        let greeting = client
            .connect_task(id)
            .map_err(|error| talk(&format!("Connect of {id}"), error))?;
        if greeting.shim_pid != adopted.shim.pid {
            let (pid, expected) = (greeting.shim_pid, adopted.shim.pid);
            return Err(format!("shim {pid} answers, not {expected}"));
        }
        let state = client
            .state(id)
            .map_err(|error| talk(&format!("State of {id}"), error))?;
        // It may have ended since.
        if state.pid != init.pid.unsigned_abs() && state.status() != Status::Stopped {
            return Err(format!("{id} has init {}, not {}", state.pid, init.pid));
        }
    }
    Ok(())
}

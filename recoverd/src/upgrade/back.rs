//! The way back: descriptors of a shim, duplicated before it is asked, and its old executable,
//! which adopts the tasks with them when the new image has died of it.

use std::{
    fs::File,
    io::{Read, Write},
    os::fd::{AsFd, AsRawFd, OwnedFd},
    path::Path,
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use recoverd_common::{
    adoption::{Adopted, Adoption, STOOD_BACK},
    failpoint,
    handoff::MAX_DESCRIPTORS,
    proc::Proc,
    record::Process,
    seen::Seen,
    shim_client::ShimClient,
    sys,
};

use super::{Candidate, run::How};

/// Descriptors with names for people.
pub type Kept = Vec<(String, OwnedFd)>;

/// For somebody else's successor, who has come first, to serve.
const OTHERS: Duration = Duration::from_secs(5);
/// Longest complaint that is read, bytes.
const MAX_WORDS: u64 = 64 << 10;

/// Everything of a shim of ours that a successor may need: it looks itself at what each is.
pub fn keep(proc: &Proc, pid: i32, pidfd: &OwnedFd) -> Kept {
    let Seen::Present(descriptors) = proc.descriptors(pid) else {
        return Vec::new();
    };
    let mut kept = Kept::new();
    for descriptor in descriptors.into_iter().take(MAX_DESCRIPTORS) {
        let target = descriptor.target.to_string_lossy().into_owned();
        // Not the lock, above all: it would be held for as long as we hold it.
        let wanted = target.starts_with("socket:")
            || target.starts_with("pipe:")
            || target.contains("ptmx")
            || is_fifo(&proc.path(pid, &format!("fd/{}", descriptor.number)));
        if !wanted {
            continue;
        }
        if let Ok(fd) = sys::pidfd_getfd(pidfd.as_fd(), descriptor.number) {
            kept.push((target, fd));
        }
    }
    kept
}

fn is_fifo(path: &Path) -> bool {
    use std::os::unix::fs::FileTypeExt;
    path.metadata().is_ok_and(|meta| meta.file_type().is_fifo())
}

/// Has `executable` adopt the tasks at `socket`; gives the pid of the shim that serves them, which
/// may be somebody else's successor. It ends `hung` itself, with everything in its hands: had we
/// done that and died, the connections would have died with us, and a containerd that sees their
/// end kills the workload.
pub fn start(
    candidate: &Candidate,
    socket: &Path,
    executable: &File,
    kept: &Kept,
    hung: Option<Process>,
    how: &How,
) -> Result<u32, String> {
    let adoption = Adoption {
        socket: socket.to_owned(),
        record: None,
        observed: Vec::new(),
        predecessor: hung,
        descriptors: kept.iter().map(|(name, _)| name.clone()).collect(),
    };
    // Out of our own table: in the child's the number is a kept descriptor's by then.
    let own = std::process::id();
    let program = how
        .proc
        .join(format!("{own}/fd/{}", executable.as_raw_fd()));
    let mut command = Command::new(&program);
    command
        .args(["-namespace", &candidate.namespace])
        .args(["-address", &candidate.address])
        .args(["-id", &candidate.group])
        .arg("adopt")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        // It would take its service manager's messages for its own.
        .env_remove("NOTIFY_SOCKET")
        .current_dir("/");
    let files: Vec<&OwnedFd> = kept.iter().map(|(_, fd)| fd).collect();
    sys::give(&mut command, &files, false).map_err(|e| format!("prepare: {e}"))?;
    failpoint!("upgrade.back.before");
    let mut child = command.spawn().map_err(|e| format!("execute it: {e}"))?;
    failpoint!("upgrade.back.after");
    // What it does within its own limits ends by itself.
    if let Some(mut stdin) = child.stdin.take() {
        // One that refuses its arguments does not read; what it says then counts.
        let _ = stdin.write_all(&adoption.encode());
    }
    let (mut answer, mut complaint) = (Vec::new(), String::new());
    if let Some(stdout) = child.stdout.take() {
        let _ = stdout
            .take(recoverd_common::read::MAX_FILE)
            .read_to_end(&mut answer);
    }
    if let Some(stderr) = child.stderr.take() {
        let _ = stderr.take(MAX_WORDS).read_to_string(&mut complaint);
    }
    let status = child.wait().map_err(|e| format!("wait for it: {e}"))?;
    if status.code() == Some(i32::from(STOOD_BACK)) {
        return others(candidate, socket).ok_or_else(|| complaint.trim().to_owned());
    }
    if !status.success() {
        return Err(complaint.trim().to_owned());
    }
    let adopted = Adopted::decode(&answer).map_err(|e| format!("its answer {e}"))?;
    Ok(adopted.shim.pid)
}

/// Who serves the tasks, if somebody does.
fn others(candidate: &Candidate, socket: &Path) -> Option<u32> {
    let until = Instant::now() + OTHERS;
    let id = match candidate.tasks.first() {
        Some((_, id)) => id,
        None => &candidate.group,
    };
    loop {
        let client = ShimClient::connect(socket, &candidate.namespace, until);
        if let Ok(greeting) = client.and_then(|mut client| client.connect_task(id)) {
            return Some(greeting.shim_pid);
        }
        if Instant::now() >= until {
            return None;
        }
        thread::sleep(Duration::from_millis(20));
    }
}

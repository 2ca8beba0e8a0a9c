//! This process as the keeper of a daemon's descriptors, and calls that wait while it is away.

// Each test program uses a part of it.
#![allow(dead_code)]

use std::{
    fs,
    io::Write,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::fs::FileTypeExt,
    },
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    thread::{self, JoinHandle},
};

use nix::{
    fcntl::{FcntlArg, FdFlag, fcntl},
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use prost::Message;
use recoverd_common::{
    adoption::{Adopted, Adoption},
    paths::Beside,
    pb::task,
    shim_client::{CallError, TASK_SERVICES},
    sys,
};

use super::{Daemon, until};

/// Everything of a shim that a keeper keeps.
pub fn keep(pid: u32) -> Vec<OwnedFd> {
    let pidfd = sys::pidfd_open(i32::try_from(pid).unwrap()).unwrap();
    let mut kept = Vec::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fd")).unwrap() {
        let path = entry.unwrap().path();
        let number = path.file_name().unwrap().to_str().unwrap().parse().unwrap();
        let Ok(target) = fs::read_link(&path) else {
            continue;
        };
        let fifo = fs::metadata(&path).is_ok_and(|meta| meta.file_type().is_fifo());
        if target.to_string_lossy().starts_with("socket:") || fifo {
            // It may have been closed since.
            kept.extend(sys::pidfd_getfd(pidfd.as_fd(), number));
        }
    }
    kept
}

/// The successor, ended with the test.
pub struct Successor(pub Adopted);

impl Drop for Successor {
    fn drop(&mut self) {
        let pid = i32::try_from(self.0.shim.pid).unwrap();
        let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
    }
}

/// The verb `adopt` of `executable`, with everything that was kept.
pub fn run(daemon: &Daemon, executable: &Path, kept: &[OwnedFd]) -> Output {
    let adoption = Adoption {
        socket: daemon.socket(),
        record: None,
        predecessor: None,
        descriptors: kept.iter().map(|_| "whatever".to_owned()).collect(),
        observed: Vec::new(),
    };
    // A shell puts them where they belong.
    let mut places = String::new();
    for (number, fd) in (3..).zip(kept) {
        fcntl(fd, FcntlArg::F_SETFD(FdFlag::empty())).unwrap();
        places += &format!(" {number}<&{}", fd.as_raw_fd());
    }
    let mut verb = Command::new("bash")
        .arg("-c")
        .arg(format!("exec \"$0\" \"$@\" {places}"))
        .arg(executable)
        .args(["-namespace", "ns", "-id", "first", "-address", "/none"])
        .arg("adopt")
        .current_dir(daemon.dir.path())
        .env_remove("TTRPC_ADDRESS")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = verb.stdin.take().unwrap();
    stdin.write_all(&adoption.encode()).unwrap();
    drop(stdin);
    for fd in kept {
        fcntl(fd, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).unwrap();
    }
    verb.wait_with_output().unwrap()
}

pub fn adopt(daemon: &Daemon, kept: &[OwnedFd]) -> Successor {
    let executable = env!("CARGO_BIN_EXE_containerd-shim-recoverd-v1");
    adopt_with(daemon, Path::new(executable), kept)
}

pub fn adopt_with(daemon: &Daemon, executable: &Path, kept: &[OwnedFd]) -> Successor {
    let output = run(daemon, executable, kept);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    Successor(Adopted::decode(&output.stdout).unwrap())
}

/// Kept descriptors, and the shim is dead.
pub fn die(daemon: &mut Daemon) -> Vec<OwnedFd> {
    let kept = keep(daemon.process.id());
    daemon.process.kill().unwrap();
    daemon.process.wait().unwrap();
    kept
}

pub type Call<R> = JoinHandle<Result<R, CallError>>;

/// A call on a connection of its own, made by a thread; it is in the shim when this returns.
pub fn begin<R: Message + Default + 'static>(
    daemon: &Daemon,
    method: &'static str,
    request: impl Message + 'static,
) -> Call<R> {
    let mut client = daemon.client();
    let call = thread::spawn(move || client.call(TASK_SERVICES[0], method, &request));
    until("it is asked", || asked(daemon, method) > 0);
    call
}

/// Requests for `method` that are written down as asked.
pub fn asked(daemon: &Daemon, method: &str) -> usize {
    let bytes = fs::read(Beside::of(&daemon.socket()).requests).unwrap();
    let slots = bytes.chunks(512).skip(1);
    let is_one = |slot: &&[u8]| {
        let mut words = slot.windows(method.len().max(1));
        slot[0] == 1 && (method.is_empty() || words.any(|word| word == method.as_bytes()))
    };
    slots.filter(is_one).count()
}

/// True while half of a giant request is taken from its socket.
pub fn half_read(daemon: &Daemon) -> bool {
    let bytes = fs::read(Beside::of(&daemon.socket()).requests).unwrap();
    bytes.chunks(512).skip(1).any(|slot| slot[0] == 4)
}

/// Nothing is to be sent again: what was sent is known to be.
pub fn settled(daemon: &Daemon) {
    until("its answer is known to be sent", || {
        asked(daemon, "Connect") == 0
    });
}

pub fn calls(daemon: &Daemon, id: &str, verb: &str) -> usize {
    let text = fs::read_to_string(daemon.bundle(id).join("calls")).unwrap_or_default();
    text.lines().filter(|line| *line == verb).count()
}

pub fn slow(daemon: &Daemon, id: &str, verb: &str) -> PathBuf {
    let path = daemon.bundle(id).join(format!("slow-{verb}"));
    fs::create_dir_all(daemon.bundle(id)).unwrap();
    fs::write(&path, "").unwrap();
    path
}

pub fn wait(id: &str, exec_id: &str) -> task::WaitRequest {
    task::WaitRequest {
        id: id.into(),
        exec_id: exec_id.into(),
    }
}

/// An init that ends with 23 when the file `end` is there.
pub fn waiting(daemon: &Daemon) -> String {
    let end = daemon.dir.path().join("end");
    format!(
        "until [ -e {} ]; do sleep 0.02; done; exit 23",
        end.display()
    )
}

pub fn end(daemon: &Daemon) {
    fs::write(daemon.dir.path().join("end"), "").unwrap();
}

//! A daemon of its own for each test, without containerd and without containers: a shell script
//! stands in for the OCI runtime.

// Each test program uses a part of it.
#![allow(dead_code)]

pub mod keeper;
pub mod raw;

use std::{
    fs,
    os::unix::{fs::PermissionsExt, net::UnixStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use prost::Message;
use prost_types::Any;
use recoverd_common::{
    paths::Beside,
    pb::{runc, task, type_url},
    record,
    seen::Seen,
    shim_client::{CallError, ShimClient, TASK_SERVICES},
};

/// Runs what the bundle's file `init` (or the exec's process) says, in the background, as a runtime
/// does: the process outlives the command and keeps its stdio.
const RUNTIME: &str = r#"#!/bin/sh
for word in "$@"; do
    case $previous in
        --bundle) bundle=$word ;;
        --pid-file) pid_file=$word ;;
        --process) process=$word ;;
        --log) log=$word ;;
        --root) root=$word ;;
    esac
    case $word in create|start|exec|delete|kill|pause|resume) verb=${verb:-$word} ;; esac
    previous=$word
done
fail() {
    echo "{\"level\":\"error\",\"msg\":\"$1\"}" >> "$log"
    exit 1
}
# Each command is counted, and waits while it is told to.
echo "$verb" >> "${log%/*}/calls"
while [ -e "${log%/*}/slow-$verb" ]; do sleep 0.02; done
case $verb in
    create)
        [ -e "$bundle/fail" ] && fail "it is written that this fails"
        [ -e "$bundle/hang" ] && exec sleep 1000
        (until [ -e "$bundle/go" ]; do sleep 0.02; done; exec sh "$bundle/init") &
        echo $! > "$pid_file"
        mkdir -p "$root/$word" && : > "$root/$word/exec.fifo" ;;
    start)
        [ -e "${log%/*}/fail-start" ] && fail "it is written that this fails"
        rm -f "$root/$word/exec.fifo"
        : > "${log%/*}/go" ;;
    delete) rm -rf "$root/$word" ;;
    exec)
        [ -e "${log%/*}/fail-exec" ] && fail "it is written that this fails"
        # The shell gives a background command no stdin of its own accord.
        exec 3<&0
        sh -c "$(sed 's/.*"args":\["//; s/"\].*//' "$process")" <&3 3<&- &
        echo $! > "$pid_file" ;;
    kill) fail "container not running" ;;
esac
"#;

pub struct Daemon {
    pub dir: tempfile::TempDir,
    pub process: Child,
}

pub fn patience() -> Instant {
    Instant::now() + Duration::from_secs(60)
}

pub fn until(what: &str, holds: impl Fn() -> bool) {
    let end = patience();
    while !holds() {
        assert!(Instant::now() < end, "{what}");
        thread::sleep(Duration::from_millis(10));
    }
}

impl Daemon {
    pub fn new() -> Self {
        Self::with(|_| {})
    }

    /// With something else about its command.
    pub fn with(change: impl FnOnce(&mut Command)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let runtime = dir.path().join("runtime");
        fs::write(&runtime, RUNTIME).unwrap();
        fs::set_permissions(&runtime, fs::Permissions::from_mode(0o755)).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_containerd-shim-recoverd-v1"));
        command
            .args(["-namespace", "ns", "-id", "first", "-address", "/none"])
            .arg("-socket")
            .arg(dir.path().join("socket"))
            .current_dir(dir.path())
            .env_remove("TTRPC_ADDRESS")
            .stdin(Stdio::null());
        change(&mut command);
        let process = command.spawn().unwrap();
        let daemon = Self { dir, process };
        let socket = daemon.socket();
        until("it serves", || UnixStream::connect(&socket).is_ok());
        daemon
    }

    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("socket")
    }

    pub fn bundle(&self, id: &str) -> PathBuf {
        self.dir.path().join("bundles").join(id)
    }

    pub fn client(&self) -> ShimClient {
        ShimClient::connect(&self.socket(), "ns", patience()).unwrap()
    }

    pub fn call<R: Message + Default>(
        &self,
        method: &str,
        request: &impl Message,
    ) -> Result<R, CallError> {
        self.client().call(TASK_SERVICES[0], method, request)
    }

    pub fn create(&self, id: &str, init: &str, stdout: &Path) -> Result<u32, CallError> {
        let bundle = self.bundle(id);
        fs::create_dir_all(&bundle).unwrap();
        fs::write(
            bundle.join("config.json"),
            r#"{"linux":{"namespaces":[{"type":"pid"}]}}"#,
        )
        .unwrap();
        fs::write(bundle.join("init"), init).unwrap();
        let options = runc::Options {
            binary_name: self.dir.path().join("runtime").to_str().unwrap().into(),
            root: self.dir.path().join("root").to_str().unwrap().into(),
            ..Default::default()
        };
        let request = task::CreateTaskRequest {
            id: id.into(),
            bundle: bundle.to_str().unwrap().into(),
            stdout: stdout.to_str().unwrap().into(),
            options: Some(Any {
                type_url: type_url::RUNC_OPTIONS.into(),
                value: options.encode_to_vec(),
            }),
            ..Default::default()
        };
        self.call::<task::CreateTaskResponse>("Create", &request)
            .map(|response| response.pid)
    }

    /// Adds and starts an exec of task `c`.
    pub fn exec(&self, exec_id: &str, command: &str, stdout: &str) -> Result<u32, CallError> {
        let request = task::ExecProcessRequest {
            id: "c".into(),
            exec_id: exec_id.into(),
            stdout: stdout.into(),
            spec: Some(Any {
                type_url: String::new(),
                value: format!(r#"{{"args":["{command}"]}}"#).into_bytes(),
            }),
            ..Default::default()
        };
        self.call::<task::ConnectResponse>("Exec", &request)?;
        let request = task::StartRequest {
            id: "c".into(),
            exec_id: exec_id.into(),
        };
        let started: task::StartResponse = self.call("Start", &request)?;
        Ok(started.pid)
    }

    pub fn start(&self, id: &str, exec_id: &str) {
        let request = task::StartRequest {
            id: id.into(),
            exec_id: exec_id.into(),
        };
        self.call::<task::StartResponse>("Start", &request).unwrap();
    }

    pub fn wait(&self, id: &str, exec_id: &str) -> u32 {
        let request = task::WaitRequest {
            id: id.into(),
            exec_id: exec_id.into(),
        };
        let response: task::WaitResponse = self.call("Wait", &request).unwrap();
        response.exit_status
    }

    pub fn delete(&self, id: &str) -> Result<u32, CallError> {
        let request = task::DeleteRequest {
            id: id.into(),
            exec_id: String::new(),
        };
        self.call::<task::DeleteResponse>("Delete", &request)
            .map(|response| response.exit_status)
    }

    pub fn recorded(&self) -> record::Record {
        match record::read(&Beside::of(&self.socket()).record) {
            Seen::Present(record) => record,
            other => panic!("{other:?}"),
        }
    }

    pub fn fifo(&self, name: &str) -> PathBuf {
        let path = self.dir.path().join(name);
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        path
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        // Its containers outlive it, which is its purpose.
        if let Seen::Present(record) = record::read(&Beside::of(&self.socket()).record) {
            for init in record.tasks.iter().filter_map(|task| task.init) {
                let pid = nix::unistd::Pid::from_raw(i32::try_from(init.pid).unwrap());
                let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
            }
        }
    }
}

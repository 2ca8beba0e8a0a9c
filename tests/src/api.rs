//! containerd's own API, for what `ctr` cannot bring about.

use std::future::Future;
use std::path::Path;
use std::time::{Duration, Instant};

use containerd_client::services::v1 as pb;
use containerd_client::services::v1::containers_client::ContainersClient;
use containerd_client::services::v1::tasks_client::TasksClient;
use containerd_client::tonic::transport::Channel;
use containerd_client::tonic::{self, Code};
use containerd_client::types::{
    Mount,
    v1::{Process as ProtoProcess, ProcessInfo, Status},
};
use prost::Message;
use prost_types::Any;
use recoverd_common::pb::runc;
use serde_json::Value;

use crate::client::{Client, Refused};
use crate::containerd::{Containerd, NOT_FROZEN};
use crate::direct::ANSWERS_WITHIN;
use crate::releases::ShimUnderTest;

const SPEC: &str = "types.containerd.io/opencontainers/runtime-spec/1/Spec";
const PROCESS: &str = "types.containerd.io/opencontainers/runtime-spec/1/Process";
const RESOURCES: &str = "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources";

/// A client of one containerd namespace. May be shared between threads.
pub struct Api {
    client: Client,
    namespace: String,
}

/// A task's or exec's stdio: paths, URIs, or empty.
#[derive(Clone, Debug, Default)]
pub struct Stdio {
    /// A fifo, or empty.
    pub stdin: String,
    /// A fifo, a URI, or empty.
    pub stdout: String,
    /// The same.
    pub stderr: String,
    /// With a terminal: stderr has to be empty.
    pub terminal: bool,
}

/// How a process ended.
#[derive(Clone, Debug, PartialEq)]
pub struct Ended {
    /// Its pid, 0 where the call does not say it.
    pub pid: u32,
    /// Exit code or 128 + signal.
    pub status: u32,
    /// When; seconds and nanoseconds since 1970.
    pub at: (i64, i32),
}

impl Containerd {
    /// A client of its API.
    #[track_caller]
    pub fn api(&self, namespace: &str) -> Api {
        Api {
            client: Client::of(self),
            namespace: namespace.into(),
        }
    }
}

impl Api {
    fn call<Q, R, F>(
        &self,
        request: Q,
        call: impl FnOnce(Channel, tonic::Request<Q>) -> F,
    ) -> Result<R, Refused>
    where
        F: Future<Output = Result<tonic::Response<R>, tonic::Status>>,
    {
        self.send(tonic::Request::new(request), call)
    }

    fn send<Q, R, F>(
        &self,
        mut request: tonic::Request<Q>,
        call: impl FnOnce(Channel, tonic::Request<Q>) -> F,
    ) -> Result<R, Refused>
    where
        F: Future<Output = Result<tonic::Response<R>, tonic::Status>>,
    {
        let namespace = self
            .namespace
            .parse()
            .unwrap_or_else(|error| panic!("namespace {}: {error}", self.namespace));
        request
            .metadata_mut()
            .insert("containerd-namespace", namespace);
        self.client.call(request, call)
    }

    /// Makes a container: no task yet.
    #[track_caller]
    pub fn container(
        &self,
        id: &str,
        spec: &Value,
        shim: ShimUnderTest,
        options: Option<&runc::Options>,
    ) {
        self.container_with(id, spec, shim, options.map(runc_options));
    }

    /// The same with runtime options of any type.
    #[track_caller]
    pub fn container_with(
        &self,
        id: &str,
        spec: &Value,
        shim: ShimUnderTest,
        options: Option<Any>,
    ) {
        self.container_on(id, spec, &shim.runtime(), options);
    }

    /// The same with any runtime, a name or a shim's path.
    #[track_caller]
    pub fn container_on(&self, id: &str, spec: &Value, runtime: &Path, options: Option<Any>) {
        let container = pb::Container {
            id: id.into(),
            runtime: Some(pb::container::Runtime {
                name: runtime.display().to_string(),
                options,
            }),
            spec: Some(Any {
                type_url: SPEC.into(),
                value: spec.to_string().into_bytes(),
            }),
            ..pb::Container::default()
        };
        let request = pb::CreateContainerRequest {
            container: Some(container),
        };
        self.call(request, |channel, request| async {
            ContainersClient::new(channel).create(request).await
        })
        .unwrap_or_else(|refused| panic!("create container {id}: {refused:?}"));
    }

    /// Removes a container, which has no task any more.
    #[track_caller]
    pub fn remove_container(&self, id: &str) {
        let request = pb::DeleteContainerRequest { id: id.into() };
        self.call(request, |channel, request| async {
            ContainersClient::new(channel).delete(request).await
        })
        .unwrap_or_else(|refused| panic!("delete container {id}: {refused:?}"));
    }

    /// Create of the task API; the init's pid.
    pub fn create(&self, id: &str, stdio: &Stdio) -> Result<u32, Refused> {
        self.create_with(id, stdio, None, Vec::new())
    }

    /// Create of a task whose root file system its shim mounts.
    pub fn create_on(&self, id: &str, stdio: &Stdio, rootfs: Vec<Mount>) -> Result<u32, Refused> {
        self.create_with(id, stdio, None, rootfs)
    }

    /// Create of a task that Start restores from the images in a folder; 0, since nothing runs.
    pub fn create_from(&self, id: &str, stdio: &Stdio, images: &Path) -> Result<u32, Refused> {
        let options = runc::Options {
            criu_image_path: images.display().to_string(),
            ..runc::Options::default()
        };
        self.create_with(id, stdio, Some(runc_options(&options)), Vec::new())
    }

    fn create_with(
        &self,
        id: &str,
        stdio: &Stdio,
        options: Option<Any>,
        rootfs: Vec<Mount>,
    ) -> Result<u32, Refused> {
        let request = pb::CreateTaskRequest {
            container_id: id.into(),
            stdin: stdio.stdin.clone(),
            stdout: stdio.stdout.clone(),
            stderr: stdio.stderr.clone(),
            terminal: stdio.terminal,
            options,
            rootfs,
            ..pb::CreateTaskRequest::default()
        };
        self.call(request, |channel, request| async {
            TasksClient::new(channel).create(request).await
        })
        .map(|answer| answer.pid)
    }

    /// Start; `exec_id` is empty for the init, here and below.
    pub fn start(&self, id: &str, exec_id: &str) -> Result<u32, Refused> {
        let request = pb::StartRequest {
            container_id: id.into(),
            exec_id: exec_id.into(),
        };
        self.call(request, |channel, request| async {
            TasksClient::new(channel).start(request).await
        })
        .map(|answer| answer.pid)
    }

    /// Start of an exec by a client that waits so long and no longer.
    pub fn start_within(&self, limit: Duration, id: &str, exec_id: &str) -> Result<u32, Refused> {
        let mut request = tonic::Request::new(pb::StartRequest {
            container_id: id.into(),
            exec_id: exec_id.into(),
        });
        // Told to containerd, which tells the shim.
        request.set_timeout(limit);
        self.send(request, |channel, request| async {
            TasksClient::new(channel).start(request).await
        })
        .map(|answer| answer.pid)
    }

    /// State.
    pub fn state(&self, id: &str, exec_id: &str) -> Result<ProtoProcess, Refused> {
        let request = pb::GetRequest {
            container_id: id.into(),
            exec_id: exec_id.into(),
        };
        self.call(request, |channel, request| async {
            TasksClient::new(channel).get(request).await
        })
        .map(|answer| answer.process.unwrap_or_default())
    }

    /// The phase that State tells, which must answer.
    #[track_caller]
    pub fn phase(&self, id: &str, exec_id: &str) -> Status {
        match self.state(id, exec_id) {
            Ok(state) => state.status(),
            Err(refused) => panic!("state of {id} {exec_id:?}: {refused:?}"),
        }
    }

    /// Exec of this OCI process.
    pub fn exec(
        &self,
        id: &str,
        exec_id: &str,
        process: &Value,
        stdio: &Stdio,
    ) -> Result<(), Refused> {
        let request = pb::ExecProcessRequest {
            container_id: id.into(),
            exec_id: exec_id.into(),
            stdin: stdio.stdin.clone(),
            stdout: stdio.stdout.clone(),
            stderr: stdio.stderr.clone(),
            terminal: stdio.terminal,
            spec: Some(Any {
                type_url: PROCESS.into(),
                value: process.to_string().into_bytes(),
            }),
        };
        self.call(request, |channel, request| async {
            TasksClient::new(channel).exec(request).await
        })
        .map(drop)
    }

    /// Delete, of a task or an exec.
    pub fn delete(&self, id: &str, exec_id: &str) -> Result<Ended, Refused> {
        let answer = if exec_id.is_empty() {
            let request = pb::DeleteTaskRequest {
                container_id: id.into(),
            };
            self.call(request, |channel, request| async {
                TasksClient::new(channel).delete(request).await
            })
        } else {
            let request = pb::DeleteProcessRequest {
                container_id: id.into(),
                exec_id: exec_id.into(),
            };
            self.call(request, |channel, request| async {
                TasksClient::new(channel).delete_process(request).await
            })
        };
        answer.map(|answer| Ended {
            pid: answer.pid,
            status: answer.exit_status,
            at: seconds(answer.exited_at),
        })
    }

    /// Wait.
    pub fn wait(&self, id: &str, exec_id: &str) -> Result<Ended, Refused> {
        let request = pb::WaitRequest {
            container_id: id.into(),
            exec_id: exec_id.into(),
        };
        self.call(request, |channel, request| async {
            TasksClient::new(channel).wait(request).await
        })
        .map(|answer| Ended {
            pid: 0,
            status: answer.exit_status,
            at: seconds(answer.exited_at),
        })
    }

    /// Kill.
    pub fn kill(&self, id: &str, exec_id: &str, signal: u32) -> Result<(), Refused> {
        self.kill_some(id, exec_id, signal, false)
    }

    /// Kill with `all`.
    pub fn kill_all(&self, id: &str, signal: u32) -> Result<(), Refused> {
        self.kill_some(id, "", signal, true)
    }

    fn kill_some(&self, id: &str, exec_id: &str, signal: u32, all: bool) -> Result<(), Refused> {
        let request = pb::KillRequest {
            container_id: id.into(),
            exec_id: exec_id.into(),
            signal,
            all,
        };
        self.call(request, |channel, request| async {
            TasksClient::new(channel).kill(request).await
        })
    }

    /// Pids, each with the id of its exec, or empty.
    pub fn pids(&self, id: &str) -> Result<Vec<(u32, String)>, Refused> {
        let request = pb::ListPidsRequest {
            container_id: id.into(),
        };
        let answer = self.call(request, |channel, request| async {
            TasksClient::new(channel).list_pids(request).await
        })?;
        Ok(answer.processes.iter().map(pid_and_exec).collect())
    }

    /// Pause. On a loaded machine runc gives up on a cgroup (v1) that forks meanwhile, and says so:
    /// then again.
    pub fn pause(&self, id: &str) -> Result<(), Refused> {
        let began = Instant::now();
        loop {
            let request = pb::PauseTaskRequest {
                container_id: id.into(),
            };
            let answer = self.call(request, |channel, request| async {
                TasksClient::new(channel).pause(request).await
            });
            match &answer {
                Err(refused)
                    if refused.message.contains(NOT_FROZEN) && began.elapsed() < ANSWERS_WITHIN => {
                }
                _ => return answer,
            }
        }
    }

    /// Resume.
    pub fn resume(&self, id: &str) -> Result<(), Refused> {
        let request = pb::ResumeTaskRequest {
            container_id: id.into(),
        };
        self.call(request, |channel, request| async {
            TasksClient::new(channel).resume(request).await
        })
    }

    /// Checkpoint; containerd leaves the images where `options` say.
    pub fn checkpoint(&self, id: &str, options: &runc::CheckpointOptions) -> Result<(), Refused> {
        let request = pb::CheckpointTaskRequest {
            container_id: id.into(),
            options: Some(Any {
                type_url: recoverd_common::pb::type_url::CHECKPOINT_OPTIONS.into(),
                value: options.encode_to_vec(),
            }),
            ..pb::CheckpointTaskRequest::default()
        };
        self.call(request, |channel, request| async {
            TasksClient::new(channel).checkpoint(request).await
        })
        .map(drop)
    }

    /// Update with these OCI resources.
    pub fn update(&self, id: &str, resources: &Value) -> Result<(), Refused> {
        let request = pb::UpdateTaskRequest {
            container_id: id.into(),
            resources: Some(Any {
                type_url: RESOURCES.into(),
                value: resources.to_string().into_bytes(),
            }),
            ..pb::UpdateTaskRequest::default()
        };
        self.call(request, |channel, request| async {
            TasksClient::new(channel).update(request).await
        })
    }

    /// ResizePty.
    pub fn resize(&self, id: &str, exec_id: &str, width: u32, height: u32) -> Result<(), Refused> {
        let request = pb::ResizePtyRequest {
            container_id: id.into(),
            exec_id: exec_id.into(),
            width,
            height,
        };
        self.call(request, |channel, request| async {
            TasksClient::new(channel).resize_pty(request).await
        })
    }

    /// CloseIO of stdin.
    pub fn close_stdin(&self, id: &str, exec_id: &str) -> Result<(), Refused> {
        let request = pb::CloseIoRequest {
            container_id: id.into(),
            exec_id: exec_id.into(),
            stdin: true,
        };
        self.call(request, |channel, request| async {
            TasksClient::new(channel).close_io(request).await
        })
    }

    /// The type of what Stats gives.
    pub fn metrics_type(&self, id: &str) -> Result<String, Refused> {
        let request = pb::MetricsRequest {
            filters: vec![format!("id=={id}")],
        };
        let answer = self.call(request, |channel, request| async {
            TasksClient::new(channel).metrics(request).await
        })?;
        let data = answer
            .metrics
            .into_iter()
            .next()
            .and_then(|metric| metric.data);
        Ok(data.map(|any| any.type_url).unwrap_or_default())
    }

    /// Makes a container and its task and starts it; the init's pid.
    #[track_caller]
    pub fn run(&self, id: &str, spec: &Value, shim: ShimUnderTest, stdio: &Stdio) -> u32 {
        self.container(id, spec, shim, None);
        let pid = self
            .create(id, stdio)
            .unwrap_or_else(|refused| panic!("create task {id}: {refused:?}"));
        self.start(id, "")
            .unwrap_or_else(|refused| panic!("start task {id}: {refused:?}"));
        pid
    }

    /// Adds an exec and starts it; its pid.
    #[track_caller]
    pub fn run_exec(&self, id: &str, exec_id: &str, process: &Value, stdio: &Stdio) -> u32 {
        self.exec(id, exec_id, process, stdio)
            .unwrap_or_else(|refused| panic!("exec {exec_id} in {id}: {refused:?}"));
        self.start(id, exec_id)
            .unwrap_or_else(|refused| panic!("start exec {exec_id} in {id}: {refused:?}"))
    }

    /// The exit status that Wait gives, which must answer.
    #[track_caller]
    pub fn status(&self, id: &str, exec_id: &str) -> u32 {
        self.wait(id, exec_id)
            .unwrap_or_else(|refused| panic!("wait for {id} {exec_id:?}: {refused:?}"))
            .status
    }

    /// Kills a task's init, waits for its end and deletes the task.
    #[track_caller]
    pub fn end(&self, id: &str) -> Ended {
        match self.kill(id, "", 9) {
            Ok(()) => {}
            // It may have ended by itself.
            Err(refused) if refused.code == Code::NotFound => {}
            Err(refused) => panic!("kill {id}: {refused:?}"),
        }
        self.status(id, "");
        self.delete(id, "")
            .unwrap_or_else(|refused| panic!("delete {id}: {refused:?}"))
    }
}

/// Fails unless a call was refused with that code and a text that has these words in it.
#[track_caller]
pub fn assert_refused<T: std::fmt::Debug>(result: Result<T, Refused>, code: Code, words: &str) {
    match result {
        Err(refused) if refused.code == code && refused.message.contains(words) => {}
        other => panic!("expected {code:?} with {words:?}, got {other:?}"),
    }
}

/// As a container has them in its `runtime.options`.
pub fn runc_options(options: &runc::Options) -> Any {
    Any {
        type_url: recoverd_common::pb::type_url::RUNC_OPTIONS.into(),
        value: options.encode_to_vec(),
    }
}

/// A container's OCI specification: this command on busybox, in namespaces of its own.
pub fn oci_spec(id: &str, args: &[&str]) -> Value {
    let mount = |kind: &str, destination: &str, options: &[&str]| serde_json::json!({"type": kind, "source": kind, "destination": destination, "options": options});
    serde_json::json!({
        "ociVersion": "1.0.2",
        "process": oci_process(args),
        "root": {"path": crate::releases::rootfs()},
        "mounts": [
            mount("proc", "/proc", &["nosuid", "noexec", "nodev"]),
            mount("tmpfs", "/dev", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
            mount("devpts", "/dev/pts", &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]),
        ],
        "linux": {
            "cgroupsPath": Path::new("/e2e").join(id),
            "namespaces": [{"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}, {"type": "network"}],
            "resources": {"devices": [{"allow": false, "access": "rwm"}]},
        },
    })
}

/// Sleeps until SIGTERM, then exits 0.
pub const SLEEPER: [&str; 3] = [
    "sh",
    "-c",
    "trap 'exit 0' TERM; while :; do sleep 1000 & wait $!; done",
];

/// The exit status of what SIGKILL has ended.
pub const KILLED: u32 = 128 + 9;

/// The OCI process of that command, as root.
pub fn oci_process(args: &[&str]) -> Value {
    let capabilities = [
        "CAP_CHOWN",
        "CAP_DAC_OVERRIDE",
        "CAP_KILL",
        "CAP_SETUID",
        "CAP_SETGID",
    ];
    serde_json::json!({
        "user": {"uid": 0, "gid": 0},
        "args": args,
        "env": ["PATH=/bin"],
        "cwd": "/",
        "capabilities": {"bounding": capabilities, "effective": capabilities, "permitted": capabilities},
    })
}

fn pid_and_exec(process: &ProcessInfo) -> (u32, String) {
    let exec_id = process.info.as_ref().map(|any| {
        assert!(
            any.type_url
                .ends_with(recoverd_common::pb::type_url::PROCESS_DETAILS),
            "details of a process are {any:?}"
        );
        let details = runc::ProcessDetails::decode(any.value.as_slice())
            .unwrap_or_else(|error| panic!("details of a process are {any:?}: {error}"));
        details.exec_id
    });
    (process.pid, exec_id.unwrap_or_default())
}

fn seconds(at: Option<prost_types::Timestamp>) -> (i64, i32) {
    at.map_or((0, 0), |at| (at.seconds, at.nanos))
}

//! Kubernetes' own interface to containerd, as kubelet uses it: pods, their containers, logs.
//!
//! Pods have the host's network (a node has no other) and no seccomp or AppArmor profile: these are
//! containerd's affair and not the shim's.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use containerd_client::tonic::Request;
use k8s_cri::v1 as pb;
use k8s_cri::v1::image_service_client::ImageServiceClient;
use k8s_cri::v1::runtime_service_client::RuntimeServiceClient;

use crate::client::{Client, Refused};
use crate::container::{Container, Task};
use crate::containerd::Containerd;
use crate::cri_stream::Session;
use crate::node::Node;
use crate::releases::{Release, ShimUnderTest, built};
use crate::wait::wait_for;

/// containerd's namespace of all that the CRI makes.
const NAMESPACE: &str = "k8s.io";
/// The CRI's table in a configuration of version 2.
const CRI: &str = "plugins.\"io.containerd.grpc.v1.cri\"";
const IMAGE: &str = "localhost/busybox:latest";
const PAUSE: &str = "localhost/pause:latest";

/// A runtime of containerd's CRI configuration, by its name there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Handler {
    /// The release's own shim.
    Stock,
    /// Ours by `runtime_type`.
    ByType,
    /// Ours by `runtime_path`, with the stock `runtime_type`.
    ByPath,
}

impl Handler {
    /// All that [`crate::Node::kubernetes`] configures.
    pub const ALL: [Handler; 3] = [Handler::Stock, Handler::ByType, Handler::ByPath];

    /// Ours as the README recommends it for that release. 1.6.20 ignores `runtime_path`, and would
    /// run the stock shim.
    pub fn recommended(release: &Release) -> Handler {
        match &*release.version {
            "1.6.20" => Handler::ByType,
            _ => Handler::ByPath,
        }
    }

    /// Where runc keeps its state if containerd hands on the options that this has on that release:
    /// of a runtime that it does not know by its type, from 1.7 on, they are the text of its table.
    pub fn runc_root(self, release: &Release) -> &'static str {
        match (self, release.name) {
            (Handler::ByType, name) if name != "1.6" => "/run/of-type",
            _ => "/run/containerd/runc",
        }
    }

    /// The name, as a RuntimeClass has it in `handler`.
    pub fn name(self) -> &'static str {
        match self {
            Handler::Stock => "stock",
            Handler::ByType => "recoverd",
            Handler::ByPath => "recoverd-path",
        }
    }
}

impl From<ShimUnderTest> for Handler {
    fn from(shim: ShimUnderTest) -> Handler {
        match shim {
            ShimUnderTest::Stock => Handler::Stock,
            ShimUnderTest::Recoverd => Handler::ByType,
        }
    }
}

impl Node {
    /// The containerd at the usual places with its CRI on and every [`Handler`] configured,
    /// started, and the images there.
    #[track_caller]
    pub fn kubernetes(self: &Arc<Node>, release: &Release) -> Containerd {
        self.pods_by(release, 2, config(release))
    }

    /// The same with the CRI configured by `runtimes`, a whole part of `config.toml` that begins
    /// with its version, as an operator writes it.
    #[track_caller]
    pub fn kubernetes_by(self: &Arc<Node>, release: &Release, runtimes: &str) -> Containerd {
        let version = runtimes.lines().next().unwrap_or_default();
        let (version, needed) = match version {
            "version = 2" => (2, needed_by_version_2()),
            "version = 3" => (3, needed_by_version_3()),
            other => panic!("not a version of containerd's configuration: {other:?}"),
        };
        let runtimes = runtimes.lines().skip(1).collect::<Vec<_>>().join("\n");
        self.pods_by(release, version, format!("{needed}\n{runtimes}\n"))
    }

    #[track_caller]
    fn pods_by(self: &Arc<Node>, release: &Release, version: u32, config: String) -> Containerd {
        let mut containerd = Containerd::new(self, release, None);
        containerd.pods(version, config);
        containerd.start();
        for image in ["pause", "busybox"] {
            containerd.import_archive(NAMESPACE, image);
        }
        containerd.cri().wait_for_images();
        containerd
    }
}

/// What the tests need whatever the runtimes are.
fn needed_by_version_2() -> String {
    // An exec whose output somebody else holds is given up; the default is to wait for ever. And
    // the tests' root may not give a process a better score than its own.
    format!(
        "[{CRI}]\nsandbox_image = {PAUSE:?}\ndisable_apparmor = true\n\
         drain_exec_sync_io_timeout = \"3s\"\nrestrict_oom_score_adj = true\n"
    )
}

/// The same where the CRI is two plugins.
fn needed_by_version_3() -> String {
    format!(
        "[plugins.\"io.containerd.cri.v1.images\".pinned_images]\nsandbox = {PAUSE:?}\n\
         [plugins.\"io.containerd.cri.v1.runtime\"]\ndisable_apparmor = true\n\
         drain_exec_sync_io_timeout = \"3s\"\nrestrict_oom_score_adj = true\n"
    )
}

/// Every [`Handler`], in the form that every release reads; 2.x takes it over into its own tables.
fn config(release: &Release) -> String {
    let table = |handler: Handler| format!("{CRI}.containerd.runtimes.{}", handler.name());
    let runtime = |handler: Handler, rest: String| format!("[{}]\n{rest}\n", table(handler));
    let options = format!(
        "[{}.options]\nRoot = {:?}\n",
        table(Handler::ByType),
        Handler::ByType.runc_root(release)
    );
    let ours = built("containerd-shim-recoverd-v1");
    [
        needed_by_version_2(),
        format!(
            "[{CRI}.containerd]\ndefault_runtime_name = \"{}\"",
            Handler::Stock.name()
        ),
        runtime(
            Handler::Stock,
            "runtime_type = \"io.containerd.runc.v2\"".into(),
        ),
        runtime(
            Handler::ByType,
            "runtime_type = \"io.containerd.recoverd.v1\"".into(),
        ),
        options,
        runtime(
            Handler::ByPath,
            format!("runtime_type = \"io.containerd.runc.v2\"\nruntime_path = {ours:?}"),
        ),
    ]
    .join("\n")
}

/// A client of containerd's CRI. May be shared between threads.
pub struct Cri {
    client: Client,
    /// Holds the logs, and is at `/mnt` in each container.
    folder: PathBuf,
    /// The network namespace of its streaming server.
    network: PathBuf,
    /// The cgroup of every pod; empty for none.
    cgroup_parent: String,
}

/// A pod that was started.
#[derive(Clone)]
pub struct Pod {
    /// Its id, the pause container's as well.
    pub id: String,
    /// Its name.
    pub name: String,
    config: pb::PodSandboxConfig,
}

/// A container to make: busybox with the node's folder at `/mnt`.
#[derive(Clone)]
pub struct ContainerSpec(pb::ContainerConfig);

impl ContainerSpec {
    /// This line of shell.
    pub fn shell(name: &str, line: &str) -> ContainerSpec {
        ContainerSpec(pb::ContainerConfig {
            metadata: Some(pb::ContainerMetadata {
                name: name.into(),
                attempt: 0,
            }),
            image: Some(pb::ImageSpec {
                image: IMAGE.into(),
                ..pb::ImageSpec::default()
            }),
            command: vec!["/bin/sh".into(), "-c".into(), line.into()],
            log_path: format!("{name}.log"),
            linux: Some(pb::LinuxContainerConfig {
                resources: Some(pb::LinuxContainerResources::default()),
                security_context: Some(pb::LinuxContainerSecurityContext {
                    namespace_options: Some(namespaces()),
                    seccomp: Some(unconfined()),
                    ..pb::LinuxContainerSecurityContext::default()
                }),
            }),
            ..pb::ContainerConfig::default()
        })
    }

    /// Runs until it is told to end, then exits with `status`.
    pub fn until_term(name: &str, status: u8) -> ContainerSpec {
        ContainerSpec::shell(
            name,
            &format!("trap 'exit {status}' TERM; while :; do sleep 1000 & wait $!; done"),
        )
    }

    /// With other resources.
    pub fn resources(mut self, resources: pb::LinuxContainerResources) -> ContainerSpec {
        if let Some(linux) = &mut self.0.linux {
            linux.resources = Some(resources);
        }
        self
    }

    /// With a memory limit.
    pub fn memory_limit(self, bytes: i64) -> ContainerSpec {
        self.resources(pb::LinuxContainerResources {
            memory_limit_in_bytes: bytes,
            ..pb::LinuxContainerResources::default()
        })
    }

    /// As this user.
    pub fn user(mut self, uid: i64) -> ContainerSpec {
        if let Some(security) = self
            .0
            .linux
            .as_mut()
            .and_then(|l| l.security_context.as_mut())
        {
            security.run_as_user = Some(pb::Int64Value { value: uid });
        }
        self
    }

    /// With a stdin to attach to.
    pub fn stdin(mut self) -> ContainerSpec {
        self.0.stdin = true;
        self
    }

    /// With a terminal.
    pub fn terminal(mut self) -> ContainerSpec {
        self.0.tty = true;
        self
    }
}

fn namespaces() -> pb::NamespaceOption {
    pb::NamespaceOption {
        network: pb::NamespaceMode::Node.into(),
        pid: pb::NamespaceMode::Container.into(),
        ..pb::NamespaceOption::default()
    }
}

fn unconfined() -> pb::SecurityProfile {
    pb::SecurityProfile {
        profile_type: pb::security_profile::ProfileType::Unconfined.into(),
        ..pb::SecurityProfile::default()
    }
}

/// One method: its name, what it is asked with and what it answers.
macro_rules! rpc {
    ($cri:expr, $method:ident, $request:expr) => {
        $cri.client
            .call(Request::new($request), |channel, request| async move {
                RuntimeServiceClient::new(channel).$method(request).await
            })
    };
}

/// What a call that has to succeed gave.
#[track_caller]
fn must<T>(what: &str, answer: Result<T, Refused>) -> T {
    answer.unwrap_or_else(|refused| panic!("{what}: {refused:?}"))
}

impl Containerd {
    /// A client of its CRI, which [`crate::Node::kubernetes`] has turned on and which serves.
    #[track_caller]
    pub fn cri(&self) -> Cri {
        let node = self.node();
        Cri {
            client: Client::of(self),
            folder: node.folder().to_owned(),
            network: node.path("/proc/1/ns/net"),
            cgroup_parent: String::new(),
        }
        .serving()
    }

    /// A container of a pod, with its processes as they are now; the pod's own id names its pause.
    #[track_caller]
    pub fn member(&self, pod: &Pod, id: &str) -> Task {
        let container = Container::new(id).namespaced(NAMESPACE).group(&pod.id);
        Task::new(self, &container)
    }
}

impl Cri {
    /// That of the machine's own containerd, with pods in this slice of systemd's: for what runs in
    /// a box. Logs and what containers share are in `folder`.
    #[track_caller]
    pub fn of_machine(folder: &Path, slice: &str) -> Cri {
        Cri {
            client: Client::at("/run/containerd/containerd.sock".as_ref()),
            folder: folder.to_owned(),
            network: "/proc/self/ns/net".into(),
            cgroup_parent: slice.to_owned(),
        }
        .serving()
    }

    /// It refuses everything until it has looked at every pod.
    #[track_caller]
    fn serving(self) -> Cri {
        wait_for("the CRI to serve", || {
            rpc!(self, list_pod_sandbox, pb::ListPodSandboxRequest::default()).ok()
        });
        self
    }

    #[track_caller]
    fn wait_for_images(&self) {
        self.wait_for(&[PAUSE, IMAGE]);
    }

    /// The CRI learns of imported images by containerd's events.
    #[track_caller]
    pub fn wait_for(&self, images: &[&str]) {
        for image in images {
            wait_for(&format!("image {image}"), || {
                let request = pb::ImageStatusRequest {
                    image: Some(pb::ImageSpec {
                        image: (*image).into(),
                        ..pb::ImageSpec::default()
                    }),
                    verbose: false,
                };
                let call = |channel, request| async move {
                    ImageServiceClient::new(channel).image_status(request).await
                };
                self.client.call(Request::new(request), call).ok()?.image
            });
        }
    }

    /// RunPodSandbox.
    pub fn try_run_pod(&self, name: &str, handler: &str) -> Result<Pod, Refused> {
        let logs = self.folder.join("pods").join(name);
        let config = pb::PodSandboxConfig {
            metadata: Some(pb::PodSandboxMetadata {
                name: name.into(),
                uid: format!("uid-{name}"),
                namespace: "prod".into(),
                attempt: 0,
            }),
            log_directory: logs.display().to_string(),
            linux: Some(pb::LinuxPodSandboxConfig {
                cgroup_parent: self.cgroup_parent.clone(),
                security_context: Some(pb::LinuxSandboxSecurityContext {
                    namespace_options: Some(namespaces()),
                    seccomp: Some(unconfined()),
                    ..pb::LinuxSandboxSecurityContext::default()
                }),
                ..pb::LinuxPodSandboxConfig::default()
            }),
            ..pb::PodSandboxConfig::default()
        };
        let request = pb::RunPodSandboxRequest {
            config: Some(config.clone()),
            runtime_handler: handler.into(),
        };
        let id = rpc!(self, run_pod_sandbox, request)?.pod_sandbox_id;
        Ok(Pod {
            id,
            name: name.into(),
            config,
        })
    }

    /// RunPodSandbox, which must succeed.
    #[track_caller]
    pub fn run_pod(&self, name: &str, handler: Handler) -> Pod {
        must("run pod", self.try_run_pod(name, handler.name()))
    }

    /// PodSandboxStatus: whether it is ready; `None` when there is no such pod.
    #[track_caller]
    pub fn pod_ready(&self, pod: &Pod) -> Option<bool> {
        let request = pb::ListPodSandboxRequest {
            filter: Some(pb::PodSandboxFilter {
                id: pod.id.clone(),
                ..pb::PodSandboxFilter::default()
            }),
        };
        let listed = must("list pod", rpc!(self, list_pod_sandbox, request));
        let row = listed.items.into_iter().next()?;
        Some(row.state() == pb::PodSandboxState::SandboxReady)
    }

    /// Waits until a pod is not ready: containerd 2.x says that it has stopped one before it has
    /// heard of its end.
    #[track_caller]
    pub fn wait_pod_down(&self, pod: &Pod) {
        wait_for("a pod that is not ready", || {
            (self.pod_ready(pod) == Some(false)).then_some(())
        });
    }

    /// StopPodSandbox.
    pub fn try_stop_pod(&self, id: &str) -> Result<(), Refused> {
        let request = pb::StopPodSandboxRequest {
            pod_sandbox_id: id.into(),
        };
        rpc!(self, stop_pod_sandbox, request).map(drop)
    }

    /// StopPodSandbox, which must succeed.
    #[track_caller]
    pub fn stop_pod(&self, pod: &Pod) {
        must("stop pod", self.try_stop_pod(&pod.id));
    }

    /// RemovePodSandbox.
    pub fn try_remove_pod(&self, id: &str) -> Result<(), Refused> {
        let request = pb::RemovePodSandboxRequest {
            pod_sandbox_id: id.into(),
        };
        rpc!(self, remove_pod_sandbox, request).map(drop)
    }

    /// RemovePodSandbox, which must succeed.
    #[track_caller]
    pub fn remove_pod(&self, pod: &Pod) {
        must("remove pod", self.try_remove_pod(&pod.id));
    }

    /// Stops and removes every other pod with its containers, as kubelet does with those that
    /// nobody wants any more.
    #[track_caller]
    pub fn clear_but(&self, kept: &Pod) {
        let request = pb::ListPodSandboxRequest::default();
        let listed = must("list pods", rpc!(self, list_pod_sandbox, request));
        for pod in listed.items.iter().filter(|pod| pod.id != kept.id) {
            must("stop pod", self.try_stop_pod(&pod.id));
            must("remove pod", self.try_remove_pod(&pod.id));
        }
    }

    /// CreateContainer; its id.
    pub fn try_create(&self, pod: &Pod, container: &ContainerSpec) -> Result<String, Refused> {
        let mut config = container.0.clone();
        let folder = self.folder.display().to_string();
        config.mounts.push(pb::Mount {
            container_path: "/mnt".into(),
            host_path: folder,
            ..pb::Mount::default()
        });
        let request = pb::CreateContainerRequest {
            pod_sandbox_id: pod.id.clone(),
            config: Some(config),
            sandbox_config: Some(pod.config.clone()),
        };
        rpc!(self, create_container, request).map(|answer| answer.container_id)
    }

    /// CreateContainer, which must succeed; its id.
    #[track_caller]
    pub fn create(&self, pod: &Pod, container: &ContainerSpec) -> String {
        must("create container", self.try_create(pod, container))
    }

    /// StartContainer.
    pub fn try_start(&self, id: &str) -> Result<(), Refused> {
        let request = pb::StartContainerRequest {
            container_id: id.into(),
        };
        rpc!(self, start_container, request).map(drop)
    }

    /// StartContainer, which must succeed.
    #[track_caller]
    pub fn start(&self, id: &str) {
        must("start container", self.try_start(id));
    }

    /// Creates and starts; the id.
    #[track_caller]
    pub fn run(&self, pod: &Pod, container: &ContainerSpec) -> String {
        let id = self.create(pod, container);
        self.start(&id);
        id
    }

    /// ContainerStatus.
    pub fn status(&self, id: &str) -> Result<pb::ContainerStatus, Refused> {
        let request = pb::ContainerStatusRequest {
            container_id: id.into(),
            verbose: false,
        };
        Ok(rpc!(self, container_status, request)?
            .status
            .unwrap_or_default())
    }

    /// Its init's pid, as the CRI says it on request.
    #[track_caller]
    pub fn pid(&self, id: &str) -> u32 {
        let request = pb::ContainerStatusRequest {
            container_id: id.into(),
            verbose: true,
        };
        let answer = must("status of", rpc!(self, container_status, request));
        let text = answer.info.get("info").map_or("", String::as_str);
        let info: serde_json::Value = serde_json::from_str(text)
            .unwrap_or_else(|error| panic!("verbose status of {id}: {error}: {answer:?}"));
        let pid = info["pid"].as_u64().and_then(|pid| u32::try_from(pid).ok());
        pid.unwrap_or_else(|| panic!("no pid in {info}"))
    }

    /// Waits until an OOM kill of it is told: an event of its own, in no order with its exit.
    #[track_caller]
    pub fn wait_oom_killed(&self, id: &str) {
        wait_for(&format!("an OOM kill of {id}"), || {
            let (code, why) = self.exited(id);
            assert_eq!(code, 137, "{id}");
            (why == "OOMKilled").then_some(())
        });
    }

    /// Waits until it has exited: its exit code and the reason.
    #[track_caller]
    pub fn exited(&self, id: &str) -> (i32, String) {
        wait_for(&format!("{id} to exit"), || {
            let status = must("status", self.status(id));
            (status.state() == pb::ContainerState::ContainerExited)
                .then_some((status.exit_code, status.reason))
        })
    }

    /// Fails unless it is running.
    #[track_caller]
    pub fn assert_running(&self, id: &str) {
        let status = self.status(id).map(|status| status.state());
        assert_eq!(status, Ok(pb::ContainerState::ContainerRunning), "{id}");
    }

    /// StopContainer with this grace period, seconds.
    pub fn try_stop(&self, id: &str, timeout: i64) -> Result<(), Refused> {
        let request = pb::StopContainerRequest {
            container_id: id.into(),
            timeout,
        };
        rpc!(self, stop_container, request).map(drop)
    }

    /// StopContainer, which must succeed.
    #[track_caller]
    pub fn stop(&self, id: &str, timeout: i64) {
        must("stop container", self.try_stop(id, timeout));
    }

    /// RemoveContainer.
    pub fn try_remove(&self, id: &str) -> Result<(), Refused> {
        let request = pb::RemoveContainerRequest {
            container_id: id.into(),
        };
        rpc!(self, remove_container, request).map(drop)
    }

    /// RemoveContainer, which must succeed.
    #[track_caller]
    pub fn remove(&self, id: &str) {
        must("remove container", self.try_remove(id));
    }

    /// ExecSync of a line of shell, `timeout` in seconds (0: none).
    pub fn exec_sync(
        &self,
        id: &str,
        line: &str,
        timeout: i64,
    ) -> Result<pb::ExecSyncResponse, Refused> {
        let request = pb::ExecSyncRequest {
            container_id: id.into(),
            cmd: vec!["sh".into(), "-c".into(), line.into()],
            timeout,
        };
        rpc!(self, exec_sync, request)
    }

    /// ExecSync that must answer: exit code and stdout.
    #[track_caller]
    pub fn sh(&self, id: &str, line: &str) -> (i32, String) {
        let answer = must(line, self.exec_sync(id, line, 30));
        (
            answer.exit_code,
            String::from_utf8_lossy(&answer.stdout).into_owned(),
        )
    }

    /// Exec over the streaming server.
    #[track_caller]
    pub fn exec(&self, id: &str, line: &str, stdin: bool, tty: bool) -> Session {
        let request = pb::ExecRequest {
            container_id: id.into(),
            cmd: vec!["sh".into(), "-c".into(), line.into()],
            tty,
            stdin,
            stdout: true,
            stderr: !tty,
        };
        wait_for("a session", || {
            let answer = must("exec", rpc!(self, exec, request.clone()));
            Session::open(&self.network, &answer.url)
        })
    }

    /// Attach over the streaming server.
    #[track_caller]
    pub fn attach(&self, id: &str, stdin: bool, tty: bool) -> Session {
        let request = pb::AttachRequest {
            container_id: id.into(),
            stdin,
            tty,
            stdout: true,
            stderr: !tty,
        };
        wait_for("a session", || {
            let answer = must("attach to", rpc!(self, attach, request.clone()));
            Session::open(&self.network, &answer.url)
        })
    }

    /// ContainerStats.
    pub fn try_stats(&self, id: &str) -> Result<pb::ContainerStats, Refused> {
        let request = pb::ContainerStatsRequest {
            container_id: id.into(),
        };
        Ok(rpc!(self, container_stats, request)?
            .stats
            .unwrap_or_default())
    }

    /// ContainerStats, which must answer.
    #[track_caller]
    pub fn stats(&self, id: &str) -> pb::ContainerStats {
        must("stats", self.try_stats(id))
    }

    /// UpdateContainerResources.
    pub fn try_update(
        &self,
        id: &str,
        resources: pb::LinuxContainerResources,
    ) -> Result<(), Refused> {
        let request = pb::UpdateContainerResourcesRequest {
            container_id: id.into(),
            linux: Some(resources),
            ..pb::UpdateContainerResourcesRequest::default()
        };
        rpc!(self, update_container_resources, request).map(drop)
    }

    /// UpdateContainerResources, which must succeed.
    #[track_caller]
    pub fn update(&self, id: &str, resources: pb::LinuxContainerResources) {
        must("update", self.try_update(id, resources));
    }

    /// Where containerd writes what this container says.
    pub fn log_file(&self, pod: &Pod, name: &str) -> PathBuf {
        let folder = self.folder.join("pods").join(&pod.name);
        folder.join(format!("{name}.log"))
    }

    /// The lines in its log file so far, without what the CRI puts before each, of one stream.
    #[track_caller]
    pub fn log(&self, pod: &Pod, name: &str, stream: &str) -> Vec<String> {
        let path = self.log_file(pod, name);
        let text = fs::read_to_string(&path)
            .unwrap_or_else(|error| panic!("read {}: {error}", path.display()));
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        let mut lines = Vec::new();
        for line in whole.lines() {
            // TIME STREAM TAG TEXT
            let mut words = line.splitn(4, ' ');
            let (of, tag, text) = (words.nth(1), words.next(), words.next());
            assert!(
                of.is_some() && tag == Some("F") && text.is_some(),
                "log line {line:?}"
            );
            if of == Some(stream) {
                lines.extend(text.map(str::to_owned));
            }
        }
        lines
    }
}

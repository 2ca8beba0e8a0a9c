//! What to run, and a handle on what runs.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::containerd::Containerd;
use crate::direct::serving;
use crate::node::Node;
use crate::process::Process;
use crate::releases::{ShimUnderTest, rootfs};
use crate::wait::wait_for;

/// A container to run: busybox, sleeping for ever, with the stock shim, unless told otherwise.
#[derive(Clone, Debug)]
pub struct Container {
    namespace: String,
    id: String,
    group: Option<String>,
    config: Option<PathBuf>,
    image: bool,
    terminal: bool,
    command: Vec<String>,
    options: Vec<String>,
}

impl Container {
    /// One with that id in the namespace `e2e`.
    pub fn new(id: &str) -> Container {
        Container {
            namespace: "e2e".into(),
            id: id.into(),
            group: None,
            config: None,
            image: false,
            terminal: false,
            // Ends at once on SIGTERM, unlike a bare `sleep` as PID 1.
            command: [
                "sh",
                "-c",
                "trap 'exit 0' TERM; while :; do sleep 1000 & wait $!; done",
            ]
            .map(str::to_owned)
            .to_vec(),
            options: Vec::new(),
        }
    }

    /// In another containerd namespace.
    pub fn namespaced(mut self, namespace: &str) -> Container {
        self.namespace = namespace.into();
        self
    }

    /// Runs this instead.
    pub fn command<const N: usize>(mut self, command: [&str; N]) -> Container {
        self.command = command.map(str::to_owned).to_vec();
        self
    }

    /// With a terminal.
    pub fn terminal(mut self) -> Container {
        self.terminal = true;
        self
    }

    /// On a root file system that containerd mounts (see [`Containerd::import_image`]).
    pub fn image(mut self) -> Container {
        self.image = true;
        self
    }

    /// With another shim: a runtime name or the absolute path of a shim.
    pub fn runtime(self, runtime: impl AsRef<Path>) -> Container {
        let runtime = runtime.as_ref().display().to_string();
        self.option(&["--runtime", &runtime])
    }

    /// With the stock shim or ours.
    pub fn shim(self, shim: ShimUnderTest) -> Container {
        self.runtime(shim.runtime())
    }

    /// As this OCI `config.json` says, and nothing else: its path in the node.
    pub fn config(mut self, file: impl AsRef<Path>) -> Container {
        self.config = Some(file.as_ref().to_owned());
        self
    }

    /// In the shim of that group, as the runc shim groups by annotation.
    pub fn group(mut self, group: &str) -> Container {
        self.group = Some(group.into());
        self.annotation("io.containerd.runc.v2.group", group)
    }

    /// A container of a Kubernetes pod, as the CRI would annotate it: `sandbox` is the id of the
    /// pod's pause container (and of the shim's group); `name` is `None` for that one itself.
    pub fn pod(self, sandbox: &str, namespace: &str, pod: &str, name: Option<&str>) -> Container {
        let kind = if name.is_some() {
            "container"
        } else {
            "sandbox"
        };
        let container = self
            .annotation("io.kubernetes.cri.container-type", kind)
            .annotation("io.kubernetes.cri.sandbox-id", sandbox)
            .annotation("io.kubernetes.cri.sandbox-namespace", namespace)
            .annotation("io.kubernetes.cri.sandbox-name", pod);
        let mut container = match name {
            Some(name) => container.annotation("io.kubernetes.cri.container-name", name),
            None => container,
        };
        container.group = Some(sandbox.into());
        container
    }

    /// With an OCI annotation.
    pub fn annotation(self, key: &str, value: &str) -> Container {
        self.option(&["--annotation", &format!("{key}={value}")])
    }

    /// With a memory limit.
    pub fn memory_limit(self, bytes: u64) -> Container {
        self.option(&["--memory-limit", &bytes.to_string()])
    }

    /// With its output to `file://…` or `binary://…`.
    pub fn log_uri(self, uri: &str) -> Container {
        self.option(&["--log-uri", uri])
    }

    /// With other options of `ctr run`.
    pub fn option(mut self, words: &[&str]) -> Container {
        self.options
            .extend(words.iter().map(|word| (*word).to_owned()));
        self
    }

    /// Its containerd namespace.
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// Its id.
    pub fn id(&self) -> &str {
        &self.id
    }

    pub(crate) fn has_terminal(&self) -> bool {
        self.terminal
    }

    pub(crate) fn run_args(&self) -> Vec<String> {
        let mut args = self.options.clone();
        if self.terminal {
            args.push("--tty".into());
        }
        if let Some(config) = &self.config {
            // Root and command are in there.
            args.extend([
                "--config".into(),
                config.display().to_string(),
                self.id.clone(),
            ]);
            return args;
        }
        // On a bare root `ctr` sets no PATH.
        args.extend(["--env".into(), "PATH=/bin".into()]);
        if self.image {
            args.push("localhost/busybox:latest".into());
        } else {
            args.push("--rootfs".into());
            args.push(rootfs().display().to_string());
        }
        args.push(self.id.clone());
        args.extend(self.command.iter().cloned());
        args
    }
}

/// A container that was started, and the processes that it had then.
#[derive(Clone)]
pub struct Task {
    node: Arc<Node>,
    namespace: String,
    id: String,
    bundle: PathBuf,
    socket: PathBuf,
    /// The container's first process, as it was at the start.
    pub init: Process,
    /// Its shim, as it was at the start.
    pub shim: Process,
}

impl Task {
    #[track_caller]
    pub(crate) fn new(containerd: &Containerd, container: &Container) -> Task {
        let node = containerd.node();
        let bundle = containerd
            .state()
            .join("io.containerd.runtime.v2.task")
            .join(container.namespace())
            .join(container.id());
        let socket = wait_for(&format!("socket of {}", container.id()), || {
            shim_address(&node.path(&bundle)).map(PathBuf::from)
        });
        let init = wait_for(&format!("init of {}", container.id()), || {
            let pid = fs::read_to_string(node.path(bundle.join("init.pid"))).ok()?;
            node.process(pid.trim().parse().ok()?)
        });
        let group = container.group.as_deref().unwrap_or(container.id());
        let address = containerd.address().to_str();
        let shim = wait_for(&format!("shim of {}", container.id()), || {
            let named = node.shims().into_iter().find(|process| {
                process.flag("-address") == address
                    && process.flag("-namespace") == Some(container.namespace())
                    && process.flag("-id") == Some(group)
            });
            // A successor is named after a task that is still there.
            named.or_else(|| serving(node, &socket, container.id()))
        });
        Task {
            node: Arc::clone(node),
            namespace: container.namespace().into(),
            id: container.id().into(),
            bundle,
            socket,
            init,
            shim,
        }
    }

    /// The node it runs on.
    pub fn node(&self) -> &Arc<Node> {
        &self.node
    }

    /// Its containerd namespace.
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// Its id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// `namespace/id`, as `recoverd` names it.
    pub fn name(&self) -> String {
        format!("{}/{}", self.namespace, self.id)
    }

    /// Its bundle, a path of the node (see [`Node::path`]).
    pub fn bundle(&self) -> &Path {
        &self.bundle
    }

    /// Its shim's socket, a path of the node.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// runc's state file of it, a path of the node.
    pub fn runc_state(&self) -> PathBuf {
        Path::new("/run/containerd/runc")
            .join(&self.namespace)
            .join(&self.id)
            .join("state.json")
    }

    /// SIGKILLs its init and waits until somebody has collected it: its shim, if that lives, knows of it.
    #[track_caller]
    pub fn kill_init(&self) {
        self.node.kill(&self.init);
        self.wait_collected();
    }

    /// Waits until its init, which ends, is not even a zombie any more.
    #[track_caller]
    pub fn wait_collected(&self) {
        wait_for(
            &format!("the init of {} to be collected", self.name()),
            || {
                let now = self.node.process(self.init.pid);
                now.is_none_or(|now| now != self.init).then_some(())
            },
        );
    }

    /// Fails unless its init is still the very same process.
    #[track_caller]
    pub fn assert_init_alive(&self) {
        let now = self.node.process(self.init.pid);
        assert!(
            self.node.alive(&self.init),
            "init of {} was {:?}, is {now:?}",
            self.name(),
            self.init
        );
    }

    /// Fails unless its shim is still the very same process.
    #[track_caller]
    pub fn assert_shim_alive(&self) {
        let now = self.node.process(self.shim.pid);
        assert!(
            self.node.alive(&self.shim),
            "shim of {} was {:?}, is {now:?}",
            self.name(),
            self.shim
        );
    }
}

/// The socket that a bundle names, in any generation's file.
pub(crate) fn shim_address(bundle: &Path) -> Option<String> {
    let text = fs::read_to_string(bundle.join("bootstrap.json"))
        .or_else(|_| fs::read_to_string(bundle.join("address")))
        .ok()?;
    let address = match serde_json::from_str::<serde_json::Value>(&text) {
        Ok(json) => json.get("address")?.as_str()?.to_owned(),
        Err(_) => text.trim().to_owned(),
    };
    Some(
        address
            .strip_prefix("unix://")
            .unwrap_or(&address)
            .to_owned(),
    )
}

//! A real containerd in a node.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::time::Duration;

use crate::container::{Container, Task};
use crate::node::{Node, Running};
use crate::recoverd::{Scan, scan};
use crate::releases::{Release, built, image_archive};
use crate::wait::{wait_for, wait_within};

/// What runc says when it gives up on a freezer.
pub(crate) const NOT_FROZEN: &str = "unable to freeze";
/// Kubernetes' interface: only [`Node::kubernetes`] wants it.
const CRI: [&str; 3] = [
    "io.containerd.grpc.v1.cri",
    "io.containerd.cri.v1.images",
    "io.containerd.cri.v1.runtime",
];
/// Plugins that no test here needs and that look for things of the machine.
const DISABLED: [&str; 5] = [
    "io.containerd.snapshotter.v1.aufs",
    "io.containerd.snapshotter.v1.btrfs",
    "io.containerd.snapshotter.v1.devmapper",
    "io.containerd.snapshotter.v1.zfs",
    "io.containerd.internal.v1.opt",
];

/// A containerd with root, state and addresses of its own. Dropping it does not stop it; the
/// node's end does.
pub struct Containerd {
    node: Arc<Node>,
    release: Release,
    address: PathBuf,
    state: PathBuf,
    root: PathBuf,
    config: PathBuf,
    log: PathBuf,
    log_level: &'static str,
    /// Looked into before every other folder of its PATH.
    first: Option<PathBuf>,
    /// The part of its configuration that says how Kubernetes' pods are run, and the version in
    /// which it says so; none without them.
    pods: Option<(u32, String)>,
    environment: Vec<(String, String)>,
    running: Option<Running>,
}

/// One line of `ctr tasks list`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TaskRow {
    /// The task's id.
    pub id: String,
    /// Its init's pid; 0 when containerd does not know it.
    pub pid: u32,
    /// `RUNNING`, `STOPPED`, `PAUSED`, `CREATED`, `UNKNOWN`.
    pub status: String,
}

impl Containerd {
    pub(crate) fn new(node: &Arc<Node>, release: &Release, name: Option<&str>) -> Containerd {
        let (state, root) = match name {
            None => ("/run/containerd".into(), "/var/lib/containerd".into()),
            Some(name) => (
                PathBuf::from(format!("/run/containerd-{name}")),
                PathBuf::from(format!("/var/lib/containerd-{name}")),
            ),
        };
        let label = name.unwrap_or("containerd");
        let containerd = Containerd {
            address: state.join("containerd.sock"),
            config: node.folder().join(format!("{label}.toml")),
            log: node.folder().join(format!("{label}.log")),
            node: Arc::clone(node),
            release: release.clone(),
            state,
            root,
            log_level: "info",
            first: None,
            pods: None,
            environment: Vec::new(),
            running: None,
        };
        containerd.write_config();
        containerd
    }

    /// Version 2 is the format that every release reads.
    fn write_config(&self) {
        let (version, pods) = match &self.pods {
            Some((version, pods)) => (*version, pods.as_str()),
            None => (2, ""),
        };
        let cri = CRI.iter().filter(|_| self.pods.is_none());
        let disabled: Vec<String> = DISABLED
            .iter()
            .chain(cri)
            .map(|name| format!("{name:?}"))
            .collect();
        let text = format!(
            "version = {version}\nroot = {root:?}\nstate = {state:?}\ndisabled_plugins = [{disabled}]\n\
             [grpc]\n  address = {address:?}\n\
             [ttrpc]\n  address = {ttrpc:?}\n\
             [debug]\n  level = {level:?}\n{pods}",
            root = self.root,
            state = self.state,
            disabled = disabled.join(", "),
            address = self.address,
            level = self.log_level,
            ttrpc = format!("{}.ttrpc", self.address.display()),
        );
        fs::write(&self.config, text)
            .unwrap_or_else(|e| panic!("write {}: {e}", self.config.display()));
    }

    /// How it runs Kubernetes' pods from the next start on: TOML of a configuration of that
    /// version.
    pub(crate) fn pods(&mut self, version: u32, config: String) {
        self.pods = Some((version, config));
        self.write_config();
    }

    /// The node it runs in.
    pub fn node(&self) -> &Arc<Node> {
        &self.node
    }

    /// The release that runs, or ran last.
    pub fn release(&self) -> &Release {
        &self.release
    }

    /// Its gRPC socket, as `--address` wants it.
    pub fn address(&self) -> &Path {
        &self.address
    }

    /// Its state folder.
    pub fn state(&self) -> &Path {
        &self.state
    }

    /// Its root folder.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Its own process.
    #[track_caller]
    pub fn process(&self) -> crate::Process {
        let running = self.running.as_ref();
        running
            .unwrap_or_else(|| panic!("containerd does not run"))
            .process
            .clone()
    }

    /// What all its runs logged.
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    /// Starts it and returns when it answers.
    #[track_caller]
    pub fn start(&mut self) {
        self.launch();
        self.await_answer();
    }

    /// Returns when it answers, after a start.
    #[track_caller]
    pub fn await_answer(&mut self) {
        let limit = Duration::from_secs(120);
        wait_within(limit, "containerd to answer", || {
            let running = self.running.as_mut()?;
            assert!(
                running.is_running(),
                "containerd ended at its start:\n{}",
                tail(&self.log)
            );
            self.ctr("default", ["version"])
                .output()
                .ok()?
                .status
                .success()
                .then_some(())
        });
    }

    /// With these variables, which its shims inherit, from the next start on.
    pub fn environment(&mut self, environment: Vec<(String, String)>) {
        self.environment = environment;
    }

    /// Whether it still runs; it may have been ended by somebody else.
    pub fn is_alive(&mut self) -> bool {
        self.running.as_mut().is_some_and(Running::is_running)
    }

    /// SIGSTOPs it.
    #[track_caller]
    pub fn freeze(&self) {
        self.node.freeze(&self.process());
        if let Some(running) = &self.running {
            running.wait_frozen();
        }
    }

    /// Lets it go on.
    pub fn thaw(&self) {
        if let Some(running) = &self.running {
            running.thaw();
        }
    }

    /// Starts it and returns at once: for starts that hang.
    #[track_caller]
    pub fn launch(&mut self) {
        assert!(self.running.is_none(), "containerd runs already");
        let shims = self.release.folder.display();
        let ours = built("").display().to_string();
        // Its own shim first: the machine may have another release's in /usr/bin.
        let first = self
            .first
            .as_ref()
            .map(|path| format!("{}:", path.display()));
        let first = first.unwrap_or_default();
        let path = format!(
            "PATH={first}{shims}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:{ours}"
        );
        let line = "log=$1; shift; exec \"$@\" >>\"$log\" 2>&1";
        let mut command = self.node.command(
            "env",
            [
                path.as_ref(),
                "sh".as_ref(),
                "-c".as_ref(),
                line.as_ref(),
                "sh".as_ref(),
                self.log.as_os_str(),
                self.release.folder.join("containerd").as_os_str(),
                "--config".as_ref(),
                self.config.as_os_str(),
            ],
        );
        command.envs(self.environment.iter().cloned());
        let mut running = self.node.spawn_command(command);
        // Read once more: until now it may have been the shell before it.
        running.process = wait_for("containerd's process", || {
            let now = self.node.process(running.process.pid)?;
            (now.program() == "containerd").then_some(now)
        });
        self.running = Some(running);
    }

    /// Whether it was started and not stopped.
    pub fn is_running(&self) -> bool {
        self.running.is_some()
    }

    /// SIGKILLs it.
    #[track_caller]
    pub fn kill(&mut self) {
        self.end("KILL");
    }

    /// Stops it as an operator would, with SIGTERM.
    #[track_caller]
    pub fn stop(&mut self) {
        self.end("TERM");
    }

    #[track_caller]
    fn end(&mut self, signal: &str) {
        let Some(mut running) = self.running.take() else {
            panic!("containerd does not run")
        };
        self.node.signal(&running.process, signal);
        running.thaw();
        running.wait();
        self.node.wait_gone(&running.process);
    }

    /// Somebody else ended it: waits until it is gone.
    #[track_caller]
    pub fn gone(&mut self) {
        let Some(mut running) = self.running.take() else {
            panic!("containerd does not run")
        };
        running.thaw();
        running.wait();
        self.node.wait_gone(&running.process);
    }

    /// SIGKILLs it and starts it again.
    #[track_caller]
    pub fn restart(&mut self) {
        self.kill();
        self.start();
    }

    /// Another log level from the next start on; shims inherit `debug`.
    pub fn log_level(&mut self, level: &'static str) {
        self.log_level = level;
        self.write_config();
    }

    /// Finds programs in `folder` before anywhere else, from the next start on.
    pub fn programs_from(&mut self, folder: PathBuf) {
        self.first = Some(folder);
    }

    /// Another release on the same root and state from the next start on.
    pub fn switch_to(&mut self, release: &Release) {
        assert!(
            self.running.is_none(),
            "stop containerd before switching its release"
        );
        self.release = release.clone();
    }

    /// `ctr` of the same release on this containerd, not started yet.
    pub fn ctr<I, S>(&self, namespace: &str, args: I) -> Command
    where
        I: IntoIterator<Item = S>,
        S: AsRef<std::ffi::OsStr>,
    {
        let mut command = self
            .node
            .command(self.release.folder.join("ctr"), ["--address"]);
        command
            .arg(&self.address)
            .args(["--namespace", namespace])
            .args(args);
        command
    }

    /// Runs `ctr`, which must succeed; its stdout.
    #[track_caller]
    pub fn ctr_ok<I, S>(&self, namespace: &str, args: I) -> String
    where
        I: IntoIterator<Item = S>,
        S: AsRef<std::ffi::OsStr>,
    {
        let mut command = self.ctr(namespace, args);
        let output = command
            .output()
            .unwrap_or_else(|e| panic!("start {command:?}: {e}"));
        assert!(
            output.status.success(),
            "{command:?} failed: {}\n{}",
            output.status,
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Starts `ctr` and returns while it runs: attached `run`, `task attach`, `events`, …
    #[track_caller]
    pub fn ctr_spawn<I, S>(&self, namespace: &str, args: I) -> Running
    where
        I: IntoIterator<Item = S>,
        S: AsRef<std::ffi::OsStr>,
    {
        self.node.spawn_command(self.ctr(namespace, args))
    }

    /// Runs a container detached; it is running when this returns.
    #[track_caller]
    pub fn run(&self, container: &Container) -> Task {
        let args = self.run_words(container);
        if container.has_terminal() {
            // `ctr` wants a terminal of its own for that, even detached.
            self.on_terminal(container.namespace(), &args).wait();
        } else {
            self.ctr_ok(container.namespace(), &args);
        }
        self.running(container)
    }

    /// What `ctr` is told to run a container detached.
    pub fn run_words(&self, container: &Container) -> Vec<String> {
        let mut args: Vec<String> = vec!["run".into(), "--detach".into()];
        args.extend(container.run_args());
        args
    }

    /// The task of a container that was started; it is running when this returns.
    #[track_caller]
    pub fn running(&self, container: &Container) -> Task {
        let task = Task::new(self, container);
        wait_for(&format!("{} to run", task.name()), || {
            let row = self.task(container.namespace(), container.id())?;
            (row.status == "RUNNING").then_some(())
        });
        task
    }

    /// The task of a container that was run by other means, as [`crate::Api::run`].
    #[track_caller]
    pub fn task_of(&self, container: &Container) -> Task {
        Task::new(self, container)
    }

    /// Runs a container with `ctr` attached to it; running when this returns.
    #[track_caller]
    pub fn run_attached(&self, container: &Container) -> (Task, Running) {
        let mut args: Vec<String> = vec!["run".into()];
        args.extend(container.run_args());
        let running = if container.has_terminal() {
            self.on_terminal(container.namespace(), &args)
        } else {
            self.ctr_spawn(container.namespace(), &args)
        };
        self.attached(container, running)
    }

    /// Runs a container with a terminal that `typed` is typed into; running when this returns.
    #[track_caller]
    pub fn run_typed(&self, container: &Container, typed: Stdio) -> (Task, Running) {
        let mut args: Vec<String> = vec!["run".into()];
        args.extend(container.run_args());
        let running = self.on_typed_terminal(container.namespace(), &args, typed);
        self.attached(container, running)
    }

    /// Runs a container with `ctr` attached to it, whose stdin ends after these words; running when
    /// this returns.
    #[track_caller]
    pub fn run_given(&self, container: &Container, words: &str) -> (Task, Running) {
        let mut args: Vec<String> = vec!["run".into()];
        args.extend(container.run_args());
        let (given, mut giver) = std::io::pipe().unwrap_or_else(|e| panic!("make pipe: {e}"));
        let mut command = self.ctr(container.namespace(), &args);
        command.stdin(given);
        let running = self.node.spawn_command(command);
        let written = giver.write_all(words.as_bytes());
        written.unwrap_or_else(|e| panic!("write to {}: {e}", container.id()));
        // Only when it runs does `ctr` pass on an end.
        let started = self.attached(container, running);
        drop(giver);
        started
    }

    /// Runs a container with `ctr` attached to it, whose stdin ends after these words, to its end.
    #[track_caller]
    pub fn run_to_end(&self, container: &Container, words: &str) -> Output {
        let mut args: Vec<String> = vec!["run".into()];
        args.extend(container.run_args());
        let mut command = self.ctr(container.namespace(), &args);
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = command
            .spawn()
            .unwrap_or_else(|e| panic!("start {command:?}: {e}"));
        let written = child
            .stdin
            .as_mut()
            .map(|stdin| stdin.write_all(words.as_bytes()));
        assert!(matches!(written, Some(Ok(()))), "{written:?}");
        // Only then does `ctr` pass on an end.
        wait_for(&format!("{} to run", container.id()), || {
            let row = self.task(container.namespace(), container.id())?;
            (row.status == "RUNNING").then_some(())
        });
        drop(child.stdin.take());
        wait_for(&format!("the end of {command:?}"), || {
            child.try_wait().ok().flatten()
        });
        child
            .wait_with_output()
            .unwrap_or_else(|e| panic!("{command:?}: {e}"))
    }

    #[track_caller]
    fn attached(&self, container: &Container, mut running: Running) -> (Task, Running) {
        wait_for(&format!("{} to run", container.id()), || {
            assert!(
                running.is_running(),
                "ctr run ended at once: {}",
                running.text()
            );
            let row = self.task(container.namespace(), container.id())?;
            (row.status == "RUNNING").then_some(())
        });
        (Task::new(self, container), running)
    }

    /// `ctr` on a terminal of its own; what the terminal shows is [`Running::text`].
    #[track_caller]
    pub fn on_terminal(&self, namespace: &str, args: &[String]) -> Running {
        self.on_typed_terminal(namespace, args, Stdio::null())
    }

    /// The same; what is typed comes from `typed`.
    #[track_caller]
    pub fn on_typed_terminal(&self, namespace: &str, args: &[String], typed: Stdio) -> Running {
        let ctr = self.release.folder.join("ctr").display().to_string();
        let mut words = vec![ctr, "--address".into(), self.address.display().to_string()];
        words.extend(["--namespace".to_owned(), namespace.to_owned()]);
        words.extend_from_slice(args);
        let quoted: Vec<String> = words
            .iter()
            .map(|word| format!("'{}'", word.replace('\'', r"'\''")))
            .collect();
        let line = quoted.join(" ");
        let args = [
            "--quiet",
            "--return",
            "--flush",
            "--command",
            &line,
            "/dev/null",
        ];
        let mut command = self.node.command("script", args);
        command.stdin(typed);
        self.node.spawn_command(command)
    }

    /// Runs a command in a task, detached, and returns when it runs.
    #[track_caller]
    pub fn exec(&self, task: &Task, exec_id: &str, command: &[&str]) {
        let mut args = vec!["tasks", "exec", "--detach", "--exec-id", exec_id, task.id()];
        args.extend_from_slice(command);
        self.ctr_ok(task.namespace(), args);
    }

    /// Runs a command in a task with `ctr` attached to it.
    #[track_caller]
    pub fn exec_attached(&self, task: &Task, exec_id: &str, command: &[&str]) -> Running {
        let mut args = vec!["tasks", "exec", "--exec-id", exec_id, task.id()];
        args.extend_from_slice(command);
        self.ctr_spawn(task.namespace(), args)
    }

    /// Pauses a task (see [`crate::Api::pause`]).
    #[track_caller]
    pub fn pause(&self, task: &Task) {
        self.ctr_freezing(task.namespace(), &["tasks", "pause", task.id()]);
    }

    /// Runs a command of `ctr` that pauses a task, which the kernel may be too busy for at first.
    #[track_caller]
    pub fn ctr_freezing(&self, namespace: &str, args: &[&str]) {
        wait_for("the freezer", || {
            let output = self
                .ctr(namespace, args)
                .output()
                .unwrap_or_else(|error| panic!("start ctr: {error}"));
            let text = String::from_utf8_lossy(&output.stderr);
            let done = output.status.success();
            assert!(done || text.contains(NOT_FROZEN), "{text}");
            done.then_some(())
        });
    }

    /// Ends a task and removes it and its container.
    #[track_caller]
    pub fn remove(&self, task: &Task) {
        self.ctr_ok(task.namespace(), ["tasks", "delete", "--force", task.id()]);
        self.ctr_ok(task.namespace(), ["containers", "delete", task.id()]);
    }

    /// Deletes a task whose init has exited, and its container; it had ended with `status`, as
    /// `ctr` and containerd see it.
    #[track_caller]
    pub fn delete(&self, task: &Task, status: u32) {
        let output = self
            .ctr(task.namespace(), ["tasks", "delete", task.id()])
            .output()
            .unwrap_or_else(|error| panic!("start ctr: {error}"));
        // `ctr` itself succeeds and says the status, if it is another than 0.
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        let said = text.trim_end().trim_end_matches('"').rsplit_once(" code ");
        let said = said.map_or(Ok(0), |(_, code)| code.parse());
        assert!(
            output.status.success() && said == Ok(status),
            "tasks delete {}: {output:?}",
            task.name()
        );
        self.ctr_ok(task.namespace(), ["containers", "delete", task.id()]);
    }

    /// containerd's own list of tasks.
    #[track_caller]
    pub fn tasks(&self, namespace: &str) -> Vec<TaskRow> {
        let table = self.ctr_ok(namespace, ["tasks", "list"]);
        table
            .lines()
            .skip(1)
            .map(|line| {
                let words: Vec<&str> = line.split_whitespace().collect();
                match words.as_slice() {
                    [id, pid, status] => TaskRow {
                        id: (*id).to_owned(),
                        pid: pid
                            .parse()
                            .unwrap_or_else(|e| panic!("pid in {line:?}: {e}")),
                        status: (*status).to_owned(),
                    },
                    _ => panic!("a line of ctr tasks list is {line:?}"),
                }
            })
            .collect()
    }

    /// containerd's own word on one task.
    #[track_caller]
    pub fn task(&self, namespace: &str, id: &str) -> Option<TaskRow> {
        self.tasks(namespace).into_iter().find(|row| row.id == id)
    }

    /// Makes the image `localhost/busybox:latest` known, for [`Container::image`].
    #[track_caller]
    pub fn import_image(&self, namespace: &str) {
        self.import_archive(namespace, "busybox");
    }

    /// Makes the image `localhost/NAME:latest` of `tests/setup` known.
    #[track_caller]
    pub(crate) fn import_archive(&self, namespace: &str, name: &str) {
        let archive = image_archive(name).display().to_string();
        self.ctr_ok(namespace, ["images", "import", &archive]);
    }

    /// `recoverd scan -o json`, told of this containerd only.
    #[track_caller]
    pub fn scan(&self) -> Scan {
        scan(&self.node, &self.flags(), &[])
    }

    /// The flags that tell `recoverd` of this containerd only.
    pub fn flags(&self) -> Vec<String> {
        [
            ("--address", &self.address),
            ("--state", &self.state),
            ("--root", &self.root),
        ]
        .into_iter()
        .flat_map(|(flag, path)| [flag.to_owned(), path.display().to_string()])
        .collect()
    }
}

fn tail(log: &Path) -> String {
    let text = String::from_utf8_lossy(&fs::read(log).unwrap_or_default()).into_owned();
    let lines: Vec<&str> = text.lines().collect();
    lines
        .get(lines.len().saturating_sub(20)..)
        .unwrap_or_default()
        .join("\n")
}

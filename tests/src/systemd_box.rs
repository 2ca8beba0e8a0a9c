//! A host with real systemd, and containerd as Debian's own package runs it: what
//! `tests/systemd-box` boots. recoverd is installed in it as the README says.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use recoverd_common::pb::task as api;
use recoverd_common::shim_client::{ShimClient, TASK_SERVICES};

use crate::direct::ANSWERS_WITHIN;
use crate::process::Process;
use crate::readme::readme;
use crate::releases::{Release, ShimUnderTest, built, cache};
use crate::supervisor::{METRICS, metric_at};
use crate::wait::{wait_for, wait_within};

/// A box that outlives its test, which was killed, ends itself then.
const LIFE_SECONDS: &str = "1800";
/// containerd's namespace of every container here, `ctr`'s own default.
const NAMESPACE: &str = "default";
/// Where the README says how the hooks are installed.
const HOOKS: &str = "## Hooks around containerd's start";
/// And where the supervisor.
const SUPERVISOR: &str = "## The supervisor";
/// Where the box has what a clone of this project has.
const CLONE: &str = "/root/recoverd";

/// Our shim as an operator names it: found in containerd's PATH.
pub(crate) const OURS: &str = "io.containerd.recoverd.v1";

/// What `ctr run` is told of every container here. Without a CPU weight: a box on a machine with
/// cgroup v1 has no controllers.
pub(crate) fn run_options(runtime: &str) -> String {
    format!("--cpu-shares 0 --runtime {runtime} --rootfs /usr/share/box/rootfs")
}

/// The kinds of box.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BoxKind {
    /// On this machine's kernel.
    Container,
    /// With a kernel of its own.
    Vm,
}

impl BoxKind {
    /// Why none can be had on this machine, as `tests/setup --boxes` found out.
    pub(crate) fn unavailable(self) -> Option<String> {
        let kind = match self {
            BoxKind::Container => "container",
            BoxKind::Vm => "vm",
        };
        let mark = cache().join(format!("systemd-box-{kind}"));
        match fs::read_to_string(mark.with_extension("unavailable")) {
            Ok(why) => Some(why.trim().to_owned()),
            Err(_) if mark.with_extension("boot").exists() => None,
            Err(_) => Some("nobody has tried yet: run tests/setup --boxes".into()),
        }
    }
}

/// What a box is given of this project: pairs of `SRC:DEST`, as a clone has it after its build.
fn clone_of_project() -> Vec<String> {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let pairs = [
        (built("recoverd"), "target/release/recoverd"),
        (
            built("containerd-shim-recoverd-v1"),
            "target/shim/containerd-shim-recoverd-v1",
        ),
        (here.join("../systemd"), "systemd"),
    ];
    pairs
        .map(|(from, to)| format!("{}:{CLONE}/{to}", from.display()))
        .to_vec()
}

/// The commands that the README gives below `heading`, for a root shell in a clone.
#[track_caller]
fn readme_commands(heading: &str) -> String {
    let commands = readme(&format!("{heading}\n"), "sh").replace("sudo ", "");
    format!("cd {CLONE}\n{commands}")
}

fn script() -> Command {
    let mut command = Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("systemd-box"));
    command.stdin(Stdio::null());
    command
}

#[track_caller]
fn succeed(mut command: Command) -> String {
    let output = command
        .output()
        .unwrap_or_else(|error| panic!("start {command:?}: {error}"));
    assert!(
        output.status.success(),
        "{command:?}: {}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// How what ran in a vm ended.
#[derive(Debug)]
pub struct InVm {
    /// Its exit code.
    pub code: Option<i32>,
    /// What it wrote.
    pub text: String,
}

/// Runs a line of shell in a vm that is made for it, with this project's clone at `/root/recoverd`
/// and `files` (`SRC:DEST`) in it, for at most so many seconds.
pub fn run_in_vm(files: &[String], seconds: u32, line: &str) -> InVm {
    in_vm(files, seconds, &[], &["bash", "-ec", line])
}

/// The same with a shell script that finds, as `/root/install` and `/root/supervise`, what the README
/// says to do with the clone; what it leaves in `/box/out` is in the folder `out` then.
pub fn run_installed_in_vm(lines: &Path, seconds: u32, out: &Path) -> InVm {
    let said = [(HOOKS, "install"), (SUPERVISOR, "supervise")];
    let said = said.map(|(heading, name)| {
        let path = out.join(name);
        let commands = readme_commands(heading);
        fs::write(&path, commands).unwrap_or_else(|e| panic!("write {}: {e}", path.display()));
        (path, name)
    });
    let files = said
        .iter()
        .map(|(path, name)| (path.as_path(), *name))
        .chain([(lines, "run")])
        .map(|(from, name)| format!("{}:/root/{name}", from.display()));
    let files: Vec<String> = files.collect();
    let options = [OsStr::new("--out"), out.as_os_str()];
    in_vm(&files, seconds, &options, &["bash", "/root/run"])
}

fn in_vm(files: &[String], seconds: u32, options: &[&OsStr], line: &[&str]) -> InVm {
    let mut command = script();
    command.args(["run", "--box", "vm", "--timeout", &seconds.to_string()]);
    command.args(options);
    for copy in clone_of_project().iter().chain(files) {
        command.args(["--copy", copy]);
    }
    command.arg("--").args(line);
    let output = command
        .output()
        .unwrap_or_else(|error| panic!("start {command:?}: {error}"));
    let text = [output.stdout, output.stderr].concat();
    InVm {
        code: output.status.code(),
        text: String::from_utf8_lossy(&text).into_owned(),
    }
}

/// A running box. Destroyed, with all that runs in it, when dropped.
pub struct SystemdBox {
    name: String,
    /// Its PID 1, as this machine numbers it.
    init: u32,
}

/// A container in a box.
#[derive(Clone, Debug)]
pub struct BoxTask {
    /// Its id.
    pub id: String,
    /// Its init, as the box numbers it.
    pub init: Process,
    /// Its shim when it was started.
    pub shim: Process,
    /// Its shim's socket, a path of the box.
    socket: PathBuf,
}

impl SystemdBox {
    /// One in which recoverd was installed as the README says, and containerd runs.
    #[track_caller]
    pub fn start() -> SystemdBox {
        let host = SystemdBox::without_hooks();
        host.shell(&readme_commands(HOOKS));
        host
    }

    /// Installs and starts the supervisor as the README says.
    #[track_caller]
    pub fn supervise(&self) {
        self.shell(&readme_commands(SUPERVISOR));
    }

    /// One that has a built clone of this project at `/root/recoverd` and nothing of it installed.
    #[track_caller]
    pub fn without_hooks() -> SystemdBox {
        static BOXES: AtomicU32 = AtomicU32::new(0);
        // The pid is what `tests/systemd-box sweep` looks at.
        let name = format!(
            "test-{}-{}",
            std::process::id(),
            BOXES.fetch_add(1, Ordering::Relaxed)
        );
        let mut command = script();
        command.args(["start", "--life", LIFE_SECONDS]);
        for copy in clone_of_project() {
            command.args(["--copy", &copy]);
        }
        command.arg(&name);
        succeed(command);
        let mut command = script();
        command.args(["init", &name]);
        let init = succeed(command);
        SystemdBox {
            init: init
                .trim()
                .parse()
                .unwrap_or_else(|error| panic!("{init:?} is no pid: {error}")),
            name,
        }
    }

    /// The path by which this test reaches `inside`, an absolute path of the box.
    pub fn path(&self, inside: impl AsRef<Path>) -> PathBuf {
        let relative = inside.as_ref().strip_prefix("/").unwrap_or(inside.as_ref());
        Path::new("/proc")
            .join(self.init.to_string())
            .join("root")
            .join(relative)
    }

    /// Puts a file of this machine into the box.
    #[track_caller]
    pub fn put(&self, from: impl AsRef<Path>, inside: impl AsRef<Path>) {
        let (from, to) = (from.as_ref(), self.path(inside));
        fs::copy(from, &to)
            .unwrap_or_else(|e| panic!("copy {} to {}: {e}", from.display(), to.display()));
    }

    /// Writes a file in the box, and the folders above it.
    #[track_caller]
    pub fn write(&self, inside: impl AsRef<Path>, text: &str) {
        let path = self.path(inside);
        let written = path.parent().map_or(Ok(()), fs::create_dir_all);
        written
            .and_then(|()| fs::write(&path, text))
            .unwrap_or_else(|e| panic!("write {}: {e}", path.display()));
    }

    /// Runs a command in the box to its end, whatever that is.
    #[track_caller]
    pub fn output<I, S>(&self, words: I) -> Output
    where
        I: IntoIterator<Item = S>,
        S: AsRef<OsStr>,
    {
        let mut command = script();
        command.args(["exec", &self.name, "--"]).args(words);
        command
            .output()
            .unwrap_or_else(|e| panic!("start {command:?}: {e}"))
    }

    /// Runs lines of shell in the box, of which each must succeed; their stdout.
    #[track_caller]
    pub fn shell(&self, lines: &str) -> String {
        let mut command = script();
        command.args(["exec", &self.name, "--", "bash", "-euc", lines]);
        succeed(command)
    }

    /// One process; `None` if it is not there (any more).
    pub fn process(&self, pid: u32) -> Option<Process> {
        Process::read(&self.path("/proc"), pid)
    }

    /// Whether this very process still lives (a zombie does not).
    pub fn alive(&self, process: &Process) -> bool {
        self.process(process.pid)
            .is_some_and(|now| now.start_time == process.start_time && now.state != 'Z')
    }

    /// A property of a unit, as `systemctl show` says it.
    #[track_caller]
    pub fn property(&self, unit: &str, property: &str) -> String {
        let shown = self.shell(&format!(
            "systemctl show --property {property} --value {unit}"
        ));
        shown.trim().to_owned()
    }

    /// What the journal has of a unit since this was called last, a message a line.
    #[track_caller]
    pub fn journal(&self, unit: &str) -> String {
        self.shell(&format!(
            "journalctl --sync; journalctl --quiet --unit {unit} --output cat --cursor-file /root/{unit}.cursor"
        ))
    }

    /// Runs a container whose init is a shell with that line, which has no `'`.
    #[track_caller]
    pub fn run(&self, id: &str, shim: ShimUnderTest, command: &str) -> BoxTask {
        self.run_at(&Instance::DEBIAN, id, shim, command)
    }

    /// As [`SystemdBox::run`], by another containerd of the box.
    #[track_caller]
    pub fn run_at(
        &self,
        instance: &Instance,
        id: &str,
        shim: ShimUnderTest,
        command: &str,
    ) -> BoxTask {
        let runtime = match shim {
            ShimUnderTest::Stock => "io.containerd.runc.v2",
            ShimUnderTest::Recoverd => OURS,
        };
        self.shell(&format!(
            "ctr --address {} run --detach {} {id} /bin/sh -c '{command}' </dev/null >/dev/null",
            instance.address,
            run_options(runtime)
        ));
        self.task_at(instance, id)
    }

    /// The task of a container that was started, once its init runs.
    #[track_caller]
    pub(crate) fn task_at(&self, instance: &Instance, id: &str) -> BoxTask {
        let bundle = self.path(format!(
            "{}/io.containerd.runtime.v2.task/{NAMESPACE}/{id}",
            instance.state
        ));
        let init = wait_for("the pid file of a container", || {
            let text = fs::read_to_string(bundle.join("init.pid")).ok()?;
            self.process(text.trim().parse().ok()?)
        });
        let address = crate::container::shim_address(&bundle);
        let socket = address.unwrap_or_else(|| panic!("the bundle of {id} names no shim"));
        let socket = PathBuf::from(socket);
        BoxTask {
            shim: self.shim_at(&socket, id),
            id: id.to_owned(),
            init,
            socket,
        }
    }

    /// Starts an exec in a container, detached, and returns its process.
    #[track_caller]
    pub fn exec(&self, task: &BoxTask, exec_id: &str, command: &str) -> Process {
        self.shell(&format!(
            "ctr task exec --detach --exec-id {exec_id} {} /bin/sh -c '{command}' </dev/null >/dev/null",
            task.id
        ));
        let request = api::StateRequest {
            id: task.id.clone(),
            exec_id: exec_id.to_owned(),
        };
        let state: api::StateResponse = self.call(&task.socket, "State", &request);
        self.process(state.pid)
            .unwrap_or_else(|| panic!("exec {exec_id} of {} is gone: {state:?}", task.id))
    }

    /// The shim that serves a container now.
    #[track_caller]
    pub fn shim_now(&self, task: &BoxTask) -> Process {
        self.shim_at(&task.socket, &task.id)
    }

    #[track_caller]
    fn shim_at(&self, socket: &Path, id: &str) -> Process {
        let request = api::ConnectRequest { id: id.to_owned() };
        let answer: api::ConnectResponse = self.call(socket, "Connect", &request);
        let shim = self.process(answer.shim_pid);
        shim.unwrap_or_else(|| panic!("{answer:?} names no process"))
    }

    /// Waits for the exit status of a container, or of one of its execs, as its shim says it.
    #[track_caller]
    pub fn wait(&self, task: &BoxTask, exec_id: &str) -> u32 {
        let request = api::WaitRequest {
            id: task.id.clone(),
            exec_id: exec_id.to_owned(),
        };
        let answer: api::WaitResponse = self.call(&task.socket, "Wait", &request);
        answer.exit_status
    }

    /// Calls a shim of the box; a stock one of 2.x serves v3 alone.
    #[track_caller]
    fn call<R: prost::Message + Default>(
        &self,
        socket: &Path,
        method: &str,
        request: &impl prost::Message,
    ) -> R {
        let path = self.path(socket);
        let mut failures = Vec::new();
        for service in TASK_SERVICES {
            let deadline = std::time::Instant::now() + ANSWERS_WITHIN;
            let answer = ShimClient::connect(&path, NAMESPACE, deadline)
                .and_then(|mut client| client.call(service, method, request));
            match answer {
                Ok(answer) => return answer,
                Err(error) => failures.push(error),
            }
        }
        panic!("{method} at {}: {failures:?}", socket.display())
    }

    /// Sends a signal to a process of the box and waits until it shows: gone, or stopped. SIGTERM comes
    /// when the process is ready for it.
    #[track_caller]
    pub fn signal(&self, process: &Process, signal: &str) {
        assert!(
            self.alive(process),
            "{process:?} is gone before SIG{signal}"
        );
        if signal == "TERM" {
            process.wait_trap(&self.path("/proc"));
        }
        self.shell(&format!("kill -s {signal} {}", process.pid));
        wait_for(&format!("SIG{signal} to show"), || match signal {
            "KILL" => (!self.alive(process)).then_some(()),
            "STOP" => (self.process(process.pid)?.state == 'T').then_some(()),
            _ => Some(()),
        });
    }

    /// Waits until this very process is gone or a zombie.
    #[track_caller]
    pub fn wait_gone(&self, process: &Process) {
        wait_for(&format!("end of {process:?}"), || {
            (!self.alive(process)).then_some(())
        });
    }

    /// One metric of the supervisor; none when nobody answers.
    pub fn metric(&self, name: &str) -> Option<f64> {
        metric_at(&self.path(METRICS), name)
    }

    /// Waits until a unit is in that state.
    #[track_caller]
    pub fn wait_state(&self, unit: &str, state: &str, limit: Duration) {
        wait_within(limit, &format!("{unit} to be {state}"), || {
            (self.property(unit, "ActiveState") == state).then_some(())
        });
    }
}

/// A containerd of a box.
#[derive(Clone, Copy, Debug)]
pub struct Instance {
    /// Its gRPC socket.
    pub address: &'static str,
    /// Its state folder.
    pub state: &'static str,
}

impl Instance {
    /// Debian's own, `containerd.service`.
    pub const DEBIAN: Instance = Instance {
        address: "/run/containerd/containerd.sock",
        state: "/run/containerd",
    };
}

impl Release {
    /// Debian's package of this release.
    pub fn package(&self) -> PathBuf {
        self.folder
            .with_file_name(format!("containerd-{}.deb", self.name))
    }
}

impl Drop for SystemdBox {
    fn drop(&mut self) {
        let failed = std::thread::panicking();
        if failed {
            let seen = self.output([
                "sh",
                "-c",
                "ps -eo pid,ppid,stat,cgroup:60,args; journalctl --no-pager | tail -n 150",
            ]);
            eprintln!(
                "---- box {}\n{}",
                self.name,
                String::from_utf8_lossy(&seen.stdout)
            );
        }
        let stopped = script().args(["stop", &self.name]).status();
        assert!(
            failed || stopped.is_ok_and(|status| status.success()),
            "box {} left something",
            self.name
        );
    }
}

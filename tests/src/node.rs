//! A host of its own: what `tests/node` makes, with its processes and files.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use recoverd_common::proc::{Proc, Stop};
use recoverd_common::seen::Seen;

use crate::containerd::Containerd;
use crate::process::{self, Process};
use crate::releases::{Release, built};
use crate::wait::wait_for;

/// A host of its own. Goes, with all that runs in it, when the last handle is dropped.
pub struct Node {
    name: String,
    /// On the machine's own file system, so that logs outlive the node's `/run`.
    folder: PathBuf,
    /// PID 1 of the node, as the machine numbers it.
    init: u32,
    child: Child,
    serial: AtomicU32,
}

impl Node {
    /// A new, empty one.
    pub fn start() -> Arc<Node> {
        static NODES: AtomicU32 = AtomicU32::new(0);
        // The pid is what `tests/node --sweep` looks at.
        let name = format!(
            "recoverd-test-{}-{}",
            std::process::id(),
            NODES.fetch_add(1, Ordering::Relaxed)
        );
        let folder = std::env::temp_dir().join(&name);
        fs::create_dir_all(&folder).unwrap_or_else(|e| panic!("make {}: {e}", folder.display()));
        // The kernel ends the node when this test is killed, however.
        let mut child = Command::new("setpriv")
            .args(["--pdeathsig", "KILL"])
            .args([script().as_os_str(), OsStr::new(&name), folder.as_os_str()])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap_or_else(|e| panic!("start setpriv for a node: {e}"));
        let mut line = String::new();
        let stdout = child
            .stdout
            .take()
            .unwrap_or_else(|| panic!("a piped stdout is missing"));
        let read = BufReader::new(stdout).read_line(&mut line);
        assert!(
            read.is_ok() && line == "ready\n",
            "node {name} did not start: {line:?}"
        );
        let children = format!("/proc/{0}/task/{0}/children", child.id());
        let init = wait_for("PID 1 of the node", || {
            fs::read_to_string(&children)
                .ok()?
                .split_whitespace()
                .next()?
                .parse()
                .ok()
        });
        Arc::new(Node {
            name,
            folder,
            init,
            child,
            serial: AtomicU32::new(0),
        })
    }

    /// The path by which this test reaches `inside`, an absolute path of the node.
    ///
    /// Symlinks with absolute targets lead out of the node: read those with [`Node::run`].
    pub fn path(&self, inside: impl AsRef<Path>) -> PathBuf {
        let relative = inside.as_ref().strip_prefix("/").unwrap_or(inside.as_ref());
        Path::new("/proc")
            .join(self.init.to_string())
            .join("root")
            .join(relative)
    }

    /// A folder for files of this test, the same path inside and outside of the node.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Every process of the node, by pid.
    pub fn processes(&self) -> Vec<Process> {
        Process::all(&self.path("/proc"))
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

    /// Waits until this very process is gone or a zombie.
    #[track_caller]
    pub fn wait_gone(&self, process: &Process) {
        wait_for(&format!("end of {process:?}"), || {
            (!self.alive(process)).then_some(())
        });
    }

    /// Where a process's executable is, as the kernel says it.
    pub fn executable(&self, pid: u32) -> Option<PathBuf> {
        process::executable(&self.path("/proc"), pid)
    }

    /// Every serving shim process.
    pub fn shims(&self) -> Vec<Process> {
        let shims = self.processes().into_iter().filter(Process::is_shim);
        let shims: Vec<Process> = shims.collect();
        // What one has forked for a moment has its name.
        let is_child = |of: &Process| shims.iter().any(|shim| shim.pid == of.parent);
        let own = shims.iter().filter(|shim| !is_child(shim));
        own.cloned().collect()
    }

    /// Waits until every shim has left.
    #[track_caller]
    pub fn wait_no_shims(&self) {
        wait_for("the end of every shim", || {
            self.shims().is_empty().then_some(())
        });
    }

    /// Every process that holds a client's fifos beside a shim of ours.
    pub fn holders(&self) -> Vec<Process> {
        let holds = |process: &Process| process.argv.last().is_some_and(|verb| verb == "hold");
        self.processes().into_iter().filter(holds).collect()
    }

    /// Waits until a process is ready for SIGTERM.
    #[track_caller]
    pub fn wait_trap(&self, process: &Process) {
        process.wait_trap(&self.path("/proc"));
    }

    /// Sends a signal (`KILL`, `STOP`, `CONT`, …) to a process of the node; SIGTERM when it is ready
    /// for that.
    #[track_caller]
    pub fn signal(&self, process: &Process, signal: &str) {
        assert!(
            self.alive(process),
            "{process:?} is gone before SIG{signal}"
        );
        if signal == "TERM" {
            self.wait_trap(process);
        }
        self.run("kill", ["-s", signal, &process.pid.to_string()]);
    }

    /// SIGKILLs a process and waits until it is gone.
    #[track_caller]
    pub fn kill(&self, process: &Process) {
        self.signal(process, "KILL");
        self.wait_gone(process);
    }

    /// SIGSTOPs a process and waits until every thread has stopped; a shim between two things that
    /// it does, for what a stock one had read and not yet written would be nobody's.
    #[track_caller]
    pub fn freeze(&self, process: &Process) {
        let proc = Proc::new(self.path("/proc"));
        let pid = i32::try_from(process.pid).unwrap_or_else(|e| panic!("{process:?}: {e}"));
        wait_for("a stop between two things", || {
            self.signal(process, "STOP");
            let met = wait_for("a stopped process", || match proc.stop(pid) {
                Seen::Present(Stop::Pending) => None,
                Seen::Present(met) => Some(met),
                other => panic!("{process:?}: {other:?}"),
            });
            let again = met == Stop::Midway && process.is_shim();
            if again {
                self.signal(process, "CONT");
            }
            (!again).then_some(())
        });
    }

    /// Waits until somebody (a `strace`) traces this process, or nobody does any more.
    #[track_caller]
    pub fn wait_traced(&self, process: &Process, traced: bool) {
        wait_for(&format!("a tracer of {process:?}: {traced}"), || {
            let status = self.path(format!("/proc/{}/status", process.pid));
            let status = fs::read_to_string(status).ok()?;
            let tracer = status
                .lines()
                .find_map(|line| line.strip_prefix("TracerPid:"))?;
            ((tracer.trim() != "0") == traced).then_some(())
        });
    }

    /// A command that, once started, runs in the node. stdin is `/dev/null` unless set.
    pub fn command<I, S>(&self, program: impl AsRef<OsStr>, args: I) -> Command
    where
        I: IntoIterator<Item = S>,
        S: AsRef<OsStr>,
    {
        let mut command = Command::new(script());
        command
            .arg("--in")
            .arg(self.init.to_string())
            .arg(program)
            .args(args);
        command.env_remove("NOTIFY_SOCKET").stdin(Stdio::null());
        command
    }

    /// Runs a command in the node to its end, whatever that is.
    #[track_caller]
    pub fn output<I, S>(&self, program: impl AsRef<OsStr>, args: I) -> Output
    where
        I: IntoIterator<Item = S>,
        S: AsRef<OsStr>,
    {
        let mut command = self.command(program, args);
        command
            .output()
            .unwrap_or_else(|e| panic!("start {command:?}: {e}"))
    }

    /// Runs a command in the node, which must succeed; its stdout.
    #[track_caller]
    pub fn run<I, S>(&self, program: impl AsRef<OsStr>, args: I) -> String
    where
        I: IntoIterator<Item = S>,
        S: AsRef<OsStr>,
    {
        let mut command = self.command(program, args);
        let output = command
            .output()
            .unwrap_or_else(|e| panic!("start {command:?}: {e}"));
        assert!(
            output.status.success(),
            "{command:?} failed: {}\n{}{}",
            output.status,
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Runs a line of shell in the node, which must succeed; its stdout.
    #[track_caller]
    pub fn shell(&self, line: &str) -> String {
        self.run("sh", ["-ec", line])
    }

    /// Starts a command in the node and returns while it runs; its output goes to a file.
    #[track_caller]
    pub fn spawn<I, S>(&self, program: impl AsRef<OsStr>, args: I) -> Running
    where
        I: IntoIterator<Item = S>,
        S: AsRef<OsStr>,
    {
        self.spawn_command(self.command(program, args))
    }

    /// As [`Node::spawn`], for a command that was made by [`Node::command`] and changed.
    #[track_caller]
    pub fn spawn_command(&self, mut command: Command) -> Running {
        let serial = self.serial.fetch_add(1, Ordering::Relaxed);
        let pid_file = self.folder.join(format!("{serial}.pid"));
        let output = self.folder.join(format!("{serial}.out"));
        let file =
            File::create(&output).unwrap_or_else(|e| panic!("make {}: {e}", output.display()));
        let also = file
            .try_clone()
            .unwrap_or_else(|e| panic!("share {}: {e}", output.display()));
        command
            .env("NODE_PIDFILE", &pid_file)
            .stdout(file)
            .stderr(also);
        let child = command
            .spawn()
            .unwrap_or_else(|e| panic!("start {command:?}: {e}"));
        let process = wait_for("the pid of a started command", || {
            let text = fs::read_to_string(&pid_file).ok()?;
            let pid = text.strip_suffix('\n')?.parse().ok()?;
            // Gone already: the pid is all that can be said of it.
            let gone = Process {
                pid,
                start_time: 0,
                parent: 0,
                state: 'X',
                argv: Vec::new(),
            };
            Some(self.process(pid).unwrap_or(gone))
        });
        Running {
            process,
            output,
            child,
            node_init: self.init,
        }
    }

    /// The containerd at the usual places (`/run/containerd`, `/var/lib/containerd`), started.
    #[track_caller]
    pub fn containerd(self: &Arc<Node>, release: &Release) -> Containerd {
        let mut containerd = Containerd::new(self, release, None);
        containerd.start();
        containerd
    }

    /// The containerd at the usual places with programs of a newer Debian before all others,
    /// started.
    #[track_caller]
    pub fn containerd_with(self: &Arc<Node>, release: &Release, programs: &[&str]) -> Containerd {
        let mut containerd = Containerd::new(self, release, None);
        containerd.programs_from(self.newer(programs));
        containerd.start();
        containerd
    }

    /// A further containerd, with root, state and address of its own, started. The socket folder
    /// and runc's root are shared with the others, as always.
    #[track_caller]
    pub fn second_containerd(self: &Arc<Node>, release: &Release, name: &str) -> Containerd {
        let mut containerd = Containerd::new(self, release, Some(name));
        containerd.start();
        containerd
    }

    /// The path of a binary of this workspace, `recoverd` or `containerd-shim-recoverd-v1`.
    pub fn built(&self, program: &str) -> PathBuf {
        built(program)
    }

    /// What a failed test shows: the node's processes and the end of each log.
    fn report(&self) {
        eprintln!("---- processes of {}", self.name);
        for process in self.processes() {
            let Process {
                pid,
                parent,
                state,
                argv,
                ..
            } = &process;
            eprintln!("{pid:>7} {parent:>7} {state} {}", argv.join(" "));
        }
        let mut files: Vec<PathBuf> = fs::read_dir(&self.folder)
            .into_iter()
            .flatten()
            .filter_map(|entry| Some(entry.ok()?.path()))
            .filter(|path| {
                path.extension()
                    .is_some_and(|ext| ext == "log" || ext == "out")
            })
            .collect();
        files.sort();
        for file in files {
            let text = String::from_utf8_lossy(&fs::read(&file).unwrap_or_default()).into_owned();
            let lines: Vec<&str> = text.lines().collect();
            let shown = lines
                .get(lines.len().saturating_sub(40)..)
                .unwrap_or_default();
            if !shown.is_empty() {
                eprintln!(
                    "---- {} (last {} of {} lines)",
                    file.display(),
                    shown.len(),
                    lines.len()
                );
                eprintln!("{}", shown.join("\n"));
            }
        }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let failed = std::thread::panicking();
        if failed {
            self.report();
        }
        // PID 1 and not its parent: that one then collects it and ends, while the machine's own
        // PID 1 might leave it a zombie for seconds.
        let init = self.init.to_string();
        let killed = Command::new("kill").args(["-s", "KILL", &init]).status();
        // Before waiting: what is frozen dies only when this thaws it.
        let removed = Command::new(script()).args(["--gone", &self.name]).status();
        let removed = removed.is_ok_and(|status| status.success());
        let gone = killed.is_ok_and(|status| status.success()) && self.child.wait().is_ok();
        let kept = failed && std::env::var_os("RECOVERD_TEST_KEEP").is_some();
        let cleared = kept || fs::remove_dir_all(&self.folder).is_ok();
        if !failed {
            assert!(
                gone && removed && cleared,
                "node {} left something",
                self.name
            );
        }
    }
}

fn script() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("node")
}

/// A command that runs in a node. Killed when dropped.
pub struct Running {
    /// The process in the node.
    pub process: Process,
    output: PathBuf,
    child: Child,
    node_init: u32,
}

impl Running {
    /// What it wrote so far, stdout and stderr.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.output).unwrap_or_default()).into_owned()
    }

    /// Whether it still runs.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Waits until what waits for it here has stopped itself as well.
    #[track_caller]
    pub(crate) fn wait_frozen(&self) {
        let stat = format!("/proc/{}/stat", self.child.id());
        wait_for("a stopped nsenter", || {
            let text = fs::read_to_string(&stat).ok()?;
            text.rsplit_once(") ")?.1.starts_with('T').then_some(())
        });
    }

    /// What waits for it here has stopped itself if it was frozen (see [`Node::freeze`]).
    pub(crate) fn thaw(&self) {
        let pid = self.child.id().to_string();
        let _gone_already = Command::new("kill").args(["-s", "CONT", &pid]).status();
    }

    /// Waits for its end.
    #[track_caller]
    pub fn wait(&mut self) -> ExitStatus {
        wait_for(&format!("end of {:?}", self.process.argv), || {
            self.child.try_wait().ok()?
        })
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if self.is_running() {
            let pid = self.process.pid.to_string();
            // The command itself; the `nsenter` that waits for it must live to collect it.
            let _gone_already = Command::new(script())
                .args([
                    "--in",
                    &self.node_init.to_string(),
                    "kill",
                    "-s",
                    "KILL",
                    &pid,
                ])
                .stderr(Stdio::null())
                .status();
        }
        self.thaw();
        let _reaped = self.child.wait();
    }
}

//! `systemd/recoverd.service` under real systemd, installed as the README says: whatever becomes of
//! the service, its tasks and their clients go on, and shims that die are succeeded as before.

use recoverd_tests::{
    BoxClient, BoxTask, OTHER, Process, SystemdBox, VERSION, as_version, built, wait_for,
};

recoverd_tests::tests! {
    in_a_box: [
        restarts_of_the_service_lose_nothing,
        a_service_that_crashes_or_hangs_comes_back_with_what_it_kept,
        what_dies_while_the_service_is_down_is_succeeded_when_it_comes_back,
        a_package_upgrade_reaches_every_shim_and_every_successor,
    ],
}

const UNIT: &str = "recoverd.service";
const SHIM: &str = "/usr/local/bin/containerd-shim-recoverd-v1";
/// Writes 1, 2, 3, … until it is asked to end.
fn counts(code: u32) -> String {
    format!(
        "n=0; trap \"exit {code}\" TERM; \
         while :; do n=$((n+1)); echo $n; [ $((n % 20)) -ne 0 ] || usleep 20000; done"
    )
}

/// Everything that must not notice.
struct Scene<'a> {
    host: &'a SystemdBox,
    /// A log of numbered lines, an exec that writes another, a shell at a terminal, and who repeats
    /// what comes in at its stdin.
    stream: (BoxTask, BoxClient<'a>),
    session: Option<BoxClient<'a>>,
    terminal: (BoxTask, BoxClient<'a>),
    reader: (BoxTask, BoxClient<'a>),
}

impl<'a> Scene<'a> {
    #[track_caller]
    fn set(host: &'a SystemdBox) -> Scene<'a> {
        let mut scene = Scene::without_exec(host);
        let session = host.exec_attached(&scene.stream.0, "session", &counts(7));
        scene.session = Some(session);
        scene.goes_on("first");
        scene
    }

    #[track_caller]
    fn without_exec(host: &'a SystemdBox) -> Scene<'a> {
        let stream = host.run_attached("stream", &counts(23));
        let terminal = host.run_terminal("terminal");
        let line =
            "while read word; do echo heard $word; [ $word = end ] && exit 8; done; echo cut";
        let reader = host.run_attached("reader", line);
        Scene {
            host,
            stream,
            session: None,
            terminal,
            reader,
        }
    }

    fn tasks(&self) -> [&BoxTask; 3] {
        [&self.stream.0, &self.terminal.0, &self.reader.0]
    }

    /// Everything works; `word` was not typed before.
    #[track_caller]
    fn goes_on(&mut self, word: &str) {
        // Its echo does not hold the word itself.
        let (first, rest) = word.split_at(1);
        self.terminal.1.line(&format!("echo '{first}''{rest}'"));
        self.terminal.1.wait_text(word);
        self.all_but_the_terminal_go_on(word);
    }

    #[track_caller]
    fn all_but_the_terminal_go_on(&mut self, word: &str) {
        self.stream.1.wait_more();
        if let Some(session) = &self.session {
            session.wait_more();
        }
        self.reader.1.line(word);
        self.reader.1.wait_text(&format!("heard {word}"));
        let list = self.host.shell("ctr task list");
        for task in self.tasks() {
            assert!(self.host.alive(&task.init), "{} died", task.id);
            let row = [task.id.as_str(), &task.init.pid.to_string(), "RUNNING"];
            let mut rows = list
                .lines()
                .map(|line| line.split_whitespace().collect::<Vec<_>>());
            assert!(rows.any(|found| found == row), "{row:?}: {list}");
        }
    }

    /// SIGKILLs the shims of these tasks, who have others soon, in containerd's own cgroup.
    #[track_caller]
    fn kill_shims(&self, tasks: &[&BoxTask]) {
        let old = tasks.iter().map(|task| self.host.shim_now(task));
        for (task, old) in tasks.iter().zip(old.collect::<Vec<Process>>()) {
            self.host.signal(&old, "KILL");
            self.assert_succeeded(task, &old);
        }
    }

    #[track_caller]
    fn assert_succeeded(&self, task: &BoxTask, old: &Process) {
        let new = self.host.shim_now(task);
        assert_ne!(new.pid, old.pid, "{}", task.id);
        let path = self.host.path(format!("/proc/{}/cgroup", new.pid));
        let groups = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{e}"));
        assert!(
            groups.contains("/system.slice/containerd.service"),
            "{groups}"
        );
    }

    #[track_caller]
    fn shims(&self) -> Vec<Process> {
        self.tasks().map(|task| self.host.shim_now(task)).into()
    }

    /// Every end is the true one, and no line was lost.
    #[track_caller]
    fn end(mut self) {
        // The init last: it takes the others along.
        let session = self.session.as_ref().map(|session| (session, 7));
        for (client, code) in session.into_iter().chain([(&self.stream.1, 23)]) {
            // Not what it has forked a moment ago.
            self.host.shell(&format!(
                "pkill --full --oldest -TERM '^/bin/sh -c n=0; trap .exit {code}'"
            ));
            assert_eq!(client.wait(), code);
            let text = client.text();
            for (at, line) in text.lines().enumerate() {
                assert_eq!(line.parse(), Ok(at + 1), "line {at}: {line}");
            }
            assert!(text.lines().count() > 100, "{text}");
        }
        self.terminal.1.line("exit 5");
        assert_eq!(self.terminal.1.wait(), 5, "{}", self.terminal.1.text());
        self.reader.1.line("end");
        assert_eq!(self.reader.1.wait(), 8, "{}", self.reader.1.text());
    }
}

fn main_pid(host: &SystemdBox) -> u32 {
    let pid = host.property(UNIT, "MainPID");
    pid.parse().unwrap_or_else(|e| panic!("{pid:?}: {e}"))
}

/// The service's process.
#[track_caller]
fn supervisor(host: &SystemdBox) -> Process {
    let pid = main_pid(host);
    host.process(pid)
        .unwrap_or_else(|| panic!("{UNIT} has no process"))
}

/// Waits until systemd has started another one, which serves.
#[track_caller]
fn wait_restarted(host: &SystemdBox, old: &Process) {
    wait_for("another supervisor", || {
        let pid = main_pid(host);
        (pid != 0 && pid != old.pid && host.property(UNIT, "ActiveState") == "active").then_some(())
    });
}

/// What was started is what it watches.
#[track_caller]
fn wait_watching(host: &SystemdBox, shims: f64) {
    wait_for("the shims to be watched", || {
        let name = "recoverd_supervised_shims{kind=\"ours\"}";
        (host.metric(name) == Some(shims)).then_some(())
    });
}

/// Waits until it has said so several times since it began.
#[track_caller]
fn says_that_it_lives(host: &SystemdBox) {
    let heard = || host.property(UNIT, "WatchdogTimestampMonotonic");
    for _ in 0..3 {
        let before = heard();
        wait_for("the watchdog to be told", || {
            (heard() != before).then_some(())
        });
    }
    assert_eq!(host.property(UNIT, "NRestarts"), "0");
}

/// Lines for the unit, besides its own.
#[track_caller]
fn drop_in(host: &SystemdBox, lines: &str) {
    host.write(
        format!("/etc/systemd/system/{UNIT}.d/test.conf"),
        &format!("[Service]\n{lines}"),
    );
    host.shell("systemctl daemon-reload");
}

fn restarts_of_the_service_lose_nothing() {
    let host = SystemdBox::start();
    host.supervise();
    let mut scene = Scene::set(&host);
    wait_watching(&host, 3.0);
    host.shell("systemctl restart recoverd");
    scene.kill_shims(&scene.tasks());
    scene.goes_on("restarted");

    // PID 1 starts itself anew, and gives back what it kept before.
    // It may go before it has answered whoever asked.
    host.output(["systemctl", "daemon-reexec"]);
    wait_for("systemd to be there again", || {
        let said = host.output(["journalctl", "--quiet", "--grep", "Reexecuting"]);
        let ready = host.output(["systemctl", "show", "--property", "Version"]);
        (said.status.success() && ready.status.success()).then_some(())
    });
    let old = supervisor(&host);
    host.signal(&old, "KILL");
    wait_restarted(&host, &old);
    scene.kill_shims(&scene.tasks());
    scene.goes_on("reexecuted");

    // The successors were started by the service; its stop ends none of them.
    let shims = scene.shims();
    host.shell("systemctl stop recoverd");
    scene.goes_on("stopped");
    assert_eq!(scene.shims(), shims);
    host.shell("systemctl start recoverd");
    scene.kill_shims(&scene.tasks());
    scene.goes_on("started");
    scene.end();
    host.shell("systemctl stop recoverd");
    assert_eq!(host.property(UNIT, "Result"), "success");
}

fn a_service_that_crashes_or_hangs_comes_back_with_what_it_kept() {
    let host = SystemdBox::start();
    // As the unit has it, but sooner.
    drop_in(&host, "WatchdogSec=8s\nTimeoutAbortSec=1s\n");
    host.supervise();
    let mut scene = Scene::set(&host);
    wait_watching(&host, 3.0);
    // A listener and containerd's connection for each shim, and the terminal's master.
    wait_for("seven descriptors in the store", || {
        let stored = host.property(UNIT, "NFileDescriptorStore");
        stored.parse::<u32>().is_ok_and(|n| n >= 7).then_some(())
    });
    says_that_it_lives(&host);
    for (signal, word) in [("KILL", "crashed"), ("STOP", "hung")] {
        let old = supervisor(&host);
        host.signal(&old, signal);
        if signal == "STOP" {
            scene.goes_on("hangs");
        }
        wait_restarted(&host, &old);
        scene.kill_shims(&scene.tasks());
        scene.goes_on(word);
    }
    let journal = host.journal(UNIT);
    assert!(journal.contains("Watchdog timeout"), "{journal}");
    scene.end();
}

fn what_dies_while_the_service_is_down_is_succeeded_when_it_comes_back() {
    let host = SystemdBox::start();
    // For as long as it takes to harm something meanwhile.
    drop_in(&host, "RestartSec=20s\n");
    host.supervise();
    let mut scene = Scene::without_exec(&host);
    let line = "trap \"exit 7\" TERM; while :; do sleep 1000 & wait $!; done";
    let session = host.exec(&scene.stream.0, "session", line);
    scene.goes_on("first");
    wait_watching(&host, 3.0);
    let old = supervisor(&host);
    let shims = [&scene.stream.0, &scene.terminal.0].map(|task| host.shim_now(task));
    // By one command: it takes its time to bring one into the box.
    let pids = shims.each_ref().map(|shim| shim.pid.to_string()).join(" ");
    let after = host.shell(&format!(
        "kill -s KILL {0}; while kill -0 {0} 2>/dev/null; do sleep 0.01; done; \
         kill -s KILL {pids}; systemctl show --property MainPID --value {UNIT}",
        old.pid
    ));
    assert_eq!(after.trim(), "0", "it was started too soon for this test");
    wait_restarted(&host, &old);
    // containerd's connections and the terminal's master were in systemd's hands, and the log's
    // fifo in those of who writes it. Not so the fifo from which the terminal's client reads.
    for (task, shim) in [&scene.stream.0, &scene.terminal.0].into_iter().zip(&shims) {
        scene.assert_succeeded(task, shim);
    }
    scene.all_but_the_terminal_go_on("back");
    host.signal(&session, "TERM");
    assert_eq!(host.wait(&scene.stream.0, "session"), 7);
    scene.end();
}

fn a_package_upgrade_reaches_every_shim_and_every_successor() {
    let host = SystemdBox::start();
    host.supervise();
    let mut scene = Scene::set(&host);
    wait_watching(&host, 3.0);
    let shims = scene.shims();
    let path = built("containerd-shim-recoverd-v1");
    let program = std::fs::read(&path).unwrap_or_else(|e| panic!("read {}: {e}", path.display()));
    let new = host.path(format!("{SHIM}.dpkg-new"));
    std::fs::write(&new, as_version(&program, OTHER)).unwrap_or_else(|e| panic!("{e}"));
    host.shell(&format!(
        "chmod 755 {SHIM}.dpkg-new; mv {SHIM}.dpkg-new {SHIM}"
    ));
    let check = host.output(["recoverd", "upgrade", "--check"]);
    assert_eq!(check.status.code(), Some(1), "{check:?}");
    let told = host.shell("recoverd upgrade --all 2>&1");
    assert!(told.contains(&format!("{VERSION} -> {OTHER}")), "{told}");
    let check = host.shell("recoverd upgrade --check");
    assert!(check.contains(&format!("3 shims of {OTHER}")), "{check}");
    assert_eq!(scene.shims(), shims);
    scene.goes_on("upgraded");
    scene.kill_shims(&scene.tasks());
    scene.goes_on("succeeded");
    let check = host.shell("recoverd upgrade --check");
    assert!(check.contains(&format!("3 shims of {OTHER}")), "{check}");
    scene.end();
}

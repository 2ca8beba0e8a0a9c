//! `recoverd upgrade` under real containerd and runc: SPEC's rows F8 and F9.

use std::fs::File;
use std::io::Write;
use std::process::Output;

use recoverd_tests::{
    Container, Containerd, Installed, Node, OTHER, Reader, Release, Running, Task, Traces, VERSION,
    beside, make_fifo, numbers, record_at, wait_for,
};

recoverd_tests::tests! {
    on_every_release: [
        shims_become_newer_and_older_under_load_and_nobody_notices,
        a_broken_shim_is_refused_and_one_that_dies_of_it_comes_back,
    ],
    once: [
        an_image_that_hangs_is_ended_and_the_old_one_comes_back,
        a_shim_that_does_not_answer_is_not_current_and_holds_up_no_other,
    ],
}

/// Everything that must not notice.
struct Scene {
    node: std::sync::Arc<Node>,
    containerd: Containerd,
    before: Traces,
    installed: Installed,
    /// The first of a pod of three.
    pod: Task,
    members: Vec<Task>,
    stream: Reader,
    session: recoverd_tests::Process,
    blocked: (Task, Running),
    typed: (Task, Running),
    keys: File,
}

fn until(name: &str, status: u32) -> String {
    format!("while [ ! -e /mnt/{name} ]; do usleep 20000; done; exit {status}")
}

impl Scene {
    fn set(release: &Release) -> Scene {
        let node = Node::start();
        let containerd = node.containerd(release);
        let before = Traces::of(&node);
        let installed = Installed::on(&node);
        let of = |id: &str| installed.container(id).shares(&node);
        let shell = |container: Container, line: &str| container.command(["sh", "-c", line]);
        let writer = numbers("/mnt/go", "/mnt/stop", "/mnt/count");
        let line = format!("{writer}; {}", until("end", 23));
        let pod = containerd.run(&shell(of("pod"), &line));
        let members = ["second", "third"].map(|id| {
            let member = shell(of(id).group("pod"), &until("end", 5));
            let task = containerd.run(&member);
            assert_eq!(task.shim, pod.shim);
            task
        });
        let line = until("session-end", 6);
        containerd.exec(&pod, "session", &["sh", "-c", &line, "session"]);
        let session = node.shell_with("session");
        let stream = Reader::open(&node.stdout_of("pod"));
        let blocked = containerd.run_attached(&shell(of("blocked"), &until("end", 7)));
        let keys = make_fifo(&node, "keys");
        let keys = File::options().read(true).write(true).open(keys);
        let keys = keys.unwrap_or_else(|e| panic!("open keys: {e}"));
        let given = keys
            .try_clone()
            .unwrap_or_else(|e| panic!("share keys: {e}"));
        let talker = "while read word; do echo heard $word; [ $word = end ] && exit 8; done";
        let talker = shell(installed.container("typed").terminal(), talker);
        let typed = containerd.run_typed(&talker, given.into());
        node.tell("go");
        stream.wait_advance();
        let mut scene = Scene {
            node,
            containerd,
            before,
            installed,
            pod,
            members: members.into(),
            stream,
            session,
            blocked,
            typed,
            keys,
        };
        scene.goes_on("first");
        scene
    }

    fn say(&mut self, word: &str) {
        let line = format!("{word}\n");
        self.keys
            .write_all(line.as_bytes())
            .unwrap_or_else(|e| panic!("type: {e}"));
    }

    /// Everything works; `word` was not typed before.
    fn goes_on(&mut self, word: &str) {
        self.stream.wait_advance();
        self.say(word);
        let heard = format!("heard {word}");
        wait_for(&heard, || {
            self.typed.1.text().contains(&heard).then_some(())
        });
        assert!(self.blocked.1.is_running(), "{}", self.blocked.1.text());
        assert!(self.node.alive(&self.session), "the exec session ended");
        for task in self.tasks() {
            task.assert_init_alive();
            let row = self.containerd.task("e2e", task.id());
            let row = row.map(|row| (row.pid, row.status));
            assert_eq!(row, Some((task.init.pid, "RUNNING".to_owned())));
        }
        let id = format!("hello-{word}");
        let mut exec = self
            .containerd
            .exec_attached(&self.pod, &id, &["echo", "hello"]);
        assert!(exec.wait().success(), "{}", exec.text());
        assert_eq!(exec.text(), "hello\n");
    }

    fn tasks(&self) -> impl Iterator<Item = &Task> {
        let others = [&self.pod, &self.blocked.0, &self.typed.0];
        others.into_iter().chain(&self.members)
    }

    fn assert_shims_are_the_same(&self) {
        for task in self.tasks() {
            task.assert_shim_alive();
        }
    }

    fn upgrade(&self, args: &[&str]) -> (Option<i32>, String) {
        let args = [&["upgrade"], args].concat();
        let Output {
            status,
            stdout,
            stderr,
        } = self.node.recoverd(args);
        let text = [stdout, stderr].concat();
        (status.code(), String::from_utf8_lossy(&text).into_owned())
    }

    /// The versions that the shims' records say.
    fn versions(&self) -> Vec<String> {
        let sockets = [&self.pod, &self.blocked.0, &self.typed.0].map(Task::socket);
        let version = |socket| record_at(&self.node, socket).shim.version;
        sockets.into_iter().map(version).collect()
    }

    fn outdated(&self) -> usize {
        let scan = self.node.scan();
        let codes = scan.all_codes();
        codes
            .iter()
            .filter(|code| **code == "outdated-shim")
            .count()
    }

    /// Every end is the true one.
    fn end(mut self) {
        self.node.tell("stop");
        let count = self.node.count_in("count");
        self.node.tell("session-end");
        assert_eq!(self.pod.wait("session").exit_status, 6);
        self.say("end");
        self.node.tell("end");
        assert_eq!(
            self.blocked.1.wait().code(),
            Some(7),
            "{}",
            self.blocked.1.text()
        );
        assert_eq!(
            self.typed.1.wait().code(),
            Some(8),
            "{}",
            self.typed.1.text()
        );
        assert_eq!(self.pod.wait("").exit_status, 23);
        self.stream.finish(count);
        self.containerd.delete(&self.pod, 23);
        for member in &self.members {
            assert_eq!(member.wait("").exit_status, 5);
            self.containerd.delete(member, 5);
        }
        for task in [&self.blocked.0, &self.typed.0] {
            self.containerd
                .ctr_ok("e2e", ["containers", "delete", task.id()]);
        }
        self.node.wait_no_shims();
        self.before.wait_restored(&self.node);
    }
}

fn shims_become_newer_and_older_under_load_and_nobody_notices(release: &Release) {
    let mut scene = Scene::set(release);
    assert_eq!(scene.outdated(), 0);
    let (code, text) = scene.upgrade(&["--check"]);
    assert_eq!(code, Some(0), "{text}");
    assert!(text.contains(&format!("3 shims of {VERSION}")), "{text}");

    scene.installed.install(OTHER);
    // One finding for each shim, whatever it serves.
    assert_eq!(scene.outdated(), 3);
    for flag in ["--check", "--dry-run"] {
        let args = if flag == "--check" {
            vec![flag]
        } else {
            vec!["--all", flag]
        };
        let (code, text) = scene.upgrade(&args);
        assert_eq!(code, Some(1), "{text}");
        assert_eq!(text.matches("outdated ").count(), 3, "{text}");
        assert!(text.contains("e2e/pod e2e/second e2e/third"), "{text}");
    }
    assert_eq!(scene.versions(), [VERSION; 3]);
    let holders = scene.node.holders();
    assert_eq!(holders.len(), 2, "of a session and a terminal: {holders:?}");
    let (code, text) = scene.upgrade(&["e2e/blocked"]);
    assert_eq!(code, Some(0), "{text}");
    assert_eq!(scene.versions(), [VERSION, OTHER, VERSION]);

    let (containerd, pod) = (&scene.containerd, scene.pod.clone());
    let mut serial = 0;
    let (rounds, ()) = beside(
        || {
            serial += 1;
            let mut exec =
                containerd.exec_attached(&pod, &format!("load-{serial}"), &["echo", "load"]);
            assert!(exec.wait().success(), "{}", exec.text());
            assert_eq!(exec.text(), "load\n");
        },
        || {
            for version in [OTHER, VERSION, OTHER] {
                scene.installed.install(version);
                let (code, text) = scene.upgrade(&["--all"]);
                assert_eq!(code, Some(0), "{text}");
                assert!(
                    text.contains(&format!("now 3 shims of {version}")),
                    "{text}"
                );
                assert_eq!(scene.versions(), [version; 3]);
                assert_eq!(scene.outdated(), 0);
                scene.assert_shims_are_the_same();
            }
        },
    );
    assert!(rounds > 0);
    scene.goes_on("after");
    wait_for("holders of the new image", || {
        let now = scene.node.holders();
        let old = holders.iter().any(|holder| scene.node.alive(holder));
        (now.len() == 2 && !old).then_some(())
    });
    let (code, text) = scene.upgrade(&["--all"]);
    assert_eq!(code, Some(0), "{text}");
    assert_eq!(text.matches("current ").count(), 3, "{text}");
    let history = scene.node.recoverd(["history"]);
    let history = String::from_utf8_lossy(&history.stdout).into_owned();
    let told = format!("{VERSION} -> {OTHER}");
    assert!(history.contains(&told), "{history}");
    scene.assert_shims_are_the_same();
    scene.end();
}

fn a_broken_shim_is_refused_and_one_that_dies_of_it_comes_back(release: &Release) {
    let mut scene = Scene::set(release);
    scene
        .installed
        .put(b"#!/bin/sh\necho 'no such format' >&2\nexit 1\n");
    let (code, text) = scene.upgrade(&["--all"]);
    assert_eq!(code, Some(1), "{text}");
    assert!(text.contains("no such format"), "{text}");
    assert_eq!(text.matches("refused ").count(), 1, "{text}");
    assert_eq!(text.matches("left ").count(), 2, "{text}");
    scene.assert_shims_are_the_same();
    assert_eq!(scene.versions(), [VERSION; 3]);
    scene.goes_on("refused");

    let dies = format!(
        "#!/bin/sh\ncase \"$*\" in *-handoff-check*) exec {} \"$@\";; esac\nexit 1\n",
        scene.node.built("containerd-shim-recoverd-v1").display()
    );
    for (task, word) in [
        ("pod", "pod-died"),
        ("typed", "typed-died"),
        ("blocked", "died"),
    ] {
        scene.installed.put(dies.as_bytes());
        let (code, text) = scene.upgrade(&[&format!("e2e/{task}")]);
        assert_eq!(code, Some(1), "{text}");
        assert!(text.contains("came-back"), "{text}");
        // containerd runs it for what comes now.
        scene.installed.install(VERSION);
        scene.goes_on(word);
    }
    assert_eq!(scene.versions(), [VERSION; 3]);
    scene.end();
}

fn an_image_that_hangs_is_ended_and_the_old_one_comes_back(release: &Release) {
    let mut scene = Scene::set(release);
    let hangs = format!(
        "#!/bin/sh\ncase \"$*\" in *-handoff-check*) exec {} \"$@\";; esac\nexec sleep 1000\n",
        scene.node.built("containerd-shim-recoverd-v1").display()
    );
    scene.installed.put(hangs.as_bytes());
    let (code, text) = scene.upgrade(&["e2e/pod"]);
    assert_eq!(code, Some(1), "{text}");
    let told = text.contains("came-back") && text.contains("in time, and was ended");
    assert!(told, "{text}");
    scene.installed.install(VERSION);
    scene.goes_on("hung");
    scene.end();
}

fn a_shim_that_does_not_answer_is_not_current_and_holds_up_no_other(release: &Release) {
    let mut scene = Scene::set(release);
    scene.installed.install(OTHER);
    let (code, text) = scene.upgrade(&["e2e/blocked"]);
    assert_eq!(code, Some(0), "{text}");
    let hung = scene.blocked.0.shim.clone();
    scene.node.freeze(&hung);
    let (code, text) = scene.upgrade(&["--all"]);
    assert_eq!(code, Some(1), "{text}");
    assert!(text.contains("runs that executable already, but"), "{text}");
    let count = |word: &str| text.lines().filter(|line| line.starts_with(word)).count();
    assert_eq!((count("refused "), count("upgraded ")), (1, 2), "{text}");
    scene.node.signal(&hung, "CONT");
    assert_eq!(scene.versions(), [OTHER; 3]);
    let (code, text) = scene.upgrade(&["--all"]);
    assert_eq!(code, Some(0), "{text}");
    scene.goes_on("thawed");
    scene.assert_shims_are_the_same();
    scene.end();
}

//! What containerd's subscribers are told: for every scenario the sequence of the stock shim and
//! that of ours, recorded from `ctr events` in one run, are the same but for ids, pids and times.

use std::collections::BTreeMap;

use recoverd_common::pb::runc;
use recoverd_tests::{
    Api, Container, Containerd, Event, Events, Fifos, Node, Release, SLEEPER, ShimUnderTest, Stdio,
    oci_process, oci_spec, wait_for,
};
use serde_json::{Value, json};

recoverd_tests::tests! {
    on_every_release: [
        sequences_of_ours_and_of_the_stock_shim_are_equal,
        delete_of_what_was_never_started_comes_after_its_exit,
        exit_of_an_init_comes_after_those_of_its_execs,
    ],
}

/// One scenario at work.
struct Scene<'a> {
    containerd: &'a Containerd,
    api: &'a Api,
    shim: ShimUnderTest,
    /// Its container's id; others begin with it.
    id: String,
}

impl Scene<'_> {
    fn node(&self) -> &Node {
        self.containerd.node()
    }

    #[track_caller]
    fn run(&self, args: &[&str]) -> u32 {
        self.api.run(
            &self.id,
            &oci_spec(&self.id, args),
            self.shim,
            &Stdio::default(),
        )
    }

    #[track_caller]
    fn create(&self, args: &[&str]) {
        self.api
            .container(&self.id, &oci_spec(&self.id, args), self.shim, None);
        self.api
            .create(&self.id, &Stdio::default())
            .expect("create");
    }

    #[track_caller]
    fn start_exec(&self, exec_id: &str, args: &[&str]) -> u32 {
        self.api
            .run_exec(&self.id, exec_id, &oci_process(args), &Stdio::default())
    }

    #[track_caller]
    fn finish_exec(&self, exec_id: &str) {
        self.api.status(&self.id, exec_id);
        self.api.delete(&self.id, exec_id).expect("delete an exec");
    }

    #[track_caller]
    fn end(&self) {
        self.api.end(&self.id);
    }

    /// Deletes it when it has ended by itself.
    #[track_caller]
    fn finish(&self) {
        self.api.status(&self.id, "");
        self.api.delete(&self.id, "").expect("delete");
    }
}

type Scenario = (&'static str, fn(&Scene<'_>));

/// Scenarios whose events come in one possible order only.
const SCENARIOS: [Scenario; 21] = [
    ("killed", |scene| {
        scene.run(&SLEEPER);
        scene.end();
    }),
    ("exits by itself", |scene| {
        scene.run(&["sh", "-c", "sleep 0.2; exit 12"]);
        scene.finish();
    }),
    ("exits at once", |scene| {
        scene.run(&["true"]);
        scene.finish();
    }),
    ("ended by SIGTERM", |scene| {
        let pid = scene.run(&SLEEPER);
        // Before its trap, the init of a pid namespace is deaf.
        wait_for("the trap", || {
            let mut all = scene.node().processes().into_iter();
            all.find(|process| process.parent == pid)
        });
        scene.api.kill(&scene.id, "", 15).expect("kill");
        scene.finish();
    }),
    ("created, then killed", |scene| {
        scene.create(&SLEEPER);
        scene.end();
    }),
    ("no such program", |scene| {
        let id = &scene.id;
        scene
            .api
            .container(id, &oci_spec(id, &["/no/such/program"]), scene.shim, None);
        scene
            .api
            .create(id, &Stdio::default())
            .expect_err("created without a program");
    }),
    ("exec that exits", |scene| {
        scene.run(&SLEEPER);
        scene.start_exec("worker", &["sh", "-c", "sleep 0.2; exit 3"]);
        scene.finish_exec("worker");
        scene.end();
    }),
    ("exec that exits at once", |scene| {
        scene.run(&SLEEPER);
        scene.start_exec("worker", &["true"]);
        scene.finish_exec("worker");
        scene.end();
    }),
    ("exec that is killed", |scene| {
        scene.run(&SLEEPER);
        scene.start_exec("worker", &["sleep", "1000"]);
        scene
            .api
            .kill(&scene.id, "worker", 9)
            .expect("kill an exec");
        scene.finish_exec("worker");
        scene.end();
    }),
    ("exec added and deleted", |scene| {
        scene.run(&SLEEPER);
        let process = oci_process(&["true"]);
        scene
            .api
            .exec(&scene.id, "worker", &process, &Stdio::default())
            .expect("exec");
        scene
            .api
            .delete(&scene.id, "worker")
            .expect("delete an exec");
        scene.end();
    }),
    ("exec id used twice", |scene| {
        scene.run(&SLEEPER);
        for _ in 0..2 {
            scene.start_exec("worker", &["true"]);
            scene.finish_exec("worker");
        }
        scene.end();
    }),
    ("three execs one after the other", |scene| {
        scene.run(&SLEEPER);
        for exec_id in ["one", "two", "three"] {
            scene.start_exec(exec_id, &["true"]);
            scene.finish_exec(exec_id);
        }
        scene.end();
    }),
    ("exec is never deleted", |scene| {
        scene.run(&SLEEPER);
        scene.start_exec("worker", &["true"]);
        scene.api.status(&scene.id, "worker");
        scene.end();
    }),
    ("paused and resumed", |scene| {
        scene.run(&SLEEPER);
        for _ in 0..2 {
            scene.api.pause(&scene.id).expect("pause");
            scene.api.resume(&scene.id).expect("resume");
        }
        scene.end();
    }),
    ("updated and resized", |scene| {
        scene.run(&SLEEPER);
        scene
            .api
            .update(&scene.id, &json!({"pids": {"limit": 99}}))
            .expect("update");
        scene.api.resize(&scene.id, "", 80, 24).expect("resize");
        scene.end();
    }),
    ("refused requests", |scene| {
        scene.run(&SLEEPER);
        scene.api.resume(&scene.id).expect_err("resumed what runs");
        scene
            .api
            .start(&scene.id, "")
            .expect_err("started what runs");
        scene
            .api
            .kill(&scene.id, "nobody", 9)
            .expect_err("killed nobody");
        scene
            .api
            .delete(&scene.id, "")
            .expect_err("deleted what runs");
        scene.end();
    }),
    ("fifos", |scene| {
        let fifos = Fifos::make(scene.node(), &scene.id);
        let (stdout, _stderr) = (fifos.stdout(), fifos.stderr());
        scene.api.run(
            &scene.id,
            &oci_spec(&scene.id, &["sh", "-c", "echo out; sleep 0.2"]),
            scene.shim,
            &fifos.stdio,
        );
        stdout.wait_text("out\n");
        scene.finish();
    }),
    ("terminal", |scene| {
        let fifos = Fifos::make_terminal(scene.node(), &scene.id);
        let _stdout = fifos.stdout();
        let mut spec = oci_spec(&scene.id, &SLEEPER);
        spec["process"]["terminal"] = json!(true);
        scene.api.run(&scene.id, &spec, scene.shim, &fifos.stdio);
        scene.api.resize(&scene.id, "", 80, 24).expect("resize");
        scene.end();
    }),
    ("mounted root", |scene| {
        let container = Container::new(&scene.id).shim(scene.shim).image();
        let task = scene.containerd.run(&container);
        scene.containerd.remove(&task);
    }),
    ("out of memory", |scene| {
        let mut spec = oci_spec(&scene.id, &["sh", "-c", "x=a; while :; do x=$x$x; done"]);
        spec["linux"]["resources"]["memory"] = json!({"limit": 8 << 20, "swap": 8 << 20});
        scene
            .api
            .run(&scene.id, &spec, scene.shim, &Stdio::default());
        scene.finish();
    }),
    ("crun", |scene| {
        let options = runc::Options {
            binary_name: "crun".into(),
            ..runc::Options::default()
        };
        let id = &scene.id;
        scene
            .api
            .container(id, &oci_spec(id, &SLEEPER), scene.shim, Some(&options));
        scene.api.create(id, &Stdio::default()).expect("create");
        scene.api.start(id, "").expect("start");
        scene.start_exec("worker", &["sh", "-c", "exit 3"]);
        scene.finish_exec("worker");
        scene.end();
    }),
];

/// What is the same in both: ids by the scenario's, pids by their first mention, times by being
/// there.
fn normalised(events: &[Event], id: &str) -> Vec<String> {
    let mut pids: BTreeMap<u64, usize> = BTreeMap::new();
    let mut lines = Vec::new();
    for event in events {
        let mut body = event.body.clone();
        normalise(&mut body, id, &mut pids);
        lines.push(format!("{} {body}", event.topic));
    }
    lines
}

/// Without the one path component that follows `parent`.
fn without_folder_after(text: &str, parent: &str) -> String {
    match text.split_once(parent) {
        Some((before, after)) => {
            let rest = after.split_once('/').map_or("", |(_, rest)| rest);
            format!("{before}{parent}{rest}")
        }
        None => text.to_owned(),
    }
}

fn normalise(value: &mut Value, id: &str, pids: &mut BTreeMap<u64, usize>) {
    match value {
        Value::Object(fields) => {
            for (name, field) in fields {
                match (name.as_str(), field.as_u64()) {
                    ("pid", Some(pid)) => {
                        let next = pids.len();
                        *field = json!(format!("pid {}", pids.entry(pid).or_insert(next)));
                    }
                    ("exited_at", _) => *field = json!("time"),
                    _ => normalise(field, id, pids),
                }
            }
        }
        Value::Array(items) => items.iter_mut().for_each(|item| normalise(item, id, pids)),
        Value::String(text) => {
            // `ctr` makes a folder of random name for the fifos of each container, the
            // snapshotter a numbered one for each root.
            *text = without_folder_after(&text.replace(id, "ID"), "/fifo/");
            *text = without_folder_after(text, "/snapshots/");
        }
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
}

fn sequences_of_ours_and_of_the_stock_shim_are_equal(release: &Release) {
    let node = Node::start();
    let containerd = node.containerd(release);
    containerd.import_image("e2e");
    let api = containerd.api("e2e");
    let events = Events::of(&containerd);
    let mut unequal = Vec::new();
    for (number, (name, play)) in SCENARIOS.into_iter().enumerate() {
        // Two digits each, so that no id is part of another.
        let scene = |shim, word: &str| Scene {
            containerd: &containerd,
            api: &api,
            shim,
            id: format!("{word}{number:02}"),
        };
        let played = [
            scene(ShimUnderTest::Stock, "stock"),
            scene(ShimUnderTest::Recoverd, "ours"),
        ]
        .map(|scene| {
            play(&scene);
            scene.id
        });
        node.wait_no_shims();
        let [stock, ours] = played;
        events.catch_up(&containerd);
        // Ours loses none. The stock shim of 2.x may leave before its last event, the delete's, is
        // sent: then what is missing there is exactly that.
        let mut expected = normalised(&told(&events, &stock), &stock);
        // The stock shim sends this one beside its queue, so that it may arrive after the exit,
        // against the timestamps; ours keeps to their order.
        if let Some(at) = expected
            .iter()
            .position(|line| line.starts_with("/tasks/oom"))
        {
            let oom = expected.remove(at);
            let exit = expected
                .iter()
                .position(|line| line.starts_with("/tasks/exit"));
            expected.insert(exit.unwrap_or(at), oom);
        }
        let mut seen = normalised(&told(&events, &ours), &ours);
        // Nor does it send it at all when the cgroup is gone before its watcher has woken.
        let is_oom = |line: &String| line.starts_with("/tasks/oom");
        if seen.iter().any(is_oom) && !expected.iter().any(is_oom) && name == "out of memory" {
            seen.retain(|line| !is_oom(line));
        }
        let equal = match (expected.as_slice(), seen.as_slice()) {
            (expected, seen) if expected == seen => true,
            (expected, [all @ .., last]) => {
                expected == all && release.major() >= 2 && last.starts_with("/tasks/delete")
            }
            _ => false,
        };
        if !equal {
            unequal.push(format!("{name}:\n  stock {expected:#?}\n  ours {seen:#?}"));
        }
    }
    assert!(unequal.is_empty(), "{}", unequal.join("\n"));
}

/// The one scenario that differs: the stock shim publishes the delete, with status 0, while the
/// init is still dying, and its exit, with 137, after that. Ours waits for the exit: the order and
/// the status are what containerd's runtime-v2 document demands.
fn delete_of_what_was_never_started_comes_after_its_exit(release: &Release) {
    let node = Node::start();
    let containerd = node.containerd(release);
    let api = containerd.api("e2e");
    let events = Events::of(&containerd);
    let scene = Scene {
        containerd: &containerd,
        api: &api,
        shim: ShimUnderTest::Recoverd,
        id: "unborn".into(),
    };
    scene.create(&SLEEPER);
    let deleted = api.delete("unborn", "").expect("delete");
    assert_eq!(deleted.status, 137);
    let topics = wait_for("three events", || {
        let told = told(&events, "unborn");
        let topics: Vec<String> = told.iter().map(|event| event.topic.clone()).collect();
        (topics.len() >= 3).then_some((topics, told))
    });
    assert_eq!(topics.0, ["/tasks/create", "/tasks/exit", "/tasks/delete"]);
    let statuses: Vec<u64> = topics
        .1
        .iter()
        .map(|event| event.number("exit_status"))
        .collect();
    assert_eq!(statuses, [0, 137, 137]);
}

/// The stock shim of 1.6.20 has no such order, newer ones have.
fn exit_of_an_init_comes_after_those_of_its_execs(release: &Release) {
    let node = Node::start();
    let containerd = node.containerd(release);
    let api = containerd.api("e2e");
    let events = Events::of(&containerd);
    let scene = Scene {
        containerd: &containerd,
        api: &api,
        shim: ShimUnderTest::Recoverd,
        id: "last".into(),
    };
    scene.run(&SLEEPER);
    for exec_id in ["one", "two", "three"] {
        scene.start_exec(exec_id, &["sleep", "1000"]);
    }
    scene.end();
    let ended = wait_for("the delete", || {
        let mut told = told(&events, "last");
        let delete = told.pop()?;
        (delete.topic == "/tasks/delete").then(|| {
            told.retain(|event| event.topic == "/tasks/exit");
            told
        })
    });
    let mut ids: Vec<&str> = ended.iter().map(|event| event.text("id")).collect();
    assert_eq!(ids.pop(), Some("last"));
    ids.sort_unstable();
    assert_eq!(ids, ["one", "three", "two"]);
    for event in &ended {
        assert_eq!(event.number("exit_status"), 137, "{event:?}");
    }
}

/// The task events of one container.
fn told(events: &Events, id: &str) -> Vec<Event> {
    let mut all = events.of_container(id);
    all.retain(|event| event.topic.starts_with("/tasks/"));
    all
}

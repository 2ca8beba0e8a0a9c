//! `recoverd repair` on real messes: the plan changes nothing, what destroys waits for its word,
//! what is done is exactly that, and afterwards nothing is left to do. In every node there is a
//! task that is well, one of a foreign shim, and a stranger's files.

use std::path::PathBuf;
use std::sync::Arc;

use recoverd_tests::{Container, Containerd, Node, Release, Scan, Task, wait_for};
use serde::Deserialize;
use serde_json::Value;

recoverd_tests::tests! {
    on_every_release: [
        stale_bundle_is_removed,
        stale_socket_is_removed,
        runc_state_cgroup_and_fifos_are_released,
        leaked_mount_is_released,
        leaked_shim_is_ended,
        task_unknown_to_containerd_is_ended,
        orphan_is_adopted,
        hung_shim_is_replaced_only_while_containerd_is_down,
        shim_with_a_connection_is_not_ended,
        foreign_leftovers_stay,
    ],
    once: [
        stale_and_unreadable_records_are_cleared,
        hostile_leftovers_are_not_followed,
        two_repairs_at_once_have_one_winner,
        only_and_the_limit_narrow_a_repair,
        killed_repair_is_finished_by_the_next,
    ],
}

/// `recoverd/repair/1`.
#[derive(Debug, Deserialize)]
struct Repair {
    #[serde(skip)]
    exit: i32,
    schema: String,
    applied: bool,
    steps: Vec<Step>,
    by_hand: Vec<ByHand>,
    left_out: usize,
    gaps: Vec<Value>,
}

#[derive(Debug, Deserialize)]
struct Step {
    code: String,
    does: String,
    ends: Vec<Process>,
    needs: Option<String>,
    outcome: Option<Outcome>,
}

#[derive(Debug, Deserialize)]
struct Process {
    pid: u32,
    start_time: u64,
}

#[derive(Debug, Deserialize)]
struct Outcome {
    verdict: String,
    what: String,
}

#[derive(Debug, Deserialize)]
struct ByHand {
    code: String,
    subject: String,
    why: String,
}

impl Repair {
    fn codes(&self) -> Vec<&str> {
        self.steps.iter().map(|step| step.code.as_str()).collect()
    }

    fn verdicts(&self) -> Vec<&str> {
        let outcomes = self.steps.iter().filter_map(|step| step.outcome.as_ref());
        outcomes.map(|outcome| outcome.verdict.as_str()).collect()
    }
}

/// Everything counts as old, and nothing as in transition.
fn repair(node: &Arc<Node>, words: &[&str]) -> Repair {
    let config = node.folder().join("any-age.toml");
    std::fs::write(&config, "[scan]\nsettle = \"0s\"\n").unwrap();
    let config = config.display().to_string();
    let mut args = vec![
        "--config",
        &config,
        "repair",
        "-o",
        "json",
        "--min-age",
        "0s",
    ];
    args.extend_from_slice(words);
    let output = node.recoverd(&args);
    let said = String::from_utf8_lossy(&output.stdout);
    let mut repair: Repair = serde_json::from_str(&said).unwrap_or_else(|error| {
        panic!(
            "no report: {error}\n{said}{}",
            String::from_utf8_lossy(&output.stderr)
        )
    });
    assert_eq!(repair.schema, "recoverd/repair/1");
    repair.exit = output.status.code().unwrap_or(-1);
    assert_eq!(
        output.stderr,
        b"",
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    repair
}

/// Every file that a repair could touch, and every process.
fn listing(node: &Arc<Node>) -> (String, Vec<u32>) {
    let files = node.shell(
        "find /run /var/lib/containerd /var/lib/recoverd /sys/fs/cgroup/*/e2e -type d,f,p,s,l \
            ! -path '/run/recoverd*' -printf '%p %i %y\\n' 2>/dev/null | sort",
    );
    let mounts = node.shell("cut -d' ' -f1,5 /proc/self/mountinfo");
    let mut pids: Vec<u32> = node.shims().iter().map(|shim| shim.pid).collect();
    pids.sort_unstable();
    (files + &mounts, pids)
}

/// The same once nothing goes away any more: containerd removes some after its word that a task is
/// gone.
#[track_caller]
fn settled(node: &Arc<Node>) -> (String, Vec<u32>) {
    let mut last = listing(node);
    wait_for("nothing to change any more", || {
        let now = listing(node);
        let before = std::mem::replace(&mut last, now.clone());
        (now == before).then_some(now)
    })
}

/// Who must not be touched.
struct Others {
    well: Task,
    foreign: Task,
    stranger: PathBuf,
}

impl Others {
    fn on(node: &Arc<Node>, containerd: &Containerd) -> Self {
        let shim = node.folder().join("containerd-shim-foo-v1");
        node.run("cp", [containerd.release().stock_shim(), shim.clone()]);
        let others = Self {
            well: containerd.run(&Container::new("well")),
            foreign: containerd.run(&Container::new("foo").runtime(&shim)),
            stranger: PathBuf::from("/run/containerd/s/stranger.record"),
        };
        node.shell(&format!("echo mine >{}", others.stranger.display()));
        others
    }

    #[track_caller]
    fn assert_untouched(&self, node: &Arc<Node>) {
        for task in [&self.well, &self.foreign] {
            task.assert_init_alive();
            task.assert_shim_alive();
            assert!(node.path(task.bundle()).join("config.json").exists());
            assert!(node.path(task.socket()).exists());
        }
        assert!(node.path(&self.stranger).exists());
    }
}

/// The plan has steps of these codes; it changes nothing to show it; without its words what
/// destroys is refused; with them everything is done, and then there is nothing to do.
#[track_caller]
fn mends(node: &Arc<Node>, others: &Others, codes: &[&str], words: &[&str]) -> Repair {
    let before = settled(node);
    let shown = repair(node, &[]);
    assert_eq!(shown.codes(), codes, "{shown:#?}");
    assert_eq!((shown.exit, shown.applied), (1, false), "{shown:#?}");
    assert!(
        shown.verdicts().is_empty() && shown.gaps.is_empty(),
        "{shown:#?}"
    );
    assert_eq!(listing(node), before, "looking changed something");
    let destroying = shown.steps.iter().filter(|step| step.needs.is_some());
    if destroying.clone().count() == shown.steps.len() {
        let refused = repair(node, &["--apply"]);
        assert!(
            refused
                .verdicts()
                .iter()
                .all(|verdict| *verdict == "refused"),
            "{refused:#?}"
        );
        assert_eq!(refused.exit, 1);
        let (files, pids) = listing(node);
        let without_history = |text: &str| {
            let lines = text.lines().filter(|line| !line.contains("recoverd"));
            lines.map(str::to_owned).collect::<Vec<_>>()
        };
        assert_eq!(
            (without_history(&files), pids),
            (without_history(&before.0), before.1.clone())
        );
    }
    let mut args = vec!["--apply"];
    for word in words {
        args.extend(["--allow", word]);
    }
    let done = repair(node, &args);
    assert!(
        done.verdicts().iter().all(|verdict| *verdict == "done"),
        "{done:#?}"
    );
    assert_eq!((done.exit, done.applied), (0, true), "{done:#?}");
    let again = repair(node, &args);
    assert_eq!((again.exit, again.codes()), (0, vec![]), "{again:#?}");
    others.assert_untouched(node);
    let history = node.recoverd(["history"]);
    assert_eq!(history.status.code(), Some(0), "{history:?}");
    let told = String::from_utf8_lossy(&history.stdout).into_owned();
    assert!(told.contains("intended") && told.contains("done"), "{told}");
    done
}

#[track_caller]
fn assert_nothing_found(scan: &Scan) {
    assert_eq!(scan.all_codes(), [""; 0], "{scan:#?}");
}

fn stale_bundle_is_removed(release: &Release) {
    let node = Node::start();
    let mut containerd = node.containerd(release);
    let others = Others::on(&node, &containerd);
    let dead = containerd.run(&Container::new("dead"));
    containerd.kill();
    node.kill(&dead.shim);
    node.kill(&dead.init);
    let plan = repair(&node, &["--only", "stale-bundle"]);
    assert_eq!(plan.codes(), ["stale-bundle"], "{plan:#?}");
    // Its fifos are found when the bundle is gone: the same run mends them in its second round.
    let all = ["stale-bundle", "leaked-cgroup", "stale-socket"];
    // What needs no word is not held up by what does.
    let some = repair(
        &node,
        &["--apply", "--only", "stale-bundle", "--allow", "kill"],
    );
    assert_eq!(some.verdicts(), ["refused"], "{some:#?}");
    assert!(node.path(dead.bundle()).exists());
    mends(&node, &others, &all, &["delete"]);
    for gone in [dead.bundle(), dead.socket(), &dead.runc_state()] {
        assert!(!node.path(gone).exists(), "{}", gone.display());
    }
    assert_nothing_found(&node.scan_of_any_age());
    containerd.start();
    assert_eq!(containerd.task("e2e", "dead"), None);
    others.assert_untouched(&node);
}

fn stale_socket_is_removed(release: &Release) {
    let node = Node::start();
    let containerd = node.containerd(release);
    let others = Others::on(&node, &containerd);
    let dead = containerd.run(&Container::new("dead"));
    node.kill(&dead.shim);
    wait_for("containerd to clean up", || {
        (containerd.task("e2e", "dead").is_none() && !node.path(dead.bundle()).exists())
            .then_some(())
    });
    mends(&node, &others, &["leaked-fifo", "stale-socket"], &[]);
    assert!(!node.path(dead.socket()).exists());
    assert_nothing_found(&node.scan_of_any_age());
}

fn runc_state_cgroup_and_fifos_are_released(release: &Release) {
    let node = Node::start();
    let containerd = node.containerd(release);
    let others = Others::on(&node, &containerd);
    let dead = containerd.run(&Container::new("dead"));
    node.run("rm", ["-rf".as_ref(), dead.bundle().as_os_str()]);
    node.kill(&dead.shim);
    wait_for("containerd to give the task up", || {
        containerd.task("e2e", "dead").is_none().then_some(())
    });
    node.kill(&dead.init);
    let codes = [
        "leaked-runc-state",
        "leaked-cgroup",
        "leaked-fifo",
        "stale-socket",
    ];
    mends(&node, &others, &codes, &["delete"]);
    assert!(!node.path(dead.runc_state()).exists());
    assert_eq!(
        node.shell("find /sys/fs/cgroup -type d -path '*/e2e/dead'"),
        ""
    );
    assert_nothing_found(&node.scan_of_any_age());
    // The id is free again.
    containerd.ctr_ok("e2e", ["containers", "delete", "dead"]);
    containerd.run(&Container::new("dead"));
}

fn leaked_mount_is_released(release: &Release) {
    let node = Node::start();
    let mut containerd = node.containerd(release);
    containerd.import_image("e2e");
    let others = Others::on(&node, &containerd);
    let dead = containerd.run(&Container::new("dead").image());
    containerd.kill();
    node.kill(&dead.shim);
    node.kill(&dead.init);
    let root = dead.bundle().join("rootfs").display().to_string();
    let done = repair(&node, &["--apply", "--only", "leaked-mount"]);
    assert_eq!(done.verdicts(), ["done"], "{done:#?}");
    assert!(!node.run("cat", ["/proc/self/mountinfo"]).contains(&root));
    let all = ["--apply", "--allow", "delete"];
    let done = repair(&node, &all);
    assert_eq!(done.exit, 0, "{done:#?}");
    assert!(!node.path(dead.bundle()).exists());
    others.assert_untouched(&node);
    assert_nothing_found(&node.scan_of_any_age());
    // A bundle that is removed is unmounted first.
    containerd.start();
    let other = containerd.run(&Container::new("other").image());
    containerd.kill();
    node.kill(&other.shim);
    node.kill(&other.init);
    let done = repair(
        &node,
        &["--apply", "--allow", "delete", "--only", "stale-bundle"],
    );
    assert_eq!(done.verdicts(), ["done"], "{done:#?}");
    assert!(!node.path(other.bundle()).exists());
}

/// A shim whose bundle containerd did not find at its start.
fn forgotten(node: &Arc<Node>, containerd: &mut Containerd) -> Task {
    let task = containerd.run(&Container::new("lost"));
    containerd.kill();
    node.run("rm", ["-rf".as_ref(), task.bundle().as_os_str()]);
    containerd.start();
    assert_eq!(containerd.task("e2e", "lost"), None);
    task
}

fn leaked_shim_is_ended(release: &Release) {
    let node = Node::start();
    let mut containerd = node.containerd(release);
    let others = Others::on(&node, &containerd);
    let task = forgotten(&node, &mut containerd);
    task.kill_init();
    let done = mends_in_rounds(&node, &others, "leaked-shim", &["kill", "delete"]);
    let step = &done.steps[0];
    assert_eq!(step.ends.len(), 1, "{done:#?}");
    assert_eq!(step.ends[0].pid, task.shim.pid);
    assert!(
        step.ends[0].start_time > 0 && step.does.contains("SIGTERM"),
        "{step:?}"
    );
    assert!(!node.alive(&task.shim));
    assert_nothing_found(&node.scan_of_any_age());
}

fn task_unknown_to_containerd_is_ended(release: &Release) {
    let node = Node::start();
    let mut containerd = node.containerd(release);
    let others = Others::on(&node, &containerd);
    let task = forgotten(&node, &mut containerd);
    let done = mends_in_rounds(
        &node,
        &others,
        "task-unknown-to-containerd",
        &["kill", "delete"],
    );
    assert_eq!(done.steps[0].ends[0].pid, task.init.pid, "{done:#?}");
    assert!(!node.alive(&task.init) && !node.alive(&task.shim));
    assert_nothing_found(&node.scan_of_any_age());
}

/// As [`mends`], where a step lays bare what the next round mends.
#[track_caller]
fn mends_in_rounds(node: &Arc<Node>, others: &Others, first: &str, words: &[&str]) -> Repair {
    let before = settled(node);
    let shown = repair(node, &["--only", first]);
    assert_eq!((shown.exit, shown.codes()), (1, vec![first]), "{shown:#?}");
    assert_eq!(listing(node), before, "looking changed something");
    let refused = repair(node, &["--apply", "--only", first]);
    assert_eq!(refused.verdicts(), ["refused"], "{refused:#?}");
    let mut args = vec!["--apply"];
    for word in words {
        args.extend(["--allow", word]);
    }
    let done = repair(node, &args);
    assert_eq!(done.exit, 0, "{done:#?}");
    let again = repair(node, &args);
    assert_eq!((again.exit, again.codes()), (0, vec![]), "{again:#?}");
    others.assert_untouched(node);
    done
}

fn orphan_is_adopted(release: &Release) {
    let node = Node::start();
    let mut containerd = node.containerd(release);
    let others = Others::on(&node, &containerd);
    let orphan = containerd.run(&Container::new("orphan"));
    containerd.kill();
    node.kill(&orphan.shim);
    mends(&node, &others, &["orphaned-task"], &[]);
    orphan.assert_init_alive();
    containerd.start();
    assert!(containerd.task("e2e", "orphan").is_some());
    orphan.assert_init_alive();
    containerd.scan().assert_clean();
}

fn hung_shim_is_replaced_only_while_containerd_is_down(release: &Release) {
    let node = Node::start();
    let mut containerd = node.containerd(release);
    let others = Others::on(&node, &containerd);
    let hung = containerd.run(&Container::new("hung"));
    node.freeze(&hung.shim);
    let refused = repair(&node, &["--apply", "--allow", "kill"]);
    assert_eq!(refused.codes(), [""; 0], "{refused:#?}");
    let line = &refused.by_hand[0];
    assert_eq!(line.code, "unresponsive-shim");
    assert_eq!(line.subject, "e2e/hung");
    hung.assert_init_alive();
    assert!(node.alive(&hung.shim));
    containerd.kill();
    let done = mends(&node, &others, &["unresponsive-shim"], &["kill"]);
    assert_eq!(done.steps[0].ends[0].pid, hung.shim.pid);
    hung.assert_init_alive();
    containerd.start();
    hung.assert_init_alive();
    assert!(containerd.task("e2e", "hung").is_some());
}

fn shim_with_a_connection_is_not_ended(release: &Release) {
    let node = Node::start();
    let mut containerd = node.containerd(release);
    let others = Others::on(&node, &containerd);
    let task = forgotten(&node, &mut containerd);
    task.kill_init();
    let script =
        "use IO::Socket::UNIX; my $s = IO::Socket::UNIX->new(Peer => $ARGV[0]) or die; sleep 1000";
    let socket = task.socket().display().to_string();
    let holder = node.spawn("perl", ["-e", script, &socket]);
    wait_for("the connection", || {
        let table = node.run("cat", ["/proc/net/unix"]);
        (table.matches(&socket).count() > 1).then_some(())
    });
    let refused = repair(
        &node,
        &["--apply", "--allow", "kill", "--only", "leaked-shim"],
    );
    assert_eq!(refused.codes(), [""; 0], "{refused:#?}");
    assert!(
        refused.by_hand[0].why.contains("connections"),
        "{refused:#?}"
    );
    assert!(node.alive(&task.shim));
    drop(holder);
    others.assert_untouched(&node);
}

fn foreign_leftovers_stay(release: &Release) {
    let node = Node::start();
    let mut containerd = node.containerd(release);
    let others = Others::on(&node, &containerd);
    containerd.kill();
    node.kill(&others.foreign.shim);
    node.kill(&others.foreign.init);
    let all = ["--apply", "--allow", "kill", "--allow", "delete"];
    let done = repair(&node, &all);
    assert!(
        done.by_hand
            .iter()
            .any(|line| line.code == "stale-bundle" && line.why.contains("foreign")),
        "{done:#?}"
    );
    assert!(
        node.path(others.foreign.bundle())
            .join("config.json")
            .exists()
    );
    assert!(node.path(others.foreign.runc_state()).exists());
    others.well.assert_shim_alive();
}

fn stale_and_unreadable_records_are_cleared(release: &Release) {
    let node = Node::start();
    let containerd = node.containerd(release);
    let others = Others::on(&node, &containerd);
    let name = |digit: &str| format!("/run/containerd/s/{}.record", digit.repeat(64));
    let (bad, link) = (name("a"), name("b"));
    node.shell(&format!(
        "echo '{{\"format\":' >{bad}; ln -s /etc/passwd {link}"
    ));
    mends(
        &node,
        &others,
        &["unreadable-record", "unreadable-record"],
        &[],
    );
    assert!(!node.path(&bad).exists());
    assert!(node.path("/etc/passwd").exists());
    let kept = node.shell("ls /run/containerd/recoverd-quarantine");
    assert_eq!(kept.lines().count(), 4, "{kept}");
    assert_nothing_found(&node.scan_of_any_age());
}

fn hostile_leftovers_are_not_followed(release: &Release) {
    let node = Node::start();
    let mut containerd = node.containerd(release);
    let others = Others::on(&node, &containerd);
    let dead = containerd.run(&Container::new("dead"));
    containerd.kill();
    node.kill(&dead.shim);
    node.kill(&dead.init);
    // Links out of everything that is to be removed, and a link in the place of a folder of it.
    node.shell(&format!(
        "mkdir -p /run/precious; echo x >/run/precious/file
         ln -s /run/precious {0}/link; ln -s /run/precious/file {0}/file
         fifo=$(dirname $(find /run/containerd/fifo -name dead-stdout))
         ln -s /run/precious/file $fifo/note",
        dead.bundle().display()
    ));
    let linked = "/run/containerd/io.containerd.runtime.v2.task/e2e/linked";
    node.shell(&format!("ln -s /run/precious {linked}"));
    let all = ["--apply", "--allow", "kill", "--allow", "delete"];
    let done = repair(&node, &all);
    assert!(
        done.verdicts().iter().all(|verdict| *verdict == "done"),
        "{done:#?}"
    );
    assert!(!node.path(dead.bundle()).exists());
    assert!(node.path("/run/precious/file").exists());
    assert_eq!(node.run("readlink", [linked]).trim(), "/run/precious");
    // A file that is no fifo keeps its folder.
    assert_ne!(node.shell("find /run/containerd/fifo -name note"), "");
    others.assert_untouched(&node);
}

fn two_repairs_at_once_have_one_winner(release: &Release) {
    let node = Node::start();
    let containerd = node.containerd(release);
    let others = Others::on(&node, &containerd);
    node.shell("mkdir -p -m 0700 /run/recoverd");
    let holder = node.spawn("flock", ["/run/recoverd/lock", "sleep", "1000"]);
    wait_for("the lock", || {
        let output = node.output("flock", ["-n", "/run/recoverd/lock", "true"]);
        (!output.status.success()).then_some(())
    });
    let output = node.recoverd(["repair", "--apply"]);
    assert_eq!(output.status.code(), Some(4), "{output:?}");
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(said.trim_end().lines().count(), 1, "{said}");
    assert!(said.contains("/run/recoverd/lock"), "{said}");
    // Looking needs no lock.
    assert_eq!(node.recoverd(["repair"]).status.code(), Some(0));
    drop(holder);
    others.assert_untouched(&node);
}

fn only_and_the_limit_narrow_a_repair(release: &Release) {
    let node = Node::start();
    let mut containerd = node.containerd(release);
    let others = Others::on(&node, &containerd);
    let dead: Vec<Task> = ["one", "two", "three"]
        .into_iter()
        .map(|id| containerd.run(&Container::new(id)))
        .collect();
    containerd.kill();
    for task in &dead {
        node.kill(&task.shim);
        node.kill(&task.init);
    }
    let narrow = [
        "--apply",
        "--allow",
        "delete",
        "--only",
        "stale-bundle",
        "--only",
        "e2e/one",
    ];
    let done = repair(&node, &narrow);
    assert_eq!((done.exit, done.verdicts()), (0, vec!["done"]), "{done:#?}");
    let there: Vec<bool> = dead
        .iter()
        .map(|task| node.path(task.bundle()).exists())
        .collect();
    assert_eq!(there, [false, true, true]);
    let config = node.folder().join("one.toml");
    std::fs::write(&config, "[repair]\nmax-actions = 1\n").unwrap();
    let config = config.display().to_string();
    let limited = |words: &[&str]| {
        let mut args = vec!["--config", &config, "repair", "--apply", "--min-age", "0s"];
        args.extend_from_slice(words);
        args.extend(["--only", "stale-bundle"]);
        let output = node.recoverd(args);
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert_eq!(output.status.code(), Some(1), "{said}");
        said
    };
    // What may not be done takes nobody's place: the fifos of the first are free to go.
    let said = limited(&["--only", "leaked-fifo"]);
    assert!(said.contains("1 done, 2 refused"), "{said}");
    let said = limited(&["--allow", "delete"]);
    assert!(said.contains("1 done; 1 more steps"), "{said}");
    assert_eq!(repair(&node, &["--only", "stale-bundle"]).codes().len(), 1);
    others.assert_untouched(&node);
}

fn killed_repair_is_finished_by_the_next(release: &Release) {
    let node = Node::start();
    let mut containerd = node.containerd(release);
    let others = Others::on(&node, &containerd);
    let dead = containerd.run(&Container::new("dead"));
    containerd.kill();
    node.kill(&dead.shim);
    node.kill(&dead.init);
    // As if it had died between any two removals of the bundle's files.
    node.shell(&format!(
        "cd {}; rm -f config.json address shim-binary-path init.pid",
        dead.bundle().display()
    ));
    let all = ["--apply", "--allow", "kill", "--allow", "delete"];
    let done = repair(&node, &all);
    assert_eq!(done.exit, 0, "{done:#?}");
    assert!(!node.path(dead.bundle()).exists());
    assert_eq!(done.left_out, 0);
    assert_nothing_found(&node.scan_of_any_age());
    others.assert_untouched(&node);
    assert!(done.steps.iter().all(|step| {
        let outcome = step.outcome.as_ref();
        outcome.is_some_and(|outcome| !outcome.what.is_empty())
    }));
}

//! Pods outlive containerd: what the CRI says of them after a downtime, an upgrade, a shim's death
//! or its own end in the middle of a request.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use k8s_cri::v1::{ContainerState, LinuxContainerResources};
use recoverd_common::pb::task::Status;
use recoverd_tests::{
    ContainerSpec, Containerd, Cri, Handler, HeldRunc, Node, Pod, Release, ShimUnderTest, Task,
    Traces, numbers, wait_for, wait_within,
};

recoverd_tests::tests! {
    on_every_release: [
        a_downtime_costs_no_exit_and_no_oom,
        containerd_may_die_in_the_middle_of_any_request,
        containerd_may_be_restarted_in_the_middle_of_any_request,
    ],
    once: [
        an_oom_kill_is_told_in_a_downtime_and_without_one,
        a_pod_outlives_upgrades_of_containerd,
    ],
    with_each_shim: [
        a_killed_shim_costs_a_pod_nothing,
        a_hung_shim_costs_a_pod_nothing,
    ],
}

const ENDS_IT: &str = "while [ ! -e /mnt/end ]; do usleep 20000; done";

/// Writes numbers, then waits for the word `end`.
fn writer(name: &str, status: u8) -> ContainerSpec {
    let line = numbers("/mnt/go", "/mnt/stop", &format!("/mnt/{name}.count"));
    ContainerSpec::shell(name, &format!("{line}; {ENDS_IT}; exit {status}"))
}

/// Waits for the word `NAME`, then eats memory until it is killed.
fn eater(name: &str) -> ContainerSpec {
    let waits = format!("while [ ! -e /mnt/{name} ]; do usleep 20000; done");
    ContainerSpec::shell(name, &format!("{waits}; exec tail /dev/zero")).memory_limit(16 << 20)
}

/// Fails unless the log goes from 1 to what the writer says that it has written, without a gap but
/// where a copier (containerd, a stock shim) was ended so many times while it was reading: what it
/// had read and not yet written is lost with it.
#[track_caller]
fn assert_logged(cri: &Cri, node: &Node, pod: &Pod, name: &str, ends: usize) {
    let count = node.count_in(&format!("{name}.count"));
    let last = count.to_string();
    wait_for("the last number in the log", || {
        (cri.log(pod, name, "stdout").last() == Some(&last)).then_some(())
    });
    let (mut previous, mut steps) = (0, 0);
    for line in cri.log(pod, name, "stdout") {
        let number: u64 = line.parse().unwrap_or(0);
        // The first line after a gap may be the end of a longer one.
        if number != previous + 1 {
            steps += 1;
        }
        previous = number;
    }
    assert!(
        steps <= 2 * ends,
        "{steps} of {count} lines are out of order"
    );
}

#[track_caller]
fn wait_logging(cri: &Cri, pod: &Pod, name: &str) {
    let before = cri.log(pod, name, "stdout").len();
    wait_for("the log to go on", || {
        (cri.log(pod, name, "stdout").len() > before).then_some(())
    });
}

fn now() -> i64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.map_or(0, |now| i64::try_from(now.as_nanos()).unwrap_or(0))
}

fn a_downtime_costs_no_exit_and_no_oom(release: &Release) {
    let node = Node::start();
    let mut containerd = node.kubernetes(release);
    let before = Traces::of(&node);
    let mut cri = containerd.cri();
    let pod = cri.run_pod("web-0", Handler::ByType);
    let headless = cri.run_pod("web-1", Handler::ByType);
    let endings = [
        (ContainerSpec::until_term("some", 23), 23, "Error"),
        (ContainerSpec::until_term("zero", 0), 0, "Completed"),
        (ContainerSpec::until_term("killed", 0), 137, "Error"),
        (eater("oom"), 137, "OOMKilled"),
    ];
    let ids = endings.each_ref().map(|(spec, ..)| cri.run(&pod, spec));
    let [some, zero, killed, oom] = ids.each_ref().map(|id| containerd.member(&pod, id));
    let lives = cri.run(&headless, &ContainerSpec::until_term("lives", 4));
    let orphan = containerd.member(&headless, &lives);
    let pause = containerd.member(&headless, &headless.id);
    // One that is killed for want of memory while containerd is there.
    let seen = cri.run(&pod, &eater("seen"));
    node.tell("seen");
    cri.wait_oom_killed(&seen);

    containerd.kill();
    drop(cri);
    let down = now();
    // Nothing is said of last words: containerd closes its end of them itself as soon as it finds
    // a task that has ended.
    node.tell("oom");
    node.signal(&some.init, "TERM");
    node.signal(&zero.init, "TERM");
    node.kill(&killed.init);
    node.kill(&pause.init);
    for task in [&some, &zero, &killed, &oom] {
        wait_for("the shim to see the exit", || {
            (task.state("").status() == Status::Stopped).then_some(())
        });
    }
    let up = now();
    containerd.start();
    cri = containerd.cri();
    for (id, (_, status, reason)) in ids.iter().zip(&endings) {
        // An OOM is an event of its own, and follows.
        wait_for(&format!("{status} and {reason} of {id}"), || {
            let (code, why) = cri.exited(id);
            assert_eq!(code, *status, "{id}");
            (why == *reason).then_some(())
        });
        let finished = cri.status(id).map(|status| status.finished_at);
        assert!(
            finished.as_ref().is_ok_and(|at| (down..=up).contains(at)),
            "{down} {finished:?} {up}"
        );
    }
    assert_eq!(cri.exited(&seen), (137, "OOMKilled".into()));
    assert_eq!(cri.pod_ready(&pod), Some(true));
    cri.wait_pod_down(&headless);
    orphan.assert_init_alive();
    cri.assert_running(&lives);
    assert_eq!(cri.sh(&lives, "echo well"), (0, "well\n".into()));
    cri.stop(&lives, 30);
    assert_eq!(cri.exited(&lives), (4, "Error".into()));
    for pod in [&pod, &headless] {
        cri.stop_pod(pod);
        cri.remove_pod(pod);
    }
    before.wait_restored(&node);
}

/// The least that shows it: an emulated machine runs it, too.
fn an_oom_kill_is_told_in_a_downtime_and_without_one(release: &Release) {
    let node = Node::start();
    let mut containerd = node.kubernetes(release);
    let mut cri = containerd.cri();
    let pod = cri.run_pod("web-0", Handler::ByType);
    let seen = cri.run(&pod, &eater("seen"));
    node.tell("seen");
    cri.wait_oom_killed(&seen);
    cri.remove(&seen);
    let unseen = cri.run(&pod, &eater("unseen"));
    let task = containerd.member(&pod, &unseen);
    containerd.kill();
    drop(cri);
    node.tell("unseen");
    wait_for("the shim to see the exit", || {
        (task.state("").status() == Status::Stopped).then_some(())
    });
    containerd.start();
    cri = containerd.cri();
    cri.wait_oom_killed(&unseen);
}

/// What happens to the pod's shim while containerd is down.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Fault {
    Killed,
    Hung,
}

fn a_killed_shim_costs_a_pod_nothing(release: &Release, shim: ShimUnderTest) {
    a_pod_outlives(release, shim, Fault::Killed);
}

fn a_hung_shim_costs_a_pod_nothing(release: &Release, shim: ShimUnderTest) {
    a_pod_outlives(release, shim, Fault::Hung);
}

/// Every task of the pod runs as it did, and the CRI knows it.
#[track_caller]
fn assert_pod_runs(cri: &Cri, pod: &Pod, tasks: &[Task]) {
    assert_eq!(cri.pod_ready(pod), Some(true));
    for task in tasks {
        task.assert_init_alive();
        if task.id() != pod.id {
            cri.assert_running(task.id());
            assert_eq!(cri.pid(task.id()), task.init.pid);
        }
    }
}

fn a_pod_outlives(release: &Release, shim: ShimUnderTest, fault: Fault) {
    let node = Node::start();
    let mut containerd = node.kubernetes(release);
    let before = Traces::of(&node);
    let mut cri = containerd.cri();
    // Both ways to name ours take part.
    let handler = match (shim, fault) {
        (ShimUnderTest::Recoverd, Fault::Hung) => Handler::recommended(release),
        _ => shim.into(),
    };
    let pod = cri.run_pod("web-0", handler);
    let writer = cri.run(&pod, &writer("writer", 23));
    let side = cri.run(&pod, &ContainerSpec::until_term("side", 5));
    let eats = cri.run(&pod, &eater("eats"));
    let tasks = [&pod.id, &writer, &side, &eats].map(|id| containerd.member(&pod, id));

    containerd.kill();
    drop(cri);
    // Between its stock shim's death and its adoption a writer would get EPIPE (SPEC, F4).
    if shim == ShimUnderTest::Recoverd || fault == Fault::Hung {
        node.tell("go");
    }
    let harmed = &tasks[0].shim;
    match fault {
        Fault::Killed => node.kill(harmed),
        Fault::Hung => node.freeze(harmed),
    }
    let hook = containerd.pre_start();
    assert_eq!(hook.exit, 0, "{hook:?}");
    node.wait_gone(harmed);
    containerd.start();
    let report = containerd.post_start();
    assert_eq!(report.exit, 0, "{report:#?}");
    cri = containerd.cri();
    assert_pod_runs(&cri, &pod, &tasks);
    for task in &tasks {
        assert_eq!(report.fate(task.id()).became, "adopted", "{report:#?}");
        assert_eq!(task.shim_now().program(), "containerd-shim-recoverd-v1");
        assert_eq!(task.shim_now(), tasks[0].shim_now());
    }
    let scan = containerd.scan();
    let case = scan.task(&tasks[1].name());
    let name = case
        .pod
        .as_ref()
        .map(|pod| (&*pod.name, pod.container.as_deref()));
    assert_eq!(name, Some(("web-0", Some("writer"))), "{case:?}");

    node.tell("go");
    wait_logging(&cri, &pod, "writer");
    assert_eq!(cri.sh(&side, "echo well; exit 3"), (3, "well\n".into()));
    let cpu = cri
        .stats(&writer)
        .cpu
        .and_then(|cpu| cpu.usage_core_nano_seconds);
    assert!(cpu.is_some_and(|n| n.value > 0));
    // A further member finds the successor.
    let late = cri.run(&pod, &ContainerSpec::until_term("late", 6));
    let of_late = node.process(cri.pid(&late)).map(|init| init.parent);
    assert_eq!(of_late, Some(tasks[0].shim_now().pid));
    node.tell("stop");
    node.count_in("writer.count");
    node.tell("end");
    node.tell("eats");
    assert_eq!(cri.exited(&writer), (23, "Error".into()));
    // A stock shim that is stopped has a buffer with it, once in a hundred times.
    let stopped = shim == ShimUnderTest::Stock && fault == Fault::Hung;
    assert_logged(&cri, &node, &pod, "writer", usize::from(stopped));
    cri.wait_oom_killed(&eats);
    cri.stop(&side, 30);
    assert_eq!(cri.exited(&side), (5, "Error".into()));
    cri.stop(&late, 30);
    assert_eq!(cri.exited(&late), (6, "Error".into()));
    cri.stop_pod(&pod);
    cri.remove_pod(&pod);
    before.wait_restored(&node);
}

/// A request that containerd's end interrupts.
#[derive(Clone, Copy, Debug)]
enum Request {
    RunPod,
    Create,
    Start,
    Exec,
    /// A grandchild keeps its output.
    HeldExec,
    Update,
    Stats,
    Stop,
    Remove,
    StopPod,
    RemovePod,
}

/// When a request is in its middle.
enum Middle {
    /// While runc is at this.
    Runc(&'static str),
    /// While the container has been asked to end, and has not done so.
    Asked,
    /// Nothing can be held: so long after it began.
    Later,
}

impl Request {
    fn middle(self) -> Middle {
        match self {
            Request::RunPod | Request::Start => Middle::Runc("create"),
            Request::Exec | Request::HeldExec => Middle::Runc("exec"),
            Request::Update => Middle::Runc("update"),
            // Of its exit, which containerd answers by a delete.
            Request::StopPod => Middle::Runc("delete"),
            Request::Stop => Middle::Asked,
            Request::Create | Request::Stats | Request::Remove | Request::RemovePod => {
                Middle::Later
            }
        }
    }

    /// Whether it is meant to end the container.
    fn ends(self) -> bool {
        match self {
            Request::Stop | Request::Remove | Request::StopPod | Request::RemovePod => true,
            Request::RunPod
            | Request::Create
            | Request::Start
            | Request::Exec
            | Request::HeldExec
            | Request::Update
            | Request::Stats => false,
        }
    }
}

/// The exit code of a target.
const TARGET: i32 = 9;

/// It says when it is asked to end, and ends when it may.
fn target() -> ContainerSpec {
    let line = "trap ': >/mnt/asked; until [ -e /mnt/may-end ]; do usleep 20000; done; exit 9' TERM; \
                while :; do sleep 1000 & wait $!; done";
    ContainerSpec::shell("target", line)
}

/// What a round's requests are about: all of it there, and running, when it begins.
struct Target {
    handler: Handler,
    pod: Pod,
    container: String,
}

impl Target {
    fn new(cri: &Cri, name: &str, handler: Handler) -> Target {
        let pod = cri.run_pod(name, handler);
        let container = cri.run(&pod, &target());
        Target {
            handler,
            pod,
            container,
        }
    }

    /// What has to have happened before the request can be made.
    fn prepare(&self, cri: &Cri, request: Request) {
        match request {
            Request::Remove => cri.stop(&self.container, 30),
            Request::RemovePod => cri.stop_pod(&self.pod),
            Request::RunPod
            | Request::Create
            | Request::Start
            | Request::Exec
            | Request::HeldExec
            | Request::Update
            | Request::Stats
            | Request::Stop
            | Request::StopPod => {}
        }
    }

    /// Makes the request; whether and how it is answered is not said.
    fn make(&self, cri: &Cri, request: Request, created: &str) {
        let resources = LinuxContainerResources {
            cpu_shares: 512,
            ..LinuxContainerResources::default()
        };
        let _cut_short = match request {
            Request::RunPod => cri.try_run_pod("further", self.handler.name()).map(drop),
            Request::Create => {
                let further = ContainerSpec::until_term("further", 0);
                cri.try_create(&self.pod, &further).map(drop)
            }
            Request::Start => cri.try_start(created),
            Request::Exec => cri
                .exec_sync(&self.container, "echo; usleep 20000", 30)
                .map(drop),
            Request::HeldExec => cri
                .exec_sync(&self.container, "sleep 1000 & echo early", 30)
                .map(drop),
            Request::Update => cri.try_update(&self.container, resources),
            Request::Stats => cri.try_stats(&self.container).map(drop),
            Request::Stop => cri.try_stop(&self.container, 30),
            Request::Remove => cri.try_remove(&self.container),
            Request::StopPod => cri.try_stop_pod(&self.pod.id),
            Request::RemovePod => cri.try_remove_pod(&self.pod.id),
        };
    }
}

/// How containerd ends in the middle of a request.
#[derive(Clone, Copy)]
enum End {
    /// As the kernel, or a test, ends it.
    Killed,
    /// As systemd does.
    Stopped,
}

impl End {
    /// Both ways to name our shim take part.
    fn handler(self, release: &Release) -> Handler {
        match self {
            End::Killed => Handler::ByType,
            End::Stopped => Handler::recommended(release),
        }
    }
}

fn containerd_may_die_in_the_middle_of_any_request(release: &Release) {
    containerd_may_end(release, End::Killed);
}

fn containerd_may_be_restarted_in_the_middle_of_any_request(release: &Release) {
    containerd_may_end(release, End::Stopped);
}

fn containerd_may_end(release: &Release, end: End) {
    let node = Node::start();
    let mut containerd = node.kubernetes(release);
    let runc = HeldRunc::of(&mut containerd);
    let before = Traces::of(&node);
    let cri = containerd.cri();
    let pod = cri.run_pod("bystander", end.handler(release));
    let id = cri.run(&pod, &writer("bystander", 23));
    let answers = "while read x; do echo \"got $x\"; done; exit 7";
    let answers = cri.run(&pod, &ContainerSpec::shell("answers", answers).stdin());
    let bystander = [&pod.id, &id, &answers].map(|id| containerd.member(&pod, id));
    node.tell("go");
    drop(cri);
    let all = [
        Request::RunPod,
        Request::Create,
        Request::Start,
        Request::Exec,
        Request::HeldExec,
        Request::Update,
        Request::Stats,
        Request::Stop,
        Request::Remove,
        Request::StopPod,
        Request::RemovePod,
    ];
    // Where nothing can be held. A request takes some tens of milliseconds: early, in the middle,
    // late.
    let after = Duration::from_millis(match release.name {
        "1.6" => 4,
        "1.7" => 24,
        _ => 12,
    });
    for request in all {
        let name = format!("target-{request:?}").to_lowercase();
        let cri = containerd.cri();
        let mut attached = cri.attach(&answers, true, false);
        attached.wait_attached();
        attached.write(&format!("{request:?}\n"));
        attached.wait_for(&format!("got {request:?}\n"));
        drop(cri);
        interrupt(&mut containerd, &runc, &name, request, after, end);
        drop(attached);
        let cri = containerd.cri();
        assert_pod_runs(&cri, &pod, &bystander);
        wait_logging(&cri, &pod, "bystander");
        cri.clear_but(&pod);
    }
    let cri = containerd.cri();
    node.tell("stop");
    node.count_in("bystander.count");
    node.tell("end");
    assert_eq!(cri.exited(&id), (23, "Error".into()));
    assert_logged(&cri, &node, &pod, "bystander", all.len());
    let said: Vec<String> = all
        .iter()
        .map(|request| format!("got {request:?}"))
        .collect();
    let mut logged = cri.log(&pod, "answers", "stdout");
    logged.retain(|line| line != "got ?");
    assert_eq!(logged, said);
    cri.stop_pod(&pod);
    cri.remove_pod(&pod);
    // A runtime that was ended while it made a container leaves cgroups that nobody knows of.
    wait_within(
        Duration::from_secs(120),
        "shims without a task to leave",
        || node.shims().is_empty().then_some(()),
    );
    let mut words = containerd.flags();
    let repair = [
        "repair",
        "--apply",
        "--only",
        "leaked-cgroup",
        "--min-age",
        "0s",
    ];
    words.extend(repair.map(str::to_owned));
    // containerd has its shims' `delete` remove some of it meanwhile.
    let began = Instant::now();
    loop {
        let repair = node.recoverd(&words);
        let mut left = before.new_since(&node);
        // A containerd that is stopped while it removes a bundle leaves it for ever, under the name
        // that it has then.
        let half_removed = |trace: &String| {
            trace.starts_with("file ") && trace.contains("/io.containerd.runtime.v2.task/k8s.io/.")
        };
        left.retain(|trace| !half_removed(trace));
        if repair.status.code() == Some(0) && left.is_empty() {
            break;
        }
        assert!(
            began.elapsed() < Duration::from_secs(120),
            "{repair:?} {left:#?}"
        );
    }
}

/// Ends containerd while runc is at it, or so long after it was asked; what it then says of the
/// target is true.
fn interrupt(
    containerd: &mut Containerd,
    runc: &HeldRunc,
    name: &str,
    request: Request,
    after: Duration,
    end: End,
) {
    let cri = containerd.cri();
    let handler = end.handler(containerd.release());
    let target = Target::new(&cri, name, handler);
    let created = cri.create(&target.pod, &ContainerSpec::until_term("created", 0));
    let node = Arc::clone(containerd.node());
    let [asked, may_end] = ["asked", "may-end"].map(|word| node.folder().join(word));
    let remove = |word: &Path| {
        fs::remove_file(word).unwrap_or_else(|e| panic!("remove {}: {e}", word.display()));
    };
    let init = containerd.member(&target.pod, &target.container).init;
    node.wait_trap(&init);
    node.tell("may-end");
    target.prepare(&cri, request);
    if asked.exists() {
        remove(&asked);
    }
    thread::scope(|scope| {
        let begin = || {
            scope.spawn(|| target.make(&cri, request, &created));
        };
        match request.middle() {
            Middle::Runc(verb) => runc.held(verb, begin),
            Middle::Asked => {
                remove(&may_end);
                begin();
                wait_for("the target to be asked to end", || {
                    asked.exists().then_some(())
                });
                remove(&asked);
            }
            Middle::Later => {
                begin();
                // Not a wait for luck: the point in time is what is varied.
                thread::sleep(after);
            }
        }
        match end {
            End::Killed => containerd.kill(),
            End::Stopped => containerd.stop(),
        }
        match request.middle() {
            Middle::Runc(verb) => runc.go_on(verb),
            Middle::Asked => {
                node.tell("may-end");
                node.wait_gone(&init);
            }
            Middle::Later => {}
        }
    });
    drop(cri);
    containerd.start();
    let cri = containerd.cri();
    for id in [&target.container, &created] {
        let of_target = *id == target.container;
        let status = match cri.status(id) {
            Ok(status) => status,
            // The request was done.
            Err(_) if matches!(request, Request::RemovePod) => continue,
            Err(_) if of_target && matches!(request, Request::Remove) => continue,
            Err(refused) => panic!("{request:?}: {id} is lost: {refused:?}"),
        };
        match status.state() {
            ContainerState::ContainerRunning => {
                let pid = cri.pid(id);
                let lives = node
                    .process(pid)
                    .is_some_and(|process| process.state != 'Z');
                assert!(lives, "{request:?}: {id} is said to run as {pid}");
                let (code, said) = cri.sh(id, "echo well");
                assert_eq!((code, &*said), (0, "well\n"), "{request:?}");
            }
            // True, or said to be unknown: an exit that containerd had deleted from the shim and not
            // yet written down when it ended is lost with it. A pod's containers are given no time
            // to end by themselves. What ended while there was no containerd is known.
            ContainerState::ContainerExited if of_target => {
                let of_pod = matches!(request, Request::StopPod | Request::RemovePod);
                let known = match (status.exit_code, &*status.reason) {
                    (TARGET, "Error") => request.ends(),
                    (255, "Unknown") => request.ends() && !matches!(request, Request::Stop),
                    (137, "Error") => of_pod,
                    _ => false,
                };
                assert!(known, "{request:?}: {status:?}");
            }
            _ => assert!(!of_target, "{request:?}: {status:?}"),
        }
    }
}

fn a_pod_outlives_upgrades_of_containerd(release: &Release) {
    let releases: Vec<Release> = ["1.6", "1.7", "2.1"]
        .into_iter()
        .filter_map(|name| release.other(name))
        .collect();
    let [first, later @ ..] = &*releases else {
        panic!("no release of containerd")
    };
    let node = Node::start();
    let mut containerd = node.kubernetes(first);
    let before = Traces::of(&node);
    let mut cri = containerd.cri();
    let pod = cri.run_pod("web-0", Handler::ByType);
    let id = cri.run(&pod, &writer("app", 23));
    let tasks = [
        containerd.member(&pod, &pod.id),
        containerd.member(&pod, &id),
    ];
    node.tell("go");
    let mut members = vec![];
    for next in later {
        wait_logging(&cri, &pod, "app");
        let exits = cri.run(
            &pod,
            &ContainerSpec::until_term(&format!("until-{}", next.name), 7),
        );
        let exiting = containerd.member(&pod, &exits);
        drop(cri);
        containerd.stop();
        node.signal(&exiting.init, "TERM");
        node.wait_gone(&exiting.init);
        containerd.switch_to(next);
        containerd.start();
        cri = containerd.cri();
        assert_pod_runs(&cri, &pod, &tasks);
        tasks[1].assert_shim_alive();
        assert_eq!(cri.exited(&exits), (7, "Error".into()));
        assert_eq!(cri.sh(&id, "echo well"), (0, "well\n".into()));
        let member = cri.run(
            &pod,
            &ContainerSpec::until_term(&format!("of-{}", next.name), 3),
        );
        assert_eq!(containerd.member(&pod, &member).shim, tasks[0].shim);
        members.push(member);
    }
    wait_logging(&cri, &pod, "app");
    node.tell("stop");
    node.count_in("app.count");
    node.tell("end");
    assert_eq!(cri.exited(&id), (23, "Error".into()));
    assert_logged(&cri, &node, &pod, "app", later.len());
    for member in members {
        cri.stop(&member, 30);
        assert_eq!(cri.exited(&member), (3, "Error".into()));
    }
    cri.stop_pod(&pod);
    cri.remove_pod(&pod);
    before.wait_restored(&node);
}

//! Faults at random instants, for as long as is wanted, against a model of what each workload must
//! have done: SPEC's invariants hold after every step.
//!
//! ```text
//! RECOVERD_CHAOS_FAULTS=5000 RECOVERD_CHAOS_SEED=7 cargo nextest run … -E 'test(/chaos/)'
//! ```
//!
//! The seed of a run is printed first, and again by a failure: the same seed makes the same choices.
//! Instants are the machine's.
//!
//! | step | then |
//! | --- | --- |
//! | start, exec, signal, delete | what was asked for is so |
//! | one of them while its shim is killed | it is so, or it was refused and nothing of it is left |
//! | shims are killed | nobody notices |
//! | the supervisor is killed and started | nobody notices |
//! | containerd is killed, shims with it or not, processes end meanwhile, hook, start | all is told |
//!
//! Not chosen: a shim and the supervisor at one instant (no design survives that, SPEC 3), and the
//! fifth end of one shim in a minute.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::process::Output;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use recoverd_common::pb::task::Status;
use recoverd_tests::{
    Container, Containerd, Node, Process, Release, ShimUnderTest, Supervisor, Task, wait_for,
    wait_within,
};

recoverd_tests::tests! {
    on_every_release: [chaos_costs_no_workload_and_no_word],
}

/// In one run of one release, unless told otherwise: 200 on three releases.
const FAULTS: u64 = 67;
/// Tasks at one time.
const MOST: usize = 6;
/// A shim may be killed this often in a minute: the supervisor gives up at five.
const KILLS: usize = 3;

/// xorshift64*: the same choices for the same seed, everywhere.
struct Dice(u64);

impl Dice {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33
    }

    /// From 0 to `below` - 1.
    fn below(&mut self, below: usize) -> usize {
        let below = u64::try_from(below.max(1)).unwrap_or(1);
        usize::try_from(self.next() % below).unwrap_or(0)
    }

    fn chance(&mut self, of: usize) -> bool {
        self.below(of) == 0
    }

    /// A moment in which something is under way.
    fn moment(&mut self) -> Duration {
        Duration::from_millis(self.next() % 90)
    }
}

/// A process of the model.
#[derive(Clone)]
struct Work {
    process: Process,
    /// With what it answers SIGTERM.
    code: u32,
    ended: Option<u32>,
}

/// A task of the model.
struct Run {
    task: Task,
    /// By whose name its shim goes.
    group: String,
    init: Work,
    execs: BTreeMap<String, Work>,
}

struct World<'a> {
    node: Arc<Node>,
    containerd: Containerd,
    supervisor: Option<Supervisor>,
    dice: Dice,
    tasks: BTreeMap<String, Run>,
    /// When the shim of a group was killed.
    kills: BTreeMap<String, Vec<Instant>>,
    count: u64,
    faults: u64,
    log: &'a mut Vec<String>,
}

fn chaos_costs_no_workload_and_no_word(release: &Release) {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse().ok());
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let seed = number("RECOVERD_CHAOS_SEED")
        .unwrap_or_else(|| now.map_or(1, |now| u64::from(now.subsec_nanos()) % 1_000_000));
    let faults = number("RECOVERD_CHAOS_FAULTS").unwrap_or(FAULTS);
    eprintln!("RECOVERD_CHAOS_SEED={seed} RECOVERD_CHAOS_FAULTS={faults}");
    let mut log = Vec::new();
    let ran = catch_unwind(AssertUnwindSafe(|| run(release, seed, faults, &mut log)));
    if let Err(panic) = ran {
        let last = log.len().saturating_sub(40);
        eprintln!(
            "RECOVERD_CHAOS_SEED={seed} failed; the last of {} steps:",
            log.len()
        );
        for line in log.iter().skip(last) {
            eprintln!("  {line}");
        }
        resume_unwind(panic);
    }
}

fn run(release: &Release, seed: u64, faults: u64, log: &mut Vec<String>) {
    let node = Node::start();
    let containerd = node.containerd(release);
    let supervisor = Some(node.supervise());
    let mut world = World {
        node,
        containerd,
        supervisor,
        // Zero is the one number that stays what it is.
        dice: Dice(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1),
        tasks: BTreeMap::new(),
        kills: BTreeMap::new(),
        count: 0,
        faults: 0,
        log,
    };
    while world.faults < faults {
        world.step();
        world.assert_invariants();
    }
    world.finish();
}

fn work(code: u32) -> String {
    format!("trap 'exit {code}' TERM; while :; do sleep 1000 & wait $!; done")
}

impl World<'_> {
    fn note(&mut self, line: String) {
        self.log.push(line);
    }

    fn name(&mut self, kind: &str) -> String {
        self.count += 1;
        format!("{kind}{}", self.count)
    }

    fn code(&mut self) -> u32 {
        u32::try_from(self.dice.below(100)).unwrap_or(0) + 3
    }

    /// One of the tasks for which `fits`.
    fn pick(&mut self, fits: impl Fn(&Run) -> bool) -> Option<String> {
        let fitting: Vec<String> = self
            .tasks
            .iter()
            .filter(|(_, run)| fits(run))
            .map(|(id, _)| id.clone())
            .collect();
        let at = self.dice.below(fitting.len());
        fitting.get(at).cloned()
    }

    fn step(&mut self) {
        let few = self.tasks.len() < 2;
        match self.dice.below(12) {
            _ if few => self.start(false),
            0 | 1 if self.tasks.len() < MOST => self.start(false),
            2 => self.exec(false),
            3 => self.signal(),
            4 => self.delete(false),
            5 if self.tasks.len() < MOST => self.start(true),
            6 => self.exec(true),
            7 => self.delete(true),
            8 | 9 => self.kill_shims(),
            10 => self.kill_supervisor(),
            _ => self.kill_containerd(),
        }
    }

    // ---- the workload's life ----

    /// A new task, one in three in the pod of another. `fault`: its shim dies meanwhile.
    fn start(&mut self, fault: bool) {
        let id = self.name("t");
        let code = self.code();
        let mut container =
            Container::new(&id)
                .shim(ShimUnderTest::Recoverd)
                .command(["sh", "-c", &work(code)]);
        // The fault needs a shim that is there before.
        let join = (fault || self.dice.chance(3))
            .then(|| self.pick(|run| run.init.ended.is_none()))
            .flatten();
        let group = join.and_then(|other| Some(self.tasks.get(&other)?.group.clone()));
        if let Some(group) = &group {
            container = container.group(group);
        }
        let target = group.clone().filter(|_| fault);
        self.note(format!(
            "start {id} (exits {code}) in {group:?}, shim dies: {target:?}"
        ));
        let args = self.containerd.run_words(&container);
        let output = self.ctr_under_fault(&args, target);
        if output.status.success() {
            let task = self.containerd.running(&container);
            let process = task.init.clone();
            let init = Work {
                process,
                code,
                ended: None,
            };
            let execs = BTreeMap::new();
            let run = Run {
                task,
                group: group.unwrap_or_else(|| id.clone()),
                init,
                execs,
            };
            self.tasks.insert(id, run);
            return;
        }
        assert!(fault, "start {id}: {output:?}");
        self.note(format!("start {id} was refused: {}", text(&output)));
        self.assert_nothing_left(&id);
    }

    /// After a refusal: what `ctr` leaves of a container can be removed, and nothing else is there.
    fn assert_nothing_left(&mut self, id: &str) {
        let node = Arc::clone(&self.node);
        for words in [
            ["tasks", "delete", "--force", id].as_slice(),
            &["containers", "delete", id],
        ] {
            let _gone_already = self.containerd.ctr("e2e", words).output();
        }
        wait_for(&format!("nothing to be left of {id}"), || {
            let state = node.path(format!("/run/containerd/runc/e2e/{id}"));
            let bundle = node.path(format!(
                "/run/containerd/io.containerd.runtime.v2.task/e2e/{id}"
            ));
            (!state.exists() && !bundle.exists()).then_some(())
        });
        assert!(self.containerd.task("e2e", id).is_none());
    }

    fn exec(&mut self, fault: bool) {
        let Some(id) = self.pick(|run| run.init.ended.is_none() && run.execs.len() < 3) else {
            return;
        };
        let exec_id = self.name("e");
        let code = self.code();
        let word = format!("word-{exec_id}");
        let target = self
            .tasks
            .get(&id)
            .map(|run| run.group.clone())
            .filter(|_| fault);
        self.note(format!(
            "exec {exec_id} in {id} (exits {code}), shim dies: {target:?}"
        ));
        let line = work(code);
        let args = ["tasks", "exec", "--detach", "--exec-id", &exec_id, &id];
        let args = args.into_iter().chain(["sh", "-c", &line, &word]);
        let args: Vec<String> = args.map(str::to_owned).collect();
        let output = self.ctr_under_fault(&args, target);
        let Some(run) = self.tasks.get_mut(&id) else {
            return;
        };
        let state = run.task.exec_state(&exec_id);
        if output.status.success() {
            assert_eq!(
                state.map(|s| s.status()),
                Some(Status::Running),
                "{exec_id}"
            );
        } else {
            assert!(fault, "exec {exec_id}: {output:?}");
            // It lives, or there is none, or one that was never started.
            let lives = state
                .as_ref()
                .is_some_and(|s| s.status() == Status::Running);
            self.log.push(format!(
                "exec {exec_id} was refused, lives: {lives}: {}",
                text(&output)
            ));
            if !lives {
                let shell = self.node.processes();
                let shell = shell.iter().find(|p| p.argv.contains(&word));
                assert!(shell.is_none(), "{exec_id} was refused and runs: {shell:?}");
                return;
            }
        }
        let process = self.node.shell_with(&word);
        let exec = Work {
            process,
            code,
            ended: None,
        };
        run.execs.insert(exec_id, exec);
    }

    /// Ends an init or an exec, by its own hand or by SIGKILL.
    fn signal(&mut self) {
        let Some(id) = self.pick(|run| run.init.ended.is_none()) else {
            return;
        };
        let kill = self.dice.chance(3);
        let of_exec = self.dice.chance(2);
        let node = Arc::clone(&self.node);
        let Some(run) = self.tasks.get_mut(&id) else {
            return;
        };
        let living = run.execs.iter().find(|(_, exec)| exec.ended.is_none());
        let exec_id = living
            .map(|(exec_id, _)| exec_id.clone())
            .filter(|_| of_exec);
        self.log
            .push(format!("signal {id} {exec_id:?}, kill: {kill}"));
        run.end(&node, exec_id.as_deref(), kill);
        run.assert_told(exec_id.as_deref());
    }

    fn delete(&mut self, fault: bool) {
        let Some(id) = self.pick(|run| run.init.ended.is_some()) else {
            return;
        };
        let Some(run) = self.tasks.remove(&id) else {
            return;
        };
        // A shim whose last task this is may end by itself.
        let group = run.group.clone();
        let target = Some(group).filter(|group| fault && self.members(group) > 0);
        self.note(format!("delete {id}, shim dies: {target:?}"));
        let under_fault = target.is_some();
        let args = ["tasks", "delete", &id].map(str::to_owned);
        let output = self.ctr_under_fault(&args, target);
        if !output.status.success() {
            assert!(under_fault, "delete {id}: {output:?}");
            self.note(format!("delete {id} was refused: {}", text(&output)));
        }
        self.assert_nothing_left(&id);
        let init = &run.init.process;
        assert!(!self.node.alive(init));
    }

    fn members(&self, group: &str) -> usize {
        self.tasks.values().filter(|run| run.group == group).count()
    }

    // ---- faults ----

    /// False: it has died too often lately.
    fn may_die(&mut self, group: &str) -> bool {
        let kills = self.kills.entry(group.to_owned()).or_default();
        kills.retain(|at| at.elapsed() < Duration::from_secs(65));
        kills.len() < KILLS
    }

    /// Runs `ctr`; meanwhile the shim of `group` is killed.
    fn ctr_under_fault(&mut self, args: &[String], group: Option<String>) -> Output {
        let mut command = self.containerd.ctr("e2e", args);
        let group = group.filter(|group| self.may_die(group));
        let shim = group.as_ref().and_then(|group| {
            let run = self.tasks.values().find(|run| run.group == *group)?;
            Some(run.task.shim_now())
        });
        let moment = self.dice.moment();
        let node = Arc::clone(&self.node);
        let output = thread::scope(|scope| {
            let client = scope.spawn(move || command.output());
            if let Some(shim) = &shim {
                thread::sleep(moment);
                if node.alive(shim) {
                    node.kill(shim);
                }
            }
            client.join()
        });
        if let (Some(group), Some(_)) = (group, shim) {
            self.kills.entry(group).or_default().push(Instant::now());
            self.faults += 1;
        }
        match output {
            Ok(Ok(output)) => output,
            Ok(Err(error)) => panic!("start ctr {args:?}: {error}"),
            Err(panic) => resume_unwind(panic),
        }
    }

    /// One or all of them.
    fn kill_shims(&mut self) {
        let all = self.dice.chance(4);
        let Some(one) = self.pick(|_| true) else {
            return;
        };
        let mut groups: Vec<String> = self
            .tasks
            .iter()
            .filter(|(id, _)| all || **id == one)
            .map(|(_, run)| run.group.clone())
            .collect();
        groups.sort();
        groups.dedup();
        groups.retain(|group| self.may_die(group));
        self.note(format!("kill shims of {groups:?}"));
        let shims = self.shims_of(&groups);
        for shim in &shims {
            self.node.signal(shim, "KILL");
        }
        for shim in &shims {
            self.node.wait_gone(shim);
        }
        self.killed(groups);
    }

    fn shims_of(&self, groups: &[String]) -> Vec<Process> {
        let of = |group: &String| {
            let run = self.tasks.values().find(|run| run.group == *group)?;
            Some(run.task.shim_now())
        };
        groups.iter().filter_map(of).collect()
    }

    fn killed(&mut self, groups: Vec<String>) {
        self.faults += u64::try_from(groups.len()).unwrap_or(0);
        for group in groups {
            self.kills.entry(group).or_default().push(Instant::now());
        }
    }

    fn kill_supervisor(&mut self) {
        self.note("kill supervisor".into());
        if let Some(supervisor) = self.supervisor.take() {
            supervisor.kill();
        }
        // Something ends that nobody watches but its shim.
        if self.dice.chance(2) {
            self.signal();
        }
        self.supervisor = Some(self.node.supervise());
        self.faults += 1;
    }

    fn kill_containerd(&mut self) {
        let with_shims = self.dice.chance(2);
        let with_supervisor = self.dice.chance(3);
        let end = self.dice.chance(2);
        self.note(format!(
            "kill containerd, shims: {with_shims}, supervisor: {with_supervisor}, an init ends: {end}"
        ));
        self.containerd.kill();
        self.faults += 1;
        if with_supervisor && let Some(supervisor) = self.supervisor.take() {
            supervisor.kill();
        }
        if with_shims {
            let mut groups: Vec<String> =
                self.tasks.values().map(|run| run.group.clone()).collect();
            groups.sort();
            groups.dedup();
            groups.retain(|group| self.may_die(group));
            let shims = self.shims_of(&groups);
            for shim in &shims {
                self.node.kill(shim);
            }
            self.killed(groups);
        }
        // Without a witness it would be unknown, truly.
        if end
            && (self.supervisor.is_some() || !with_shims)
            && let Some(id) = self.pick(|run| run.init.ended.is_none())
            && let Some(run) = self.tasks.get_mut(&id)
        {
            self.log.push(format!("meanwhile {id} ends"));
            run.end(&Arc::clone(&self.node), None, false);
        }
        let hook = self.containerd.pre_start();
        assert_eq!(hook.exit, 0, "{hook:?}");
        self.containerd.start();
        if self.supervisor.is_none() {
            self.supervisor = Some(self.node.supervise());
        }
    }

    // ---- what must be so ----

    fn assert_invariants(&mut self) {
        let rows = self.containerd.tasks("e2e");
        for (id, run) in &self.tasks {
            let row = rows.iter().find(|row| row.id == *id);
            let row = row.unwrap_or_else(|| panic!("containerd has lost {id}: {rows:?}"));
            match run.init.ended {
                None => {
                    run.task.assert_init_alive();
                    assert_eq!(
                        (row.pid, row.status.as_str()),
                        (run.init.process.pid, "RUNNING")
                    );
                }
                Some(status) => {
                    assert_eq!(row.status, "STOPPED", "{id}");
                    assert_eq!(run.task.wait("").exit_status, status, "{id}");
                }
            }
            for (exec_id, exec) in &run.execs {
                let state = run.task.state(exec_id);
                match exec.ended {
                    None => {
                        assert!(self.node.alive(&exec.process), "{id} {exec_id} has ended");
                        assert_eq!(state.status(), Status::Running, "{id} {exec_id}");
                    }
                    Some(status) => {
                        assert_eq!(state.status(), Status::Stopped, "{id} {exec_id}");
                        assert_eq!(state.exit_status, status, "{id} {exec_id}");
                    }
                }
            }
        }
        assert_eq!(rows.len(), self.tasks.len(), "{rows:?}");
    }

    fn finish(mut self) {
        let ids: Vec<String> = self.tasks.keys().cloned().collect();
        for id in ids {
            let Some(mut run) = self.tasks.remove(&id) else {
                continue;
            };
            self.log.push(format!("end {id}"));
            if run.init.ended.is_none() {
                run.end(&self.node, None, false);
            }
            run.assert_told(None);
            let status = run.init.ended.unwrap_or(0);
            self.containerd.delete(&run.task, status);
        }
        // One whose first task was refused waits a minute for another.
        wait_within(Duration::from_secs(150), "every shim to have left", || {
            self.node.shims().is_empty().then_some(())
        });
        if let Some(supervisor) = self.supervisor.take() {
            wait_for("nothing to be kept", || {
                let text = supervisor.metrics();
                let mut kept = text
                    .lines()
                    .filter(|line| line.starts_with("recoverd_kept_descriptors{"));
                kept.all(|line| line.ends_with(" 0")).then_some(())
            });
            supervisor.stop();
        }
        let scan = self.node.scan_of_any_age();
        let codes = scan.all_codes();
        // Clients that are gone with their daemon leave their fifos (SPEC 1).
        assert!(codes.iter().all(|code| *code == "leaked-fifo"), "{scan:#?}");
    }
}

impl Run {
    /// Ends its init or an exec, which with its init ends as well.
    fn end(&mut self, node: &Node, exec_id: Option<&str>, kill: bool) {
        let work = match exec_id {
            None => Some(&mut self.init),
            Some(exec_id) => self.execs.get_mut(exec_id),
        };
        let Some(work) = work else {
            return;
        };
        node.signal(&work.process, if kill { "KILL" } else { "TERM" });
        node.wait_gone(&work.process);
        work.ended = Some(if kill { 137 } else { work.code });
        if exec_id.is_none() {
            for exec in self.execs.values_mut().filter(|exec| exec.ended.is_none()) {
                // With its pid namespace.
                node.wait_gone(&exec.process);
                exec.ended = Some(137);
            }
        }
    }

    /// Whoever waits for it is told.
    #[track_caller]
    fn assert_told(&self, exec_id: Option<&str>) {
        let work = match exec_id {
            None => Some(&self.init),
            Some(exec_id) => self.execs.get(exec_id),
        };
        let told = self.task.wait(exec_id.unwrap_or_default()).exit_status;
        assert_eq!(Some(told), work.and_then(|work| work.ended), "{exec_id:?}");
    }
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).trim().to_owned()
}

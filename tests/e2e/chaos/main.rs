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
//! | shims become the other version; meanwhile a shim, the supervisor, containerd or who asks for it is killed | nobody notices |
//! | a shim is told to become something broken | it is as it was, or the old version has come back |
//!
//! Every process writes numbered lines; attached clients exec while others are killed. After each
//! step: same processes, true statuses, all lines in order, all events in order, an exec that works.
//!
//! Not chosen: a shim and the supervisor at one instant (no design survives that, SPEC 3), and the
//! fifth end of one shim in a minute.

mod dice;
mod faults;
mod life;
mod told;
mod work;

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::PathBuf;
use std::process::Output;
use std::sync::Arc;
use std::time::{Duration, Instant};

use dice::Dice;
use recoverd_common::pb::task::Status;
use recoverd_tests::{
    Containerd, Installed, Node, Release, Running, Supervisor, VERSION, wait_for, wait_within,
};
use told::Told;
use work::Run;

recoverd_tests::tests! {
    on_every_release: [chaos_costs_no_workload_and_no_word],
}

/// In one run of one release, unless told otherwise: 200 on three releases.
const FAULTS: u64 = 67;
/// Of a run that is told no other: a change is judged by the same choices as the one before it. Others
/// are drawn by hand.
const SEED: u64 = 7;
/// Tasks at one time.
const MOST: usize = 6;

struct World<'a> {
    node: Arc<Node>,
    containerd: Containerd,
    told: Told,
    supervisor: Option<Supervisor>,
    installed: Installed,
    /// What is installed calls itself so.
    version: &'static str,
    config: PathBuf,
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
    let seed = number("RECOVERD_CHAOS_SEED").unwrap_or(SEED);
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
    let installed = Installed::on(&node);
    // A successor, too, is what is installed.
    let config = node.folder().join("recoverd.toml");
    let text = format!(
        "[adopt]\nbinary = {:?}\ndeadline = \"60s\"\n",
        installed.path()
    );
    std::fs::write(&config, text).unwrap_or_else(|e| panic!("write {}: {e}", config.display()));
    let mut world = World {
        told: Told::new(&containerd),
        node,
        containerd,
        supervisor: None,
        installed,
        version: VERSION,
        config,
        dice: Dice::new(seed),
        tasks: BTreeMap::new(),
        kills: BTreeMap::new(),
        count: 0,
        faults: 0,
        log,
    };
    world.supervise();
    while world.faults < faults {
        world.step();
        world.assert_invariants();
    }
    world.finish();
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
        match self.dice.below(16) {
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
            11..=13 => self.upgrade(),
            14 => self.break_shim(),
            _ => self.kill_containerd(),
        }
    }

    fn words<'a>(&'a self, args: &[&'a str]) -> Vec<String> {
        let mut words = self.containerd.flags();
        words.extend(["--config".to_owned(), self.config.display().to_string()]);
        words.extend(args.iter().map(|word| (*word).to_owned()));
        words
    }

    fn recoverd(&self, args: &[&str]) -> Output {
        self.node.recoverd(self.words(args))
    }

    fn recoverd_spawn(&self, args: &[&str]) -> Running {
        self.node
            .spawn(self.node.built("recoverd"), self.words(args))
    }

    fn supervise(&mut self) {
        let text = std::fs::read_to_string(&self.config).unwrap_or_default();
        self.supervisor = Some(self.node.supervise_with(&text));
    }

    // ---- what must be so ----

    fn assert_invariants(&mut self) {
        // Of a shim whose successor could not be started at once it says UNKNOWN for a while.
        let rows = wait_for("containerd to know of every task", || {
            let rows = self.containerd.tasks("e2e");
            rows.iter()
                .all(|row| row.status != "UNKNOWN")
                .then_some(rows)
        });
        for (id, run) in &mut self.tasks {
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
            run.assert_output(&self.node);
        }
        assert_eq!(rows.len(), self.tasks.len(), "{rows:?}");
        self.told.assert_all();
        if let Some(echo) = self.echo() {
            echo.assert_said(false);
        }
    }

    fn finish(mut self) {
        self.told.assert_late();
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
            run.assert_output(&self.node);
            let status = run.init.ended.unwrap_or(0);
            self.containerd.delete(&run.task, status);
        }
        self.told.assert_all();
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

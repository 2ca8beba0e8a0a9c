use proptest::prelude::*;

use super::*;
use crate::{
    checkpoint::{Checkpoint, Restore},
    options::Options,
    service::{Create, StdioWish},
};

const INIT: u32 = 100;
const EXEC: u32 = 200;

fn now(mono_ms: u64) -> Now {
    Now {
        mono_ms,
        wall: Timestamp {
            seconds: 5,
            nanos: 0,
        },
    }
}

fn caller(stream: u32) -> Caller {
    Caller {
        connection: 1,
        stream,
    }
}

fn init() -> Key {
    Key::init("c")
}

fn exec() -> Key {
    Key {
        id: "c".into(),
        exec_id: "e".into(),
    }
}

/// Tasks with a script's ease of driving them.
struct Driver {
    tasks: Tasks,
    stream: u32,
    jobs: Vec<(JobId, Work)>,
    /// Answers by stream, topics in order.
    told: Vec<String>,
}

impl Driver {
    fn new() -> Self {
        Self {
            tasks: Tasks::new(1),
            stream: 0,
            jobs: Vec::new(),
            told: Vec::new(),
        }
    }

    fn event(&mut self, event: Event) -> Vec<Effect> {
        let out = self.tasks.handle(event, now(0));
        for effect in &out {
            match effect {
                Effect::Spawn { job, work, .. } => self.jobs.push((*job, work.clone())),
                Effect::Publish(notice) => self.told.push(word(notice)),
                Effect::Reply { to, reply } => {
                    let text = match reply {
                        Ok(Reply::Exited(ended)) => format!("exited {}", ended.status),
                        Ok(Reply::Deleted(ended)) => format!("deleted {}", ended.status),
                        Ok(Reply::State(state)) => format!("state {}", state.status),
                        Ok(_) => "ok".to_owned(),
                        Err(refusal) => format!("{}: {}", refusal.code, refusal.message),
                    };
                    self.told.push(format!("#{} {text}", to.stream));
                }
                _ => {}
            }
        }
        out
    }

    fn call(&mut self, call: Call) -> Vec<Effect> {
        self.stream += 1;
        let from = caller(self.stream);
        self.event(Event::Request {
            from,
            call,
            until: None,
        })
    }

    /// The answer to a call that is answered at once.
    fn ask(&mut self, call: Call) -> String {
        self.call(call);
        let mark = format!("#{} ", self.stream);
        let last = self.told.last().and_then(|told| told.strip_prefix(&mark));
        last.unwrap_or("nothing").to_owned()
    }

    fn done(&mut self, work: &str) -> Vec<Effect> {
        let pid = if work == "exec" { EXEC } else { INIT };
        let report = Report {
            process: matches!(work, "create" | "exec" | "restore")
                .then_some(Process { pid, start_time: 1 }),
            private_pids: true,
            ..Report::default()
        };
        self.end(work, Outcome::Done(report))
    }

    fn fail(&mut self, work: &str) -> Vec<Effect> {
        self.end(
            work,
            Outcome::Failed(Failure {
                kind: FailureKind::Other,
                text: "no".into(),
            }),
        )
    }

    fn end(&mut self, work: &str, outcome: Outcome) -> Vec<Effect> {
        let at = self.jobs.iter().position(|(_, w)| w.word() == work);
        let (job, _) = self.jobs.remove(at.expect(work));
        self.event(Event::JobEnded { job, outcome })
    }

    fn exit(&mut self, pid: u32, status: u32) -> Vec<Effect> {
        self.event(Event::Exited { pid, status })
    }

    fn drained(&mut self, key: Key) -> Vec<Effect> {
        self.event(Event::Drained { key })
    }

    fn take(&mut self) -> Vec<String> {
        std::mem::take(&mut self.told)
    }

    fn created() -> Self {
        let mut driver = Self::new();
        driver.call(create());
        driver.done("create");
        driver.take();
        driver
    }

    fn running() -> Self {
        let mut driver = Self::created();
        driver.call(Call::Start(init()));
        driver.done("start");
        driver.take();
        driver
    }

    fn with_exec(mut self) -> Self {
        self.call(Call::Exec {
            key: exec(),
            stdio: StdioWish::default(),
            spec: Vec::new(),
        });
        self.event(Event::ExecPrepared {
            key: exec(),
            result: Ok(()),
        });
        self
    }

    fn with_running_exec() -> Self {
        let mut driver = Self::running().with_exec();
        driver.call(Call::Start(exec()));
        driver.done("exec");
        driver.take();
        driver
    }
}

fn word(notice: &Notice) -> String {
    match notice {
        Notice::Create { .. } => "create".into(),
        Notice::Start { .. } => "start".into(),
        Notice::ExecAdded(_) => "exec-added".into(),
        Notice::ExecStarted { .. } => "exec-started".into(),
        Notice::Exit { key, .. } if key.is_init() => "exit".into(),
        Notice::Exit { .. } => "exec-exit".into(),
        Notice::Delete { .. } => "delete".into(),
        Notice::Oom(_) => "oom".into(),
        Notice::Paused(_) => "paused".into(),
        Notice::Resumed(_) => "resumed".into(),
        Notice::Checkpointed { .. } => "checkpointed".into(),
    }
}

fn create() -> Call {
    Call::Create(Box::new(Create {
        id: "c".into(),
        bundle: "/b".into(),
        rootfs: Vec::new(),
        stdio: StdioWish::default(),
        options: Options::default(),
        restore: None,
    }))
}

fn create_from_checkpoint() -> Call {
    let Call::Create(mut create) = create() else {
        unreachable!()
    };
    create.restore = Some(Restore {
        image: "/images".into(),
        parent: String::new(),
    });
    Call::Create(create)
}

fn checkpoint() -> Call {
    Call::Checkpoint(Box::new(Checkpoint {
        id: "c".into(),
        ..Checkpoint::default()
    }))
}

fn kill(key: Key) -> Call {
    Call::Kill {
        key,
        signal: 9,
        all: false,
    }
}

#[test]
fn a_whole_life_is_told_in_order() {
    let mut driver = Driver::new();
    driver.call(create());
    driver.done("create");
    driver.call(Call::Wait(init()));
    driver.call(Call::Start(init()));
    driver.done("start");
    driver.exit(INIT, 42);
    driver.drained(init());
    driver.call(Call::Delete(init()));
    driver.done("delete");
    assert_eq!(
        driver.take(),
        [
            "create",
            "#1 ok",
            "start",
            "#3 ok",
            "exit",
            "#2 exited 42",
            "delete",
            "#4 deleted 42"
        ]
    );
    assert!(driver.tasks.is_idle());
}

#[test]
fn a_restored_task_has_an_init_from_its_start_on() {
    let mut driver = Driver::new();
    driver.call(create_from_checkpoint());
    driver.end("create", Outcome::Done(Report::default()));
    driver.take();
    assert_eq!(driver.ask(Call::State(init())), "state 1");
    assert_eq!(
        driver.ask(checkpoint()),
        "2: cannot checkpoint a task in created state"
    );
    assert_eq!(driver.ask(kill(init())), "5: process already finished");
    // No empty list: containerd would take the shim for a leaked one.
    assert_eq!(driver.ask(Call::Pids("c".into())), "ok");
    driver.take();
    driver.call(Call::Start(init()));
    driver.fail("restore");
    assert_eq!(driver.take(), [""; 0]);
    driver.done("undo");
    assert_eq!(driver.take(), ["#6 2: OCI runtime restore failed: no"]);
    driver.call(Call::Start(init()));
    driver.done("restore");
    assert_eq!(driver.take(), ["start", "#7 ok"]);
    driver.exit(INIT, 3);
    assert_eq!(driver.take(), ["exit"]);
}

#[test]
fn a_task_that_was_never_restored_is_deleted_at_once() {
    let mut driver = Driver::new();
    driver.call(create_from_checkpoint());
    driver.end("create", Outcome::Done(Report::default()));
    driver.take();
    driver.call(Call::Delete(init()));
    driver.done("delete");
    assert_eq!(driver.take(), ["delete", "#2 deleted 0"]);
    assert!(driver.tasks.is_idle());
}

#[test]
fn a_restore_that_was_not_begun_is_not_undone() {
    let mut driver = Driver::new();
    driver.call(create_from_checkpoint());
    driver.end("create", Outcome::Done(Report::default()));
    driver.take();
    driver.call(Call::Start(init()));
    let failure = Failure {
        kind: FailureKind::Exists,
        text: "somebody else's".into(),
    };
    driver.end("restore", Outcome::Failed(failure));
    assert_eq!(
        driver.take(),
        ["#2 2: OCI runtime restore failed: somebody else's"]
    );
    assert!(driver.jobs.is_empty());
}

#[test]
fn a_checkpoint_has_its_task_for_itself_and_no_deadline() {
    let mut driver = Driver::running();
    driver.stream += 1;
    let from = caller(driver.stream);
    let out = driver.event(Event::Request {
        from,
        call: checkpoint(),
        until: Some(5),
    });
    assert!(
        !out.iter()
            .any(|effect| matches!(effect, Effect::Arm { .. })),
        "{out:?}"
    );
    driver.call(Call::Pause("c".into()));
    assert_eq!(driver.take(), [""; 0]);
    driver.end("checkpoint", Outcome::Done(Report::default()));
    assert_eq!(driver.take(), ["checkpointed", "#3 ok"]);
    driver.done("pause");
    driver.take();
    driver.call(checkpoint());
    driver.fail("checkpoint");
    assert_eq!(driver.take(), ["#5 2: no"]);
    // With `exit` the init ends while it is written.
    driver.call(checkpoint());
    driver.exit(INIT, 137);
    assert_eq!(driver.take(), ["exit"]);
    driver.end("checkpoint", Outcome::Done(Report::default()));
    assert_eq!(driver.take(), ["checkpointed", "#6 ok"]);
    assert_eq!(
        driver.ask(checkpoint()),
        "2: cannot checkpoint a stopped container"
    );
}

#[test]
fn an_exit_during_start_is_told_after_the_start() {
    let mut driver = Driver::created();
    driver.call(Call::Wait(init()));
    driver.call(Call::Start(init()));
    driver.exit(INIT, 1);
    assert_eq!(driver.take(), [""; 0]);
    assert_eq!(driver.ask(Call::State(init())), "state 1");
    driver.take();
    driver.done("start");
    assert_eq!(driver.take(), ["start", "#3 ok", "exit", "#2 exited 1"]);
}

#[test]
fn a_failed_start_of_what_was_killed_still_tells_the_exit() {
    let mut driver = Driver::created();
    driver.call(Call::Start(init()));
    driver.exit(INIT, 137);
    driver.fail("start");
    assert_eq!(
        driver.take(),
        ["#1 2: OCI runtime start failed: no", "exit"]
            .map(|text| text.replace("#1", &format!("#{}", driver.stream)))
    );
}

#[test]
fn the_exit_of_an_init_waits_for_those_of_its_execs() {
    let mut driver = Driver::with_running_exec();
    driver.call(Call::Wait(init()));
    driver.exit(INIT, 137);
    assert_eq!(driver.take(), [""; 0]);
    assert_eq!(driver.ask(Call::State(init())), "state 2");
    driver.take();
    driver.exit(EXEC, 137);
    let wait = driver.stream - 1;
    assert_eq!(
        driver.take(),
        [
            "exec-exit".to_owned(),
            "exit".into(),
            format!("#{wait} exited 137")
        ]
    );
}

#[test]
fn an_exec_that_starts_while_its_init_exits_is_told_first() {
    let mut driver = Driver::running().with_exec();
    driver.call(Call::Start(exec()));
    driver.take();
    driver.exit(INIT, 0);
    assert_eq!(driver.take(), [""; 0]);
    driver.done("exec");
    driver.exit(EXEC, 137);
    let told = driver.take();
    assert_eq!(told[0], "exec-started");
    assert_eq!(told[2..], ["exec-exit", "exit"]);
    assert!(
        driver
            .ask(Call::Start(exec()))
            .starts_with("2: cannot start a stopped")
    );
}

#[test]
fn no_exec_starts_after_the_init_has_exited() {
    let mut driver = Driver::running().with_exec();
    driver.exit(INIT, 0);
    assert!(driver.ask(Call::Start(exec())).starts_with("9: "));
    let add = Call::Exec {
        key: Key {
            id: "c".into(),
            exec_id: "f".into(),
        },
        stdio: StdioWish::default(),
        spec: Vec::new(),
    };
    assert!(driver.ask(add).starts_with("2: "));
}

#[test]
fn what_a_phase_does_not_allow_is_refused_as_the_stock_shim_does() {
    let mut driver = Driver::new();
    for call in [
        Call::State(init()),
        Call::Start(init()),
        Call::Delete(init()),
        Call::Pids("c".into()),
        Call::Pause("c".into()),
        kill(init()),
        Call::Wait(init()),
        Call::Stats("c".into()),
    ] {
        assert_eq!(driver.ask(call), "5: container not created");
    }
    let mut driver = Driver::running();
    assert!(driver.ask(create()).starts_with("6: "));
    assert!(driver.ask(Call::Start(init())).starts_with("2: "));
    assert!(driver.ask(Call::Resume("c".into())).starts_with("2: "));
    assert_eq!(
        driver.ask(Call::Delete(init())),
        "2: cannot delete a running process"
    );
    assert_eq!(
        driver.ask(Call::State(exec())),
        "5: process does not exist e"
    );
    let mut driver = driver.with_exec();
    assert!(driver.ask(kill(exec())).starts_with("9: "));
    let again = Call::Exec {
        key: exec(),
        stdio: StdioWish::default(),
        spec: Vec::new(),
    };
    assert!(driver.ask(again).starts_with("6: "));
    driver.exit(INIT, 0);
    assert_eq!(driver.ask(kill(init())), "5: process already finished");
    let update = Call::Update {
        id: "c".into(),
        resources: Vec::new(),
    };
    assert!(driver.ask(update).starts_with("2: "));
}

#[test]
fn requests_that_need_the_task_wait_their_turn_and_looks_do_not() {
    let mut driver = Driver::running();
    driver.call(Call::Pause("c".into()));
    driver.call(Call::Resume("c".into()));
    assert_eq!(driver.ask(Call::State(init())), "state 5");
    assert_eq!(driver.jobs.len(), 1);
    driver.take();
    driver.done("pause");
    assert_eq!(driver.ask(Call::State(init())), "state 4");
    driver.done("resume");
    assert_eq!(driver.ask(Call::State(init())), "state 2");
    let told = driver.take();
    assert_eq!(told[0], "paused");
    assert_eq!(told[3], "resumed");
}

#[test]
fn pids_of_a_stopped_task_name_its_init_so_that_no_containerd_drops_it() {
    let mut driver = Driver::running();
    driver.exit(INIT, 42);
    let out = driver.call(Call::Pids("c".into()));
    let [Effect::Reply { reply, .. }] = out.as_slice() else {
        panic!("{out:?}")
    };
    assert_eq!(*reply, Ok(Reply::Pids(vec![(INIT, String::new())])));
}

#[test]
fn delete_of_a_created_task_waits_for_the_exit_that_it_causes() {
    let mut driver = Driver::created();
    driver.call(Call::Delete(init()));
    driver.done("delete");
    assert_eq!(driver.take(), [""; 0]);
    driver.exit(INIT, 137);
    let told = driver.take();
    assert_eq!(told[..2], ["exit", "delete"]);
    assert!(told[2].ends_with("deleted 137"));
    assert!(driver.tasks.is_idle());
}

#[test]
fn an_exit_that_never_comes_does_not_hold_delete_for_ever() {
    let mut driver = Driver::created();
    driver.call(Call::Delete(init()));
    driver.done("delete");
    driver.event(Event::Timer(Timer::LateExit("c".into())));
    assert!(driver.take()[2].ends_with("deleted 137"));
    assert!(driver.tasks.is_idle());
}

#[test]
fn delete_waits_for_output_ten_seconds_at_most() {
    let mut driver = Driver::with_running_exec();
    driver.exit(EXEC, 3);
    driver.take();
    let out = driver.call(Call::Delete(exec()));
    let [Effect::Arm { at, timer }] = out.as_slice() else {
        panic!("{out:?}")
    };
    assert_eq!(*at, DRAIN_MS);
    driver.event(Event::Timer(timer.clone()));
    assert!(driver.take()[0].ends_with("deleted 3"));
    // Late news is no news.
    driver.drained(exec());
    assert_eq!(driver.take(), [""; 0]);
}

#[test]
fn a_failed_create_is_cleaned_up_before_its_caller_hears_of_it() {
    let mut driver = Driver::new();
    driver.call(create());
    driver.fail("create");
    assert_eq!(driver.take(), [""; 0]);
    assert!(driver.ask(create()).starts_with("6: "));
    driver.take();
    driver.fail("cleanup");
    assert_eq!(driver.take(), ["#1 2: OCI runtime create failed: no"]);
    assert!(driver.tasks.is_idle());
}

#[test]
fn a_create_waits_for_the_end_of_one_whose_caller_has_gone() {
    let cleaning = || {
        let mut driver = Driver::new();
        driver.call(create());
        driver.fail("create");
        driver.event(Event::Disconnected { connection: 1 });
        assert_eq!(driver.ask(create()), "nothing");
        driver
    };
    let mut driver = cleaning();
    driver.done("cleanup");
    assert!(!driver.take().iter().any(|told| told.starts_with("#2")));
    driver.done("create");
    assert_eq!(driver.take(), ["create", "#2 ok"]);
    // One that is given up is not made afterwards.
    let mut driver = cleaning();
    driver.call(Call::Delete(init()));
    driver.done("cleanup");
    let told = driver.take();
    assert!(
        told.contains(&"#2 14: create of c was given up".to_owned()),
        "{told:?}"
    );
    assert!(
        told.contains(&"#3 5: container not created".to_owned()),
        "{told:?}"
    );
    assert!(driver.tasks.is_idle());
    let mut driver = cleaning();
    driver.event(Event::Disconnected { connection: 1 });
    driver.done("cleanup");
    assert!(driver.tasks.is_idle());
}

#[test]
fn a_runtime_that_hangs_is_ended_when_its_caller_has_given_up() {
    let mut driver = Driver::new();
    driver.stream = 1;
    let out = driver.event(Event::Request {
        from: caller(1),
        call: create(),
        until: Some(500),
    });
    assert!(out.contains(&Effect::Arm {
        at: 500,
        timer: Timer::Job(1)
    }));
    let out = driver.event(Event::Timer(Timer::Job(1)));
    assert_eq!(out, [Effect::EndJob(1)]);
    assert_eq!(driver.event(Event::Timer(Timer::Job(1))), []);
    driver.fail("create");
    driver.done("cleanup");
    assert_eq!(
        driver.take(),
        ["#1 4: runtime create of c did not end in time"]
    );
}

#[test]
fn a_create_whose_caller_has_gone_does_not_hang_for_ever() {
    let mut driver = Driver::new();
    driver.call(create());
    assert_eq!(driver.event(Event::Disconnected { connection: 2 }), []);
    let out = driver.event(Event::Disconnected { connection: 1 });
    let limit = Effect::Arm {
        at: OWN_MS,
        timer: Timer::Job(1),
    };
    assert_eq!(out, [limit]);
    assert_eq!(
        driver.event(Event::Timer(Timer::Job(1))),
        [Effect::EndJob(1)]
    );
    driver.fail("create");
    driver.done("cleanup");
    assert!(driver.tasks.is_idle());
    // One that is quick enough stays: containerd finds it when it is back.
    let mut driver = Driver::new();
    driver.call(create());
    driver.event(Event::Disconnected { connection: 1 });
    driver.done("create");
    assert_eq!(driver.ask(Call::State(init())), "state 1");
}

#[test]
fn a_runtime_that_hangs_does_not_keep_an_exit_back_for_ever() {
    let limit = |job| Effect::Arm {
        at: OWN_MS,
        timer: Timer::Job(job),
    };
    let mut driver = Driver::running().with_exec();
    driver.call(Call::Start(exec()));
    driver.take();
    assert!(driver.exit(INIT, 7).contains(&limit(3)));
    assert_eq!(driver.take(), [""; 0]);
    driver.event(Event::Timer(Timer::Job(3)));
    driver.fail("exec");
    assert_eq!(driver.take().last().map(String::as_str), Some("exit"));
    let mut driver = Driver::created();
    driver.call(Call::Start(init()));
    assert!(driver.exit(INIT, 7).contains(&limit(2)));
}

#[test]
fn a_shared_pid_namespace_is_emptied_when_its_init_exits() {
    let mut driver = Driver::running();
    driver.tasks.tasks.get_mut("c").unwrap().private_pids = false;
    let out = driver.exit(INIT, 0);
    assert!(out.iter().any(|effect| matches!(
        effect,
        Effect::Spawn {
            work: Work::Kill {
                signal: 9,
                all: true
            },
            ..
        }
    )));
}

#[test]
fn a_frozen_container_whose_init_was_killed_is_thawed() {
    let mut driver = Driver::running();
    driver.call(Call::Pause("c".into()));
    driver.done("pause");
    driver.take();
    driver.exit(INIT, 137);
    assert_eq!(driver.jobs[0].1, Work::Resume);
    assert_eq!(driver.take(), ["exit"]);
    driver.fail("resume");
    assert_eq!(driver.ask(Call::State(init())), "state 3");
}

#[test]
fn who_has_gone_is_not_answered_and_who_waits_for_a_deleted_task_is() {
    let mut driver = Driver::with_running_exec();
    driver.call(Call::Wait(exec()));
    driver.event(Event::Disconnected { connection: 1 });
    driver.exit(EXEC, 0);
    assert_eq!(driver.take(), ["exec-exit"]);
    let mut driver = Driver::running().with_exec();
    driver.call(Call::Wait(exec()));
    driver.exit(INIT, 0);
    driver.drained(init());
    driver.take();
    driver.call(Call::Delete(init()));
    driver.done("delete");
    let told = driver.take();
    assert!(told[2].ends_with("5: process does not exist e"), "{told:?}");
}

#[test]
fn shutdown_is_ignored_while_there_is_a_task() {
    let mut driver = Driver::created();
    assert_eq!(driver.ask(Call::Shutdown), "ok");
    let mut driver = Driver::new();
    let out = driver.call(Call::Shutdown);
    assert_eq!(out, [Effect::Leave { to: caller(1) }]);
}

#[test]
fn a_create_that_its_client_gives_up_leaves_nothing_whatever_the_runtime_did() {
    for made in [true, false] {
        let mut driver = Driver::new();
        driver.call(create());
        let out = driver.call(Call::Delete(init()));
        assert_eq!(out, [Effect::EndJob(1)]);
        driver.call(Call::Shutdown);
        assert!(driver.ask(Call::State(init())).starts_with("9: "));
        driver.take();
        if made {
            driver.done("create");
        } else {
            driver.fail("create");
        }
        assert_eq!(driver.take(), [""; 0]);
        let out = driver.done("cleanup");
        let told = driver.take();
        assert_eq!(told.len(), 2, "{told:?}");
        assert!(told.contains(&"#2 5: container not created".to_owned()));
        assert_eq!(out.last(), Some(&Effect::Leave { to: caller(3) }));
    }
}

#[test]
fn what_was_not_run_is_not_cleaned_up() {
    for (kind, code) in [(FailureKind::Exists, "6"), (FailureKind::NotRun, "2")] {
        let mut driver = Driver::new();
        driver.call(create());
        let failure = Failure {
            kind,
            text: "no".into(),
        };
        driver.end("create", Outcome::Failed(failure));
        assert_eq!(
            driver.take(),
            [format!("#1 {code}: OCI runtime create failed: no")]
        );
        assert!(driver.tasks.is_idle());
    }
}

#[test]
fn shutdown_during_create_is_decided_by_how_that_ends() {
    let mut driver = Driver::new();
    driver.call(create());
    driver.call(Call::Shutdown);
    driver.fail("create");
    let out = driver.done("cleanup");
    assert_eq!(out.last(), Some(&Effect::Leave { to: caller(2) }));
    let mut driver = Driver::new();
    driver.call(create());
    driver.call(Call::Shutdown);
    driver.done("create");
    assert_eq!(driver.take(), ["create", "#1 ok", "#2 ok"]);
}

/// Anything may come at any time.
fn any_step() -> impl Strategy<Value = u8> {
    0..18u8
}

proptest! {
    /// Whatever comes in whatever order: every call is answered once at most, an init's exit
    /// is told once and after its start, and at the end everybody who asked has an answer.
    #[test]
    fn no_order_of_events_breaks_the_promises(steps in prop::collection::vec(any_step(), 0..80)) {
        let mut driver = Driver::new();
        for step in steps {
            let pending = driver.jobs.first().map(|(_, work)| work.word());
            match step {
                0 => drop(driver.call(create())),
                1 => drop(driver.call(Call::Start(init()))),
                2 => drop(driver.call(Call::Delete(init()))),
                3 => drop(driver.call(Call::Wait(init()))),
                4 => drop(driver.call(Call::Pause("c".into()))),
                5 => drop(driver.call(Call::Resume("c".into()))),
                6 => drop(driver.call(kill(init()))),
                7 => driver = driver.with_exec(),
                8 => drop(driver.call(Call::Start(exec()))),
                9 => drop(driver.call(Call::Delete(exec()))),
                10 => drop(driver.call(Call::Wait(exec()))),
                11 => drop(driver.exit(INIT, 1)),
                12 => drop(driver.exit(EXEC, 2)),
                13 => drop(driver.drained(init())),
                14 => drop(driver.drained(exec())),
                15 => { if let Some(work) = pending { driver.done(work); } }
                16 => { if let Some(work) = pending { driver.fail(work); } }
                _ => drop(driver.call(Call::State(init()))),
            }
        }
        // Let everything end.
        for _ in 0..50 {
            while let Some((_, work)) = driver.jobs.first() {
                let word = work.word();
                driver.done(word);
            }
            driver.exit(EXEC, 2);
            driver.exit(INIT, 1);
            driver.drained(init());
            driver.drained(exec());
            driver.call(Call::Delete(init()));
        }
        prop_assert!(driver.tasks.is_idle());
        let mut answered: Vec<&str> = driver.told.iter()
            .filter_map(|told| told.strip_prefix('#')?.split(' ').next())
            .collect();
        answered.sort_unstable();
        let count = answered.len();
        answered.dedup();
        prop_assert_eq!(count, answered.len(), "answered twice");
        prop_assert_eq!(count, driver.stream as usize, "not answered");
        let mut alive = false;
        for told in &driver.told {
            match told.as_str() {
                "create" => { prop_assert!(!alive); alive = true; }
                "exit" => { prop_assert!(alive); alive = false; }
                "start" | "paused" | "exec-started" => prop_assert!(alive, "{}", told),
                _ => {}
            }
        }
    }
}

//! What is wrong with a shim process.

use recoverd_common::proc::{FileId, Memory};

use super::*;
use crate::facts::{
    Phase, Reply,
    fixture::{self, OLD, SOCKET, process, stat},
};

const OURS: &str = "containerd-shim-recoverd-v1";

fn silent(look: &mut Look) {
    let answer = look.answer_of(&C1);
    answer.greeting = Reply::Silent;
    answer.states.clear();
    answer.asked = 2;
}

#[test]
fn a_shim_that_does_not_answer_is_unresponsive() {
    finds(
        Code::UnresponsiveShim,
        silent,
        &[
            ("it said no in words", |l| {
                l.answer_of(&C1).greeting = Reply::Error(2, "no".into())
            }),
            ("it was not asked", |l| {
                l.answer_of(&C1).greeting = Reply::NotAsked
            }),
            ("it could not be asked", |l| {
                let answer = l.answer_of(&C1);
                answer.greeting = Reply::NotAsked;
                answer.connection = Connection::Failed("EMFILE".into());
            }),
            ("it died", |l| l.end_shim(&C1)),
            ("it is foreign", foreign),
        ],
    );
    let table: &[(&str, Break, Hold)] = &[
        ("did not answer Connect, asked 2 times", silent, Hold::Once),
        (
            "did not answer Connect",
            |l| {
                silent(l);
                l.answer_of(&C1).patient = false;
            },
            Hold::Twice,
        ),
        (
            "answered Connect with no answer: closed",
            |l| l.answer_of(&C1).greeting = Reply::Garbage("closed".into()),
            Hold::Twice,
        ),
        (
            "its queue is full",
            |l| {
                let answer = l.answer_of(&C1);
                answer.connection = Connection::QueueFull;
                answer.greeting = Reply::NotAsked;
            },
            Hold::Twice,
        ),
        (
            "did not answer State of c1",
            |l| {
                l.answer_of(&C1).states.insert("c1".into(), Reply::Silent);
            },
            Hold::Twice,
        ),
        (
            "answered State of c1 with no answer: x",
            |l| {
                let garbage = Reply::Garbage("x".into());
                l.answer_of(&C1).states.insert("c1".into(), garbage);
            },
            Hold::Twice,
        ),
    ];
    for (what, change, hold) in table {
        let mut look = healthy();
        change(&mut look);
        let found = only(&look);
        assert_eq!(
            (found.finding.code, found.hold),
            (Code::UnresponsiveShim, *hold),
            "{what}"
        );
        assert_eq!(found.address.as_deref(), Some(SOCKET));
        assert!(facts(&found).contains(what), "{what}: {}", facts(&found));
    }
}

#[test]
fn an_unresponsive_shim_is_stopped_traced_busy_or_idle() {
    let table: &[(&str, Break)] = &[
        ("stopped (state T)", |l| l.shim_of(&C1).state = 'T'),
        ("stopped by a tracer", |l| l.shim_of(&C1).state = 't'),
        ("busy (state R, 5 ticks", |l| {
            let shim = l.shim_of(&C1);
            (shim.state, shim.cpu_ticks_after) = ('R', Some(5));
        }),
        ("idle (state S)", |l| {
            l.shim_of(&C1).cpu_ticks_after = Some(0)
        }),
        ("idle (state S)", |_| {}),
    ];
    for (what, change) in table {
        let mut look = healthy();
        silent(&mut look);
        change(&mut look);
        let found = only(&look);
        assert!(facts(&found).contains(what), "{what}: {}", facts(&found));
    }
}

#[test]
fn silence_of_a_listener_that_is_no_shim_is_told_and_so_is_silence_that_hides_the_listener() {
    let mut look = healthy();
    silent(&mut look);
    let answer = look.answer_of(&C1).clone();
    look.end_shim(&C1);
    *look.answer_of(&C1) = answer;
    look.listeners_mut().insert(SOCKET.into(), vec![99]);
    assert!(facts(&only(&look)).contains("listener [99] has no shim's command line"));
    look.listeners = unknown();
    assert_eq!(codes(&look), [Code::UnresponsiveShim]);
}

#[test]
fn a_foreign_shim_is_told_only_when_it_does_not_answer() {
    let mut look = healthy();
    foreign(&mut look);
    look.remove_runc(&C1);
    assert_eq!(codes(&look), []);
    silent(&mut look);
    assert_eq!(codes(&look), [Code::Foreign]);
}

#[test]
fn a_living_shim_without_its_socket_file_cannot_be_reached() {
    fn gone(look: &mut Look) {
        let answer = look.answer_of(&C1);
        answer.connection = Connection::NoFile;
        answer.greeting = Reply::NotAsked;
        answer.states.clear();
        look.sockets.clear();
    }
    finds(
        Code::SocketMissing,
        gone,
        &[
            ("the shim died", |l| l.end_shim(&C1)),
            ("the shim is foreign", foreign),
            ("the socket could not be tried", |l| {
                l.answer_of(&C1).connection = Connection::Failed("EMFILE".into());
            }),
            ("it was not asked", |l| l.answers.clear()),
            ("where the shim listens is hidden", |l| {
                l.shim_of(&C1).listens.clear();
                deaf(l);
            }),
        ],
    );
    let mut look = healthy();
    gone(&mut look);
    look.answer_of(&C1).connection = Connection::Refused;
    assert!(facts(&only(&look)).contains("another file stands in its place"));
    // An abstract socket has no file.
    let mut look = healthy();
    gone(&mut look);
    let mut answer = look.answer_of(&C1).clone();
    answer.connection = Connection::Refused;
    let bundle = look.bundle_of(&C1);
    (bundle.bootstrap, bundle.address) = (Seen::Absent, Seen::Present("abstract".into()));
    look.shim_of(&C1).listens = vec!["@abstract".into()];
    look.answers.insert("@abstract".into(), answer);
    assert_eq!(codes(&look), []);
}

#[test]
fn a_shim_that_listens_where_containerd_will_not_look_cannot_be_reached() {
    fn elsewhere(look: &mut Look) {
        let bundle = look.bundle_of(&C1);
        bundle.bootstrap = Seen::Absent;
        bundle.address = Seen::Present("unix:///run/containerd/s/other".into());
    }
    finds(
        Code::SocketMissing,
        elsewhere,
        &[
            ("the init ended", end_init),
            ("whether it ended is unknown", blind),
            ("the shim listens there too", |l| {
                l.shim_of(&C1)
                    .listens
                    .push("/run/containerd/s/other".into());
            }),
            ("what the bundle says cannot be read", |l| {
                l.bundle_of(&C1).address = unknown();
            }),
            ("where the shim listens is hidden", |l| {
                l.shim_of(&C1).listens.clear()
            }),
            ("the shim is foreign", foreign),
        ],
    );
    let mut look = healthy();
    elsewhere(&mut look);
    look.bundle_of(&C1).address = Seen::Absent;
    assert!(facts(&only(&look)).contains("names no address"));
    look.bundle_of(&C1).bootstrap = unknown();
    assert_eq!(codes(&look), []);
}

/// The task is gone, its shim is not.
fn leftover(look: &mut Look) {
    look.end_init(&C1);
    look.unlisted(&C1);
}

#[test]
fn a_shim_without_living_process_that_containerd_does_not_know_is_leaked() {
    finds(
        Code::LeakedShim,
        leftover,
        &[
            ("the init lives", |l| {
                l.table().insert(C1.init, stat(process(C1.init, OLD), 1));
            }),
            ("an exec of it lives", |l| {
                l.table().insert(99, stat(process(99, NEW), C1.shim));
            }),
            ("nobody can see processes", blind),
            ("containerd is down", down),
            ("containerd cannot be asked", unsure),
            ("the list did not come", |l| l.api(0).tasks = None),
            ("containerd lists it", |l| l.listed(&C1, Phase::Running)),
            ("the shim is foreign", foreign),
            ("it is another containerd's", |l| {
                l.shim_of(&C1).address = "/run/unseen/containerd.sock".into();
            }),
            ("the shim does not answer for it", |l| {
                l.answer_of(&C1).states.insert("c1".into(), Reply::Silent);
            }),
            ("the shim was not asked", |l| l.answers.clear()),
            ("the shim is new and holds no task", |l| {
                l.answer_of(&C1).states.clear();
                l.shim_started(&C1, NEW);
            }),
        ],
    );
    let mut look = healthy();
    leftover(&mut look);
    look.shim_started(&C1, NEW);
    let found = only(&look);
    assert_eq!(
        (found.finding.code, found.hold),
        (Code::LeakedShim, Hold::Twice)
    );
    look.shim_started(&C1, YOUNG);
    let refused = Reply::Error(5, "not found".into());
    look.answer_of(&C1).states.insert("c1".into(), refused);
    assert_eq!(codes(&look), [Code::LeakedShim]);
}

#[test]
fn a_shim_is_not_leaked_while_another_of_its_tasks_may_need_it() {
    const SECOND: Task = Task {
        id: "c2",
        group: "c1",
        init: 8,
        ..C1
    };
    finds(
        Code::LeakedShim,
        |l| {
            l.add(&SECOND);
            l.end_init(&SECOND);
            l.unlisted(&SECOND);
            leftover(l);
        },
        &[
            ("an adopted init lives, the child of another process", |l| {
                l.table()
                    .insert(SECOND.init, stat(process(SECOND.init, OLD), 1));
            }),
            ("whether its init lives is unknown", |l| {
                l.runc_of(&SECOND).state = unknown();
                l.bundle_of(&SECOND).init_pid = unknown();
            }),
            ("containerd still lists its exit", |l| {
                l.listed(&SECOND, Phase::Stopped)
            }),
        ],
    );
}

#[test]
fn a_shim_that_serves_nothing_that_anything_names_is_leaked() {
    fn idle(look: &mut Look) {
        let shim = fixture::shim(&C1);
        look.remove(&C1);
        look.table().insert(shim.id.pid, stat(shim.id, 1));
        look.shims.push(shim);
    }
    finds(
        Code::LeakedShim,
        idle,
        &[
            ("it is new", |l| l.shim_started(&C1, NEW)),
            ("it has a child", |l| {
                l.table().insert(99, stat(process(99, OLD), C1.shim));
            }),
            ("nobody can see processes", blind),
            ("containerd is down", down),
            ("containerd cannot be asked", unsure),
            ("the list did not come", |l| l.api(0).tasks = None),
            ("containerd lists it", |l| l.listed(&C1, Phase::Created)),
            ("its containerd is unknown", |l| {
                l.shim_of(&C1).address = "/run/x.sock".into()
            }),
            ("it is foreign", foreign),
        ],
    );
    let mut look = healthy();
    idle(&mut look);
    assert_eq!(only(&look).finding.subject, Subject::Shim { shim: C1.shim });
    assert_eq!(only(&look).instance, Some(0));
}

#[test]
fn a_shim_of_another_file_than_the_installed_one_is_outdated() {
    fn replaced(look: &mut Look) {
        look.shim_of(&C1).installed = Seen::Present(FileId { dev: 1, ino: 2 });
    }
    fn deleted(look: &mut Look) {
        if let Seen::Present(exe) = &mut look.shim_of(&C1).exe {
            exe.deleted = true;
        }
    }
    finds(
        Code::OutdatedShim,
        replaced,
        &[
            ("what it runs is unknown", |l| {
                l.shim_of(&C1).exe = unknown()
            }),
            ("what is installed is unknown", |l| {
                l.shim_of(&C1).installed = unknown()
            }),
            ("it is foreign", foreign),
        ],
    );
    let mut look = healthy();
    look.shim_of(&C1).installed = Seen::Absent;
    assert!(facts(&only(&look)).contains("which was deleted"));
    let mut look = healthy();
    deleted(&mut look);
    look.shim_of(&C1).installed = unknown();
    assert_eq!(
        codes(&look),
        [Code::OutdatedShim],
        "the kernel says that it was deleted"
    );
    assert!(
        only(&look)
            .finding
            .action
            .starts_with("restart the container")
    );
    look.shim_of(&C1).name = OURS.into();
    assert_eq!(only(&look).finding.action, "recoverd upgrade default/c1");
    assert_eq!(only(&look).hold, Hold::Once);
}

#[test]
fn a_shim_that_uses_far_more_than_the_usual_is_bloated() {
    let table: &[(&str, Break, Break)] = &[
        (
            "65537 KiB of private memory",
            |l| memory(l, 65537),
            |l| memory(l, 65536),
        ),
        (
            "129 threads",
            |l| l.shim_of(&C1).threads = 129,
            |l| l.shim_of(&C1).threads = 128,
        ),
        (
            "1025 open descriptors",
            |l| l.shim_of(&C1).descriptors = Some(1025),
            |l| l.shim_of(&C1).descriptors = Some(1024),
        ),
    ];
    fn memory(look: &mut Look, private_kib: u64) {
        look.shim_of(&C1).memory = Seen::Present(Memory {
            pss_kib: 1 << 30,
            private_kib,
        });
    }
    for (what, much, enough) in table {
        let mut look = healthy();
        much(&mut look);
        let found = only(&look);
        assert_eq!(found.finding.code, Code::BloatedShim);
        assert!(facts(&found).contains(what), "{what}: {}", facts(&found));
        foreign(&mut look);
        assert_eq!(codes(&look), [], "{what}, foreign");
        let mut look = healthy();
        enough(&mut look);
        assert_eq!(codes(&look), [], "not yet {what}");
    }
    let mut look = healthy();
    let shim = look.shim_of(&C1);
    (shim.memory, shim.descriptors) = (unknown(), None);
    assert_eq!(codes(&look), []);
    shim_of_nobody();
}

/// Without a case it is the process that is told of.
fn shim_of_nobody() {
    let mut look = fixture::empty();
    let mut shim = fixture::shim(&C1);
    shim.threads = 129;
    shim.id = process(C1.shim, NEW);
    look.shims.push(shim);
    assert_eq!(only(&look).finding.subject, Subject::Shim { shim: C1.shim });
}

#[test]
fn what_a_shim_is_blamed_for_names_the_task_that_it_was_started_for() {
    const SECOND: Task = Task {
        id: "a",
        group: "c1",
        init: 8,
        ..C1
    };
    let mut look = healthy();
    look.add(&SECOND);
    look.shim_of(&C1).threads = 129;
    assert_eq!(only(&look).finding.subject.text(), "default/c1");
    look.remove_bundle(&C1);
    look.remove_runc(&C1);
    look.api(0).tasks.as_mut().unwrap().remove(&C1.name());
    let subjects: Vec<String> = judge(&look)
        .iter()
        .filter(|s| s.finding.code == Code::BloatedShim)
        .map(|s| s.finding.subject.text())
        .collect();
    assert_eq!(subjects, ["default/a"]);
}

#[test]
fn a_hung_shim_is_told_the_command_that_replaces_it_and_a_busy_one_to_wait() {
    let mut look = healthy();
    look.answer_of(&C1).greeting = Reply::Silent;
    let shim = look.shim_of(&C1);
    shim.cpu_ticks_after = Some(shim.cpu_ticks);
    let replace = "recoverd repair --apply --allow kill --only default/c1";
    let action = only(&look).finding.action;
    assert!(
        action.starts_with(&format!("stop containerd, {replace}, start it")),
        "{action}"
    );
    look.instances[0].api = Api::Down;
    look.instances[0].daemon = None;
    let action = only(&look).finding.action;
    assert!(
        action.starts_with(&format!("{replace}, before")),
        "{action}"
    );
    look.shim_of(&C1).cpu_ticks_after = Some(1000);
    let action = only(&look).finding.action;
    assert!(action.starts_with("wait until it answers"), "{action}");
}

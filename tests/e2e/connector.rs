//! The process-events connector, on this machine's own kernel: it has one in its first namespaces
//! only, so no node is made.

use std::fs;
use std::os::fd::OwnedFd;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use recoverd_common::connector::{Connector, Told};
use recoverd_common::proc::Proc;
use recoverd_common::record;
use recoverd_common::seen::Seen;
use recoverd_common::witness::{Answer, Teller, open};

recoverd_tests::tests! {
    in_first_namespaces: [
        an_exit_that_its_parent_has_collected_is_told,
        others_are_not_told_once_it_is_known_who_counts,
        who_counts_may_change,
        a_listener_that_is_too_slow_does_not_guess,
        a_teller_says_how_a_process_ended_once_that_has_settled,
    ],
}

fn shell(line: &str) -> Child {
    // Its stdin is at its end as soon as it is waited for.
    let mut command = Command::new("sh");
    let child = command.args(["-c", line]).stdin(Stdio::piped()).spawn();
    child.unwrap_or_else(|error| panic!("start sh: {error}"))
}

fn listen() -> Connector {
    Connector::open().unwrap_or_else(|why| panic!("{why}"))
}

/// The end of `child`, collected, as the connector has it.
#[track_caller]
fn told(connector: &mut Connector, mut child: Child) -> Told {
    let pid = child.id();
    let ended = child.wait();
    assert!(ended.is_ok(), "{ended:?}");
    recoverd_tests::wait_for("an event", || {
        Some(connector.told(pid)).filter(|told| *told != Told::Nothing)
    })
}

fn an_exit_that_its_parent_has_collected_is_told() {
    let mut connector = listen();
    for (line, status) in [
        ("exit 0", 0),
        ("exit 23", 23 << 8),
        ("kill -9 $$", 9),
        ("kill -37 $$", 37),
        ("exec sh -c 'exit 5'", 5 << 8),
    ] {
        assert_eq!(
            told(&mut connector, shell(line)),
            Told::Status(status),
            "{line}"
        );
    }
    assert!(!connector.has_lost());
    // Before it listened nothing was told.
    let mut early = shell("exit 1");
    let ended = early.wait();
    assert!(ended.is_ok(), "{ended:?}");
    let mut late = listen();
    told(&mut late, shell("exit 0"));
    assert_eq!(late.told(early.id()), Told::Nothing);
}

fn others_are_not_told_once_it_is_known_who_counts() {
    let mut connector = listen();
    let (before, one, other) = (shell("exit 1"), shell("read x"), shell("exit 3"));
    let (before_pid, other_pid) = (before.id(), other.id());
    told(&mut connector, before);
    let narrowed = connector.narrow(&[one.id(), before_pid]);
    assert!(narrowed.is_ok(), "{narrowed:?}");
    assert_eq!(
        connector.told(before_pid),
        Told::Status(1 << 8),
        "what was known is forgotten"
    );
    told(&mut listen(), shell("exit 0"));
    assert_eq!(connector.told(other_pid), Told::Nothing);
    drop(other);
    let mut somebody = listen();
    let stranger = shell("exit 4");
    let stranger_pid = stranger.id();
    told(&mut somebody, stranger);
    assert_eq!(told(&mut connector, one), Told::Status(1 << 8));
    assert_eq!(connector.told(stranger_pid), Told::Nothing);
}

fn who_counts_may_change() {
    let mut connector = listen();
    let narrow = |connector: &mut Connector, pids: &[u32]| {
        // Whether or not the kernel takes so long a filter.
        let _ = connector.narrow(pids);
    };
    let (one, two, three) = (
        shell("read x; exit 1"),
        shell("read x; exit 2"),
        shell("read x; exit 3"),
    );
    narrow(&mut connector, &[one.id()]);
    narrow(&mut connector, &[one.id(), two.id()]);
    let both = [one.id(), two.id()];
    assert_eq!(told(&mut connector, two), Told::Status(2 << 8));
    // More than any filter holds: nothing is lost, and others are not remembered all the same.
    let many: Vec<u32> = (1 << 21..).take(9000).chain(both).collect();
    narrow(&mut connector, &many);
    let stranger = three.id();
    told(&mut listen(), three);
    assert_eq!(told(&mut connector, one), Told::Status(1 << 8));
    assert_eq!(connector.told(stranger), Told::Nothing);
    assert_eq!(connector.told(both[1]), Told::Status(2 << 8));
    connector.forget(both[1]);
    assert_eq!(connector.told(both[1]), Told::Nothing);
}

fn a_listener_that_is_too_slow_does_not_guess() {
    // A small queue: events of so many processes as fill the usual one would be lost by others,
    // too, who listen on this machine. So small that this one loses some whenever the machine is
    // busy.
    let opened = Connector::with_queue(4096);
    let mut connector = opened.unwrap_or_else(|why| panic!("{why}"));
    let ended = |connector: &mut Connector, status: i32| {
        let mut child = shell(&format!("exit {status}"));
        let pid = child.id();
        let collected = child.wait();
        assert!(collected.is_ok(), "{collected:?}");
        let told = connector.told(pid);
        assert!(
            [Told::Nothing, Told::Status(status << 8)].contains(&told),
            "{told:?}"
        );
        (pid, told)
    };
    let mut before = Vec::new();
    recoverd_tests::wait_for("a loss", || {
        before.push(ended(&mut connector, 6).0);
        // A thread's end is an event like a process's, and costs less.
        for _ in 0..100 {
            let joined = std::thread::spawn(|| ()).join();
            assert!(joined.is_ok());
        }
        connector.read();
        connector.has_lost().then_some(())
    });
    // Whatever was known: there may have been an exec, and another end.
    for pid in before {
        assert_eq!(connector.told(pid), Told::Nothing);
    }
    let late = shell("read x; exit 8");
    let narrowed = connector.narrow(&[late.id()]);
    assert!(narrowed.is_ok(), "{narrowed:?}");
    assert_eq!(told(&mut connector, late), Told::Status(8 << 8));
}

fn a_teller_says_how_a_process_ended_once_that_has_settled() {
    let proc = Proc::new("/proc");
    let mut teller = Teller::Connector(listen());
    let mut nobody = Teller::Nobody("nobody listens".to_owned());
    let mut child = shell("read x; exit 9");
    let pid = child.id();
    let start_time = match i32::try_from(pid).map(|pid| proc.stat(pid)) {
        Ok(Seen::Present(stat)) => stat.id.start_time,
        other => panic!("{other:?}"),
    };
    let process = record::Process { pid, start_time };
    let pidfd: OwnedFd = open(&proc, process).unwrap_or_else(|why| panic!("{why}"));
    teller.narrow(&[pid]);
    let killed = child.kill();
    assert!(killed.is_ok(), "{killed:?}");
    recoverd_tests::wait_for("a zombie", || {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        stat.contains(") Z ").then_some(())
    });
    // A zombie says it itself, at once, whoever else knows.
    for teller in [&mut teller, &mut nobody] {
        let answer = teller.answer(&proc, process, &pidfd, Duration::ZERO);
        assert_eq!(answer, Answer::Status(137));
    }
    let collected = child.wait();
    assert!(collected.is_ok(), "{collected:?}");
    assert_eq!(
        teller.answer(&proc, process, &pidfd, Duration::ZERO),
        Answer::NotYet
    );
    assert_eq!(
        teller.await_answer(&proc, process, &pidfd),
        Answer::Status(137)
    );
    let answer = nobody.await_answer(&proc, process, &pidfd);
    let why = "its parent has collected it, and nobody listens".to_owned();
    assert_eq!(answer, Answer::Unknown(why));
    // Nobody was there to be told of this one.
    let mut stranger = record::Process {
        pid: u32::MAX >> 1,
        start_time: 1,
    };
    stranger.pid -= 1;
    let answer = teller.answer(&proc, stranger, &pidfd, Duration::from_secs(60));
    assert!(matches!(answer, Answer::Unknown(why) if why.contains("the kernel did not tell")));
}

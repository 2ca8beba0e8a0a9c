//! Adoption by the real binary, without containerd and without containers; see `daemon`.

mod daemon;

use std::{
    fs,
    io::{Read, Write},
    os::{fd::AsFd, unix::net::UnixStream},
    path::Path,
    process::{Command, Output, Stdio},
    time::{Duration, Instant},
};

use daemon::{Daemon, until};
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use prost_types::Any;
use recoverd_common::{
    adoption::{Adopted, AdoptedTask, Adoption},
    paths::Beside,
    pb::task,
    record::{Exit, Phase, Process, Record, version},
    shim_client::{CallError, ShimClient},
};

const NONE: &str = "";

fn signal(process: u32, signal: Signal) {
    kill(Pid::from_raw(i32::try_from(process).unwrap()), signal).unwrap();
}

fn start_time(pid: u32) -> u64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let (_, rest) = stat.rsplit_once(')').unwrap();
    rest.split_ascii_whitespace()
        .nth(19)
        .unwrap()
        .parse()
        .unwrap()
}

fn lives(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ")
        .is_some_and(|(_, rest)| !rest.starts_with(['Z', 'X']))
}

/// The successor of a daemon, ended with the test.
struct Successor {
    adopted: Adopted,
}

impl Successor {
    fn task(&self, id: &str) -> &AdoptedTask {
        let mut tasks = self.adopted.tasks.iter();
        tasks.find(|task| task.id == id).unwrap()
    }
}

impl Drop for Successor {
    fn drop(&mut self) {
        let pid = self.adopted.shim.pid;
        if lives(pid) {
            signal(pid, Signal::SIGKILL);
            until("the successor is gone", || !lives(pid));
        }
    }
}

fn run(daemon: &Daemon, adoption: &Adoption) -> Output {
    let mut verb = Command::new(env!("CARGO_BIN_EXE_containerd-shim-recoverd-v1"))
        .args([
            "-namespace",
            "ns",
            "-id",
            "first",
            "-address",
            "/none",
            "adopt",
        ])
        .current_dir(daemon.dir.path())
        .env_remove("TTRPC_ADDRESS")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = verb.stdin.take().unwrap();
    stdin.write_all(&adoption.encode()).unwrap();
    drop(stdin);
    verb.wait_with_output().unwrap()
}

fn adoption(daemon: &Daemon) -> Adoption {
    Adoption {
        socket: daemon.socket(),
        record: None,
        predecessor: None,
        descriptors: Vec::new(),
        observed: Vec::new(),
    }
}

fn adopt_as(daemon: &Daemon, adoption: &Adoption) -> Successor {
    let output = run(daemon, adoption);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    let adopted = Adopted::decode(&output.stdout).unwrap();
    Successor { adopted }
}

fn adopt(daemon: &Daemon) -> Successor {
    adopt_as(daemon, &adoption(daemon))
}

fn die(daemon: &mut Daemon) {
    daemon.process.kill().unwrap();
    daemon.process.wait().unwrap();
}

fn refused(daemon: &Daemon, adoption: &Adoption, status: i32) -> String {
    let output = run(daemon, adoption);
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(status), "{said}");
    assert!(output.stdout.is_empty());
    assert_eq!(said.lines().count(), 1, "{said}");
    said
}

fn rewrite(daemon: &Daemon, change: impl FnOnce(&mut Record)) {
    let mut record = daemon.recorded();
    change(&mut record);
    let path = Beside::of(&daemon.socket()).record;
    fs::write(path, version::encode(&record)).unwrap();
}

fn state(daemon: &Daemon, id: &str) -> task::StateResponse {
    daemon.client().state(id).unwrap()
}

fn signal_task(daemon: &Daemon, id: &str, exec_id: &str, signal: u32) {
    let kill = task::KillRequest {
        id: id.into(),
        exec_id: exec_id.into(),
        signal,
        ..Default::default()
    };
    daemon.call::<task::ConnectResponse>("Kill", &kill).unwrap();
}

fn exec(daemon: &Daemon, command: &str, stdin: &Path, stdout: &Path) -> Result<(), CallError> {
    let request = task::ExecProcessRequest {
        id: "c".into(),
        exec_id: "e".into(),
        stdin: stdin.to_str().unwrap().into(),
        stdout: stdout.to_str().unwrap().into(),
        spec: Some(Any {
            type_url: String::new(),
            value: format!(r#"{{"args":["{command}"]}}"#).into_bytes(),
        }),
        ..Default::default()
    };
    daemon.call::<task::ConnectResponse>("Exec", &request)?;
    daemon.start("c", "e");
    Ok(())
}

/// An init that ends as the file `end` says, once it is there.
fn waiting(daemon: &Daemon) -> String {
    let end = daemon.dir.path().join("end");
    let end = end.display();
    format!("until [ -e {end} ]; do sleep 0.02; done; . {end}")
}

fn end(daemon: &Daemon, how: &str) {
    let path = daemon.dir.path().join("new");
    fs::write(&path, how).unwrap();
    fs::rename(path, daemon.dir.path().join("end")).unwrap();
}

#[test]
fn the_exit_of_an_adopted_task_is_true_however_it_ends() {
    for (how, status) in [
        ("exit 0", 0),
        ("exit 23", 23),
        ("kill -9 $$", 137),
        ("kill -37 $$", 165),
    ] {
        let mut daemon = Daemon::new();
        let init = daemon
            .create("c", &waiting(&daemon), Path::new(NONE))
            .unwrap();
        daemon.start("c", "");
        let before = start_time(init);
        die(&mut daemon);
        let successor = adopt(&daemon);
        let told = successor.task("c");
        assert_eq!(told.phase, Phase::Running);
        assert_eq!(told.init.unwrap().start_time, before);
        assert_eq!(told.remarks, [""; 0]);
        assert!(lives(init));
        assert_eq!(state(&daemon, "c").status, task::Status::Running as i32);
        let connected = daemon.client().connect_task("c").unwrap();
        assert_eq!(connected.shim_pid, successor.adopted.shim.pid);
        assert_eq!(connected.task_pid, init);
        std::thread::scope(|scope| {
            let waiter = scope.spawn(|| daemon.wait("c", ""));
            end(&daemon, how);
            assert_eq!(waiter.join().unwrap(), status, "{how}");
        });
        let recorded = daemon.recorded().tasks[0].exit.clone();
        assert!(
            matches!(&recorded, Some(Exit::Observed { status: s, .. }) if *s == status),
            "{recorded:?}"
        );
        assert_eq!(daemon.delete("c").unwrap(), status);
        // Whoever adopts again after this finds nothing.
    }
}

#[test]
fn a_successor_is_nobodys_child_and_serves_a_whole_life_anew() {
    let mut daemon = Daemon::new();
    daemon
        .create("c", &waiting(&daemon), Path::new(NONE))
        .unwrap();
    daemon.start("c", "");
    die(&mut daemon);
    let successor = adopt(&daemon);
    let pid = successor.adopted.shim.pid;
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let field = |name: &str| {
        let line = status.lines().find(|line| line.starts_with(name)).unwrap();
        line.split_ascii_whitespace().nth(1).unwrap().to_owned()
    };
    let own = std::process::id().to_string();
    assert_ne!(field("PPid:"), own);
    assert_eq!(field("NSsid:"), pid.to_string());
    for number in 0..2 {
        let link = fs::read_link(format!("/proc/{pid}/fd/{number}")).unwrap();
        assert_eq!(link, Path::new("/dev/null"));
    }
    // What containerd reads at its start.
    let bundle = daemon.bundle("c");
    let address = format!("unix://{}", daemon.socket().display());
    assert_eq!(fs::read_to_string(bundle.join("address")).unwrap(), address);
    let binary = fs::read_to_string(bundle.join("shim-binary-path")).unwrap();
    assert!(binary.ends_with("/containerd-shim-recoverd-v1") && binary.starts_with('/'));
    // New work.
    let out = daemon.fifo("out");
    exec(&daemon, "echo new; exit 5", Path::new(NONE), &out).unwrap();
    let mut text = String::new();
    fs::File::open(&out)
        .unwrap()
        .read_to_string(&mut text)
        .unwrap();
    assert_eq!(text, "new\n");
    assert_eq!(daemon.wait("c", "e"), 5);
    daemon.create("d", "exit 3", Path::new(NONE)).unwrap();
    daemon.start("d", "");
    assert_eq!(daemon.wait("d", ""), 3);
    // And adopted once more, with what ended in between.
    signal(pid, Signal::SIGKILL);
    until("the first successor is gone", || !lives(pid));
    let second = adopt(&daemon);
    assert_eq!(second.task("c").phase, Phase::Running);
    assert_eq!(second.task("d").phase, Phase::Stopped);
    assert_eq!(daemon.delete("d").unwrap(), 3);
    assert_eq!(daemon.wait("c", "e"), 5);
    end(&daemon, "exit 9");
    assert_eq!(daemon.wait("c", ""), 9);
    assert_eq!(daemon.delete("c").unwrap(), 9);
}

#[test]
fn an_exit_that_nobody_saw_is_unknown_and_one_that_was_recorded_is_kept() {
    let mut daemon = Daemon::new();
    let lost = daemon
        .create("c", &waiting(&daemon), Path::new(NONE))
        .unwrap();
    daemon.start("c", "");
    daemon.create("d", "exit 42", Path::new(NONE)).unwrap();
    daemon.start("d", "");
    assert_eq!(daemon.wait("d", ""), 42);
    die(&mut daemon);
    end(&daemon, "exit 7");
    until("it is gone", || {
        !Path::new(&format!("/proc/{lost}")).exists()
    });
    let successor = adopt(&daemon);
    let exit = successor.task("c").exit.clone().unwrap();
    let Exit::Unknown { why } = exit else {
        panic!("{exit:?}")
    };
    assert_eq!(why, "it ended while no shim was there to see it");
    assert_eq!(state(&daemon, "c").status, task::Status::Stopped as i32);
    assert_eq!(daemon.wait("c", ""), 137);
    let recorded = daemon.recorded();
    assert_eq!(recorded.tasks[0].exit, Some(Exit::Unknown { why }));
    assert_eq!(daemon.delete("c").unwrap(), 137);
    assert_eq!(daemon.delete("d").unwrap(), 42);
}

#[test]
fn a_stranger_with_the_pid_is_neither_claimed_nor_signalled() {
    let mut daemon = Daemon::new();
    let init = daemon
        .create("c", "exec sleep 1000", Path::new(NONE))
        .unwrap();
    daemon.start("c", "");
    let boot = daemon
        .create("d", "exec sleep 1000", Path::new(NONE))
        .unwrap();
    die(&mut daemon);
    rewrite(&daemon, |record| {
        let process = record.tasks[0].init.as_mut().unwrap();
        process.start_time += 1;
        record.tasks[1].cgroup = vec!["4:memory:/elsewhere".into()];
    });
    let successor = adopt(&daemon);
    for (id, text) in [("c", "another process"), ("d", "not in the cgroup")] {
        let exit = successor.task(id).exit.clone();
        assert!(
            matches!(&exit, Some(Exit::Unknown { why }) if why.contains(text)),
            "{exit:?}"
        );
        let kill = task::KillRequest {
            id: id.into(),
            signal: 9,
            ..Default::default()
        };
        let refused = daemon.call::<task::ConnectResponse>("Kill", &kill);
        assert!(refused.is_err());
        daemon.delete(id).unwrap();
    }
    for pid in [init, boot] {
        assert!(lives(pid));
        signal(pid, Signal::SIGKILL);
    }
}

#[test]
fn another_boots_processes_are_nobodys() {
    let mut daemon = Daemon::new();
    let init = daemon
        .create("c", "exec sleep 1000", Path::new(NONE))
        .unwrap();
    daemon.start("c", "");
    die(&mut daemon);
    rewrite(&daemon, |record| record.boot_id = "another".into());
    let successor = adopt(&daemon);
    let exit = successor.task("c").exit.clone();
    assert!(
        matches!(&exit, Some(Exit::Unknown { why }) if why.contains("booted")),
        "{exit:?}"
    );
    assert!(lives(init));
    signal(init, Signal::SIGKILL);
}

#[test]
fn a_living_exec_is_found_again_with_its_stdio() {
    let mut daemon = Daemon::new();
    daemon
        .create("c", "exec sleep 1000", Path::new(NONE))
        .unwrap();
    daemon.start("c", "");
    let (stdin, stdout) = (daemon.fifo("in"), daemon.fifo("out"));
    let mut reader = fs::File::options()
        .read(true)
        .write(true)
        .open(&stdout)
        .unwrap();
    // It reads nothing while its stdin has no writer.
    let go = daemon.dir.path().join("go-on");
    let command = format!(
        "echo before; until [ -e {} ]; do sleep 0.02; done; read line; echo got $line; exit 6",
        go.display()
    );
    exec(&daemon, &command, &stdin, &stdout).unwrap();
    let mut client = fs::File::options()
        .read(true)
        .write(true)
        .open(&stdin)
        .unwrap();
    let mut text = [0; 7];
    reader.read_exact(&mut text).unwrap();
    assert_eq!(&text, b"before\n");
    die(&mut daemon);
    let successor = adopt(&daemon);
    assert_eq!(successor.task("c").remarks, [""; 0]);
    fs::write(&go, "").unwrap();
    client.write_all(b"a line\n").unwrap();
    let mut text = [0; 11];
    reader.read_exact(&mut text).unwrap();
    assert_eq!(&text, b"got a line\n");
    assert_eq!(daemon.wait("c", "e"), 6);
}

#[test]
fn numbered_lines_arrive_whole_and_in_order_over_two_adoptions() {
    let mut daemon = Daemon::new();
    let fifo = daemon.fifo("out");
    let init = format!(
        "n=0; until [ -e {}/end ]; do n=$((n+1)); echo line $n; done; exit 4",
        daemon.dir.path().display()
    );
    let reader = std::thread::spawn(move || {
        let mut text = String::new();
        fs::File::open(&fifo)
            .unwrap()
            .read_to_string(&mut text)
            .unwrap();
        text
    });
    let fifo = daemon.dir.path().join("out");
    daemon.create("c", &init, &fifo).unwrap();
    daemon.start("c", "");
    std::thread::sleep(Duration::from_millis(100));
    die(&mut daemon);
    let first = adopt(&daemon);
    std::thread::sleep(Duration::from_millis(100));
    drop(first);
    let _second = adopt(&daemon);
    end(&daemon, "");
    assert_eq!(daemon.wait("c", ""), 4);
    let text = reader.join().unwrap();
    let mut count = 0;
    for (expected, line) in (1..).zip(text.lines()) {
        assert_eq!(line, format!("line {expected}"));
        count = expected;
    }
    assert!(count > 100, "{count}");
    assert_eq!(daemon.delete("c").unwrap(), 4);
}

#[test]
fn last_words_of_an_adopted_task_wait_for_a_reader() {
    let mut daemon = Daemon::new();
    let fifo = daemon.fifo("out");
    daemon.create("c", &waiting(&daemon), &fifo).unwrap();
    daemon.start("c", "");
    die(&mut daemon);
    let _successor = adopt(&daemon);
    end(&daemon, "echo last words");
    assert_eq!(daemon.wait("c", ""), 0);
    let mut text = String::new();
    fs::File::open(&fifo)
        .unwrap()
        .read_to_string(&mut text)
        .unwrap();
    assert_eq!(text, "last words\n");
    let before = Instant::now();
    assert_eq!(daemon.delete("c").unwrap(), 0);
    assert!(before.elapsed() < Duration::from_secs(5));
}

/// An exec that has written a line to `stdout`, which nobody reads; and what holds that.
fn unread(daemon: &Daemon, stdout: &Path, command: &str) -> u32 {
    daemon
        .create("c", "exec sleep 1000", Path::new(NONE))
        .unwrap();
    daemon.start("c", "");
    let command = format!("echo unread; {command}");
    exec(daemon, &command, Path::new(NONE), stdout).unwrap();
    let fifo = fs::File::options()
        .read(true)
        .write(true)
        .open(stdout)
        .unwrap();
    until("the line is in the fifo", || {
        let mut ready = [PollFd::new(fifo.as_fd(), PollFlags::POLLIN)];
        poll(&mut ready, PollTimeout::ZERO).unwrap() == 1
    });
    let execs = &daemon.recorded().tasks[0].execs;
    execs[0].stdio.holders[0].pid
}

#[test]
fn what_an_exec_wrote_is_kept_without_a_shim_and_without_a_reader() {
    let mut daemon = Daemon::new();
    let stdout = daemon.fifo("out");
    let go = daemon.dir.path().join("go-on");
    let go = format!(
        "until [ -e {} ]; do sleep 0.02; done; echo more",
        go.display()
    );
    let holder = unread(&daemon, &stdout, &go);
    die(&mut daemon);
    // What would go at once has gone by then.
    std::thread::sleep(Duration::from_millis(200));
    assert!(lives(holder));
    let _successor = adopt(&daemon);
    until("it is relieved", || !lives(holder));
    fs::write(daemon.dir.path().join("go-on"), "").unwrap();
    let mut text = String::new();
    fs::File::open(&stdout)
        .unwrap()
        .read_to_string(&mut text)
        .unwrap();
    assert_eq!(text, "unread\nmore\n");
    assert_eq!(daemon.wait("c", "e"), 0);
}

#[test]
fn what_holds_an_output_goes_when_all_of_it_is_read_or_it_has_no_name_any_more() {
    for removed in [false, true] {
        let mut daemon = Daemon::new();
        let stdout = daemon.fifo("out");
        let holder = unread(&daemon, &stdout, "exec sleep 1000");
        let sleeper = daemon.recorded().tasks[0].execs[0].process.unwrap().pid;
        die(&mut daemon);
        if removed {
            fs::remove_file(&stdout).unwrap();
        } else {
            let mut reader = fs::File::open(&stdout).unwrap();
            let mut text = [0; 7];
            reader.read_exact(&mut text).unwrap();
            assert_eq!(&text, b"unread\n");
            assert!(lives(holder), "there is a reader");
        }
        until("it goes", || !lives(holder));
        signal(sleeper, Signal::SIGKILL);
    }
}

#[test]
fn a_killed_copier_has_another_one_come_after_it_whoever_started_it() {
    let mut daemon = Daemon::new();
    daemon
        .create("c", "exec sleep 1000", Path::new(NONE))
        .unwrap();
    daemon.start("c", "");
    let folder = daemon.dir.path().to_owned();
    let log = folder.join("log");
    let line = |n: u32| {
        let file = folder.join(format!("line-{n}"));
        format!(
            "until [ -e {0} ]; do sleep 0.02; done; echo {n}; ",
            file.display()
        )
    };
    let lines: String = (0..4).map(line).collect();
    let uri = format!("file://{}", log.display());
    let command = format!("{lines} exit 6");
    exec(&daemon, &command, Path::new(NONE), Path::new(&uri)).unwrap();
    let copier = |daemon: &Daemon| {
        let execs = &daemon.recorded().tasks[0].execs;
        execs[0]
            .stdio
            .logger
            .as_ref()
            .map(|logger| logger.process.pid)
    };
    let mut expected = String::new();
    let mut comes = |n: u32| {
        fs::write(folder.join(format!("line-{n}")), "").unwrap();
        expected += &format!("{n}\n");
        until("the line is there", || {
            fs::read_to_string(&log).is_ok_and(|text| text == expected)
        });
    };
    let killed = |daemon: &Daemon| {
        let before = copier(daemon).unwrap();
        signal(before, Signal::SIGKILL);
        until("another copier", || {
            copier(daemon).is_some_and(|now| now != before && lives(now))
        });
    };
    comes(0);
    killed(&daemon);
    comes(1);
    die(&mut daemon);
    let _successor = adopt(&daemon);
    // Not the successor's child.
    killed(&daemon);
    comes(2);
    killed(&daemon);
    comes(3);
    assert_eq!(daemon.wait("c", "e"), 6);
}

#[test]
fn what_holds_the_output_of_a_deleted_exec_is_ended() {
    let mut daemon = Daemon::new();
    daemon
        .create("c", "exec sleep 1000", Path::new(NONE))
        .unwrap();
    daemon.start("c", "");
    die(&mut daemon);
    let sleeper = || Command::new("sleep").arg("1000").spawn().unwrap();
    let (mut stray, mut stranger) = (sleeper(), sleeper());
    let process = |pid: u32, other: u64| Process {
        pid,
        start_time: start_time(pid) + other,
    };
    rewrite(&daemon, |record| {
        record.strays = vec![process(stranger.id(), 1), process(stray.id(), 0)];
    });
    let _successor = adopt(&daemon);
    stray.wait().unwrap();
    assert_eq!(daemon.recorded().strays, []);
    assert!(stranger.try_wait().unwrap().is_none());
    stranger.kill().unwrap();
    stranger.wait().unwrap();
}

#[test]
fn whoever_answers_is_left_alone() {
    let daemon = Daemon::new();
    let init = daemon
        .create("c", "exec sleep 1000", Path::new(NONE))
        .unwrap();
    daemon.start("c", "");
    let record = daemon.recorded();
    let said = refused(&daemon, &adoption(&daemon), 3);
    assert!(said.contains("answers"), "{said}");
    assert_eq!(daemon.recorded(), record);
    let connected = daemon.client().connect_task("c").unwrap();
    assert_eq!(connected.shim_pid, daemon.process.id());
    assert!(lives(init));
}

#[test]
fn one_of_several_adopters_wins() {
    let mut daemon = Daemon::new();
    daemon
        .create("c", "exec sleep 1000", Path::new(NONE))
        .unwrap();
    daemon.start("c", "");
    die(&mut daemon);
    let outputs: Vec<Output> = std::thread::scope(|scope| {
        let start = |_| scope.spawn(|| run(&daemon, &adoption(&daemon)));
        let threads: Vec<_> = (0..4).map(start).collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    });
    let mut winners: Vec<Successor> = Vec::new();
    for output in outputs {
        match output.status.code() {
            Some(0) => winners.push(Successor {
                adopted: Adopted::decode(&output.stdout).unwrap(),
            }),
            other => assert_eq!(
                other,
                Some(3),
                "{}",
                String::from_utf8_lossy(&output.stderr)
            ),
        }
    }
    assert_eq!(winners.len(), 1);
    let connected = daemon.client().connect_task("c").unwrap();
    assert_eq!(connected.shim_pid, winners[0].adopted.shim.pid);
}

#[test]
fn a_bad_record_and_a_bad_message_are_refused_and_nothing_is_touched() {
    let mut daemon = Daemon::new();
    let init = daemon
        .create("c", "exec sleep 1000", Path::new(NONE))
        .unwrap();
    daemon.start("c", "");
    die(&mut daemon);
    let path = Beside::of(&daemon.socket()).record;
    let good = fs::read(&path).unwrap();
    for (bad, text) in [
        (&good[..100], "is not a record"),
        (b"".as_slice(), "is not a record"),
        (b"{\"format\":99}", "newer"),
        (b"{\"format\":1}", "format 1"),
    ] {
        fs::write(&path, bad).unwrap();
        let said = refused(&daemon, &adoption(&daemon), 1);
        assert!(said.contains(text), "{said}");
        assert_eq!(fs::read(&path).unwrap(), bad);
    }
    fs::remove_file(&path).unwrap();
    assert!(refused(&daemon, &adoption(&daemon), 1).contains("does not exist"));
    fs::write(&path, &good).unwrap();
    rewrite(&daemon, |record| record.shim.namespace = "other".into());
    assert!(refused(&daemon, &adoption(&daemon), 1).contains("namespace"));
    fs::write(&path, &good).unwrap();
    rewrite(&daemon, |record| record.tasks.clear());
    assert!(refused(&daemon, &adoption(&daemon), 3).contains("no task"));
    fs::write(&path, &good).unwrap();
    assert!(UnixStream::connect(daemon.socket()).is_err() && lives(init));
    let successor = adopt(&daemon);
    assert_eq!(successor.task("c").phase, Phase::Running);
}

#[test]
fn a_stopped_predecessor_is_robbed_ended_and_replaced() {
    let mut daemon = Daemon::new();
    daemon
        .create("c", "exec sleep 1000", Path::new(NONE))
        .unwrap();
    daemon.start("c", "");
    let (stdin, stdout) = (daemon.fifo("in"), daemon.fifo("out"));
    let mut reader = fs::File::options()
        .read(true)
        .write(true)
        .open(&stdout)
        .unwrap();
    exec(
        &daemon,
        "while read line; do echo got $line; done; exit 8",
        &stdin,
        &stdout,
    )
    .unwrap();
    let mut client = fs::File::options()
        .read(true)
        .write(true)
        .open(&stdin)
        .unwrap();
    let pid = daemon.process.id();
    signal(pid, Signal::SIGSTOP);
    // Not named: it may be on the way to answer.
    let said = refused(&daemon, &adoption(&daemon), 1);
    assert!(said.contains("does not answer"), "{said}");
    let named = Adoption {
        predecessor: Some(Process {
            pid,
            start_time: start_time(pid),
        }),
        ..adoption(&daemon)
    };
    let successor = adopt_as(&daemon, &named);
    daemon.process.wait().unwrap();
    assert_eq!(successor.adopted.remarks, [""; 0]);
    // Its stdin never ended, and its output goes on.
    client.write_all(b"a line\n").unwrap();
    let mut text = [0; 11];
    reader.read_exact(&mut text).unwrap();
    assert_eq!(&text, b"got a line\n");
    let close = task::CloseIoRequest {
        id: "c".into(),
        exec_id: "e".into(),
        stdin: true,
    };
    daemon
        .call::<task::ConnectResponse>("CloseIO", &close)
        .unwrap();
    assert_eq!(daemon.wait("c", "e"), 8);
    signal_task(&daemon, "c", "", 15);
    assert_eq!(daemon.wait("c", ""), 143);
    let lock = Beside::of(&daemon.socket()).lock;
    assert!(lock.exists() && !lock.with_extension("lock.next").exists());
    let mut client = ShimClient::connect(&daemon.socket(), "ns", daemon::patience()).unwrap();
    assert!(client.connect_task("c").is_ok());
}

#[test]
fn a_start_in_the_group_of_a_dead_shim_adopts_its_tasks() {
    let run = |dir: &Path, id: &str| {
        let bundle = dir.join(id);
        fs::create_dir_all(&bundle).unwrap();
        let config = r#"{"annotations":{"io.kubernetes.cri.sandbox-id":"pod"}}"#;
        fs::write(bundle.join("config.json"), config).unwrap();
        Command::new(env!("CARGO_BIN_EXE_containerd-shim-recoverd-v1"))
            .args(["-namespace", "ns", "-id", id, "-address", "/none", "start"])
            .current_dir(&bundle)
            .stdin(Stdio::null())
            .output()
            .unwrap()
    };
    let mut daemon = Daemon::new();
    let init = daemon
        .create("c", "exec sleep 1000", Path::new(NONE))
        .unwrap();
    daemon.start("c", "");
    die(&mut daemon);
    // Where `start` looks; the name is of this test's namespace and pod.
    let group = recoverd_common::paths::socket_name("/none", "ns", "pod");
    let socket = Path::new(recoverd_common::paths::SOCKET_DIR).join(group);
    fs::create_dir_all(recoverd_common::paths::SOCKET_DIR).unwrap();
    let record = Beside::of(&socket).record;
    fs::copy(Beside::of(&daemon.socket()).record, &record).unwrap();
    let output = run(daemon.dir.path(), "second");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    let address = format!("unix://{}", socket.display());
    assert_eq!(String::from_utf8_lossy(&output.stdout), address);
    let mut client = ShimClient::connect(&socket, "ns", daemon::patience()).unwrap();
    let connected = client.connect_task("c").unwrap();
    assert_eq!(connected.task_pid, init);
    signal(connected.shim_pid, Signal::SIGKILL);
    until("it is gone", || !lives(connected.shim_pid));
    for entry in fs::read_dir(recoverd_common::paths::SOCKET_DIR).unwrap() {
        let path = entry.unwrap().path();
        if path
            .to_string_lossy()
            .starts_with(&*socket.to_string_lossy())
        {
            fs::remove_file(path).unwrap();
        }
    }
}

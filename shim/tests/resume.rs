//! A shim dies, somebody has kept its descriptors, and a successor goes on: its clients see
//! nothing but their answers. By the real binary; this process is the keeper. See `daemon`.

mod daemon;

use std::{
    fs,
    io::{Read, Write},
    os::unix::{
        fs::{MetadataExt, OpenOptionsExt},
        net::UnixStream,
    },
    path::Path,
    thread,
};

use daemon::{
    Daemon,
    keeper::{
        Call, adopt, asked, begin, calls, die, end, half_read, keep, settled, slow, wait, waiting,
    },
    raw::{answered, frame},
    until,
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use prost_types::Any;
use recoverd_common::{
    pb::task,
    shim_client::{CallError, ShimClient},
    ttrpc::code,
};

const NONE: &str = "";

fn refused<R: std::fmt::Debug>(result: Result<R, CallError>, what: &str) {
    match result {
        Err(CallError::Status { code, message }) => {
            assert_eq!(code, code::UNAVAILABLE, "{message}");
            assert!(message.contains(what), "{message}");
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn clients_of_a_shim_that_died_twice_see_nothing_but_their_answers() {
    let mut daemon = Daemon::new();
    let init = waiting(&daemon);
    daemon.create("c", &init, Path::new(NONE)).unwrap();
    daemon.start("c", "");
    let blocked: Call<task::WaitResponse> = begin(&daemon, "Wait", wait("c", ""));
    let mut idle = daemon.client();
    idle.state("c").unwrap();
    // Half a request, and with it one that is whole.
    let mut raw = UnixStream::connect(daemon.socket()).unwrap();
    let connect = task::ConnectRequest { id: "c".into() };
    let (one, two) = (frame(1, "Connect", &connect), frame(3, "Connect", &connect));
    raw.write_all(&[&one[..], &two[..20]].concat()).unwrap();
    assert_eq!(answered(&mut raw), 1);
    settled(&daemon);
    let inode = fs::metadata(daemon.socket()).unwrap().ino();

    let kept = die(&mut daemon);
    // Whoever comes now waits for the successor.
    let mut late = ShimClient::connect(&daemon.socket(), "ns", daemon::patience()).unwrap();
    let first = adopt(&daemon, &kept);
    drop(kept);
    assert_eq!(late.connect_task("c").unwrap().shim_pid, first.0.shim.pid);
    assert_eq!(fs::metadata(daemon.socket()).unwrap().ino(), inode);
    idle.state("c").unwrap();
    raw.write_all(&two[20..]).unwrap();
    assert_eq!(answered(&mut raw), 3);

    // The successor is no different.
    let kept = keep(first.0.shim.pid);
    drop(first);
    let second = adopt(&daemon, &kept);
    drop(kept);
    assert_eq!(idle.connect_task("c").unwrap().shim_pid, second.0.shim.pid);
    end(&daemon);
    let response = blocked.join().unwrap().unwrap();
    assert_eq!(response.exit_status, 23);
    assert_eq!(daemon.delete("c").unwrap(), 23);
    until("no request is left", || asked(&daemon, "") == 0);
}

#[test]
fn a_request_that_comes_while_nobody_serves_is_served_once() {
    let mut daemon = Daemon::new();
    let init = waiting(&daemon);
    daemon.create("c", &init, Path::new(NONE)).unwrap();
    daemon.start("c", "");
    let mut raw = UnixStream::connect(daemon.socket()).unwrap();
    let connect = task::ConnectRequest { id: "c".into() };
    raw.write_all(&frame(1, "Connect", &connect)).unwrap();
    assert_eq!(answered(&mut raw), 1);
    settled(&daemon);
    let kept = die(&mut daemon);
    raw.write_all(&frame(3, "Wait", &wait("c", ""))).unwrap();
    raw.write_all(&frame(5, "Connect", &connect)).unwrap();
    let _successor = adopt(&daemon, &kept);
    drop(kept);
    assert_eq!(answered(&mut raw), 5);
    end(&daemon);
    assert_eq!(answered(&mut raw), 3);
    raw.write_all(&frame(7, "Connect", &connect)).unwrap();
    assert_eq!(answered(&mut raw), 7, "nothing was answered twice");
}

#[test]
fn an_exit_between_two_shims_is_told_to_who_waits() {
    let mut daemon = Daemon::new();
    let init = waiting(&daemon);
    let pid = daemon.create("c", &init, Path::new(NONE)).unwrap();
    daemon.start("c", "");
    let blocked: Call<task::WaitResponse> = begin(&daemon, "Wait", wait("c", ""));
    let kept = die(&mut daemon);
    end(&daemon);
    until("it has ended", || {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        !stat.contains(") S") && !stat.contains(") R")
    });
    let _successor = adopt(&daemon, &kept);
    let status = blocked.join().unwrap().unwrap().exit_status;
    // Who has collected it may have kept its status for himself.
    assert!(matches!(status, 23 | 137), "{status}");
}

#[test]
fn a_start_under_way_is_finished_and_answered() {
    let mut daemon = Daemon::new();
    let init = waiting(&daemon);
    let pid = daemon.create("c", &init, Path::new(NONE)).unwrap();
    let slow = slow(&daemon, "c", "start");
    let request = task::StartRequest {
        id: "c".into(),
        exec_id: String::new(),
    };
    let start: Call<task::StartResponse> = begin(&daemon, "Start", request);
    until("it runs", || calls(&daemon, "c", "start") == 1);
    let kept = die(&mut daemon);
    fs::remove_file(slow).unwrap();
    let _successor = adopt(&daemon, &kept);
    assert_eq!(start.join().unwrap().unwrap().pid, pid);
    end(&daemon);
    assert_eq!(daemon.wait("c", ""), 23);
    assert_eq!(calls(&daemon, "c", "start"), 1);
}

#[test]
fn a_start_that_failed_meanwhile_is_refused_and_can_be_tried_again() {
    let mut daemon = Daemon::new();
    let init = waiting(&daemon);
    daemon.create("c", &init, Path::new(NONE)).unwrap();
    let slow = slow(&daemon, "c", "start");
    let fails = daemon.bundle("c").join("fail-start");
    fs::write(&fails, "").unwrap();
    let request = task::StartRequest {
        id: "c".into(),
        exec_id: String::new(),
    };
    let start: Call<task::StartResponse> = begin(&daemon, "Start", request);
    until("it runs", || calls(&daemon, "c", "start") == 1);
    let kept = die(&mut daemon);
    fs::remove_file(slow).unwrap();
    let _successor = adopt(&daemon, &kept);
    refused(start.join().unwrap(), "starting");
    fs::remove_file(fails).unwrap();
    daemon.start("c", "");
    end(&daemon);
    assert_eq!(daemon.wait("c", ""), 23);
}

#[test]
fn a_create_under_way_is_undone_and_refused() {
    let mut daemon = Daemon::new();
    let init = waiting(&daemon);
    // Something that lives, so that there is somebody to be adopted anyway.
    daemon.create("other", &init, Path::new(NONE)).unwrap();
    let slow = slow(&daemon, "c", "create");
    let create = thread::scope(|scope| {
        let create = scope.spawn(|| daemon.create("c", "exit 0", Path::new(NONE)));
        until("it runs", || calls(&daemon, "c", "create") == 1);
        let kept = keep(daemon.process.id());
        kill(
            Pid::from_raw(i32::try_from(daemon.process.id()).unwrap()),
            Signal::SIGKILL,
        )
        .unwrap();
        until("it is dead", || {
            let stat = fs::read_to_string(format!("/proc/{}/stat", daemon.process.id()));
            stat.unwrap().contains(") Z")
        });
        fs::remove_file(slow).unwrap();
        let successor = adopt(&daemon, &kept);
        (create.join().unwrap(), successor)
    });
    daemon.process.wait().unwrap();
    refused(create.0, "creating");
    assert_eq!(calls(&daemon, "c", "create"), 1);
    assert_eq!(calls(&daemon, "c", "delete"), 1);
    // Clean enough for another try.
    daemon.create("c", "exit 7", Path::new(NONE)).unwrap();
    daemon.start("c", "");
    assert_eq!(daemon.wait("c", ""), 7);
}

#[test]
fn a_delete_under_way_is_finished_with_the_true_status() {
    let mut daemon = Daemon::new();
    daemon.create("c", "exit 23", Path::new(NONE)).unwrap();
    daemon.create("other", "exit 0", Path::new(NONE)).unwrap();
    daemon.start("c", "");
    assert_eq!(daemon.wait("c", ""), 23);
    let slow = slow(&daemon, "c", "delete");
    let request = task::DeleteRequest {
        id: "c".into(),
        exec_id: String::new(),
    };
    let delete: Call<task::DeleteResponse> = begin(&daemon, "Delete", request);
    until("it runs", || calls(&daemon, "c", "delete") == 1);
    let kept = die(&mut daemon);
    fs::remove_file(slow).unwrap();
    let _successor = adopt(&daemon, &kept);
    assert_eq!(delete.join().unwrap().unwrap().exit_status, 23);
    assert!(daemon.client().state("c").is_err());
}

#[test]
fn an_exec_goes_on_and_one_that_was_being_started_is_answered() {
    let mut daemon = Daemon::new();
    let init = waiting(&daemon);
    daemon.create("c", &init, Path::new(NONE)).unwrap();
    daemon.start("c", "");
    let stdout = daemon.fifo("out");
    let stdin = daemon.fifo("in");
    let exec = |exec_id: &str, command: &str| task::ExecProcessRequest {
        id: "c".into(),
        exec_id: exec_id.into(),
        stdin: stdin.to_str().unwrap().into(),
        stdout: stdout.to_str().unwrap().into(),
        spec: Some(Any {
            type_url: String::new(),
            value: format!(r#"{{"args":["{command}"]}}"#).into_bytes(),
        }),
        ..Default::default()
    };
    let adding = exec("e", "read a; echo got $a; read b; echo got $b; exit 5");
    daemon
        .call::<task::ConnectResponse>("Exec", &adding)
        .unwrap();
    daemon.start("c", "e");
    let blocked: Call<task::WaitResponse> = begin(&daemon, "Wait", wait("c", "e"));
    let mut writer = fs::File::options().write(true).open(&stdin).unwrap();
    let mut reader = fs::File::options().read(true).open(&stdout).unwrap();
    writer.write_all(b"one\n").unwrap();
    let mut text = [0; 8];
    reader.read_exact(&mut text).unwrap();
    assert_eq!(&text, b"got one\n");
    let other = task::ExecProcessRequest {
        stdin: String::new(),
        stdout: String::new(),
        ..exec("late", "exit 9")
    };
    daemon
        .call::<task::ConnectResponse>("Exec", &other)
        .unwrap();
    let slow = slow(&daemon, "c", "exec");
    let request = task::StartRequest {
        id: "c".into(),
        exec_id: "late".into(),
    };
    let start: Call<task::StartResponse> = begin(&daemon, "Start", request);
    until("it runs", || calls(&daemon, "c", "exec") == 2);
    // The clients' fifos among them, which only the shim had: who writes now meets no end.
    let kept = die(&mut daemon);
    fs::remove_file(slow).unwrap();
    let _successor = adopt(&daemon, &kept);
    drop(kept);
    assert!(start.join().unwrap().unwrap().pid > 0);
    writer.write_all(b"two\n").unwrap();
    reader.read_exact(&mut text).unwrap();
    assert_eq!(&text, b"got two\n");
    assert_eq!(blocked.join().unwrap().unwrap().exit_status, 5);
    assert_eq!(reader.read(&mut text).unwrap(), 0, "its output has ended");
}

#[test]
fn what_an_exec_wrote_last_while_nobody_served_reaches_its_client() {
    let mut daemon = Daemon::new();
    let init = waiting(&daemon);
    daemon.create("c", &init, Path::new(NONE)).unwrap();
    daemon.start("c", "");
    let (stdout, stderr, go) = (daemon.fifo("out"), daemon.fifo("err"), daemon.dir.path());
    let go = go.join("go");
    let command = format!(
        "until [ -e {} ]; do sleep 0.02; done; echo said; echo also >&2; exit 5",
        go.display()
    );
    let exec = task::ExecProcessRequest {
        id: "c".into(),
        exec_id: "e".into(),
        stdout: stdout.to_str().unwrap().into(),
        stderr: stderr.to_str().unwrap().into(),
        spec: Some(Any {
            type_url: String::new(),
            value: format!(r#"{{"args":["{command}"]}}"#).into_bytes(),
        }),
        ..Default::default()
    };
    daemon.call::<task::ConnectResponse>("Exec", &exec).unwrap();
    daemon.start("c", "e");
    let pid = daemon.recorded().tasks[0].execs[0].process.unwrap().pid;
    let kept = die(&mut daemon);
    fs::write(&go, "").unwrap();
    until("it has ended", || {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        !stat.contains(") S") && !stat.contains(") R")
    });
    let _successor = adopt(&daemon, &kept);
    drop(kept);
    daemon.wait("c", "e");
    for (path, expected) in [(&stdout, "said\n"), (&stderr, "also\n")] {
        let mut options = fs::File::options();
        let options = options.read(true).custom_flags(nix::libc::O_NONBLOCK);
        let mut text = vec![0; expected.len()];
        options.open(path).unwrap().read_exact(&mut text).unwrap();
        assert_eq!(text, expected.as_bytes());
    }
    let request = task::DeleteRequest {
        id: "c".into(),
        exec_id: "e".into(),
    };
    daemon
        .call::<task::DeleteResponse>("Delete", &request)
        .unwrap();
}

#[test]
fn the_rest_of_a_giant_request_is_not_taken_for_requests() {
    let mut daemon = Daemon::new();
    let init = waiting(&daemon);
    daemon.create("c", &init, Path::new(NONE)).unwrap();
    daemon.start("c", "");
    let mut raw = UnixStream::connect(daemon.socket()).unwrap();
    let giant = task::ConnectRequest {
        id: "x".repeat(300_000),
    };
    let bytes = frame(1, "Connect", &giant);
    raw.write_all(&bytes[..150_000]).unwrap();
    until("it has begun", || half_read(&daemon));
    let kept = die(&mut daemon);
    let _successor = adopt(&daemon, &kept);
    let timeout = std::time::Duration::from_secs(20);
    raw.set_read_timeout(Some(timeout)).unwrap();
    assert_eq!(raw.read(&mut [0; 1]).unwrap(), 0, "it is announced");
    // Whole, it is served as any other.
    let mut raw = UnixStream::connect(daemon.socket()).unwrap();
    raw.write_all(&bytes).unwrap();
    assert_eq!(answered(&mut raw), 1);
}

#[test]
fn wrong_descriptors_are_refused_or_closed() {
    let mut daemon = Daemon::new();
    let init = waiting(&daemon);
    daemon.create("c", &init, Path::new(NONE)).unwrap();
    daemon.start("c", "");
    let blocked: Call<task::WaitResponse> = begin(&daemon, "Wait", wait("c", ""));
    let mut kept = die(&mut daemon);
    let (pair, _other) = UnixStream::pair().unwrap();
    kept.push(pair.into());
    kept.push(fs::File::open("/dev/null").unwrap().into());
    let _successor = adopt(&daemon, &kept);
    drop(kept);
    end(&daemon);
    assert_eq!(blocked.join().unwrap().unwrap().exit_status, 23);
}

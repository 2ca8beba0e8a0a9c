//! The daemon itself, without containerd and without containers: a shell script stands in for
//! the OCI runtime, so that these run anywhere and as anybody.

use std::{
    fs,
    io::{BufRead, Read, Write},
    os::unix::{
        ffi::OsStrExt,
        fs::MetadataExt,
        net::{UnixListener, UnixStream},
    },
    path::Path,
    thread,
    time::Duration,
};

use prost::Message;
use prost_types::Any;
use recoverd_common::{
    pb::{task, ttrpc as envelope},
    record::{Exit, Phase},
};

mod daemon;
mod logged;

use daemon::{
    Daemon,
    keeper::keep,
    raw::{acknowledge, read_frame},
    until,
};
use logged::logged;

#[test]
fn what_is_answered_is_in_the_record_and_the_last_shutdown_leaves_only_events() {
    let mut daemon = Daemon::new();
    let pid = daemon.create("c", "exit 42", Path::new("")).unwrap();
    assert_eq!(daemon.recorded().tasks[0].init.unwrap().pid, pid);
    daemon.start("c", "");
    assert_eq!(daemon.wait("c", ""), 42);
    let task = daemon.recorded().tasks[0].clone();
    assert_eq!(task.phase, Phase::Stopped);
    assert!(matches!(
        task.exit,
        Some(Exit::Observed {
            status: 42,
            oom: false,
            ..
        })
    ));
    // A stopped task has its init's pid, or containerd would drop it.
    let pids: task::PidsResponse = daemon
        .call("Pids", &task::PidsRequest { id: "c".into() })
        .unwrap();
    assert_eq!(pids.processes[0].pid, pid);
    assert_eq!(daemon.delete("c").unwrap(), 42);
    assert!(daemon.recorded().tasks.is_empty());
    // Nobody takes its events, so the shim stays to tell them, and they stay on disk; its other
    // files go all the same.
    daemon
        .call::<task::ConnectResponse>("Shutdown", &task::ShutdownRequest::default())
        .unwrap();
    let files = ["socket", "socket.record", "socket.lock", "socket.events"];
    let left = files.map(|name| daemon.dir.path().join(name).exists());
    assert_eq!(left, [false, false, false, true]);
    assert!(daemon.process.try_wait().unwrap().is_none());
}

#[test]
fn a_failed_create_says_why_and_leaves_no_task() {
    let daemon = Daemon::new();
    let bundle = daemon.bundle("c");
    fs::create_dir_all(&bundle).unwrap();
    fs::write(bundle.join("fail"), "").unwrap();
    let refused = daemon.create("c", "", Path::new("")).unwrap_err();
    let text = refused.to_string();
    assert!(
        text.contains("OCI runtime create failed: it is written that this fails"),
        "{text}"
    );
    let missing = daemon
        .create("d", "", &daemon.dir.path().join("none"))
        .unwrap_err();
    assert!(missing.to_string().contains("No such file"), "{missing}");
    assert!(daemon.recorded().tasks.is_empty());
    fs::remove_file(bundle.join("fail")).unwrap();
    daemon.create("c", "exit 0", Path::new("")).unwrap();
}

#[test]
fn an_environment_that_is_no_text_reaches_the_runtime_as_it_is() {
    let daemon = Daemon::with(|command| {
        command.env("BAD", std::ffi::OsStr::from_bytes(b"\xff"));
    });
    let out = daemon.dir.path().join("out");
    let init = format!("printf %s \"$BAD\" > {}", out.display());
    daemon.create("c", &init, Path::new("")).unwrap();
    daemon.start("c", "");
    assert_eq!(daemon.wait("c", ""), 0);
    assert_eq!(fs::read(&out).unwrap(), b"\xff");
}

#[test]
fn a_runtime_that_hangs_holds_up_nobody_else() {
    let daemon = Daemon::new();
    daemon
        .create("c", "exec sleep 1000", Path::new(""))
        .unwrap();
    fs::create_dir_all(daemon.bundle("h")).unwrap();
    fs::write(daemon.bundle("h").join("hang"), "").unwrap();
    thread::scope(|scope| {
        let hanging = scope.spawn(|| daemon.create("h", "", Path::new("")));
        until("it hangs", || daemon.recorded().running.len() == 1);
        let state = daemon.client().state("c").unwrap();
        assert_eq!(state.status, task::Status::Created as i32);
        assert!(!hanging.is_finished());
        let child = daemon.recorded().running[0].process.unwrap();
        let pid = nix::unistd::Pid::from_raw(i32::try_from(child.pid).unwrap());
        nix::sys::signal::killpg(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
        assert!(hanging.join().unwrap().is_err());
    });
    let state = daemon.client().state("c").unwrap();
    let kill = task::KillRequest {
        id: "c".into(),
        signal: 37,
        ..Default::default()
    };
    // A real-time signal, which no table of names has.
    daemon.call::<task::ConnectResponse>("Kill", &kill).unwrap();
    assert_eq!(daemon.wait("c", ""), 128 + 37);
    assert_ne!(state.pid, 0);
}

#[test]
fn last_words_without_a_reader_are_there_for_the_next_one() {
    let daemon = Daemon::new();
    let fifo = daemon.fifo("out");
    daemon
        .create("c", "echo these are my last words", &fifo)
        .unwrap();
    daemon.start("c", "");
    assert_eq!(daemon.wait("c", ""), 0);
    let mut text = String::new();
    fs::File::open(&fifo)
        .unwrap()
        .read_to_string(&mut text)
        .unwrap();
    assert_eq!(text, "these are my last words\n");
    assert_eq!(daemon.delete("c").unwrap(), 0);
}

#[test]
fn an_exec_reads_writes_and_ends_with_close_io() {
    let daemon = Daemon::new();
    daemon
        .create("c", "exec sleep 1000", Path::new(""))
        .unwrap();
    daemon.start("c", "");
    let (stdin, stdout) = (daemon.fifo("in"), daemon.fifo("out"));
    let exec = task::ExecProcessRequest {
        id: "c".into(),
        exec_id: "e".into(),
        stdin: stdin.to_str().unwrap().into(),
        stdout: stdout.to_str().unwrap().into(),
        spec: Some(Any {
            type_url: String::new(),
            value: br#"{"args":["cat; exit 7"]}"#.to_vec(),
        }),
        ..Default::default()
    };
    daemon.call::<task::ConnectResponse>("Exec", &exec).unwrap();
    let again = daemon
        .call::<task::ConnectResponse>("Exec", &exec)
        .unwrap_err();
    assert!(again.to_string().contains("is in use"), "{again}");
    daemon.start("c", "e");
    // The client keeps its end: CloseIO alone ends stdin, and only after what was written.
    let mut client = fs::File::options().write(true).open(&stdin).unwrap();
    client.write_all(&[b'x'; 50_000]).unwrap();
    let close = task::CloseIoRequest {
        id: "c".into(),
        exec_id: "e".into(),
        stdin: true,
    };
    daemon
        .call::<task::ConnectResponse>("CloseIO", &close)
        .unwrap();
    let mut text = Vec::new();
    fs::File::open(&stdout)
        .unwrap()
        .read_to_end(&mut text)
        .unwrap();
    assert_eq!(text, [b'x'; 50_000]);
    assert_eq!(daemon.wait("c", "e"), 7);
}

#[test]
fn peers_that_misbehave_lose_their_own_connection_only() {
    let daemon = Daemon::new();
    let mut silent = UnixStream::connect(daemon.socket()).unwrap();
    for garbage in [
        &b"GET / HTTP/1.1\r\n\r\n"[..],
        // A giant frame, a stream of data, an even stream.
        &[0, 0x50, 0, 0, 0, 0, 0, 1, 1, 0],
        &[0, 0, 0, 1, 0, 0, 0, 1, 3, 0, 7],
        &[0, 0, 0, 1, 0, 0, 0, 2, 1, 0, 7],
    ] {
        let mut peer = UnixStream::connect(daemon.socket()).unwrap();
        peer.set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        peer.write_all(garbage).unwrap();
        assert_eq!(peer.read(&mut [0; 9]).unwrap(), 0, "{garbage:?}");
    }
    silent.write_all(&[0, 0, 1]).unwrap();
    let connected = daemon.client().connect_task("none").unwrap();
    assert_eq!(connected.shim_pid, daemon.process.id());
}

#[test]
fn an_event_larger_than_the_sockets_buffer_arrives_and_so_do_those_after_it() {
    let mut listener = None;
    let large = vec![b'x'; 2_000_000];
    let daemon = Daemon::with(|command| {
        let folder = command.get_current_dir().unwrap().to_owned();
        let address = folder.join("events");
        listener = Some(UnixListener::bind(&address).unwrap());
        let entries = [
            b"rcvd-ev1",
            &logged(1, &large)[..],
            &logged(2, b"small"),
            &[0; 8],
        ];
        fs::write(folder.join("socket.events"), entries.concat()).unwrap();
        command.env("TTRPC_ADDRESS", address);
    });
    let (mut peer, _) = listener.unwrap().accept().unwrap();
    for expected in [&large[..], b"small"] {
        let (header, body) = read_frame(&mut peer).unwrap();
        let asked = envelope::Request::decode(body.as_slice()).unwrap();
        assert!(asked.payload == expected);
        acknowledge(&mut peer, header).unwrap();
    }
    drop(daemon);
}

#[test]
fn an_exit_and_what_comes_of_it_are_told_on_one_connection() {
    let mut listener = None;
    let daemon = Daemon::with(|command| {
        let address = command.get_current_dir().unwrap().join("events");
        listener = Some(UnixListener::bind(&address).unwrap());
        command.env("TTRPC_ADDRESS", address);
    });
    let listener = listener.unwrap();
    let pid = daemon
        .create("c", "exec sleep 1000", Path::new(""))
        .unwrap();
    daemon.start("c", "");
    let (mut peer, _) = listener.accept().unwrap();
    for _ in ["create", "start"] {
        let (header, _) = read_frame(&mut peer).unwrap();
        acknowledge(&mut peer, header).unwrap();
    }
    drop(peer);
    // Its pause after an end is over then, and it connects at once; or this shows less.
    thread::sleep(Duration::from_millis(200));
    let init = nix::unistd::Pid::from_raw(i32::try_from(pid).unwrap());
    nix::sys::signal::kill(init, nix::sys::signal::Signal::SIGKILL).unwrap();
    let (mut peer, _) = listener.accept().unwrap();
    let (header, _) = read_frame(&mut peer).unwrap();
    assert_eq!(header.stream, 1);
    acknowledge(&mut peer, header).unwrap();
    assert_eq!(daemon.wait("c", ""), 137);
    assert_eq!(daemon.delete("c").unwrap(), 137);
    // Nothing is told under a number that was used.
    let (header, _) = read_frame(&mut peer).unwrap();
    assert_eq!(header.stream, 3);
    acknowledge(&mut peer, header).unwrap();
}

#[test]
fn a_signal_that_asks_or_hangs_up_ends_nothing() {
    let mut log = None;
    let mut daemon = Daemon::with(|command| {
        let folder = command.get_current_dir().unwrap().to_owned();
        let path = folder.join("log");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let read_write = fs::File::options().read(true).write(true).open(path);
        log = Some(read_write.unwrap());
    });
    let shim = nix::unistd::Pid::from_raw(i32::try_from(daemon.process.id()).unwrap());
    nix::sys::signal::kill(shim, nix::sys::signal::Signal::SIGHUP).unwrap();
    nix::sys::signal::kill(shim, nix::sys::signal::Signal::SIGUSR1).unwrap();
    daemon.client().connect_task("none").unwrap();
    let mut lines = std::io::BufReader::new(log.unwrap()).lines();
    let said = lines.find(|line| line.as_ref().unwrap().contains("0 tasks"));
    let said = said.unwrap().unwrap();
    assert!(said.contains("events waiting: false"), "{said}");
    assert!(daemon.process.try_wait().unwrap().is_none());
}

#[test]
fn a_signal_ends_the_shim_and_nothing_else() {
    let mut daemon = Daemon::new();
    let pid = daemon
        .create("c", "exec sleep 1000", Path::new(""))
        .unwrap();
    let mut peer = UnixStream::connect(daemon.socket()).unwrap();
    let shim = nix::unistd::Pid::from_raw(i32::try_from(daemon.process.id()).unwrap());
    nix::sys::signal::kill(shim, nix::sys::signal::Signal::SIGTERM).unwrap();
    assert_eq!(peer.read(&mut [0; 9]).unwrap(), 0);
    assert!(daemon.process.wait().unwrap().success());
    let alive = nix::unistd::Pid::from_raw(i32::try_from(pid).unwrap());
    nix::sys::signal::kill(alive, nix::sys::signal::Signal::SIGKILL).unwrap();
    // The record is there for a successor.
    assert_eq!(daemon.recorded().tasks[0].id, "c");
}

/// Whoever keeps the shim's descriptors, so that its crash is not seen, must not hide an end that is
/// meant. And nobody but root reads what it writes down.
#[test]
fn an_end_that_is_meant_is_seen_whoever_keeps_its_descriptors() {
    let daemon = Daemon::new();
    daemon.create("c", "exit 1", Path::new("")).unwrap();
    for name in ["socket", "socket.record", "socket.events"] {
        let mode = fs::metadata(daemon.dir.path().join(name)).unwrap().mode();
        assert_eq!(mode & 0o777, 0o600, "{name}");
    }
    let peer = || {
        let peer = UnixStream::connect(daemon.socket()).unwrap();
        peer.set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        peer
    };
    // One that broke the protocol.
    let mut mad = peer();
    daemon.client().connect_task("c").unwrap();
    let kept = keep(daemon.process.id());
    mad.write_all(&[0xff; 64]).unwrap();
    while mad.read(&mut [0; 4096]).unwrap() > 0 {}
    // All of them.
    let mut quiet = peer();
    daemon.client().connect_task("c").unwrap();
    let more = keep(daemon.process.id());
    let shim = nix::unistd::Pid::from_raw(i32::try_from(daemon.process.id()).unwrap());
    nix::sys::signal::kill(shim, nix::sys::signal::Signal::SIGTERM).unwrap();
    assert_eq!(quiet.read(&mut [0; 9]).unwrap(), 0);
    assert!(kept.len() > 1 && more.len() > 1);
}

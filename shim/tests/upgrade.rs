//! A shim becomes another executable in the same process; its clients see nothing of it. By the
//! real binary, and copies of it that call themselves another version. See `daemon`.

mod daemon;
mod logged;

use std::{
    fs,
    io::{Read, Write},
    os::{
        fd::AsRawFd,
        unix::{
            fs::{MetadataExt, OpenOptionsExt, PermissionsExt},
            net::{UnixListener, UnixStream},
        },
    },
    path::{Path, PathBuf},
    sync::mpsc::{Receiver, channel},
    thread,
    time::{Duration, Instant},
};

use daemon::{
    Daemon,
    keeper::{Call, adopt_with, asked, begin, calls, end, half_read, keep, slow, wait, waiting},
    patience,
    raw::{acknowledge, answered, frame, read_frame, refusal},
    until,
};
use logged::logged;
use nix::sys::{
    signal::{Signal, kill},
    socket::{MsgFlags, recv},
};
use prost::Message;
use prost_types::Any;
use recoverd_common::{
    handoff::{SERVICE, UPGRADE, UpgradeRequest, UpgradeResponse},
    paths::Beside,
    pb::{events, task, ttrpc as envelope},
    shim_client::{CallError, ShimClient, TASK_SERVICES},
    ttrpc::{HEADER, Header},
};

const NONE: &str = "";
const VERSION: &str = env!("CARGO_PKG_VERSION");
const OTHER: &str = "9.8.7";

fn ours() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_containerd-shim-recoverd-v1"))
}

/// An executable file in the daemon's folder.
fn executable(daemon: &Daemon, name: &str, bytes: &[u8]) -> PathBuf {
    let path = daemon.dir.path().join(name);
    let new = path.with_extension("new");
    fs::write(&new, bytes).unwrap();
    fs::set_permissions(&new, fs::Permissions::from_mode(0o755)).unwrap();
    fs::rename(new, &path).unwrap();
    path
}

/// A copy of ours that calls itself another version.
fn newer(daemon: &Daemon) -> PathBuf {
    assert_eq!(VERSION.len(), OTHER.len());
    let mut bytes = fs::read(ours()).unwrap();
    let places: Vec<usize> = (0..bytes.len() - VERSION.len())
        .filter(|at| bytes[*at..].starts_with(VERSION.as_bytes()))
        .collect();
    for at in places {
        bytes[at..at + OTHER.len()].copy_from_slice(OTHER.as_bytes());
    }
    executable(daemon, "newer", &bytes)
}

fn upgrade(client: &mut ShimClient, to: &Path) -> Result<String, CallError> {
    let request = UpgradeRequest {
        executable: to.to_str().unwrap().into(),
    };
    let response: UpgradeResponse = client.call(SERVICE, UPGRADE, &request)?;
    Ok(response.version)
}

fn refused(result: Result<String, CallError>) -> String {
    match result {
        Err(CallError::Status { message, .. }) => message,
        other => panic!("{other:?}"),
    }
}

/// Where its executable is, and how many descriptors it has.
fn looks(pid: u32) -> (PathBuf, usize) {
    let exe = fs::read_link(format!("/proc/{pid}/exe")).unwrap();
    let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count();
    (exe, descriptors)
}

#[test]
fn a_shim_becomes_a_newer_one_and_the_old_one_again_and_nobody_sees_it() {
    let daemon = Daemon::new();
    let pid = daemon.process.id();
    let init = waiting(&daemon);
    daemon.create("c", &init, Path::new(NONE)).unwrap();
    daemon.start("c", "");
    let blocked: Call<task::WaitResponse> = begin(&daemon, "Wait", wait("c", ""));
    let mut idle = daemon.client();
    idle.state("c").unwrap();
    let newer = newer(&daemon);
    let mut asker = daemon.client();
    let socket = fs::metadata(daemon.socket()).unwrap().ino();
    for (executable, version) in [(newer.as_path(), OTHER), (ours(), VERSION), (&newer, OTHER)] {
        assert_eq!(upgrade(&mut asker, executable).unwrap(), version);
        assert_eq!(looks(pid).0, fs::canonicalize(executable).unwrap());
        let recorded = daemon.recorded().shim;
        assert_eq!(
            (recorded.version.as_str(), recorded.process.pid),
            (version, pid)
        );
        let connected = idle.connect_task("c").unwrap();
        assert_eq!(connected.shim_pid, pid);
        assert!(daemon.client().state("c").is_ok(), "and it accepts");
    }
    assert_eq!(fs::metadata(daemon.socket()).unwrap().ino(), socket);
    let flags = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap();
    assert_eq!(flags.matches("-handoff").count(), 1, "{flags}");
    // It is still its parent, and responsible.
    end(&daemon);
    assert_eq!(blocked.join().unwrap().unwrap().exit_status, 23);
    assert_eq!(daemon.delete("c").unwrap(), 23);
    let output = std::process::Command::new("flock")
        .args(["--nonblock", "--exclusive"])
        .arg(Beside::of(&daemon.socket()).lock)
        .arg("true")
        .output()
        .unwrap();
    assert!(!output.status.success(), "its lock is held");
    until("no request is left", || asked(&daemon, "") == 0);
}

/// Keeps the message of this moment as the golden file of the handoff's format.
fn bless(daemon: &Daemon, asker: &mut ShimClient) {
    let message = daemon.dir.path().join("message");
    let (ours, to) = (ours().display(), message.display());
    let script = format!(
        "#!/bin/sh\ncase \"$*\" in *-handoff-check*) cat > {to}; exec {ours} \"$@\" < {to};; esac\nexec {ours} \"$@\"\n",
    );
    let saves = executable(daemon, "saves", script.as_bytes());
    upgrade(asker, &saves).unwrap();
    let text = fs::read_to_string(message).unwrap();
    let text = text.replace(daemon.dir.path().to_str().unwrap(), "/t");
    let value: serde_json::Value = serde_json::from_str(&text).unwrap();
    let text = serde_json::to_string_pretty(&value).unwrap() + "\n";
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/testdata/handoff-1.json");
    fs::write(path, text).unwrap();
}

#[test]
fn what_runs_and_what_is_under_way_goes_on() {
    let daemon = Daemon::new();
    let init = waiting(&daemon);
    daemon.create("c", &init, Path::new(NONE)).unwrap();
    daemon.start("c", "");
    let (stdin, stdout) = (daemon.fifo("in"), daemon.fifo("out"));
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
    let talks = exec("e", "while read a; do echo got $a; done; exit 5");
    daemon
        .call::<task::ConnectResponse>("Exec", &talks)
        .unwrap();
    daemon.start("c", "e");
    let blocked: Call<task::WaitResponse> = begin(&daemon, "Wait", wait("c", "e"));
    let mut writer = fs::File::options().write(true).open(&stdin).unwrap();
    let mut reader = fs::File::options().read(true).open(&stdout).unwrap();
    let late = task::ExecProcessRequest {
        stdin: String::new(),
        stdout: String::new(),
        ..exec("late", "exit 9")
    };
    daemon.call::<task::ConnectResponse>("Exec", &late).unwrap();
    let slow = slow(&daemon, "c", "exec");
    let request = task::StartRequest {
        id: "c".into(),
        exec_id: "late".into(),
    };
    let start: Call<task::StartResponse> = begin(&daemon, "Start", request);
    until("it runs", || calls(&daemon, "c", "exec") == 2);
    let newer = newer(&daemon);
    let mut asker = daemon.client();
    if std::env::var_os("RECOVERD_BLESS").is_some() {
        bless(&daemon, &mut asker);
    }
    for round in 0..4 {
        let executable = if round % 2 == 0 { &newer } else { ours() };
        upgrade(&mut asker, executable).unwrap();
        let line = format!("{round}\n");
        writer.write_all(line.as_bytes()).unwrap();
        let mut text = vec![0; "got ".len() + line.len()];
        reader.read_exact(&mut text).unwrap();
        assert_eq!(text, format!("got {line}").as_bytes());
    }
    fs::remove_file(slow).unwrap();
    assert!(start.join().unwrap().unwrap().pid > 0);
    assert_eq!(daemon.wait("c", "late"), 9);
    let close = task::CloseIoRequest {
        id: "c".into(),
        exec_id: "e".into(),
        stdin: true,
    };
    daemon
        .call::<task::ConnectResponse>("CloseIO", &close)
        .unwrap();
    assert_eq!(blocked.join().unwrap().unwrap().exit_status, 5);
    assert_eq!(reader.read(&mut [0; 8]).unwrap(), 0, "its output has ended");
    end(&daemon);
    assert_eq!(daemon.wait("c", ""), 23);
}

#[test]
fn last_words_wait_for_a_reader_whoever_had_their_fifo_meanwhile() {
    let daemon = Daemon::new();
    let stdout = daemon.fifo("out");
    let init = waiting(&daemon).replace("exit", "echo last words; exit");
    daemon.create("c", &init, &stdout).unwrap();
    daemon.start("c", "");
    // As whoever upgrades it has, who is no reader.
    let kept = keep(daemon.process.id());
    end(&daemon);
    assert_eq!(daemon.wait("c", ""), 23);
    let newer = newer(&daemon);
    upgrade(&mut daemon.client(), &newer).unwrap();
    drop(kept);
    let mut options = fs::File::options();
    let options = options.read(true).custom_flags(nix::libc::O_NONBLOCK);
    let mut text = [0; 11];
    options
        .open(&stdout)
        .unwrap()
        .read_exact(&mut text)
        .unwrap();
    assert_eq!(&text, b"last words\n");
}

#[test]
fn an_executable_that_cannot_go_on_is_refused_and_nothing_has_changed() {
    let daemon = Daemon::new();
    let pid = daemon.process.id();
    let init = waiting(&daemon);
    daemon.create("c", &init, Path::new(NONE)).unwrap();
    daemon.start("c", "");
    let blocked: Call<task::WaitResponse> = begin(&daemon, "Wait", wait("c", ""));
    let mut asker = daemon.client();
    asker.state("c").unwrap();
    let before = (looks(pid), daemon.recorded());
    let mut bytes = fs::read(ours()).unwrap();
    bytes.truncate(5000);
    let reads_another = "#!/bin/sh\necho 'handoff has format 1, not 7' >&2; exit 1\n";
    let replaced = daemon.dir.path().join("replaced");
    let replaces_itself = format!(
        "#!/bin/sh\ncp {0} {0}.2; mv {0}.2 {0}; exec {1} \"$@\"\n",
        replaced.display(),
        ours().display()
    );
    for (name, bytes, why) in [
        ("cut", bytes.as_slice(), "it cannot go on from here"),
        ("text", b"not an executable", "it cannot go on from here"),
        ("true", b"#!/bin/sh\nexit 0\n", "ended with status 0"),
        ("newer", reads_another.as_bytes(), "not 7"),
        ("replaced", replaces_itself.as_bytes(), "it was replaced"),
    ] {
        let path = executable(&daemon, name, bytes);
        let said = refused(upgrade(&mut asker, &path));
        assert!(said.contains(why) && said.contains(name), "{name}: {said}");
    }
    for (path, why) in [
        ("/no/such/file", "No such file"),
        ("relative", "not an absolute path"),
        ("/etc/passwd", "not an executable"),
        ("/", "not an executable"),
    ] {
        let said = refused(upgrade(&mut asker, Path::new(path)));
        assert!(said.contains(why), "{path}: {said}");
    }
    assert_eq!((looks(pid), daemon.recorded()), before);
    // One at a time.
    until("no answer is on its way", || asked(&daemon, UPGRADE) == 0);
    let hangs = executable(&daemon, "hangs", b"#!/bin/sh\nexec sleep 60\n");
    let first = thread::spawn(move || {
        let said = refused(upgrade(&mut asker, &hangs));
        (said, asker)
    });
    until("it is asked", || asked(&daemon, UPGRADE) > 0);
    let said = refused(upgrade(&mut daemon.client(), ours()));
    assert!(said.contains("under way"), "{said}");
    let (said, mut asker) = first.join().unwrap();
    assert!(said.contains("too long"), "{said}");
    assert_eq!(upgrade(&mut asker, ours()).unwrap(), VERSION);
    end(&daemon);
    assert_eq!(blocked.join().unwrap().unwrap().exit_status, 23);
}

#[test]
fn an_image_that_dies_at_once_is_replaced_by_the_old_one_with_what_was_kept() {
    let mut daemon = Daemon::new();
    let pid = daemon.process.id();
    let init = waiting(&daemon);
    daemon.create("c", &init, Path::new(NONE)).unwrap();
    daemon.start("c", "");
    let blocked: Call<task::WaitResponse> = begin(&daemon, "Wait", wait("c", ""));
    let dies = format!(
        "#!/bin/sh\ncase \"$*\" in *-handoff-check*) exec {} \"$@\";; esac\nexit 1\n",
        ours().display()
    );
    let dies = executable(&daemon, "dies", dies.as_bytes());
    let old = PathBuf::from(format!("/proc/{pid}/exe"));
    let old = executable(&daemon, "old", &fs::read(old).unwrap());
    let kept = keep(pid);
    let mut asker = daemon.client();
    let asked = thread::spawn(move || upgrade(&mut asker, &dies));
    daemon.process.wait().unwrap();
    let successor = adopt_with(&daemon, &old, &kept);
    drop(kept);
    // The asker's own connection was not kept.
    assert!(matches!(asked.join().unwrap(), Err(CallError::Closed)));
    assert_ne!(successor.0.shim.pid, pid);
    end(&daemon);
    assert_eq!(blocked.join().unwrap().unwrap().exit_status, 23);
}

/// A question about an exec that is not there; the answer repeats its name.
fn question(stream: u32, exec_id: &str) -> Vec<u8> {
    let request = task::StateRequest {
        id: "c".into(),
        exec_id: exec_id.into(),
    };
    frame(stream, "State", &request)
}

fn running(daemon: &Daemon) {
    daemon
        .create("c", &waiting(daemon), Path::new(NONE))
        .unwrap();
    daemon.start("c", "");
}

#[test]
fn half_a_request_is_whole_when_its_rest_comes_whichever_image_has_read_it() {
    let daemon = Daemon::new();
    running(&daemon);
    let mut small = UnixStream::connect(daemon.socket()).unwrap();
    let first = question(1, "first");
    let rest = question(3, "small");
    // They are looked at together.
    small.write_all(&[&first, &rest[..20]].concat()).unwrap();
    assert_eq!(answered(&mut small), 1);
    // Taken piece by piece; the other stays in its socket.
    let mut giant = UnixStream::connect(daemon.socket()).unwrap();
    let name = "x".repeat(60_000) + &"y".repeat(60_000);
    let bytes = question(1, &name);
    giant.write_all(&bytes[..40_000]).unwrap();
    until("it has begun", || half_read(&daemon));
    let newer = newer(&daemon);
    let mut asker = daemon.client();
    upgrade(&mut asker, &newer).unwrap();
    small.write_all(&rest[20..30]).unwrap();
    giant.write_all(&bytes[40_000..80_000]).unwrap();
    upgrade(&mut asker, ours()).unwrap();
    small.write_all(&rest[30..]).unwrap();
    giant.write_all(&bytes[80_000..]).unwrap();
    let (stream, why) = refusal(&mut small);
    assert!(stream == 3 && why.ends_with("small"), "{stream} {why}");
    let (stream, why) = refusal(&mut giant);
    assert!(stream == 1 && why.ends_with(&name), "{stream}");
    // What follows is no rest of it.
    giant.write_all(&question(3, "next")).unwrap();
    assert_eq!(answered(&mut giant), 3);
    assert!(!half_read(&daemon));
}

/// True if there is something to read, and the last frame of it is not whole.
fn half_written(stream: &UnixStream) -> bool {
    let mut bytes = vec![0; 1 << 20];
    let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
    let count = recv(stream.as_raw_fd(), &mut bytes, flags).unwrap_or(0);
    let mut rest = &bytes[..count];
    while let Some(header) = Header::parse(rest) {
        match rest.get(HEADER + usize::try_from(header.length).unwrap()..) {
            Some(next) => rest = next,
            None => return true,
        }
    }
    !rest.is_empty()
}

#[test]
fn who_reads_late_gets_every_answer_once_and_whole_from_however_many_images() {
    let daemon = Daemon::new();
    running(&daemon);
    let mut late = UnixStream::connect(daemon.socket()).unwrap();
    // More than a socket holds, so that one of them is half written; then those that wait.
    let lengths = [3, 250_000, 5, 30_000, 0, 2];
    let streams = || (1..).step_by(2);
    let names = lengths.map(|length| format!("{}{length}", "x".repeat(length)));
    for (stream, name) in streams().zip(&names) {
        late.write_all(&question(stream, name)).unwrap();
    }
    let newer = newer(&daemon);
    let mut asker = daemon.client();
    let mut round = 0;
    let mut again = || {
        round += 1;
        let executable = if round % 2 == 1 { &newer } else { ours() };
        upgrade(&mut asker, executable).unwrap();
    };
    until("an answer is half written", || half_written(&late));
    again();
    again();
    for (stream, name) in streams().zip(&names) {
        let (of, why) = refusal(&mut late);
        assert_eq!(of, stream);
        assert!(why.ends_with(name), "{} bytes of {stream}", why.len());
        if stream == 3 {
            // The others have room in its socket by now.
            again();
        }
    }
    late.write_all(&question(99, "last")).unwrap();
    assert_eq!(refusal(&mut late).0, 99, "none comes twice");
    until("no answer is on its way", || asked(&daemon, "") == 0);
}

#[test]
fn an_event_that_is_half_written_is_finished_by_the_next_image() {
    let mut listener = None;
    let large = vec![b'x'; 250_000];
    let daemon = Daemon::with(|command| {
        let folder = command.get_current_dir().unwrap().to_owned();
        let address = folder.join("events");
        listener = Some(UnixListener::bind(&address).unwrap());
        let entries = [b"rcvd-ev1", &logged(1, &large)[..], &[0; 8]];
        fs::write(folder.join("socket.events"), entries.concat()).unwrap();
        command.env("TTRPC_ADDRESS", address);
    });
    let listener = listener.unwrap();
    let newer = newer(&daemon);
    let mut asker = daemon.client();
    let end = patience();
    // A service that takes long is given up, and has longer the next time.
    let asked = loop {
        assert!(Instant::now() < end, "it comes to no end");
        let (mut peer, _) = listener.accept().unwrap();
        until("it is half written", || half_written(&peer));
        if upgrade(&mut asker, &newer).is_ok()
            && let Ok((header, body)) = read_frame(&mut peer)
        {
            acknowledge(&mut peer, header).unwrap();
            break envelope::Request::decode(body.as_slice()).unwrap();
        }
    };
    assert!(asked.payload == large);
}

/// A logger that is this script, with its file as `$2`; it is there when it has closed 5.
fn logger(daemon: &Daemon, name: &str, script: &str) -> String {
    let script = format!("#!/bin/sh\n{script}\n");
    let script = executable(daemon, name, script.as_bytes());
    let log = daemon.dir.path().join(format!("{name}.log"));
    format!("binary://{}?to={}", script.display(), log.display())
}

/// Where its logger puts it.
fn log_of(daemon: &Daemon, name: &str) -> String {
    fs::read_to_string(daemon.dir.path().join(format!("{name}.log"))).unwrap_or_default()
}

/// A thousand numbers when each of `parts` files is there: see [`next_part`].
fn in_parts(daemon: &Daemon, parts: u32) -> String {
    let part = |n| {
        let file = daemon.dir.path().join(format!("part-{n}"));
        format!(
            "until [ -e {} ]; do sleep 0.02; done; seq {} {}; ",
            file.display(),
            n * 1000 + 1,
            (n + 1) * 1000
        )
    };
    (0..parts).map(part).collect()
}

fn next_part(daemon: &Daemon, n: u32) {
    fs::write(daemon.dir.path().join(format!("part-{n}")), "").unwrap();
}

fn until_logged(daemon: &Daemon, name: &str, parts: u32) {
    let numbers: String = (1..=parts * 1000).map(|n| format!("{n}\n")).collect();
    until("these parts are in its file, and nothing else", || {
        log_of(daemon, name) == numbers
    });
}

/// The processes that take the output of the init and of its only exec.
fn loggers(daemon: &Daemon) -> [Option<u32>; 2] {
    let task = &daemon.recorded().tasks[0];
    [&task.stdio, &task.execs[0].stdio]
        .map(|stdio| stdio.logger.as_ref().map(|logger| logger.process.pid))
}

/// How many pipes a process has open.
fn pipes(pid: u32) -> usize {
    let entries = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten();
    let targets = entries.filter_map(|entry| fs::read_link(entry.path()).ok());
    targets
        .filter(|target| target.to_string_lossy().starts_with("pipe:"))
        .count()
}

#[test]
fn a_copier_and_a_logger_go_on_under_every_image_and_end_with_what_they_serve() {
    let daemon = Daemon::new();
    let pid = daemon.process.id();
    let none = pipes(pid);
    let file = format!("file://{}/init.log", daemon.dir.path().display());
    let init = in_parts(&daemon, 4) + &waiting(&daemon);
    daemon.create("c", &init, Path::new(&file)).unwrap();
    daemon.start("c", "");
    let uri = logger(&daemon, "exec", "exec 5>&-; exec cat <&3 >> $2");
    let command = in_parts(&daemon, 4) + "exit 5";
    daemon.exec("e", &command, &uri).unwrap();
    let before = loggers(&daemon);
    assert!(before.iter().all(Option::is_some), "{before:?}");
    let newer = newer(&daemon);
    let mut asker = daemon.client();
    next_part(&daemon, 0);
    until_logged(&daemon, "init", 1);
    until_logged(&daemon, "exec", 1);
    for round in 1..4 {
        let executable = if round % 2 == 1 { &newer } else { ours() };
        next_part(&daemon, round);
        upgrade(&mut asker, executable).unwrap();
        if round < 3 {
            assert_eq!(loggers(&daemon), before);
        }
    }
    assert_eq!(daemon.wait("c", "e"), 5);
    until_logged(&daemon, "exec", 4);
    let request = task::DeleteRequest {
        id: "c".into(),
        exec_id: "e".into(),
    };
    let deleted: task::DeleteResponse = daemon.call("Delete", &request).unwrap();
    assert_eq!(deleted.exit_status, 5);
    end(&daemon);
    assert_eq!(daemon.wait("c", ""), 23);
    until_logged(&daemon, "init", 4);
    assert_eq!(daemon.delete("c").unwrap(), 23);
    until("nothing of them is left", || {
        children(pid).is_empty() && pipes(pid) == none
    });
}

#[test]
fn a_copier_and_a_logger_of_an_earlier_image_may_die() {
    let daemon = Daemon::new();
    let file = format!("file://{}/init.log", daemon.dir.path().display());
    let init = in_parts(&daemon, 2) + &waiting(&daemon);
    daemon.create("c", &init, Path::new(&file)).unwrap();
    daemon.start("c", "");
    let uri = logger(&daemon, "exec", "exec 5>&-; exec cat <&3 >> $2");
    // More than a pipe holds.
    let command = in_parts(&daemon, 2) + "seq 100000; exit 5";
    daemon.exec("e", &command, &uri).unwrap();
    next_part(&daemon, 0);
    until_logged(&daemon, "init", 1);
    until_logged(&daemon, "exec", 1);
    let newer = newer(&daemon);
    upgrade(&mut daemon.client(), &newer).unwrap();
    let before = loggers(&daemon);
    for pid in before.into_iter().flatten() {
        let pid = nix::unistd::Pid::from_raw(i32::try_from(pid).unwrap());
        kill(pid, Signal::SIGKILL).unwrap();
    }
    until("another copier comes", || {
        let [copier, _] = loggers(&daemon);
        copier.is_some() && copier != before[0]
    });
    next_part(&daemon, 1);
    assert_eq!(daemon.wait("c", "e"), 5, "who has no logger is not held up");
    end(&daemon);
    assert_eq!(daemon.wait("c", ""), 23);
    until_logged(&daemon, "init", 2);
    assert_eq!(daemon.delete("c").unwrap(), 23);
}

/// As containerd's event service: when the first event came, whatever it was, and then when each
/// exit was told, and whose.
fn exits(listener: UnixListener) -> Receiver<(Instant, String)> {
    let (tell, told) = channel();
    thread::spawn(move || {
        let mut first = true;
        while let Ok((mut peer, _)) = listener.accept() {
            while let Ok((header, body)) = read_frame(&mut peer) {
                let at = Instant::now();
                let asked = envelope::Request::decode(body.as_slice()).unwrap();
                let forward = events::ForwardRequest::decode(asked.payload.as_slice()).unwrap();
                let event = forward.envelope.unwrap();
                let mut id = String::new();
                if event.topic == "/tasks/exit" {
                    let value = event.event.unwrap().value;
                    id = events::TaskExit::decode(value.as_slice()).unwrap().id;
                }
                if (first || !id.is_empty()) && tell.send((at, id)).is_err() {
                    return;
                }
                first = false;
                if acknowledge(&mut peer, header).is_err() {
                    break;
                }
            }
        }
    });
    told
}

/// How long the output of an exec that has ended may be held by others, and how long after the
/// first word that containerd takes an exit is told once more: less a millisecond, for the
/// product's clock has no less.
const LATER: Duration = Duration::from_millis(9_999);

#[test]
fn what_an_image_has_put_off_comes_in_its_time() {
    let daemon = Daemon::with(|command| {
        let address = command.get_current_dir().unwrap().join("events");
        command.env("TTRPC_ADDRESS", address);
    });
    let pid = daemon.process.id();
    running(&daemon);
    let while_we_are = format!(
        "while [ -e {} ]; do sleep 0.05; done",
        daemon.socket().display()
    );
    // One whose logger neither reads the end of its input nor obeys.
    fs::write(daemon.bundle("c").join("fail-exec"), "").unwrap();
    let script = format!("trap '' TERM; echo here > $2; exec 5>&-; {while_we_are}");
    let uri = logger(&daemon, "stays", &script);
    let stubborn = || {
        let children = children(pid);
        children.iter().any(|(_, word)| word.ends_with("stays.log"))
    };
    let failed = daemon.exec("l", "exit 0", &uri);
    assert!(failed.is_err(), "{failed:?}");
    assert_eq!(log_of(&daemon, "stays"), "here\n", "it was there");
    fs::remove_file(daemon.bundle("c").join("fail-exec")).unwrap();
    // One whose output is held by another.
    let stdout = daemon.fifo("out");
    let command = format!("{while_we_are} & exit 7");
    daemon
        .exec("e", &command, stdout.to_str().unwrap())
        .unwrap();
    let mut reader = fs::File::open(stdout).unwrap();
    assert_eq!(daemon.wait("c", "e"), 7);
    let begun = Instant::now();
    let request = task::DeleteRequest {
        id: "c".into(),
        exec_id: "e".into(),
    };
    let delete: Call<task::DeleteResponse> = begin(&daemon, "Delete", request);
    // And whose exit is told when containerd is there again.
    let told = exits(UnixListener::bind(daemon.dir.path().join("events")).unwrap());
    let next = || {
        let patience = patience().saturating_duration_since(Instant::now());
        told.recv_timeout(patience).expect("it is told")
    };
    let (first, _) = next();
    while next().1 != "e" {}

    let newer = newer(&daemon);
    let mut asker = daemon.client();
    for executable in [&newer, ours()] {
        upgrade(&mut asker, executable).unwrap();
    }
    assert_eq!(delete.join().unwrap().unwrap().exit_status, 7);
    assert!(begun.elapsed() >= LATER, "{:?}", begun.elapsed());
    assert_eq!(reader.read(&mut [0; 8]).unwrap(), 0, "its output has ended");
    loop {
        let (at, id) = next();
        if id == "e" && at >= first + LATER {
            break;
        }
    }
    until("the logger is killed", || !stubborn());
}

/// An exec whose numbers are read from what this gives, until everything ends.
fn counting(daemon: &Daemon) -> fs::File {
    let stdout = daemon.fifo("out");
    let end = daemon.dir.path().join("end");
    let command = format!(
        "n=0; until [ -e {} ]; do n=$((n+1)); echo $n; sleep 0.02; done",
        end.display()
    );
    daemon
        .exec("e", &command, stdout.to_str().unwrap())
        .unwrap();
    fs::File::open(stdout).unwrap()
}

/// The state of each child of a process, and the last word of its command line.
fn children(parent: u32) -> Vec<(String, String)> {
    let entries = fs::read_dir("/proc").unwrap().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().into_string().ok());
    pids.filter_map(|pid| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let (_, rest) = stat.rsplit_once(") ")?;
        let mut fields = rest.split(' ');
        let state = fields.next()?.to_owned();
        if fields.next()? != parent.to_string() {
            return None;
        }
        let line = fs::read_to_string(format!("/proc/{pid}/cmdline")).ok()?;
        let verb = line.trim_end_matches('\0').rsplit('\0').next()?;
        Some((state, verb.to_owned()))
    })
    .collect()
}

/// A thousand times, or as often as RECOVERD_UPGRADES says.
#[test]
fn many_upgrades_in_a_row_leave_no_trace() {
    let rounds = std::env::var("RECOVERD_UPGRADES").ok();
    let rounds: u32 = rounds.map_or(1000, |text| text.parse().unwrap());
    let daemon = Daemon::new();
    let pid = daemon.process.id();
    let init = waiting(&daemon);
    daemon.create("c", &init, Path::new(NONE)).unwrap();
    daemon.start("c", "");
    let mut reader = counting(&daemon);
    // A minute for each ten of them: the machine may be busy.
    let until_then = Instant::now() + Duration::from_secs(60 + 6 * u64::from(rounds));
    let client = || ShimClient::connect(&daemon.socket(), "ns", until_then).unwrap();
    let mut waiter = client();
    let blocked = thread::spawn(move || {
        waiter.call::<task::WaitResponse>(TASK_SERVICES[0], "Wait", &wait("c", ""))
    });
    until("it is asked", || asked(&daemon, "Wait") > 0);
    let newer = newer(&daemon);
    let mut asker = client();
    let private = || -> u64 {
        let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap();
        let lines = text
            .lines()
            .filter(|line| line.starts_with("Private_Dirty"));
        lines
            .map(|line| {
                line.split_whitespace()
                    .nth(1)
                    .unwrap()
                    .parse::<u64>()
                    .unwrap()
            })
            .sum()
    };
    let mut early = None;
    for round in 0..rounds {
        let executable = if round % 2 == 0 { &newer } else { ours() };
        upgrade(&mut asker, executable).unwrap();
        if round == 9 {
            early = Some((looks(pid).1, private()));
        }
    }
    let (descriptors, memory) = early.unwrap();
    until("there are as many descriptors as before", || {
        looks(pid).1 == descriptors
    });
    until(
        "one process holds the exec's output, and all others are reaped",
        || {
            let children = children(pid);
            let holders = children.iter().filter(|(_, verb)| verb == "hold");
            holders.count() == 1 && children.iter().all(|(state, _)| state != "Z")
        },
    );
    // What it needed to begin is given back when it has nothing to do.
    until("it needs no more than before", || private() <= memory + 64);
    end(&daemon);
    assert_eq!(blocked.join().unwrap().unwrap().exit_status, 23);
    let mut text = String::new();
    reader.read_to_string(&mut text).unwrap();
    let numbers = text.lines().map(|line| line.parse::<u32>().unwrap());
    assert!(numbers.eq((1..).take(text.lines().count())), "{text}");
    assert!(!text.is_empty());
}

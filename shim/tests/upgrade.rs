//! A shim becomes another executable in the same process; its clients see nothing of it. By the
//! real binary, and copies of it that call themselves another version. See `daemon`.

mod daemon;

use std::{
    fs,
    io::{Read, Write},
    os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use daemon::{
    Daemon,
    keeper::{Call, adopt_with, asked, begin, calls, end, keep, slow, wait, waiting},
    until,
};
use prost_types::Any;
use recoverd_common::{
    handoff::{SERVICE, UPGRADE, UpgradeRequest, UpgradeResponse},
    paths::Beside,
    pb::task,
    shim_client::{CallError, ShimClient, TASK_SERVICES},
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

/// An exec whose numbers are read from what this gives, until everything ends.
fn counting(daemon: &Daemon) -> fs::File {
    let stdout = daemon.fifo("out");
    let end = daemon.dir.path().join("end");
    let command = format!(
        "n=0; until [ -e {} ]; do n=$((n+1)); echo $n; sleep 0.02; done",
        end.display()
    );
    let request = task::ExecProcessRequest {
        id: "c".into(),
        exec_id: "e".into(),
        stdout: stdout.to_str().unwrap().into(),
        spec: Some(Any {
            type_url: String::new(),
            value: format!(r#"{{"args":["{command}"]}}"#).into_bytes(),
        }),
        ..Default::default()
    };
    daemon
        .call::<task::ConnectResponse>("Exec", &request)
        .unwrap();
    daemon.start("c", "e");
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

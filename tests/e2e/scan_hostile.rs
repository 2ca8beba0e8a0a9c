//! `recoverd scan` among things that are not what they claim to be: it ends in time, with bounded
//! memory, tells of them, and neither follows nor changes anything.

use std::process::Output;
use std::sync::Arc;
use std::time::{Duration, Instant};

use recoverd_tests::{
    Container, Containerd, Node, Release, Running, Scan, Task, beside, parse, wait_for,
};

recoverd_tests::tests! {
    on_every_release: [
        a_scan_only_reads,
    ],
    once: [
        hostile_bundles_are_told_and_not_followed,
        hostile_runc_state_is_told_and_not_followed,
        hostile_files_beside_sockets_are_not_followed,
        silent_and_babbling_sockets_do_not_hold_a_scan,
        processes_that_vanish_are_normal,
        without_root_a_scan_shows_what_it_can,
        usage_errors_are_one_line_and_exit_2,
    ],
}

const TASKS: &str = "/run/containerd/io.containerd.runtime.v2.task/e2e";

/// Two tasks that are well, one of them with containerd's help only.
fn bystander(containerd: &Containerd) -> Task {
    containerd.run(&Container::new("bystander"))
}

#[track_caller]
fn assert_left_alone(scan: &Scan, task: &Task) {
    assert_eq!(scan.codes(&task.name()), [""; 0]);
    task.assert_init_alive();
    task.assert_shim_alive();
}

/// Fails when a line of the machine's passwd or shadow, where links lead, is in the report.
#[track_caller]
fn assert_reads_no_secret(scan: &Scan) {
    let everything = format!("{scan:?}");
    assert!(
        !everything.contains("root:x:0") && !everything.contains(":99999:"),
        "{scan:#?}"
    );
}

/// A scan that must end in time and stay below 64 MiB (40 MiB is promised for 1,000 tasks).
#[track_caller]
fn bounded_scan(node: &Arc<Node>) -> Scan {
    let began = Instant::now();
    let program = node.built("recoverd").display().to_string();
    let line = format!("ulimit -v 4194304; exec '{program}' scan -o json --min-age 0s");
    let output = node.output("timeout", ["60", "sh", "-c", &line]);
    let scan = parse(&output);
    assert!(
        began.elapsed() < Duration::from_secs(30),
        "{:?}",
        began.elapsed()
    );
    assert!(matches!(scan.exit, 0 | 1 | 3), "{scan:#?}");
    assert!(!scan.stderr.contains("panicked"), "{scan:#?}");
    scan
}

fn hostile_bundles_are_told_and_not_followed(release: &Release) {
    let node = Node::start();
    let containerd = node.containerd(release);
    let well = bystander(&containerd);
    // What lies outside of a bundle and must not be read through it.
    node.shell(
        "mkdir -p /run/secret && echo 4711 >/run/secret/init.pid
         echo '{\"annotations\":{\"io.kubernetes.cri.sandbox-name\":\"STOLEN\"}}' >/run/secret/config.json",
    );
    let init = well.init.pid;
    let socket = well.socket().display().to_string();
    node.shell(&format!(
        "mkdir -p {TASKS} && cd {TASKS}
         ln -s /run/secret symlinked
         mkdir links && ln -s /run/secret/config.json links/config.json && ln -s /run/secret/init.pid links/init.pid
         ln -s /etc/shadow links/address
         mkdir fifos && for f in config.json init.pid address bootstrap.json runtime options.json shim-binary-path; do mkfifo fifos/$f; done
         mkdir folders && for f in config.json init.pid address bootstrap.json; do mkdir folders/$f; done
         mkdir giant && for f in config.json init.pid address bootstrap.json options.json; do truncate -s 1G giant/$f; done
         mkdir garbled && for f in config.json init.pid address bootstrap.json; do printf '\\377\\376{{\\200' >garbled/$f; done
         mkdir \"$(printf 'na\\377me')\"
         mkdir negative && printf -- '-1' >negative/init.pid && echo '{{}}' >negative/config.json
         mkdir zero && printf 0 >zero/init.pid
         mkdir one && printf 1 >one/init.pid && printf 'unix:///dev/zero' >one/address
         mkdir huge && printf 99999999999999999999 >huge/init.pid
         mkdir deep && {{ printf '{{\"annotations\":'; head -c 200000 /dev/zero | tr '\\0' '['; }} >deep/config.json
         mkdir thief && printf {init} >thief/init.pid && printf 'unix://{socket}' >thief/address"
    ));
    let scan = bounded_scan(&node);
    assert_ne!(scan.exit, 0, "{scan:#?}");
    let everything = format!("{scan:?}");
    assert!(
        !everything.contains("STOLEN") && !everything.contains("4711"),
        "{scan:#?}"
    );
    assert_reads_no_secret(&scan);
    assert_left_alone(&scan, &well);
    // Each is named, so that an operator can go and look.
    let names = [
        "symlinked",
        "links",
        "fifos",
        "folders",
        "giant",
        "garbled",
        "negative",
    ];
    for name in names {
        assert!(
            everything.contains(name),
            "{name} is not told of: {scan:#?}"
        );
    }
    // PID 1 is nobody's init, and a bundle is no proof of owning a process.
    for (bundle, pid) in [("one", 1), ("thief", init)] {
        let taken = scan.report.tasks.iter().any(|task| {
            task.id == bundle && task.init.as_ref().is_some_and(|init| init.pid == pid)
        });
        assert!(!taken, "{bundle} was believed: {scan:#?}");
    }
    node.shell(&format!(
        "[ -h {TASKS}/symlinked ] && [ -p {TASKS}/fifos/config.json ]"
    ));
}

fn hostile_runc_state_is_told_and_not_followed(release: &Release) {
    let node = Node::start();
    let containerd = node.containerd(release);
    let well = bystander(&containerd);
    node.shell(
        "cd /run/containerd/runc/e2e
         mkdir linked && ln -s /etc/passwd linked/state.json
         mkdir giant && truncate -s 1G giant/state.json
         mkdir piped && mkfifo piped/state.json
         mkdir torn && printf '{\"id\":\"torn\",\"init_process_pid\":' >torn/state.json
         mkdir bad && echo '{\"id\":\"bad\",\"init_process_pid\":-1,\"init_process_start\":\"x\"}' >bad/state.json
         ln -s /run/containerd/runc/e2e/bystander alias",
    );
    let scan = bounded_scan(&node);
    assert_ne!(scan.exit, 0, "{scan:#?}");
    assert_reads_no_secret(&scan);
    assert_left_alone(&scan, &well);
}

fn hostile_files_beside_sockets_are_not_followed(release: &Release) {
    let node = Node::start();
    let containerd = node.containerd(release);
    let well = bystander(&containerd);
    let socket = well.socket().display().to_string();
    let folder = "/run/containerd/s";
    let name = |digit: &str| format!("{folder}/{}", digit.repeat(64));
    node.shell(&format!(
        "ln -s {socket} {linked}
         mkfifo {piped}
         mkdir {made}
         echo hello >{plain}
         truncate -s 1G {giant}.record
         ln -s /etc/shadow {linked}.record
         printf '{{\"format\":99,\"future\":true}}' >{future}.record
         printf '{{\"format\":1,' >{torn}.record
         mkfifo {piped}.record
         echo stray >{folder}/notes.txt",
        linked = name("1"),
        piped = name("2"),
        made = name("3"),
        plain = name("4"),
        giant = name("5"),
        future = name("6"),
        torn = name("7"),
    ));
    let scan = bounded_scan(&node);
    assert_reads_no_secret(&scan);
    let codes = scan.all_codes();
    assert!(codes.contains(&"unreadable-record"), "{scan:#?}");
    assert!(!codes.contains(&"orphaned-task"), "{scan:#?}");
    assert_left_alone(&scan, &well);
    node.shell(&format!(
        "[ -h {} ] && [ -p {} ] && [ -e {folder}/notes.txt ]",
        name("1"),
        name("2")
    ));
}

/// A process that listens on `socket` and does `deed` with each who connects.
fn listener(node: &Arc<Node>, socket: &str, deed: &str) -> Running {
    let script = format!(
        "my $l = IO::Socket::UNIX->new(Local => '{socket}', Listen => 50) or die $!; my @kept;
         while (my $c = $l->accept) {{ push @kept, $c; {deed} }}"
    );
    let running = node.spawn("perl", ["-MIO::Socket::UNIX", "-e", &script]);
    wait_for("the listener", || node.path(socket).exists().then_some(()));
    running
}

fn silent_and_babbling_sockets_do_not_hold_a_scan(release: &Release) {
    let node = Node::start();
    let containerd = node.containerd(release);
    let well = bystander(&containerd);
    let deeds = [
        ("a", ""),
        ("b", "syswrite $c, 'HTTP/1.1 400 Bad Request' x 50;"),
        // A ttrpc frame of 4 GiB - 1, of which nothing comes.
        ("c", "syswrite $c, pack('NNCC', 0xffffffff, 1, 2, 0);"),
        ("d", "shutdown $c, 2;"),
        // An answer to the first request that is no message.
        (
            "e",
            "syswrite $c, pack('NNCC', 4, 1, 2, 0) . \"\\xff\\xff\\xff\\xff\";",
        ),
    ];
    let mut listeners = Vec::new();
    for (digit, deed) in deeds {
        let socket = format!("/run/containerd/s/{}", digit.repeat(64));
        listeners.push(listener(&node, &socket, deed));
        node.shell(&format!(
            "mkdir -p {TASKS}/peer-{digit} && cd {TASKS}/peer-{digit}
             printf 'unix://{socket}' >address
             printf '{{\"version\":3,\"address\":\"unix://{socket}\",\"protocol\":\"ttrpc\"}}' >bootstrap.json
             echo '{{\"ociVersion\":\"1.0.2\",\"annotations\":{{}}}}' >config.json"
        ));
    }
    let scan = bounded_scan(&node);
    assert_ne!(scan.exit, 0, "{scan:#?}");
    let everything = format!("{scan:?}");
    for (digit, _) in deeds {
        assert!(everything.contains(&format!("peer-{digit}")), "{scan:#?}");
        let init = scan
            .report
            .tasks
            .iter()
            .find(|task| task.id == format!("peer-{digit}"));
        assert!(init.is_none_or(|task| task.init.is_none()), "{scan:#?}");
    }
    assert_left_alone(&scan, &well);
    for mut listener in listeners {
        assert!(
            listener.is_running(),
            "a scan ended a listener: {}",
            listener.text()
        );
    }
}

fn processes_that_vanish_are_normal(release: &Release) {
    let node = Node::start();
    let containerd = node.containerd(release);
    let well = bystander(&containerd);
    // Processes and mounts that come and go as fast as they can.
    let line = "mkdir -p /run/m; for n in $(seq 20); do
                    true & mount -t tmpfs t /run/m; umount /run/m; wait
                done";
    let storm = || {
        node.shell(line);
    };
    let (rounds, ()) = beside(storm, || {
        for _ in 0..30 {
            containerd.scan().assert_clean();
        }
    });
    assert!(rounds >= 3, "only {rounds} rounds of the storm");
    well.assert_shim_alive();
}

fn without_root_a_scan_shows_what_it_can(release: &Release) {
    let node = Node::start();
    let containerd = node.containerd(release);
    let well = bystander(&containerd);
    // Where nobody can execute it, whatever the modes above the target folder are.
    node.shell("mkdir -p /run/bin && chmod 755 /run/bin");
    node.run(
        "cp",
        [
            node.built("recoverd").as_path(),
            "/run/bin/recoverd".as_ref(),
        ],
    );
    let as_nobody = |args: &[&str]| -> Output {
        let mut words = vec![
            "--reuid",
            "65534",
            "--regid",
            "65534",
            "--clear-groups",
            "--",
            "/run/bin/recoverd",
        ];
        words.extend_from_slice(args);
        node.output("setpriv", words)
    };
    let scan = parse(&as_nobody(&["scan", "-o", "json"]));
    assert_eq!(scan.exit, 3, "{scan:#?}");
    assert!(!scan.report.gaps.is_empty(), "{scan:#?}");
    assert_eq!(
        scan.report.summary.findings.critical, 0,
        "what cannot be seen is no fault: {scan:#?}"
    );
    assert!(scan.stderr.lines().count() <= 1, "{}", scan.stderr);
    let table = as_nobody(&["scan"]);
    assert_eq!(table.status.code(), Some(3));
    let said = String::from_utf8_lossy(&table.stdout) + String::from_utf8_lossy(&table.stderr);
    assert!(said.contains("root"), "{said}");
    assert!(!said.contains("panicked"), "{said}");
    well.assert_shim_alive();
}

fn usage_errors_are_one_line_and_exit_2(release: &Release) {
    let node = Node::start();
    let _containerd = node.containerd(release);
    let wrong: [(&[&str], &str); 8] = [
        (&["--no-such-flag", "scan"], "--no-such-flag"),
        (&["scan", "--no-such-flag"], "--no-such-flag"),
        (&["scan", "-o", "yaml"], "yaml"),
        (&["scan", "--min-age", "soon"], "soon"),
        (&["--color", "sometimes", "scan"], "sometimes"),
        (&["no-such-command"], "no-such-command"),
        (&["explain", "no-such-code"], "no-such-code"),
        (&["show", "neither-nor"], "neither-nor"),
    ];
    for (args, named) in wrong {
        let output = node.recoverd(args);
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{args:?}: {said}");
        assert!(
            said.lines().next().unwrap_or_default().contains(named),
            "{args:?}: {said}"
        );
        assert!(output.stdout.is_empty(), "{args:?}");
    }
    for (text, named) in [
        ("no_such_key = 1\n", "no_such_key"),
        ("this is not toml\n", ":1:"),
        ("\n[scan]\nmin-age = true\n", "min-age"),
    ] {
        let config = node.folder().join("config.toml");
        assert!(std::fs::write(&config, text).is_ok());
        let config = config.display().to_string();
        let output = node.recoverd(["--config", &config, "scan"]);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{text:?}: {said}");
        assert!(
            said.contains(named) && said.contains(&config),
            "{text:?}: {said}"
        );
        assert_eq!(said.trim_end().lines().count(), 1, "{text:?}: {said}");
    }
    let absent = node.recoverd(["--config", "/nonexistent.toml", "scan"]);
    assert_eq!(absent.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&absent.stderr).contains("/nonexistent.toml"));
}

fn a_scan_only_reads(release: &Release) {
    let node = Node::start();
    let containerd = node.containerd(release);
    let well = bystander(&containerd);
    let hung = containerd.run(&Container::new("hung"));
    node.freeze(&hung.shim);
    let trace = node.folder().join("strace.out");
    let calls = "trace=open,openat,openat2,creat,unlink,unlinkat,rename,renameat,renameat2,mkdir,mkdirat,\
                 rmdir,link,linkat,symlink,symlinkat,mknod,mknodat,truncate,ftruncate,chmod,fchmod,fchmodat,\
                 chown,fchown,lchown,fchownat,utimensat,mount,umount2,kill,tkill,tgkill,\
                 pidfd_send_signal,rt_sigqueueinfo,ptrace,setns,unshare,inotify_add_watch,chdir,fchdir,\
                 execve,bind,setxattr,fsetxattr,removexattr";
    let traced = |args: &[&str]| {
        let program = node.built("recoverd").display().to_string();
        let trace_path = trace.display().to_string();
        let mut words = vec!["-f", "-qq", "-o", &trace_path, "-e", calls, &program];
        words.extend_from_slice(args);
        let output = node.output("strace", &words);
        let text = std::fs::read_to_string(&trace).unwrap_or_default();
        assert!(
            text.contains("O_RDONLY"),
            "strace saw nothing: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        for line in text.lines() {
            let call = line.trim_start_matches(|c: char| c.is_ascii_digit() || c == ' ');
            let name = call.split('(').next().unwrap_or_default();
            let reads = match name {
                "open" | "openat" | "openat2" => {
                    !["O_WRONLY", "O_RDWR", "O_CREAT", "O_TRUNC", "O_APPEND"]
                        .iter()
                        .any(|flag| call.contains(flag))
                        || call.contains("\"/dev/null\"")
                        // A client end: nothing of the host's.
                        || call.contains("\"/dev/tty\"")
                }
                // The program itself.
                "execve" => call.contains("/recoverd\""),
                // Anything else would be a change, a signal or a hold; resumed lines are the rest
                // of calls that were judged where they began. Of a thread that ends where its call
                // began strace does not know which one that was.
                _ => ["<...", "+++", "---", "???"]
                    .iter()
                    .any(|s| call.starts_with(s)),
            };
            assert!(reads, "recoverd {args:?} did: {line}");
            let into_root = name.starts_with("open") && call.contains("/rootfs");
            assert!(
                !into_root,
                "recoverd {args:?} opened a container's root: {line}"
            );
        }
    };
    traced(&["scan", "-o", "json"]);
    traced(&["scan"]);
    traced(&["show", "e2e/bystander"]);
    traced(&["show", "e2e/hung"]);
    traced(&["preflight"]);
    well.assert_shim_alive();
    hung.assert_init_alive();
    assert_eq!(
        node.process(hung.shim.pid).map(|shim| shim.state),
        Some('T')
    );
}

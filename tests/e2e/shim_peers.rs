//! Peers that mean harm or are broken, and neighbours that are slow: each costs only itself.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use recoverd_common::pb::{runc, task};
use recoverd_common::shim_client::{ShimClient, TASK_SERVICES};
use recoverd_tests::{
    Container, Node, Release, ShimUnderTest, Status, Stdio, Task, oci_process, oci_spec, wait_for,
};

recoverd_tests::tests! {
    // The release has no part in what a stranger sends to a shim.
    once_with_each_shim: [
        broken_peers_cost_only_their_own_connection,
        only_the_own_uid_may_connect,
        blocked_waits_hold_up_no_other_request,
        connect_and_pids_fork_nothing,
    ],
    // The stock shim has no such promise: it holds a lock of the task over each of these.
    once: [
        stuck_umount_holds_up_no_neighbour,
        slow_runtime_holds_up_no_neighbour,
        slow_log_of_a_terminal_holds_up_no_neighbour,
        shim_log_that_nobody_reads_stops_nobody,
    ],
}

/// Frames as ttrpc has them: length, stream, type, flags; then the payload.
fn frame(length: u32, stream: u32, kind: u8, payload: &[u8]) -> Vec<u8> {
    let mut bytes = length.to_be_bytes().to_vec();
    bytes.extend(stream.to_be_bytes());
    bytes.extend([kind, 0]);
    bytes.extend(payload);
    bytes
}

/// The Connect of a shim's task service, over a connection of its own.
fn answers(node: &Node, task: &Task) -> Result<(), String> {
    let deadline = Instant::now() + Duration::from_secs(60);
    let mut client = ShimClient::connect(&node.path(task.socket()), task.namespace(), deadline)
        .map_err(|error| error.to_string())?;
    let answer = client
        .connect_task(task.id())
        .map_err(|error| error.to_string())?;
    if answer.task_pid == task.init.pid {
        Ok(())
    } else {
        Err(format!("{answer:?}"))
    }
}

/// Whether the shim has ended this connection, seen within a second or so.
fn is_closed(mut stream: &UnixStream) -> bool {
    stream
        .set_read_timeout(Some(Duration::from_millis(100)))
        .expect("set a timeout");
    let mut buffer = [0; 4096];
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => return true,
            // An answer that says what is wrong.
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::ConnectionReset => return true,
            Err(_) => return false,
        }
    }
}

fn broken_peers_cost_only_their_own_connection(release: &Release, shim: ShimUnderTest) {
    let node = Node::start();
    let containerd = node.containerd(release);
    let task = containerd.run(&Container::new("target").shim(shim));
    let api = containerd.api("e2e");
    let garbage: Vec<u8> = (0..4096_u32)
        .map(|n| n.wrapping_mul(2_654_435_761).to_be_bytes()[1])
        .collect();
    let request = [0x0a, 0x02, b'h', b'i'];
    let peers: [(&str, Vec<u8>); 9] = [
        ("nothing", Vec::new()),
        ("garbage", garbage.clone()),
        ("text", b"GET / HTTP/1.1\r\nHost: shim\r\n\r\n".to_vec()),
        ("half a header", frame(4, 1, 1, &[])[..7].to_vec()),
        ("half a frame", frame(1000, 1, 1, &garbage[..500])),
        ("a giant frame", frame(u32::MAX, 1, 1, &garbage)),
        (
            "a frame just too long",
            frame((4 << 20) + 1, 1, 1, &garbage),
        ),
        ("an unknown type", frame(4, 1, 77, &request)),
        ("an even stream", frame(4, 2, 1, &request)),
    ];
    // All at once, and none of them leaves by itself.
    let mut open = Vec::new();
    for (what, bytes) in &peers {
        let mut stream = UnixStream::connect(node.path(task.socket())).expect("connect");
        // It may be closed before all is written.
        let _refused = stream.write_all(bytes);
        answers(&node, &task).unwrap_or_else(|error| panic!("after {what}: {error}"));
        assert_eq!(api.phase("target", ""), Status::Running, "after {what}");
        open.push((*what, stream));
    }
    // And in great number, coming and going.
    let many: Vec<UnixStream> = (0..100)
        .map(|_| UnixStream::connect(node.path(task.socket())).expect("connect"))
        .collect();
    for (number, mut stream) in many.iter().enumerate() {
        let _refused = stream.write_all(&garbage[number..]);
    }
    answers(&node, &task).expect("a hundred peers");
    drop(many);
    api.run_exec(
        "target",
        "still",
        &oci_process(&["sh", "-c", "exit 3"]),
        &Stdio::default(),
    );
    assert_eq!(api.status("target", "still"), 3);

    // Who waits for the rest of a frame keeps its connection; who broke the protocol has lost it.
    if shim == ShimUnderTest::Recoverd {
        for (what, stream) in &open {
            let patient = ["nothing", "half a header", "half a frame"].contains(what);
            if !patient {
                wait_for(
                    &format!("the end of the connection that sent {what}"),
                    || is_closed(stream).then_some(()),
                );
            } else {
                assert!(!is_closed(stream), "{what}");
            }
        }
    }
    task.assert_shim_alive();
    task.assert_init_alive();
    drop(open);

    // A peer that asks and does not read the answers is not waited for.
    let mut deaf = UnixStream::connect(node.path(task.socket())).expect("connect");
    deaf.set_nonblocking(true).expect("set non-blocking");
    let state = prost_request(
        "State",
        &task::StateRequest {
            id: "target".into(),
            exec_id: String::new(),
        },
    );
    let mut stream = 1;
    for _ in 0..20_000 {
        let bytes = frame(
            u32::try_from(state.len()).expect("short"),
            stream,
            1,
            &state,
        );
        match deaf.write(&bytes) {
            Ok(count) if count == bytes.len() => stream += 2,
            // Full, or closed: enough.
            Ok(_) | Err(_) => break,
        }
    }
    answers(&node, &task).expect("beside a deaf peer");
    assert_eq!(api.phase("target", ""), Status::Running);
    drop(deaf);
    containerd.remove(&task);
    node.wait_gone(&task.shim);
}

/// A request of the newer task service, which every stock shim of 2.x and ours have.
fn prost_request(method: &str, request: &impl prost::Message) -> Vec<u8> {
    use prost::Message;
    let [_, service] = TASK_SERVICES;
    recoverd_common::pb::ttrpc::Request {
        service: service.into(),
        method: method.into(),
        payload: request.encode_to_vec(),
        timeout_nano: 0,
        metadata: Vec::new(),
    }
    .encode_to_vec()
}

fn only_the_own_uid_may_connect(release: &Release, shim: ShimUnderTest) {
    let node = Node::start();
    let containerd = node.containerd(release);
    let task = containerd.run(&Container::new("guarded").shim(shim));
    let socket = task.socket().display().to_string();
    assert_eq!(node.run("stat", ["-c", "%a %u", &socket]), "600 0\n");
    // Its mode keeps others out; opened to them by mistake, its shim still does.
    node.shell(&format!(
        "chmod 0666 {socket}; chmod 0755 /run/containerd /run/containerd/s"
    ));
    let state = prost_request(
        "State",
        &task::StateRequest {
            id: "guarded".into(),
            exec_id: String::new(),
        },
    );
    let request = frame(u32::try_from(state.len()).expect("short"), 1, 1, &state);
    let file = node.folder().join("request");
    std::fs::write(&file, &request).expect("write a request");
    node.run("chmod", ["0755".as_ref(), node.folder().as_os_str()]);
    let ask = |uid: &str| -> Vec<u8> {
        let script = "use Socket; socket(S, AF_UNIX, SOCK_STREAM, 0) or die; \
                      connect(S, sockaddr_un($ARGV[0])) or die \"connect: $!\"; \
                      open(F, '<', $ARGV[1]) or die \"open: $!\"; local $/; $SIG{PIPE} = 'IGNORE'; \
                      syswrite(S, <F>); sysread(S, $_, 4096); print length";
        let file = file.display().to_string();
        let output = node.output(
            "setpriv",
            [
                "--reuid",
                uid,
                "--regid",
                "0",
                "--clear-groups",
                "perl",
                "-e",
                script,
                &socket,
                &file,
            ],
        );
        assert!(output.status.success(), "{output:?}");
        output.stdout
    };
    assert_ne!(ask("0"), b"0", "root was not answered");
    assert_eq!(ask("65534"), b"0", "nobody was answered");
    answers(&node, &task).expect("root is answered after that too");
    containerd.remove(&task);
}

/// How long each State of a task takes while `meanwhile` goes on.
fn state_times(node: &Node, task: &Task, meanwhile: impl FnOnce() + Send) -> Vec<Duration> {
    let deadline = Instant::now() + Duration::from_secs(300);
    let mut client =
        ShimClient::connect(&node.path(task.socket()), "e2e", deadline).expect("connect");
    std::thread::scope(|scope| {
        let work = scope.spawn(meanwhile);
        let mut times = Vec::new();
        while !work.is_finished() {
            let began = Instant::now();
            let state = client.state(task.id()).expect("state of a neighbour");
            times.push(began.elapsed());
            assert_eq!(state.pid, task.init.pid);
            std::thread::sleep(Duration::from_millis(50));
        }
        work.join().expect("what went on meanwhile");
        times
    })
}

/// Most answers at once, and none so late that it could have waited for the slow thing, which was
/// `held` for so long. (The machine that tests is busy, and strace stops the shim at every call.)
#[track_caller]
fn assert_prompt(mut times: Vec<Duration>, at_least: usize, held: Duration) {
    times.sort_unstable();
    assert!(times.len() >= at_least, "only {} answers", times.len());
    let (median, last) = (times[times.len() / 2], times[times.len() - 1]);
    assert!(
        median < held / 10 && last < held * 2 / 3,
        "median {median:?}, last {last:?}, held {held:?}"
    );
}

/// strace makes every umount of the shim's children begin 12 s late.
fn stuck_umount_holds_up_no_neighbour(release: &Release) {
    let node = Node::start();
    let containerd = node.containerd(release);
    containerd.import_image("e2e");
    let group = |id: &str| {
        Container::new(id)
            .shim(ShimUnderTest::Recoverd)
            .group("calm")
    };
    let calm = containerd.run(&group("calm"));
    let stuck = containerd.run(&group("stuck").image());
    assert_eq!(calm.shim.pid, stuck.shim.pid);
    let api = containerd.api("e2e");
    api.kill("stuck", "", 9).expect("kill");
    api.status("stuck", "");
    let pid = calm.shim.pid.to_string();
    let mut strace = node.spawn(
        "strace",
        [
            "-f",
            "-q",
            "-p",
            &pid,
            "-e",
            "trace=umount2",
            "-e",
            "inject=umount2:delay_enter=12000000",
        ],
    );
    node.wait_traced(&calm.shim, true);
    let mut took = Duration::ZERO;
    let times = state_times(&node, &calm, || {
        let began = Instant::now();
        assert_eq!(api.delete("stuck", "").expect("delete").status, 137);
        took = began.elapsed();
    });
    assert!(
        took >= Duration::from_secs(12),
        "the umount was not held: {took:?}"
    );
    assert_prompt(times, 20, Duration::from_secs(12));
    assert!(strace.is_running());
    drop(strace);
    calm.assert_shim_alive();
    calm.assert_init_alive();
    containerd.remove(&calm);
}

/// strace makes every opening of a terminal's log file, and every write to it, begin 6 s late.
fn slow_log_of_a_terminal_holds_up_no_neighbour(release: &Release) {
    let node = Node::start();
    let containerd = node.containerd(release);
    let api = containerd.api("e2e");
    let calm = containerd.run(
        &Container::new("calm")
            .shim(ShimUnderTest::Recoverd)
            .group("calm"),
    );
    let pid = calm.shim.pid.to_string();
    for (id, scheme) in [("uri", "file://"), ("path", "")] {
        let log = node.folder().join(format!("{id}.log"));
        let log = log.display().to_string();
        std::fs::write(&log, "before\n").expect("write a log");
        let strace = node.spawn(
            "strace",
            [
                "-f",
                "-q",
                "-p",
                &pid,
                "-P",
                &log,
                "-e",
                "trace=openat,write,splice",
                "-e",
                "inject=openat,write,splice:delay_enter=6000000",
            ],
        );
        node.wait_traced(&calm.shim, true);
        let mut spec = oci_spec(id, &["sh", "-c", "echo one; echo two; exit 5"]);
        spec["process"]["terminal"] = serde_json::json!(true);
        spec["annotations"] = serde_json::json!({"io.containerd.runc.v2.group": "calm"});
        let stdio = Stdio {
            stdout: format!("{scheme}{log}"),
            terminal: true,
            ..Stdio::default()
        };
        api.container(id, &spec, ShimUnderTest::Recoverd, None);
        let began = Instant::now();
        let times = state_times(&node, &calm, || {
            api.create(id, &stdio).expect("create");
            assert!(
                began.elapsed() >= Duration::from_secs(6),
                "opening the log was not held"
            );
            api.start(id, "").expect("start");
            assert_eq!(api.status(id, ""), 5);
            // Waits until everything is written.
            api.delete(id, "").expect("delete");
        });
        assert!(
            began.elapsed() >= Duration::from_secs(12),
            "writing the log was not held"
        );
        assert_prompt(times, 20, Duration::from_secs(6));
        drop(strace);
        node.wait_traced(&calm.shim, false);
        let text = std::fs::read_to_string(&log).expect("read a log");
        assert_eq!(text, "before\none\r\ntwo\r\n", "{id}");
    }
    calm.assert_shim_alive();
    containerd.remove(&calm);
    node.wait_gone(&calm.shim);
}

/// A runtime that takes 3 s for everything, and for a start as long as a neighbour is at work: State,
/// Pids and exits of neighbours do not wait for it.
fn slow_runtime_holds_up_no_neighbour(release: &Release) {
    let node = Node::start();
    let containerd = node.containerd(release);
    let api = containerd.api("e2e");
    let wrapper = node.folder().join("slow-runc");
    let quick = node.folder().join("quick");
    let script = format!(
        "#!/bin/sh\nsleep 3\ncase \" $* \" in *' start '*)\n\
         while [ ! -e {} ]; do sleep 0.02; done\nesac\nexec runc \"$@\"\n",
        quick.display()
    );
    std::fs::write(&wrapper, script).expect("write a wrapper");
    node.run("chmod", ["+x".as_ref(), wrapper.as_os_str()]);
    let calm = containerd.run(
        &Container::new("calm")
            .shim(ShimUnderTest::Recoverd)
            .group("calm"),
    );
    let mut spec = oci_spec("slow", &["sleep", "1000"]);
    spec["annotations"] = serde_json::json!({"io.containerd.runc.v2.group": "calm"});
    let options = runc::Options {
        binary_name: wrapper.display().to_string(),
        ..runc::Options::default()
    };
    api.container("slow", &spec, ShimUnderTest::Recoverd, Some(&options));
    let times = state_times(&node, &calm, || {
        api.create("slow", &Stdio::default()).expect("create");
        // A short exec of the neighbour, from its first to its last call, within one slow one.
        std::thread::scope(|scope| {
            let starting = scope.spawn(|| api.start("slow", ""));
            api.run_exec(
                "calm",
                "quick",
                &oci_process(&["sh", "-c", "exit 6"]),
                &Stdio::default(),
            );
            assert_eq!(api.status("calm", "quick"), 6);
            assert!(!api.pids("calm").expect("pids").is_empty());
            assert!(!starting.is_finished(), "the slow start was not slow");
            std::fs::write(&quick, "").expect("write a file");
            starting.join().expect("start").expect("start");
        });
        assert_eq!(api.end("slow").status, 137);
    });
    assert_prompt(times, 20, Duration::from_secs(3));
    assert_eq!(node.shims().len(), 1);
    containerd.remove(&calm);
}

/// Sends these requests on one connection, each on the stream that it is numbered by.
fn send(stream: &mut UnixStream, requests: &[(u32, Vec<u8>)]) {
    let mut bytes = Vec::new();
    for (number, request) in requests {
        let length = u32::try_from(request.len()).expect("short");
        bytes.extend(frame(length, *number, 1, request));
    }
    stream.write_all(&bytes).expect("send requests");
}

/// The next answer: its stream and its payload.
fn receive(stream: &mut UnixStream) -> (u32, Vec<u8>) {
    use prost::Message;
    let mut header = [0; 10];
    stream.read_exact(&mut header).expect("read an answer");
    let word = |at: usize| u32::from_be_bytes([0, 1, 2, 3].map(|n| header[at + n]));
    let mut body = vec![0; word(0) as usize];
    stream.read_exact(&mut body).expect("read an answer");
    let answer = recoverd_common::pb::ttrpc::Response::decode(body.as_slice());
    let answer = answer.expect("decode an answer");
    let code = answer.status.map_or(0, |status| status.code);
    assert_eq!(code, 0, "stream {}", word(4));
    (word(4), answer.payload)
}

/// Many requests at once on one connection and on many; those that wait keep nobody else waiting.
fn blocked_waits_hold_up_no_other_request(release: &Release, shim: ShimUnderTest) {
    use prost::Message;
    const WAITS: u32 = 24;
    let node = Node::start();
    let containerd = node.containerd(release);
    let task = containerd.run(&Container::new("host").shim(shim));
    let api = containerd.api("e2e");
    let mut pids = Vec::new();
    for number in 0..WAITS {
        let exec_id = format!("w{number}");
        let command = format!("trap 'exit {number}' TERM; while :; do sleep 1000 & wait $!; done");
        pids.push(api.run_exec(
            "host",
            &exec_id,
            &oci_process(&["sh", "-c", &command]),
            &Stdio::default(),
        ));
    }
    // Each has set its trap.
    for pid in &pids {
        wait_for("what its shell starts", || {
            let mut all = node.processes().into_iter();
            all.find(|p| p.parent == *pid && p.argv == ["sleep", "1000"])
        });
    }
    let connect = || {
        let stream = UnixStream::connect(node.path(task.socket())).expect("connect");
        let limit = Some(Duration::from_secs(60));
        stream.set_read_timeout(limit).expect("set a timeout");
        stream
    };
    let key = |exec_id: String| task::StateRequest {
        id: "host".into(),
        exec_id,
    };
    // All on one connection, and all through containerd, which has one connection too.
    let mut one = connect();
    let waits: Vec<(u32, Vec<u8>)> = (0..WAITS)
        .map(|n| (2 * n + 1, prost_request("Wait", &key(format!("w{n}")))))
        .collect();
    send(&mut one, &waits);
    std::thread::scope(|scope| {
        let waiting: Vec<_> = (0..WAITS)
            .map(|n| {
                let api = &api;
                scope.spawn(move || api.status("host", &format!("w{n}")))
            })
            .collect();
        // What is asked after them is answered before them.
        let states: Vec<(u32, Vec<u8>)> = (0..200)
            .map(|n| {
                let exec_id = format!("w{}", n % WAITS);
                (1001 + 2 * n, prost_request("State", &key(exec_id)))
            })
            .collect();
        send(&mut one, &states);
        let mut answered: Vec<u32> = states
            .iter()
            .map(|_| {
                let (stream, payload) = receive(&mut one);
                let state = task::StateResponse::decode(payload.as_slice()).expect("a state");
                let expected = pids[((stream - 1001) / 2 % WAITS) as usize];
                assert_eq!(state.pid, expected, "the answer of another stream");
                stream
            })
            .collect();
        answered.sort_unstable();
        let asked: Vec<u32> = states.iter().map(|(stream, _)| *stream).collect();
        assert_eq!(answered, asked);
        let mut many: Vec<UnixStream> = (0..40).map(|_| connect()).collect();
        for stream in &mut many {
            send(stream, &states[..20]);
        }
        for stream in &mut many {
            for _ in 0..20 {
                receive(stream);
            }
        }
        for _ in 0..20 {
            assert_eq!(api.phase("host", "w0"), Status::Running);
        }
        assert!(waiting.iter().all(|wait| !wait.is_finished()));
        // Each has its own end, in whatever order they come.
        for number in (0..WAITS).rev() {
            api.kill("host", &format!("w{number}"), 15).expect("kill");
        }
        let mut ends: Vec<(u32, u32)> = (0..WAITS)
            .map(|_| {
                let (stream, payload) = receive(&mut one);
                let end = task::WaitResponse::decode(payload.as_slice()).expect("an exit");
                (stream, end.exit_status)
            })
            .collect();
        ends.sort_unstable();
        let expected: Vec<(u32, u32)> = (0..WAITS).map(|n| (2 * n + 1, n)).collect();
        assert_eq!(ends, expected);
        for (number, wait) in (0..WAITS).zip(waiting) {
            assert_eq!(wait.join().expect("wait"), number);
        }
    });
    containerd.remove(&task);
}

/// containerd asks them of every shim at its start, in turn, and without a limit for Pids: neither
/// may wait for a process. The stock shim runs `runc ps`.
fn connect_and_pids_fork_nothing(release: &Release, shim: ShimUnderTest) {
    let node = Node::start();
    let containerd = node.containerd(release);
    let api = containerd.api("e2e");
    let task = containerd.run(&Container::new("asked").shim(shim));
    let seen = node.folder().join("processes");
    let pid = task.shim.pid.to_string();
    let calls = "trace=execve,execveat,fork,vfork";
    let file = seen.display().to_string();
    let _strace = node.spawn("strace", ["-f", "-q", "-p", &pid, "-e", calls, "-o", &file]);
    node.wait_traced(&task.shim, true);
    let began = || {
        let text = std::fs::read_to_string(&seen).unwrap_or_default();
        // Ends of children are there too.
        text.lines().filter(|line| line.contains('(')).count()
    };
    for _ in 0..30 {
        answers(&node, &task).expect("Connect");
        assert!(!api.pids("asked").expect("Pids").is_empty());
        assert_eq!(api.phase("asked", ""), Status::Running);
    }
    assert_eq!(began() > 0, shim == ShimUnderTest::Stock, "{}", began());
    // It would have been seen.
    let before = began();
    api.run_exec("asked", "quick", &oci_process(&["true"]), &Stdio::default());
    assert_eq!(api.status("asked", "quick"), 0);
    wait_for("the runtime to be seen", || {
        (began() > before).then_some(())
    });
    containerd.remove(&task);
}

/// The fifo `log` in the bundle: containerd hangs and the fifo is full; containerd is gone; it is
/// back. (The stock shim writes there as to any file: full, it stops for ever.)
fn shim_log_that_nobody_reads_stops_nobody(release: &Release) {
    let node = Node::start();
    let mut containerd = node.containerd(release);
    containerd.stop();
    containerd.log_level("debug");
    containerd.start();
    let task = containerd.run(&Container::new("mute").shim(ShimUnderTest::Recoverd));
    assert!(
        task.shim.argv.iter().any(|word| word == "-debug"),
        "{:?}",
        task.shim
    );
    // A whole exec, of which the shim logs every step, and a refusal.
    let round = |name: &str| {
        let exec = task::ExecProcessRequest {
            id: "mute".into(),
            exec_id: name.into(),
            spec: Some(prost_types::Any {
                type_url: "types.containerd.io/opencontainers/runtime-spec/1/Process".into(),
                value: oci_process(&["sh", "-c", "exit 3"])
                    .to_string()
                    .into_bytes(),
            }),
            ..Default::default()
        };
        task.call::<()>("Exec", &exec).expect("exec");
        let again = task.call::<()>("Exec", &exec);
        let (_, refused) = recoverd_tests::refusal(again);
        assert!(refused.contains(name), "{refused}");
        let start = task::StartRequest {
            id: "mute".into(),
            exec_id: name.into(),
        };
        task.call::<task::StartResponse>("Start", &start)
            .expect("start");
        assert_eq!(task.wait(name).exit_status, 3);
        let delete = task::DeleteRequest {
            id: "mute".into(),
            exec_id: name.into(),
        };
        task.call::<task::DeleteResponse>("Delete", &delete)
            .expect("delete");
        task.assert_shim_alive();
        task.assert_init_alive();
    };
    let fill = || {
        let fifo = node.path(task.bundle().join("log"));
        let flags = nix::fcntl::OFlag::O_NONBLOCK.bits();
        let open = std::os::unix::fs::OpenOptionsExt::custom_flags(
            std::fs::File::options().read(true).write(true),
            flags,
        )
        .open(fifo);
        let mut fifo = open.expect("open the log");
        // In lines, and to the last byte.
        let mut line = vec![b'x'; 4095];
        line.push(b'\n');
        while fifo.write_all(&line).is_ok() {}
        while fifo.write_all(b"\n").is_ok() {}
        fifo
    };
    let daemon = containerd.process();
    node.freeze(&daemon);
    let full = fill();
    round("hung");
    containerd.kill();
    round("gone");
    drop(full);
    // Nobody at all has it open now but the shim.
    round("alone");
    containerd.start();
    round("back");
    wait_for("the shim's voice in containerd's log", || {
        containerd.log().contains("id back is in use").then_some(())
    });
    containerd.remove(&task);
    node.wait_gone(&task.shim);
}

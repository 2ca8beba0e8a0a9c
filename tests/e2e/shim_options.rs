//! What a shim is told when it is started and what it passes on: runc's options and the CRI's, the
//! level of the log, its place among those that the kernel kills. The stock shim is the control.

use prost_types::Any;
use recoverd_common::pb::{runc, runtimeoptions, type_url};
use recoverd_tests::{
    Code, Container, KILLED, Node, Release, SLEEPER, ShimUnderTest, Status, Stdio, assert_refused,
    oci_process, oci_spec,
};
use serde_json::{Value, json};

recoverd_tests::tests! {
    // What runc is told does not depend on the release that passed the options on.
    once_with_each_shim: [
        options_of_runc_are_passed_on,
        shim_is_killed_before_its_containerd,
    ],
    on_every_release: [
        options_of_the_cri_are_understood,
        debug_logs_more_and_changes_nothing,
    ],
}

fn none() -> Stdio {
    Stdio::default()
}

fn options_of_runc_are_passed_on(release: &Release, shim: ShimUnderTest) {
    let node = Node::start();
    let containerd = node.containerd(release);
    let api = containerd.api("e2e");

    // Every runtime command leaves its arguments here.
    let wrapper = node.folder().join("runtime");
    let calls = node.folder().join("calls");
    std::fs::write(
        &wrapper,
        format!(
            "#!/bin/sh\necho \"$@\" >>{}\nexec runc \"$@\"\n",
            calls.display()
        ),
    )
    .expect("write a wrapper");
    node.run("chmod", ["+x".as_ref(), wrapper.as_os_str()]);
    // As the stock shim wants it, it exists already.
    node.shell(
        "for h in /sys/fs/cgroup /sys/fs/cgroup/*; do
            for f in $h/shims $h/shims/here; do
                [ ! -e $h/cgroup.procs ] || mkdir -p $f
                if [ -e $f/cpuset.mems ]; then
                    cat ${f%/*}/cpuset.mems >$f/cpuset.mems
                    cat ${f%/*}/cpuset.cpus >$f/cpuset.cpus
                fi
            done
        done",
    );
    let options = runc::Options {
        binary_name: wrapper.display().to_string(),
        root: "/run/elsewhere".into(),
        no_pivot_root: true,
        no_new_keyring: true,
        shim_cgroup: "/shims/here".into(),
        ..runc::Options::default()
    };
    api.container(
        "wrapped",
        &oci_spec("wrapped", &SLEEPER),
        shim,
        Some(&options),
    );
    api.create("wrapped", &none()).expect("create");
    api.start("wrapped", "").expect("start");
    assert!(node.path("/run/elsewhere/e2e/wrapped/state.json").exists());
    assert!(!node.path("/run/containerd/runc/e2e/wrapped").exists());
    let shim_process = node.shims().into_iter().next().expect("a shim");
    let cgroups = node.run("cat", [format!("/proc/{}/cgroup", shim_process.pid)]);
    assert!(
        cgroups.lines().any(|line| line.ends_with(":/shims/here")),
        "{cgroups}"
    );
    api.run_exec("wrapped", "quick", &oci_process(&["true"]), &none());
    assert_eq!(api.status("wrapped", "quick"), 0);
    api.pause("wrapped").expect("pause");
    api.resume("wrapped").expect("resume");
    api.update("wrapped", &json!({"pids": {"limit": 9}}))
        .expect("update");
    assert_eq!(api.end("wrapped").status, KILLED);
    let calls = std::fs::read_to_string(&calls).expect("read the wrapper's calls");
    for verb in [
        "create", "start", "exec", "pause", "resume", "update", "delete",
    ] {
        let call = calls
            .lines()
            .find(|line| line.split(' ').any(|word| word == verb))
            .unwrap_or_else(|| panic!("no {verb} in {calls}"));
        assert!(call.contains("--root /run/elsewhere/e2e"), "{call}");
        assert!(call.contains("--log-format json"), "{call}");
        assert_eq!(call.contains("--no-pivot"), verb == "create", "{call}");
        assert_eq!(
            call.contains("--no-new-keyring"),
            verb == "create",
            "{call}"
        );
        assert!(!call.contains("--systemd-cgroup"), "{call}");
    }
    node.wait_no_shims();

    // The systemd cgroup driver is passed on too: without a systemd runc says so.
    let options = runc::Options {
        systemd_cgroup: true,
        ..runc::Options::default()
    };
    let mut spec = oci_spec("sliced", &SLEEPER);
    spec["linux"]["cgroupsPath"] = json!("system.slice:e2e:sliced");
    api.container("sliced", &spec, shim, Some(&options));
    let failed = api
        .create("sliced", &none())
        .expect_err("there is no systemd here");
    assert!(failed.message.contains("systemd"), "{failed:?}");
    node.wait_no_shims();

    // Another runtime altogether.
    let options = runc::Options {
        binary_name: "crun".into(),
        ..runc::Options::default()
    };
    api.container("crun", &oci_spec("crun", &SLEEPER), shim, Some(&options));
    let pid = api.create("crun", &none()).expect("create with crun");
    assert_eq!(api.start("crun", ""), Ok(pid));
    assert_eq!(api.phase("crun", ""), Status::Running);
    api.run_exec(
        "crun",
        "seven",
        &oci_process(&["sh", "-c", "exit 7"]),
        &none(),
    );
    assert_eq!(api.status("crun", "seven"), 7);
    api.delete("crun", "seven")
        .expect("delete an exec of crun's");
    api.pause("crun").expect("pause with crun");
    assert_eq!(api.phase("crun", ""), Status::Paused);
    api.resume("crun").expect("resume with crun");
    let absent = api.exec(
        "crun",
        "absent",
        &oci_process(&["/no/such/program"]),
        &none(),
    );
    assert_eq!(absent, Ok(()));
    assert_refused(
        api.start("crun", "absent"),
        Code::Unknown,
        "OCI runtime exec failed",
    );
    assert_eq!(api.end("crun").status, KILLED);
    node.wait_no_shims();
}

/// The CRI sends options of a type of its own to every runtime that is not called
/// `io.containerd.runc.v2`: TOML in them, or (all that 1.6 passes on) in a file that they name. The
/// stock shim refuses such a task.
fn options_of_the_cri_are_understood(release: &Release) {
    let node = Node::start();
    let containerd = node.containerd(release);
    let api = containerd.api("e2e");
    let script = "echo \"$@\" >>$0.calls; exec runc \"$@\"";
    let wrapper = node.folder().join("runtime");
    std::fs::write(&wrapper, format!("#!/bin/sh\n{script}\n")).expect("write a wrapper");
    node.run("chmod", ["+x".as_ref(), wrapper.as_os_str()]);
    let toml = |root: &str| {
        format!(
            "BinaryName = \"{}\"\nRoot = \"{root}\"\nNoPivotRoot = true\nSystemdCgroup = false\n\
             IoUid = 0\nCriuPath = \"/no/criu\"\nUnknown = [1, 2]\n[table]\nNoNewKeyring = true\n",
            wrapper.display()
        )
    };
    let file = node.folder().join("options.toml");
    std::fs::write(&file, toml("/run/by-path")).expect("write options");
    let any = |options: &runtimeoptions::Options| {
        Some(Any {
            type_url: type_url::RUNTIME_OPTIONS.into(),
            value: prost::Message::encode_to_vec(options),
        })
    };
    let by_body = runtimeoptions::Options {
        type_url: type_url::RUNC_OPTIONS.into(),
        config_body: toml("/run/by-body").into_bytes(),
        ..Default::default()
    };
    let by_path = runtimeoptions::Options {
        config_path: file.display().to_string(),
        ..Default::default()
    };
    for (id, options) in [("by-body", &by_body), ("by-path", &by_path)] {
        let spec = oci_spec(id, &SLEEPER);
        api.container_with(id, &spec, ShimUnderTest::Recoverd, any(options));
        api.create(id, &none()).expect("create");
        api.start(id, "").expect("start");
        assert!(node.path(format!("/run/{id}/e2e/{id}/state.json")).exists());
        api.run_exec(id, "quick", &oci_process(&["sh", "-c", "exit 4"]), &none());
        assert_eq!(api.status(id, "quick"), 4);
        assert_eq!(api.end(id).status, KILLED);
        let calls = wrapper.with_extension("calls");
        let said = std::fs::read_to_string(&calls).expect("read the wrapper's calls");
        for verb in ["create", "start", "exec", "delete"] {
            let call = said.lines().find(|line| line.split(' ').any(|w| w == verb));
            let call = call.unwrap_or_else(|| panic!("no {verb} in {said}"));
            assert!(call.contains(&format!("--root /run/{id}/e2e")), "{call}");
            assert_eq!(call.contains("--no-pivot"), verb == "create", "{call}");
            // Of a table that no runc shim knows.
            assert!(!call.contains("--no-new-keyring"), "{call}");
        }
        std::fs::remove_file(calls).expect("remove the wrapper's calls");
    }
    node.wait_no_shims();

    // One line that names what is wrong; nothing stays.
    let broken = runtimeoptions::Options {
        config_body: b"Root = \"/run/fine\"\nNoPivotRoot = \"yes\"\n".to_vec(),
        ..Default::default()
    };
    let missing = runtimeoptions::Options {
        config_path: "/no/such/options.toml".into(),
        ..Default::default()
    };
    for (id, options, says) in [
        ("broken", &broken, "line 2"),
        ("missing", &missing, "/no/such/options.toml"),
    ] {
        let spec = oci_spec(id, &SLEEPER);
        api.container_with(id, &spec, ShimUnderTest::Recoverd, any(options));
        let refused = api.create(id, &none()).expect_err("bad options");
        assert!(refused.message.contains(says), "{refused:?}");
        node.wait_no_shims();
    }
    let spec = oci_spec("stock", &SLEEPER);
    api.container_with("stock", &spec, ShimUnderTest::Stock, any(&by_path));
    api.create("stock", &none())
        .expect_err("the control understands them");

    // Every option of runc's own type that some release knows is accepted, with or without a use.
    let all = runc::Options {
        criu_path: "/no/criu".into(),
        criu_image_path: "/run/images".into(),
        criu_work_path: "/run/work".into(),
        io_uid: 0,
        io_gid: 0,
        task_api_version: 2,
        ..runc::Options::default()
    };
    let spec = oci_spec("all", &SLEEPER);
    api.container("all", &spec, ShimUnderTest::Recoverd, Some(&all));
    api.create("all", &none()).expect("create");
    let kept = "/run/containerd/io.containerd.runtime.v2.task/e2e/all/options.json";
    let kept = std::fs::read_to_string(node.path(kept)).expect("read options.json");
    let kept: Value = serde_json::from_str(&kept).expect("options.json is JSON");
    assert_eq!(kept["criu_path"], "/no/criu");
    assert_eq!(kept["criu_image_path"], "/run/images");
    api.end("all");
    // A type and no value: what containerd 1.7 and later send for a runtime without options.
    let empty = Any {
        type_url: type_url::RUNTIME_OPTIONS.into(),
        value: Vec::new(),
    };
    let spec = oci_spec("empty", &SLEEPER);
    api.container_with("empty", &spec, ShimUnderTest::Recoverd, Some(empty));
    api.create("empty", &none()).expect("create");
    api.end("empty");
    node.wait_no_shims();
}

/// `ctr run` under a daemon that logs at level debug starts shims with `-debug`.
fn debug_logs_more_and_changes_nothing(release: &Release) {
    let node = Node::start();
    let mut containerd = node.containerd(release);
    containerd.stop();
    containerd.log_level("debug");
    containerd.start();
    for shim in [ShimUnderTest::Stock, ShimUnderTest::Recoverd] {
        let id = if shim == ShimUnderTest::Stock {
            "stock"
        } else {
            "ours"
        };
        let task = containerd.run(&Container::new(id).shim(shim));
        assert!(
            task.shim.argv.iter().any(|word| word == "-debug"),
            "{:?}",
            task.shim
        );
        let api = containerd.api("e2e");
        api.run_exec(id, "quick", &oci_process(&["sh", "-c", "exit 4"]), &none());
        assert_eq!(api.status(id, "quick"), 4);
        containerd.remove(&task);
        node.wait_gone(&task.shim);
    }
}

/// When memory is short the kernel takes the shim before containerd, by a little.
fn shim_is_killed_before_its_containerd(release: &Release, shim: ShimUnderTest) {
    let node = Node::start();
    let containerd = node.containerd(release);
    let daemon = containerd.process().pid;
    let score = |pid: u32| -> i32 {
        let text = node.run("cat", [format!("/proc/{pid}/oom_score_adj")]);
        text.trim().parse().expect("a score")
    };
    // What the machine allows: it may forbid to lower it.
    let begin = score(daemon);
    for (id, of_containerd) in [("low", begin), ("high", 500), ("highest", 1000)] {
        node.shell(&format!(
            "echo {of_containerd} >/proc/{daemon}/oom_score_adj"
        ));
        let task = containerd.run(&Container::new(id).shim(shim));
        assert_eq!(score(task.shim.pid), (of_containerd + 1).min(1000), "{id}");
        containerd.remove(&task);
    }
}

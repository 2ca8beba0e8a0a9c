//! The other commands that look: `show`, `explain`, `dump`, `config`, `preflight`, and `scan`'s
//! other outputs.

use std::process::Output;

use recoverd_tests::{Container, Node, Release};

recoverd_tests::tests! {
    on_every_release: [
        show_tells_whose_word_each_fact_is,
        preflight_is_quiet_on_a_healthy_node_and_names_what_is_not,
        dump_packs_what_a_bug_report_needs,
    ],
    once: [
        explain_knows_every_code,
        table_and_prometheus_say_what_json_says,
        config_tells_where_each_value_comes_from,
    ],
}

/// Every code of the specification.
const CODES: [&str; 21] = [
    "orphaned-task",
    "unresponsive-shim",
    "duplicate-workload",
    "socket-missing",
    "task-unknown-to-containerd",
    "leaked-shim",
    "stuck-task",
    "exit-unreported",
    "outdated-shim",
    "stale-bundle",
    "stale-socket",
    "stale-record",
    "unreadable-record",
    "leaked-mount",
    "leaked-cgroup",
    "leaked-fifo",
    "leaked-runc-state",
    "run-nearly-full",
    "leaked-exec",
    "bloated-shim",
    "foreign",
];

fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn show_tells_whose_word_each_fact_is(release: &Release) {
    let node = Node::start();
    let mut containerd = node.containerd(release);
    let task = containerd.run(&Container::new("shown"));
    let output = node.recoverd(["show", "e2e/shown"]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let text = stdout(&output);
    for fact in [
        task.init.pid.to_string(),
        task.shim.pid.to_string(),
        task.socket().display().to_string(),
        task.bundle().display().to_string(),
    ] {
        assert!(text.contains(&fact), "{fact} is missing:\n{text}");
    }
    for witness in ["kernel", "shim", "containerd"] {
        assert!(text.contains(witness), "nobody says {witness}:\n{text}");
    }
    assert_eq!(node.recoverd(["show", "e2e/absent"]).status.code(), Some(2));

    containerd.kill();
    node.kill(&task.shim);
    let broken = node.recoverd(["show", "e2e/shown"]);
    assert_eq!(broken.status.code(), Some(1), "{broken:?}");
    assert!(
        stdout(&broken).contains("orphaned-task"),
        "{}",
        stdout(&broken)
    );
    task.assert_init_alive();
}

fn explain_knows_every_code(_newest: &Release) {
    let node = Node::start();
    for code in CODES {
        let output = node.recoverd(["explain", code]);
        let text = stdout(&output);
        assert_eq!(output.status.code(), Some(0), "{code}: {output:?}");
        assert!(
            text.contains(code) && text.lines().count() >= 3,
            "{code}:\n{text}"
        );
    }
}

fn table_and_prometheus_say_what_json_says(release: &Release) {
    let node = Node::start();
    let mut containerd = node.containerd(release);
    containerd.run(&Container::new("well"));
    let task = containerd.run(&Container::new("orphan"));
    containerd.kill();
    node.kill(&task.shim);
    let table = node.recoverd(["scan"]);
    let text = stdout(&table);
    assert_eq!(table.status.code(), Some(1), "{table:?}");
    assert!(
        text.contains("orphaned-task") && text.contains("e2e/orphan"),
        "{text}"
    );
    assert!(!text.contains('\u{1b}'), "colour in a pipe:\n{text}");
    assert!(table.stderr.is_empty(), "progress in a pipe: {table:?}");
    assert_eq!(
        text,
        stdout(&node.recoverd(["scan"])),
        "two scans of one state differ"
    );
    assert!(stdout(&node.recoverd(["--color", "always", "scan"])).contains('\u{1b}'));

    let metrics = node.recoverd(["scan", "-o", "prometheus"]);
    let text = stdout(&metrics);
    assert_eq!(metrics.status.code(), Some(1), "{metrics:?}");
    let samples: Vec<&str> = text.lines().filter(|line| !line.starts_with('#')).collect();
    assert!(!samples.is_empty());
    for sample in &samples {
        let value = sample.rsplit(' ').next().unwrap_or_default();
        assert!(
            value.parse::<f64>().is_ok() && sample.starts_with("recoverd_"),
            "{sample}"
        );
    }
    let found = samples
        .iter()
        .find(|line| line.contains("\"orphaned-task\""));
    assert!(found.is_some_and(|line| line.ends_with(" 1")), "{text}");
}

fn config_tells_where_each_value_comes_from(_newest: &Release) {
    let node = Node::start();
    let output = node.recoverd(["config"]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let text = stdout(&output);
    assert!(
        text.contains("/run/containerd/s") && text.contains("default"),
        "{text}"
    );
    let flagged = stdout(&node.recoverd(["--socket-dir", "/run/elsewhere/s", "config"]));
    assert!(
        flagged.contains("/run/elsewhere/s") && flagged.contains("flag"),
        "{flagged}"
    );
}

fn preflight_is_quiet_on_a_healthy_node_and_names_what_is_not(release: &Release) {
    let node = Node::start();
    let mut containerd = node.containerd(release);
    let shim = node.folder().join("containerd-shim-runc-v2");
    node.run("cp", [release.stock_shim(), shim.clone()]);
    let task = containerd.run(&Container::new("task").runtime(&shim));
    let flags = containerd.flags();
    let preflight = |node: &Node| {
        let mut args = flags.clone();
        args.push("preflight".into());
        node.recoverd(&args)
    };
    let quiet = preflight(&node);
    assert_eq!(quiet.status.code(), Some(0), "{quiet:?}");
    // Without its shim's binary containerd drops the bundle at the next start.
    node.run("rm", [&shim]);
    let gone = preflight(&node);
    assert_eq!(gone.status.code(), Some(1), "{gone:?}");
    assert!(
        stdout(&gone).contains(&shim.display().to_string()),
        "{gone:?}"
    );
    node.run("cp", [release.stock_shim(), shim.clone()]);
    node.run("chmod", ["-x".as_ref(), shim.as_os_str()]);
    assert_eq!(preflight(&node).status.code(), Some(1));
    node.run("rm", ["-f".as_ref(), shim.as_os_str()]);
    containerd.kill();
    node.kill(&task.shim);
    let endangered = preflight(&node);
    // Down, containerd does not say which release the next start would come from.
    assert_eq!(endangered.status.code(), Some(3), "{endangered:?}");
    assert!(stdout(&endangered).contains("e2e/task"), "{endangered:?}");
    task.assert_init_alive();
}

fn dump_packs_what_a_bug_report_needs(release: &Release) {
    let node = Node::start();
    let containerd = node.containerd(release);
    let task = containerd.run(&Container::new("dumped"));
    let archive = node.folder().join("dump.tar");
    let output = node.shell(&format!(
        "cd {}; '{}' dump e2e/dumped >dump.tar",
        node.folder().display(),
        node.built("recoverd").display()
    ));
    assert_eq!(output, "");
    let names = node.run("tar", ["-tf".as_ref(), archive.as_os_str()]);
    for part in ["mount", "cgroup", "descriptors", "json"] {
        assert!(names.contains(part), "no {part} in:\n{names}");
    }
    task.assert_init_alive();
    task.assert_shim_alive();
}

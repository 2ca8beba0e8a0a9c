//! A kernel whose pidfds do not tell exit statuses (before 6.15), with cgroup v2 and all its
//! controllers: how adopted tasks end is true there, too. One vm, as it takes half a minute to boot.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use recoverd_common::record::{self, Exit, Record};
use recoverd_tests::run_installed_in_vm;

recoverd_tests::tests! {
    in_a_vm: [exits_of_adopted_tasks_are_true_on_an_older_kernel],
}

/// Seconds, on an emulated processor beside other tests.
const LONGEST: u32 = 1100;

/// A folder of this test, removed with it.
struct Out(PathBuf);

impl Out {
    fn new() -> Out {
        let name = format!("recoverd-test-{}-vm", std::process::id());
        let path = std::env::temp_dir().join(name);
        fs::create_dir_all(&path).unwrap_or_else(|e| panic!("make {}: {e}", path.display()));
        Out(path)
    }

    #[track_caller]
    fn read(&self, name: &str) -> String {
        let path = self.0.join(name);
        fs::read_to_string(&path).unwrap_or_else(|e| panic!("read {}: {e}", path.display()))
    }

    fn records(&self, folder: &str) -> Vec<Record> {
        let entries = fs::read_dir(self.0.join(folder));
        let entries = entries.unwrap_or_else(|e| panic!("list records: {e}"));
        let record = |path: &Path| {
            let bytes = fs::read(path).unwrap_or_else(|e| panic!("read {}: {e}", path.display()));
            record::version::decode(&bytes)
                .unwrap_or_else(|e| panic!("record {}: {e}", path.display()))
        };
        entries
            .filter_map(|entry| Some(record(&entry.ok()?.path())))
            .collect()
    }
}

impl Drop for Out {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// `METRIC VALUE` lines of `ctr task metrics`.
fn metrics(text: &str) -> BTreeMap<&str, u64> {
    let pair = |line: &'_ str| {
        let mut words = line.split_whitespace();
        Some((words.next()?.len(), words.next()?.parse().ok()?))
    };
    text.lines()
        .filter_map(|line| {
            let (length, value) = pair(line)?;
            Some((line.trim_start().get(..length)?, value))
        })
        .collect()
}

fn exits_of_adopted_tasks_are_true_on_an_older_kernel() {
    let out = Out::new();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("e2e/older_kernel.sh");
    let ended = run_installed_in_vm(&script, LONGEST, &out.0);
    assert_eq!(ended.code, Some(0), "{}", ended.text);

    let kernel = out.read("kernel");
    let numbers: Vec<u32> = kernel
        .split(['.', '-'])
        .filter_map(|n| n.parse().ok())
        .collect();
    assert!(
        numbers.as_slice() < [6, 15].as_slice(),
        "the vm's kernel is {kernel}"
    );
    assert_eq!(out.read("killed").trim(), "2");
    let journal = out.read("journal");
    assert!(
        journal.contains("pre-start: 8 tasks, 8 adopted, "),
        "{journal}"
    );
    let after = "post-start: 0 kept, 8 adopted, 0 exited, 0 new, 0 lost, 2 of 2 execs alive";
    assert!(journal.contains(after), "{journal}");
    assert_eq!(
        out.read("listeners").trim(),
        "2",
        "shims that listen to process events"
    );
    for line in out.read("oom-scores").lines() {
        let scores: Vec<&str> = line.split(' ').collect();
        assert!(
            matches!(scores[..], [before, now] if before == now),
            "{line}"
        );
        assert_eq!(scores[0], "-998");
    }

    // Controllers are there, so figures are, and a limit is what it was.
    for id in ["ours-zero", "ours-oom", "stock-zero", "stock-oom"] {
        let text = out.read(&format!("metrics-{id}"));
        let found = metrics(&text);
        for name in ["pids.current", "cpu.usage_usec", "memory.usage"] {
            let value = found.get(name);
            assert!(
                value.is_some_and(|value| *value > 0),
                "{name} of {id}: {text}"
            );
        }
        if id.ends_with("oom") {
            assert_eq!(
                found.get("memory.usage_limit"),
                Some(&(32 << 20)),
                "{id}: {text}"
            );
        }
    }

    // Each exit at least once, with its true status; `ctr` leaves 0 out.
    let events = out.read("events");
    let told = |words: &[&str]| {
        let lines = events.lines();
        let found = lines.filter(|line| words.iter().all(|word| line.contains(word)));
        found.collect::<Vec<&str>>()
    };
    let records = out.records("records");
    for kind in ["stock", "ours"] {
        for (end, status) in [("zero", 0), ("some", 23), ("killed", 137), ("oom", 137)] {
            let id = format!("{kind}-{end}");
            let quoted = format!("\"id\":\"{id}\"");
            let exits = told(&["/tasks/exit", &quoted]);
            assert!(!exits.is_empty(), "no exit of {id} in\n{events}");
            for exit in exits {
                let said = format!("\"exit_status\":{status},");
                assert_eq!(exit.contains(&said), status != 0, "{exit}");
                assert_eq!(exit.contains("exit_status"), status != 0, "{exit}");
            }
            let tasks = records.iter().flat_map(|record| &record.tasks);
            let recorded = tasks.clone().find(|task| task.id == id);
            let recorded = recorded.unwrap_or_else(|| panic!("{id} is in no record"));
            assert!(
                matches!(&recorded.exit, Some(Exit::Observed { status: s, .. }) if *s == status),
                "{id}: {:?}",
                recorded.exit
            );
            let ooms = told(&["/tasks/oom", &format!("\"{id}\"")]);
            assert_eq!(ooms.is_empty(), end != "oom", "{id}: {ooms:?}");
        }
        let session = told(&[
            "/tasks/exit",
            &format!("\"{kind}-zero\""),
            "\"id\":\"session\"",
        ]);
        let is_true = |exit: &&str| exit.contains("\"exit_status\":7,");
        assert!(
            !session.is_empty() && session.iter().all(is_true),
            "{session:?}"
        );
    }
    assert_the_supervisor_saw(&out);
}

/// Ends at which no shim was there, and whose process somebody else had collected.
#[track_caller]
fn assert_the_supervisor_saw(out: &Out) {
    let text = out.read("seen/witnessed.json");
    let seen: serde_json::Value =
        serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}"));
    let all = |list: &str| seen[list].as_array().cloned().unwrap_or_default();
    let expected = [
        ("late", "", 41),
        ("late", "session", 42),
        ("gone", "", 43),
        ("window", "", 44),
    ];
    for (id, exec_id, status) in expected {
        let exits: Vec<serde_json::Value> = all("exits")
            .into_iter()
            .filter(|exit| exit["id"] == id && exit["exec_id"] == exec_id)
            .collect();
        assert!(
            matches!(exits.as_slice(), [exit] if exit["status"] == status),
            "{id} {exec_id}: {exits:?}"
        );
    }
    let groups = ["late", "gone", "window"];
    for group in groups {
        let deaths: Vec<serde_json::Value> = all("deaths")
            .into_iter()
            .filter(|death| death["group"] == group)
            .collect();
        assert!(
            matches!(deaths.as_slice(), [death] if death["how"] == "was ended by signal 9"),
            "{group}: {deaths:?}"
        );
    }
    let records = out.records("seen/records");
    let tasks = records.iter().flat_map(|record| &record.tasks);
    let mut found = BTreeMap::new();
    for task in tasks.filter(|task| groups.contains(&task.id.as_str())) {
        let execs = task.execs.iter().map(|exec| (exec.id.as_str(), &exec.exit));
        for (exec_id, exit) in execs.chain([("", &task.exit)]) {
            let status = match exit {
                Some(Exit::Observed { status, .. }) => Ok(*status),
                other => Err(format!("{other:?}")),
            };
            found.insert((task.id.clone(), exec_id.to_owned()), status);
        }
    }
    let expected = expected.map(|(id, exec, status)| ((id.into(), exec.into()), Ok(status)));
    assert_eq!(found, BTreeMap::from(expected));
}

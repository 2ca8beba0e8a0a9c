//! Under real systemd, with Debian's own containerd and its unit, and recoverd installed as the
//! README says.

use recoverd_tests::{BoxTask, Process, ShimUnderTest, SystemdBox};

recoverd_tests::tests! {
    in_a_box: [
        a_restart_with_the_hooks_changes_nothing_and_the_journal_tells_it,
    ],
}

/// Ends at SIGTERM with this code.
fn exits_with(code: u32) -> String {
    format!("trap \"exit {code}\" TERM; while :; do sleep 1000 & wait $!; done")
}

#[track_caller]
fn assert_alive(host: &SystemdBox, process: &Process, whose: &str) {
    let now = host.process(process.pid);
    assert!(host.alive(process), "{whose} was {process:?}, is {now:?}");
}

/// containerd's own word: a task runs, with the init that it had.
#[track_caller]
fn assert_runs(host: &SystemdBox, task: &BoxTask) {
    assert_alive(host, &task.init, &task.id);
    let list = host.shell("ctr task list");
    let row = list
        .lines()
        .find(|line| line.split_whitespace().next() == Some(&task.id));
    let words: Vec<&str> = row.unwrap_or("").split_whitespace().collect();
    let pid = task.init.pid.to_string();
    assert_eq!(words, [&task.id, &pid, "RUNNING"], "{list}");
}

/// The one line in the journal with these words.
#[track_caller]
fn line_of<'a>(journal: &'a str, hook: &str) -> &'a str {
    let lines: Vec<&str> = journal.lines().filter(|l| l.contains(hook)).collect();
    let [line] = lines.as_slice() else {
        panic!("not one line with {hook:?} in the journal:\n{journal}")
    };
    line
}

fn a_restart_with_the_hooks_changes_nothing_and_the_journal_tells_it() {
    let host = SystemdBox::start();
    host.shell("systemctl restart containerd");
    let stock = host.run("stock", ShimUnderTest::Stock, &exits_with(0));
    let ours = host.run("ours", ShimUnderTest::Recoverd, &exits_with(0));
    host.journal("containerd.service");
    host.shell("systemctl restart containerd");
    let journal = host.journal("containerd.service");
    for task in [&stock, &ours] {
        assert_runs(&host, task);
        assert_alive(&host, &task.shim, "its shim");
    }
    line_of(&journal, "recoverd: pre-start: ");
    line_of(&journal, "recoverd: post-start: ");
}

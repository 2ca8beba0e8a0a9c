//! Under real systemd, with Debian's own containerd, its unit and its packages, and recoverd
//! installed as the README says.

use std::time::Instant;

use recoverd_tests::{BoxTask, Instance, Process, Release, ShimUnderTest, SystemdBox};

use ShimUnderTest::{Recoverd, Stock};

recoverd_tests::tests! {
    in_a_box: [
        a_restart_with_the_hooks_changes_nothing_and_the_journal_tells_it,
        killed_and_stopped_shims_cost_nothing_and_adopted_ones_stay,
        upgrades_by_dpkg_with_shims_harmed_in_the_middle_cost_nothing,
        a_hook_that_fails_does_not_stop_containerd,
        a_hook_that_hangs_does_not_stop_containerd,
        a_unit_of_another_name_is_served_as_the_drop_in_says,
        preflight_sees_what_systemd_makes_of_the_unit,
    ],
}

const UNIT: &str = "containerd.service";
const DROP_INS: &str = "/etc/systemd/system/containerd.service.d";

/// Ends at SIGTERM with this code.
fn exits_with(code: u32) -> String {
    format!("trap \"exit {code}\" TERM; while :; do sleep 1000 & wait $!; done")
}

#[track_caller]
fn assert_alive(host: &SystemdBox, process: &Process, whose: &str) {
    let now = host.process(process.pid);
    assert!(host.alive(process), "{whose} was {process:?}, is {now:?}");
}

/// containerd's own word: these tasks run, with the inits that they had.
#[track_caller]
fn assert_run(host: &SystemdBox, instance: &Instance, tasks: &[&BoxTask]) {
    let list = host.shell(&format!("ctr --address {} task list", instance.address));
    let rows: Vec<Vec<&str>> = list
        .lines()
        .map(|line| line.split_whitespace().collect())
        .collect();
    for task in tasks {
        assert_alive(host, &task.init, &task.id);
        let row = vec![task.id.clone(), task.init.pid.to_string(), "RUNNING".into()];
        assert!(
            rows.contains(&row.iter().map(String::as_str).collect()),
            "{row:?}: {list}"
        );
    }
}

/// The one line of a hook in a journal.
#[track_caller]
fn line_of<'a>(journal: &'a str, hook: &str) -> &'a str {
    let start = format!("recoverd: {hook}: ");
    let found: Vec<&str> = journal
        .lines()
        .filter_map(|line| line.strip_prefix(&start))
        .collect();
    let [line] = found.as_slice() else {
        panic!("not one line of {hook} in the journal:\n{journal}")
    };
    line
}

/// The unit's cgroup, by the kernel's word on a process.
#[track_caller]
fn assert_in_unit(host: &SystemdBox, process: &Process, unit: &str) {
    let path = host.path(format!("/proc/{}/cgroup", process.pid));
    let text = std::fs::read_to_string(&path)
        .unwrap_or_else(|error| panic!("read {}: {error}", path.display()));
    // From the machine's point of view, the box itself is below some group.
    let group = format!("/system.slice/{unit}");
    assert!(
        text.lines()
            .any(|line| line.starts_with("0::") && line.ends_with(&group)),
        "{process:?} is in {text}"
    );
}

fn a_restart_with_the_hooks_changes_nothing_and_the_journal_tells_it() {
    let host = SystemdBox::start();
    let stock = host.run("stock", Stock, &exits_with(0));
    let ours = host.run("ours", Recoverd, &exits_with(0));
    host.journal(UNIT);
    host.shell("systemctl restart containerd");
    let journal = host.journal(UNIT);
    assert_run(&host, &Instance::DEBIAN, &[&stock, &ours]);
    for task in [&stock, &ours] {
        assert_alive(&host, &task.shim, "its shim");
        assert_eq!(host.shim_now(task), task.shim);
    }
    let before = line_of(&journal, "pre-start");
    assert!(
        before.starts_with("2 tasks, ") && before.ends_with(" ms"),
        "{before}"
    );
    let after = line_of(&journal, "post-start");
    assert_eq!(after, "2 kept, 0 adopted, 0 exited, 0 new, 0 lost");
    // In this order, and in the journal of the unit: no hook speaks elsewhere.
    let told = host.shell("journalctl --quiet --output cat | grep -c '^recoverd: p'");
    assert_eq!(told.trim(), "2");
}

/// A task, an exec session in it, and what happens to its shim.
struct Harmed {
    task: BoxTask,
    session: Process,
    signal: &'static str,
    code: u32,
}

fn killed_and_stopped_shims_cost_nothing_and_adopted_ones_stay() {
    let host = SystemdBox::start();
    let each = [
        (Stock, "KILL"),
        (Stock, "STOP"),
        (Recoverd, "KILL"),
        (Recoverd, "STOP"),
    ];
    let all = each.map(|(shim, signal)| {
        let code = if signal == "KILL" { 0 } else { 23 };
        let id = format!("{shim:?}-{signal}").to_lowercase();
        let task = host.run(&id, shim, &exits_with(code));
        let session = host.exec(&task, "session", &exits_with(7));
        Harmed {
            task,
            session,
            signal,
            code,
        }
    });
    let tasks: Vec<&BoxTask> = all.iter().map(|harmed| &harmed.task).collect();
    host.journal(UNIT);
    host.shell("systemctl stop containerd");
    for Harmed { task, signal, .. } in &all {
        host.signal(&task.shim, signal);
    }
    host.shell("systemctl start containerd");
    let journal = host.journal(UNIT);
    let before = line_of(&journal, "pre-start");
    assert!(
        before.starts_with("4 tasks, 2 adopted, 2 replaced, "),
        "{before}"
    );
    let after = line_of(&journal, "post-start");
    let counts = "0 kept, 4 adopted, 0 exited, 0 new, 0 lost, 4 of 4 execs alive";
    assert_eq!(after, counts);
    assert_run(&host, &Instance::DEBIAN, &tasks);
    let adopters = all.each_ref().map(|harmed| {
        assert_alive(&host, &harmed.session, "an exec session");
        host.wait_gone(&harmed.task.shim);
        let shim = host.shim_now(&harmed.task);
        assert_eq!(shim.program(), "containerd-shim-recoverd-v1");
        assert_in_unit(&host, &shim, UNIT);
        shim
    });

    // They were started by ExecStartPre=: that process is gone, they are not; nor with a restart,
    // or a stop, of the unit that they belong to.
    for how in ["restart containerd", "stop containerd", "start containerd"] {
        host.shell(&format!("systemctl {how}"));
        for shim in &adopters {
            assert_alive(&host, shim, how);
        }
    }
    let journal = host.journal(UNIT);
    let lines = journal.lines();
    let kept = lines.filter(|line| line.starts_with("recoverd: post-start: 4 kept, 0 adopted, "));
    assert_eq!(kept.count(), 2, "{journal}");
    assert_run(&host, &Instance::DEBIAN, &tasks);

    // It is not only there: it works.
    for (harmed, shim) in all.iter().zip(&adopters) {
        let Harmed {
            task,
            session,
            code,
            ..
        } = harmed;
        assert_eq!(&host.shim_now(task), shim);
        let said = host.shell(&format!(
            "ctr task exec --exec-id more {} /bin/echo hello",
            task.id
        ));
        assert_eq!(said, "hello\n");
        host.signal(session, "TERM");
        assert_eq!(host.wait(task, "session"), 7, "{}", task.id);
        host.signal(&task.init, "TERM");
        assert_eq!(host.wait(task, ""), *code, "{}", task.id);
        host.shell(&format!(
            "ctr task delete {0} || true; ctr container delete {0}",
            task.id
        ));
        host.wait_gone(shim);
    }
}

/// Signals for shims while containerd is stopped, whoever stops it: sent by the unit itself, after
/// the stop and before the start of a restart.
struct Meanwhile<'a>(&'a SystemdBox);

impl<'a> Meanwhile<'a> {
    fn of(host: &'a SystemdBox) -> Self {
        host.write(
            format!("{DROP_INS}/90-meanwhile.conf"),
            "[Service]\nExecStopPost=/bin/sh -ec 'sh -ex /root/meanwhile; echo : >/root/meanwhile'\n",
        );
        host.write("/root/meanwhile", ":\n");
        host.shell("systemctl daemon-reload");
        Meanwhile(host)
    }

    #[track_caller]
    fn signal(&self, victims: &[(&BoxTask, &str)]) {
        let lines = victims.iter().map(|(task, signal)| {
            let shim = self.0.shim_now(task);
            format!("kill -s {signal} {}\n", shim.pid)
        });
        self.0.write("/root/meanwhile", &lines.collect::<String>());
    }
}

fn upgrades_by_dpkg_with_shims_harmed_in_the_middle_cost_nothing() {
    let host = SystemdBox::start();
    let meanwhile = Meanwhile::of(&host);
    let releases = Release::available();
    let names: Vec<&str> = releases.iter().map(|release| release.name).collect();
    assert_eq!(names, ["1.6", "1.7", "2.1"], "not every release is there");
    for release in &releases {
        host.put(release.package(), format!("/root/{}.deb", release.name));
    }
    // The box has the first one already: up, and down again.
    let [old, middle, new] = names.as_slice() else {
        return;
    };
    let mut tasks: Vec<BoxTask> = Vec::new();
    for (step, to) in [middle, new, middle, old].iter().enumerate() {
        let victims = [
            (Stock, "KILL"),
            (Recoverd, "KILL"),
            (Stock, "STOP"),
            (Recoverd, "STOP"),
        ]
        // On the way down only one of the harmed stock ones is needed.
        .into_iter()
        .filter(|(shim, signal)| step < 2 || (*shim, *signal) != (Stock, "STOP"));
        let harmed: Vec<(BoxTask, &str)> = victims
            .map(|(shim, signal)| {
                let id = format!("{shim:?}-{signal}-{step}").to_lowercase();
                (host.run(&id, shim, &exits_with(23)), signal)
            })
            .collect();
        let mut signals: Vec<(&BoxTask, &str)> = harmed.iter().map(|(t, s)| (t, *s)).collect();
        // And one that was adopted before.
        signals.extend(tasks.first().map(|task| (task, "KILL")));
        meanwhile.signal(&signals);
        // The stock shim of 2.1 is well, and 1.7 cannot speak to it: the hook learns from the unit
        // which release it is that starts.
        let unheard = (step == 2).then(|| host.run("unheard", Stock, &exits_with(23)));
        let count = signals.len() + usize::from(unheard.is_some());
        host.journal(UNIT);
        host.shell(&format!("dpkg --install /root/{to}.deb"));
        let journal = host.journal(UNIT);
        let version = host.shell("ctr version");
        let server = version
            .split_once("Server:")
            .map_or("", |(_, server)| server);
        assert!(server.contains(&format!("Version:  {to}.")), "{version}");
        tasks.extend(harmed.into_iter().map(|(task, _)| task));
        tasks.extend(unheard);
        let before = line_of(&journal, "pre-start");
        assert!(!before.contains("not known"), "{before}");
        let after = line_of(&journal, "post-start");
        let kept = tasks.len() - count;
        let expected = format!("{kept} kept, {count} adopted, 0 exited, 0 new, 0 lost");
        assert_eq!(after, expected, "{journal}");
        assert_run(&host, &Instance::DEBIAN, &tasks.iter().collect::<Vec<_>>());
        for task in &tasks {
            assert_eq!(host.shim_now(task).program(), "containerd-shim-recoverd-v1");
        }
    }
    assert_eq!(host.property(UNIT, "NRestarts"), "0");
    for task in &tasks {
        host.signal(&task.init, "TERM");
        assert_eq!(host.wait(task, ""), 23, "{}", task.id);
    }
}

/// Restarts containerd, which must come up at the first try; gives how long it took.
#[track_caller]
fn restart_at_once(host: &SystemdBox, what: &str) -> f64 {
    // systemd refuses a sixth start within ten seconds, whatever became of the others.
    host.shell("systemctl stop containerd; systemctl reset-failed containerd");
    let began = Instant::now();
    host.shell("systemctl start containerd");
    let took = began.elapsed().as_secs_f64();
    for (property, expected) in [
        ("ActiveState", "active"),
        ("Result", "success"),
        ("NRestarts", "0"),
    ] {
        assert_eq!(
            host.property(UNIT, property),
            expected,
            "{property} with {what}"
        );
    }
    took
}

fn a_hook_that_fails_does_not_stop_containerd() {
    let host = SystemdBox::start();
    let task = host.run("task", Recoverd, &exits_with(0));
    for (what, harm) in [
        (
            "a hook that exits with 1",
            "printf '#!/bin/sh\\nexit 1\\n' >recoverd; chmod 755 recoverd",
        ),
        ("/bin/false as the hook", "cp /bin/false recoverd"),
        (
            "a hook that kills itself",
            "printf '#!/bin/sh\\nkill -s SEGV $$\\n' >recoverd; chmod 755 recoverd",
        ),
        (
            "a broken binary",
            "printf '\\177ELF nothing' >recoverd; chmod 755 recoverd",
        ),
        ("a binary that may not be executed", "chmod 644 recoverd"),
        ("no binary", "rm recoverd"),
    ] {
        host.shell(&format!("cd /usr/local/bin; {harm}"));
        restart_at_once(&host, what);
        assert_run(&host, &Instance::DEBIAN, &[&task]);
    }
}

fn a_hook_that_hangs_does_not_stop_containerd() {
    let host = SystemdBox::start();
    let task = host.run("task", Recoverd, &exits_with(0));
    // pre-start cannot even be asked to end; post-start can.
    host.shell(
        "cat >/usr/local/bin/recoverd <<'SCRIPT'\n#!/bin/sh\n\
         case \" $* \" in *\" pre-start \"*) trap '' TERM ;; esac\n\
         while :; do sleep 1000; done\nSCRIPT",
    );
    let took = restart_at_once(&host, "hooks that hang");
    // As the drop-in says: 30 s for each, and what a busy machine adds.
    assert!(took < 120.0, "the start took {took} s");
    assert_run(&host, &Instance::DEBIAN, &[&task]);
    let left = host.shell("pgrep --full '[r]ecoverd --address' || true");
    assert_eq!(left, "", "a hook was left behind");
}

fn a_unit_of_another_name_is_served_as_the_drop_in_says() {
    const K3S: Instance = Instance {
        address: "/run/k3s/containerd/containerd.sock",
        state: "/run/k3s/containerd",
    };
    let host = SystemdBox::start();
    host.write(
        "/etc/k3s.toml",
        "version = 2\nroot = '/var/lib/rancher'\nstate = '/run/k3s/containerd'\n\
         [grpc]\n  address = '/run/k3s/containerd/containerd.sock'\n",
    );
    // The same drop-in, changed as its comment says.
    host.shell(
        "cd /etc/systemd/system; mkdir k3s.service.d\n\
         sed 's|^ExecStart=/usr/bin/containerd|& --config /etc/k3s.toml|' \
             /lib/systemd/system/containerd.service >k3s.service\n\
         sed 's|--address /run/containerd/|--state /run/k3s/containerd --root /var/lib/rancher --address /run/k3s/containerd/|' \
             containerd.service.d/10-recoverd.conf >k3s.service.d/10-recoverd.conf\n\
         systemctl daemon-reload; systemctl start k3s",
    );
    let theirs = host.run("theirs", Recoverd, &exits_with(0));
    let stock = host.run_at(&K3S, "stock", Stock, &exits_with(3));
    let ours = host.run_at(&K3S, "ours", Recoverd, &exits_with(4));
    host.journal("k3s.service");
    host.shell("systemctl stop k3s");
    host.signal(&stock.shim, "KILL");
    host.signal(&ours.shim, "STOP");
    host.shell("systemctl start k3s");
    let journal = host.journal("k3s.service");
    let before = line_of(&journal, "pre-start");
    assert!(
        before.starts_with("2 tasks, 1 adopted, 1 replaced, "),
        "{before}"
    );
    assert_run(&host, &K3S, &[&stock, &ours]);
    for task in [&stock, &ours] {
        assert_in_unit(&host, &host.shim_now(task), "k3s.service");
    }
    // The other containerd and its task were left alone.
    assert_run(&host, &Instance::DEBIAN, &[&theirs]);
    assert_eq!(host.shim_now(&theirs), theirs.shim);
    for (task, code) in [(&stock, 3), (&ours, 4)] {
        host.signal(&task.init, "TERM");
        assert_eq!(host.wait(task, ""), code);
    }
}

fn preflight_sees_what_systemd_makes_of_the_unit() {
    let host = SystemdBox::start();
    let preflight = |more: &str| {
        let output = host.output(["sh", "-c", &format!("recoverd preflight {more}")]);
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        (output.status.code(), text)
    };
    host.run("task", Recoverd, &exits_with(0));
    let (code, text) = preflight("");
    assert_eq!(
        (code, text.lines().last()),
        (Some(0), Some("harmless")),
        "{text}"
    );
    for (setting, reason) in [
        (
            "KillMode=control-group",
            "containerd.service  unit: KillMode=control-group: ",
        ),
        ("Delegate=no", "containerd.service  unit: Delegate"),
    ] {
        host.write(
            format!("{DROP_INS}/99-test.conf"),
            &format!("[Service]\n{setting}\n"),
        );
        host.shell("systemctl daemon-reload");
        let (code, text) = preflight("");
        assert_eq!(code, Some(1), "{setting}: {text}");
        assert!(text.contains(reason), "{setting}: {text}");
    }
    // Five seconds for each shim that does not answer, of what the unit's start may take.
    let hung = host.run("hung", Recoverd, &exits_with(0));
    host.signal(&hung.shim, "STOP");
    for (setting, against) in [
        ("TimeoutStartSec=4", true),
        ("TimeoutStartSec=infinity", false),
    ] {
        host.write(
            format!("{DROP_INS}/99-test.conf"),
            &format!("[Service]\n{setting}\n"),
        );
        host.shell("systemctl daemon-reload");
        let (_, text) = preflight("");
        assert_eq!(
            text.contains("containerd.service  unit: "),
            against,
            "{setting}: {text}"
        );
    }
    host.signal(&hung.shim, "CONT");
    let (code, text) = preflight("--unit nowhere.service");
    assert_eq!(code, Some(3), "{text}");
    assert!(
        text.contains("unit nowhere.service: is not-found"),
        "{text}"
    );
}

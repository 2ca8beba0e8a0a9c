use std::{collections::BTreeMap, path::PathBuf, time::Duration};

use recoverd_common::{bundle::Bundle, seen::Seen};

use super::*;
use crate::{
    correlate::{Init, Known, ShimOf},
    facts::{
        self, Answer, ApiFacts, Connection, ContainerdTask, Phase, Reply, Sandbox, Shim, Unit,
        fixture::{self, BINARY, C1, SOCKET, mount, process},
    },
};

/// One healthy task of one containerd; tests break one thing each.
struct Node {
    look: Look,
    bundle: Bundle,
    init: Init,
    shim: Shim,
    premises: Premises,
    findings: Vec<Finding>,
    to: Option<Release>,
}

fn release(text: &str) -> Release {
    Release::parse(text).unwrap()
}

fn answer(api: u8, phase: Phase) -> Answer {
    Answer {
        api: Some(api),
        ..fixture::answer(&C1, phase)
    }
}

fn shim(name: &str) -> Shim {
    Shim {
        name: name.into(),
        ..fixture::shim(&C1)
    }
}

impl Node {
    /// A task of containerd 1.7 whose shim left both files, as ours does.
    fn new() -> Self {
        let mut look = fixture::empty();
        look.api(0).containers.insert(C1.name(), Default::default());
        look.answers
            .insert(SOCKET.into(), answer(2, Phase::Running));
        let premises = Premises {
            unit: Seen::Present(Unit {
                name: "containerd.service".into(),
                load_state: "loaded".into(),
                kill_mode: "process".into(),
                delegate: true,
                start_timeout: Some(Duration::from_secs(90)),
                main_pid: Some(5),
            }),
            binaries: BTreeMap::from([(BINARY.into(), Seen::Present(true))]),
            sandboxes: vec![Seen::Absent],
            shim_sandboxes: vec![Seen::Absent],
            cpus: 2,
        };
        Self {
            look,
            bundle: fixture::bundle(&C1),
            init: Init::Alive(process(C1.init, fixture::OLD)),
            shim: shim("containerd-shim-runc-v2"),
            premises,
            findings: Vec::new(),
            to: None,
        }
    }

    fn api(&mut self) -> &mut ApiFacts {
        self.look.api(0)
    }

    fn unit(&mut self) -> &mut Unit {
        match &mut self.premises.unit {
            Seen::Present(unit) => unit,
            Seen::Absent | Seen::Unknown(_) => panic!("is there"),
        }
    }

    fn answer(&mut self) -> &mut Answer {
        self.look.answers.get_mut(SOCKET).unwrap()
    }

    fn report(&self) -> Report {
        self.report_of(1)
    }

    /// With so many tasks alike.
    fn report_of(&self, count: usize) -> Report {
        let case = || Case {
            written: None,
            name: ("default".into(), "c1".into()),
            instance: Some(0),
            bundle: Some(&self.bundle),
            runc: None,
            init: self.init.clone(),
            address: Some(SOCKET.into()),
            shim: ShimOf::Lives(&self.shim),
            answer: self.look.answers.get(SOCKET),
            cgroup: None,
            containerd: Known::CannotSay,
            pod: None,
        };
        let cases: Vec<Case<'_>> = (0..count).map(|_| case()).collect();
        judge(&Input {
            look: &self.look,
            cases: &cases,
            findings: &self.findings,
            gaps: &self.look.gaps,
            only: None,
            premises: &self.premises,
            to: self.to,
            run_full: 90,
        })
    }
}

type Break = fn(&mut Node);

#[test]
fn a_healthy_node_is_harmless() {
    let report = Node::new().report();
    assert_eq!(report.reasons, []);
    assert_eq!(report.gaps, []);
    assert_eq!(report.exit_code(), 0);
    assert_eq!(report.instances[0].to.as_deref(), Some("1.7.24"));
}

#[test]
fn every_way_to_lose_a_workload_is_a_reason_with_its_check() {
    use Check::*;
    let rows: &[(&str, Check, Severity, Break)] = &[
        ("shim binary gone", ShimBinary, Severity::Critical, |n| {
            n.premises.binaries.insert(BINARY.into(), Seen::Absent);
        }),
        (
            "shim binary not executable",
            ShimBinary,
            Severity::Warning,
            |n| {
                n.premises
                    .binaries
                    .insert(BINARY.into(), Seen::Present(false));
            },
        ),
        (
            "no shim-binary-path and no record",
            ShimBinary,
            Severity::Critical,
            |n| {
                n.bundle.shim_binary = Seen::Absent;
                n.api().containers.clear();
            },
        ),
        ("empty bundle", Bundle, Severity::Critical, |n| {
            n.bundle.empty = true
        }),
        (
            "no address file for 1.7",
            ShimAddress,
            Severity::Critical,
            |n| {
                n.bundle.address = Seen::Absent;
            },
        ),
        (
            "neither file for 2.1",
            ShimAddress,
            Severity::Critical,
            |n| {
                n.bundle.address = Seen::Absent;
                n.bundle.bootstrap = Seen::Absent;
                n.to = Some(release("2.0.6"));
            },
        ),
        ("empty address", ShimAddress, Severity::Critical, |n| {
            n.bundle.address = Seen::Present(String::new());
        }),
        (
            "JSON of version 3 in address",
            ShimAddress,
            Severity::Critical,
            |n| {
                let text = format!(r#"{{"version":3,"address":"unix://{SOCKET}"}}"#);
                n.bundle.address = Seen::Present(text);
            },
        ),
        (
            "any JSON in address for 1.6",
            ShimAddress,
            Severity::Critical,
            |n| {
                let text = format!(r#"{{"version":2,"address":"unix://{SOCKET}"}}"#);
                n.bundle.address = Seen::Present(text);
                n.api().version = "1.6.20".into();
            },
        ),
        (
            "v3-only shim under 1.7",
            Protocol,
            Severity::Critical,
            |n| {
                n.answer().api = Some(3);
            },
        ),
        (
            "wrong bootstrap.json under 2.0.5",
            Protocol,
            Severity::Critical,
            |n| {
                if let Seen::Present(bootstrap) = &mut n.bundle.bootstrap {
                    bootstrap.version = 3;
                }
                n.to = Some(release("2.0.5"));
            },
        ),
        ("nobody listens", ShimAnswer, Severity::Critical, |n| {
            n.answer().connection = Connection::Refused;
        }),
        ("socket gone", ShimAnswer, Severity::Critical, |n| {
            n.answer().connection = Connection::NoFile;
        }),
        ("queue full", ShimAnswer, Severity::Critical, |n| {
            n.answer().connection = Connection::QueueFull;
        }),
        ("Connect silent", ShimAnswer, Severity::Critical, |n| {
            n.answer().greeting = Reply::Silent;
        }),
        ("Connect refused", ShimAnswer, Severity::Critical, |n| {
            n.answer().greeting = Reply::Error(2, "no".into());
        }),
        ("garbage", ShimAnswer, Severity::Critical, |n| {
            n.answer().greeting = Reply::Garbage("x".into());
        }),
        ("State silent", ShimAnswer, Severity::Critical, |n| {
            n.answer().states.insert("c1".into(), Reply::Silent);
        }),
        ("State not found", ShimAnswer, Severity::Critical, |n| {
            n.answer()
                .states
                .insert("c1".into(), Reply::Error(5, "none".into()));
        }),
        (
            "maybe alive counts as alive",
            ShimAnswer,
            Severity::Critical,
            |n| {
                n.init = Init::Unknown("hidden".into());
                n.answer().connection = Connection::Refused;
            },
        ),
        ("paused", Phase, Severity::Warning, |n| {
            *n.answer() = answer(2, facts::Phase::Paused);
        }),
        ("stopped", Phase, Severity::Warning, |n| {
            *n.answer() = answer(2, facts::Phase::Stopped);
            n.init = Init::Dead(None, "gone".into());
        }),
        ("busy", Phase, Severity::Warning, |n| {
            n.look.busy_verbs.insert(("default".into(), "c2".into()));
        }),
        ("orphaned", Finding, Severity::Critical, |n| {
            n.findings.push(finding(Code::OrphanedTask));
        }),
        ("exit unreported", Finding, Severity::Warning, |n| {
            n.findings.push(finding(Code::ExitUnreported));
        }),
        (
            "same sandbox name twice",
            SandboxName,
            Severity::Critical,
            |n| {
                n.premises.sandboxes = vec![Seen::Present(vec![sandbox("a"), sandbox("b")])];
                for id in ["a", "b"] {
                    let task = ContainerdTask {
                        phase: facts::Phase::Running,
                        pid: 7,
                    };
                    let tasks = n.api().tasks.as_mut().unwrap();
                    tasks.insert(("k8s.io".into(), id.into()), task);
                }
            },
        ),
        ("sandbox without task", SandboxName, Severity::Info, |n| {
            n.premises.sandboxes = vec![Seen::Present(vec![sandbox("a")])];
        }),
        (
            "shim sandboxes under 2.0",
            ShimSandbox,
            Severity::Critical,
            |n| {
                n.premises.shim_sandboxes = vec![Seen::Present(1)];
                n.to = Some(release("2.0.11"));
            },
        ),
        ("skips a minor", Hop, Severity::Warning, |n| {
            n.to = Some(release("2.1"))
        }),
        ("KillMode=mixed", Unit, Severity::Critical, |n| {
            n.unit().kill_mode = "mixed".into();
        }),
        ("KillMode=none", Unit, Severity::Warning, |n| {
            n.unit().kill_mode = "none".into()
        }),
        ("Delegate off", Unit, Severity::Warning, |n| {
            n.unit().delegate = false
        }),
        ("disk", StateFolder, Severity::Info, |n| {
            n.look.mounts = Seen::Present(vec![mount("/", "ext4")]);
        }),
        ("nearly full", StateFolder, Severity::Warning, |n| {
            n.look.filesystems[0].bytes = (100 << 20, 10 << 20);
        }),
        ("no inodes", StateFolder, Severity::Critical, |n| {
            n.look.filesystems[0].inodes = (1000, 3);
        }),
    ];
    for (what, check, severity, breaks) in rows {
        let mut node = Node::new();
        breaks(&mut node);
        let report = node.report();
        let found = |r: &&Reason| r.check == *check && r.severity == *severity;
        assert!(
            report.reasons.iter().any(|r| found(&r)),
            "{what}: {report:?}"
        );
        // One, but for what pre-start would do about it.
        let said = |r: &&Reason| r.check != *check || r.severity == *severity;
        let count = report.reasons.iter().filter(said).count();
        assert_eq!(count, 1, "{what}: {report:?}");
        assert_eq!(report.gaps, [], "{what}");
        let expected = u8::from(*severity != Severity::Info);
        assert_eq!(report.exit_code(), expected, "{what}");
    }
}

#[test]
fn what_cannot_be_seen_is_never_harmless() {
    let rows: &[(&str, Break)] = &[
        ("containerd is down", |n| {
            n.look.instances[0].api = Api::Down
        }),
        ("no containerd", |n| n.look.instances.clear()),
        ("odd release", |n| n.api().version = "unknown".into()),
        ("state folder", |n| n.look.instances[0].state = None),
        ("shim binary not looked at", |n| n.premises.binaries.clear()),
        ("shim binary hidden", |n| {
            let hidden = Seen::Unknown("hidden".into());
            n.premises.binaries.insert(BINARY.into(), hidden);
        }),
        ("shim binary relative", |n| {
            n.bundle.shim_binary = Seen::Present("shim".into())
        }),
        ("shim-binary-path hidden", |n| {
            n.bundle.shim_binary = Seen::Unknown("hidden".into());
        }),
        ("address hidden", |n| {
            n.look.host.root = false;
            n.bundle.address = Seen::Unknown("hidden".into());
        }),
        ("not asked", |n| n.look.answers.clear()),
        ("not connected", |n| {
            n.answer().connection = Connection::Failed("EPERM".into())
        }),
        ("not greeted", |n| n.answer().greeting = Reply::NotAsked),
        ("api", |n| n.answer().api = None),
        ("state not asked", |n| n.answer().states.clear()),
        ("state unknown", |n| *n.answer() = answer(2, Phase::Unknown)),
        ("foreign shim on version 3", |n| {
            n.shim = shim("containerd-shim-kata-v2");
            n.answer().api = Some(3);
        }),
        ("sandboxes", |n| {
            n.premises.sandboxes = vec![Seen::Unknown("hidden".into())]
        }),
        ("sandboxes not asked", |n| n.premises.sandboxes.clear()),
        ("shim sandboxes", |n| {
            n.premises.shim_sandboxes = vec![Seen::Unknown("hidden".into())];
            n.to = Some(release("2.0"));
        }),
        ("unit", |n| n.premises.unit = Seen::Unknown("hidden".into())),
        ("unit not found", |n| {
            n.unit().load_state = "not-found".into()
        }),
        ("KillMode", |n| n.unit().kill_mode = "new".into()),
        ("the look's own gaps", |n| {
            n.look.gaps.push(super::Gap::new("mounts", "hidden"));
        }),
    ];
    for (what, hides) in rows {
        let mut node = Node::new();
        hides(&mut node);
        let report = node.report();
        assert_eq!(report.exit_code(), 3, "{what}: {report:?}");
    }
}

#[test]
fn what_costs_nobody_anything_is_no_reason() {
    let rows: &[(&str, Break)] = &[
        ("a dead bundle", |n| {
            n.init = Init::Dead(None, "gone".into());
            n.answer().connection = Connection::Refused;
        }),
        ("a stopped task under 1.6", |n| {
            n.api().version = "1.6.20".into();
            *n.answer() = answer(2, Phase::Stopped);
            n.init = Init::Dead(None, "gone".into());
            n.findings.push(finding(Code::ExitUnreported));
        }),
        ("a stopped task of our shim", |n| {
            n.shim = shim("containerd-shim-recoverd-v1");
            *n.answer() = answer(2, Phase::Stopped);
        }),
        ("our shim on version 3, going back to 1.7", |n| {
            n.shim = shim("containerd-shim-recoverd-v1");
            n.answer().api = Some(3);
        }),
        ("no shim-binary-path, but a record", |n| {
            n.bundle.shim_binary = Seen::Absent
        }),
        ("bootstrap.json only, for 2.x", |n| {
            n.bundle.address = Seen::Absent;
            n.answer().api = Some(3);
            n.api().version = "2.1.9".into();
        }),
        ("address only, for 2.x", |n| {
            n.bundle.bootstrap = Seen::Absent;
            n.api().version = "2.1.9".into();
        }),
        ("no systemd", |n| n.premises.unit = Seen::Absent),
        ("an outdated shim", |n| {
            n.findings.push(finding(Code::OutdatedShim))
        }),
        ("the next long-term release", |n| {
            n.to = Some(release("2.3"))
        }),
        ("endless start", |n| n.unit().start_timeout = None),
        ("a place where no containerd is any more", |n| {
            let gone = Instance {
                address: "/run/docker/containerd/containerd.sock".into(),
                daemon: None,
                api: Api::Down,
                ..n.look.instances[0].clone()
            };
            n.look.instances.push(gone);
        }),
    ];
    for (what, changes) in rows {
        let mut node = Node::new();
        changes(&mut node);
        let report = node.report();
        assert_eq!(report.exit_code(), 0, "{what}: {report:?}");
    }
}

#[test]
fn a_task_that_a_finding_names_is_told_once() {
    let mut node = Node::new();
    node.answer().greeting = Reply::Silent;
    node.findings.push(finding(Code::UnresponsiveShim));
    let report = node.report();
    assert_eq!(report.reasons.len(), 1, "{report:?}");
    assert_eq!(report.reasons[0].check, Check::Finding);
}

#[test]
fn hung_shims_must_fit_into_the_start_timeout() {
    let mut node = Node::new();
    node.answer().greeting = Reply::Silent;
    node.findings.push(finding(Code::UnresponsiveShim));
    let too_many = |node: &Node, count| {
        let report = node.report_of(count);
        report.reasons.iter().any(|r| r.check == Check::Unit)
    };
    assert!(!too_many(&node, 17) && too_many(&node, 18));
    node.to = Some(release("2.1"));
    assert!(too_many(&node, 18));
    // Two processors: half the time.
    node.to = Some(release("2.2"));
    assert!(!too_many(&node, 34) && too_many(&node, 35));
    node.unit().start_timeout = None;
    assert!(!too_many(&node, 10_000));
}

#[test]
fn what_a_hostile_bundle_says_stays_one_line() {
    let mut node = Node::new();
    let path = PathBuf::from("/x\u{1b}[31m\ny");
    node.bundle.shim_binary = Seen::Present(path.clone());
    node.premises.binaries.insert(path, Seen::Absent);
    let report = node.report();
    assert!(!report.reasons[0].why.contains(char::is_control));
    node.answer().greeting = Reply::Error(2, "x\n".repeat(1 << 20));
    node.bundle.shim_binary = Seen::Present(BINARY.into());
    assert!(node.report().reasons[0].why.len() < 4200);
}

fn finding(code: Code) -> Finding {
    Finding {
        code,
        severity: code.severity(),
        subject: Subject::Task {
            namespace: "default".into(),
            id: "c1".into(),
        },
        evidence: Vec::new(),
        action: String::new(),
    }
}

fn sandbox(id: &str) -> Sandbox {
    Sandbox {
        id: id.into(),
        name: "web_default_9f_0".into(),
    }
}

#[test]
fn what_pre_start_would_replace_before_a_downgrade_is_said_once() {
    let mut node = Node::new();
    node.answer().api = Some(3);
    let said = |node: &Node| {
        let report = node.report();
        let mut reasons = report.reasons.into_iter();
        reasons.find(|r| r.severity == Severity::Info && r.why.contains("pre-start"))
    };
    node.to = Some(release("2.1"));
    assert_eq!(said(&node), None);
    for to in ["1.7", "1.6.20"] {
        node.to = Some(release(to));
        let reason = said(&node).unwrap();
        let why = format!("1 tasks have shims that containerd {to} cannot speak to");
        assert!(reason.why.starts_with(&why), "{reason:?}");
        assert_eq!(node.report().exit_code(), 1, "each is lost without it");
    }
    node.shim = shim("containerd-shim-recoverd-v1");
    assert_eq!(said(&node), None, "ours speaks both");
}

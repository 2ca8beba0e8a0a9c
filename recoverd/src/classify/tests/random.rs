//! What holds on every node, however much on it is broken at once.

use std::fmt::Debug;

use clap::Parser as _;
use proptest::prelude::*;
use recoverd_common::proc::FileId;

use super::*;
use crate::{
    cli::Cli,
    correlate::Kind,
    facts::{
        CgroupProcess, Exec, FifoFolder, Phase, RecordFile, Reply,
        fixture::{OLD, ago, mount, process, stat},
    },
};

/// The task that no change is about.
const WELL: Task = C1;
const ALONE: Task = Task {
    id: "c2",
    group: "c2",
    shim: 16,
    init: 17,
    ..C1
};
const SANDBOX: Task = Task {
    id: "pod",
    group: "pod",
    shim: 26,
    init: 27,
    ..C1
};
const MEMBER: Task = Task {
    id: "app",
    group: "pod",
    shim: 26,
    init: 28,
    ..C1
};
const OTHERS: Task = Task {
    instance: 1,
    id: "c3",
    group: "c3",
    shim: 36,
    init: 37,
};
const BROKEN: [Task; 4] = [ALONE, SANDBOX, MEMBER, OTHERS];

type Change = fn(&mut Look, &Task);

/// Applied in this order: what a later one removes, an earlier one may still change.
const CHANGES: &[Change] = &[
    |l, t| l.shim_of(t).name = "containerd-shim-kata-v2".into(),
    |l, t| l.shim_of(t).name = "containerd-shim-recoverd-v1".into(),
    |l, t| l.shim_of(t).name = "my-shim".into(),
    |l, t| l.shim_of(t).threads = 1000,
    |l, t| l.shim_of(t).installed = Seen::Present(FileId { dev: 1, ino: 2 }),
    |l, t| l.shim_of(t).exe = unknown(),
    |l, t| {
        l.shim_of(t).listens.clear();
        l.listeners_mut().remove(&t.socket());
    },
    |l, t| l.shim_of(t).address = "/run/unseen/containerd.sock".into(),
    |l, t| l.shim_started(t, NEW),
    |l, t| l.told(t, Phase::Created),
    |l, t| l.told(t, Phase::Paused),
    |l, t| l.told(t, Phase::Stopped),
    |l, t| l.answer_of(t).greeting = Reply::Silent,
    |l, t| l.answer_of(t).greeting = Reply::Garbage("x".into()),
    |l, t| l.answer_of(t).connection = Connection::QueueFull,
    |l, t| l.answer_of(t).connection = Connection::NoFile,
    |l, t| l.answer_of(t).connection = Connection::Failed("EMFILE".into()),
    |l, t| l.answer_of(t).states.clear(),
    |l, t| l.listed(t, Phase::Stopped),
    |l, t| l.unlisted(t),
    |l, t| {
        l.api(t.instance).containers.remove(&t.name());
    },
    |l, t| l.init_started(t, NEW),
    |l, t| l.table().get_mut(&t.init).unwrap().state = 'Z',
    |l, t| {
        l.table().insert(t.init, stat(process(t.init, NEW), 1));
    },
    |l, t| l.table().get_mut(&t.init).unwrap().ppid = 1,
    |l, t| l.uncreated(t),
    |l, t| l.runc_of(t).state = unknown(),
    |l, t| l.runc_of(t).state = Seen::Absent,
    |l, t| l.bundle_of(t).init_pid = Seen::Absent,
    |l, t| l.bundle_of(t).init_pid = unknown(),
    |l, t| l.bundle_of(t).bootstrap = Seen::Absent,
    |l, t| l.bundle_of(t).address = Seen::Absent,
    |l, t| l.bundle_of(t).address = unknown(),
    |l, t| l.bundle_of(t).config = unknown(),
    |l, t| {
        let other = CgroupProcess {
            id: process(t.init.saturating_add(1000), OLD),
            ppid: 1,
            first_of_namespace: true,
        };
        if let Seen::Present(processes) = &mut l.cgroup_of(t).processes {
            processes.push(other);
        }
    },
    |l, t| {
        l.fifos.push(FifoFolder {
            path: format!("/run/containerd/fifo/{}", t.id).into(),
            ids: [t.id.to_owned()].into(),
            instance: None,
            changed_at: Some(ago(OLD)),
            users: Seen::Present(Vec::new()),
        });
    },
    |l, t| {
        l.execs.push(Exec {
            id: process(t.init.saturating_add(2000), OLD),
            shim: t.shim,
            name: t.name(),
            exec_id: None,
            fifos: vec!["/run/containerd/fifo/e/e-stdout".into()],
            fifo_users: Seen::Present(Vec::new()),
        });
    },
    |l, t| {
        let point = t.bundle().join("rootfs");
        l.mount_ages.insert(point.clone(), ago(OLD));
        if let Seen::Present(mounts) = &mut l.mounts {
            mounts.push(mount(point, "overlay"));
        }
    },
    |l, t| {
        l.records.push(RecordFile {
            path: format!("{}.record", t.socket()).into(),
            socket: t.socket(),
            record: Seen::Present(leftovers::record("boot")),
        });
    },
    |l, t| {
        l.busy_verbs.insert(t.name());
    },
    |l, t| l.sockets.retain(|file| file.path != Path::new(&t.socket())),
    |l, t| l.end_init(t),
    |l, t| l.end_shim(t),
    |l, t| l.remove_bundle(t),
    |l, t| l.remove_runc(t),
];

/// What the containerd of an index says.
#[derive(Debug, Clone, Copy)]
enum Says {
    All,
    NoTasks,
    Nothing,
    IsDown,
}

/// A node with some things wrong at once.
#[derive(Debug, Clone)]
pub(crate) struct Broken {
    changes: Vec<(usize, usize)>,
    says: [Says; 2],
}

impl Broken {
    pub(crate) fn look(&self) -> Look {
        let mut look = healthy();
        for task in &BROKEN {
            look.add(task);
        }
        let mut changes = self.changes.clone();
        changes.sort_unstable();
        for (change, task) in changes {
            CHANGES[change](&mut look, &BROKEN[task]);
        }
        for (at, says) in self.says.iter().enumerate() {
            match says {
                Says::All => {}
                Says::NoTasks => look.api(at).tasks = None,
                Says::Nothing => look.instances[at].api = Api::Unknown("timed out".into()),
                Says::IsDown => {
                    look.instances[at].api = Api::Down;
                    look.instances[at].daemon = None;
                }
            }
        }
        look
    }
}

pub(crate) fn broken() -> impl Strategy<Value = Broken> {
    let says = || {
        prop_oneof![
            3 => Just(Says::All),
            1 => Just(Says::NoTasks),
            1 => Just(Says::Nothing),
            1 => Just(Says::IsDown),
        ]
    };
    let change = (0..CHANGES.len(), 0..BROKEN.len());
    (proptest::collection::vec(change, 0..12), says(), says()).prop_map(|(changes, a, b)| Broken {
        changes,
        says: [a, b],
    })
}

/// The first suspicion of one of these codes, if there is one.
fn any_of(look: &Look, codes: &[Code]) -> Option<Suspicion> {
    let mut found = judge(look).into_iter();
    found.find(|suspicion| codes.contains(&suspicion.finding.code))
}

fn none(what: Option<impl Debug>) -> Result<(), TestCaseError> {
    match what {
        Some(found) => Err(TestCaseError::fail(format!("{found:#?}"))),
        None => Ok(()),
    }
}

/// The command that an action names, as far as it is one: up to a sign, or what it narrows to.
fn command(action: &str) -> Option<Vec<&str>> {
    let (_, rest) = action.split_once("recoverd ")?;
    let line = rest.split([',', ':', ';']).next()?;
    let words: Vec<&str> = line.split(' ').collect();
    let length = match *words.first()? {
        "adopt" => 2,
        "repair" => words.iter().position(|word| *word == "--only")? + 2,
        _ => 1,
    };
    Some(words.into_iter().take(length).collect())
}

proptest! {
    #[test]
    fn the_command_that_an_action_names_is_one(broken in broken()) {
        for suspicion in judge(&broken.look()) {
            let action = &suspicion.finding.action;
            prop_assert_eq!(action.contains("recoverd "), command(action).is_some(), "{}", action);
            if let Some(words) = command(action) {
                let line = ["recoverd"].into_iter().chain(words);
                let parsed = Cli::try_parse_from(line);
                prop_assert!(parsed.is_ok(), "{}: {:?}", action, parsed.err());
            }
        }
    }

    #[test]
    fn findings_are_sorted_and_as_bad_as_their_code(broken in broken()) {
        let found = judge(&broken.look());
        let keys: Vec<_> = found
            .iter()
            .map(|s| (s.finding.severity, s.finding.code, s.finding.subject.clone()))
            .collect();
        prop_assert!(keys.is_sorted(), "{keys:#?}");
        for suspicion in &found {
            let finding = &suspicion.finding;
            prop_assert_eq!(finding.severity, finding.code.severity());
            prop_assert!(!finding.evidence.is_empty() && !finding.action.is_empty());
        }
    }

    #[test]
    fn a_task_that_is_well_has_no_finding_whatever_is_broken_beside_it(broken in broken()) {
        let look = broken.look();
        let own = [
            format!("default/{}", WELL.id),
            format!("shim {}", WELL.shim),
            WELL.socket(),
            look.cgroups[0].folders[0].display().to_string(),
        ];
        none(judge(&look).iter().find(|s| own.contains(&s.finding.subject.text())))?;
    }

    #[test]
    fn a_foreign_shim_gets_no_finding_but_foreign(broken in broken()) {
        let look = broken.look();
        let cases = correlate(&look, Path::new(SOCKET_DIR));
        let found = classify(&look, &cases, &SETTINGS);
        let foreign = |case: &&Case<'_>| {
            // A containerd that is not seen may have a task of this name as well.
            let mut same = cases.cases.iter().filter(|other| other.name == case.name);
            same.all(|other| other.kind() == Some(Kind::Foreign))
        };
        for case in cases.cases.iter().filter(foreign) {
            let pid = case.shim.process().map_or(0, |shim| shim.id.pid);
            let own = [task_subject(&case.name), Subject::Shim { shim: pid }];
            let other = found.iter().filter(|s| s.finding.code != Code::Foreign);
            none(other.into_iter().find(|s| own.contains(&s.finding.subject)))?;
        }
    }

    #[test]
    fn nothing_is_stale_or_leaked_because_it_is_unknown(broken in broken()) {
        use Code::*;
        let mut look = broken.look();
        look.processes = unknown();
        // Without the process table no task is known to be dead.
        let of_the_dead = [StaleBundle, LeakedShim, LeakedRuncState, StuckTask, ExitUnreported];
        none(any_of(&look, &of_the_dead))?;

        let mut look = broken.look();
        look.listeners = unknown();
        none(any_of(&look, &[StaleBundle, StaleSocket, OrphanedTask]))?;

        let mut look = broken.look();
        for instance in &mut look.instances {
            instance.api = Api::Unknown("timed out".into());
        }
        none(any_of(&look, &[LeakedShim, TaskUnknownToContainerd, ExitUnreported]))?;

        let mut look = broken.look();
        look.processes = unknown();
        look.listeners = unknown();
        look.mounts = unknown();
        for entry in &mut look.runc {
            entry.state = unknown();
        }
        for cgroup in &mut look.cgroups {
            cgroup.processes = unknown();
        }
        for folder in &mut look.fifos {
            folder.users = unknown();
        }
        for exec in &mut look.execs {
            exec.fifo_users = unknown();
        }
        let stays = [
            StaleBundle, StaleSocket, StaleRecord, LeakedShim, LeakedMount, LeakedCgroup,
            LeakedFifo, LeakedRuncState, LeakedExec,
        ];
        none(any_of(&look, &stays))?;
    }
}

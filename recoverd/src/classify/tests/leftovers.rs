//! What stays behind.

use recoverd_common::{
    mounts::Mount,
    proc::ProcessId,
    record::{self, Record},
    timestamp::Timestamp,
};

use super::*;
use crate::facts::{
    CgroupProcess, Container, Exec, FifoFolder, Filesystem, Phase, RecordFile,
    fixture::{self, OLD, SOCKET, ago, mount, process, stat},
};

/// The task ended and its shim with it; its bundle and runc's state are left.
fn dead(look: &mut Look) {
    look.end_init(&C1);
    look.end_shim(&C1);
    look.unlisted(&C1);
}

/// The shim answers and listens again.
fn revive(look: &mut Look) {
    look.shims.push(fixture::shim(&C1));
    look.listeners_mut().insert(SOCKET.into(), vec![C1.shim]);
}

fn relist(look: &mut Look) {
    look.listed(&C1, Phase::Stopped);
}

/// The task lives.
fn resurrect(look: &mut Look) {
    look.table().insert(C1.init, stat(process(C1.init, OLD), 1));
}

#[test]
fn a_bundle_without_init_and_shim_is_stale() {
    finds(
        Code::StaleBundle,
        dead,
        &[
            ("the init lives", resurrect),
            ("nobody can see processes", blind),
            ("nobody can see listeners", deaf),
            ("a shim serves it", revive),
            ("somebody answers at its socket", |l| {
                *l.answer_of(&C1) = fixture::answer(&C1, Phase::Stopped);
            }),
            ("somebody listens at its socket", |l| {
                l.listeners_mut().insert(SOCKET.into(), vec![99]);
            }),
            ("containerd lists it", relist),
            ("a verb runs for it", busy),
            ("there is none", |l| l.remove_bundle(&C1)),
        ],
    );
    for (what, change) in [("down", down as Break), ("not asked", unsure)] {
        let mut look = healthy();
        dead(&mut look);
        change(&mut look);
        assert!(
            codes(&look).contains(&Code::StaleBundle),
            "containerd {what}"
        );
    }
    let mut look = healthy();
    dead(&mut look);
    look.bundle_of(&C1).empty = true;
    look.sockets.clear();
    look.cgroups.clear();
    assert!(only(&look).finding.action.contains("an empty bundle"));
    assert_eq!(only(&look).hold, Hold::Twice);
}

#[test]
fn the_socket_of_a_dead_task_is_stale() {
    finds(
        Code::StaleSocket,
        dead,
        &[
            ("the init lives and may be adopted", resurrect),
            ("whether the init lives is unknown", blind),
            ("nobody can see listeners", deaf),
            ("somebody listens", |l| {
                l.listeners_mut().insert(SOCKET.into(), vec![99]);
            }),
            ("a connection was made", |l| {
                l.answer_of(&C1).connection = Connection::Made
            }),
            ("a connection could not be tried", |l| {
                l.answer_of(&C1).connection = Connection::Failed("EMFILE".into());
            }),
            ("its shim is being started", busy),
            ("it is no socket", |l| l.sockets[0].is_socket = false),
        ],
    );
}

#[test]
fn a_socket_is_owned_by_a_record_of_any_containerd_under_any_spelling_and_in_any_group() {
    fn recorded(look: &mut Look) {
        let file = look.sockets[0].clone();
        look.remove(&C1);
        look.sockets.push(file);
        look.sockets[0].changed_at = Some(ago(NEW));
    }
    let table: &[(&str, Break)] = &[
        ("its own name", |_| {}),
        ("its group", |l| {
            let containers = &mut l.api(0).containers;
            containers.clear();
            let container = Container {
                group: Some("c1".into()),
                ..Container::default()
            };
            containers.insert(("default".into(), "other".into()), container);
        }),
        ("a spelling", |l| {
            l.instances[0].aliases = vec![l.instances[0].address.clone()];
            l.instances[0].address = "/var/run/containerd/containerd.sock".into();
        }),
    ];
    for (what, change) in table {
        let mut look = healthy();
        recorded(&mut look);
        change(&mut look);
        let found = only(&look);
        assert_eq!(
            (found.finding.code, found.instance),
            (Code::StaleSocket, Some(0)),
            "{what}"
        );
    }
    // A name that nobody gives may be that of a containerd that is not seen: old ones are told.
    let mut look = healthy();
    recorded(&mut look);
    look.api(0).containers.clear();
    assert_eq!(codes(&look), []);
    look.sockets[0].changed_at = Some(ago(OLD));
    assert!(
        only(&look)
            .finding
            .action
            .starts_with("remove it by hand if")
    );
    look.sockets[0].changed_at = None;
    assert_eq!(codes(&look), []);
}

pub(super) fn record(boot_id: &str) -> Record {
    Record {
        written_at: Timestamp {
            seconds: 0,
            nanos: 0,
        },
        boot_id: boot_id.into(),
        shim: record::Shim {
            version: "0.1.0".into(),
            process: record::Process {
                pid: C1.shim.unsigned_abs(),
                start_time: process(C1.shim, OLD).start_time,
            },
            exe: "/usr/bin/containerd-shim-recoverd-v1".into(),
            containerd_address: "/run/containerd/containerd.sock".into(),
            namespace: "default".into(),
            group_id: "c1".into(),
            socket: SOCKET.into(),
            api_versions: vec![2, 3],
        },
        tasks: Vec::new(),
        context: record::Context {
            cgroup: Vec::new(),
            oom_score_adj: 0,
            rlimits: Default::default(),
            umask: 0,
            nice: 0,
            env: Default::default(),
        },
        running: Vec::new(),
        descriptors: Vec::new(),
        unanswered: Vec::new(),
        strays: Vec::new(),
    }
}

fn recorded(look: &mut Look, record: Seen<Record>) {
    look.records = vec![RecordFile {
        path: format!("{SOCKET}.record").into(),
        socket: SOCKET.into(),
        record,
    }];
}

#[test]
fn a_record_of_another_boot_is_stale() {
    finds(
        Code::StaleRecord,
        |l| recorded(l, Seen::Present(record("earlier"))),
        &[
            ("it is of this boot", |l| {
                recorded(l, Seen::Present(record("boot")))
            }),
            ("this boot is unknown", |l| l.host.boot_id = None),
        ],
    );
}

#[test]
fn a_record_without_socket_and_process_is_stale() {
    finds(
        Code::StaleRecord,
        |l| {
            l.remove(&C1);
            recorded(l, Seen::Present(record("boot")));
        },
        &[
            ("a shim listens there", revive),
            ("its socket is there", |l| l.sockets = healthy().sockets),
            ("its init lives", |l| {
                l.bundles = healthy().bundles;
                resurrect(l);
            }),
            ("it is gone", |l| recorded(l, Seen::Absent)),
            ("the shim that it names lives", |l| {
                l.table().insert(C1.shim, stat(process(C1.shim, OLD), 1));
            }),
            (
                "the init that it names lives, and nothing else names it",
                |l| {
                    resurrect(l);
                    let mut last_word = record("boot");
                    last_word.tasks = vec![recorded_task()];
                    recorded(l, Seen::Present(last_word));
                },
            ),
            ("nobody can see processes", blind),
        ],
    );
    let mut look = healthy();
    look.remove(&C1);
    let mut last_word = record("boot");
    last_word.tasks = vec![recorded_task()];
    recorded(&mut look, Seen::Present(last_word));
    look.table().insert(C1.init, stat(process(C1.init, NEW), 1));
    look.table().insert(C1.shim, stat(process(C1.shim, NEW), 1));
    assert_eq!(
        codes(&look),
        [Code::StaleRecord],
        "later processes have these pids"
    );
}

/// [`C1`] as a record has it.
fn recorded_task() -> record::Task {
    record::Task {
        id: C1.id.into(),
        bundle: C1.bundle().display().to_string(),
        phase: record::Phase::Running,
        init: Some(record::Process {
            pid: C1.init.unsigned_abs(),
            start_time: process(C1.init, OLD).start_time,
        }),
        runtime: record::Runtime {
            binary: "runc".into(),
            root: "/run/containerd/runc/default".into(),
            systemd_cgroup: false,
        },
        rootfs: Vec::new(),
        cgroup: Vec::new(),
        stdio: record::Stdio {
            stdin: String::new(),
            stdout: String::new(),
            stderr: String::new(),
            stdin_closed: false,
            logger: None,
            carried: Vec::new(),
            holders: Vec::new(),
        },
        terminal: false,
        created_at: Timestamp {
            seconds: 0,
            nanos: 0,
        },
        exit: None,
        oom: false,
        oom_kills: None,
        restore: None,
        execs: Vec::new(),
    }
}

#[test]
fn a_record_that_cannot_be_trusted_is_unreadable() {
    finds(
        Code::UnreadableRecord,
        |l| recorded(l, Seen::Unknown("is of format 9".into())),
        &[
            ("it is well", |l| recorded(l, Seen::Present(record("boot")))),
            ("it is gone", |l| recorded(l, Seen::Absent)),
        ],
    );
    let mut look = healthy();
    recorded(&mut look, Seen::Unknown("is of format 9".into()));
    assert!(facts(&only(&look)).contains("is of format 9"));
    assert_eq!(only(&look).instance, Some(0));
}

#[test]
fn a_mount_of_a_task_that_is_gone_is_leaked() {
    fn mounted(look: &mut Look) {
        let point = C1.bundle().join("rootfs");
        look.remove(&C1);
        look.mount_ages.insert(point.clone(), ago(OLD));
        look.mounts = Seen::Present(vec![mount("/", "ext4"), mount(point, "overlay")]);
    }
    finds(
        Code::LeakedMount,
        mounted,
        &[
            ("it is young", |l| {
                l.mount_ages.insert(C1.bundle().join("rootfs"), ago(YOUNG));
            }),
            ("its age is unknown", |l| l.mount_ages.clear()),
            ("the mounts are unknown", |l| l.mounts = unknown()),
            ("containerd lists the task", relist),
            ("its shim lives", |l| {
                l.bundles = healthy().bundles;
                revive(l);
            }),
            ("its init lives", |l| {
                l.bundles = healthy().bundles;
                resurrect(l);
            }),
            ("whether its init lives is unknown", |l| {
                l.bundles = healthy().bundles;
                blind(l);
            }),
            ("whether a shim serves it is unknown", |l| {
                l.bundles = healthy().bundles;
                deaf(l);
            }),
            ("a verb runs for it", busy),
            ("it is in nobody's bundle", |l| l.instances[0].state = None),
            ("it is elsewhere", |l| {
                let elsewhere = Mount {
                    point: "/mnt/default/c1/rootfs".into(),
                    ..mount("/", "overlay")
                };
                l.mount_ages.insert(elsewhere.point.clone(), ago(OLD));
                l.mounts = Seen::Present(vec![elsewhere]);
            }),
        ],
    );
    let mut look = healthy();
    mounted(&mut look);
    assert_eq!(only(&look).instance, Some(0));
}

#[test]
fn a_cgroup_of_a_task_that_is_gone_is_leaked() {
    fn left(look: &mut Look) {
        let mut cgroup = look.cgroup_of(&C1).clone();
        look.remove(&C1);
        cgroup.processes = Seen::Present(Vec::new());
        look.cgroups = vec![cgroup];
    }
    finds(
        Code::LeakedCgroup,
        left,
        &[
            ("somebody is in it", |l| {
                l.cgroups[0].processes = Seen::Present(vec![CgroupProcess {
                    id: ProcessId {
                        pid: 0,
                        start_time: 0,
                    },
                    ppid: 0,
                    first_of_namespace: false,
                }]);
            }),
            ("who is in it is unknown", |l| {
                l.cgroups[0].processes = unknown()
            }),
            ("it is young", |l| {
                l.cgroups[0].changed_at = Some(ago(YOUNG))
            }),
            ("its age is unknown", |l| l.cgroups[0].changed_at = None),
            ("it is nobody's", |l| l.cgroups[0].name = None),
            ("containerd lists the task", relist),
            ("a verb runs for it", busy),
            ("whether its init lives is unknown", |l| {
                l.bundles = healthy().bundles;
                blind(l);
            }),
        ],
    );
    let mut look = healthy();
    left(&mut look);
    let found = only(&look);
    assert_eq!(found.finding.subject.text(), "/sys/fs/cgroup/default/c1");
    assert_eq!(
        found.instance,
        Some(0),
        "the container's record says whose it is"
    );
    look.cgroups[0]
        .folders
        .push("/sys/fs/cgroup/pids/default/c1".into());
    assert_eq!(only(&look).finding.subject.text(), "/default/c1");
}

#[test]
fn fifos_that_nobody_has_open_are_leaked() {
    fn left(look: &mut Look) {
        look.remove(&C1);
        look.fifos = vec![FifoFolder {
            path: "/run/containerd/fifo/1".into(),
            ids: ["c1".to_owned()].into(),
            instance: None,
            changed_at: Some(ago(OLD)),
            users: Seen::Present(Vec::new()),
        }];
    }
    finds(
        Code::LeakedFifo,
        left,
        &[
            ("somebody has one open", |l| {
                l.fifos[0].users = Seen::Present(vec![99])
            }),
            ("who has them open is unknown", |l| {
                l.fifos[0].users = unknown()
            }),
            ("they are young", |l| {
                l.fifos[0].changed_at = Some(ago(YOUNG))
            }),
            ("their age is unknown", |l| l.fifos[0].changed_at = None),
            ("containerd lists the task", relist),
            ("the task may live", |l| {
                l.bundles = healthy().bundles;
                blind(l);
            }),
            ("a living exec names them", |l| {
                l.execs = vec![exec("/run/containerd/fifo/1/e1-stdout")];
            }),
        ],
    );
    let mut look = healthy();
    left(&mut look);
    assert_eq!(
        only(&look).instance,
        Some(0),
        "the container's record says whose they are"
    );
    assert!(facts(&only(&look)).contains("/run/containerd/fifo/1/c1-std*"));
}

#[test]
fn runcs_state_of_a_dead_task_without_bundle_is_leaked() {
    fn left(look: &mut Look) {
        dead(look);
        look.remove_bundle(&C1);
    }
    finds(
        Code::LeakedRuncState,
        left,
        &[
            ("the bundle is there too", |l| l.bundles = healthy().bundles),
            ("the init lives", resurrect),
            ("nobody can see processes", blind),
            ("the state cannot be read", |l| {
                l.runc_of(&C1).state = unknown()
            }),
            ("there is no state in it yet", |l| {
                l.runc_of(&C1).state = Seen::Absent
            }),
            ("no init was started yet", |l| l.uncreated(&C1)),
            ("it is young", |l| {
                l.runc_of(&C1).changed_at = Some(ago(YOUNG))
            }),
            ("its age is unknown", |l| l.runc_of(&C1).changed_at = None),
            ("containerd lists it", relist),
            ("a shim serves it", revive),
            ("nobody can see listeners", deaf),
            ("a verb runs for it", busy),
        ],
    );
}

#[test]
fn a_tmpfs_is_nearly_full_by_bytes_or_by_inodes() {
    fn filled(bytes: (u64, u64), inodes: (u64, u64), tmpfs: bool) -> Vec<Code> {
        let mut look = healthy();
        look.filesystems = vec![Filesystem {
            path: "/run".into(),
            tmpfs,
            bytes,
            inodes,
            eaters: vec![("/run/big".into(), 4096)],
        }];
        codes(&look)
    }
    let full = [Code::RunNearlyFull];
    assert_eq!(filled((1000, 100), (1000, 1000), true), full);
    assert_eq!(filled((1000, 1000), (1000, 100), true), full);
    assert_eq!(filled((1000, 0), (0, 0), true), full);
    assert_eq!(filled((1000, 110), (1000, 110), true), []);
    assert_eq!(
        filled((1000, 1000), (0, 0), true),
        [],
        "it counts no inodes"
    );
    assert_eq!(filled((0, 0), (0, 0), true), []);
    assert_eq!(filled((1000, 0), (1000, 0), false), [], "it is a disk");
}

fn exec(fifo: &str) -> Exec {
    Exec {
        id: process(99, OLD),
        shim: C1.shim,
        name: C1.name(),
        exec_id: Some("e1".into()),
        fifos: vec![fifo.into()],
        fifo_users: Seen::Present(Vec::new()),
    }
}

#[test]
fn an_exec_whose_client_went_away_is_leaked() {
    finds(
        Code::LeakedExec,
        |l| l.execs = vec![exec("/run/containerd/fifo/1/e1-stdout")],
        &[
            ("a client has a fifo open", |l| {
                l.execs[0].fifo_users = Seen::Present(vec![98])
            }),
            ("who has them open is unknown", |l| {
                l.execs[0].fifo_users = unknown()
            }),
            ("it has no fifos", |l| l.execs[0].fifos.clear()),
            ("it is young", |l| l.execs[0].id = process(99, YOUNG)),
            ("it is nobody's", |l| l.execs[0].name.1 = "other".into()),
            ("its shim is foreign", foreign),
        ],
    );
    let mut look = healthy();
    look.execs = vec![exec("/run/containerd/fifo/1/e1-stdout")];
    let shown = facts(&only(&look));
    assert!(shown.contains("exec e1: process 99"), "{shown}");
}

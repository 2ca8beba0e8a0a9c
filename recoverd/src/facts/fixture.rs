//! A healthy node on plain data, for tests: they break one thing each and judge what is left.
//!
//! Compiled for tests only, so nothing from outside gets here. Where it panics, the test has asked
//! for something that the node it made itself does not have: that is the test's failure.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use recoverd_common::{
    bundle::{Bootstrap, Bundle, Config, InitPid},
    ids::{Id, Namespace},
    mounts::Mount,
    paths,
    proc::{Exe, FileId, Memory, ProcessId, Stat},
    runc::RuncState,
    seen::Seen,
};

use super::*;

/// Where sockets are.
pub const SOCKET_DIR: &str = "/run/containerd/s";
/// The socket of [`C1`].
pub const SOCKET: &str =
    "/run/containerd/s/d25aa4ef11a84e954e74a5bcff06557d0b6ea8d0c00243896f29826694bbd888";
/// The stock shim.
pub const BINARY: &str = "/usr/bin/containerd-shim-runc-v2";
/// Ticks in a second.
pub const TICKS: u64 = 100;
/// Age of everything, unless a test says otherwise.
pub const OLD: u64 = 5000;
/// Seconds since boot.
const UPTIME: u64 = 10_000;

/// Who is who in the fixture.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Task {
    /// Index of its containerd.
    pub instance: usize,
    /// Its name.
    pub id: &'static str,
    /// The task whose shim serves it.
    pub group: &'static str,
    /// Pid of its shim.
    pub shim: i32,
    /// Pid of its init.
    pub init: i32,
}

/// The task of [`healthy`].
pub const C1: Task = Task {
    instance: 0,
    id: "c1",
    group: "c1",
    shim: 6,
    init: 7,
};

/// A time so many seconds before the look.
pub fn ago(seconds: u64) -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(UPTIME.saturating_sub(seconds))
}

/// A process that started so many seconds before the look.
pub fn process(pid: i32, age: u64) -> ProcessId {
    ProcessId {
        pid,
        start_time: UPTIME.saturating_sub(age).saturating_mul(TICKS),
    }
}

/// A line of the process table.
pub fn stat(id: ProcessId, ppid: i32) -> Stat {
    Stat {
        id,
        comm: "x".into(),
        state: 'S',
        ppid,
        cpu_ticks: 0,
        threads: 1,
        exit_code: 0,
    }
}

/// A line of the mount table.
pub fn mount(point: impl Into<PathBuf>, kind: &str) -> Mount {
    Mount {
        id: 1,
        point: point.into(),
        kind: kind.into(),
        source: String::new(),
    }
}

/// A containerd that is up; the first has the default places.
pub fn instance(index: usize) -> Instance {
    let (address, state) = match index {
        0 => (
            "/run/containerd/containerd.sock".into(),
            "/run/containerd".into(),
        ),
        other => (
            format!("/run/other{other}/containerd.sock"),
            format!("/run/other{other}"),
        ),
    };
    Instance {
        address,
        state: Some(state.into()),
        root: Some("/var/lib/containerd".into()),
        source: "default".into(),
        daemon: Some(process(5, OLD)),
        api: Api::Up(Box::new(ApiFacts {
            by_record: false,
            version: "1.7.24~ds1".into(),
            namespaces: vec!["default".into()],
            containers: BTreeMap::new(),
            tasks: Some(BTreeMap::new()),
        })),
        aliases: Vec::new(),
    }
}

/// A node with one containerd and nothing else.
pub fn empty() -> Look {
    Look {
        at: ago(0),
        host: Host {
            name: "node".into(),
            kernel: "6.1".into(),
            boot_id: Some("boot".into()),
            booted_at: ago(UPTIME),
            ticks: TICKS,
            cgroup: "v2",
            root: true,
        },
        instances: vec![instance(0)],
        shims: Vec::new(),
        busy_verbs: BTreeSet::new(),
        bundles: Vec::new(),
        runc: Vec::new(),
        sockets: Vec::new(),
        listeners: Seen::Present(HashMap::new()),
        supervisors: Vec::new(),
        answers: BTreeMap::new(),
        processes: Seen::Present(HashMap::new()),
        memberships: HashMap::new(),
        mounts: Seen::Present(vec![mount("/", "ext4"), mount("/run", "tmpfs")]),
        mount_ages: HashMap::new(),
        cgroups: Vec::new(),
        fifos: Vec::new(),
        execs: Vec::new(),
        records: Vec::new(),
        witnessed: crate::witnessed::Witnessed::default(),
        filesystems: vec![Filesystem {
            path: "/run".into(),
            tmpfs: true,
            bytes: (100 << 20, 50 << 20),
            inodes: (10_000, 9000),
            eaters: Vec::new(),
        }],
        gaps: Vec::new(),
    }
}

/// A node with one healthy task, [`C1`].
pub fn healthy() -> Look {
    let mut look = empty();
    look.add(&C1);
    look
}

/// What a shim that serves only this task answers.
pub fn answer(task: &Task, phase: Phase) -> Answer {
    Answer {
        connection: Connection::Made,
        greeting: Reply::Said(Greeting {
            shim_pid: task.shim.unsigned_abs(),
            version: String::new(),
        }),
        states: BTreeMap::from([(task.id.to_owned(), Reply::Said(state(task, phase)))]),
        api: Some(2),
        took: Some(Duration::ZERO),
        asked: 1,
        patient: true,
    }
}

/// What its shim says of a task.
pub fn state(task: &Task, phase: Phase) -> TaskState {
    TaskState {
        phase,
        pid: task.init.unsigned_abs(),
        exit_status: 42,
        exited_at: None,
        terminal: false,
        stdio: [String::new(), String::new(), String::new()],
    }
}

/// The stock shim of a task.
pub fn shim(task: &Task) -> Shim {
    let file = FileId { dev: 1, ino: 1 };
    Shim {
        id: process(task.shim, OLD),
        namespace: "default".into(),
        task: task.group.into(),
        address: instance(task.instance).address,
        name: "containerd-shim-runc-v2".into(),
        exe: Seen::Present(Exe {
            path: BINARY.into(),
            deleted: false,
            file,
        }),
        installed: Seen::Present(file),
        cwd: Seen::Absent,
        state: 'S',
        threads: 12,
        cpu_ticks: 0,
        cpu_ticks_after: None,
        listens: vec![task.socket()],
        descriptors: Some(32),
        memory: Seen::Present(Memory {
            pss_kib: 5000,
            private_kib: 5000,
        }),
    }
}

/// The bundle of a task, with both files that name the socket.
pub fn bundle(task: &Task) -> Bundle {
    let address = format!("unix://{}", task.socket());
    Bundle {
        path: task.bundle(),
        namespace: Namespace::new("default").unwrap(),
        id: Id::new(task.id).unwrap(),
        changed_at: ago(OLD),
        empty: false,
        address: Seen::Present(address.clone()),
        bootstrap: Seen::Present(Bootstrap {
            version: 2,
            address,
            protocol: "ttrpc".into(),
        }),
        shim_binary: Seen::Present(BINARY.into()),
        runtime: Seen::Present("runc".into()),
        options: Seen::Absent,
        init_pid: Seen::Present(InitPid {
            pid: task.init,
            written_at: ago(OLD),
        }),
        config: Seen::Present(Config {
            annotations: task.annotations(),
            ..Config::default()
        }),
    }
}

impl Task {
    /// Its name.
    pub fn name(&self) -> TaskName {
        ("default".into(), self.id.into())
    }

    /// Where its shim listens.
    pub fn socket(&self) -> Address {
        let address = instance(self.instance).address;
        let path = paths::socket(Path::new(SOCKET_DIR), &address, "default", self.group);
        path.to_string_lossy().into_owned()
    }

    /// Its bundle.
    pub fn bundle(&self) -> PathBuf {
        let state = instance(self.instance).state.unwrap_or_default();
        state.join(paths::TASK_PLUGIN).join("default").join(self.id)
    }

    /// The CRI's annotations, when it belongs to a pod.
    fn annotations(&self) -> BTreeMap<String, String> {
        if self.group == self.id {
            return BTreeMap::new();
        }
        let pair = |key: &str, value: &str| (format!("io.kubernetes.cri.{key}"), value.to_owned());
        BTreeMap::from([
            pair("sandbox-id", self.group),
            pair("sandbox-name", "web-0"),
            pair("sandbox-namespace", "prod"),
            pair("container-name", "app"),
        ])
    }
}

impl Look {
    /// Adds a healthy task that started long ago.
    pub fn add(&mut self, task: &Task) {
        while self.instances.len() <= task.instance {
            self.instances.push(instance(self.instances.len()));
        }
        let (init, socket) = (process(task.init, OLD), task.socket());
        self.bundles.push(BundleFacts {
            instance: task.instance,
            bundle: bundle(task),
        });
        self.runc.push(RuncEntry {
            path: format!("{}/default/{}", paths::RUNC_ROOT, task.id).into(),
            name: task.name(),
            changed_at: Some(ago(OLD)),
            state: Seen::Present(RuncState {
                init: Some(init),
                bundle: Some(task.bundle()),
                annotations: task.annotations(),
                cgroups: BTreeMap::new(),
            }),
        });
        if !self.shims.iter().any(|shim| shim.id.pid == task.shim) {
            self.shims.push(shim(task));
            self.sockets.push(SocketFile {
                path: socket.clone().into(),
                changed_at: Some(ago(OLD)),
                is_socket: true,
            });
            self.listeners_mut().insert(socket.clone(), vec![task.shim]);
            self.table()
                .insert(task.shim, stat(process(task.shim, OLD), 1));
        }
        self.table().insert(task.init, stat(init, task.shim));
        self.memberships.insert(
            task.init,
            Seen::Present(vec![format!("/default/{}", task.id)]),
        );
        self.answers
            .entry(socket)
            .or_insert_with(|| answer(task, Phase::Running))
            .states
            .insert(task.id.into(), Reply::Said(state(task, Phase::Running)));
        self.cgroups.push(CgroupFacts {
            path: format!("/default/{}", task.id),
            name: Some(task.name()),
            folders: vec![format!("/sys/fs/cgroup/default/{}", task.id).into()],
            changed_at: Some(ago(OLD)),
            processes: Seen::Present(vec![CgroupProcess {
                id: init,
                ppid: task.shim,
                first_of_namespace: true,
            }]),
        });
        self.api(task.instance)
            .containers
            .insert(task.name(), Container::default());
        self.listed(task, Phase::Running);
    }

    /// The API of a containerd that is up.
    pub fn api(&mut self, instance: usize) -> &mut ApiFacts {
        match &mut self.instances[instance].api {
            Api::Up(api) => api,
            Api::Down | Api::Unknown(_) => panic!("it is not up"),
        }
    }

    /// The process table.
    pub fn table(&mut self) -> &mut HashMap<i32, Stat> {
        match &mut self.processes {
            Seen::Present(table) => table,
            Seen::Absent | Seen::Unknown(_) => panic!("it is not seen"),
        }
    }

    /// The listeners.
    pub fn listeners_mut(&mut self) -> &mut HashMap<Address, Vec<i32>> {
        match &mut self.listeners {
            Seen::Present(listeners) => listeners,
            Seen::Absent | Seen::Unknown(_) => panic!("they are not seen"),
        }
    }

    /// The shim with this pid.
    pub fn shim_of(&mut self, task: &Task) -> &mut Shim {
        let mut all = self.shims.iter_mut();
        all.find(|shim| shim.id.pid == task.shim).unwrap()
    }

    /// Its bundle.
    pub fn bundle_of(&mut self, task: &Task) -> &mut Bundle {
        let path = task.bundle();
        let mut all = self.bundles.iter_mut();
        &mut all.find(|facts| facts.bundle.path == path).unwrap().bundle
    }

    /// What its shim answers.
    pub fn answer_of(&mut self, task: &Task) -> &mut Answer {
        self.answers.get_mut(&task.socket()).unwrap()
    }

    /// runc's entry.
    pub fn runc_of(&mut self, task: &Task) -> &mut RuncEntry {
        let name = task.name();
        self.runc
            .iter_mut()
            .find(|entry| entry.name == name)
            .unwrap()
    }

    /// Its cgroup.
    pub fn cgroup_of(&mut self, task: &Task) -> &mut CgroupFacts {
        let name = Some(task.name());
        self.cgroups.iter_mut().find(|c| c.name == name).unwrap()
    }

    /// The containerd says that the task is so far.
    pub fn listed(&mut self, task: &Task, phase: Phase) {
        let pid = task.init.unsigned_abs();
        let tasks = self.api(task.instance).tasks.get_or_insert_default();
        tasks.insert(task.name(), ContainerdTask { phase, pid });
    }

    /// The containerd is up and does not list the task.
    pub fn unlisted(&mut self, task: &Task) {
        if let Some(tasks) = &mut self.api(task.instance).tasks {
            tasks.remove(&task.name());
        }
    }

    /// The shim says that the task is so far.
    pub fn told(&mut self, task: &Task, phase: Phase) {
        let said = Reply::Said(state(task, phase));
        self.answer_of(task).states.insert(task.id.into(), said);
    }

    /// The init ended and was reaped.
    pub fn end_init(&mut self, task: &Task) {
        self.table().remove(&task.init);
        self.cgroup_of(task).processes = Seen::Present(Vec::new());
    }

    /// The shim was killed; its socket file is left, its init has another parent.
    pub fn end_shim(&mut self, task: &Task) {
        self.shims.retain(|shim| shim.id.pid != task.shim);
        self.listeners_mut().remove(&task.socket());
        let table = self.table();
        table.remove(&task.shim);
        for stat in table.values_mut().filter(|stat| stat.ppid == task.shim) {
            stat.ppid = 1;
        }
        for cgroup in &mut self.cgroups {
            if let Seen::Present(processes) = &mut cgroup.processes {
                for process in processes.iter_mut().filter(|p| p.ppid == task.shim) {
                    process.ppid = 1;
                }
            }
        }
        *self.answer_of(task) = Answer {
            connection: Connection::Refused,
            greeting: Reply::NotAsked,
            states: BTreeMap::new(),
            api: None,
            took: None,
            asked: 1,
            patient: false,
        };
    }

    /// The init started so many seconds ago.
    pub fn init_started(&mut self, task: &Task, age: u64) {
        let id = process(task.init, age);
        if let Some(stat) = self.table().get_mut(&task.init) {
            stat.id = id;
        }
        if let Seen::Present(state) = &mut self.runc_of(task).state {
            state.init = Some(id);
        }
        if let Seen::Present(init) = &mut self.bundle_of(task).init_pid {
            init.written_at = ago(age);
        }
        if let Seen::Present(processes) = &mut self.cgroup_of(task).processes {
            for process in processes.iter_mut().filter(|p| p.id.pid == task.init) {
                process.id = id;
            }
        }
    }

    /// The shim started so many seconds ago.
    pub fn shim_started(&mut self, task: &Task, age: u64) {
        let id = process(task.shim, age);
        self.shim_of(task).id = id;
        if let Some(stat) = self.table().get_mut(&task.shim) {
            stat.id = id;
        }
    }

    /// runc knows it and has started no init yet.
    pub fn uncreated(&mut self, task: &Task) {
        if let Seen::Present(state) = &mut self.runc_of(task).state {
            state.init = None;
        }
    }

    /// Its bundle was removed.
    pub fn remove_bundle(&mut self, task: &Task) {
        let path = task.bundle();
        self.bundles.retain(|facts| facts.bundle.path != path);
    }

    /// runc's state was removed.
    pub fn remove_runc(&mut self, task: &Task) {
        let name = task.name();
        self.runc.retain(|entry| entry.name != name);
    }

    /// Everything but what the test looks at is gone: init, shim, bundle, runc's state, the
    /// socket, the cgroup and containerd's word.
    pub fn remove(&mut self, task: &Task) {
        self.end_init(task);
        self.end_shim(task);
        self.remove_bundle(task);
        self.remove_runc(task);
        self.unlisted(task);
        let (name, socket) = (Some(task.name()), task.socket());
        self.cgroups.retain(|cgroup| cgroup.name != name);
        self.sockets.retain(|file| file.path != Path::new(&socket));
        self.answers.remove(&socket);
    }
}

#[test]
fn the_fixtures_socket_has_the_name_that_containerd_gives_it() {
    assert_eq!(C1.socket(), SOCKET);
}

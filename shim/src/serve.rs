//! The daemon: one thread around epoll. It owns every descriptor and no policy; what is decided
//! is decided in `state`, which it tells what happened and whose outputs it performs.
//!
//! For each input, in this order: events into their log, the record, the effects, the answers.
//! Whoever dies between two of them has told nobody anything that is not written down.

use std::{
    collections::{BTreeMap, VecDeque},
    error::Error,
    fs::{self, File},
    io::{self, Read, Write},
    net::Shutdown,
    os::{
        fd::{AsFd, OwnedFd},
        unix::{
            fs::OpenOptionsExt,
            net::{UnixListener, UnixStream},
        },
    },
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    fcntl::OFlag,
    sys::{
        epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout},
        prctl::set_child_subreaper,
        signal::{SigSet, Signal},
        signalfd::{SfdFlags, SignalFd},
        socket::{
            AddressFamily, SockFlag, SockType, UnixAddr, connect, getsockopt, socket, sockopt,
        },
    },
    time::{ClockId, clock_gettime},
    unistd::{Pid, geteuid},
};
use recoverd_common::{
    cgroup::{Cgroup, Roots, read_procs},
    paths::Beside,
    read::{MAX_FILE, read_file, read_text},
    record,
    seen::Seen,
    timestamp::Timestamp,
};
use serde::Deserialize;

use crate::{
    children::{self, ChildFile, Plan, Step},
    connections::Caller,
    context, event_log,
    event_log::EventLog,
    events::Post,
    journal::{Fixed, Journal},
    log::{Level, Log},
    oom::OomWatch,
    reaper, remains,
    runc::{self, Place},
    serve_args::ServeArgs,
    service::{Key, Refusal, Reply},
    state::{Input, LoopState, Output},
    stats,
    stdio::{self, Heard, Stdio, Wanted},
    sys,
    tasks::{
        Effect, Event, Failure, FailureKind, JobId, Now, Outcome, Process, Report, Task, Work,
    },
};

const LISTENER: u64 = 1;
const SIGNALS: u64 = 2;
const EVENTS: u64 = 3;
/// Connections, by their number.
const CONNECTION: u64 = 1 << 61;
/// OOM watches, by a count.
const OOM: u64 = 1 << 62;

/// Read at once from a connection, bytes: requests are mostly shorter.
const READ: usize = 4096;
/// Reads of one connection, then others have their turn.
const READS: u32 = 16;
/// Room kept in the log of events for each request that adds a task or an exec, bytes: its events
/// are below one KiB each, but for the mounts and paths that came with the request.
const EVENT_ROOM: u64 = 8192;
/// After a failed accept, milliseconds.
const ACCEPT_PAUSE_MS: u64 = 500;
/// Sub-groups below a container's cgroup that are looked through for pids.
const MAX_DEPTH: u32 = 8;

/// What is the matter with the daemon's start.
#[derive(Debug, thiserror::Error)]
#[error("{verb}: {cause}")]
struct StartError {
    verb: &'static str,
    cause: io::Error,
}

fn failed<E: Into<io::Error>>(verb: &'static str) -> impl FnOnce(E) -> StartError {
    move |cause| StartError {
        verb,
        cause: cause.into(),
    }
}

/// One connection's socket.
struct Socket {
    stream: UnixStream,
    /// Epoll watches it for room to write.
    waits: bool,
}

/// A short-lived child at work.
struct Child {
    pid: Pid,
    words: OwnedFd,
    key: Key,
    work: Work,
    log: PathBuf,
    log_offset: u64,
    program: String,
    private_pids: bool,
    memory_limit: Option<u64>,
}

/// The part of `config.json` that the shim itself needs.
#[derive(Deserialize)]
struct Config {
    linux: Option<Linux>,
}
#[derive(Deserialize)]
struct Linux {
    #[serde(default)]
    namespaces: Option<Vec<NamespaceEntry>>,
    resources: Option<Resources>,
}
#[derive(Deserialize)]
struct NamespaceEntry {
    #[serde(rename = "type")]
    kind: String,
    #[serde(default)]
    path: String,
}
#[derive(Deserialize)]
struct Resources {
    memory: Option<Memory>,
}
#[derive(Deserialize)]
struct Memory {
    limit: Option<i64>,
}

impl Config {
    fn read(bundle: &Path) -> Result<Self, String> {
        let path = bundle.join("config.json");
        let why = match read_file(&path, MAX_FILE) {
            Seen::Present(bytes) => match serde_json::from_slice(&bytes) {
                Ok(config) => return Ok(config),
                Err(e) => e.to_string(),
            },
            Seen::Absent => "does not exist".to_owned(),
            Seen::Unknown(why) => why,
        };
        Err(format!("read {}: {why}", path.display()))
    }

    /// A pid namespace of its own: it ends with the init.
    fn private_pids(&self) -> bool {
        self.linux
            .iter()
            .flat_map(|linux| linux.namespaces.iter().flatten())
            .any(|entry| entry.kind == "pid" && entry.path.is_empty())
    }

    fn memory_limit(&self) -> Option<u64> {
        let memory = self.linux.as_ref()?.resources.as_ref()?.memory.as_ref()?;
        u64::try_from(memory.limit?).ok().filter(|limit| *limit > 0)
    }
}

struct Shim {
    state: LoopState,
    inbox: VecDeque<Input>,
    epoll: Epoll,
    listener: Option<UnixListener>,
    sockets: BTreeMap<u64, Socket>,
    events: Option<UnixStream>,
    events_address: PathBuf,
    event_log: EventLog,
    journal: Journal,
    /// Said once per trouble, not once per write.
    journal_broken: bool,
    children: BTreeMap<JobId, Child>,
    stdio: Stdio,
    oom: BTreeMap<String, (u64, OomWatch)>,
    last_oom: u64,
    roots: Roots,
    log: Log,
    namespace: String,
    socket: PathBuf,
    beside: Beside,
    /// The listener is not watched until then.
    accept_at: Option<u64>,
    leave: bool,
}

fn now() -> Now {
    let mono_ms = clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(0, |time| {
        let ms = time.tv_sec().saturating_mul(1000) + time.tv_nsec() / 1_000_000;
        u64::try_from(ms).unwrap_or(0)
    });
    Now {
        mono_ms,
        wall: Timestamp::now(),
    }
}

/// Serves until containerd says that it may go, or a signal does. Returns when it has left.
pub fn run(args: ServeArgs) -> Result<(), Box<dyn Error>> {
    let ServeArgs {
        namespace,
        id,
        group,
        grpc_address,
        debug,
        bundle,
        socket,
        listener,
        lock,
        readiness,
    } = args;
    let log = Log::open(&bundle, debug);
    let begun = begin(
        namespace.as_str(),
        &group,
        &grpc_address,
        socket,
        listener,
        log,
    );
    let (mut shim, signals) = match begun {
        Ok(begun) => begun,
        Err(error) => {
            readiness.failed(&error.to_string());
            return Err(error.into());
        }
    };
    if let Err(e) = readiness.ready() {
        // `start` was killed meanwhile: containerd has forgotten this task, without `delete`, and
        // nobody would ever tell this daemon to go.
        remains::remove_group(&shim.socket);
        return Err(failed::<io::Error>("tell start")(e).into());
    }
    shim.log.say(Level::Info, &format!("shim of {id} serves"));
    let result = shim.serve(&signals);
    // Intentional ends are announced: a descriptor that somebody else keeps must not hide them.
    for socket in shim.sockets.values() {
        let _ = socket.stream.shutdown(Shutdown::Both);
    }
    // Held to the very end.
    drop(lock);
    result.map_err(Into::into)
}

fn begin(
    namespace: &str,
    group: &str,
    grpc_address: &str,
    socket: PathBuf,
    listener: UnixListener,
    log: Log,
) -> Result<(Shim, SignalFd), StartError> {
    set_child_subreaper(true).map_err(failed("become subreaper"))?;
    let mut mask = SigSet::empty();
    for signal in [Signal::SIGCHLD, Signal::SIGTERM, Signal::SIGINT] {
        mask.add(signal);
    }
    mask.thread_block().map_err(failed("block signals"))?;
    let flags = SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC;
    let signals = SignalFd::with_flags(&mask, flags).map_err(failed("make signal descriptor"))?;
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(failed("make epoll"))?;
    listener
        .set_nonblocking(true)
        .map_err(failed("set up listener"))?;
    let readable = |token| EpollEvent::new(EpollFlags::EPOLLIN, token);
    epoll
        .add(&listener, readable(LISTENER))
        .map_err(failed("watch listener"))?;
    epoll
        .add(&signals, readable(SIGNALS))
        .map_err(failed("watch signals"))?;

    let roots = Roots::default();
    let beside = Beside::of(&socket);
    let pid = std::process::id();
    let fixed = Fixed {
        boot_id: match read_text(&roots.proc.join("sys/kernel/random/boot_id"), 128) {
            Seen::Present(text) => text.trim().to_owned(),
            Seen::Absent | Seen::Unknown(_) => String::new(),
        },
        shim: record::Shim {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            process: record::Process {
                pid,
                start_time: reaper::start_time(Pid::this()),
            },
            exe: fs::read_link("/proc/self/exe")
                .map(|path| path.to_string_lossy().into_owned())
                .unwrap_or_default(),
            containerd_address: grpc_address.to_owned(),
            namespace: namespace.to_owned(),
            group_id: group.to_owned(),
            socket: socket.to_string_lossy().into_owned(),
            api_versions: vec![2, 3],
        },
        context: context::capture(&roots),
    };
    // 1.6 and later all give it; the rule by which containerd derives it is old and stable.
    let events_address = std::env::var("TTRPC_ADDRESS")
        .ok()
        .filter(|address| !address.is_empty())
        .unwrap_or_else(|| format!("{grpc_address}.ttrpc"));
    let events_address = events_address
        .strip_prefix("unix://")
        .map(str::to_owned)
        .unwrap_or(events_address);
    let mut shim = Shim {
        state: LoopState::new(namespace, pid),
        inbox: VecDeque::new(),
        epoll,
        listener: Some(listener),
        sockets: BTreeMap::new(),
        events: None,
        events_address: events_address.into(),
        event_log: EventLog::new(&beside.events),
        journal: Journal::new(&beside.record, fixed),
        journal_broken: false,
        children: BTreeMap::new(),
        stdio: Stdio::new(),
        oom: BTreeMap::new(),
        last_oom: OOM,
        roots,
        log,
        namespace: namespace.to_owned(),
        socket,
        beside,
        accept_at: None,
        leave: false,
    };
    shim.take_over_events().map_err(failed("write events"))?;
    shim.journal
        .write(&shim.state, &shim.stdio)
        .map_err(failed("write record"))?;
    shim.state.tasks.take_dirty();
    Ok((shim, signals))
}

impl Shim {
    /// What an earlier shim of this group could not send any more.
    fn take_over_events(&mut self) -> io::Result<()> {
        let kept = match event_log::read(&self.beside.events) {
            Seen::Present(kept) => kept,
            Seen::Absent => Vec::new(),
            Seen::Unknown(why) => {
                self.log
                    .say(Level::Warning, &format!("events of a predecessor: {why}"));
                Vec::new()
            }
        };
        self.event_log.reserve(EVENT_ROOM)?;
        for (number, echo, payload) in &kept {
            self.event_log.append(*number, *echo, payload)?;
        }
        self.state.outbox.restore(kept);
        Ok(())
    }

    fn serve(&mut self, signals: &SignalFd) -> Result<(), StartError> {
        self.handle(Input::Tick);
        let mut ready = [EpollEvent::empty(); 16];
        while !self.leave {
            let count = match self.epoll.wait(&mut ready, self.timeout()) {
                Ok(count) => count,
                Err(Errno::EINTR) => continue,
                Err(errno) => return Err(failed("wait")(errno)),
            };
            for event in ready.iter().take(count) {
                self.wake(event, signals);
            }
            let now = now().mono_ms;
            if self.stdio.deadline().is_some_and(|at| at <= now) {
                self.stdio.tick(now);
            }
            if self.state.deadline().is_some_and(|at| at <= now) {
                self.handle(Input::Tick);
            }
            if self.accept_at.is_some_and(|at| at <= now) {
                self.accept_at = None;
                if let Some(listener) = &self.listener {
                    let event = EpollEvent::new(EpollFlags::EPOLLIN, LISTENER);
                    // Fails only when it is watched already.
                    let _ = self.epoll.add(listener, event);
                }
            }
        }
        Ok(())
    }

    fn timeout(&self) -> EpollTimeout {
        let deadlines = [self.state.deadline(), self.stdio.deadline(), self.accept_at];
        let Some(at) = deadlines.into_iter().flatten().min() else {
            return EpollTimeout::NONE;
        };
        // One more: the clock is cut to milliseconds, and waking too early would spin.
        let ms = at.saturating_sub(now().mono_ms).saturating_add(1);
        EpollTimeout::try_from(ms.min(60_000)).unwrap_or(EpollTimeout::ZERO)
    }

    fn wake(&mut self, event: &EpollEvent, signals: &SignalFd) {
        match event.data() {
            LISTENER => self.accept(),
            SIGNALS => self.signalled(signals),
            EVENTS => self.events_ready(),
            token if token & OOM != 0 => self.oom_ready(token),
            token if token & CONNECTION != 0 => {
                self.connection_ready(token & !CONNECTION, event.events());
            }
            token if token & stdio::TOKEN != 0 => {
                let heard = self.stdio.ready(token, &self.epoll);
                self.hear(heard);
                self.work_off();
            }
            _ => {}
        }
    }

    // ---- inputs and outputs ----

    /// Takes an input, and those that come of it.
    fn handle(&mut self, input: Input) {
        self.inbox.push_back(input);
        self.work_off();
    }

    fn work_off(&mut self) {
        while let Some(input) = self.inbox.pop_front() {
            self.make_room(&input);
            let now = now();
            let outputs = self.step(input, now);
            for output in &outputs {
                if let Output::Log {
                    number,
                    echo,
                    payload,
                } = output
                    && let Err(e) = self.event_log.append(*number, *echo, payload)
                {
                    self.log.say(Level::Error, &format!("write events: {e}"));
                }
            }
            if self.state.tasks.take_dirty() {
                self.write_record();
            }
            for output in outputs {
                self.perform(output, now);
            }
            // Children and loggers have their pids only now.
            if self.state.tasks.take_dirty() {
                self.write_record();
            }
        }
        self.flush();
    }

    fn step(&mut self, input: Input, now: Now) -> Vec<Output> {
        #[cfg(feature = "trace")]
        trace(&input, now);
        self.state.step(input, now)
    }

    fn make_room(&mut self, input: &Input) {
        let Input::Bytes(connection, bytes) = input else {
            return;
        };
        let bytes = self.state.connections.unread(*connection) + bytes.len();
        let result = self.journal.reserve(bytes).and_then(|()| {
            let bytes = u64::try_from(bytes).unwrap_or(u64::MAX);
            self.event_log
                .reserve(bytes.saturating_mul(2).saturating_add(EVENT_ROOM))
        });
        self.state.no_room = result.err().map(|e| format!("make room for record: {e}"));
    }

    fn write_record(&mut self) {
        match self.journal.write(&self.state, &self.stdio) {
            Ok(()) => self.journal_broken = false,
            Err(e) => {
                // A workload is worth more than its record: go on, try again with the next change.
                if !self.journal_broken {
                    self.log.say(Level::Error, &format!("write record: {e}"));
                }
                self.journal_broken = true;
                self.state.tasks.still_dirty();
            }
        }
    }

    fn perform(&mut self, output: Output, now: Now) {
        match output {
            // Written above.
            Output::Log { .. } => {}
            Output::Effect(effect) => self.effect(effect, now),
            Output::Post(post) => self.post(post),
            Output::Close(connection, why) => {
                if let Some(why) = why {
                    self.log
                        .say(Level::Warning, &format!("close connection: {why}"));
                }
                // What is answered already still goes out.
                self.sockets.remove(&connection);
            }
            Output::Retire => self.retire(),
            Output::Exit => self.leave = true,
        }
    }

    /// Nobody finds us any more, and whoever begins anew under this name begins clean.
    fn retire(&mut self) {
        if let Some(listener) = self.listener.take() {
            let _ = self.epoll.delete(&listener);
        }
        let remove = |path: &Path| match fs::remove_file(path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
            _ => Ok(()),
        };
        // The lock goes last: until then nobody else may touch the others.
        let results = [
            remove(&self.socket),
            self.journal.remove(),
            remove(&self.beside.requests),
            self.event_log.remove(),
            remove(&self.beside.lock),
        ];
        for error in results.into_iter().filter_map(Result::err) {
            self.log
                .say(Level::Warning, &format!("remove own files: {error}"));
        }
    }

    fn effect(&mut self, effect: Effect, now: Now) {
        match effect {
            Effect::Spawn { job, key, work } => self.spawn(job, &key, &work),
            Effect::EndJob(job) => {
                if let Some(child) = self.children.get(&job) {
                    sys::kill_group(child.pid);
                }
            }
            Effect::PrepareExec { key, spec } => {
                let result = self.prepare_exec(&key, &spec);
                let event = Event::ExecPrepared { key, result };
                self.inbox.push_back(Input::Event(event));
            }
            Effect::Signal { process, signal } => self.signal(process, signal),
            Effect::WatchOom { id } => self.watch_oom(id),
            Effect::FinishStdio(key) => {
                let heard = self.stdio.finish(&key, &self.epoll);
                self.hear(heard);
            }
            Effect::CloseStdio(key) => {
                self.stdio.close(&key, now.mono_ms);
                self.remove_exec_files(&key);
            }
            Effect::CloseStdin(key) => {
                let heard = self.stdio.close_stdin(&key, &self.epoll);
                self.hear(heard);
            }
            Effect::Resize { key, width, height } => {
                if let Err(e) = self.stdio.resize(&key, width, height) {
                    self.log.say(Level::Warning, &format!("resize: {e}"));
                }
            }
            Effect::Pids { to, id } => {
                let pids = self.state.tasks.get(&id).map(|task| self.pids(task));
                let reply = Reply::Pids(pids.unwrap_or_default());
                self.inbox.push_back(Input::Reply(to, Ok(reply)));
            }
            Effect::Stats { to, id } => self.stats(to, &id),
            Effect::Forget { id } => {
                if let Some((_, watch)) = self.oom.remove(&id) {
                    let _ = self.epoll.delete(watch.as_fd());
                }
            }
            // Taken care of by the state.
            Effect::Reply { .. }
            | Effect::Publish(_)
            | Effect::Arm { .. }
            | Effect::Leave { .. } => {}
        }
    }

    fn hear(&mut self, heard: Vec<Heard>) {
        for heard in heard {
            match heard {
                Heard::Drained(key) => {
                    self.inbox.push_back(Input::Event(Event::Drained { key }));
                }
                Heard::Warning(text) => self.log.say(Level::Warning, &text),
            }
        }
    }

    // ---- short-lived children ----

    fn spawn(&mut self, job: JobId, key: &Key, work: &Work) {
        self.log.say(
            Level::Debug,
            &format!("{} {} {}", work.word(), key.id, key.exec_id),
        );
        match self.start_child(key, work) {
            Ok(child) => {
                self.state.tasks.started(job, process_of(child.pid));
                self.children.insert(job, child);
            }
            Err(text) => {
                let failure = Failure {
                    kind: FailureKind::Other,
                    text,
                };
                self.inbox.push_back(Input::Event(Event::JobEnded {
                    job,
                    outcome: Outcome::Failed(failure),
                }));
            }
        }
    }

    fn start_child(&mut self, key: &Key, work: &Work) -> Result<Child, String> {
        let task = self
            .state
            .tasks
            .get(&key.id)
            .ok_or_else(|| format!("task {} is gone", key.id))?;
        let bundle = Path::new(&task.bundle);
        let place = Place {
            bundle,
            namespace: &self.namespace,
            options: &task.options,
        };
        let rootfs = place.rootfs();
        let log = place.log(key);
        let log_offset = runc::log_length(&log);
        let mut plan = Plan {
            files: vec![ChildFile::Null, ChildFile::Words, ChildFile::Words],
            folder: bundle.to_owned(),
            steps: Vec::new(),
            to_the_end: false,
            argv: Vec::new(),
            env: None,
        };
        let mut private_pids = task.private_pids;
        let mut memory_limit = task.memory_limit;
        match work {
            Work::Create | Work::Exec => {
                if *work == Work::Create {
                    let config = Config::read(bundle)?;
                    private_pids = config.private_pids();
                    memory_limit = config.memory_limit();
                    task.options.write(bundle).map_err(|e| e.to_string())?;
                    if !task.rootfs.is_empty() {
                        plan.steps.push(Step::MakeFolder(rootfs.clone()));
                    }
                    let mounts = task.rootfs.iter().cloned();
                    plan.steps
                        .extend(mounts.map(|mount| Step::Mount(mount, rootfs.clone())));
                }
                let member = task
                    .member(&key.exec_id)
                    .ok_or_else(|| format!("exec {} is gone", key.exec_id))?;
                let wanted = Wanted {
                    key,
                    wish: &member.stdio,
                    stdin_closed: member.stdin_closed,
                    bundle,
                    namespace: &self.namespace,
                    owner: (task.options.io_uid, task.options.io_gid),
                    memory_limit,
                };
                let opened = self.stdio.open(&wanted, &self.epoll)?;
                if opened.wait_for_logger {
                    plan.steps.push(Step::LoggerReady(3));
                }
                plan.files = opened.files;
                plan.argv = place.argv(key, work, opened.console.as_deref());
            }
            Work::Update(resources) => {
                let stdin =
                    children::memory_file(resources).map_err(|e| format!("pass resources: {e}"))?;
                if let Some(first) = plan.files.first_mut() {
                    *first = ChildFile::Fd(stdin);
                }
                plan.argv = place.argv(key, work, None);
            }
            Work::Delete | Work::Cleanup => {
                plan.to_the_end = *work == Work::Cleanup;
                // The bundle may be gone.
                plan.folder = "/".into();
                plan.steps.push(Step::Run {
                    argv: place.argv(key, work, None),
                    log: log.clone(),
                });
                if !task.rootfs.is_empty() {
                    plan.steps.push(Step::Unmount(rootfs));
                }
            }
            Work::Start | Work::Pause | Work::Resume | Work::Kill { .. } => {
                plan.argv = place.argv(key, work, None);
            }
        }
        let program = task.options.binary().to_owned();
        let (pid, words) = children::spawn(plan).map_err(|e| format!("fork: {e}"))?;
        Ok(Child {
            pid,
            words,
            key: key.clone(),
            work: work.clone(),
            log,
            log_offset,
            program,
            private_pids,
            memory_limit,
        })
    }

    /// A short-lived child has ended; the kernel still knows it.
    fn child_ended(&mut self, job: JobId, status: u32) {
        let Some(child) = self.children.remove(&job) else {
            return;
        };
        let outcome = if status == 0 {
            Outcome::Done(self.report(&child))
        } else {
            let logged = runc::last_error(&child.log, child.log_offset);
            Outcome::Failed(children::failure(
                child.words,
                logged,
                &child.program,
                status,
            ))
        };
        if !child.key.is_init() {
            let _ = fs::remove_file(&child.log);
        }
        if matches!(child.work, Work::Create | Work::Exec) {
            let mut heard = Vec::new();
            self.stdio.receive(&child.key, &self.epoll, &mut heard);
            self.hear(heard);
        }
        self.handle(Input::Event(Event::JobEnded { job, outcome }));
    }

    fn report(&self, child: &Child) -> Report {
        let mut report = Report {
            private_pids: child.private_pids,
            memory_limit: child.memory_limit,
            ..Report::default()
        };
        if !matches!(child.work, Work::Create | Work::Exec) {
            return report;
        }
        let Some(task) = self.state.tasks.get(&child.key.id) else {
            return report;
        };
        let place = Place {
            bundle: Path::new(&task.bundle),
            namespace: &self.namespace,
            options: &task.options,
        };
        let pid = match read_text(&place.pid_file(&child.key), 32) {
            Seen::Present(text) => text.trim().parse::<i32>().ok().filter(|pid| *pid > 0),
            Seen::Absent | Seen::Unknown(_) => None,
        };
        if let Some(pid) = pid {
            report.process = Some(process_of(Pid::from_raw(pid)));
            if child.work == Work::Create {
                report.cgroup = match Cgroup::of(&self.roots, pid) {
                    Seen::Present(cgroup) => Some(cgroup),
                    Seen::Absent | Seen::Unknown(_) => None,
                };
            }
        }
        report
    }

    fn prepare_exec(&self, key: &Key, spec: &[u8]) -> Result<(), String> {
        let task = self
            .state
            .tasks
            .get(&key.id)
            .ok_or_else(|| format!("task {} is gone", key.id))?;
        let place = Place {
            bundle: Path::new(&task.bundle),
            namespace: &self.namespace,
            options: &task.options,
        };
        let path = place.process_file(key);
        let result = File::options()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .custom_flags((OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK).bits())
            .open(&path)
            .and_then(|mut file| file.write_all(spec));
        result.map_err(|e| {
            let _ = fs::remove_file(&path);
            format!("write {}: {e}", path.display())
        })
    }

    fn remove_exec_files(&self, key: &Key) {
        if key.is_init() {
            return;
        }
        if let Some(task) = self.state.tasks.get(&key.id) {
            let place = Place {
                bundle: Path::new(&task.bundle),
                namespace: &self.namespace,
                options: &task.options,
            };
            // Any of them may never have been there.
            for path in [place.process_file(key), place.pid_file(key), place.log(key)] {
                let _ = fs::remove_file(path);
            }
        }
    }

    /// Only to the process that we mean: its pidfd is taken first, then its start time compared.
    fn signal(&self, process: Process, signal: i32) {
        let Ok(pid) = i32::try_from(process.pid) else {
            return;
        };
        let result = sys::pidfd_open(pid).and_then(|pidfd| {
            let found = reaper::start_time(Pid::from_raw(pid));
            if process.start_time != 0 && found != process.start_time {
                return Err(io::Error::other("pid belongs to another process"));
            }
            sys::pidfd_signal(pidfd.as_fd(), signal)
        });
        if let Err(e) = result {
            self.log
                .say(Level::Warning, &format!("signal {pid} with {signal}: {e}"));
        }
    }

    // ---- exits ----

    fn signalled(&mut self, signals: &SignalFd) {
        while let Ok(Some(info)) = signals.read_signal() {
            let number = i32::try_from(info.ssi_signo).unwrap_or(0);
            if number == Signal::SIGTERM as i32 || number == Signal::SIGINT as i32 {
                self.log.say(Level::Info, "shim leaves on a signal");
                let now = now();
                for output in self.state.leave_now() {
                    self.perform(output, now);
                }
                return;
            }
        }
        self.reap();
    }

    fn reap(&mut self) {
        while let Some(exited) = reaper::peek(None) {
            // What a runtime command started comes to us when the command has ended: that end
            // comes first, it says whose the process is.
            let ended: Vec<(JobId, Pid, u32)> = self
                .children
                .iter()
                .filter_map(|(job, child)| {
                    let seen = reaper::peek(Some(child.pid))?;
                    Some((*job, child.pid, seen.status))
                })
                .collect();
            if !ended.is_empty() {
                for (job, pid, status) in ended {
                    self.child_ended(job, status);
                    reaper::collect(pid);
                }
                continue;
            }
            let mut heard = Vec::new();
            if self
                .stdio
                .logger_exited(exited.pid, &self.epoll, &mut heard)
            {
                reaper::collect(exited.pid);
                self.hear(heard);
                self.work_off();
                continue;
            }
            let pid = u32::try_from(exited.pid.as_raw()).unwrap_or(0);
            // The exit may be seen before what caused it.
            let id = self
                .state
                .tasks
                .iter()
                .find(|(_, task)| task.init.process.is_some_and(|p| p.pid == pid))
                .map(|(id, _)| id.clone());
            if let Some(id) = id {
                self.look_for_oom(&id);
            }
            self.handle(Input::Event(Event::Exited {
                pid,
                status: exited.status,
            }));
            reaper::collect(exited.pid);
        }
    }

    // ---- out of memory ----

    fn watch_oom(&mut self, id: String) {
        let Some(cgroup) = self
            .state
            .tasks
            .get(&id)
            .and_then(|task| task.cgroup.as_ref())
        else {
            return;
        };
        let watch = match OomWatch::new(cgroup, None) {
            Ok(watch) => watch,
            Err(e) => {
                self.log.say(Level::Warning, &format!("{id}: {e}"));
                return;
            }
        };
        self.last_oom += 1;
        let token = self.last_oom;
        match self
            .epoll
            .add(watch.as_fd(), EpollEvent::new(EpollFlags::EPOLLIN, token))
        {
            Ok(()) => {
                self.oom.insert(id, (token, watch));
            }
            Err(e) => self.log.say(Level::Warning, &format!("watch for OOM: {e}")),
        }
    }

    fn oom_ready(&mut self, token: u64) {
        let id = self
            .oom
            .iter()
            .find(|(_, (other, _))| *other == token)
            .map(|(id, _)| id.clone());
        if let Some(id) = id {
            self.look_for_oom(&id);
        }
    }

    fn look_for_oom(&mut self, id: &str) {
        let kills = self.oom.get_mut(id).map_or(0, |(_, watch)| watch.read());
        if kills > 0 {
            let event = Event::Oom { id: id.to_owned() };
            self.handle(Input::Event(event));
        }
    }

    // ---- looks at the host ----

    fn pids(&self, task: &Task) -> Vec<(u32, String)> {
        let mut pids = Vec::new();
        if let Some(folder) = task.cgroup.as_ref().and_then(Cgroup::any_folder) {
            collect_pids(folder, MAX_DEPTH, &mut pids);
        }
        let init = task.init.process.map(|process| process.pid);
        if pids.is_empty() {
            pids.extend(init);
        }
        let exec_of = |pid: u32| {
            let has = |exec: &crate::tasks::Exec| {
                exec.member.exit.is_none() && exec.member.process.is_some_and(|p| p.pid == pid)
            };
            let found = task.execs.iter().find(|(_, exec)| has(exec));
            found.map(|(id, _)| id.clone()).unwrap_or_default()
        };
        pids.into_iter().map(|pid| (pid, exec_of(pid))).collect()
    }

    fn stats(&mut self, to: Caller, id: &str) {
        let cgroup = self
            .state
            .tasks
            .get(id)
            .and_then(|task| task.cgroup.as_ref());
        let seen = cgroup.map_or(Seen::Absent, |cgroup| stats::read(&self.roots, cgroup));
        let reply = match seen {
            Seen::Present(any) => Ok(Reply::Stats(any.type_url, any.value)),
            Seen::Absent => Err(Refusal::not_found("cgroup does not exist")),
            Seen::Unknown(why) => Err(Refusal::unknown(why)),
        };
        self.inbox.push_back(Input::Reply(to, reply));
    }

    // ---- connections ----

    fn accept(&mut self) {
        while let Some(listener) = &self.listener {
            let stream = match listener.accept() {
                Ok((stream, _)) => stream,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                Err(e) => {
                    // Out of descriptors or memory: the backlog would wake us again at once.
                    self.log.say(Level::Warning, &format!("accept: {e}"));
                    let _ = self.epoll.delete(listener);
                    self.accept_at = Some(now().mono_ms.saturating_add(ACCEPT_PAUSE_MS));
                    return;
                }
            };
            let peer = getsockopt(&stream, sockopt::PeerCredentials);
            if !peer.is_ok_and(|peer| peer.uid() == geteuid().as_raw()) {
                self.log
                    .say(Level::Warning, "refuse a connection of another user");
                continue;
            }
            if let Err(e) = stream.set_nonblocking(true) {
                self.log.say(Level::Warning, &format!("accept: {e}"));
                continue;
            }
            self.handle(Input::Accepted);
            let number = self.state.connections.last();
            let event = EpollEvent::new(EpollFlags::EPOLLIN, number | CONNECTION);
            match self.epoll.add(&stream, event) {
                Ok(()) => {
                    let socket = Socket {
                        stream,
                        waits: false,
                    };
                    self.sockets.insert(number, socket);
                }
                Err(_) => self.handle(Input::Closed(number)),
            }
        }
    }

    fn connection_ready(&mut self, number: u64, events: EpollFlags) {
        if events.contains(EpollFlags::EPOLLOUT) {
            self.flush();
        }
        for _ in 0..READS {
            let mut buffer = [0; READ];
            let Some(socket) = self.sockets.get_mut(&number) else {
                return;
            };
            match socket.stream.read(&mut buffer) {
                Ok(count) if count > 0 => {
                    let bytes = buffer.get(..count).unwrap_or_default().to_vec();
                    self.handle(Input::Bytes(number, bytes));
                    if count < READ {
                        return;
                    }
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Ok(_) | Err(_) => return self.handle(Input::Closed(number)),
            }
        }
    }

    /// Writes what is unsent, as far as the peers take it.
    fn flush(&mut self) {
        for number in self.state.connections.numbers() {
            let unsent = self.state.connections.unsent(number);
            let Some(socket) = self.sockets.get_mut(&number) else {
                continue;
            };
            if unsent.is_empty() && !socket.waits {
                continue;
            }
            let total = unsent.len();
            let mut sent = 0;
            let mut broken = false;
            while let Some(rest) = unsent.get(sent..).filter(|rest| !rest.is_empty()) {
                match socket.stream.write(rest) {
                    Ok(count) => sent += count,
                    Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                    Err(_) => {
                        broken = true;
                        break;
                    }
                }
            }
            let waits = sent < total && !broken;
            if waits != socket.waits {
                socket.waits = waits;
                let mut flags = EpollFlags::EPOLLIN;
                flags.set(EpollFlags::EPOLLOUT, waits);
                let mut event = EpollEvent::new(flags, number | CONNECTION);
                broken |= self.epoll.modify(&socket.stream, &mut event).is_err();
            }
            let now = now();
            let input = if broken {
                Input::Closed(number)
            } else {
                Input::Sent(number, sent)
            };
            for output in self.step(input, now) {
                self.perform(output, now);
            }
        }
    }

    // ---- containerd's event service ----

    fn post(&mut self, post: Post) {
        match post {
            Post::Open => {
                let input = match self.connect_events() {
                    Ok(stream) => {
                        self.events = Some(stream);
                        Input::EventsOpened
                    }
                    Err(e) => {
                        Input::EventsLost(format!("connect {}: {e}", self.events_address.display()))
                    }
                };
                self.inbox.push_back(input);
            }
            Post::Send(bytes) => {
                let written = self.events.as_mut().map(|stream| stream.write(&bytes));
                // An event is a few hundred bytes: a service that does not take it whole has been
                // stuck for long.
                if !matches!(written, Some(Ok(count)) if count == bytes.len()) {
                    self.events = None;
                    let why = "event service takes nothing".to_owned();
                    self.inbox.push_back(Input::EventsLost(why));
                }
            }
            Post::Close => self.events = None,
            Post::Acknowledged(number) => {
                if let Err(e) = self.event_log.acknowledge(number) {
                    self.log.say(Level::Error, &format!("write events: {e}"));
                }
            }
            Post::Say(text) => self.log.say(Level::Warning, &text),
        }
    }

    fn connect_events(&self) -> io::Result<UnixStream> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let fd = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
        let address = UnixAddr::new(&self.events_address)?;
        connect(std::os::fd::AsRawFd::as_raw_fd(&fd), &address)?;
        let stream = UnixStream::from(fd);
        self.epoll
            .add(&stream, EpollEvent::new(EpollFlags::EPOLLIN, EVENTS))?;
        Ok(stream)
    }

    fn events_ready(&mut self) {
        loop {
            let mut buffer = [0; 512];
            let Some(stream) = &mut self.events else {
                return;
            };
            match stream.read(&mut buffer) {
                Ok(count) if count > 0 => {
                    let bytes = buffer.get(..count).unwrap_or_default().to_vec();
                    self.handle(Input::EventsBytes(bytes));
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Ok(_) | Err(_) => {
                    self.events = None;
                    let why = "event service closed the connection".to_owned();
                    return self.handle(Input::EventsLost(why));
                }
            }
        }
    }
}

fn process_of(pid: Pid) -> Process {
    Process {
        // A pid is positive.
        pid: u32::try_from(pid.as_raw()).unwrap_or(0),
        start_time: reaper::start_time(pid),
    }
}

/// See the feature in Cargo.toml.
#[cfg(feature = "trace")]
fn trace(input: &Input, now: Now) {
    if let Some(path) = std::env::var_os("RECOVERD_SHIM_TRACE")
        && let Ok(mut file) = File::options().append(true).create(true).open(path)
        && let Ok(line) = serde_json::to_string(&(input, now))
    {
        let _ = writeln!(file, "{line}");
    }
}

/// The pids in `folder` and below: a container may make groups of its own.
fn collect_pids(folder: &Path, depth: u32, pids: &mut Vec<u32>) {
    if let Seen::Present(found) = read_procs(folder) {
        pids.extend(found.into_iter().filter_map(|pid| u32::try_from(pid).ok()));
    }
    if depth == 0 {
        return;
    }
    let Ok(entries) = fs::read_dir(folder) else {
        return;
    };
    for entry in entries.flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            collect_pids(&entry.path(), depth - 1, pids);
        }
    }
}

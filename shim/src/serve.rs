//! The daemon: one thread around epoll. It owns every descriptor and no policy; what is decided
//! is decided in `state`, which it tells what happened and whose outputs it performs.
//!
//! For each input, in this order: events into their log, the record, the effects, the answers.
//! Whoever dies between two of them has told nobody anything that is not written down.

mod adopted;
mod effects;
mod exits;
mod looks;
mod resumed;
mod sockets;
mod tell;
mod upgrade;

use std::{
    collections::{BTreeMap, VecDeque},
    error::Error,
    fs, io,
    net::Shutdown,
    os::{
        fd::AsRawFd,
        unix::net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    sys::{
        epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout},
        prctl::set_child_subreaper,
        signal::{SigSet, Signal},
        signalfd::{SfdFlags, SignalFd},
    },
    time::{ClockId, clock_gettime},
    unistd::Pid,
};
use recoverd_common::{
    cgroup::Roots, failpoint, paths::Beside, read::read_text, record, seen::Seen,
    timestamp::Timestamp,
};

use crate::{
    context, event_log,
    event_log::EventLog,
    info,
    journal::{Fixed, Journal},
    lock::{self, Attempt},
    log::{Level, Log},
    oom::OomWatch,
    reaper,
    remains::{self, Unsent},
    requests::Requests,
    serve_args::ServeArgs,
    service::Reply,
    state::{Input, LoopState, Output},
    stdio::{self, Heard, Stdio},
    supervised::Supervised,
    sys,
    tasks::{Effect, Event, JobId, Now},
    witness::Teller,
};
pub use adopted::{Witness, adopt_and_serve};
pub use effects::Child;
use sockets::Socket;
pub use tell::tell;
use upgrade::Trial;
pub use upgrade::{check, go_on};

const LISTENER: u64 = 1;
const SIGNALS: u64 = 2;
const EVENTS: u64 = 3;
const TELLER: u64 = 4;
/// Connections, by their number.
const CONNECTION: u64 = 1 << 61;
/// Processes that are not our children, by a count.
const WITNESS: u64 = 1 << 59;
/// OOM watches, by a count.
const OOM: u64 = 1 << 62;

/// Read at once from a connection, bytes: requests are mostly shorter.
const READ: usize = 4096;
/// Reads of one connection, then others have their turn.
const READS: u32 = 16;
/// Room kept in the log of events for each request that adds a task or an exec, bytes: its events
/// are below one KiB each, but for the mounts and paths that came with the request.
const EVENT_ROOM: u64 = 8192;
/// Room that each task and exec is owed there, bytes: exit, OOM, delete.
const EVENTS_OF_ONE: u64 = 512;
/// No request takes more room than this in the record, bytes, but for one with giant mount options.
const MAX_OWED: usize = 64 << 10;
/// After so long without anything to do, milliseconds, memory is given back: most shims have
/// nothing to do for days, and what is needed again costs some ten page faults.
const QUIET_MS: u64 = 100;
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

struct Shim {
    state: LoopState,
    inbox: VecDeque<Input>,
    epoll: Epoll,
    listener: Option<UnixListener>,
    sockets: BTreeMap<u64, Socket>,
    events: Option<UnixStream>,
    /// Of the event under way.
    events_unsent: Vec<u8>,
    events_address: PathBuf,
    event_log: EventLog,
    journal: Journal,
    /// Said once per trouble, not once per write.
    journal_broken: bool,
    requests: Requests,
    requests_broken: bool,
    children: BTreeMap<JobId, Child>,
    /// An exited process that is collected when its exit is recorded.
    uncollected: Option<Pid>,
    stdio: Stdio,
    supervised: Supervised,
    oom: BTreeMap<String, (u64, OomWatch)>,
    last_oom: u64,
    witnesses: BTreeMap<u64, Witness>,
    last_witness: u64,
    /// Who tells how those ended.
    teller: Teller,
    roots: Roots,
    log: Log,
    namespace: String,
    socket: PathBuf,
    beside: Beside,
    /// The listener is not watched until then.
    accept_at: Option<u64>,
    /// Memory is given back then, when nothing happens until then.
    trim_at: Option<u64>,
    /// Somebody else may be responsible for what is at our paths.
    retired: bool,
    leave: bool,
    /// A new executable that is being tried.
    trial: Option<Trial>,
    /// Held to the very end.
    lock: Option<fs::File>,
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
    let (shim, signals) = match begun {
        Ok(begun) => begun,
        Err(error) => {
            readiness.failed(&error.to_string());
            return Err(error.into());
        }
    };
    failpoint!("daemon.ready.before");
    if let Err(e) = readiness.ready() {
        // `start` was killed meanwhile: containerd has forgotten this task, without `delete`, and
        // nobody would ever tell this daemon to go.
        remains::remove_group(&shim.socket, Unsent::Keep);
        return Err(failed::<io::Error>("tell start")(e).into());
    }
    failpoint!("daemon.ready.after");
    shim.log.say(Level::Info, &format!("shim of {id} serves"));
    shim.run(&signals, lock)
}

fn begin(
    namespace: &str,
    group: &str,
    grpc_address: &str,
    socket: PathBuf,
    listener: UnixListener,
    log: Log,
) -> Result<(Shim, SignalFd), StartError> {
    let (mut shim, signals) = prepare(namespace, group, grpc_address, socket, log)?;
    shim.listen(listener)?;
    failpoint!("daemon.events.before");
    shim.take_over_events().map_err(failed("write events"))?;
    failpoint!("daemon.events.after");
    let begun = shim.requests.begin();
    shim.noted(begun);
    shim.journal
        .write(&shim.state, &shim.stdio)
        .map_err(failed("write record"))?;
    failpoint!("daemon.record.after");
    shim.state.tasks.take_dirty();
    Ok((shim, signals))
}

/// Everything but what others can see.
fn prepare(
    namespace: &str,
    group: &str,
    grpc_address: &str,
    socket: PathBuf,
    log: Log,
) -> Result<(Shim, SignalFd), StartError> {
    set_child_subreaper(true).map_err(failed("become subreaper"))?;
    let mut mask = SigSet::empty();
    for signal in [
        Signal::SIGCHLD,
        Signal::SIGTERM,
        Signal::SIGINT,
        Signal::SIGUSR1,
        Signal::SIGHUP,
    ] {
        mask.add(signal);
    }
    mask.thread_block().map_err(failed("block signals"))?;
    let flags = SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC;
    let signals = SignalFd::with_flags(&mask, flags).map_err(failed("make signal descriptor"))?;
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(failed("make epoll"))?;
    epoll
        .add(&signals, EpollEvent::new(EpollFlags::EPOLLIN, SIGNALS))
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
            version: info::VERSION_NUMBER.to_owned(),
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
    let supervised = Supervised::new(&socket, fixed.shim.process);
    let shim = Shim {
        state: LoopState::new(namespace, pid),
        inbox: VecDeque::new(),
        uncollected: None,
        epoll,
        listener: None,
        sockets: BTreeMap::new(),
        events: None,
        events_unsent: Vec::new(),
        events_address: events_address.into(),
        event_log: EventLog::new(&beside.events),
        journal: Journal::new(&beside.record, fixed),
        journal_broken: false,
        requests: Requests::new(&beside.requests),
        requests_broken: false,
        children: BTreeMap::new(),
        stdio: Stdio::new(),
        supervised,
        oom: BTreeMap::new(),
        last_oom: OOM,
        witnesses: BTreeMap::new(),
        last_witness: WITNESS,
        teller: Teller::default(),
        roots,
        log,
        namespace: namespace.to_owned(),
        socket,
        beside,
        accept_at: None,
        trim_at: None,
        retired: false,
        leave: false,
        trial: None,
        lock: None,
    };
    Ok((shim, signals))
}

impl Shim {
    fn listen(&mut self, listener: UnixListener) -> Result<(), StartError> {
        listener
            .set_nonblocking(true)
            .map_err(failed("set up listener"))?;
        let event = EpollEvent::new(EpollFlags::EPOLLIN, LISTENER);
        self.epoll
            .add(&listener, event)
            .map_err(failed("watch listener"))?;
        self.listener = Some(listener);
        Ok(())
    }

    /// Serves; returns when it has left.
    fn run(mut self, signals: &SignalFd, lock: fs::File) -> Result<(), Box<dyn Error>> {
        self.lock = Some(lock);
        let result = self.serve(signals);
        if result.is_ok() {
            self.stdio.end_all_holders();
        }
        // Intentional ends are announced: a descriptor that somebody else keeps must not hide
        // them.
        for socket in self.sockets.values() {
            let _ = socket.stream.shutdown(Shutdown::Both);
        }
        if let Some(listener) = &self.listener {
            announce_end(listener);
        }
        result.map_err(Into::into)
    }

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
        self.event_log.take_over(&kept, EVENT_ROOM)?;
        self.state.outbox.restore(kept);
        Ok(())
    }

    fn serve(&mut self, signals: &SignalFd) -> Result<(), StartError> {
        self.handle(Input::Tick);
        let mut ready = [EpollEvent::empty(); 16];
        let mut trim = false;
        while !self.leave {
            let timeout = self.timeout();
            if std::mem::take(&mut trim) {
                // Right before the wait: whatever runs in between is mapped again.
                sys::trim();
            }
            let count = match self.epoll.wait(&mut ready, timeout) {
                Ok(count) => count,
                Err(Errno::EINTR) => continue,
                Err(errno) => return Err(failed("wait")(errno)),
            };
            for event in ready.iter().take(count) {
                self.wake(event, signals);
            }
            self.upgrade_if_due();
            let now = now().mono_ms;
            let mut worked = count > 0;
            if self.stdio.deadline().is_some_and(|at| at <= now) {
                self.stdio.tick(now);
                self.hold_outputs();
                worked = true;
            }
            if self.state.deadline().is_some_and(|at| at <= now) {
                self.handle(Input::Tick);
                worked = true;
            }
            if self.teller_deadline().is_some_and(|at| at <= now) {
                self.ask_teller();
                worked = true;
            }
            if worked {
                self.trim_at = Some(now.saturating_add(QUIET_MS));
            } else if self.trim_at.is_some_and(|at| at <= now) {
                self.trim_at = None;
                trim = true;
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
        let deadlines = [
            self.state.deadline(),
            self.stdio.deadline(),
            self.teller_deadline(),
            self.accept_at,
            self.trim_at,
            self.trial.as_ref().map(Trial::deadline),
        ];
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
            EVENTS => {
                self.send_events();
                self.events_ready();
                self.work_off();
            }
            TELLER => self.told(),
            token if token & OOM != 0 => self.oom_ready(token),
            token if token & WITNESS != 0 => self.witnessed(token),
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
            let read = match &input {
                Input::Bytes(number, bytes) => Some((*number, bytes.len())),
                _ => None,
            };
            let exited = self.uncollected.take_if(|child| {
                let pid = u32::try_from(child.as_raw()).ok();
                matches!(&input, Input::Event(Event::Exited { pid: of, .. }) if pid == Some(*of))
            });
            let outputs = self.step(input, now);
            failpoint!("serve.events.before");
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
            failpoint!("serve.requests.before");
            if let Some((number, _)) = read {
                self.note_half_read(number);
            }
            self.note(&outputs);
            failpoint!("serve.record.before");
            if self.state.tasks.take_dirty() {
                self.write_record();
            }
            // Recorded, so that the kernel may forget it; and not told, so that nobody who hears of
            // the end finds the process.
            if let Some(child) = exited {
                reaper::collect(child);
                failpoint!("serve.reap.after");
            }
            failpoint!("serve.consume.before");
            if let Some((number, count)) = read {
                self.consume(number, count);
            }
            failpoint!("serve.effects.before");
            for output in outputs {
                self.perform(output, now);
            }
            failpoint!("serve.effects.after");
            // Children and loggers have their pids only now.
            if self.state.tasks.take_dirty() {
                self.write_record();
            }
            self.let_go();
        }
        self.hold_outputs();
        self.tell_supervisor();
        failpoint!("serve.answer.before");
        self.flush();
        failpoint!("serve.answer.after");
        // Writing may have ended a connection, and that may have been news.
        if !self.inbox.is_empty() {
            self.work_off();
        }
    }

    /// Writes down what has become of requests, before anything else does of it.
    fn note(&mut self, outputs: &[Output]) {
        for output in outputs {
            if let Output::Note(note) = output {
                let result = self.requests.note(note);
                self.noted(result);
            }
        }
    }

    fn note_half_read(&mut self, number: u64) {
        let result = if self.state.connections.is_half_read(number) {
            self.requests.begun(number)
        } else {
            self.requests.whole(number)
        };
        self.noted(result);
    }

    fn noted(&mut self, result: io::Result<()>) {
        match result {
            Ok(()) => self.requests_broken = false,
            // Served all the same; said once per trouble.
            Err(e) if !self.requests_broken => {
                self.log.say(Level::Error, &format!("write requests: {e}"));
                self.requests_broken = true;
            }
            Err(_) => {}
        }
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
        let bytes = self.state.connections.complete(*connection, bytes);
        if bytes == 0 {
            return;
        }
        // What an exec's process takes is in a file of its own.
        let bytes = bytes.min(MAX_OWED);
        let others = self.owed_events();
        let result = self.journal.reserve(bytes, &self.state).and_then(|()| {
            let bytes = u64::try_from(bytes).unwrap_or(u64::MAX).saturating_mul(2);
            self.event_log
                .reserve(bytes.saturating_add(EVENT_ROOM).saturating_add(others))
        });
        self.state.no_room = result.err().map(|e| format!("make room for record: {e}"));
    }

    /// Bytes of the log of events that the tasks and execs there are still owed.
    fn owed_events(&self) -> u64 {
        let living = u64::try_from(self.state.tasks.living()).unwrap_or(u64::MAX);
        living.saturating_mul(EVENTS_OF_ONE)
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
            Output::Log { .. } | Output::Note(_) => {}
            Output::Effect(effect) => self.effect(effect, now),
            Output::Post(post) => self.post(post),
            Output::Upgrade(executable) => self.try_executable(executable.into()),
            Output::Say(text) => self.log.say(Level::Warning, &text),
            Output::Close(connection, why) => {
                if let Some(why) = why {
                    self.log
                        .say(Level::Warning, &format!("close connection: {why}"));
                }
                if let Some(socket) = self.sockets.remove(&connection) {
                    // A descriptor that somebody else keeps must not hide the end.
                    let _ = socket.stream.shutdown(Shutdown::Both);
                }
            }
            Output::Retire => self.retire(),
            Output::Exit => {
                self.leave = true;
                if self.retired && self.state.outbox.is_empty() {
                    self.remove_sent_events();
                }
            }
        }
    }

    /// Nobody finds us any more, and whoever begins anew under this name begins clean, but for
    /// events that are not acknowledged: we go on sending them, and should we die at it, or a new
    /// shim of the group come, they are where it looks for them.
    fn retire(&mut self) {
        self.retired = true;
        if let Some(listener) = self.listener.take() {
            let _ = self.epoll.delete(&listener);
            announce_end(&listener);
        }
        let remove = |path: &Path| match fs::remove_file(path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
            _ => Ok(()),
        };
        failpoint!("retire.events.before");
        let events = if self.state.outbox.is_empty() {
            self.event_log.remove()
        } else {
            self.event_log.stay()
        };
        // The lock goes last: until then nobody else may touch the others.
        failpoint!("retire.socket.before");
        let socket = remove(&self.socket);
        failpoint!("retire.record.before");
        let record = self.journal.remove();
        failpoint!("retire.requests.before");
        let requests = remove(&self.beside.requests);
        failpoint!("retire.lock.before");
        // Of adopters and takers-over that died half-way.
        let left = remove(&self.beside.next_lock).and(remove(&self.beside.begun_events));
        let lock = remove(&self.beside.lock);
        failpoint!("retire.lock.after");
        let results = [socket, record, requests, events, left, lock];
        for error in results.into_iter().filter_map(Result::err) {
            self.log
                .say(Level::Warning, &format!("remove own files: {error}"));
        }
    }

    /// The last events of a shim that had retired are acknowledged: their log is of no use any more.
    fn remove_sent_events(&self) {
        failpoint!("retire.sent.before");
        // Held by a new shim of the group: it has taken the log over, empty or not.
        let Ok(Attempt::Taken(_lock)) = lock::attempt(&self.beside.lock) else {
            return;
        };
        if self.event_log.is_in_place() {
            let _ = self.event_log.remove();
        }
        failpoint!("retire.sent.between");
        let _ = fs::remove_file(&self.beside.lock);
    }

    fn effect(&mut self, effect: Effect, now: Now) {
        match effect {
            Effect::Spawn { job, key, work } => self.spawn(job, &key, &work),
            Effect::EndJob(job) => {
                if let Some(child) = self.children.get(&job) {
                    self.end_child(child.pid);
                }
            }
            Effect::PrepareExec { key, spec } => {
                let result = self.prepare_exec(&key, &spec);
                let event = Event::ExecPrepared { key, result };
                self.inbox.push_back(Input::Event(event));
            }
            Effect::Signal { process, signal } => self.signal(process, signal),
            Effect::WatchOom { id, already } => self.watch_oom(id, already),
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
                if let Some((_, watch)) = self.oom.remove(&id)
                    && let Ok((fd, _)) = watch.waker()
                {
                    let _ = self.epoll.delete(fd);
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
}

/// Nobody may connect to a listener that has no process behind it any more, whoever else keeps it.
fn announce_end(listener: &UnixListener) {
    let both = nix::sys::socket::Shutdown::Both;
    // Fails on nothing that is a socket.
    let _ = nix::sys::socket::shutdown(listener.as_raw_fd(), both);
}

/// See the feature in Cargo.toml.
#[cfg(feature = "trace")]
fn trace(input: &Input, now: Now) {
    if let Some(path) = std::env::var_os("RECOVERD_SHIM_TRACE")
        && let Ok(mut file) = fs::File::options().append(true).create(true).open(path)
        && let Ok(line) = serde_json::to_string(&(input, now))
    {
        let _ = io::Write::write_all(&mut file, (line + "\n").as_bytes());
    }
}

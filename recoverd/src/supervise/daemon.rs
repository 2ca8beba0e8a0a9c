//! The loop: it owns every descriptor, tells `decide` what happened and performs what comes of it.
//! No policy.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fs, io,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::fs::PermissionsExt,
    },
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use nix::sys::{
    epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout},
    socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, accept4, bind, listen, socket},
};
use notify::Watcher;
use recoverd_common::{
    adoption::Adoption,
    handoff,
    paths::TASK_PLUGIN,
    proc::{Proc, ProcessId},
    record::Process,
    seen::Seen,
    supervision::{self, Answer, Link, MAX_FILES, Named, Packet, Word},
    sys,
    timestamp::Timestamp,
    witness,
};
use sd_notify::NotifyState;
use serde_json::Map;
use tokio::{
    net::{TcpListener, UnixListener},
    signal::unix::{SignalKind, signal},
    sync::{Semaphore, mpsc},
    task::JoinSet,
    time::sleep_until,
};

use super::{
    bag::{Bag, CONNECTION, Kept},
    catch::{self, Of},
    decide::{Follows, How, Input, Kind, Member, Output, Sighting, State, Tried},
    look::{self, Found, Place, Version},
    metrics::Metrics,
    serve_metrics, store,
};
use crate::{
    adopt::{self, How as HowToAdopt, Order, Outcome, Verdict},
    commands::adopt as told,
    history::{Event, History},
    observe::{self, Plan},
    witnessed::{self, Death, SeenExit, Witnessed},
};

const LISTENER: u64 = 1;
/// Tokens of peers, of what is kept, and, without a bit, of processes.
const PEER: u64 = 1 << 61;
const KEPT: u64 = 1 << 62;
/// The whole node is looked at this often, whatever hints come.
const LOOK: Duration = Duration::from_secs(30);
/// And this often without hints.
const LOOK_BLIND: Duration = Duration::from_secs(3);
/// Everything that was missed in living shims is caught up with this often.
const CATCH_UP: Duration = Duration::from_secs(600);
/// Which containerds there are changes seldom, and asking takes a walk over all processes.
const INSTANCES: Duration = Duration::from_secs(300);
/// Several changes of one record within this time are one.
const SETTLE: Duration = Duration::from_millis(5);
/// Between two looks at a bundle that is on its way: at first, at most.
const AGAIN: (Duration, Duration) = (Duration::from_millis(100), LOOK);
/// Bundles that are asked about at the same time.
const ASKED_AT_ONCE: usize = 8;
/// Successors that are started at the same time.
const RESUMED_AT_ONCE: usize = 16;
/// Metrics go into their file this often.
const TEXTFILE: Duration = Duration::from_secs(15);
/// At a stop, successors on their way have this long.
const STOP: Duration = Duration::from_secs(5);

/// What the daemon is told at its start.
#[derive(Debug)]
pub struct Setup {
    /// Where to look.
    pub plan: Plan,
    /// Our own runtime files.
    pub run_dir: PathBuf,
    /// What recoverd did.
    pub history: PathBuf,
    /// The shim that adopts.
    pub binary: PathBuf,
    /// For one successor.
    pub deadline: Duration,
    /// Metrics on loopback.
    pub metrics_tcp: Option<std::net::SocketAddr>,
    /// Metrics in a file.
    pub textfile: Option<PathBuf>,
}

/// A process that is watched for its end.
#[derive(Debug)]
struct Watch {
    socket: PathBuf,
    /// None: it is a shim.
    member: Option<Member>,
    process: Process,
    pidfd: OwnedFd,
}

/// Somebody who has connected.
#[derive(Debug)]
struct Peer {
    link: Link,
    /// A shim that has said who it is.
    socket: Option<PathBuf>,
}

/// How far a bundle is.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Standing {
    /// Looked at right now.
    Asked(u32),
    /// To be looked at again; after how many looks.
    Waits(Instant, u32),
    /// A task of the stock shim at this socket.
    Task(PathBuf),
    /// Our shim's, or nothing that is watched.
    Settled,
}

/// What a try has brought.
struct TryEnded {
    socket: PathBuf,
    outcome: Outcome,
    died: Instant,
}

struct Daemon {
    setup: Setup,
    proc: Proc,
    began: Instant,
    state: State,
    bag: Bag,
    witnessed: Witnessed,
    dirty: bool,
    metrics: Metrics,
    history: History,
    epoll: Epoll,
    listener: OwnedFd,
    watches: HashMap<u64, Watch>,
    tokens: HashMap<(u32, u64, bool), u64>,
    peers: HashMap<u64, Peer>,
    last: u64,
    versions: BTreeMap<PathBuf, Version>,
    places: BTreeMap<Place, Standing>,
    /// Records that may have changed, and when they are read.
    changed: BTreeMap<PathBuf, Instant>,
    /// Shims that are looked into again, and when.
    missed: BTreeMap<PathBuf, Instant>,
    states: BTreeSet<PathBuf>,
    instances_at: Instant,
    look_at: Instant,
    catch_up_at: Instant,
    watcher: Option<notify::RecommendedWatcher>,
    watched: BTreeSet<PathBuf>,
    tries: JoinSet<TryEnded>,
    places_to_try: Arc<Semaphore>,
    bundles: JoinSet<(Place, Found)>,
    ends: BTreeMap<PathBuf, Instant>,
    inbox: Vec<Input>,
}

/// Runs until it is asked to stop.
pub async fn run(setup: Setup) -> io::Result<()> {
    let hints = mpsc::unbounded_channel();
    let (mut daemon, mut hints) = Daemon::new(setup, hints)?;
    let poll = crate::sys::awaited(daemon.epoll.0.try_clone()?)?;
    let unix = daemon.metrics_listener();
    let tcp = match daemon.setup.metrics_tcp {
        Some(address) => Some(serve_metrics::tcp(address).await?),
        None => None,
    };
    let mut asking: JoinSet<()> = JoinSet::new();
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let watchdog = store::watchdog().map(|period| period / 3);
    let mut textfile_at = Instant::now();
    daemon.look_around();
    daemon.settle();
    store::tell(&[NotifyState::Ready, NotifyState::Status("watching")]);
    tracing::info!("supervisor serves");
    loop {
        let now = Instant::now();
        let mut due = daemon.due().min(now + LOOK);
        if let Some(period) = watchdog {
            store::tell(&[NotifyState::Watchdog]);
            due = due.min(now + period);
        }
        if let Some(path) = &daemon.setup.textfile {
            if textfile_at <= now {
                textfile_at = now + TEXTFILE;
                if let Err(error) = serve_metrics::textfile(path, &daemon.text()) {
                    tracing::warn!(path = %path.display(), %error, "write metrics");
                }
            }
            due = due.min(textfile_at);
        }
        tokio::select! {
            // The ends of shims first: somebody is waiting.
            biased;
            ready = poll.readable() => {
                let mut ready = ready?;
                daemon.ready();
                ready.clear_ready();
            }
            Some(ended) = daemon.tries.join_next() => daemon.tried(joined(ended)),
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
            Some(found) = daemon.bundles.join_next() => {
                let (place, found) = joined(found);
                daemon.found(place, found);
            }
            Some(hint) = hints.recv() => daemon.hinted(&hint),
            () = sleep_until(due.into()) => daemon.tick(),
            Ok(stream) = accept_unix(unix.as_ref()), if asking.len() < serve_metrics::MAX_ASKING => {
                asking.spawn(serve_metrics::answer(stream, daemon.text()));
            }
            Ok(stream) = accept_tcp(tcp.as_ref()), if asking.len() < serve_metrics::MAX_ASKING => {
                asking.spawn(serve_metrics::answer(stream, daemon.text()));
            }
            Some(_) = asking.join_next() => {}
        }
        daemon.settle();
    }
    store::tell(&[NotifyState::Stopping]);
    tracing::info!("supervisor stops");
    daemon.finish().await;
    Ok(())
}

/// The result of a task of our own. None is ever aborted, so the only failure is a panic, which
/// goes on.
fn joined<T>(result: Result<T, tokio::task::JoinError>) -> T {
    match result {
        Ok(value) => value,
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}

async fn accept_unix(listener: Option<&UnixListener>) -> io::Result<tokio::net::UnixStream> {
    match listener {
        Some(listener) => Ok(listener.accept().await?.0),
        None => std::future::pending().await,
    }
}

async fn accept_tcp(listener: Option<&TcpListener>) -> io::Result<tokio::net::TcpStream> {
    match listener {
        Some(listener) => Ok(listener.accept().await?.0),
        None => std::future::pending().await,
    }
}

/// Listens at `path`, in the place of whoever did before.
fn listen_at(path: &Path) -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)?;
    let mut beside = path.as_os_str().to_owned();
    beside.push(".new");
    let beside = PathBuf::from(beside);
    match fs::remove_file(&beside) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        Ok(()) | Err(_) => {}
    }
    bind(fd.as_raw_fd(), &UnixAddr::new(&beside)?)?;
    fs::set_permissions(&beside, fs::Permissions::from_mode(0o600))?;
    listen(&fd, Backlog::MAXCONN)?;
    fs::rename(&beside, path)?;
    Ok(fd)
}

type Hints = (
    mpsc::UnboundedSender<PathBuf>,
    mpsc::UnboundedReceiver<PathBuf>,
);

impl Daemon {
    fn new(setup: Setup, hints: Hints) -> io::Result<(Self, mpsc::UnboundedReceiver<PathBuf>)> {
        let proc = Proc::new(&setup.plan.roots.proc);
        let sockets: Vec<PathBuf> = match fs::read_dir(&setup.plan.roots.socket_dir) {
            Ok(entries) => entries
                .flatten()
                .filter_map(|entry| look::socket_of(&entry.path()))
                .collect::<BTreeSet<_>>()
                .into_iter()
                .collect(),
            Err(_) => Vec::new(),
        };
        // Before anything else is opened.
        let restored = store::restore(&sockets);
        let boot_id = match proc.boot_id() {
            Seen::Present(id) => id,
            Seen::Absent | Seen::Unknown(_) => String::new(),
        };
        let mut witnessed = match witnessed::read(&setup.run_dir, &boot_id) {
            Seen::Present(witnessed) => witnessed,
            Seen::Absent => Witnessed::default(),
            Seen::Unknown(why) => {
                tracing::warn!(why, "what was seen before is lost");
                Witnessed::default()
            }
        };
        witnessed.boot_id = boot_id;
        witnessed.since = Some(Timestamp::now());
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let listener = listen_at(&supervision::path(&setup.run_dir))?;
        epoll.add(&listener, EpollEvent::new(EpollFlags::EPOLLIN, LISTENER))?;
        let (tell, hints) = hints;
        let watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
            for path in event.map(|event| event.paths).unwrap_or_default() {
                // Nobody listens any more: it stops.
                let _ = tell.send(path);
            }
        });
        let watcher = match watcher {
            Ok(watcher) => Some(watcher),
            Err(error) => {
                tracing::warn!(%error, "no hints of changes: looking more often");
                None
            }
        };
        let now = Instant::now();
        let history = History::new(&setup.history, "supervise");
        let mut daemon = Self {
            proc,
            // Far enough back for the ends of a minute ago.
            began: now.checked_sub(Duration::from_secs(3600)).unwrap_or(now),
            state: State::default(),
            bag: Bag::new(KEPT),
            witnessed,
            dirty: true,
            metrics: Metrics::new(),
            history,
            epoll,
            listener,
            watches: HashMap::new(),
            tokens: HashMap::new(),
            peers: HashMap::new(),
            last: LISTENER,
            versions: BTreeMap::new(),
            places: BTreeMap::new(),
            changed: BTreeMap::new(),
            missed: BTreeMap::new(),
            states: BTreeSet::new(),
            instances_at: now,
            look_at: now,
            catch_up_at: now + CATCH_UP,
            watcher,
            watched: BTreeSet::new(),
            tries: JoinSet::new(),
            places_to_try: Arc::new(Semaphore::new(RESUMED_AT_ONCE)),
            bundles: JoinSet::new(),
            ends: BTreeMap::new(),
            inbox: Vec::new(),
            setup,
        };
        daemon.remember();
        for (socket, name, fd) in restored {
            daemon.keep(&socket, &name, fd);
        }
        Ok((daemon, hints))
    }

    /// Shims that ended within the last minute before our start count.
    fn remember(&mut self) {
        let now = Timestamp::now();
        let mut ends: BTreeMap<PathBuf, (Sighting, Vec<u64>)> = BTreeMap::new();
        for death in &self.witnessed.deaths {
            let ago = now.seconds.saturating_sub(death.at.seconds);
            let (Ok(ago), "ours") = (u64::try_from(ago), death.kind.as_str()) else {
                continue;
            };
            let at = self.ms().saturating_sub(ago.saturating_mul(1000));
            let (pid, start_time) = death.process;
            let sighting = Sighting {
                kind: Kind::Ours,
                namespace: death.namespace.clone(),
                address: String::new(),
                group: death.group.clone(),
                shim: Process { pid, start_time },
                members: BTreeMap::new(),
                tasks: 0,
            };
            let all = ends.entry(PathBuf::from(&death.socket));
            all.or_insert_with(|| (sighting, Vec::new())).1.push(at);
        }
        for (socket, (sighting, ends)) in ends {
            self.state.remember(&socket, sighting, ends);
        }
    }

    fn metrics_listener(&self) -> Option<UnixListener> {
        let path = self.setup.run_dir.join("metrics.sock");
        match serve_metrics::unix(&path) {
            Ok(listener) => Some(listener),
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "no metrics");
                None
            }
        }
    }

    fn ms(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    fn text(&self) -> String {
        let kept = self.bag.all().map(|(_, kept)| kept.what());
        let count = |kind| self.state.count(kind);
        // Writing to a string does not fail.
        self.metrics.text(count, kept).unwrap_or_default()
    }

    // ---- time ----

    fn due(&self) -> Instant {
        let waits = self.places.values().filter_map(|standing| match standing {
            Standing::Waits(at, _) => Some(*at),
            Standing::Asked(_) | Standing::Task(_) | Standing::Settled => None,
        });
        let decided = self.state.deadline();
        let decided = decided.and_then(|ms| self.began.checked_add(Duration::from_millis(ms)));
        let others = [self.look_at, self.catch_up_at].into_iter().chain(decided);
        let changed = self.changed.values().chain(self.missed.values()).copied();
        let all = waits.chain(others).chain(changed);
        all.min().unwrap_or(self.look_at)
    }

    fn tick(&mut self) {
        let now = Instant::now();
        if self.look_at <= now {
            self.look_around();
        }
        self.read_changed(now);
        let again: Vec<(Place, u32)> = self
            .places
            .iter()
            .filter_map(|(place, standing)| match standing {
                Standing::Waits(at, looks) if *at <= now => Some((place.clone(), *looks)),
                _ => None,
            })
            .collect();
        for (place, looks) in again {
            self.ask(place, looks);
        }
        if self.catch_up_at <= now {
            self.catch_up_at = now + CATCH_UP;
            let all: Vec<PathBuf> = self.state.sockets().map(|(s, _)| s.clone()).collect();
            self.missed
                .extend(all.into_iter().map(|socket| (socket, now)));
        }
        let missed: Vec<PathBuf> = self
            .missed
            .iter()
            .filter(|(_, at)| **at <= now)
            .map(|(socket, _)| socket.clone())
            .collect();
        for socket in missed {
            self.missed.remove(&socket);
            self.catch_up(&socket);
        }
        self.inbox.push(Input::Tick);
    }

    /// Works off what has come in, and writes down what was seen.
    fn settle(&mut self) {
        while !self.inbox.is_empty() {
            for input in std::mem::take(&mut self.inbox) {
                let now = self.ms();
                for output in self.state.step(input, now) {
                    self.perform(output);
                }
            }
        }
        if self.dirty {
            self.dirty = false;
            if let Err(error) = witnessed::write(&self.setup.run_dir, &self.witnessed) {
                tracing::error!(%error, "write what was seen");
            }
        }
    }

    async fn finish(&mut self) {
        let all = async {
            while let Some(ended) = self.tries.join_next().await {
                self.tried(joined(ended));
                self.settle();
            }
        };
        // One that is not done by then goes on without us: the verb is its own process.
        let _ = tokio::time::timeout(STOP, all).await;
        self.tries.detach_all();
        // Nobody is to find a socket without anybody behind it. What may have come in its place
        // has taken the lock after us.
        let _ = fs::remove_file(supervision::path(&self.setup.run_dir));
        let _ = fs::remove_file(self.setup.run_dir.join("metrics.sock"));
    }

    // ---- looking ----

    fn hinted(&mut self, path: &Path) {
        let now = Instant::now();
        if let Some(socket) = look::socket_of(path) {
            self.changed.entry(socket).or_insert(now + SETTLE);
        } else if path
            .parent()
            .is_some_and(|folder| self.watched.contains(folder))
        {
            // A bundle or a namespace came or went.
            self.look_at = self.look_at.min(now + SETTLE);
        }
    }

    fn look_around(&mut self) {
        let now = Instant::now();
        self.metrics.looked();
        let blind = self.watcher.is_none();
        self.look_at = now + if blind { LOOK_BLIND } else { LOOK };
        if self.instances_at <= now {
            self.instances_at = now + INSTANCES;
            self.states = observe::states(&self.setup.plan);
        }
        let records = look::records(&self.setup.plan.roots.socket_dir);
        for (socket, version) in &records {
            if self.versions.get(socket) != Some(version) {
                self.changed.insert(socket.clone(), now);
            }
        }
        let ours = self.state.sockets().filter(|(_, kind)| *kind == Kind::Ours);
        let gone: Vec<PathBuf> = ours
            .map(|(socket, _)| socket.clone())
            .filter(|socket| !records.contains_key(socket))
            .collect();
        self.changed
            .extend(gone.into_iter().map(|socket| (socket, now)));
        self.versions = records;
        self.read_changed(now);

        let (places, mut folders) = look::bundles(&self.states);
        folders.insert(self.setup.plan.roots.socket_dir.clone());
        folders.extend(self.states.iter().map(|state| state.join(TASK_PLUGIN)));
        self.watch_folders(folders);
        let gone: Vec<Place> = self
            .places
            .keys()
            .filter(|place| !places.contains(place))
            .cloned()
            .collect();
        for place in gone {
            if let Some(Standing::Task(socket)) = self.places.remove(&place) {
                let id = place.id.to_string();
                self.inbox.push(Input::TaskGone(socket, id));
            }
        }
        for place in places {
            if !self.places.contains_key(&place) {
                self.ask(place, 0);
            }
        }
    }

    /// Watches these folders; for one that is not there yet, the one in which it will be made.
    fn watch_folders(&mut self, folders: BTreeSet<PathBuf>) {
        let Some(watcher) = &mut self.watcher else {
            return;
        };
        let there = |folder: &PathBuf| {
            let found = folder.ancestors().find(|folder| folder.is_dir());
            found.map(Path::to_owned)
        };
        let folders: BTreeSet<PathBuf> = folders.iter().filter_map(there).collect();
        for folder in folders.difference(&self.watched) {
            let mode = notify::RecursiveMode::NonRecursive;
            if let Err(error) = watcher.watch(folder, mode) {
                tracing::info!(folder = %folder.display(), %error, "no hints");
            }
        }
        for folder in self.watched.difference(&folders) {
            // It is gone, mostly, and its watch with it.
            let _ = watcher.unwatch(folder);
        }
        self.watched = folders;
    }

    fn read_changed(&mut self, now: Instant) {
        let due: Vec<PathBuf> = self
            .changed
            .iter()
            .filter(|(_, at)| **at <= now)
            .map(|(socket, _)| socket.clone())
            .collect();
        for socket in due {
            self.changed.remove(&socket);
            self.read_record(&socket);
        }
    }

    fn read_record(&mut self, socket: &Path) {
        match look::record(socket) {
            Seen::Present(record) => {
                if record.boot_id == self.witnessed.boot_id {
                    let sighting = Sighting::of_record(&record);
                    self.inbox.push(Input::Seen(socket.to_owned(), sighting));
                }
            }
            Seen::Absent => {
                let ours = self.state.sighting(socket);
                if ours.is_some_and(|sighting| sighting.kind == Kind::Ours) {
                    self.inbox.push(Input::Gone(socket.to_owned()));
                }
            }
            // It stays as it was.
            Seen::Unknown(why) => tracing::info!(socket = %socket.display(), why, "record"),
        }
    }

    fn ask(&mut self, place: Place, looks: u32) {
        let looks = looks.saturating_add(1);
        if self.bundles.len() >= ASKED_AT_ONCE {
            let again = Instant::now() + AGAIN.0;
            self.places
                .insert(place, Standing::Waits(again, looks.saturating_sub(1)));
            return;
        }
        self.places.insert(place.clone(), Standing::Asked(looks));
        let proc = self.proc.clone();
        let runc_root = self.setup.plan.roots.runc_root.clone();
        self.bundles.spawn_blocking(move || {
            let found = look::bundle(&proc, &runc_root, &place);
            (place, found)
        });
    }

    fn found(&mut self, place: Place, found: Found) {
        let Some(Standing::Asked(looks)) = self.places.get(&place).cloned() else {
            // It has gone meanwhile.
            return;
        };
        let standing = match found {
            Found::Ours | Found::Nothing => Standing::Settled,
            Found::NotYet => {
                let pause = AGAIN.0.saturating_mul(1 << looks.min(10)).min(AGAIN.1);
                Standing::Waits(Instant::now() + pause, looks)
            }
            Found::Task(task) => {
                self.witnessed.said(task.words);
                self.dirty = true;
                let socket = task.socket;
                self.inbox
                    .push(Input::SeenAlso(socket.clone(), task.sighting));
                self.missed.insert(socket.clone(), Instant::now());
                Standing::Task(socket)
            }
        };
        self.places.insert(place, standing);
    }

    /// What the shim at `socket` has that we do not keep.
    fn catch_up(&mut self, socket: &Path) {
        let Some(sighting) = self.state.sighting(socket) else {
            return;
        };
        let (kind, shim) = (sighting.kind, sighting.shim);
        let Some(watch) = self
            .tokens
            .get(&(shim.pid, shim.start_time, true))
            .and_then(|token| self.watches.get(token))
        else {
            return;
        };
        let members: Vec<Of> = match kind {
            Kind::Ours => match look::record(socket) {
                Seen::Present(record) if record.shim.process == shim => catch::members(&record),
                Seen::Present(_) | Seen::Absent | Seen::Unknown(_) => return,
            },
            Kind::Stock => sighting
                .members
                .iter()
                .map(|(member, process)| Of {
                    member: member.clone(),
                    process: *process,
                    stdio: Default::default(),
                })
                .collect(),
        };
        let Ok(pid) = i32::try_from(shim.pid) else {
            return;
        };
        let has = |inode| self.bag.has(socket, inode);
        let whose = (pid, &watch.pidfd);
        let caught = catch::catch_up(&self.proc, kind, whose, socket, &members, has);
        for (name, fd) in caught {
            self.keep(socket, &name, fd);
        }
    }

    // ---- what is kept ----

    fn keep(&mut self, socket: &Path, name: &str, fd: OwnedFd) {
        let change = match self.bag.keep(socket, name, fd) {
            Ok(change) => change,
            Err(error) => {
                tracing::warn!(socket = %socket.display(), name, %error, "not kept");
                return;
            }
        };
        self.given_up(socket, change.replaced);
        if let Some(kept) = change.new {
            if is_watched(&kept) {
                // No events but those of an end, which are always told.
                let event = EpollEvent::new(EpollFlags::empty(), kept.token);
                if let Err(error) = self.epoll.add(&*kept.fd, event) {
                    tracing::warn!(%error, "watch descriptor");
                }
            }
            store::store(socket, &kept);
        }
    }

    fn given_up(&mut self, socket: &Path, given: Vec<Kept>) {
        for kept in given {
            if is_watched(&kept) {
                // A try may have a duplicate of it: closing alone would not end the watch.
                let _ = self.epoll.delete(&*kept.fd);
            }
            store::remove(socket, &kept);
        }
    }

    // ---- events ----

    fn ready(&mut self) {
        let mut events = [EpollEvent::empty(); 64];
        loop {
            let count = match self.epoll.wait(&mut events, EpollTimeout::ZERO) {
                Ok(count) => count,
                Err(_) => return,
            };
            let mut ended: Vec<u64> = Vec::new();
            for event in events.iter().take(count) {
                match event.data() {
                    LISTENER => self.accept(),
                    token if token & KEPT != 0 => {
                        if let Some((socket, kept)) = self.bag.give_up_one(token) {
                            self.given_up(&socket, vec![kept]);
                        }
                    }
                    token if token & PEER != 0 => self.hear(token),
                    token => ended.push(token),
                }
            }
            // How their members ended is to be known to the successors.
            ended.sort_by_key(|token| {
                let watch = self.watches.get(token);
                watch.is_some_and(|watch| watch.member.is_none())
            });
            for token in ended {
                self.ended(token);
            }
            if count < events.len() {
                return;
            }
        }
    }

    fn ended(&mut self, token: u64) {
        let Some(watch) = self.watches.remove(&token) else {
            return;
        };
        let _ = self.epoll.delete(&watch.pidfd);
        let Watch {
            socket,
            member,
            process,
            pidfd,
        } = watch;
        let key = (process.pid, process.start_time, member.is_none());
        self.tokens.remove(&key);
        let status = witness::status(&self.proc, process, &pidfd);
        match member {
            Some(member) => {
                self.metrics.exited(status.is_some());
                let namespace = self.state.sighting(&socket).map(|s| s.namespace.clone());
                self.witnessed.exited(SeenExit {
                    namespace: namespace.unwrap_or_default(),
                    id: member.id.clone(),
                    exec_id: member.exec_id.clone(),
                    process: (process.pid, process.start_time),
                    status,
                    at: Timestamp::now(),
                });
                self.dirty = true;
                self.inbox.push(Input::MemberEnded(socket, member, process));
            }
            None => {
                self.ends.insert(socket.clone(), Instant::now());
                // What it said and wrote last.
                let peers: Vec<u64> = self
                    .peers
                    .iter()
                    .filter(|(_, peer)| peer.socket.as_ref() == Some(&socket))
                    .map(|(token, _)| *token)
                    .collect();
                for peer in peers {
                    self.hear(peer);
                }
                self.read_record(&socket);
                let how = How::of_status(status);
                self.inbox.push(Input::ShimEnded(socket, process, how));
            }
        }
    }

    fn accept(&mut self) {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        while let Ok(number) = accept4(self.listener.as_raw_fd(), flags) {
            let Some(fd) = sys::received(&[number]).pop() else {
                return;
            };
            let link = match Link::of(fd) {
                Ok(link) => link,
                Err(error) => {
                    tracing::warn!(%error, "refuse a connection");
                    continue;
                }
            };
            self.last = self.last.saturating_add(1);
            let token = self.last | PEER;
            let event = EpollEvent::new(EpollFlags::EPOLLIN, token);
            if self.epoll.add(&link, event).is_ok() {
                self.peers.insert(token, Peer { link, socket: None });
            }
        }
    }

    /// Takes everything that a peer has said.
    fn hear(&mut self, token: u64) {
        loop {
            let Some(peer) = self.peers.get(&token) else {
                return;
            };
            let went = match peer.link.receive() {
                Ok(Some(packet)) => self.word(token, packet),
                Ok(None) => Err(io::ErrorKind::UnexpectedEof.into()),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) => Err(error),
            };
            if let Err(error) = went {
                if error.kind() != io::ErrorKind::UnexpectedEof {
                    tracing::warn!(%error, "close a connection");
                }
                if let Some(peer) = self.peers.remove(&token) {
                    let _ = self.epoll.delete(&peer.link);
                    // A shim that lives on has lost us, and may have told in vain.
                    let soon = Instant::now() + Duration::from_secs(1);
                    self.missed.extend(peer.socket.map(|socket| (socket, soon)));
                }
                return;
            }
        }
    }

    fn word(&mut self, token: u64, packet: Packet) -> io::Result<()> {
        let Some(peer) = self.peers.get_mut(&token) else {
            return Ok(());
        };
        let word: Word = serde_json::from_slice(&packet.bytes).map_err(io::Error::other)?;
        let nameless = || io::Error::other("it has not said who it is");
        match word {
            Word::Shim {
                socket,
                process: Named(process),
            } => {
                let pid = peer.link.peer()?;
                let is_it = match self.proc.stat(pid) {
                    Seen::Present(stat) => stat.id.start_time == process.start_time,
                    // It has died since: what it says is what it had.
                    Seen::Absent => true,
                    Seen::Unknown(_) => false,
                };
                if !is_it || u32::try_from(pid) != Ok(process.pid) || !socket.is_absolute() {
                    return Err(io::Error::other("it is not whom it says"));
                }
                peer.socket = Some(socket.clone());
                self.changed.entry(socket).or_insert_with(Instant::now);
            }
            Word::Keep { name } => {
                let socket = peer.socket.clone().ok_or_else(nameless)?;
                for fd in packet.files.into_iter().take(1) {
                    self.keep(&socket, &name, fd);
                }
            }
            Word::Drop { names, number } => {
                let socket = peer.socket.clone().ok_or_else(nameless)?;
                let given = self.bag.give_up(&socket, |kept| names.contains(&kept.name));
                self.given_up(&socket, given);
                self.answer(token, &Answer::Dropped { number }, &[]);
            }
            Word::Fetch { socket } => self.fetch(token, &socket),
            Word::Leave {
                socket,
                process: Named(process),
            } => {
                self.inbox.push(Input::Leave(socket, process));
                self.settle();
                self.answer(token, &Answer::Noted, &[]);
            }
        }
        Ok(())
    }

    /// Whoever does not take an answer at once does without.
    fn answer(&self, token: u64, answer: &Answer, files: &[&Kept]) {
        let files: Vec<_> = files.iter().map(|kept| kept.fd.as_fd()).collect();
        if let Some(peer) = self.peers.get(&token)
            && let Err(error) = peer.link.send(answer, &files)
        {
            tracing::info!(%error, "answer");
        }
    }

    fn fetch(&mut self, token: u64, socket: &Path) {
        let all: Vec<&Kept> = self.bag.of(socket).iter().collect();
        let mut packets = all.chunks(MAX_FILES).peekable();
        if packets.peek().is_none() {
            let names = Vec::new();
            self.answer(token, &Answer::Kept { names, more: false }, &[]);
        }
        while let Some(files) = packets.next() {
            let names = files.iter().map(|kept| kept.name.clone()).collect();
            let more = packets.peek().is_some();
            self.answer(token, &Answer::Kept { names, more }, files);
        }
    }

    // ---- what is decided ----

    fn perform(&mut self, output: Output) {
        match output {
            Output::WatchShim(socket, process) => {
                if self.watch(&socket, None, process) {
                    self.catch_up(&socket);
                } else {
                    self.ends.insert(socket.clone(), Instant::now());
                    let ended = Input::ShimEnded(socket, process, How::Unknown);
                    self.inbox.push(ended);
                }
            }
            Output::WatchMember(socket, member, process) => {
                if !self.watch(&socket, Some(member.clone()), process) {
                    self.inbox.push(Input::MemberEnded(socket, member, process));
                }
            }
            Output::Unwatch(process) => {
                for shim in [false, true] {
                    let key = (process.pid, process.start_time, shim);
                    if let Some(token) = self.tokens.remove(&key)
                        && let Some(watch) = self.watches.remove(&token)
                    {
                        let _ = self.epoll.delete(&watch.pidfd);
                    }
                }
            }
            Output::Resume(socket) => self.resume(socket),
            Output::DropAll(socket) => {
                let given = self.bag.give_up(&socket, |_| true);
                store::remove_connections(&socket);
                self.given_up(&socket, given);
            }
            Output::DropMember(socket, member) => {
                let key = member.key();
                let of_it = |kept: &Kept| super::bag::member(&kept.name) == key;
                let given = self.bag.give_up(&socket, of_it);
                self.given_up(&socket, given);
            }
            Output::DropListener(socket) => {
                let listens = |kept: &Kept| kept.name == super::bag::LISTENER;
                let given = self.bag.give_up(&socket, listens);
                self.given_up(&socket, given);
            }
            Output::Died(socket, process, how, follows) => {
                self.died(&socket, process, how, follows);
            }
            Output::Look(socket) => {
                self.changed.insert(socket, Instant::now());
            }
        }
    }

    /// False: it is not there any more.
    fn watch(&mut self, socket: &Path, member: Option<Member>, process: Process) -> bool {
        let key = (process.pid, process.start_time, member.is_none());
        if self.tokens.contains_key(&key) {
            return true;
        }
        let Ok(pidfd) = witness::open(&self.proc, process) else {
            return false;
        };
        self.last = self.last.saturating_add(1);
        let token = self.last;
        let event = EpollEvent::new(EpollFlags::EPOLLIN, token);
        if let Err(error) = self.epoll.add(&pidfd, event) {
            tracing::error!(pid = process.pid, %error, "watch process");
            return true;
        }
        self.tokens.insert(key, token);
        let watch = Watch {
            socket: socket.to_owned(),
            member,
            process,
            pidfd,
        };
        self.watches.insert(token, watch);
        true
    }

    /// Duplicates of the pidfds of a shim's members.
    fn pidfds(&self, sighting: &Sighting) -> adopt::Kept {
        let of = |process: &Process| {
            let key = (process.pid, process.start_time, false);
            let watch = self.watches.get(self.tokens.get(&key)?)?;
            let fd = watch.pidfd.try_clone().ok()?;
            Some((handoff::pidfd_name(*process), Arc::new(fd)))
        };
        sighting.members.values().filter_map(of).collect()
    }

    fn resume(&mut self, socket: PathBuf) {
        let Some(sighting) = self.state.sighting(&socket) else {
            return;
        };
        let kept: adopt::Kept = self
            .bag
            .of(&socket)
            .iter()
            .map(|kept| (kept.name.clone(), Arc::clone(&kept.fd)))
            .chain(self.pidfds(sighting))
            .collect();
        let inits = sighting.members.iter();
        let members = inits
            .filter(|(member, _)| member.exec_id.is_empty())
            .map(|(member, process)| adopt::Member {
                name: (sighting.namespace.clone(), member.id.clone()),
                init: i32::try_from(process.pid).ok().map(|pid| ProcessId {
                    pid,
                    start_time: process.start_time,
                }),
            })
            .collect();
        let order = Order {
            address: sighting.address.clone(),
            state: None,
            namespace: sighting.namespace.clone(),
            group: sighting.group.clone(),
            adoption: Adoption {
                socket: socket.clone(),
                record: None,
                predecessor: None,
                // Named when they are handed over.
                descriptors: Vec::new(),
                observed: self.witnessed.observed(&sighting.namespace),
            },
            unreadable: None,
            members,
            because: vec![format!("shim {} has ended", sighting.shim.pid)],
        };
        let how = HowToAdopt {
            binary: self.setup.binary.clone(),
            deadline: self.setup.deadline,
            until: Instant::now() + self.setup.deadline * 2,
            at_once: 1,
            run: self.history.run().to_owned(),
            run_dir: self.setup.run_dir.clone(),
        };
        let died = self.ends.get(&socket).copied();
        let died = died.unwrap_or_else(Instant::now);
        let places = Arc::clone(&self.places_to_try);
        self.tries.spawn(async move {
            // Nobody closes it.
            let _place = places.acquire().await;
            let outcome = adopt::run_with(order, &kept, &how).await;
            TryEnded {
                socket,
                outcome,
                died,
            }
        });
    }

    fn tried(&mut self, ended: TryEnded) {
        let TryEnded {
            socket,
            outcome,
            died,
        } = ended;
        let (word, tried) = match &outcome.verdict {
            Verdict::Adopted(adopted) => ("adopted", Tried::Serves(adopted.shim)),
            Verdict::StoodBack(_) => ("stood-back", Tried::StoodBack),
            Verdict::Failed(_) => ("failed", Tried::Failed),
        };
        self.metrics.resumed(word, died.elapsed());
        if let Verdict::Adopted(adopted) = &outcome.verdict {
            let socket = socket.to_string_lossy();
            let deaths = self.witnessed.deaths.iter_mut().rev();
            if let Some(death) = deaths.into_iter().find(|death| death.socket == socket) {
                death.successor = Some(adopted.shim.pid);
                self.dirty = true;
            }
        }
        if let Err(error) = told::tell(&self.history, &outcome) {
            tracing::warn!(%error, "history");
        }
        self.inbox.push(Input::Tried(socket, tried));
    }

    fn died(&mut self, socket: &Path, process: Process, how: How, follows: Follows) {
        let Some(sighting) = self.state.sighting(socket) else {
            return;
        };
        let kind = sighting.kind;
        self.metrics.died(kind, follows);
        let subject = format!("{}/{}", sighting.namespace, sighting.group);
        let next = match follows {
            Follows::Nothing => "as was meant",
            Follows::Successor => "a successor is started",
            Follows::GivenUp => {
                "it has ended five times in a minute and has no successor: recoverd adopt starts one"
            }
            Follows::Loss => "a stock shim: its containerd, if it runs, ends the workload",
        };
        let text = format!("shim {} {}: {next}", process.pid, how.text());
        match follows {
            Follows::Nothing => tracing::info!(subject, "{text}"),
            Follows::Successor | Follows::Loss => tracing::warn!(subject, "{text}"),
            Follows::GivenUp => tracing::error!(subject, "{text}"),
        }
        self.witnessed.died(Death {
            namespace: sighting.namespace.clone(),
            group: sighting.group.clone(),
            socket: socket.to_string_lossy().into_owned(),
            kind: kind.word().to_owned(),
            process: (process.pid, process.start_time),
            how: how.text(),
            follows: follows.word().to_owned(),
            successor: None,
            at: Timestamp::now(),
        });
        self.dirty = true;
        if follows != Follows::Nothing
            && let Err(error) = self.history.tell(Event::Noted, &subject, &text, Map::new())
        {
            tracing::warn!(%error, "history");
        }
    }
}

/// Whose end shows: a peer's of a connection, the reader's of a stdin. A terminal that nobody has
/// open looks ended, and a fifo may find another reader.
fn is_watched(kept: &Kept) -> bool {
    kept.name == CONNECTION || kept.what() == "stdin"
}

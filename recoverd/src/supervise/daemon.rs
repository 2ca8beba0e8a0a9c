//! The loop: it owns every descriptor, tells `decide` what happened and performs what comes of it.
//! No policy.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fs, io,
    os::fd::OwnedFd,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use nix::sys::epoll::{Epoll, EpollEvent, EpollTimeout};
use recoverd_common::{failpoint, proc::Proc, supervision, witness::Teller};
use sd_notify::NotifyState;
use tokio::{
    net::{TcpListener, UnixListener},
    signal::unix::{SignalKind, signal},
    sync::{Semaphore, mpsc},
    task::JoinSet,
    time::sleep_until,
};

use super::{
    bag::{self, Bag, Kept},
    decide::{How, Input, Member, Output, State},
    look::{Found, Place, Version},
    metrics::Metrics,
    serve_metrics, store,
};
use crate::{
    history::History,
    observe::Plan,
    witnessed::{self, Witnessed},
};

mod begin;
mod ends;
mod keeping;
mod looking;
mod peers;
mod successors;

use ends::{Ended, Watch};
use looking::Standing;
use peers::Peer;
use successors::TryEnded;

const LISTENER: u64 = 1;
const TELLER: u64 = 2;
/// Tokens of peers, of what is kept, and, without a bit, of processes.
const PEER: u64 = 1 << 61;
const KEPT: u64 = 1 << 62;
/// Everything that was missed in living shims is caught up with this often.
const CATCH_UP: Duration = Duration::from_secs(600);
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

struct Daemon {
    setup: Setup,
    proc: Proc,
    began: Instant,
    state: State,
    bag: Bag,
    masters: store::Masters,
    witnessed: Witnessed,
    dirty: bool,
    metrics: Metrics,
    history: History,
    epoll: Epoll,
    listener: OwnedFd,
    watches: HashMap<u64, Watch>,
    tokens: HashMap<(u32, u64, bool), u64>,
    /// Who is to be watched and could not be, though he may be there: with the next look.
    unwatched: HashMap<(u32, u64, bool), (PathBuf, Option<Member>)>,
    /// Who tells how they ended, and of whom it has not done so yet.
    teller: Teller,
    unanswered: Vec<Ended>,
    peers: HashMap<u64, Peer>,
    last: u64,
    versions: BTreeMap<PathBuf, Version>,
    /// The last record of each shim of ours, as it is on disk: for a successor, should its file be
    /// lost.
    records: BTreeMap<PathBuf, Box<[u8]>>,
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
    /// When the shim there ended, the last time: for how long it takes to give it a successor.
    ends: BTreeMap<PathBuf, Instant>,
    inbox: Vec<Input>,
}

/// Runs until it is asked to stop.
pub async fn run(setup: Setup) -> io::Result<()> {
    let hints = mpsc::unbounded_channel();
    let (mut daemon, mut hints) = Daemon::new(setup, hints)?;
    let poll = crate::sys::awaited(daemon.epoll.0.try_clone()?)?;
    let unix = daemon.metrics_listener();
    let tcp = daemon.metrics_on_loopback().await;
    let mut asking: JoinSet<()> = JoinSet::new();
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let watchdog = store::watchdog().map(|period| period / 3);
    // Not with each round: every hint of a change is one.
    let mut watchdog_at = Instant::now();
    let mut textfile_at = Instant::now();
    daemon.look_around();
    daemon.settle();
    failpoint!("supervise.ready.before");
    store::tell(&[NotifyState::Ready, NotifyState::Status("watching")]);
    failpoint!("supervise.ready.after");
    tracing::info!("supervisor serves");
    loop {
        let now = Instant::now();
        let mut due = daemon.due();
        if let Some(period) = watchdog {
            if watchdog_at <= now {
                watchdog_at = now + period;
                store::tell(&[NotifyState::Watchdog]);
            }
            due = due.min(watchdog_at);
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

impl Daemon {
    fn ms(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    fn text(&self) -> String {
        let kept = self.bag.all().map(|(_, kept)| kept.what());
        let count = |kind| self.state.count(kind);
        // Writing to a string does not fail.
        self.metrics.text(count, kept).unwrap_or_default()
    }

    fn due(&self) -> Instant {
        let waits = self.places.values().filter_map(|standing| match standing {
            Standing::Waits(at, _) => Some(*at),
            Standing::Asked(_) | Standing::Task(_) | Standing::Settled => None,
        });
        let decided = self.state.deadline();
        let decided = decided.and_then(|ms| self.began.checked_add(Duration::from_millis(ms)));
        let others = [self.look_at, self.catch_up_at].into_iter().chain(decided);
        let changed = self.changed.values().chain(self.missed.values()).copied();
        let ended = self.unanswered.iter().filter_map(Ended::due);
        let all = waits.chain(others).chain(changed).chain(ended);
        all.min().unwrap_or(self.look_at)
    }

    fn tick(&mut self) {
        let now = Instant::now();
        self.ask_teller();
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
        failpoint!("supervise.stop.before");
        let _ = fs::remove_file(supervision::path(&self.setup.run_dir));
        failpoint!("supervise.stop.between");
        let _ = fs::remove_file(self.setup.run_dir.join("metrics.sock"));
        failpoint!("supervise.stop.after");
    }

    fn ready(&mut self) {
        let mut events = [EpollEvent::empty(); 64];
        loop {
            let count = match self.epoll.wait(&mut events, EpollTimeout::ZERO) {
                Ok(count) => count,
                Err(_) => return,
            };
            for event in events.iter().take(count) {
                match event.data() {
                    LISTENER => self.accept(),
                    TELLER => self.teller.hear(),
                    token if token & KEPT != 0 => {
                        if let Some((socket, kept)) = self.bag.give_up_one(token) {
                            self.given_up(&socket, vec![kept]);
                        }
                    }
                    token if token & PEER != 0 => self.hear(token),
                    token => self.ended(token),
                }
            }
            self.ask_teller();
            if count < events.len() {
                return;
            }
        }
    }

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
                    self.unwatched.remove(&key);
                    if let Some(token) = self.tokens.remove(&key)
                        && let Some(watch) = self.watches.remove(&token)
                    {
                        let _ = self.epoll.delete(&watch.pidfd);
                    }
                }
            }
            Output::Resume(socket) => self.resume(socket),
            Output::DropAll(socket) => {
                self.records.remove(&socket);
                self.ends.remove(&socket);
                let given = self.bag.give_up(&socket, |_| true);
                store::remove_connections(&socket);
                self.given_up(&socket, given);
            }
            Output::DropMember(socket, member) => {
                let key = member.key();
                let of_it = |kept: &Kept| bag::member(&kept.name) == key;
                let given = self.bag.give_up(&socket, of_it);
                self.given_up(&socket, given);
            }
            Output::DropListener(socket) => {
                let listens = |kept: &Kept| kept.name == bag::LISTENER;
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
}

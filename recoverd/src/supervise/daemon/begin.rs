//! How it begins: with what the service manager has kept, what was seen before, and a socket of its
//! own.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fs, io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::PermissionsExt,
    },
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use nix::sys::{
    epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags},
    socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket},
};
use recoverd_common::{
    failpoint, proc::Proc, record::Process, seen::Seen, supervision, timestamp::Timestamp,
    witness::Teller,
};
use tokio::{
    net::{TcpListener, UnixListener},
    sync::{Semaphore, mpsc},
    task::JoinSet,
};

use super::{
    super::{
        bag::Bag,
        bound_at,
        decide::{Kind, Sighting, State},
        look,
        metrics::Metrics,
        serve_metrics, store,
    },
    CATCH_UP, Daemon, KEPT, LISTENER, RESUMED_AT_ONCE, Setup, TELLER,
    looking::is_change,
};
use crate::{
    history::History,
    witnessed::{self, Witnessed},
};

/// Listens below `run_dir`, in the place of whoever did before.
fn listen_below(run_dir: &Path) -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)?;
    let beside = bound_at(run_dir);
    match fs::remove_file(&beside) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        Ok(()) | Err(_) => {}
    }
    bind(fd.as_raw_fd(), &UnixAddr::new(&beside)?)?;
    fs::set_permissions(&beside, fs::Permissions::from_mode(0o600))?;
    listen(&fd, Backlog::MAXCONN)?;
    failpoint!("supervise.listen.before");
    fs::rename(&beside, supervision::path(run_dir))?;
    failpoint!("supervise.listen.after");
    Ok(fd)
}

type Hints = (
    mpsc::UnboundedSender<PathBuf>,
    mpsc::UnboundedReceiver<PathBuf>,
);
impl Daemon {
    pub(super) fn new(
        setup: Setup,
        hints: Hints,
    ) -> io::Result<(Self, mpsc::UnboundedReceiver<PathBuf>)> {
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
        failpoint!("supervise.restore.after");
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
        // Tasks that went while nobody looked.
        witnessed.forget(look::is_gone);
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let listener = listen_below(&setup.run_dir)?;
        epoll.add(&listener, EpollEvent::new(EpollFlags::EPOLLIN, LISTENER))?;
        let teller = Teller::find();
        if let Teller::Nobody(why) = &teller {
            tracing::warn!(why, "nobody tells how what its parent has collected ended");
        }
        if let Some(descriptor) = teller.descriptor() {
            epoll.add(descriptor, EpollEvent::new(EpollFlags::EPOLLIN, TELLER))?;
        }
        let (tell, hints) = hints;
        let watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
            let Ok(event) = event else {
                return;
            };
            for path in event.paths.into_iter().filter(|_| is_change(&event.kind)) {
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
            masters: store::Masters::default(),
            witnessed,
            dirty: true,
            metrics: Metrics::new(),
            history,
            epoll,
            listener,
            watches: HashMap::new(),
            tokens: HashMap::new(),
            unwatched: HashMap::new(),
            peers: HashMap::new(),
            teller,
            unanswered: Vec::new(),
            last: TELLER,
            versions: BTreeMap::new(),
            records: BTreeMap::new(),
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

    /// Shims of ours that ended within the last minute before our start count.
    pub(super) fn remember(&mut self) {
        let now = Timestamp::now();
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
            let socket = Path::new(&death.socket);
            self.state.remember(socket, sighting, at, &death.follows);
        }
    }

    pub(super) fn metrics_listener(&self) -> Option<UnixListener> {
        let path = self.setup.run_dir.join("metrics.sock");
        match serve_metrics::unix(&path) {
            Ok(listener) => Some(listener),
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "no metrics");
                None
            }
        }
    }

    /// None as well when somebody else has the port: the shims are looked after all the same.
    pub(super) async fn metrics_on_loopback(&self) -> Option<TcpListener> {
        let address = self.setup.metrics_tcp?;
        match serve_metrics::tcp(address).await {
            Ok(listener) => Some(listener),
            Err(error) => {
                tracing::warn!(%address, %error, "no metrics");
                None
            }
        }
    }
}

//! `start`: makes sure that a shim serves this task's group, and prints its address.
//!
//! The answer is the plain text `unix://<path>`, which every containerd from 1.6 to 2.4 takes for
//! a version-2 shim with ttrpc, and that is what keeps a task through upgrades *and* downgrades:
//! JSON needs 1.7 (version 3: 2.0), protobuf 2.3; and with version 3 containerd 2.x runs no shim
//! binary for the containers of a pod, so that nothing of ours would clean up after them.
//!
//! Everything that can fail is tried before the daemon runs. What is made on the way is undone on
//! failure in the reverse order: daemon, socket, the files beside it, the files in the bundle.
//!
//! ```text
//! lock free ── socket there? ── no ───────────────────────────┐
//!   │              └ yes: somebody answers ── his address     ├─ bind, write, spawn, address
//!   │                     nobody answers ── unlink ───────────┘
//! lock held ── he answers ── his address
//!   └ not yet: again until the deadline; then refuse
//! ```

use std::{
    env,
    fs::{self, File},
    io::{self, Read, Write},
    os::{
        fd::OwnedFd,
        unix::{
            fs::{FileTypeExt, OpenOptionsExt},
            net::UnixListener,
        },
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use recoverd_common::{
    adoption::Adoption,
    bundle::Config,
    cgroup::Roots,
    failpoint,
    paths::{self, Beside},
    proc::Proc,
    read::{self, read_file},
    seen::Seen,
    shim_client::{self, CallError, ShimClient},
    supervision,
};

use crate::{
    adopt,
    args::Flags,
    bootstrap::{self, Input},
    context,
    lock::{self, Attempt},
    options::Options,
    remains::{self, Unsent},
    serve_args::READY,
    socket, sys,
};

/// How long somebody who holds no lock (a stock shim) may take to answer before his socket counts
/// as stale. The stock `start` allows 100 ms for connecting; we want an answer too.
const STRANGER_ANSWERS: Duration = Duration::from_millis(500);
/// How long whoever holds the lock may take: he may be a daemon that is just coming up on a busy
/// machine, an adopter at work, or a `delete`.
const HOLDER_ANSWERS: Duration = Duration::from_secs(8);
/// How long our daemon may take to come up.
const DAEMON_READY: Duration = Duration::from_secs(10);
/// Where the daemon sends events.
const TTRPC_ADDRESS: &str = "TTRPC_ADDRESS";
/// Standard input is a few hundred bytes; more is not for us.
const MAX_INPUT: u64 = 4 << 20;

/// Why `start` fails; each is the one line that containerd shows.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// There is no bundle to speak of.
    #[error("find bundle: {0}")]
    NoBundle(io::Error),
    /// `config.json` cannot be read.
    #[error("read {}: {cause}", path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// Why not.
        cause: String,
    },
    /// The socket's path does not fit into an address.
    #[error("socket path {} is longer than {} bytes", .0.display(), socket::MAX_PATH)]
    LongPath(PathBuf),
    /// Something that is no socket is in its place.
    #[error("{} is in the way: it is not a socket", .0.display())]
    NotASocket(PathBuf),
    /// Somebody serves the group who is none of ours, and does not answer.
    #[error("shim of group {group:?} is unresponsive ({cause}): it listens on {}", socket.display())]
    Slow {
        /// The group.
        group: String,
        /// Why not.
        cause: CallError,
        /// Where.
        socket: PathBuf,
    },
    /// Somebody is responsible for the group and does not answer.
    #[error("shim of group {group:?} is unresponsive ({cause}): {} is locked", lock.display())]
    Unresponsive {
        /// The group.
        group: String,
        /// What asking it brought.
        cause: CallError,
        /// The lock that he holds.
        lock: PathBuf,
    },
    /// The shim could not be moved into its cgroup.
    #[error(transparent)]
    Cgroup(#[from] context::CgroupError),
    /// The group has living tasks, whose shim is gone, and they could not be taken over.
    #[error("adopt tasks of group {group:?}: {cause}")]
    Adopt {
        /// The group.
        group: String,
        /// Why not.
        cause: adopt::Refused,
    },
    /// The daemon said why it does not come up, or nothing.
    #[error("shim did not come up: {0}")]
    Daemon(String),
    /// A call and a path.
    #[error("{verb} {}: {cause}", path.display())]
    Io {
        /// What was tried.
        verb: &'static str,
        /// With what.
        path: PathBuf,
        /// The kernel's answer.
        cause: io::Error,
    },
}

fn failed(verb: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StartError {
    let path = path.to_owned();
    move |cause| StartError::Io { verb, path, cause }
}

/// Does it. The address goes to `out` last, and that it arrives is part of it: a shim of which
/// nobody heard would be left for ever.
pub fn run(mut flags: Flags, out: &mut impl Write) -> Result<(), StartError> {
    let bundle = env::current_dir().map_err(StartError::NoBundle)?;
    let group = read_group(&bundle, &flags)?;
    let mut input = Vec::new();
    // Unreadable counts as empty, as everything else about it.
    let _ = io::stdin().take(MAX_INPUT).read_to_end(&mut input);
    let input = bootstrap::parse(&input, &flags);
    if flags.address.is_empty() {
        flags.address = input.grpc_address.clone().unwrap_or_default();
    }

    let folder = input
        .socket_dir
        .clone()
        .unwrap_or_else(|| PathBuf::from(paths::SOCKET_DIR));
    let socket = paths::socket(&folder, &flags.address, flags.namespace.as_str(), &group);
    if socket.as_os_str().len() > socket::MAX_PATH {
        return Err(StartError::LongPath(socket));
    }
    socket::ensure_folder(&folder).map_err(failed("make folder", &folder))?;
    let address = format!("unix://{}", socket.display());
    let mut claimed = claim(&socket, &flags, &group)?;
    if matches!(claimed, Claim::Ours(_)) && adopt::has_living(&socket) {
        // The group's shim has died and its tasks have not: a shim that begins anew would forget
        // them. The lock goes to the one that takes them over.
        drop(claimed);
        failpoint!("start.adopt.before");
        adopt_group(&socket, &flags, &group)?;
        failpoint!("start.adopt.after");
        claimed = claim(&socket, &flags, &group)?;
    }
    match claimed {
        Claim::Served(version) => {
            write_address(&bundle, &address, version)?;
            failpoint!("start.served.before");
            say(out, &answer(&address, version))
        }
        Claim::Ours(lock) => {
            let launch = Launch {
                flags: &flags,
                group: &group,
                bundle: &bundle,
                socket: &socket,
                address: &address,
            };
            launch.run(lock, &input, out)
        }
    }
}

fn adopt_group(socket: &Path, flags: &Flags, group: &str) -> Result<(), StartError> {
    let flags = Flags {
        group: Some(group.to_owned()),
        ..flags.clone()
    };
    // A supervisor may have given the group up, and kept what it had.
    let run_dir = Path::new(supervision::RUN_DIR);
    let (names, kept) = supervision::fetch(run_dir, socket, supervision::PATIENCE)
        .into_iter()
        .unzip();
    let adoption = Adoption {
        socket: socket.to_owned(),
        record: None,
        predecessor: None,
        descriptors: names,
        observed: Vec::new(),
    };
    adopt::launch(&flags, &adoption, kept)
        .map(drop)
        .map_err(|cause| StartError::Adopt {
            group: group.to_owned(),
            cause,
        })
}

fn say(out: &mut impl Write, address: &str) -> Result<(), StartError> {
    out.write_all(address.as_bytes())
        .and_then(|()| out.flush())
        .map_err(failed("print", Path::new(address)))
}

// ---- which group ----

fn read_group(bundle: &Path, flags: &Flags) -> Result<String, StartError> {
    let path = bundle.join("config.json");
    let cause = match read_file(&path, read::MAX_FILE) {
        Seen::Present(bytes) => match group_of(&bytes, flags.id.as_str()) {
            Ok(group) => return Ok(group),
            Err(why) => why,
        },
        Seen::Absent => "no such file".into(),
        Seen::Unknown(why) => why,
    };
    Err(StartError::Config { path, cause })
}

/// The group of a container: the first grouping annotation that is there, else its id.
fn group_of(config: &[u8], id: &str) -> Result<String, String> {
    Ok(Config::parse(config)?.group().unwrap_or(id).to_owned())
}

// ---- who serves it ----

enum Claim {
    /// A shim serves the group already, in this version of the task API.
    Served(u8),
    /// We are responsible, and nothing is at the socket's path.
    Ours(File),
}

fn claim(socket: &Path, flags: &Flags, group: &str) -> Result<Claim, StartError> {
    let beside = Beside::of(socket);
    let deadline = Instant::now() + HOLDER_ANSWERS;
    loop {
        match lock::attempt(&beside.lock).map_err(failed("lock", &beside.lock))? {
            Attempt::Taken(lock) => {
                failpoint!("start.lock.after");
                let claim = claim_locked(socket, flags, group, lock);
                if !matches!(claim, Ok(Claim::Ours(_))) {
                    // A stock shim's group, or no group at all: leave no file of ours.
                    let _ = fs::remove_file(&beside.lock);
                }
                return claim;
            }
            Attempt::Held => {
                let now = Instant::now();
                let wait = (now + STRANGER_ANSWERS).min(deadline);
                let cause = match ask(socket, flags, wait) {
                    Ok(version) => return Ok(Claim::Served(version)),
                    Err(cause) => cause,
                };
                if now >= deadline {
                    let (group, lock) = (group.to_owned(), beside.lock);
                    return Err(StartError::Unresponsive { group, cause, lock });
                }
                // He may be gone by now, or not listening yet.
                thread::sleep(Duration::from_millis(20));
            }
        }
    }
}

/// Nobody of ours is responsible: what is at the path is a stock shim's, or stale.
fn claim_locked(
    socket: &Path,
    flags: &Flags,
    group: &str,
    lock: File,
) -> Result<Claim, StartError> {
    match fs::symlink_metadata(socket) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Claim::Ours(lock)),
        Err(e) => return Err(failed("look at", socket)(e)),
        Ok(meta) if !meta.file_type().is_socket() => {
            return Err(StartError::NotASocket(socket.to_owned()));
        }
        Ok(_) => {}
    }
    match ask(socket, flags, Instant::now() + STRANGER_ANSWERS) {
        Ok(version) => return Ok(Claim::Served(version)),
        Err(CallError::NobodyListens(_)) => {}
        // A supervisor keeps the listener of a shim that died: its successor is to have it.
        Err(_) if adopt::has_living(socket) => return Ok(Claim::Ours(lock)),
        // A stock shim that is slow has tasks, which nobody would find without its socket.
        Err(cause) if listener_lives(socket) => {
            let (group, socket) = (group.to_owned(), socket.to_owned());
            return Err(StartError::Slow {
                group,
                cause,
                socket,
            });
        }
        Err(_) => {}
    }
    failpoint!("start.stale.before");
    match fs::remove_file(socket) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(failed("remove", socket)(e)),
        Ok(()) | Err(_) => {
            failpoint!("start.stale.after");
            Ok(Claim::Ours(lock))
        }
    }
}

/// Whoever listens there lives, as far as can be told.
fn listener_lives(socket: &Path) -> bool {
    match shim_client::listener_of(socket) {
        Err(CallError::NobodyListens(_)) => false,
        // Its queue is full, for one.
        Err(_) => true,
        Ok(pid) => match Proc::new("/proc").stat(pid) {
            Seen::Present(stat) => stat.alive(),
            Seen::Absent => false,
            Seen::Unknown(_) => true,
        },
    }
}

/// Asks whoever listens at `socket` to take this task on; what he answers in is the version of the
/// task API that he has. One of ours then stays until the task comes, even if he was about to
/// leave, or refuses because he has left.
fn ask(socket: &Path, flags: &Flags, deadline: Instant) -> Result<u8, CallError> {
    ShimClient::connect(socket, flags.namespace.as_str(), deadline)?.join(flags.id.as_str())
}

// ---- what containerd reads later ----

/// `address` is what 1.x reads, and 2.x when there is no `bootstrap.json`. The stock shim of 2.x
/// no longer writes it, and its tasks die when containerd is downgraded. `bootstrap.json` is what
/// containerd 2.x writes itself from our answer; written here too, it is there even if containerd
/// dies before it has come to that.
fn write_address(bundle: &Path, address: &str, version: u8) -> Result<(), StartError> {
    replace(bundle, "address", address.as_bytes())?;
    failpoint!("start.address.between");
    replace(bundle, "bootstrap.json", json(address, version).as_bytes())
}

/// As containerd 2.x writes it.
pub fn json(address: &str, version: u8) -> String {
    let address = serde_json::Value::from(address);
    format!("{{\"version\":{version},\"address\":{address},\"protocol\":\"ttrpc\"}}")
}

/// What goes to standard output. Only for a group that a stock shim of 2.x serves, which has
/// version 3 alone, it is not plain text: no containerd that takes plain text can talk to that
/// shim, and 2.x has to be told.
fn answer(address: &str, version: u8) -> String {
    if version == 2 {
        address.to_owned()
    } else {
        json(address, version)
    }
}

/// Whole or not at all: containerd may read while we write.
fn replace(bundle: &Path, name: &str, bytes: &[u8]) -> Result<(), StartError> {
    let path = bundle.join(name);
    let temporary = bundle.join(format!(".{name}"));
    let _ = fs::remove_file(&temporary);
    let written = fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o644)
        .open(&temporary)
        .and_then(|mut file| file.write_all(bytes))
        .and_then(|()| {
            failpoint!("start.address.written");
            fs::rename(&temporary, &path)
        });
    written.map_err(|cause| {
        let _ = fs::remove_file(&temporary);
        failed("write", &path)(cause)
    })
}

fn remove_address(bundle: &Path) {
    for name in ["address", "bootstrap.json"] {
        let _ = fs::remove_file(bundle.join(name));
    }
}

// ---- the daemon ----

struct Launch<'a> {
    flags: &'a Flags,
    group: &'a str,
    bundle: &'a Path,
    socket: &'a Path,
    address: &'a str,
}

impl Launch<'_> {
    fn run(&self, lock: File, input: &Input, out: &mut impl Write) -> Result<(), StartError> {
        let mut daemon = None;
        let result = self.try_run(&lock, input, &mut daemon).and_then(|()| {
            failpoint!("start.answer.before");
            say(out, self.address)
        });
        failpoint!("start.answer.after");
        if result.is_err() {
            if let Some(mut daemon) = daemon {
                // It has no tasks yet, so nothing is lost. It is our child and not reaped: the
                // number is its own.
                let _ = daemon.kill();
                let _ = daemon.wait();
            }
            remove_address(self.bundle);
            remains::remove_group(self.socket, Unsent::Keep);
        }
        // After a success the daemon has the only other duplicate of the lock.
        drop(lock);
        result
    }

    fn try_run(
        &self,
        lock: &File,
        input: &Input,
        daemon: &mut Option<Child>,
    ) -> Result<(), StartError> {
        let options = Options::from_request(input.options.as_ref());
        failpoint!("start.bind.before");
        let listener = socket::bind(self.socket).map_err(failed("bind", self.socket))?;
        failpoint!("start.bind.after");
        write_address(self.bundle, self.address, 2)?;
        let (told, tells) = io::pipe().map_err(failed("make pipe for", self.socket))?;
        failpoint!("start.spawn.before");
        let child = daemon.insert(self.spawn(listener, lock, tells.into(), input)?);
        let pid = child.id();
        failpoint!("start.spawn.after");
        // Options that are no good will be refused by Create, in the words that its caller reads;
        // here they matter only if they say where the shim belongs.
        if let Ok(options) = options
            && !options.shim_cgroup.is_empty()
        {
            context::join_shim_cgroup(&Roots::default(), pid, &options.shim_cgroup)?;
        }
        context::adjust_oom_score(&Roots::default(), nix::unistd::getppid().as_raw(), pid);
        failpoint!("start.surroundings.after");
        await_ready(told.into(), child)
    }

    fn spawn(
        &self,
        listener: UnixListener,
        lock: &File,
        tells: OwnedFd,
        input: &Input,
    ) -> Result<Child, StartError> {
        let exe = env::current_exe().map_err(failed("find", Path::new("/proc/self/exe")))?;
        let mut command = Command::new(&exe);
        command
            .args(self.flags.of_daemon(self.group))
            .current_dir(self.bundle)
            // containerd's own line to systemd: runc would speak on it (go-runc drops it too).
            .env_remove("NOTIFY_SOCKET")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        if env::var_os(TTRPC_ADDRESS).is_none()
            && let Some(address) = &input.ttrpc_address
        {
            command.env(TTRPC_ADDRESS, address);
        }
        let lock = OwnedFd::from(
            lock.try_clone()
                .map_err(failed("duplicate lock of", self.socket))?,
        );
        let files = [&OwnedFd::from(listener), &lock, &tells];
        let core = env::var_os("SCHED_CORE").is_some_and(|value| !value.is_empty());
        sys::give(&mut command, &files, core).map_err(failed("prepare", &exe))?;
        command.spawn().map_err(failed("execute", &exe))
    }
}

/// Waits for the daemon's word.
fn await_ready(told: OwnedFd, daemon: &mut Child) -> Result<(), StartError> {
    const LONGEST: u64 = 4096;
    let deadline = Instant::now() + DAEMON_READY;
    let mut said = Vec::new();
    let mut told = File::from(told);
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        let mut fds = [PollFd::new(
            std::os::fd::AsFd::as_fd(&told),
            PollFlags::POLLIN,
        )];
        match poll(&mut fds, timeout) {
            Ok(0) => {
                let seconds = DAEMON_READY.as_secs();
                return Err(StartError::Daemon(format!("not ready after {seconds} s")));
            }
            Ok(_) => {}
            Err(nix::errno::Errno::EINTR) => continue,
            Err(e) => return Err(StartError::Daemon(e.to_string())),
        }
        let mut piece = [0; 512];
        match told.read(&mut piece) {
            Ok(0) => break,
            Ok(n) => said.extend_from_slice(piece.get(..n).unwrap_or_default()),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(StartError::Daemon(e.to_string())),
        }
        if said.len() as u64 > LONGEST {
            break;
        }
    }
    match String::from_utf8_lossy(&said).trim() {
        READY => Ok(()),
        // It closed the pipe and said nothing: it is gone, or about to go.
        "" => Err(StartError::Daemon(match daemon.wait() {
            Ok(status) => format!("it ended with {status}"),
            Err(e) => e.to_string(),
        })),
        why => Err(StartError::Daemon(why.to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_group_is_the_first_annotation_or_the_id() {
        for (config, group) in [
            (
                r#"{"annotations":{"io.containerd.runc.v2.group":"g","io.kubernetes.cri.sandbox-id":"s"}}"#,
                "g",
            ),
            (
                r#"{"ociVersion":"1.0.2","annotations":{"io.kubernetes.cri.sandbox-id":"s","x":"y"}}"#,
                "s",
            ),
            (
                r#"{"annotations":{"other":"x"},"process":{"args":["/bin/sh"]}}"#,
                "c1",
            ),
            (r#"{"annotations":null}"#, "c1"),
            ("{}", "c1"),
        ] {
            assert_eq!(
                group_of(config.as_bytes(), "c1").unwrap(),
                group,
                "{config}"
            );
        }
        for broken in [
            "",
            "{",
            "7",
            r#"{"annotations":{"io.kubernetes.cri.sandbox-id":7}}"#,
        ] {
            assert!(group_of(broken.as_bytes(), "c1").is_err(), "{broken}");
        }
    }

    #[test]
    fn both_generations_of_containerd_find_the_address_in_the_bundle() {
        let dir = tempfile::tempdir().unwrap();
        write_address(dir.path(), "unix:///run/s/0", 3).unwrap();
        write_address(dir.path(), "unix:///run/s/1", 2).unwrap();
        let read = |name| fs::read_to_string(dir.path().join(name)).unwrap();
        assert_eq!(read("address"), "unix:///run/s/1");
        assert_eq!(
            read("bootstrap.json"),
            r#"{"version":2,"address":"unix:///run/s/1","protocol":"ttrpc"}"#
        );
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
        remove_address(dir.path());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}

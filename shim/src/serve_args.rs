//! What the daemon is given by `start`, on the command line and as descriptors.
//!
//! | descriptor | what |
//! | --- | --- |
//! | 3 | the listening socket, bound at its final path |
//! | 4 | `<socket>.lock`, locked |
//! | 5 | a pipe to `start`: a line of the daemon's fate |

use std::{
    env,
    fs::{self, File},
    io::{self, Write},
    os::{
        fd::OwnedFd,
        unix::{fs::FileTypeExt, net::UnixListener},
    },
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use nix::sys::socket::{getsockopt, sockopt::AcceptConn};
use recoverd_common::{
    ids::{Id, Namespace},
    paths::Beside,
    shim_client::{CallError, ShimClient},
};

use crate::{
    args::Flags,
    lock::{self, Attempt},
    socket, sys,
};

/// How long connecting may take, to find out whether somebody listens.
const LISTENS: Duration = Duration::from_millis(100);

/// What `start` is told before it closes the pipe as the sign that all is well.
pub const READY: &str = "ready";

/// Everything that a daemon begins with.
#[derive(Debug)]
pub struct ServeArgs {
    /// containerd's namespace.
    pub namespace: Namespace,
    /// The task that the daemon was started for, the first of its group.
    pub id: Id,
    /// The group; equal to `id` unless an annotation says otherwise.
    pub group: String,
    /// containerd's grpc address, without scheme: whose shim this is.
    pub grpc_address: String,
    /// containerd logs at debug level.
    pub debug: bool,
    /// The working directory: the bundle of the first task.
    pub bundle: PathBuf,
    /// Where the listener is bound.
    pub socket: PathBuf,
    /// Listens already; close-on-exec.
    pub listener: UnixListener,
    /// Locked already; close-on-exec. Keep it open for life and never duplicate it.
    pub lock: File,
    /// Tells `start` whether the daemon has come up.
    pub readiness: Readiness,
}

/// The daemon's word to `start`, which answers containerd only after it. Dropped without a word
/// (a crash), it makes `start` fail.
#[derive(Debug)]
pub struct Readiness(Option<File>);

impl Readiness {
    /// The daemon serves. After this `start` prints the address and exits. An error means that
    /// `start` is gone and containerd will never hear of this daemon: it should end.
    pub fn ready(self) -> io::Result<()> {
        self.say(READY)
    }

    /// The daemon gives up; `start` fails with this text and removes socket and record.
    pub fn failed(self, why: &str) {
        // If nobody listens, nobody wants to know.
        let _ = self.say(why);
    }

    fn say(self, text: &str) -> io::Result<()> {
        match self.0 {
            Some(mut pipe) => pipe.write_all(text.as_bytes()),
            // Started by hand.
            None => Ok(()),
        }
    }
}

/// Why a daemon cannot begin.
#[derive(Debug, thiserror::Error)]
pub enum ServeArgsError {
    /// Started by hand.
    #[error(
        "descriptor 3 is not a listening unix socket (containerd runs `start`, which makes it; or give -socket PATH)"
    )]
    NoListener,
    /// The listener has no path.
    #[error("the listening socket has no path")]
    NoPath,
    /// As it says.
    #[error("another shim is responsible for {}", .0.display())]
    Responsible(PathBuf),
    /// A path and what the kernel says.
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

impl ServeArgs {
    /// Takes over what `start` left. Call it once, first thing in the daemon.
    pub fn take(flags: Flags) -> Result<Self, ServeArgsError> {
        let given = [sys::inherited(3), sys::inherited(4), sys::inherited(5)];
        let [listener, lock, pipe] = given;
        let bundle = env::current_dir().map_err(failed("find", Path::new(".")))?;
        let (socket, listener, lock) = match &flags.socket {
            Some(path) => {
                let beside = Beside::of(path);
                let lock =
                    match lock::attempt(&beside.lock).map_err(failed("lock", &beside.lock))? {
                        Attempt::Taken(lock) => lock,
                        Attempt::Held => return Err(ServeArgsError::Responsible(path.clone())),
                    };
                let listener = take_place(path, flags.namespace.as_str()).inspect_err(|_| {
                    // Not responsible after all: leave no file of ours.
                    let _ = fs::remove_file(&beside.lock);
                })?;
                (path.clone(), listener, lock)
            }
            None => {
                let listener = listener
                    .filter(is_listening)
                    .ok_or(ServeArgsError::NoListener)?;
                let listener = UnixListener::from(listener);
                let socket = listener
                    .local_addr()
                    .ok()
                    .and_then(|address| address.as_pathname().map(PathBuf::from))
                    .ok_or(ServeArgsError::NoPath)?;
                let lock = match lock {
                    Some(lock) => File::from(lock),
                    None => {
                        let path = Beside::of(&socket).lock;
                        match lock::attempt(&path).map_err(failed("lock", &path))? {
                            Attempt::Taken(lock) => lock,
                            Attempt::Held => return Err(ServeArgsError::Responsible(socket)),
                        }
                    }
                };
                (socket, listener, lock)
            }
        };
        Ok(Self {
            group: flags.group().to_owned(),
            namespace: flags.namespace,
            id: flags.id,
            grpc_address: flags.address,
            debug: flags.debug,
            bundle,
            socket,
            listener,
            lock,
            readiness: Readiness(pipe.map(File::from)),
        })
    }
}

fn failed(verb: &'static str, path: &Path) -> impl FnOnce(io::Error) -> ServeArgsError {
    let path = path.to_owned();
    move |cause| ServeArgsError::Io { verb, path, cause }
}

/// Binds `path` for whoever has its lock, over a stale socket if there is one.
fn take_place(path: &Path, namespace: &str) -> Result<UnixListener, ServeArgsError> {
    // A stock shim holds no lock, but it listens.
    match ShimClient::connect(path, namespace, Instant::now() + LISTENS) {
        Err(CallError::NobodyListens(_)) => {}
        Ok(_) | Err(_) => return Err(ServeArgsError::Responsible(path.to_owned())),
    }
    match fs::symlink_metadata(path) {
        Ok(meta) if meta.file_type().is_socket() => {
            fs::remove_file(path).map_err(failed("remove", path))?;
        }
        // Bind will say what it thinks of whatever else is there.
        Ok(_) | Err(_) => {}
    }
    socket::bind(path).map_err(failed("bind", path))
}

fn is_listening(fd: &OwnedFd) -> bool {
    getsockopt(fd, AcceptConn).unwrap_or(false)
}

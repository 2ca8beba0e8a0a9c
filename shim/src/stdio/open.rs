//! Opens what a process is to have as its stdin, stdout and stderr.

use std::{
    fs, io,
    os::{fd::OwnedFd, unix::fs::FileTypeExt},
    path::{Path, PathBuf},
};

use nix::{
    fcntl::{FcntlArg, OFlag, fcntl},
    sys::epoll::Epoll,
    unistd::pipe2,
};

use super::{
    Held, Stdio,
    logger::{start_copier, start_logger},
    pipes::{Hold, open_fifo, own, reopen, set_nonblocking, two_way_pipe},
    relay::RelayKind,
    target::Target,
};
use crate::{
    children::ChildFile,
    service::{Key, StdioWish},
};

/// A fifo holds this much, bytes, if the memory limit does not say less.
const FIFO_SIZE: u64 = 1 << 20;

/// What is known before a process is started.
#[derive(Debug)]
pub struct Wanted<'a> {
    /// Whose.
    pub key: &'a Key,
    /// What was asked for.
    pub wish: &'a StdioWish,
    /// CloseIO came before the start.
    pub stdin_closed: bool,
    /// The task's bundle.
    pub bundle: &'a Path,
    /// containerd's namespace.
    pub namespace: &'a str,
    /// Owner of the pipes and fifos.
    pub owner: (u32, u32),
    /// The container's memory limit, bytes.
    pub memory_limit: Option<u64>,
}

impl Wanted<'_> {
    /// Makes a pipe or fifo as large as it may be: what it holds counts against the memory limit
    /// of its writer, and a larger one means fewer turns.
    pub(super) fn size(&self, pipe: &OwnedFd) {
        let size = self
            .memory_limit
            .map_or(FIFO_SIZE, |limit| FIFO_SIZE.min(limit / 16).max(4096));
        // Refused above pipe-max-size without CAP_SYS_RESOURCE: then it stays as it is.
        if let Ok(size) = i32::try_from(size) {
            let _ = fcntl(pipe, FcntlArg::F_SETPIPE_SZ(size));
        }
    }
}

/// What the process's starter gets.
#[derive(Debug)]
pub struct Opened {
    /// For 0, 1, 2; after them, when there is a logger to wait for, its two pipes.
    pub files: Vec<ChildFile>,
    /// A new logger has to be waited for.
    pub wait_for_logger: bool,
    /// It has to say a word; closing its pipe, as it does when it dies, does not count.
    pub logger_says: bool,
    /// The console socket, relative to the bundle.
    pub console: Option<PathBuf>,
}

impl Stdio {
    /// Opens what `wanted` asks for. After an error nothing of it is left open.
    pub fn open(&mut self, wanted: &Wanted<'_>, epoll: &Epoll) -> Result<Opened, String> {
        let result = self.try_open(wanted, epoll);
        if result.is_err() {
            self.close(wanted.key, 0);
        }
        result
    }

    fn try_open(&mut self, wanted: &Wanted<'_>, epoll: &Epoll) -> Result<Opened, String> {
        let mut held = Held::default();
        let wish = wanted.wish;
        let stdin = if wish.stdin.is_empty() {
            None
        } else {
            Some(
                open_fifo(&wish.stdin, wanted.owner)
                    .map_err(|e| format!("open stdin {}: {e}", wish.stdin))?,
            )
        };
        let target = Target::parse(&wish.stdout)?;
        let mut opened = Opened {
            files: vec![ChildFile::Null, ChildFile::Null, ChildFile::Null],
            wait_for_logger: false,
            logger_says: false,
            console: None,
        };
        let mut relays = Vec::new();
        if wish.terminal {
            // A terminal has one output; stderr is not used, as with the stock shim.
            held.output = match target {
                Target::None => None,
                // The client's own, or one that anybody may have put there: looked at either way.
                Target::Path(path) if is_fifo(&path)? => Some(
                    open_fifo(&path, wanted.owner)
                        .map_err(|e| format!("open {}: {e}", path.display()))?,
                ),
                Target::Path(path) => {
                    let write = start_copier(&mut held, wanted, path, false, &mut opened)?;
                    set_nonblocking(&write);
                    Some(write)
                }
                Target::File(path) => {
                    let write = start_copier(&mut held, wanted, path, true, &mut opened)?;
                    set_nonblocking(&write);
                    Some(write)
                }
                Target::Binary(argv) => {
                    let (write, _) = start_logger(&mut held, wanted, argv, &mut opened)?;
                    set_nonblocking(&write);
                    Some(write)
                }
            };
            held.input = stdin;
            let (console, name) = self
                .listen(wanted.bundle, epoll)
                .map_err(|e| format!("make console socket: {e}"))?;
            opened.console = Some(name.clone());
            held.console = Some((console.0, console.1, wanted.bundle.join(name)));
        } else {
            if let Some(fifo) = stdin {
                let (theirs, ours) =
                    pipe2(OFlag::O_CLOEXEC).map_err(|e| format!("make pipe: {e}"))?;
                own(&theirs, wanted.owner);
                wanted.size(&fifo);
                wanted.size(&ours);
                set_nonblocking(&ours);
                relays.push((fifo, Some(ours), RelayKind::Input(wanted.stdin_closed)));
                set_file(&mut opened, 0, ChildFile::Fd(theirs));
            }
            match target {
                Target::Binary(argv) => {
                    let (out, err) = start_logger(&mut held, wanted, argv, &mut opened)?;
                    set_file(&mut opened, 1, ChildFile::Fd(out));
                    set_file(&mut opened, 2, ChildFile::Fd(err));
                }
                Target::File(path) => {
                    // Not the file itself: who writes to /dev/stdout opens it again, and would cut
                    // it off; and a mapped root may not open it.
                    let out = start_copier(&mut held, wanted, path, true, &mut opened)?;
                    let err = out.try_clone().map_err(|e| format!("make pipe: {e}"))?;
                    set_file(&mut opened, 1, ChildFile::Fd(out));
                    set_file(&mut opened, 2, ChildFile::Fd(err));
                }
                Target::None | Target::Path(_) => {
                    for (at, name) in [(1, &wish.stdout), (2, &wish.stderr)] {
                        let file = match Target::parse(name)? {
                            Target::None => ChildFile::Null,
                            Target::Path(path) => output(&path, wanted, &mut held, &mut relays)?,
                            Target::File(_) | Target::Binary(_) => {
                                return Err(format!("stderr {name} does not go with stdout"));
                            }
                        };
                        set_file(&mut opened, at, file);
                    }
                }
            }
        }
        let key = wanted.key.clone();
        self.held.insert(key.clone(), held);
        for (from, to, kind) in relays {
            self.relay(&key, from, to, kind, epoll)
                .map_err(|e| format!("watch stdio: {e}"))?;
        }
        self.hold_of(&key, wanted.namespace, 0)
            .map_err(|e| format!("hold output: {e}"))?;
        if wanted.stdin_closed {
            // Nothing more will wake it; a client ends stdin after its last write is taken, so
            // what there is, is in the fifo. Nobody can have exited yet: nothing is heard.
            self.close_stdin(&key, epoll);
        }
        Ok(opened)
    }
}

fn set_file(opened: &mut Opened, at: usize, file: ChildFile) {
    if let Some(slot) = opened.files.get_mut(at) {
        *slot = file;
    }
}

/// Whether what is at `path`, which must be there, is a fifo.
pub(super) fn is_fifo(path: &Path) -> Result<bool, String> {
    match fs::metadata(path) {
        Ok(meta) => Ok(meta.file_type().is_fifo()),
        Err(e) => Err(format!("open {}: {e}", path.display())),
    }
}

pub(super) type NewRelay = (OwnedFd, Option<OwnedFd>, RelayKind);

/// One output that is a path: a fifo, or a file that is there.
fn output(
    path: &Path,
    wanted: &Wanted<'_>,
    held: &mut Held,
    relays: &mut Vec<NewRelay>,
) -> Result<ChildFile, String> {
    let failed = |e: io::Error| format!("open {}: {e}", path.display());
    let kind = fs::metadata(path).map_err(failed)?.file_type();
    if kind.is_file() || kind.is_char_device() {
        return Ok(ChildFile::Append {
            path: path.to_owned(),
            create: false,
        });
    }
    let fifo = open_fifo(path, wanted.owner).map_err(failed)?;
    wanted.size(&fifo);
    if wanted.key.is_init() {
        // Another opening, so that its flags are its own: the container's writes wait.
        let theirs = reopen(&fifo, true, true, OFlag::empty()).map_err(failed)?;
        held.holds.push(Hold {
            fifo,
            last_words: false,
        });
        Ok(ChildFile::Fd(theirs))
    } else {
        let (read, write) = two_way_pipe(wanted.owner).map_err(|e| format!("make pipe: {e}"))?;
        wanted.size(&read);
        set_nonblocking(&read);
        relays.push((read, Some(fifo), RelayKind::Output));
        Ok(ChildFile::Fd(write))
    }
}

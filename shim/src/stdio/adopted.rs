//! The stdio of a process that another shim has started. `/proc/<pid>/fd` gives back a pipe whose
//! other end has died; a client's fifo has a name; only a terminal cannot be had again, unless its
//! master was taken from the predecessor before that ended.
//!
//! | it has | and wished | then |
//! | --- | --- | --- |
//! | the fifo itself | the fifo | a write end is kept, as always |
//! | a pipe of its shim's | a fifo, a file | its read end again, spliced there |
//! | a pipe of its shim's | a logger that lives | its read end, in case the logger dies |
//! | a pipe that a stranger reads | anything | nothing: a stock shim's logger, say, is not known |
//! | a pipe of its shim's | what is gone, or nothing known | it is read and dropped |
//! | something else | anything | it has gone its own way: nothing |
//!
//! A pipe is the shim's, and no pipeline within the container, if the process has it read-write (as
//! we make them), if nobody reads it, or if the predecessor had an end of it.

use std::{
    fs::{self, File, Metadata},
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
};

use nix::{
    fcntl::OFlag,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::epoll::Epoll,
};

use super::{
    Copies, Held, Hold, Logger, Opened, RelayKind, Stdio, Target, Wanted,
    logger::start_copier,
    open::{NewRelay, is_fifo},
    pipes::open_fifo,
    set_nonblocking,
};
use crate::{adopt::Loot, supervised::Tell};

/// A process that lives, and what is known of its stdio.
#[derive(Debug)]
pub struct Living<'a> {
    /// What was asked for.
    pub wanted: Wanted<'a>,
    /// The process.
    pub pid: u32,
    /// Its logger, if it lives.
    pub logger: Option<Logger>,
}

/// One of a process's descriptors, from outside.
struct Theirs {
    path: PathBuf,
    info: PathBuf,
    meta: Metadata,
}

impl Theirs {
    fn look(proc: &Path, pid: u32, number: u32) -> Option<Self> {
        let path = proc.join(format!("{pid}/fd/{number}"));
        let meta = fs::metadata(&path).ok()?;
        let info = proc.join(format!("{pid}/fdinfo/{number}"));
        Some(Self { path, info, meta })
    }

    fn id(&self) -> (u64, u64) {
        (self.meta.dev(), self.meta.ino())
    }

    /// A pipe without a name.
    fn is_pipe(&self) -> bool {
        let target = fs::read_link(&self.path).unwrap_or_default();
        self.meta.file_type().is_fifo() && target.to_string_lossy().starts_with("pipe:")
    }

    /// A pipe that its shim has made.
    fn is_of_shim(&self, loot: &Loot) -> bool {
        self.is_pipe() && (self.is_two_way() || loot.has_pipe(self.id()) || self.is_unread())
    }

    /// Somebody reads this pipe who is neither the process itself nor the predecessor: two readers
    /// would take each other's bytes.
    fn is_read_by_a_stranger(&self, loot: &Loot) -> bool {
        !self.is_two_way() && !loot.reads_pipe(self.id()) && !self.is_unread()
    }

    fn is_two_way(&self) -> bool {
        let text = fs::read_to_string(&self.info).unwrap_or_default();
        let flags = text.lines().find_map(|line| line.strip_prefix("flags:"));
        let flags = flags.and_then(|flags| i32::from_str_radix(flags.trim(), 8).ok());
        flags.is_some_and(|flags| flags & libc::O_ACCMODE == libc::O_RDWR)
    }

    fn is_unread(&self) -> bool {
        let Ok(writer) = self.open(false) else {
            return false;
        };
        let mut wait = [PollFd::new(writer.as_fd(), PollFlags::POLLOUT)];
        let _ = poll(&mut wait, PollTimeout::ZERO);
        let [entry] = &wait;
        let seen = entry.revents().unwrap_or(PollFlags::empty());
        seen.contains(PollFlags::POLLERR)
    }

    fn open(&self, read: bool) -> std::io::Result<OwnedFd> {
        File::options()
            .read(read)
            .write(!read)
            .custom_flags(OFlag::O_NONBLOCK.bits())
            .open(&self.path)
            .map(OwnedFd::from)
    }
}

/// Where the bytes of a pipe go.
enum To {
    /// Kept as it is: the process has the fifo itself.
    Hold(OwnedFd),
    /// There.
    Copy(OwnedFd),
    /// To the logger, which reads the pipe itself.
    Logger,
    /// Nowhere; why.
    Nowhere(String),
    /// Nothing is to be done.
    Nothing,
}

impl Stdio {
    /// Takes over what a process of a predecessor reads and writes; gives what could not be had
    /// again, one line each.
    pub fn adopt(
        &mut self,
        living: Living<'_>,
        loot: &mut Loot,
        proc: &Path,
        epoll: &Epoll,
    ) -> Vec<String> {
        let mut remarks = Vec::new();
        let wanted = &living.wanted;
        let key = wanted.key.clone();
        if wanted.wish.terminal {
            self.adopt_terminal(&living, loot, proc, epoll, &mut remarks);
            return remarks;
        }
        let mut held = Held {
            logger: living.logger.clone(),
            ..Held::default()
        };
        let mut relays: Vec<NewRelay> = Vec::new();
        if !wanted.wish.stdin.is_empty() && !wanted.stdin_closed {
            match stdin(&living, proc) {
                Ok(relay) => relays.push(relay),
                Err(why) => remarks.push(format!("stdin: {why}")),
            }
        }
        let mut seen = Vec::new();
        let outputs = [
            (1, "stdout", &wanted.wish.stdout),
            (2, "stderr", &wanted.wish.stderr),
        ];
        for (number, name, wish) in outputs {
            let Some(theirs) = Theirs::look(proc, living.pid, number) else {
                continue;
            };
            // `binary://` and `file://` of stdout are of both.
            let uri = match Target::parse(&wanted.wish.stdout) {
                Ok(Target::File(_) | Target::Binary(_)) => &wanted.wish.stdout,
                Ok(Target::None | Target::Path(_)) | Err(_) => wish,
            };
            let of_shim = theirs.is_of_shim(loot);
            if of_shim && seen.contains(&theirs.id()) {
                continue;
            }
            seen.push(theirs.id());
            if of_shim && theirs.is_read_by_a_stranger(loot) {
                continue;
            }
            let to = destination(uri, &theirs, of_shim, &living);
            let to = match to {
                To::Nothing => continue,
                To::Hold(fifo) => {
                    held.holds.push(Hold {
                        fifo,
                        last_words: false,
                    });
                    continue;
                }
                other => other,
            };
            let from = match theirs.open(true) {
                Ok(from) => from,
                Err(e) => {
                    remarks.push(format!("{name}: open pipe of process {}: {e}", living.pid));
                    continue;
                }
            };
            match to {
                To::Copy(to) => relays.push((from, Some(to), RelayKind::Output)),
                To::Logger => {
                    if let Ok(Target::File(path)) = Target::parse(uri) {
                        held.copies = Some(Copies::new(path, true));
                    }
                    held.logged.push(from);
                }
                To::Nowhere(why) => {
                    remarks.push(format!("{name} is read and dropped: {why}"));
                    relays.push((from, None, RelayKind::Output));
                }
                To::Hold(_) | To::Nothing => {}
            }
        }
        self.held.insert(key.clone(), held);
        for (from, to, kind) in relays {
            if let Err(e) = self.relay(&key, from, to, kind, epoll) {
                remarks.push(format!("watch stdio: {e}"));
            }
        }
        remarks
    }

    /// Goes on with pipes that the predecessor carried, as its record says (see
    /// [`Stdio::carried`]), where somebody has kept them: of a process that has ended, that is all
    /// that is left of its output.
    pub fn carry_on(
        &mut self,
        wanted: &Wanted<'_>,
        carried: &[(u64, u64)],
        loot: &Loot,
        epoll: &Epoll,
    ) -> Vec<String> {
        let mut remarks = Vec::new();
        let key = wanted.key;
        let own = self.carried(key);
        for (pipe, fifo) in carried {
            if own.iter().any(|(own, _)| own == pipe) {
                continue;
            }
            let Some(from) = loot.reader_of(*pipe) else {
                continue;
            };
            let wishes = [&wanted.wish.stdout, &wanted.wish.stderr];
            let mut paths = wishes.into_iter().filter_map(|wish| super::path_of(wish));
            let path = paths.find(|path| fs::metadata(path).is_ok_and(|meta| meta.ino() == *fifo));
            let Some(to) = path.and_then(|path| open_fifo(path, wanted.owner).ok()) else {
                remarks.push("what it wrote last is dropped: its fifo is gone".to_owned());
                continue;
            };
            set_nonblocking(&from);
            self.held.entry(key.clone()).or_default();
            if let Err(e) = self.relay(key, from, Some(to), RelayKind::Output, epoll) {
                remarks.push(format!("watch stdio: {e}"));
            }
        }
        remarks
    }

    /// A process of the predecessor that has ended, and of which nothing is carried on: its last
    /// words wait for their reader with us, and nobody is to keep anything of it any longer.
    pub fn adopt_ended(&mut self, wanted: &Wanted<'_>, carried: &[(u64, u64)]) {
        let key = wanted.key;
        if self.held.contains_key(key) {
            return;
        }
        let member = super::handoff_key(key);
        let kept = ["stdin", "stdin-fifo", "master"];
        let mut names = Vec::from(kept.map(|what| format!("{what}:{member}")));
        names.extend(
            carried
                .iter()
                .map(|(pipe, _)| format!("output:{member}@{pipe}")),
        );
        let mut held = Held::default();
        let wishes = [&wanted.wish.stdout, &wanted.wish.stderr];
        for path in wishes.into_iter().filter_map(|wish| super::path_of(wish)) {
            if let Ok(fifo) = open_fifo(path, wanted.owner) {
                held.holds.extend(super::last_words(fifo));
            }
        }
        if !held.holds.is_empty() {
            self.held.insert(key.clone(), held);
            self.unheld.insert(key.clone());
            self.look_soon();
        }
        self.tell.extend(names.into_iter().map(Tell::Drop));
    }

    fn adopt_terminal(
        &mut self,
        living: &Living<'_>,
        loot: &mut Loot,
        proc: &Path,
        epoll: &Epoll,
        remarks: &mut Vec<String>,
    ) {
        let wanted = &living.wanted;
        let key = wanted.key.clone();
        let master = loot.master_of(proc, living.pid);
        let mut held = Held::default();
        if master.is_some() {
            let wish = wanted.wish;
            held.output = match Target::parse(&wish.stdout) {
                Ok(Target::None) => None,
                Ok(Target::Path(path)) => {
                    let opened = match is_fifo(&path) {
                        Ok(true) => open_fifo(&path, wanted.owner)
                            .map_err(|e| format!("open {}: {e}", path.display())),
                        Ok(false) => copier(&mut held, wanted, path, false),
                        Err(why) => Err(why),
                    };
                    opened.map_err(|why| remarks.push(why)).ok()
                }
                Ok(Target::File(path)) => {
                    let opened = copier(&mut held, wanted, path, true);
                    opened.map_err(|why| remarks.push(why)).ok()
                }
                Ok(Target::Binary(_)) => {
                    remarks.push("output of the terminal is dropped: its logger is gone".into());
                    None
                }
                Err(why) => {
                    remarks.push(why);
                    None
                }
            };
            if !wish.stdin.is_empty() {
                let opened = open_fifo(&wish.stdin, wanted.owner);
                let failed = |e| remarks.push(format!("open stdin {}: {e}", wish.stdin));
                held.input = opened.map_err(failed).ok();
            }
        }
        self.held.insert(key.clone(), held);
        match master {
            None => remarks.push("its terminal has ended with the last process that had it".into()),
            Some(master) => {
                if let Err(e) = self.terminal(&key, master, epoll) {
                    remarks.push(format!("set up terminal: {e}"));
                }
            }
        }
    }
}

/// Whether the stdin of a process has had its end, which its predecessor gave by closing its own
/// side: a stock shim has written down nothing of it. What the process has not read yet of what came
/// before, and the end itself, are in the pipe.
pub fn stdin_has_ended(proc: &Path, pid: u32, loot: &Loot) -> bool {
    Theirs::look(proc, pid, 0)
        .is_some_and(|theirs| theirs.is_pipe() && loot.has_no_writer(theirs.id()))
}

/// A copier that nobody waits for: the process has long started. The predecessor's own ends when
/// it has written what it was given.
fn copier(
    held: &mut Held,
    wanted: &Wanted<'_>,
    path: PathBuf,
    create: bool,
) -> Result<OwnedFd, String> {
    let mut nobody = Opened {
        files: Vec::new(),
        wait_for_logger: false,
        logger_says: false,
        console: None,
    };
    let write = start_copier(held, wanted, path, create, &mut nobody)?;
    set_nonblocking(&write);
    Ok(write)
}

fn stdin(living: &Living<'_>, proc: &Path) -> Result<NewRelay, String> {
    let wanted = &living.wanted;
    let theirs = Theirs::look(proc, living.pid, 0)
        .filter(Theirs::is_pipe)
        .ok_or("the process has something else")?;
    let fifo = open_fifo(&wanted.wish.stdin, wanted.owner)
        .map_err(|e| format!("open {}: {e}", wanted.wish.stdin))?;
    let writer = theirs
        .open(false)
        .map_err(|e| format!("open pipe of process {}: {e}", living.pid))?;
    Ok((fifo, Some(writer), RelayKind::Input(false)))
}

fn destination(uri: &str, theirs: &Theirs, of_shim: bool, living: &Living<'_>) -> To {
    let wanted = &living.wanted;
    let target = match Target::parse(uri) {
        Ok(target) => target,
        Err(why) if of_shim => return To::Nowhere(why),
        Err(_) => return To::Nothing,
    };
    match target {
        Target::None if of_shim => To::Nowhere("where it went is not known".into()),
        Target::None => To::Nothing,
        Target::File(_) if !of_shim => To::Nothing,
        // Our copier outlives its shim, and two would mix up what they read.
        Target::File(_) if living.logger.is_some() => To::Logger,
        Target::File(path) => append(&path).map_or_else(To::Nowhere, To::Copy),
        Target::Binary(_) if !of_shim => To::Nothing,
        Target::Binary(_) if living.logger.is_some() => To::Logger,
        // A stock shim's logger is not known, and a supervisor may have kept a read end of its pipe.
        Target::Binary(_) if !theirs.is_two_way() && !theirs.is_unread() => To::Nothing,
        Target::Binary(_) => To::Nowhere("its logger is gone".into()),
        Target::Path(path) => match fs::metadata(&path) {
            Ok(meta) if meta.file_type().is_fifo() => {
                let opened = open_fifo(&path, wanted.owner)
                    .map_err(|e| format!("open {}: {e}", path.display()));
                match opened {
                    // Also of a process that has gone its own way: its children may have it.
                    Ok(fifo) if !of_shim => To::Hold(fifo),
                    Ok(fifo) => To::Copy(fifo),
                    Err(why) => To::Nowhere(why),
                }
            }
            Ok(_) if !of_shim => To::Nothing,
            Ok(_) => append(&path).map_or_else(To::Nowhere, To::Copy),
            // A fifo without a name has no client.
            Err(_) if of_shim || theirs.meta.file_type().is_fifo() => {
                To::Nowhere(format!("{} does not exist", path.display()))
            }
            Err(_) => To::Nothing,
        },
    }
}

/// With O_APPEND: stdout and stderr go there through two openings. The kernel does not splice to
/// such a file, so its bytes are copied.
fn append(path: &Path) -> Result<OwnedFd, String> {
    File::options()
        .append(true)
        .create(true)
        .mode(0o644)
        .custom_flags(OFlag::O_NONBLOCK.bits())
        .open(path)
        .map(OwnedFd::from)
        .map_err(|e| format!("open {}: {e}", path.display()))
}

//! What a living shim has that should outlive it: found in its table of descriptors, taken by
//! duplicating, told by what the kernel says of each. For what it did not tell us itself, and for
//! stock shims, which tell nothing. Takes no write end of an output: its reader would wait for us
//! too. Of a stock shim none of an input either: it could never ask us to let it go.

use std::{
    collections::BTreeMap,
    fs,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::{FileTypeExt, MetadataExt},
    },
    path::{Path, PathBuf},
};

use nix::sys::{
    socket::{UnixAddr, getsockname, getsockopt, sockopt},
    stat::fstat,
};
use recoverd_common::{
    proc::{Descriptor, Proc},
    record::{Process, Record, Stdio},
    seen::Seen,
    sys,
};

use super::{
    bag::{CONNECTION, LISTENER},
    decide::{Kind, Member},
};

/// More descriptors than any shim has.
const MAX_LOOKED_AT: usize = 4096;

/// A process and where its stdio goes.
#[derive(Debug, Clone)]
pub struct Of {
    /// Which.
    pub member: Member,
    /// It.
    pub process: Process,
    /// As was asked for.
    pub stdio: Stdio,
}

/// The living members of a record.
pub fn members(record: &Record) -> Vec<Of> {
    let mut all = Vec::new();
    for task in &record.tasks {
        let init = (String::new(), task.init, &task.exit, &task.stdio);
        let execs = task
            .execs
            .iter()
            .map(|exec| (exec.id.clone(), exec.process, &exec.exit, &exec.stdio));
        for (exec_id, process, exit, stdio) in std::iter::once(init).chain(execs) {
            let Some(process) = process.filter(|_| exit.is_none()) else {
                continue;
            };
            all.push(Of {
                member: Member {
                    id: task.id.clone(),
                    exec_id,
                },
                process,
                stdio: stdio.clone(),
            });
        }
    }
    all
}

/// What one process has as its first three descriptors.
#[derive(Debug, Default)]
struct Ends {
    /// By file: the key of the member, and which of the three.
    pipes: BTreeMap<(u64, u64), (String, u32)>,
    /// By file system and number.
    terminals: BTreeMap<(u64, u64), String>,
    /// Clients' fifos that are somebody's stdin, by path: the name that they are kept under.
    fifos: BTreeMap<PathBuf, String>,
    /// Pipes that their shim carries on, by inode: the key of the member.
    carried: BTreeMap<u64, String>,
}

impl Ends {
    fn look(proc: &Proc, kind: Kind, members: &[Of]) -> Self {
        let mut ends = Self::default();
        for of in members {
            let key = of.member.key();
            let pid = i32::try_from(of.process.pid).unwrap_or(0);
            for number in 0..3 {
                let path = proc.path(pid, &format!("fd/{number}"));
                let Ok(meta) = fs::metadata(&path) else {
                    continue;
                };
                let file = meta.file_type();
                if file.is_fifo() {
                    let id = (meta.dev(), meta.ino());
                    ends.pipes
                        .entry(id)
                        .or_insert_with(|| (key.clone(), number));
                } else if file.is_char_device() && is_slave(meta.rdev()) {
                    let id = (meta.dev(), u64::from(libc::minor(meta.rdev())));
                    ends.terminals.entry(id).or_insert_with(|| key.clone());
                }
            }
            if kind == Kind::Stock {
                continue;
            }
            for (pipe, _) in &of.stdio.carried {
                ends.carried.insert(*pipe, key.clone());
            }
            let stdin = &of.stdio.stdin;
            if !of.stdio.stdin_closed && stdin.starts_with('/') {
                ends.fifos.insert(stdin.into(), format!("stdin-fifo:{key}"));
            }
        }
        ends
    }
}

/// Unix98 slaves have the majors 136 to 143.
fn is_slave(device: u64) -> bool {
    (136..=143).contains(&libc::major(device))
}

/// Everything worth keeping of the shim `pid`, whose pidfd this is, but for files of which `has`
/// says that they are kept.
pub fn catch_up(
    proc: &Proc,
    kind: Kind,
    (pid, pidfd): (i32, &OwnedFd),
    socket: &Path,
    members: &[Of],
    has: impl Fn(u64) -> bool,
) -> Vec<(String, OwnedFd)> {
    let Seen::Present(descriptors) = proc.descriptors(pid) else {
        return Vec::new();
    };
    let ends = Ends::look(proc, kind, members);
    let mut caught = Vec::new();
    for descriptor in descriptors.into_iter().take(MAX_LOOKED_AT) {
        let target = descriptor.target.to_string_lossy().into_owned();
        let known = inode_in(&target).is_some_and(&has);
        if known || !may_be(kind, &descriptor, &target, &ends) {
            continue;
        }
        let Ok(fd) = sys::pidfd_getfd(pidfd.as_fd(), descriptor.number) else {
            continue;
        };
        let name = match kind {
            Kind::Ours => of_ours(&fd, &target, socket, &ends),
            Kind::Stock => of_stock(&fd, &ends),
        };
        caught.extend(name.map(|name| (name, fd)));
    }
    caught
}

/// `socket:[123]`, `pipe:[123]`.
fn inode_in(target: &str) -> Option<u64> {
    let (_, rest) = target.split_once(":[")?;
    rest.strip_suffix(']')?.parse().ok()
}

/// Looked at by name first: most descriptors need no duplicate.
fn may_be(kind: Kind, descriptor: &Descriptor, target: &str, ends: &Ends) -> bool {
    let pipe = || {
        let inode = inode_in(target);
        let of_member = ends.pipes.keys().any(|(_, ino)| Some(*ino) == inode);
        let carried = inode.is_some_and(|inode| ends.carried.contains_key(&inode));
        target.starts_with("pipe:") && (of_member || carried)
    };
    // A terminal's master is called by whichever multiplexer it was opened through.
    target.contains("ptmx")
        || pipe()
        || (kind == Kind::Ours
            && (target.starts_with("socket:") || ends.fifos.contains_key(&descriptor.target)))
}

fn master(fd: &OwnedFd, ends: &Ends) -> Option<String> {
    let number = sys::terminal_number(fd.as_fd())?;
    let device = fstat(fd).ok()?.st_dev;
    let key = ends.terminals.get(&(device, u64::from(number)))?;
    Some(format!("master:{key}"))
}

/// Which access the descriptor has been opened for.
fn access(fd: &OwnedFd) -> i32 {
    let flags = nix::fcntl::fcntl(fd, nix::fcntl::FcntlArg::F_GETFL).unwrap_or(libc::O_RDONLY);
    flags & libc::O_ACCMODE
}

fn pipe<'a>(fd: &OwnedFd, ends: &'a Ends) -> Option<&'a (String, u32)> {
    let stat = fstat(fd).ok()?;
    ends.pipes.get(&(stat.st_dev, stat.st_ino))
}

fn of_ours(fd: &OwnedFd, target: &str, socket: &Path, ends: &Ends) -> Option<String> {
    if target.starts_with("socket:") {
        let name = getsockname::<UnixAddr>(std::os::fd::AsRawFd::as_raw_fd(fd)).ok()?;
        if name.path() != Some(socket) {
            return None;
        }
        let listens = getsockopt(fd, sockopt::AcceptConn).ok()?;
        return Some(if listens { LISTENER } else { CONNECTION }.to_owned());
    }
    if let Some(name) = ends.fifos.get(Path::new(target)) {
        return Some(name.clone());
    }
    if let Some((key, 0)) = pipe(fd, ends)
        && access(fd) == libc::O_WRONLY
    {
        return Some(format!("stdin:{key}"));
    }
    if target.starts_with("pipe:")
        && let Some(inode) = inode_in(target)
        && let Some(key) = ends.carried.get(&inode)
        && access(fd) == libc::O_RDONLY
    {
        return Some(format!("output:{key}@{inode}"));
    }
    master(fd, ends)
}

/// Read ends of outputs, and masters. Not the client's fifos, nor anything to write into.
fn of_stock(fd: &OwnedFd, ends: &Ends) -> Option<String> {
    if let Some((key, 1 | 2)) = pipe(fd, ends) {
        let inode = fstat(fd).ok()?.st_ino;
        let reads = access(fd) == libc::O_RDONLY;
        return reads.then(|| format!("output:{key}@{inode}"));
    }
    master(fd, ends)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{
        io::{Read, Write},
        os::unix::net::{UnixListener, UnixStream},
        process::{Command, Stdio as Pipe},
    };

    fn of(child: &std::process::Child, proc: &Proc) -> Of {
        let pid = i32::try_from(child.id()).unwrap();
        let Seen::Present(stat) = proc.stat(pid) else {
            panic!()
        };
        Of {
            member: Member {
                id: "a".into(),
                exec_id: String::new(),
            },
            process: Process {
                pid: child.id(),
                start_time: stat.id.start_time,
            },
            stdio: Stdio::default(),
        }
    }

    /// This process is the shim.
    fn names(kind: Kind, socket: &Path, members: &[Of]) -> Vec<(String, OwnedFd)> {
        let proc = Proc::new("/proc");
        let pid = i32::try_from(std::process::id()).unwrap();
        let pidfd = sys::pidfd_open(pid).unwrap();
        catch_up(&proc, kind, (pid, &pidfd), socket, members, |_| false)
    }

    #[test]
    fn of_our_shim_everything_is_found_that_it_would_have_told() {
        let proc = Proc::new("/proc");
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("s");
        let listener = UnixListener::bind(&socket).unwrap();
        let mut client = UnixStream::connect(&socket).unwrap();
        let (accepted, _) = listener.accept().unwrap();
        let fifo = dir.path().join("in");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let _held = fs::File::options()
            .read(true)
            .write(true)
            .open(&fifo)
            .unwrap();
        let mut child = Command::new("cat").stdin(Pipe::piped()).spawn().unwrap();
        let mut of = of(&child, &proc);
        of.stdio.stdin = fifo.display().to_string();
        let mut found = names(Kind::Ours, &socket, &[of.clone()]);
        found.sort_by(|a, b| a.0.cmp(&b.0));
        let told: Vec<&str> = found.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(
            told,
            ["connection", "listener", "stdin-fifo:a/", "stdin:a/"]
        );
        // The very connection, and the very pipe.
        drop(accepted);
        let mut kept = UnixStream::from(found.remove(0).1);
        kept.write_all(b"x").unwrap();
        client.read_exact(&mut [0]).unwrap();
        drop(child.stdin.take());
        assert!(child.try_wait().unwrap().is_none());
        drop(found);
        child.wait().unwrap();
        // CloseIO was called: nothing of it is kept.
        of.stdio.stdin_closed = true;
        let again = names(Kind::Ours, &socket, &[of]);
        assert!(again.iter().all(|(name, _)| !name.starts_with("stdin")));
    }

    #[test]
    fn of_a_stock_shim_only_read_ends_are_taken() {
        let proc = Proc::new("/proc");
        let script = "trap '' PIPE; read line; echo $line; read line";
        let mut child = Command::new("sh")
            .args(["-c", script])
            .stdin(Pipe::piped())
            .stdout(Pipe::piped())
            .spawn()
            .unwrap();
        let of = of(&child, &proc);
        let mut found = names(Kind::Stock, Path::new("/s"), &[of]);
        assert_eq!(found.len(), 1, "{found:?}");
        let (name, fd) = found.remove(0);
        assert!(name.starts_with("output:a/@"), "{name}");
        drop(child.stdout.take());
        child.stdin.as_mut().unwrap().write_all(b"hello\n").unwrap();
        drop(child.stdin.take());
        let mut text = String::new();
        fs::File::from(fd).read_to_string(&mut text).unwrap();
        assert_eq!(text, "hello\n");
        child.wait().unwrap();
    }
}

//! Facts about processes, read below a given `/proc`. Never sends a signal, never opens what a
//! process has open.

use std::{
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

pub use self::threads::Stop;

mod threads;

use crate::{
    read::{absent_or_unknown, read_file, read_text},
    seen::Seen,
};

/// A process that cannot be mistaken for a later one with the same number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ProcessId {
    /// Its number.
    pub pid: i32,
    /// When it started, clock ticks after boot (field 22 of `/proc/<pid>/stat`).
    pub start_time: u64,
}

/// What `/proc/<pid>/stat` says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stat {
    /// Who.
    pub id: ProcessId,
    /// The thread name, at most 15 bytes.
    pub comm: String,
    /// `R`, `S`, `D`, `T` (stopped), `t` (traced), `Z` (zombie), `X` (dead), `I` (idle).
    pub state: char,
    /// The parent's number.
    pub ppid: i32,
    /// User and kernel time together, clock ticks.
    pub cpu_ticks: u64,
    /// Threads.
    pub threads: u32,
    /// Raw wait status of a zombie as root sees it (field 52); 0 otherwise.
    pub exit_code: i32,
}

impl Stat {
    /// True while the process can still run: neither zombie nor dead.
    pub fn alive(&self) -> bool {
        !matches!(self.state, 'Z' | 'X' | 'x')
    }
}

/// Parses the one line of `/proc/<pid>/stat`.
pub fn parse_stat(text: &str) -> Option<Stat> {
    // comm may hold anything, parentheses and spaces too: it ends at the last ')'.
    let (head, tail) = text.trim_end().rsplit_once(')')?;
    let (pid, comm) = head.split_once(" (")?;
    let fields: Vec<&str> = tail.split_ascii_whitespace().collect();
    // fields[0] is field 3 of proc(5).
    let field = |n: usize| fields.get(n.checked_sub(3)?).copied();
    let number = |n: usize| field(n)?.parse::<u64>().ok();
    Some(Stat {
        id: ProcessId {
            pid: pid.parse().ok()?,
            start_time: number(22)?,
        },
        comm: comm.to_owned(),
        state: field(3)?.chars().next()?,
        ppid: field(4)?.parse().ok()?,
        cpu_ticks: number(14)?.saturating_add(number(15)?),
        threads: u32::try_from(number(20)?).ok()?,
        exit_code: field(52).and_then(|f| f.parse().ok()).unwrap_or(0),
    })
}

/// An executable as `/proc/<pid>/exe` names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exe {
    /// The path it was started from, without the kernel's ` (deleted)`.
    pub path: PathBuf,
    /// The file has no name any more.
    pub deleted: bool,
    /// Device and inode of the file that runs.
    pub file: FileId,
}

/// Device and inode: the same file whatever it is called.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct FileId {
    /// `st_dev`.
    pub dev: u64,
    /// `st_ino`.
    pub ino: u64,
}

impl FileId {
    /// Of the entry at `path` itself: a symlink is not followed.
    pub fn of_entry(path: &Path) -> Seen<Self> {
        match fs::symlink_metadata(path) {
            Ok(meta) => Seen::Present(Self {
                dev: meta.dev(),
                ino: meta.ino(),
            }),
            Err(error) => absent_or_unknown(&error),
        }
    }

    /// Of `path`, symlinks followed.
    pub fn of(path: &Path) -> Seen<Self> {
        match fs::metadata(path) {
            Ok(meta) => Seen::Present(Self {
                dev: meta.dev(),
                ino: meta.ino(),
            }),
            Err(error) => absent_or_unknown(&error),
        }
    }
}

/// Memory of one process, KiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Memory {
    /// Proportional set size: shared pages divided among who shares them.
    pub pss_kib: u64,
    /// Private dirty and clean pages: what its end would give back.
    pub private_kib: u64,
}

/// Parses `/proc/<pid>/smaps_rollup`.
pub fn parse_memory(text: &str) -> Option<Memory> {
    let field = |name: &str| {
        text.lines().find_map(|line| {
            let rest = line.strip_prefix(name)?.strip_prefix(':')?;
            rest.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()
        })
    };
    Some(Memory {
        pss_kib: field("Pss")?,
        private_kib: field("Private_Clean")?.saturating_add(field("Private_Dirty")?),
    })
}

/// One line of `/proc/net/unix`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnixSocket {
    /// Inode of the socket (not of its file): what `/proc/<pid>/fd` shows as `socket:[inode]`.
    pub inode: u64,
    /// Its name; abstract ones begin with `@`.
    pub path: String,
    /// It accepts connections.
    pub listening: bool,
}

/// Parses `/proc/net/unix`; sockets without a name are skipped.
pub fn parse_unix_sockets(text: &str) -> Vec<UnixSocket> {
    const ACCEPTS: u32 = 0x10000; // __SO_ACCEPTCON, include/linux/net.h
    let line = |line: &str| {
        let mut fields = line.split_ascii_whitespace();
        let flags = u32::from_str_radix(fields.nth(3)?, 16).ok()?;
        let inode = fields.nth(2)?.parse().ok()?;
        let path = fields.next()?.to_owned();
        Some(UnixSocket {
            inode,
            path,
            listening: flags & ACCEPTS != 0,
        })
    };
    text.lines().skip(1).filter_map(line).collect()
}

/// One open descriptor of a process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Descriptor {
    /// Its number.
    pub number: i32,
    /// What the kernel calls it: a path, `socket:[1234]`, `pipe:[1234]`, `anon_inode:…`.
    pub target: PathBuf,
}

impl Descriptor {
    /// The inode of a socket descriptor.
    pub fn socket_inode(&self) -> Option<u64> {
        let text = self.target.to_str()?;
        text.strip_prefix("socket:[")?
            .strip_suffix(']')?
            .parse()
            .ok()
    }
}

/// A `/proc` to read from.
#[derive(Debug, Clone)]
pub struct Proc {
    root: PathBuf,
}

/// Longest small file of `/proc` that is read, bytes.
const SMALL: u64 = 64 << 10;
/// Longest command line that is read, bytes; the kernel allows more, no shim has it.
const COMMAND_LINE: u64 = 128 << 10;

impl Proc {
    /// Reads below `root`, usually `/proc`.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// A path below it.
    pub fn path(&self, pid: i32, name: &str) -> PathBuf {
        self.root.join(pid.to_string()).join(name)
    }

    /// All process numbers now. Threads are not listed.
    pub fn pids(&self) -> io::Result<Vec<i32>> {
        let mut pids = Vec::new();
        for entry in fs::read_dir(&self.root)? {
            // An entry that vanishes between listing and reading is normal.
            let Ok(entry) = entry else { continue };
            if let Some(pid) = entry
                .file_name()
                .to_str()
                .and_then(|n| n.parse::<i32>().ok())
            {
                pids.push(pid);
            }
        }
        pids.sort_unstable();
        Ok(pids)
    }

    /// `/proc/<pid>/stat`; *absent* when there is no such process.
    pub fn stat(&self, pid: i32) -> Seen<Stat> {
        if pid <= 0 {
            return Seen::Absent;
        }
        read_file(&self.path(pid, "stat"), SMALL).and_then(|bytes| {
            // comm may be any bytes; what matters is ASCII.
            match parse_stat(&String::from_utf8_lossy(&bytes)) {
                Some(stat) => Seen::Present(stat),
                // The kernel gives an empty file for a process that goes away meanwhile.
                None if bytes.is_empty() => Seen::Absent,
                None => Seen::Unknown("its stat has an unknown form".into()),
            }
        })
    }

    /// The children of every thread of `pid`; none from a kernel that does not list them, or of a
    /// process that has gone.
    pub fn children(&self, pid: i32) -> Vec<i32> {
        let threads = fs::read_dir(self.path(pid, "task"));
        let lists = threads
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|thread| {
                let list = read_text(&thread.path().join("children"), SMALL);
                list.present().cloned()
            });
        lists
            .flat_map(|list| {
                let pids = list.split_ascii_whitespace().flat_map(str::parse);
                pids.collect::<Vec<i32>>()
            })
            .collect()
    }

    /// Is this very process still alive? *Absent*: it ended (a zombie counts as ended), or its
    /// number belongs to another one now.
    pub fn living(&self, id: ProcessId) -> Seen<Stat> {
        self.stat(id.pid).and_then(|stat| {
            if stat.id == id && stat.alive() {
                Seen::Present(stat)
            } else {
                Seen::Absent
            }
        })
    }

    /// The arguments; empty for kernel threads and zombies. Bytes that are not UTF-8 are shown
    /// as U+FFFD.
    pub fn arguments(&self, pid: i32) -> Seen<Vec<String>> {
        read_file(&self.path(pid, "cmdline"), COMMAND_LINE).map(|bytes| {
            let text = bytes.strip_suffix(b"\0").unwrap_or(&bytes);
            if text.is_empty() {
                return Vec::new();
            }
            text.split(|b| *b == 0)
                .map(|arg| String::from_utf8_lossy(arg).into_owned())
                .collect()
        })
    }

    /// Real, effective, saved and file system user. Not the owner of its `/proc` folder, which a
    /// process that is not dumpable gives to root.
    pub fn users(&self, pid: i32) -> Seen<Vec<u32>> {
        self.status_numbers(pid, "Uid:")
    }

    /// The executable.
    pub fn exe(&self, pid: i32) -> Seen<Exe> {
        let link = self.path(pid, "exe");
        let (path, deleted) = match read_link(&link) {
            Seen::Present(target) => target,
            Seen::Absent => return Seen::Absent,
            Seen::Unknown(why) => return Seen::Unknown(why),
        };
        FileId::of(&link).map(|file| Exe {
            path,
            deleted,
            file,
        })
    }

    /// The working folder, and whether it was removed.
    pub fn cwd(&self, pid: i32) -> Seen<(PathBuf, bool)> {
        read_link(&self.path(pid, "cwd"))
    }

    /// A namespace's identity, `mnt:[4026531840]`.
    pub fn namespace(&self, pid: i32, kind: &str) -> Seen<String> {
        match fs::read_link(self.path(pid, "ns").join(kind)) {
            Ok(target) => Seen::Present(target.to_string_lossy().into_owned()),
            Err(error) => absent_or_unknown(&error),
        }
    }

    /// Open descriptors, ascending.
    pub fn descriptors(&self, pid: i32) -> Seen<Vec<Descriptor>> {
        let entries = match fs::read_dir(self.path(pid, "fd")) {
            Ok(entries) => entries,
            Err(error) => return absent_or_unknown(&error),
        };
        let mut found: Vec<Descriptor> = entries
            .filter_map(|entry| {
                let entry = entry.ok()?;
                Some(Descriptor {
                    number: entry.file_name().to_str()?.parse().ok()?,
                    target: fs::read_link(entry.path()).ok()?,
                })
            })
            .collect();
        found.sort_unstable_by_key(|d| d.number);
        Seen::Present(found)
    }

    /// Memory; costs a walk over its page tables.
    pub fn memory(&self, pid: i32) -> Seen<Memory> {
        read_text(&self.path(pid, "smaps_rollup"), SMALL).and_then(|text| {
            match parse_memory(&text) {
                Some(memory) => Seen::Present(memory),
                None if text.is_empty() => Seen::Absent,
                None => Seen::Unknown("its smaps_rollup has an unknown form".into()),
            }
        })
    }

    /// Its number in each pid namespace from ours inwards (`NSpid` of `/proc/<pid>/status`).
    pub fn namespace_pids(&self, pid: i32) -> Seen<Vec<i32>> {
        self.status_numbers(pid, "NSpid:")
    }

    fn status_numbers<T: std::str::FromStr>(&self, pid: i32, field: &str) -> Seen<Vec<T>> {
        read_file(&self.path(pid, "status"), SMALL).and_then(|bytes| {
            let text = String::from_utf8_lossy(&bytes);
            match text.lines().find_map(|line| line.strip_prefix(field)) {
                Some(rest) => {
                    Seen::Present(rest.split_ascii_whitespace().flat_map(str::parse).collect())
                }
                None => Seen::Unknown(format!("its status has no {field}")),
            }
        })
    }

    /// Every named unix socket of our network namespace.
    pub fn unix_sockets(&self) -> Seen<Vec<UnixSocket>> {
        // Grows with the node: a thousand shims make some 400 KiB.
        read_file(&self.root.join("net/unix"), crate::read::MAX_FILE)
            .map(|bytes| parse_unix_sockets(&String::from_utf8_lossy(&bytes)))
    }

    /// `sys/kernel/random/boot_id`.
    pub fn boot_id(&self) -> Seen<String> {
        read_text(&self.root.join("sys/kernel/random/boot_id"), SMALL)
            .map(|text| text.trim().to_owned())
    }

    /// When the machine booted, seconds after 1970 (`btime` of `/proc/stat`).
    pub fn boot_time(&self) -> Seen<u64> {
        read_text(&self.root.join("stat"), crate::read::MAX_FILE).and_then(|text| {
            let btime = text
                .lines()
                .find_map(|line| line.strip_prefix("btime ")?.trim().parse().ok());
            btime.map_or(
                Seen::Unknown("/proc/stat has no btime".into()),
                Seen::Present,
            )
        })
    }
}

/// Reads a link of `/proc`, and whether the kernel says that its target was removed.
fn read_link(link: &Path) -> Seen<(PathBuf, bool)> {
    match fs::read_link(link) {
        Ok(target) => Seen::Present(
            match target.to_str().and_then(|t| t.strip_suffix(" (deleted)")) {
                Some(path) => (PathBuf::from(path), true),
                None => (target, false),
            },
        ),
        Err(error) => absent_or_unknown(&error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stat_line_is_read_whatever_the_process_calls_itself() {
        let tail = "S 1 2 2 0 -1 4194560 1 0 0 0 7 5 0 0 20 0 11 0 4242 1 2 3 4 5 6 7 8 9 10 11 12 \
                    13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 10752";
        let stat = parse_stat(&format!("99 (a) b (c) {tail}\n")).unwrap();
        assert_eq!(
            stat.id,
            ProcessId {
                pid: 99,
                start_time: 4242
            }
        );
        assert_eq!(
            (stat.comm.as_str(), stat.state, stat.ppid),
            ("a) b (c", 'S', 1)
        );
        assert_eq!((stat.cpu_ticks, stat.threads), (12, 11));
        assert!(stat.alive());
        for bad in [
            "",
            "1",
            "1 (x) S",
            "x (y) S 1",
            "1 (x) S 1 2 2 0 -1 0 0 0 0 0 -7",
        ] {
            assert_eq!(parse_stat(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn listening_sockets_are_told_from_connected_ones() {
        let text = "Num       RefCount Protocol Flags    Type St Inode Path\n\
                    ffff: 00000002 00000000 00010000 0001 01 4711 /run/containerd/s/ab\n\
                    ffff: 00000003 00000000 00000000 0001 03 4712 /run/containerd/s/ab\n\
                    ffff: 00000003 00000000 00000000 0001 03 4713\n\
                    ffff: 00000002 00000000 00010000 0001 01 4714 @abstract\n";
        let sockets = parse_unix_sockets(text);
        assert_eq!(sockets.len(), 3);
        assert!(sockets[0].listening && !sockets[1].listening);
        assert_eq!(
            (sockets[2].path.as_str(), sockets[2].inode),
            ("@abstract", 4714)
        );
    }

    #[test]
    fn this_process_is_seen_alive_and_a_start_time_off_by_one_is_another() {
        let proc = Proc::new("/proc");
        let me = i32::try_from(std::process::id()).unwrap();
        let stat = proc.stat(me).present().cloned().unwrap();
        assert!(proc.living(stat.id).present().is_some());
        let other = ProcessId {
            start_time: stat.id.start_time + 1,
            ..stat.id
        };
        assert!(proc.living(other).is_absent());
        assert!(proc.stat(-1).is_absent() && proc.stat(0).is_absent());
        assert!(proc.memory(me).present().unwrap().pss_kib > 0);
        assert!(!proc.descriptors(me).present().unwrap().is_empty());
        assert_eq!(
            proc.namespace_pids(me).present().unwrap().first(),
            Some(&me)
        );
    }
}

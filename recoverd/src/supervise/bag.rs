//! The descriptors that are kept, by the socket of their shim. Each has a name, and is known by what
//! the kernel calls its file: the same one is kept once. Decides nothing about whose end it is.

use std::{
    collections::BTreeMap,
    io,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    sync::Arc,
};

use nix::sys::stat::fstat;
use recoverd_common::sys;

/// The socket on which a shim accepts connections.
pub const LISTENER: &str = "listener";
/// One that it has accepted.
pub const CONNECTION: &str = "connection";
/// What is kept; a name from outside is no label of a metric. No write end of an output is among
/// them: its reader would wait for us too.
pub const KINDS: [&str; 6] = [
    LISTENER,
    CONNECTION,
    "master",
    "stdin",
    "stdin-fifo",
    "output",
];
/// More than a shim of ours has of any pod, and as many as a successor takes.
const MAX_OF_ONE: usize = 4096;

/// One descriptor.
#[derive(Debug, Clone)]
pub struct Kept {
    /// Ours for it.
    pub token: u64,
    /// What it is; see `handoff` and the shim's `supervised`.
    pub name: String,
    file: (u64, u64),
    /// It.
    pub fd: Arc<OwnedFd>,
}

impl Kept {
    /// `connection`, `master`…
    pub fn what(&self) -> &str {
        what(&self.name)
    }
}

/// The part of a name before its member.
pub fn what(name: &str) -> &str {
    name.split(':').next().unwrap_or(name)
}

/// The member in a name: `<id>/<exec>`; empty for what is of no member.
pub fn member(name: &str) -> &str {
    let member = name.split_once(':').map_or("", |(_, member)| member);
    // The outputs of one process are told apart by what follows.
    member.split('@').next().unwrap_or(member)
}

/// All of them.
#[derive(Debug, Default)]
pub struct Bag {
    kept: BTreeMap<PathBuf, Vec<Kept>>,
    last: u64,
}

/// What keeping one more has led to.
#[derive(Debug)]
pub struct Change {
    /// Kept from now on; none: it was kept already.
    pub new: Option<Kept>,
    /// Kept no longer: this one has come in its place.
    pub replaced: Vec<Kept>,
}

/// What the kernel calls it. All masters of one mount have one inode.
fn file_of(fd: &OwnedFd) -> io::Result<(u64, u64)> {
    let stat = fstat(fd)?;
    let number = sys::terminal_number(fd.as_fd()).map_or(stat.st_ino, u64::from);
    Ok((stat.st_dev, number))
}

impl Bag {
    /// An empty one, whose tokens begin above `first`.
    pub fn new(first: u64) -> Self {
        Self {
            kept: BTreeMap::new(),
            last: first,
        }
    }

    /// Keeps one.
    pub fn keep(&mut self, socket: &Path, name: &str, fd: OwnedFd) -> io::Result<Change> {
        let what = what(name);
        if !KINDS.contains(&what) {
            return Err(io::Error::other(format!("{what:?} is not kept")));
        }
        let file = file_of(&fd)?;
        let all = self.kept.entry(socket.to_owned()).or_default();
        let mut change = Change {
            new: None,
            replaced: Vec::new(),
        };
        if all
            .iter()
            .any(|kept| kept.name == name && kept.file == file)
        {
            return Ok(change);
        }
        // There are many connections, and one of everything else.
        if name != CONNECTION {
            let (old, rest) = std::mem::take(all)
                .into_iter()
                .partition(|kept| kept.name == name);
            *all = rest;
            change.replaced = old;
        }
        if all.len() >= MAX_OF_ONE {
            return Err(io::Error::other("too many descriptors of one shim"));
        }
        self.last = self.last.saturating_add(1);
        let kept = Kept {
            token: self.last,
            name: name.to_owned(),
            file,
            fd: Arc::new(fd),
        };
        all.push(kept.clone());
        change.new = Some(kept);
        Ok(change)
    }

    /// Whether this file is kept already, under any name.
    pub fn has(&self, socket: &Path, inode: u64) -> bool {
        let all = self.kept.get(socket);
        all.is_some_and(|all| all.iter().any(|kept| kept.file.1 == inode))
    }

    /// Gives up those of a shim for which `over` is true.
    pub fn give_up(&mut self, socket: &Path, over: impl Fn(&Kept) -> bool) -> Vec<Kept> {
        let Some(all) = self.kept.get_mut(socket) else {
            return Vec::new();
        };
        let (old, rest): (Vec<Kept>, Vec<Kept>) = std::mem::take(all).into_iter().partition(over);
        if rest.is_empty() {
            self.kept.remove(socket);
        } else {
            *all = rest;
        }
        old
    }

    /// Gives up one, and says whose it was.
    pub fn give_up_one(&mut self, token: u64) -> Option<(PathBuf, Kept)> {
        let socket = self.kept.iter().find_map(|(socket, all)| {
            let here = all.iter().any(|kept| kept.token == token);
            here.then(|| socket.clone())
        })?;
        let mut given = self.give_up(&socket, |kept| kept.token == token);
        given.pop().map(|kept| (socket, kept))
    }

    /// Everything of one shim.
    pub fn of(&self, socket: &Path) -> &[Kept] {
        self.kept.get(socket).map_or(&[], Vec::as_slice)
    }

    /// Everything.
    pub fn all(&self) -> impl Iterator<Item = (&PathBuf, &Kept)> {
        let each = |(socket, all)| std::iter::repeat(socket).zip(all);
        self.kept
            .iter()
            .flat_map(move |(socket, all): (&PathBuf, &Vec<Kept>)| each((socket, all)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;

    const S: &str = "/s/0";

    fn socket() -> OwnedFd {
        UnixStream::pair().unwrap().0.into()
    }

    #[test]
    fn the_same_file_is_kept_once_and_a_name_stands_for_the_latest() {
        let mut bag = Bag::new(100);
        let s = Path::new(S);
        let connection = socket();
        let again = connection.try_clone().unwrap();
        let first = bag.keep(s, "connection", connection).unwrap().new.unwrap();
        assert_eq!(first.token, 101);
        assert!(bag.keep(s, "connection", again).unwrap().new.is_none());
        bag.keep(s, "connection", socket()).unwrap().new.unwrap();
        bag.keep(s, "listener", socket()).unwrap();
        let change = bag.keep(s, "listener", socket()).unwrap();
        assert_eq!((change.replaced.len(), bag.of(s).len()), (1, 3));
        bag.keep(Path::new("/s/1"), "connection", socket()).unwrap();
        assert_eq!(bag.all().count(), 4);
        let (whose, kept) = bag.give_up_one(101).unwrap();
        assert_eq!((whose.as_path(), kept.what()), (s, "connection"));
        assert!(bag.give_up_one(101).is_none());
    }

    #[test]
    fn what_is_given_up_is_closed() {
        let mut bag = Bag::new(0);
        let s = Path::new(S);
        let (mut reader, writer) = io::pipe().unwrap();
        bag.keep(s, "stdin:a/e", writer.into()).unwrap();
        bag.keep(s, "stdin:a/", socket()).unwrap();
        let over = |kept: &Kept| member(&kept.name) == "a/e";
        assert_eq!(bag.give_up(s, over).len(), 1);
        let mut end = Vec::new();
        io::Read::read_to_end(&mut reader, &mut end).unwrap();
        assert_eq!(bag.give_up(s, |_| true).len(), 1);
        assert_eq!(bag.all().count(), 0);
    }

    #[test]
    fn names_say_what_and_whose() {
        for (name, of, whose) in [
            ("listener", "listener", ""),
            ("stdin:a/e", "stdin", "a/e"),
            ("output:a/@77", "output", "a/"),
        ] {
            assert_eq!((what(name), member(name)), (of, whose));
        }
    }
}

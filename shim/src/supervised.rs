//! What `recoverd supervise` is told: descriptors that are to outlive us, so that our death is
//! nobody's end. Told before others rely on them, never waited for; without a supervisor nothing is
//! different. It catches up with what it was not told by looking into us.

use std::{
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    time::Instant,
};

use recoverd_common::{
    failpoint, record,
    supervision::{self, Answer, Link, Named, Word},
};

/// Something to be told.
#[derive(Debug)]
pub enum Tell {
    /// Keep a duplicate of this.
    Keep(String, OwnedFd),
    /// Keep it no longer.
    Drop(String),
    /// And somebody must not be answered before it is dropped.
    DropFirst(String),
}

/// The supervisor, if there is one.
#[derive(Debug)]
pub struct Supervised {
    place: PathBuf,
    socket: PathBuf,
    process: record::Process,
    link: Option<Link>,
    /// Of the last Drop.
    number: u64,
}

impl Supervised {
    /// Of the shim `process` at `socket`. Connects when there is something to tell.
    pub fn new(socket: &Path, process: record::Process) -> Self {
        Self {
            place: supervision::path(Path::new(supervision::RUN_DIR)),
            socket: socket.to_owned(),
            process,
            link: None,
            number: 0,
        }
    }

    /// Tells that `fd` is to be kept. True: this was the first word on a new connection, and
    /// everything else that is held should follow.
    pub fn keep(&mut self, name: &str, fd: BorrowedFd<'_>) -> bool {
        let word = Word::Keep {
            name: name.to_owned(),
        };
        self.say(&word, &[fd])
    }

    /// Tells everything in `tell`, in order.
    pub fn tell(&mut self, tell: Vec<Tell>) -> bool {
        let mut fresh = false;
        let (mut names, mut first) = (Vec::new(), false);
        for word in tell {
            match word {
                Tell::Keep(name, fd) => fresh |= self.keep(&name, fd.as_fd()),
                Tell::Drop(name) => names.push(name),
                Tell::DropFirst(name) => {
                    names.push(name);
                    first = true;
                }
            }
        }
        if !names.is_empty() {
            self.drop_kept(names, first);
        }
        fresh
    }

    fn drop_kept(&mut self, names: Vec<String>, wait: bool) {
        // Whoever is not connected has been told of nothing on this connection, but may have
        // caught up by looking.
        self.number = self.number.saturating_add(1);
        let number = self.number;
        self.say(&Word::Drop { names, number }, &[]);
        let until = Instant::now() + supervision::PATIENCE;
        while wait && let Some(link) = &self.link {
            match link.answer(until) {
                Ok((Answer::Dropped { number: told }, _)) if told >= number => return,
                // Of an earlier one that nobody waited for.
                Ok(_) => {}
                // It hangs or has gone. The next word goes to a new connection, if there is
                // somebody to accept it; what it holds on goes when it ends.
                Err(_) => self.link = None,
            }
        }
    }

    fn say(&mut self, word: &Word, files: &[BorrowedFd<'_>]) -> bool {
        failpoint!("handoff.tell.before");
        let fresh = self.deliver(word, files);
        failpoint!("handoff.tell.after");
        fresh
    }

    fn deliver(&mut self, word: &Word, files: &[BorrowedFd<'_>]) -> bool {
        // Answers that nobody waited for would fill up the other side's room.
        while let Some(link) = &self.link
            && matches!(link.receive(), Ok(Some(_)))
        {}
        if let Some(link) = &self.link
            && link.send(word, files).is_ok()
        {
            return false;
        }
        // It may have been started anew.
        self.link = self.connect();
        match &self.link {
            Some(link) if link.send(word, files).is_ok() => true,
            Some(_) | None => {
                self.link = None;
                false
            }
        }
    }

    fn connect(&self) -> Option<Link> {
        let link = Link::connect(&self.place).ok()?;
        let word = Word::Shim {
            socket: self.socket.clone(),
            process: Named(self.process),
        };
        link.send(&word, &[]).ok()?;
        Some(link)
    }
}

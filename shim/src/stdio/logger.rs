//! Processes that take output off us: a logger, which the client names, and the copier, a child of
//! ours that writes output to a file. Opening a file and writing to it may wait for a device; the
//! loop never does.
//!
//! A copier that is killed has another one come after it: we have the other end of its pipe, in
//! which the output waits. Not one that fails: a full disk would stop the container.

use std::{io, os::fd::OwnedFd, path::PathBuf};

use nix::{fcntl::OFlag, unistd::pipe2};
use serde::{Deserialize, Serialize};

use super::{
    Heard, Held, Logger, Opened, Stdio, Wanted,
    pipes::{read_end, two_way_pipe},
};
use crate::{
    children::{self, ChildFile, Gate, Plan, Spawned},
    reaper,
    service::Key,
};

/// The status of a copier that has failed; one that is killed has another.
pub(super) const FAILED: u32 = 1;
/// Between two starts of copiers of one process, milliseconds.
const COPIER_MS: u64 = 1_000;

/// What the copier of a process does, for the one that comes after it.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Copies {
    path: PathBuf,
    create: bool,
    /// No earlier than this is another one started.
    not_before: u64,
    /// When it is.
    pub(super) again_at: Option<u64>,
    /// Until its pid is on record.
    #[serde(skip)]
    gate: Option<Gate>,
}

impl Copies {
    pub(super) fn new(path: PathBuf, create: bool) -> Self {
        Self {
            path,
            create,
            not_before: 0,
            again_at: None,
            gate: None,
        }
    }

    /// It was killed.
    pub(super) fn again(&mut self, now: u64) {
        self.again_at = Some(now.max(self.not_before));
    }

    fn start(&self, key: &Key, namespace: &str, pipe: &OwnedFd) -> Result<Spawned, String> {
        let pipe = read_end(pipe).map_err(|e| format!("open pipe: {e}"))?;
        spawn_copier(key, namespace, self, pipe, ChildFile::Null)
    }
}

impl Stdio {
    /// Starts the copiers that are due. True: the record has to say so, and then
    /// [`Stdio::begin_copiers`].
    pub fn copy_again(&mut self, namespace: &str, now: u64, heard: &mut Vec<Heard>) -> bool {
        let mut started = false;
        for (key, held) in &mut self.held {
            let Some(copies) = &mut held.copies else {
                continue;
            };
            if copies.again_at.is_none_or(|at| at > now) {
                continue;
            }
            let Some(pipe) = held.logged.first() else {
                copies.again_at = None;
                continue;
            };
            copies.not_before = now.saturating_add(COPIER_MS);
            match copies.start(key, namespace, pipe) {
                Ok(Spawned { pid, gate, .. }) => {
                    copies.again_at = None;
                    copies.gate = Some(gate);
                    held.logger = Some(Logger::copier(pid));
                    started = true;
                }
                // Its output waits.
                Err(e) => {
                    copies.again_at = Some(copies.not_before);
                    heard.push(Heard::Warning(format!("copy output of {}: {e}", key.id)));
                }
            }
        }
        started
    }

    /// What [`Stdio::copy_again`] has done is on record: whoever comes after us will not read what
    /// they read.
    pub fn begin_copiers(&mut self) {
        let copies = self
            .held
            .values_mut()
            .filter_map(|held| held.copies.as_mut());
        for gate in copies.filter_map(|copies| copies.gate.take()) {
            gate.open();
        }
    }
}

/// Starts the logger; gives the write ends for stdout and stderr.
pub(super) fn start_logger(
    held: &mut Held,
    wanted: &Wanted<'_>,
    argv: Vec<String>,
    opened: &mut Opened,
) -> Result<(OwnedFd, OwnedFd), String> {
    let failed = |e: io::Error| format!("make pipe: {e}");
    let (out, out_write) = two_way_pipe(wanted.owner).map_err(failed)?;
    let (err, err_write) = two_way_pipe(wanted.owner).map_err(failed)?;
    let (ready, ready_write) = pipe2(OFlag::O_CLOEXEC).map_err(|e| failed(e.into()))?;
    // As the stock shim: an exec's logger gets the id of the exec.
    let id = if wanted.key.is_init() {
        &wanted.key.id
    } else {
        &wanted.key.exec_id
    };
    let plan = Plan {
        files: vec![
            ChildFile::Null,
            ChildFile::Null,
            ChildFile::Null,
            ChildFile::Fd(out.try_clone().map_err(failed)?),
            ChildFile::Fd(err.try_clone().map_err(failed)?),
            ChildFile::Fd(ready_write),
        ],
        folder: "/".into(),
        steps: Vec::new(),
        to_the_end: false,
        program: None,
        argv: argv.clone(),
        env: Some(vec![
            format!("CONTAINER_ID={id}"),
            format!("CONTAINER_NAMESPACE={}", wanted.namespace),
        ]),
        extra_env: None,
    };
    let Spawned { pid, words, gate } =
        children::spawn(plan).map_err(|e| format!("start logger: {e}"))?;
    // Should nobody write it down any more, its input ends, and it with that.
    gate.open();
    held.logger = Some(Logger {
        pid,
        start_time: reaper::start_time(pid),
        argv,
    });
    held.logged = vec![out, err];
    opened.wait_for_logger = true;
    opened.logger_says = wanted.wish.stdout.starts_with("binary-v2:");
    opened.files.push(ChildFile::Fd(ready));
    opened.files.push(ChildFile::Fd(words));
    Ok((out_write, err_write))
}

/// Starts the copier to the file at `path`; gives the write end of its pipe.
pub(super) fn start_copier(
    held: &mut Held,
    wanted: &Wanted<'_>,
    path: PathBuf,
    create: bool,
    opened: &mut Opened,
) -> Result<OwnedFd, String> {
    let failed = |e: io::Error| format!("make pipe: {e}");
    let (out, write) = two_way_pipe(wanted.owner).map_err(failed)?;
    wanted.size(&out);
    let (ready, ready_write) = pipe2(OFlag::O_CLOEXEC).map_err(|e| failed(e.into()))?;
    let copies = Copies::new(path, create);
    let theirs = out.try_clone().map_err(failed)?;
    let Spawned { pid, words, gate } = spawn_copier(
        wanted.key,
        wanted.namespace,
        &copies,
        theirs,
        ChildFile::Fd(ready_write),
    )?;
    // As a logger.
    gate.open();
    held.logger = Some(Logger::copier(pid));
    held.copies = Some(copies);
    held.logged = vec![out];
    opened.wait_for_logger = true;
    opened.files.push(ChildFile::Fd(ready));
    opened.files.push(ChildFile::Fd(words));
    Ok(write)
}

/// It closes `ready` when it is there.
fn spawn_copier(
    key: &Key,
    namespace: &str,
    copies: &Copies,
    pipe: OwnedFd,
    ready: ChildFile,
) -> Result<Spawned, String> {
    let plan = Plan {
        files: vec![
            ChildFile::Fd(pipe),
            ChildFile::Append {
                path: copies.path.clone(),
                create: copies.create,
            },
            ChildFile::Null,
            ready,
        ],
        folder: "/".into(),
        steps: Vec::new(),
        to_the_end: false,
        // A program of its own: without its shim, a mere fork would look like one.
        program: children::OURSELVES,
        argv: children::ourselves(namespace, &key.id, "copy"),
        env: None,
        extra_env: None,
    };
    children::spawn(plan).map_err(|e| format!("fork: {e}"))
}

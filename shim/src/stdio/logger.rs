//! Processes that take output off us: a logger, which the client names, and the copier, a child of
//! ours that writes a terminal's output to a file. Opening a file and writing to it may wait for
//! a device; the loop never does.

use std::{io, os::fd::OwnedFd, path::PathBuf};

use nix::{fcntl::OFlag, unistd::pipe2};

use super::{Held, Logger, Opened, Wanted, pipes::two_way_pipe};
use crate::{
    children::{self, ChildFile, Plan, Spawned},
    reaper,
};

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
    let plan = Plan {
        files: vec![
            ChildFile::Fd(out.try_clone().map_err(failed)?),
            ChildFile::Append { path, create },
            ChildFile::Null,
            ChildFile::Fd(ready_write),
        ],
        folder: "/".into(),
        steps: Vec::new(),
        to_the_end: false,
        // A program of its own: without its shim, a mere fork would look like one.
        argv: children::ourselves(wanted.namespace, &wanted.key.id, "copy"),
        env: None,
        extra_env: None,
    };
    let Spawned { pid, words, gate } = children::spawn(plan).map_err(|e| format!("fork: {e}"))?;
    gate.open();
    held.logger = Some(Logger {
        pid,
        start_time: reaper::start_time(pid),
        argv: Vec::new(),
    });
    held.logged = vec![out];
    opened.wait_for_logger = true;
    opened.files.push(ChildFile::Fd(ready));
    opened.files.push(ChildFile::Fd(words));
    Ok(write)
}

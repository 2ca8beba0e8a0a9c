//! `containerd-shim-recoverd-v1`, runtime name `io.containerd.recoverd.v1`: one binary for what
//! containerd runs once (`start`, `delete`, `-v`, `-info`) and for the daemon behind the socket.
#![cfg_attr(
    not(test),
    deny(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::indexing_slicing,
        clippy::panic
    )
)]

use std::{
    env,
    error::Error,
    io::{self, Write},
    process::ExitCode,
};

mod adopt;
mod args;
mod bootstrap;
mod carry;
mod checkpoint;
mod children;
mod config;
mod connections;
mod context;
mod delete;
mod delete_look;
mod delete_rule;
mod event_log;
mod events;
mod info;
mod journal;
mod lock;
mod log;
mod mounts;
#[allow(dead_code)] // the counter is for a successor
mod oom;
mod options;
mod reaper;
mod remains;
mod requests;
mod resume;
mod runc;
mod serve;
mod serve_args;
mod service;
mod socket;
mod start;
mod state;
mod stats;
mod stdio;
mod supervised;
mod sys;
mod tasks;
mod witness;

use args::Invocation;
use serve_args::ServeArgs;

/// As which containerd finds it, and everybody a process of ours.
const NAME: &str = "containerd-shim-recoverd-v1";

fn main() -> ExitCode {
    // Begun as /proc/self/exe, it would be "exe" to who looks; this is as long as the kernel keeps.
    let _ = nix::sys::prctl::set_name(c"containerd-shim");
    let invocation = match args::parse(env::args_os().skip(1)) {
        Ok(invocation) => invocation,
        Err(refusal) => {
            complain(&refusal);
            return ExitCode::from(refusal.exit_status());
        }
    };
    match invoke(invocation) {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            complain(error.as_ref());
            ExitCode::FAILURE
        }
    }
}

/// Gives the exit status.
fn invoke(invocation: Invocation) -> Result<u8, Box<dyn Error>> {
    let done = match invocation {
        Invocation::Help => answer(args::HELP.as_bytes()),
        Invocation::Version => answer(info::VERSION.as_bytes()),
        Invocation::RuntimeInfo => answer(&info::runtime_info()),
        #[cfg(feature = "failpoints")]
        Invocation::Failpoints => {
            let lines = recoverd_common::failpoint::names().join("\n") + "\n";
            answer(lines.as_bytes())
        }
        Invocation::Start(flags) => Ok(start::run(flags, &mut io::stdout().lock())?),
        Invocation::Delete(flags) => {
            let outcome = delete::run(&flags)?;
            for remark in &outcome.remarks {
                say(remark);
            }
            recoverd_common::failpoint!("delete.answer.before");
            answer(&outcome.answer)?;
            recoverd_common::failpoint!("delete.answer.after");
            Ok(())
        }
        Invocation::Adopt(flags) => return Ok(adopt::run(&flags, &mut io::stdout().lock())?),
        Invocation::Serve(flags) => serve::run(ServeArgs::take(flags)?),
        Invocation::GoOn(flags, message) => serve::go_on(&flags, message),
        Invocation::HandoffCheck => serve::check(),
        Invocation::Successor(flags) => serve::adopt_and_serve(&flags),
        Invocation::Tell(flags) => serve::tell(&flags),
        Invocation::Copy => Ok(children::copy()?),
        Invocation::Hold => Ok(stdio::hold()?),
    };
    done.map(|()| 0)
}

/// Everything that goes to standard output goes through here, once.
fn answer(bytes: &[u8]) -> Result<(), Box<dyn Error>> {
    let mut out = io::stdout().lock();
    out.write_all(bytes)?;
    Ok(out.flush()?)
}

/// One line, whatever the error's text: containerd shows it as it is.
fn complain(error: &dyn Error) {
    let mut line = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        // A transparent error has the text of its source.
        if !line.ends_with(&cause_text) {
            line.push_str(": ");
            line.push_str(&cause_text);
        }
        source = cause.source();
    }
    say(&line);
}

/// A closed standard error is no reason to fail.
fn say(text: &str) {
    let line = text
        .split('\n')
        .map(str::trim)
        .collect::<Vec<_>>()
        .join("; ");
    let _ = writeln!(io::stderr(), "{line}");
}

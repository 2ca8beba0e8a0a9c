//! `-v` and `-info`. containerd waits for `-info` without a time limit while it starts, so the
//! runtime is asked for its features with one, and a runtime that is missing or slow only means
//! that the answer has no features.

use std::{
    fs::File,
    io::{self, Read},
    os::{
        fd::{AsFd, OwnedFd},
        unix::process::CommandExt,
    },
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use nix::{
    fcntl::{FcntlArg, OFlag, fcntl},
    poll::{PollFd, PollFlags, PollTimeout, poll},
};
use prost::Message;
use prost_types::Any;
use recoverd_common::pb::{
    info::{RuntimeInfo, RuntimeVersion},
    type_url,
};

use crate::options::Options;

/// Our version.
pub const VERSION_NUMBER: &str = env!("CARGO_PKG_VERSION");

/// What `-v` prints.
pub const VERSION: &str = concat!(
    "containerd-shim-recoverd-v1:\n  Version: ",
    env!("CARGO_PKG_VERSION"),
    "\n"
);
const NAME: &str = "io.containerd.recoverd.v1";
/// For `runc features`; a healthy runtime takes 20 ms.
const FEATURES: Duration = Duration::from_secs(2);
/// Longest list of features that is passed on, bytes; runc's has 8 KiB.
const MAX_FEATURES: usize = 1 << 20;
const MAX_INPUT: u64 = 4 << 20;

/// The binary answer to `-info` for the options on standard input.
pub fn runtime_info() -> Vec<u8> {
    let mut input = Vec::new();
    let _ = io::stdin().take(MAX_INPUT).read_to_end(&mut input);
    let given = (!input.is_empty())
        .then(|| Any::decode(input.as_slice()).ok())
        .flatten();
    // Options that are no good are Create's to refuse; the default runtime is asked instead.
    let options = Options::from_request(given.as_ref()).unwrap_or_default();
    let features = features(options.binary()).ok();
    answer(given, features).encode_to_vec()
}

fn answer(options: Option<Any>, features: Option<Vec<u8>>) -> RuntimeInfo {
    RuntimeInfo {
        name: NAME.into(),
        version: Some(RuntimeVersion {
            version: VERSION_NUMBER.into(),
            revision: String::new(),
        }),
        options,
        features: features.map(|value| Any {
            type_url: type_url::FEATURES.into(),
            value,
        }),
        annotations: Default::default(),
    }
}

/// `<runtime> features`, if it ends well in time and says a JSON object.
fn features(binary: &str) -> io::Result<Vec<u8>> {
    let deadline = Instant::now() + FEATURES;
    let (reads, writes) = io::pipe()?;
    let reads = OwnedFd::from(reads);
    // Non-blocking: another process may hold the other end after the runtime has ended.
    fcntl(&reads, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    let mut child = {
        let mut command = Command::new(binary);
        command
            .arg("features")
            .env_remove("NOTIFY_SOCKET")
            .stdin(Stdio::null())
            .stdout(writes)
            .stderr(Stdio::null())
            .process_group(0);
        // The command holds our copy of the writing end and drops it here.
        command.spawn()?
    };
    let said = read_until(File::from(reads), deadline);
    // Not reaped yet, so the number is its own; ESRCH is impossible and a zombie minds nothing.
    if said.is_err() {
        let _ = child.kill();
    }
    let status = child.wait()?;
    let said = said?;
    let is_object = serde_json::from_slice::<serde::de::IgnoredAny>(&said).is_ok()
        && said.trim_ascii_start().starts_with(b"{");
    if status.success() && is_object {
        return Ok(said);
    }
    Err(io::Error::other("no features"))
}

fn read_until(mut file: File, deadline: Instant) -> io::Result<Vec<u8>> {
    let mut said = Vec::new();
    let mut piece = [0; 8192];
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        if poll(&mut [PollFd::new(file.as_fd(), PollFlags::POLLIN)], timeout)? == 0 {
            return Err(io::Error::from(io::ErrorKind::TimedOut));
        }
        match file.read(&mut piece) {
            Ok(0) => return Ok(said),
            Ok(n) => said.extend_from_slice(piece.get(..n).unwrap_or_default()),
            Err(e)
                if matches!(
                    e.kind(),
                    io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock
                ) => {}
            Err(e) => return Err(e),
        }
        if said.len() > MAX_FEATURES {
            return Err(io::Error::other("too many features"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{fs, os::unix::fs::PermissionsExt};

    fn script(dir: &tempfile::TempDir, text: &str) -> String {
        let path = dir.path().join("runtime");
        fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        path.to_str().unwrap().to_owned()
    }

    #[test]
    fn features_are_what_the_runtime_says_or_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let good = script(
            &dir,
            "test \"$1\" = features && echo '{\"ociVersionMax\":\"1.1.0\"}'",
        );
        assert_eq!(features(&good).unwrap(), b"{\"ociVersionMax\":\"1.1.0\"}\n");
        for bad in [
            "echo no such command >&2; exit 1",
            "echo '{'",
            "echo '[]'",
            "echo '{}'; exit 3",
        ] {
            assert!(features(&script(&dir, bad)).is_err(), "{bad}");
        }
        assert!(features("/nonexistent/runtime").is_err());
    }

    #[test]
    fn a_runtime_that_hangs_costs_two_seconds() {
        let dir = tempfile::tempdir().unwrap();
        let started = Instant::now();
        assert!(features(&script(&dir, "exec sleep 60")).is_err());
        assert!(started.elapsed() < Duration::from_secs(20));
    }

    #[test]
    fn the_answer_repeats_the_options() {
        let options = Any {
            type_url: "containerd.runc.v1.Options".into(),
            value: vec![],
        };
        let info = answer(Some(options.clone()), None);
        assert_eq!((info.options, info.features), (Some(options), None));
        assert_eq!(info.name, "io.containerd.recoverd.v1");
    }
}

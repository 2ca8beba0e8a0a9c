//! File systems that a program mounts: types that begin with `fuse.` or `fuse3.`. The program is
//! called as containerd calls it; what it leaves at work serves the mount and ends with it.

use std::{
    fs::File,
    io::{self, Read, Seek},
    path::Path,
    process::{Command, Stdio},
};

use nix::sys::memfd::{MFdFlags, memfd_create};

use crate::service::Mount;

/// Longest text of a helper's failure that is told, bytes.
const MAX_WORDS: u64 = 2048;

/// The helper's name and arguments; none for a type that the kernel mounts.
pub(super) fn argv(wanted: &Mount, target: &str) -> Option<Vec<String>> {
    let (helper, kind) = match wanted.kind.split_once('.')? {
        ("fuse", kind) => ("mount.fuse", kind),
        ("fuse3", kind) => ("mount.fuse3", kind),
        _ => return None,
    };
    let mut argv = vec![helper.to_owned(), wanted.source.clone(), target.to_owned()];
    for option in &wanted.options {
        argv.extend(["-o".to_owned(), option.clone()]);
    }
    argv.extend(["-t".to_owned(), kind.to_owned()]);
    Some(argv)
}

/// Mounts `wanted` by its helper, if it has one.
pub(super) fn mount(wanted: &Mount, target: &Path) -> Option<io::Result<()>> {
    let text = target.to_str().unwrap_or_default();
    let argv = argv(wanted, text)?;
    if text.is_empty() {
        let why = "a mount helper takes no such path";
        return Some(Err(io::Error::other(why)));
    }
    Some(run(&argv))
}

/// Its words go to a file, not a pipe: the server that it leaves may keep them open for ever.
fn run(argv: &[String]) -> io::Result<()> {
    let (helper, rest) = argv.split_first().ok_or(io::ErrorKind::InvalidInput)?;
    let mut said: File = memfd_create("words", MFdFlags::MFD_CLOEXEC)?.into();
    let status = Command::new(helper)
        .args(rest)
        .env_remove("NOTIFY_SOCKET")
        .stdin(Stdio::null())
        .stdout(said.try_clone()?)
        .stderr(said.try_clone()?)
        .status()
        .map_err(|e| io::Error::other(format!("run {helper}: {e}")))?;
    if status.success() {
        return Ok(());
    }
    said.rewind()?;
    let mut words = Vec::new();
    said.take(MAX_WORDS).read_to_end(&mut words)?;
    let words = String::from_utf8_lossy(&words);
    Err(io::Error::other(format!(
        "{helper} failed ({status}): {}",
        words.trim()
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted(kind: &str, options: &[&str]) -> Mount {
        Mount {
            kind: kind.into(),
            source: "overlay".into(),
            target: String::new(),
            options: options.iter().map(|word| (*word).to_owned()).collect(),
        }
    }

    #[test]
    fn a_helper_is_called_as_containerd_calls_it() {
        let layers = ["lowerdir=/l2:/l1", "ro"];
        assert_eq!(
            argv(&wanted("fuse3.fuse-overlayfs", &layers), "/b/rootfs"),
            Some(
                "mount.fuse3 overlay /b/rootfs -o lowerdir=/l2:/l1 -o ro -t fuse-overlayfs"
                    .split(' ')
                    .map(str::to_owned)
                    .collect()
            )
        );
        assert_eq!(
            argv(&wanted("fuse.a.b", &[]), "/r"),
            Some(
                ["mount.fuse", "overlay", "/r", "-t", "a.b"]
                    .map(str::to_owned)
                    .into()
            )
        );
        for kind in ["fuse", "fuse3", "fuseblk", "ext4", "fuse2.x", "a.fuse.b"] {
            assert_eq!(argv(&wanted(kind, &[]), "/r"), None, "{kind}");
        }
    }

    #[test]
    fn what_a_helper_says_of_its_failure_is_told_and_its_server_is_not_waited_for() {
        let shell = |line: &str| run(&["sh", "-c", line].map(str::to_owned));
        // It has their words open as long as this test runs.
        let serves = format!(
            "while kill -0 {}; do sleep 0.05; done &",
            std::process::id()
        );
        shell(&serves).unwrap();
        let text = shell("echo out; echo why >&2; exit 3").unwrap_err();
        assert_eq!(text.to_string(), "sh failed (exit status: 3): out\nwhy");
        let text = run(&["mount.nonexistent".to_owned()])
            .unwrap_err()
            .to_string();
        assert!(text.starts_with("run mount.nonexistent: "), "{text}");
    }
}

//! The OCI runtime's command line, and what its log says when it fails. Pure but for reading
//! that log. The arguments are the stock shim's, so that runc, crun and what stands in for them
//! work unchanged.

use std::{
    fs::File,
    io::{Read, Seek, SeekFrom},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use recoverd_common::exec_files;
use serde::Deserialize;

use crate::{
    checkpoint::Restore,
    options::Options,
    service::Key,
    tasks::{FailureKind, Work},
};

/// Where a command works.
#[derive(Debug, Clone)]
pub struct Place<'a> {
    /// The task's bundle.
    pub bundle: &'a Path,
    /// containerd's namespace.
    pub namespace: &'a str,
    /// The task's options.
    pub options: &'a Options,
}

impl Place<'_> {
    /// The log that runtime commands for `key` write. Execs have one each: they run at once.
    pub fn log(&self, key: &Key) -> PathBuf {
        if key.is_init() {
            log_in(self.bundle)
        } else {
            self.bundle.join(format!("{}.log.json", key.exec_id))
        }
    }

    /// Where the runtime leaves the pid of what it starts. An exec may be called `init`.
    pub fn pid_file(&self, key: &Key) -> PathBuf {
        if key.is_init() {
            self.bundle.join("init.pid")
        } else {
            exec_files::pid_file(self.bundle, &key.exec_id)
        }
    }

    /// The OCI process of an exec.
    pub fn process_file(&self, key: &Key) -> PathBuf {
        exec_files::process_file(self.bundle, &key.exec_id)
    }

    /// The file system of the container, when the shim mounts it.
    pub fn rootfs(&self) -> PathBuf {
        self.bundle.join("rootfs")
    }

    /// The whole command. `console` is a socket that wants the terminal's master.
    pub fn argv(&self, key: &Key, work: &Work, console: Option<&Path>) -> Vec<String> {
        let text = |path: &Path| path.to_string_lossy().into_owned();
        let mut argv = vec![
            self.options.binary().to_owned(),
            "--root".to_owned(),
            text(&self.options.root(self.namespace)),
            "--log".to_owned(),
            text(&self.log(key)),
            "--log-format".to_owned(),
            "json".to_owned(),
        ];
        if self.options.systemd_cgroup {
            argv.push("--systemd-cgroup".to_owned());
        }
        // As the stock shim of 1.6 does. A runc from 1.2 on takes the flag, says that it looks into
        // PATH only, and goes on.
        let by_criu = matches!(work, Work::Checkpoint(_) | Work::Restore(_));
        if by_criu && !self.options.criu_path.is_empty() {
            argv.extend(["--criu".to_owned(), self.options.criu_path.clone()]);
        }
        let mut add = |words: &[&str]| argv.extend(words.iter().map(|word| (*word).to_owned()));
        let pid_file = text(&self.pid_file(key));
        let process_file = text(&self.process_file(key));
        match work {
            Work::Create => {
                add(&[
                    "create",
                    "--bundle",
                    &text(self.bundle),
                    "--pid-file",
                    &pid_file,
                ]);
                if let Some(console) = console {
                    add(&["--console-socket", &text(console)]);
                }
                if self.options.no_pivot_root {
                    add(&["--no-pivot"]);
                }
                if self.options.no_new_keyring {
                    add(&["--no-new-keyring"]);
                }
            }
            Work::Start => add(&["start"]),
            Work::Exec => {
                add(&["exec", "--process", &process_file]);
                if let Some(console) = console {
                    add(&["--console-socket", &text(console)]);
                }
                add(&["--detach", "--pid-file", &pid_file]);
            }
            Work::Pause => add(&["pause"]),
            Work::Resume => add(&["resume"]),
            Work::Update(_) => add(&["update", "--resources=-"]),
            Work::Kill { all, .. } => add(if *all { &["kill", "--all"] } else { &["kill"] }),
            Work::Delete => add(&["delete"]),
            Work::Cleanup | Work::Undo => add(&["delete", "--force"]),
            Work::Checkpoint(checkpoint) => {
                add(&["checkpoint"]);
                argv.extend(checkpoint.words(&checkpoint.work(self.bundle)));
            }
            Work::Restore(restore) => argv.extend(self.restore_words(restore, console)),
        }
        argv.push(key.id.clone());
        if let Work::Kill { signal: number, .. } = work {
            argv.push(number.to_string());
        }
        argv
    }

    /// CRIU works where the stock shim lets it: in the bundle's work folder, or where the options
    /// say.
    fn restore_words(&self, restore: &Restore, console: Option<&Path>) -> Vec<String> {
        let text = |path: &Path| path.to_string_lossy().into_owned();
        let work = match self.options.criu_work_path.as_str() {
            "" => text(&self.bundle.join("work")),
            path => path.to_owned(),
        };
        let mut words = vec!["restore".to_owned()];
        let mut add = |flag: &str, value: &str| words.extend([flag.to_owned(), value.to_owned()]);
        add("--image-path", &restore.image);
        add("--work-path", &work);
        if !restore.parent.is_empty() {
            add("--parent-path", &restore.parent);
        }
        add("--pid-file", &text(&self.pid_file(&Key::init(""))));
        if let Some(console) = console {
            add("--console-socket", &text(console));
        }
        add("--bundle", &text(self.bundle));
        if self.options.no_pivot_root {
            words.push("--no-pivot".to_owned());
        }
        words.extend(["--detach", "--no-subreaper"].map(str::to_owned));
        words
    }
}

/// The log of commands for the task itself.
pub fn log_in(bundle: &Path) -> PathBuf {
    bundle.join("log.json")
}

/// How much of a log is looked at, bytes: its end.
const LOG_TAIL: u64 = 64 << 10;

#[derive(Deserialize)]
struct Line {
    #[serde(default)]
    level: String,
    #[serde(default)]
    msg: String,
}

/// The length of the log before a command, so that older lines are not taken for its own.
pub fn log_length(path: &Path) -> u64 {
    std::fs::symlink_metadata(path).map_or(0, |meta| meta.len())
}

/// The last error in the log at `path`, from `offset` on. A line that says only that the runtime
/// gives up (level `fatal`, as what wraps a runtime writes) counts where nothing says why.
pub fn last_error(path: &Path, offset: u64) -> Option<String> {
    let mut file = File::options()
        .read(true)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
        .open(path)
        .ok()?;
    let length = file.metadata().ok().filter(|meta| meta.is_file())?.len();
    let from = offset.max(length.saturating_sub(LOG_TAIL));
    file.seek(SeekFrom::Start(from)).ok()?;
    let mut bytes = Vec::new();
    file.take(LOG_TAIL).read_to_end(&mut bytes).ok()?;
    let last = |level| {
        bytes
            .split(|byte| *byte == b'\n')
            .rev()
            .filter_map(|line| serde_json::from_slice::<Line>(line).ok())
            .find(|line| line.level == level)
            .map(|line| line.msg)
    };
    last("error").or_else(|| last("fatal"))
}

/// Sorts what runc and crun say: the one place where a runtime's text is looked into, because
/// they tell kinds apart in no other way.
pub fn kind(text: &str) -> FailureKind {
    let has = |part: &str| text.contains(part);
    if has("process already finished") || has("no such process") || has("container not running") {
        FailureKind::NoProcess
    } else if has("container does not exist") || has("does not exist") && has("container") {
        FailureKind::NoContainer
    } else if has("error opening file") && has("status") && has("No such file") {
        // crun, of a container that it does not know.
        FailureKind::NoContainer
    } else {
        FailureKind::Other
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(work: &Work, key: &Key, options: &Options, console: Option<&str>) -> String {
        let place = Place {
            bundle: Path::new("/b"),
            namespace: "ns",
            options,
        };
        place.argv(key, work, console.map(Path::new)).join(" ")
    }

    #[test]
    fn commands_are_those_of_the_stock_shim() {
        let init = Key::init("c");
        let exec = Key {
            id: "c".into(),
            exec_id: "e".into(),
        };
        let plain = Options::default();
        let log = "runc --root /run/containerd/runc/ns --log /b/log.json --log-format json";
        assert_eq!(
            line(&Work::Create, &init, &plain, None),
            format!("{log} create --bundle /b --pid-file /b/init.pid c")
        );
        assert_eq!(
            line(
                &Work::Kill {
                    signal: 37,
                    all: true
                },
                &init,
                &plain,
                None
            ),
            format!("{log} kill --all c 37")
        );
        let other = Options {
            binary_name: "crun".into(),
            root: "/r".into(),
            systemd_cgroup: true,
            no_pivot_root: true,
            no_new_keyring: true,
            ..Options::default()
        };
        assert_eq!(
            line(&Work::Create, &init, &other, Some("s")),
            "crun --root /r/ns --log /b/log.json --log-format json --systemd-cgroup create \
             --bundle /b --pid-file /b/init.pid --console-socket s --no-pivot --no-new-keyring c"
        );
        let restore = Work::Restore(Restore {
            image: "/i".into(),
            parent: "../p".into(),
        });
        assert_eq!(
            line(&restore, &init, &plain, Some("s")),
            format!(
                "{log} restore --image-path /i --work-path /b/work --parent-path ../p --pid-file \
                 /b/init.pid --console-socket s --bundle /b --detach --no-subreaper c"
            )
        );
        let checkpoint = Work::Checkpoint(Box::new(crate::checkpoint::Checkpoint {
            path: "/i".into(),
            ..Default::default()
        }));
        let criu = Options {
            criu_path: "/opt/criu".into(),
            ..Options::default()
        };
        for work in [&restore, &checkpoint] {
            let words = line(work, &init, &criu, None);
            assert!(words.contains("json --criu /opt/criu "), "{words}");
        }
        assert!(!line(&Work::Start, &init, &criu, None).contains("--criu"));
        assert_eq!(
            line(&checkpoint, &init, &plain, None),
            format!(
                "{log} checkpoint --image-path /i --work-path /b/work/criu-work --leave-running c"
            )
        );
        assert_eq!(
            line(&Work::Exec, &exec, &plain, None),
            "runc --root /run/containerd/runc/ns --log /b/e.log.json --log-format json exec \
             --process /b/e.process.json --detach --pid-file /b/exec-e.pid c"
        );
    }

    #[test]
    fn the_last_error_of_this_command_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log.json");
        assert_eq!(last_error(&path, 0), None);
        // Recorded from runc 1.1.5.
        let old = "{\"level\":\"error\",\"msg\":\"old\",\"time\":\"2026\"}\n";
        let new = "{\"level\":\"warning\",\"msg\":\"w\"}\n{\"level\":\"error\",\"msg\":\"exec \
                   failed: \\\"x\\\"\",\"time\":\"2026\"}\n{\"level\":\"debug\",\"msg\":\"d\"}\nrubbish";
        std::fs::write(&path, format!("{old}{new}")).unwrap();
        assert_eq!(
            last_error(&path, old.len() as u64).as_deref(),
            Some("exec failed: \"x\"")
        );
        // What a program around runc says at its end explains nothing.
        let end = "{\"level\":\"fatal\",\"msg\":\"gave up\"}\n";
        std::fs::write(&path, format!("{old}{end}")).unwrap();
        assert_eq!(last_error(&path, 0).as_deref(), Some("old"));
        assert_eq!(
            last_error(&path, old.len() as u64).as_deref(),
            Some("gave up")
        );
        std::fs::write(&path, old).unwrap();
        assert_eq!(last_error(&path, old.len() as u64), None);
    }

    #[test]
    fn what_runtimes_say_is_sorted() {
        for (text, expected) in [
            ("container does not exist", FailureKind::NoContainer),
            ("container \"x\" does not exist", FailureKind::NoContainer),
            (
                "error opening file `/run/crun/x/status`: No such file or directory",
                FailureKind::NoContainer,
            ),
            ("container not running", FailureKind::NoProcess),
            ("os: process already finished", FailureKind::NoProcess),
            (
                "exec failed: stat /nope: no such file or directory",
                FailureKind::Other,
            ),
        ] {
            assert_eq!(kind(text), expected, "{text}");
        }
    }
}

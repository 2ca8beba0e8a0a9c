//! Checkpoint and restore: what a client asks for, the runtime's words for it, and what CRIU has to
//! be told about stdio.
//!
//! An init of ours writes into its client's fifo or file itself, which is on a mount that the
//! container does not see; CRIU refuses to dump that, unless it is declared *external* under a key
//! made of mount and inode. The keys are left beside the images, and a restore maps them to the
//! new stdio. Checkpoints of the stock shim, where stdio is always a pipe, need none.

use std::{
    fs::{self, File},
    io::{self, Write},
    os::{
        fd::AsRawFd,
        unix::{
            fs::{FileTypeExt, MetadataExt, OpenOptionsExt},
            process::ExitStatusExt,
        },
    },
    path::{Path, PathBuf},
    process::{Command, ExitStatus, Stdio},
};

use prost::Message;
use recoverd_common::{
    failpoint,
    pb::{runc::CheckpointOptions, task, type_url},
    read::read_text,
    seen::Seen,
    ttrpc::code,
};
use serde::{Deserialize, Serialize};

use crate::{children, options::bare, service::Refusal};

/// What containerd 1.x calls the same options when it does not know the runtime's name.
const LINUX_OPTIONS: &str = "containerd.linux.runc.CheckpointOptions";
/// CRIU reads one more configuration file from where this variable says.
const CONFIG_VARIABLE: &str = "CRIU_CONFIG_FILE";
/// The keys of stdio, beside CRIU's images.
const KEYS_FILE: &str = "recoverd-stdio";
/// Longest of such files, and of configuration files that somebody else has named, bytes.
const MAX_KEYS: u64 = 4096;
const MAX_CONFIG: u64 = 64 << 10;

/// What Checkpoint asks for.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Checkpoint {
    /// Of which task.
    pub id: String,
    /// Where CRIU's images go; empty for the runtime's own choice.
    pub path: String,
    /// The container ends with it.
    pub exit: bool,
    /// `--tcp-established`.
    pub open_tcp: bool,
    /// `--ext-unix-sk`.
    pub external_unix_sockets: bool,
    /// `--shell-job`.
    pub terminal: bool,
    /// `--file-locks`.
    pub file_locks: bool,
    /// `--empty-ns`, each.
    pub empty_namespaces: Vec<String>,
    /// `--manage-cgroups-mode`.
    pub cgroups_mode: String,
    /// CRIU's work folder, to be kept; empty for one that goes.
    pub work_path: String,
    /// `--parent-path`.
    pub parent_path: String,
}

/// A checkpoint that a task's init is restored from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Restore {
    /// CRIU's images.
    pub image: String,
    /// The images that those build upon; empty for none.
    pub parent: String,
}

impl Checkpoint {
    /// From the request on the wire.
    pub fn from_request(request: task::CheckpointTaskRequest) -> Result<Self, Refusal> {
        let options = match &request.options {
            // Nothing said, or nothing in it (containerd 1.7 on): the defaults.
            None => CheckpointOptions::default(),
            Some(any) if any.value.is_empty() => CheckpointOptions::default(),
            Some(any) => match bare(&any.type_url) {
                // The fields have the same numbers in both.
                type_url::CHECKPOINT_OPTIONS | LINUX_OPTIONS => {
                    CheckpointOptions::decode(any.value.as_slice()).map_err(|e| {
                        let text = format!("decode checkpoint options: {e}");
                        Refusal::new(code::INVALID_ARGUMENT, text)
                    })?
                }
                other => {
                    let text = format!(
                        "checkpoint options of unknown type {other:?} (allowed: {})",
                        type_url::CHECKPOINT_OPTIONS
                    );
                    return Err(Refusal::new(code::INVALID_ARGUMENT, text));
                }
            },
        };
        Ok(Self {
            id: request.id,
            path: request.path,
            exit: options.exit,
            open_tcp: options.open_tcp,
            external_unix_sockets: options.external_unix_sockets,
            terminal: options.terminal,
            file_locks: options.file_locks,
            empty_namespaces: options.empty_namespaces,
            cgroups_mode: options.cgroups_mode,
            work_path: options.work_path,
            parent_path: options.parent_path,
        })
    }

    /// The runtime's words between `checkpoint` and the id; CRIU works in `work`.
    pub fn words(&self, work: &Path) -> Vec<String> {
        let mut words = Vec::new();
        let mut add = |flag: &str, value: &str| {
            if !value.is_empty() {
                words.extend([flag.to_owned(), value.to_owned()]);
            }
        };
        add("--image-path", &self.path);
        add("--work-path", &work.to_string_lossy());
        add("--parent-path", &self.parent_path);
        add("--manage-cgroups-mode", &self.cgroups_mode);
        for namespace in &self.empty_namespaces {
            add("--empty-ns", namespace);
        }
        for (flag, wanted) in [
            ("--tcp-established", self.open_tcp),
            ("--ext-unix-sk", self.external_unix_sockets),
            ("--shell-job", self.terminal),
            ("--file-locks", self.file_locks),
            ("--leave-running", !self.exit),
        ] {
            if wanted {
                words.push(flag.to_owned());
            }
        }
        words
    }

    /// CRIU's work folder for a task with this bundle.
    pub fn work(&self, bundle: &Path) -> PathBuf {
        if self.work_path.is_empty() {
            bundle.join("work/criu-work")
        } else {
            PathBuf::from(&self.work_path)
        }
    }
}

/// A dump to be made, by a short-lived child.
#[derive(Debug)]
pub struct Dump {
    /// The runtime's command.
    pub argv: Vec<String>,
    /// Where the images go.
    pub image: PathBuf,
    /// CRIU's work folder.
    pub work: PathBuf,
    /// Whether it is kept.
    pub keep_work: bool,
    /// The task's bundle.
    pub bundle: PathBuf,
    /// The init's stdout and stderr, as paths, with their descriptors' numbers.
    pub stdio: Vec<(i32, PathBuf)>,
}

impl Dump {
    /// Makes it.
    pub fn run(&self) -> Result<(), String> {
        let keys: Vec<(i32, String)> = self
            .stdio
            .iter()
            .filter_map(|(number, path)| Some((*number, key_of(path)?)))
            .collect();
        let lines = keys.iter().map(|(_, key)| format!("external {key}\n"));
        let config = write_config(&self.bundle, &lines.collect::<String>())?;
        let Some((program, rest)) = self.argv.split_first() else {
            return Err("no program".to_owned());
        };
        let mut command = Command::new(program);
        command
            .args(rest)
            .env_remove("NOTIFY_SOCKET")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        if let Some(config) = &config {
            command.env(CONFIG_VARIABLE, config);
        }
        failpoint!("checkpoint.dump.before");
        let result = command.output();
        failpoint!("checkpoint.dump.after");
        let result = match result {
            Err(e) => Err(children::not_executed(program, &e)),
            Ok(output) if output.status.success() => self.write_keys(&keys),
            Ok(output) => Err(self.failed(program, output.status, &output.stderr)),
        };
        if !self.keep_work {
            // What is left of it goes with the bundle's work folder.
            let _ = fs::remove_dir_all(&self.work);
        }
        result
    }

    /// In the stock shim's words: the first line of what the runtime says, and where a copy of
    /// CRIU's log is.
    fn failed(&self, program: &str, status: ExitStatus, said: &[u8]) -> String {
        let log = self.bundle.join("criu-dump.log");
        // Without a log CRIU was never started.
        let _ = fs::copy(self.work.join("dump.log"), &log);
        let said = String::from_utf8_lossy(said);
        let line = said.lines().next().unwrap_or_default();
        let end = match status.code() {
            Some(code) => format!("exit status {code}"),
            None => format!("signal {}", status.signal().unwrap_or(0)),
        };
        let log = log.display();
        format!("{program} did not terminate successfully: {end}: {line} path= {log}")
    }

    fn write_keys(&self, keys: &[(i32, String)]) -> Result<(), String> {
        if keys.is_empty() {
            return Ok(());
        }
        let text: String = keys
            .iter()
            .map(|(number, key)| format!("{number} {key}\n"))
            .collect();
        let path = self.image.join(KEYS_FILE);
        write_private(&path, &text).map_err(|e| format!("write {}: {e}", path.display()))
    }
}

/// The environment that `runc restore` needs beside ours: where CRIU is told which of its keys
/// are the new stdio. None when there are none.
pub fn restore_environment(bundle: &Path, restore: &Restore) -> Result<Option<String>, String> {
    let path = Path::new(&restore.image).join(KEYS_FILE);
    let text = match read_text(&path, MAX_KEYS) {
        Seen::Present(text) => text,
        Seen::Absent => return Ok(None),
        Seen::Unknown(why) => return Err(format!("read {}: {why}", path.display())),
    };
    let mut lines = String::new();
    let mut seen = Vec::new();
    for line in text.lines() {
        let (number, key) =
            parse_key(line).ok_or_else(|| format!("{}: {line:?} is no key", path.display()))?;
        // stdout and stderr may be the same file.
        if !seen.contains(&key) {
            lines.push_str(&format!("inherit-fd fd[{number}]:{key}\n"));
            seen.push(key);
        }
    }
    let config = write_config(bundle, &lines)?;
    Ok(config.map(|path| format!("{CONFIG_VARIABLE}={}", path.display())))
}

/// A line of the keys' file. Images may come from anywhere: only what we write is taken.
fn parse_key(line: &str) -> Option<(i32, &str)> {
    let (number, key) = line.split_once(' ')?;
    let number: i32 = number.parse().ok().filter(|n| matches!(n, 1 | 2))?;
    let (mount, inode) = key
        .strip_prefix("file[")?
        .strip_suffix(']')?
        .split_once(':')?;
    let hexadecimal = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_hexdigit());
    (hexadecimal(mount) && hexadecimal(inode)).then_some((number, key))
}

/// CRIU's key of a fifo or file: its mount, as the kernel numbers it, and its inode. None when it
/// cannot be looked at, or is something that CRIU knows by itself.
fn key_of(path: &Path) -> Option<String> {
    let file = File::options()
        .read(true)
        .custom_flags(libc::O_PATH)
        .open(path)
        .ok()?;
    let meta = file.metadata().ok()?;
    if !meta.is_file() && !meta.file_type().is_fifo() {
        return None;
    }
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", file.as_raw_fd())).ok()?;
    let mount: u32 = info
        .lines()
        .find_map(|line| line.strip_prefix("mnt_id:"))?
        .trim()
        .parse()
        .ok()?;
    Some(format!("file[{mount:x}:{:x}]", meta.ino()))
}

/// A configuration file for CRIU with `lines`, after those that it would have read without us.
/// None when there is nothing to tell.
fn write_config(bundle: &Path, lines: &str) -> Result<Option<PathBuf>, String> {
    if lines.is_empty() {
        return Ok(None);
    }
    let theirs = std::env::var_os(CONFIG_VARIABLE).map(PathBuf::from);
    let mut text = match theirs.map(|path| read_text(&path, MAX_CONFIG)) {
        Some(Seen::Present(text)) => format!("{text}\n"),
        Some(Seen::Absent | Seen::Unknown(_)) | None => String::new(),
    };
    text.push_str(lines);
    let path = bundle.join("criu-stdio.conf");
    write_private(&path, &text).map_err(|e| format!("write {}: {e}", path.display()))?;
    Ok(Some(path))
}

fn write_private(path: &Path, text: &str) -> io::Result<()> {
    File::options()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
        .open(path)?
        .write_all(text.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;
    use prost_types::Any;

    #[test]
    fn options_come_in_both_names_and_others_are_refused() {
        let options = CheckpointOptions {
            exit: true,
            empty_namespaces: vec!["network".into(), "ipc".into()],
            work_path: "/w".into(),
            ..CheckpointOptions::default()
        };
        let request = |type_url: &str| {
            Checkpoint::from_request(task::CheckpointTaskRequest {
                id: "c".into(),
                path: "/i".into(),
                options: Some(Any {
                    type_url: type_url.into(),
                    value: options.encode_to_vec(),
                }),
            })
        };
        for name in [
            "containerd.runc.v1.CheckpointOptions",
            "type.googleapis.com/containerd.runc.v1.CheckpointOptions",
            "containerd.linux.runc.CheckpointOptions",
        ] {
            let checkpoint = request(name).unwrap();
            assert_eq!(
                checkpoint
                    .words(&checkpoint.work(Path::new("/b")))
                    .join(" "),
                "--image-path /i --work-path /w --empty-ns network --empty-ns ipc",
                "{name}"
            );
        }
        let refusal = request("containerd.runc.v1.Options").unwrap_err();
        assert_eq!(refusal.code, code::INVALID_ARGUMENT);
    }

    #[test]
    fn a_container_is_left_running_unless_it_shall_end() {
        let checkpoint = Checkpoint {
            open_tcp: true,
            external_unix_sockets: true,
            terminal: true,
            file_locks: true,
            cgroups_mode: "soft".into(),
            parent_path: "../p".into(),
            ..Checkpoint::default()
        };
        assert_eq!(
            checkpoint
                .words(&checkpoint.work(Path::new("/b")))
                .join(" "),
            "--work-path /b/work/criu-work --parent-path ../p --manage-cgroups-mode soft \
             --tcp-established --ext-unix-sk --shell-job --file-locks --leave-running"
        );
    }

    #[test]
    fn stdio_that_was_external_is_inherited_at_restore() {
        let dir = tempfile::tempdir().unwrap();
        let restore = Restore {
            image: dir.path().to_str().unwrap().into(),
            parent: String::new(),
        };
        assert_eq!(restore_environment(dir.path(), &restore), Ok(None));
        let log = dir.path().join("log");
        fs::write(&log, "").unwrap();
        let key = key_of(&log).unwrap();
        let dump = Dump {
            argv: vec!["true".into()],
            image: dir.path().into(),
            work: dir.path().join("work"),
            keep_work: false,
            bundle: dir.path().into(),
            stdio: vec![(1, log.clone()), (2, log), (2, "/dev/null".into())],
        };
        dump.run().unwrap();
        let config = fs::read_to_string(dir.path().join("criu-stdio.conf")).unwrap();
        assert_eq!(config, format!("external {key}\nexternal {key}\n"));
        let variable = restore_environment(dir.path(), &restore).unwrap().unwrap();
        let path = variable.strip_prefix("CRIU_CONFIG_FILE=").unwrap();
        let config = fs::read_to_string(path).unwrap();
        assert_eq!(config, format!("inherit-fd fd[1]:{key}\n"));
    }

    #[test]
    fn keys_that_we_would_not_write_are_refused() {
        assert_eq!(parse_key("1 file[1a:2b]"), Some((1, "file[1a:2b]")));
        for bad in [
            "",
            "1",
            "0 file[1:2]",
            "3 file[1:2]",
            "1 file[1:]",
            "1 file[1:2",
            "1 file[1:2] x",
            "1 pipe:[3]",
        ] {
            assert_eq!(parse_key(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn a_failed_dump_leaves_its_log_and_says_where() {
        let dir = tempfile::tempdir().unwrap();
        let work = dir.path().join("work");
        let script = format!(
            "mkdir {0}; echo log >{0}/dump.log; echo why >&2; exit 3",
            work.display()
        );
        let dump = Dump {
            argv: vec!["sh".into(), "-c".into(), script],
            image: dir.path().into(),
            work: work.clone(),
            keep_work: false,
            bundle: dir.path().into(),
            stdio: vec![],
        };
        let log = dir.path().join("criu-dump.log");
        assert_eq!(
            dump.run().unwrap_err(),
            format!(
                "sh did not terminate successfully: exit status 3: why path= {}",
                log.display()
            )
        );
        assert_eq!(fs::read_to_string(log).unwrap(), "log\n");
        assert!(!work.exists());
    }
}

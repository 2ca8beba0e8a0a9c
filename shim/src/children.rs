//! Short-lived children: everything that may wait (the runtime, mounts, opening a log file on a
//! slow disk) happens in one, with stdio of its own and without a parent-death signal, so that
//! the loop never waits and a dying shim leaves them to finish.
//!
//! A child is a fork. It closes what is not its own first of all (the lock above all: a `flock`
//! lives as long as any duplicate), then does its steps, then becomes its program, if it has one.
//! Why it failed it writes to a pipe, its *words*.

use std::{
    ffi::CString,
    fs::{self, File},
    io::{self, Read},
    os::{
        fd::{OwnedFd, RawFd},
        unix::{ffi::OsStrExt, fs::OpenOptionsExt},
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use nix::{
    errno::Errno,
    fcntl::OFlag,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    unistd::{ForkResult, Pid, execvpe, pipe2, setpgid},
};

use crate::{
    checkpoint::Dump,
    mounts, runc,
    service::Mount,
    sys,
    tasks::{Failure, FailureKind},
};

/// What a child has at 0, 1, 2 and so on.
#[derive(Debug)]
pub enum ChildFile {
    /// `/dev/null`.
    Null,
    /// A descriptor, given away.
    Fd(OwnedFd),
    /// A file that the child opens for appending; made with its folders if `create` says so.
    Append {
        /// Its path.
        path: PathBuf,
        /// Whether it may be new.
        create: bool,
    },
    /// Its words: what it says on it is the text of its failure.
    Words,
}

/// What a child does before it becomes its program.
#[derive(Debug)]
pub enum Step {
    /// Make a folder, if it is not there.
    MakeFolder(PathBuf),
    /// Mount on, or below, this rootfs.
    Mount(Mount, PathBuf),
    /// Unmount everything on and below it.
    Unmount(PathBuf),
    /// Wait until the logger says, by the descriptor at this place, that it is ready, and look
    /// at the next one for why it could not start.
    LoggerReady {
        /// The place.
        at: RawFd,
        /// It has to say a word, not only to close it.
        says: bool,
    },
    /// Run a command to its end; that the container does not exist is no failure.
    Run {
        /// The command.
        argv: Vec<String>,
        /// Its log.
        log: PathBuf,
    },
    /// Make a checkpoint.
    Dump(Dump),
}

/// A child to be.
#[derive(Debug)]
pub struct Plan {
    /// 0, 1, 2 and so on.
    pub files: Vec<ChildFile>,
    /// Working directory; `/` where it is gone, as a bundle may be when its task is deleted.
    pub folder: PathBuf,
    /// In this order; the first failure ends the child, unless `to_the_end`.
    pub steps: Vec<Step>,
    /// All steps are taken whatever fails, and the first failure is told.
    pub to_the_end: bool,
    /// The file that it becomes, where that is not the first word of `argv`.
    pub program: Option<&'static str>,
    /// What it becomes; none for a child that only does its steps.
    pub argv: Vec<String>,
    /// Its whole environment; none for ours.
    pub env: Option<Vec<String>>,
    /// `NAME=value`, on top of ours.
    pub extra_env: Option<String>,
}

/// A logger that does not say that it is ready is taken for hung, milliseconds.
const READY_MS: u16 = 10_000;
/// Longest text of a failure, bytes.
const MAX_WORDS: u64 = 4096;

/// A child that was started.
#[derive(Debug)]
pub struct Spawned {
    /// Its pid. It leads a process group.
    pub pid: Pid,
    /// The other end of its words.
    pub words: OwnedFd,
    /// It waits.
    pub gate: Gate,
}

/// What a child waits at before it does anything. Whoever started it writes its pid down first,
/// and dies in between: then nothing was done that nobody knows of.
#[derive(Debug)]
pub struct Gate(OwnedFd);

impl Gate {
    /// Lets the child go. Dropped instead, the child ends.
    pub fn open(self) {
        // It waits, or has been ended: the pipe is empty.
        let _ = nix::unistd::write(&self.0, b"g");
    }
}

/// This very image, whatever has been installed since: for a child that becomes another program of
/// ours.
pub const OURSELVES: Option<&str> = Some("/proc/self/exe");

/// Its words, by a name that says whose it is.
pub fn ourselves(namespace: &str, id: &str, verb: &str) -> Vec<String> {
    [crate::NAME, "-namespace", namespace, "-id", id, verb]
        .map(str::to_owned)
        .into()
}

/// Starts a child.
pub fn spawn(plan: Plan) -> io::Result<Spawned> {
    let (words, theirs) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
    let (gate, ours) = pipe2(OFlag::O_CLOEXEC)?;
    match sys::fork()? {
        ForkResult::Parent { child } => {
            // Both sides do it: whoever comes first. EACCES: it has executed already.
            let _ = setpgid(child, child);
            Ok(Spawned {
                pid: child,
                words,
                gate: Gate(ours),
            })
        }
        ForkResult::Child => {
            // Only the parent may open it. A sibling that waits has it too, and ends before us.
            drop(ours);
            be_child(plan, &theirs, &gate)
        }
    }
}

fn be_child(plan: Plan, words: &OwnedFd, gate: &OwnedFd) -> ! {
    let _ = setpgid(Pid::from_raw(0), Pid::from_raw(0));
    sys::default_signals();
    loop {
        match nix::unistd::read(gate, &mut [0]) {
            Err(Errno::EINTR) => {}
            Ok(1..) => break,
            Ok(_) | Err(_) => sys::last_words(-1, b"", 1),
        }
    }
    let (place, error) = match arrange(&plan.files, words) {
        Ok(place) => match work(&plan) {
            Ok(()) => (place, None),
            Err(text) => (place, Some(text)),
        },
        // Without its files it cannot even say so; the status does.
        Err(_) => (-1, Some(String::new())),
    };
    match error {
        None => sys::last_words(place, b"", 0),
        Some(text) => sys::last_words(place, text.as_bytes(), 1),
    }
}

fn arrange(files: &[ChildFile], words: &OwnedFd) -> io::Result<RawFd> {
    let null: OwnedFd = File::options()
        .read(true)
        .write(true)
        .open("/dev/null")?
        .into();
    let own: Vec<&OwnedFd> = files
        .iter()
        .map(|file| match file {
            // Opened below, when nothing of the parent's is open any more.
            ChildFile::Null | ChildFile::Append { .. } => &null,
            ChildFile::Fd(fd) => fd,
            ChildFile::Words => words,
        })
        .collect();
    let place = sys::keep_only(&own, words);
    // Closed with everything else.
    std::mem::forget(null);
    place
}

fn work(plan: &Plan) -> Result<(), String> {
    for (number, file) in (0..).zip(&plan.files) {
        if let ChildFile::Append { path, create } = file {
            let opened = append(path, *create)
                .and_then(|file| sys::place(file.into(), number))
                .map_err(|e| format!("open {}: {e}", path.display()));
            opened?;
        }
    }
    enter(&plan.folder)?;
    let mut failed = None;
    for step in &plan.steps {
        match take(step) {
            Err(text) if plan.to_the_end => {
                failed.get_or_insert(text);
            }
            other => other?,
        }
    }
    if let Some(text) = failed {
        return Err(text);
    }
    if plan.argv.is_empty() {
        return Ok(());
    }
    // A mount step may have moved.
    enter(&plan.folder)?;
    Err(execute(plan))
}

fn enter(folder: &Path) -> Result<(), String> {
    match std::env::set_current_dir(folder) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => std::env::set_current_dir("/"),
        entered => entered,
    }
    .map_err(|e| format!("enter {}: {e}", folder.display()))
}

fn append(path: &Path, create: bool) -> io::Result<File> {
    if create && let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    File::options()
        .append(true)
        .create(create)
        .mode(0o644)
        .open(path)
}

fn take(step: &Step) -> Result<(), String> {
    match step {
        Step::MakeFolder(path) => match fs::create_dir(path) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => {
                Err(format!("make folder {}: {e}", path.display()))
            }
            _ => Ok(()),
        },
        Step::Mount(mount, rootfs) => mounts::apply(mount, rootfs),
        Step::Unmount(rootfs) => mounts::undo(rootfs),
        Step::LoggerReady { at, says } => {
            let ready = logger_ready(*at, *says);
            sys::drop_kept(*at);
            sys::drop_kept(at + 1);
            ready
        }
        Step::Run { argv, log } => run(argv, log),
        Step::Dump(dump) => dump.run(),
    }
}

/// What a copier does: says that it is there, by closing the descriptor at 3; then writes what comes
/// on 0 to 1, until it ends. Not by splice(2): it does not go to a file that is appended to.
pub fn copy() -> io::Result<()> {
    sys::drop_kept(3);
    let mut buffer = [0; 16 << 10];
    loop {
        let mut rest = match nix::unistd::read(sys::kept(0), &mut buffer) {
            Ok(0) => return Ok(()),
            Ok(count) => buffer.get(..count).unwrap_or_default(),
            Err(Errno::EINTR) => continue,
            Err(e) => return Err(e.into()),
        };
        while !rest.is_empty() {
            match nix::unistd::write(sys::kept(1), rest) {
                Ok(count) => rest = rest.get(count..).unwrap_or_default(),
                Err(Errno::EINTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
    }
}

fn logger_ready(at: RawFd, says: bool) -> Result<(), String> {
    let mut wait = [PollFd::new(sys::kept(at), PollFlags::POLLIN)];
    match poll(&mut wait, PollTimeout::from(READY_MS)) {
        Ok(0) => return Err("logger did not get ready in time".to_owned()),
        Ok(_) => {}
        Err(e) => return Err(format!("wait for logger: {e}")),
    }
    let mut text = [0; 512];
    match nix::unistd::read(sys::kept(at + 1), &mut text) {
        // It says itself what it could not do.
        Ok(count) if count > 0 => {
            Err(String::from_utf8_lossy(text.get(..count).unwrap_or_default()).into_owned())
        }
        // It executes: silence, not yet an end.
        _ if !says => Ok(()),
        _ => match nix::unistd::read(sys::kept(at), &mut [0]) {
            Ok(1) => Ok(()),
            _ => Err("logger ended before it was ready".to_owned()),
        },
    }
}

fn run(argv: &[String], log: &Path) -> Result<(), String> {
    let Some((program, rest)) = argv.split_first() else {
        return Ok(());
    };
    let before = runc::log_length(log);
    let output = Command::new(program)
        .args(rest)
        .env_remove("NOTIFY_SOCKET")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .output()
        .map_err(|e| not_executed(program, &e))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let text = runc::last_error(log, before).unwrap_or_else(|| said.trim().to_owned());
    match runc::kind(&text) {
        FailureKind::NoContainer => Ok(()),
        FailureKind::NoProcess | FailureKind::Exists | FailureKind::NotRun | FailureKind::Other => {
            Err(text)
        }
    }
}

/// Becomes the program; comes back only with why not.
fn execute(plan: &Plan) -> String {
    let argv = &plan.argv;
    let Some(program) = argv.first() else {
        return "no program".to_owned();
    };
    let c_strings = |list: &[String]| -> Option<Vec<CString>> {
        list.iter()
            .map(|word| CString::new(word.as_str()).ok())
            .collect()
    };
    let extra = plan.extra_env.as_deref().unwrap_or_default();
    let replaced = extra.split('=').next().unwrap_or_default();
    let env = match &plan.env {
        Some(env) => c_strings(env),
        // NOTIFY_SOCKET would make runc act as systemd's child. Bytes, not text: an environment
        // may hold anything.
        None => std::env::vars_os()
            .filter(|(name, _)| name != "NOTIFY_SOCKET" && name != replaced)
            .map(|(name, value)| {
                let words = [name.as_bytes(), value.as_bytes()];
                CString::new(words.join(&b'=')).ok()
            })
            .chain(
                plan.extra_env
                    .iter()
                    .map(|pair| CString::new(pair.as_str()).ok()),
            )
            .collect(),
    };
    let (Some(argv), Some(env)) = (c_strings(argv), env) else {
        return format!("exec {program}: an argument contains a zero byte");
    };
    let program = plan.program.unwrap_or(program);
    let Ok(file) = CString::new(program) else {
        return format!("exec {program}: it contains a zero byte");
    };
    match execvpe(&file, &argv, &env) {
        Ok(never) => match never {},
        Err(errno) => not_executed(program, &errno.into()),
    }
}

/// What a child that has ended said.
pub fn words_of(words: OwnedFd) -> String {
    let mut bytes = Vec::new();
    // The pipe does not block: what was said is there, whoever still holds the other end.
    let _ = File::from(words).take(MAX_WORDS).read_to_end(&mut bytes);
    String::from_utf8_lossy(&bytes).trim().to_owned()
}

/// Why a child failed that ended with `status`: its runtime's log, else its words.
pub fn failure(words: OwnedFd, logged: Option<String>, program: &str, status: u32) -> Failure {
    let said = words_of(words);
    let text = match logged {
        Some(text) if !text.is_empty() => text,
        _ if !said.is_empty() => said,
        _ => format!("{program} ended with status {status}"),
    };
    Failure {
        kind: runc::kind(&text),
        text,
    }
}

/// A file without a name that holds `bytes`, to be read from its start: for a child's stdin.
pub fn memory_file(bytes: &[u8]) -> io::Result<OwnedFd> {
    use std::io::{Seek, Write};
    let fd = nix::sys::memfd::memfd_create(c"stdin", nix::sys::memfd::MFdFlags::MFD_CLOEXEC)?;
    let mut file = File::from(fd);
    file.write_all(bytes)?;
    file.rewind()?;
    Ok(file.into())
}

/// Why `program` could not be executed, as the stock shim says it: clients look for the quoted name.
pub fn not_executed(program: &str, error: &io::Error) -> String {
    if error.kind() == io::ErrorKind::NotFound && !program.contains('/') {
        format!("exec: {program:?}: executable file not found in $PATH")
    } else {
        format!("exec: {program:?}: {error}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::wait::{WaitStatus, waitpid};

    // Tests have threads, so that a fork's child must not allocate while another thread does;
    // they take turns through this lock and allocate little.
    fn outcome(plan: Plan) -> (i32, String) {
        let Spawned { pid, words, gate } = spawn(plan).unwrap();
        gate.open();
        let WaitStatus::Exited(_, status) = waitpid(pid, None).unwrap() else {
            panic!("killed")
        };
        (status, words_of(words))
    }

    fn plan(argv: &[&str]) -> Plan {
        Plan {
            files: vec![ChildFile::Null, ChildFile::Words, ChildFile::Words],
            folder: "/".into(),
            steps: Vec::new(),
            to_the_end: false,
            program: None,
            argv: argv.iter().map(|word| (*word).to_owned()).collect(),
            env: None,
            extra_env: None,
        }
    }

    #[test]
    fn a_child_that_is_not_let_go_does_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let mut plan = plan(&["true"]);
        plan.steps.push(Step::MakeFolder(dir.path().join("made")));
        let Spawned { pid, gate, .. } = spawn(plan).unwrap();
        drop(gate);
        assert_eq!(waitpid(pid, None).unwrap(), WaitStatus::Exited(pid, 1));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_child_becomes_its_program_and_says_why_not() {
        assert_eq!(outcome(plan(&["true"])), (0, String::new()));
        let (status, words) = outcome(plan(&["/no/such/program"]));
        assert_eq!(status, 1);
        assert_eq!(
            words,
            "exec: \"/no/such/program\": No such file or directory (os error 2)"
        );
        let (status, words) = outcome(plan(&["no-such-program"]));
        assert_eq!(status, 1);
        assert_eq!(
            words,
            "exec: \"no-such-program\": executable file not found in $PATH"
        );
        let (status, words) = outcome(plan(&["sh", "-c", "echo sorry >&2; exit 3"]));
        assert_eq!((status, words.as_str()), (3, "sorry"));
    }

    #[test]
    fn a_child_works_in_its_folder_or_where_that_is_gone_at_the_root() {
        let dir = tempfile::tempdir().unwrap();
        let mut there = plan(&["pwd"]);
        there.folder = fs::canonicalize(dir.path()).unwrap();
        let mut gone = plan(&["pwd"]);
        gone.folder = dir.path().join("gone");
        let expected = there.folder.display().to_string();
        assert_eq!(outcome(there), (0, expected));
        assert_eq!(outcome(gone), (0, "/".to_owned()));
    }

    #[test]
    fn a_child_has_its_own_descriptors_only() {
        let (_, words) = outcome(plan(&["sh", "-c", "ls /proc/self/fd | tr '\\n' ' '"]));
        // 3 is the folder that ls reads.
        assert_eq!(words, "0 1 2 3");
    }

    #[test]
    fn a_log_file_is_made_with_its_folders_and_appended_to() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/b/log");
        for _ in 0..2 {
            let mut plan = plan(&["echo", "x"]);
            plan.files[1] = ChildFile::Append {
                path: path.clone(),
                create: true,
            };
            assert_eq!(outcome(plan).0, 0);
        }
        assert_eq!(fs::read_to_string(&path).unwrap(), "x\nx\n");
    }
}

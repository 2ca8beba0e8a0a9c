//! The verb `adopt`: reads who is to be adopted, starts the daemon that does it, says what has
//! become of the tasks. The daemon executes this binary anew, in a session of its own, with the
//! predecessor's environment; it is nobody's child when this process has gone.

use std::{
    env,
    fs::File,
    io::{self, Read, Write},
    os::{
        fd::{AsFd, OwnedFd},
        unix::process::CommandExt,
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use recoverd_common::{
    adoption::{Adopted, Adoption, STOOD_BACK},
    failpoint,
    ids::Id,
    paths::Beside,
    read::MAX_FILE,
    record::{self, Record},
    seen::Seen,
};

use crate::{args::Flags, children, context, sys};

/// For the daemon's word: it waits for a predecessor's end, and for runtime commands.
const WORD: Duration = Duration::from_secs(15);
/// Longest message, bytes: a record, and a little.
const MAX_MESSAGE: u64 = MAX_FILE + 4096;

/// First byte of the daemon's word; the rest says more.
pub const ADOPTED: u8 = b'A';
/// As above: somebody else is responsible.
pub const BACK: u8 = b'B';
/// As above: it could not.
pub const REFUSED: u8 = b'R';

/// How adoption went.
#[derive(Debug)]
pub enum Launched {
    /// The daemon serves.
    Adopted(Adopted),
    /// Somebody else does, or there is nothing to adopt; why.
    StoodBack(String),
}

/// Why there was no adoption, one line.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Refused(String);

impl From<String> for Refused {
    fn from(text: String) -> Self {
        Self(text)
    }
}

/// The verb: standard input to standard output. Gives the exit status.
pub fn run(flags: &Flags, out: &mut impl Write) -> Result<u8, Refused> {
    let mut bytes = Vec::new();
    io::stdin()
        .take(MAX_MESSAGE)
        .read_to_end(&mut bytes)
        .map_err(|e| format!("read adoption: {e}"))?;
    let adoption = Adoption::decode(&bytes).map_err(|e| format!("adoption {e}"))?;
    let descriptors = super::inherited(3, adoption.descriptors.len())?;
    match launch(flags, &adoption, descriptors)? {
        Launched::Adopted(adopted) => {
            // The daemon serves whether or not anybody hears of it.
            let _ = out.write_all(&adopted.encode()).and_then(|()| out.flush());
            failpoint!("adopt.told.after");
            Ok(0)
        }
        Launched::StoodBack(why) => {
            let _ = writeln!(io::stderr(), "stood back: {why}");
            Ok(STOOD_BACK)
        }
    }
}

/// The record that `adoption` is about.
pub fn record_of(adoption: &Adoption, flags: &Flags) -> Result<Record, String> {
    let record = match &adoption.record {
        Some(record) => record.clone(),
        None => {
            let path = Beside::of(&adoption.socket).record;
            match record::read(&path) {
                Seen::Present(record) => record,
                Seen::Absent => return Err(format!("record {} does not exist", path.display())),
                Seen::Unknown(why) => return Err(format!("record {} {why}", path.display())),
            }
        }
    };
    // A record may be anybody's; taking over another owner's tasks would hide them from him.
    let shim = &record.shim;
    if shim.namespace != flags.namespace.as_str() {
        return Err(format!("record is of namespace {:?}", shim.namespace));
    }
    if shim.containerd_address != flags.address {
        let owner = &shim.containerd_address;
        return Err(format!("record is of the containerd at {owner:?}"));
    }
    Ok(record)
}

/// Starts the daemon and waits for its word. It gets `descriptors`, which are those that `adoption`
/// names.
pub fn launch(
    flags: &Flags,
    adoption: &Adoption,
    descriptors: Vec<OwnedFd>,
) -> Result<Launched, Refused> {
    let record = record_of(adoption, flags)?;
    let bundle = record.tasks.iter().map(|task| Path::new(&task.bundle));
    let folder = bundle
        .filter(|path| path.is_absolute())
        .find(|path| path.is_dir())
        .unwrap_or(Path::new("/"));
    let mut daemon_flags = flags.clone();
    // As the predecessor had it: tools find the first task by it.
    if let Some(first) = record.tasks.first()
        && let Ok(id) = Id::new(first.id.clone())
    {
        daemon_flags.id = id;
    }
    let message =
        children::memory_file(&adoption.encode()).map_err(|e| format!("pass adoption: {e}"))?;
    let (told, tells) = io::pipe().map_err(|e| format!("make pipe: {e}"))?;
    let exe = executable()?;
    let kept = &record.context.env;
    // What the predecessor did without is not taken from whoever asks, who may be a person's shell.
    // A record that names none of them knows nothing of its environment.
    let without = context::KEPT_VARIABLES.iter();
    let without = without.filter(|name| !kept.is_empty() && !kept.contains_key(**name));
    // Ourselves, and not whatever has our name by now: we may be here because that is broken.
    let mut command = Command::new("/proc/self/exe");
    command
        .arg0(&exe)
        .args(daemon_flags.of_daemon(flags.group()))
        .arg("-adopt")
        .current_dir(folder)
        .envs(kept)
        // containerd's own line to systemd: runc would speak on it.
        .env_remove("NOTIFY_SOCKET")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    for name in without {
        command.env_remove(name);
    }
    let tells = OwnedFd::from(tells);
    let given: Vec<&OwnedFd> = [&message, &tells].into_iter().chain(&descriptors).collect();
    sys::give(&mut command, &given, false).map_err(|e| format!("prepare: {e}"))?;
    failpoint!("adopt.spawn.before");
    let mut daemon = command
        .spawn()
        .map_err(|e| format!("execute {}: {e}", exe.display()))?;
    failpoint!("adopt.spawn.after");
    drop((command, tells, descriptors));
    let word = await_word(told.into(), &mut daemon);
    failpoint!("adopt.heard.after");
    if word.is_err() {
        // It has not said that it serves. Our child, and not reaped: the number is its own.
        let _ = daemon.kill();
        let _ = daemon.wait();
    }
    let word = word?;
    match word.split_first() {
        Some((&ADOPTED, rest)) => Adopted::decode(rest)
            .map(Launched::Adopted)
            .map_err(|e| Refused(format!("answer of the adopting shim {e}"))),
        Some((kind, rest)) => {
            let _ = daemon.wait();
            let why = String::from_utf8_lossy(rest).into_owned();
            match *kind {
                BACK => Ok(Launched::StoodBack(why)),
                _ => Err(Refused(why)),
            }
        }
        None => Err(Refused(match daemon.wait() {
            Ok(status) => format!("adopting shim ended with {status}"),
            Err(e) => e.to_string(),
        })),
    }
}

/// The path that this binary has, for good: its file may have been replaced since.
pub fn executable() -> Result<PathBuf, String> {
    let exe = env::current_exe().map_err(|e| format!("find own executable: {e}"))?;
    let text = exe.to_string_lossy();
    match text.strip_suffix(" (deleted)").map(PathBuf::from) {
        Some(path) if path.exists() => Ok(path),
        Some(_) | None => Ok(exe),
    }
}

fn await_word(told: OwnedFd, daemon: &mut Child) -> Result<Vec<u8>, String> {
    let deadline = Instant::now() + WORD;
    let mut told = File::from(told);
    let mut word = Vec::new();
    let mut piece = vec![0; 64 << 10];
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        let mut wait = [PollFd::new(told.as_fd(), PollFlags::POLLIN)];
        match poll(&mut wait, timeout) {
            Ok(0) => {
                let (pid, seconds) = (daemon.id(), WORD.as_secs());
                return Err(format!("adopting shim {pid} not ready after {seconds} s"));
            }
            Ok(_) => {}
            Err(nix::errno::Errno::EINTR) => continue,
            Err(e) => return Err(e.to_string()),
        }
        match told.read(&mut piece) {
            Ok(0) => return Ok(word),
            Ok(count) => word.extend_from_slice(piece.get(..count).unwrap_or_default()),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e.to_string()),
        }
        if word.len() as u64 > MAX_MESSAGE {
            return Err("adopting shim says too much".to_owned());
        }
    }
}

//! What only `repair` and the hooks ask for, beside a look: which file stands at a path now, who is connected
//! to a shim, where a shim's containerd takes events. Read before a plan, and again before each
//! step. Takes no lock and opens nothing for writing.

use std::{
    collections::BTreeMap,
    os::fd::AsRawFd,
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket},
};
use recoverd_common::{
    event_log,
    paths::Beside,
    proc::{FileId, Proc},
    read::read_file,
    seen::Seen,
};

use crate::{
    facts::{Grounds, Look},
    findings::{Code, Subject},
    verify::Examined,
};

/// Longest environment that is read, bytes.
const MAX_ENVIRONMENT: u64 = 256 << 10;

/// The grounds of everything that was found.
pub fn observe(proc: &Path, examined: &Examined) -> Grounds {
    let proc = Proc::new(proc);
    let look = &examined.look;
    let mut grounds = Grounds {
        files: paths(examined)
            .into_iter()
            .map(|path| (path.clone(), FileId::of_entry(&path)))
            .collect(),
        unsent: BTreeMap::new(),
        connected: BTreeMap::new(),
        ttrpc: BTreeMap::new(),
    };
    for file in &look.records {
        let events = Beside::of(Path::new(&file.socket)).events;
        grounds
            .unsent
            .insert(file.socket.clone(), event_log::holds_any(&events));
    }
    let wanted = |code| examined.suspicions.iter().any(|s| s.finding.code == code);
    if wanted(Code::LeakedShim) {
        for shim in &look.shims {
            let addresses = shim.listens.iter();
            let all = addresses.map(|address| connections(&proc, address));
            let sum = all.fold(Seen::Present(0), add);
            grounds.connected.insert(shim.id.pid, sum);
        }
    }
    if wanted(Code::StuckTask) || wanted(Code::ExitUnreported) {
        for shim in &look.shims {
            if let Some(path) = ttrpc_address(&proc, shim.id.pid) {
                grounds.ttrpc.insert(shim.id.pid, path);
            }
        }
    }
    grounds
}

/// Every path that a step could be about.
fn paths(examined: &Examined) -> Vec<PathBuf> {
    let look: &Look = &examined.look;
    let mut found = Vec::new();
    for suspicion in &examined.suspicions {
        match &suspicion.finding.subject {
            Subject::Path { path } => found.push(PathBuf::from(path)),
            Subject::Task { namespace, id } => {
                let bundles = look.bundles.iter().map(|facts| &facts.bundle);
                found.extend(
                    bundles
                        .filter(|b| b.namespace.as_str() == namespace && b.id.as_str() == id)
                        .map(|b| b.path.clone()),
                );
                let runc = look.runc.iter();
                found.extend(
                    runc.filter(|entry| entry.name.0 == *namespace && entry.name.1 == *id)
                        .map(|entry| entry.path.clone()),
                );
            }
            Subject::Shim { .. } => {}
        }
    }
    for file in &look.records {
        found.extend(of_group(Path::new(&file.socket)));
    }
    found
}

/// The files of a group, the lock last.
pub fn of_group(socket: &Path) -> [PathBuf; 7] {
    Beside::of(socket).all()
}

fn add(a: Seen<usize>, b: Seen<usize>) -> Seen<usize> {
    a.and_then(|a| b.map(|b| a.saturating_add(b)))
}

/// How many are connected to a socket, whoever they are. One that has not been accepted counts.
pub fn connections(proc: &Proc, address: &str) -> Seen<usize> {
    proc.unix_sockets().map(|all| {
        let of_it = |socket: &&recoverd_common::proc::UnixSocket| {
            socket.path == address && !socket.listening
        };
        all.iter().filter(of_it).count()
    })
}

/// Whether nobody listens on a path. `Err` says why that is not so, or not known.
pub fn nobody_listens(address: &str) -> Result<(), String> {
    if address.starts_with('@') {
        return Err("has no file".into());
    }
    let tried = UnixAddr::new(address).and_then(|address| {
        // Does not wait for a place in a full queue.
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let socket = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
        connect(socket.as_raw_fd(), &address)
    });
    match tried {
        Err(Errno::ENOENT | Errno::ECONNREFUSED) => Ok(()),
        // A full queue is a listener's.
        Ok(()) | Err(Errno::EAGAIN) => Err("somebody does".into()),
        Err(error) => Err(error.to_string()),
    }
}

/// Where the shim's containerd takes events, as its environment says.
fn ttrpc_address(proc: &Proc, pid: i32) -> Option<PathBuf> {
    let bytes = read_file(&proc.path(pid, "environ"), MAX_ENVIRONMENT);
    let mut entries = bytes.present()?.split(|byte| *byte == 0);
    let value = entries.find_map(|entry| entry.strip_prefix(b"TTRPC_ADDRESS="))?;
    let text = std::str::from_utf8(value).ok()?;
    let path = text.strip_prefix("unix://").unwrap_or(text);
    path.starts_with('/').then(|| path.into())
}

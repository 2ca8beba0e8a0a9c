//! Where things are on disk, as containerd, runc and recoverd name them. No I/O.

use std::{
    fmt::Write as _,
    path::{Path, PathBuf},
};

use sha2::{Digest, Sha256};

use crate::ids::{Id, Namespace};

/// The socket folder of containerd 1.6 to 2.2 whatever `state` says, and the default after.
pub const SOCKET_DIR: &str = "/run/containerd/s";
/// runc's state below containerd when the options name no other root.
pub const RUNC_ROOT: &str = "/run/containerd/runc";
/// The plugin folder that holds bundles (below `state`) and work folders (below `root`).
pub const TASK_PLUGIN: &str = "io.containerd.runtime.v2.task";
/// As [`TASK_PLUGIN`], of sandboxes that a shim's own sandbox service runs (2.x).
pub const SANDBOX_PLUGIN: &str = "io.containerd.sandbox.controller.v1.shim";

/// Annotations that group containers in one shim, the first that is present counts (facts of
/// the stock shim: `io.containerd.runc.v2.group` before the CRI's).
pub const GROUP_ANNOTATIONS: [&str; 2] = [
    "io.containerd.runc.v2.group",
    "io.kubernetes.cri.sandbox-id",
];

/// The group that annotations name, whose members share one shim.
pub fn group(annotations: &std::collections::BTreeMap<String, String>) -> Option<&str> {
    let named = |key: &&str| annotations.get(*key).filter(|group| !group.is_empty());
    GROUP_ANNOTATIONS.iter().find_map(named).map(String::as_str)
}

/// `<state>/io.containerd.runtime.v2.task/<namespace>/<id>`.
pub fn bundle(state: &Path, namespace: &Namespace, id: &Id) -> PathBuf {
    state
        .join(TASK_PLUGIN)
        .join(namespace.as_str())
        .join(id.as_str())
}

/// `<socket dir>/<sha256 of "<grpc address>/<namespace>/<group>">`, the name that containerd's
/// runc shims listen on. `grpc_address` is the `-address` argument, without scheme.
pub fn socket(dir: &Path, grpc_address: &str, namespace: &str, group: &str) -> PathBuf {
    dir.join(socket_name(grpc_address, namespace, group))
}

/// The file name part of [`socket`]: 64 hexadecimal digits.
pub fn socket_name(grpc_address: &str, namespace: &str, group: &str) -> String {
    // Go's path.Join cleans: containerd hashes the cleaned path.
    let joined = clean(&[grpc_address, namespace, group]);
    let mut name = String::with_capacity(64);
    for byte in Sha256::digest(joined.as_bytes()) {
        // Writing to a String cannot fail.
        let _ = write!(name, "{byte:02x}");
    }
    name
}

/// Go's `path.Join`: joins with `/`, resolves `.` and `..`, squeezes slashes.
fn clean(parts: &[&str]) -> String {
    let joined = parts
        .iter()
        .filter(|p| !p.is_empty())
        .copied()
        .collect::<Vec<_>>()
        .join("/");
    let rooted = joined.starts_with('/');
    let mut out: Vec<&str> = Vec::new();
    for part in joined.split('/') {
        match part {
            "" | "." => {}
            ".." if out.last().is_some_and(|last| *last != "..") => {
                out.pop();
            }
            ".." if rooted => {}
            part => out.push(part),
        }
    }
    format!("{}{}", if rooted { "/" } else { "" }, out.join("/"))
}

/// The files beside a shim's socket (SPEC, section 4).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Beside {
    /// The record, `<socket>.record`.
    pub record: PathBuf,
    /// The record's second file, `<socket>.record.spare`: the next one is written there.
    pub spare: PathBuf,
    /// `flock`ed by whoever is responsible, `<socket>.lock`.
    pub lock: PathBuf,
    /// `flock`ed by who is about to end the holder of the lock and to replace it,
    /// `<socket>.lock.next`.
    pub next_lock: PathBuf,
    /// Events not yet acknowledged, `<socket>.events`.
    pub events: PathBuf,
    /// A log of events that will take the other's place when it is whole, `<socket>.events.new`.
    pub begun_events: PathBuf,
    /// Read-only requests not yet answered, `<socket>.requests`.
    pub requests: PathBuf,
}

impl Beside {
    /// The files beside `socket`.
    pub fn of(socket: &Path) -> Self {
        let with = |suffix: &str| {
            let mut name = socket.as_os_str().to_owned();
            name.push(suffix);
            PathBuf::from(name)
        };
        Self {
            record: with(".record"),
            spare: with(".record.spare"),
            lock: with(".lock"),
            next_lock: with(".lock.next"),
            events: with(".events"),
            begun_events: with(".events.new"),
            requests: with(".requests"),
        }
    }

    /// All of them, the lock last: whoever removes them is responsible until nothing is left.
    pub fn all(self) -> [PathBuf; 7] {
        [
            self.record,
            self.spare,
            self.events,
            self.begun_events,
            self.requests,
            self.next_lock,
            self.lock,
        ]
    }
}

/// True for the name of a shim socket: 64 lower-case hexadecimal digits.
pub fn is_socket_name(name: &str) -> bool {
    name.len() == 64 && name.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn socket_names_are_containerds() {
        // sha256 of "/run/containerd/containerd.sock/facts/f016" and of cleaned variants.
        let name = socket_name("/run/containerd/containerd.sock", "facts", "f016");
        assert!(is_socket_name(&name));
        assert_eq!(
            name,
            socket_name("/run//containerd/./x/../containerd.sock/", "facts", "f016")
        );
        assert_ne!(
            name,
            socket_name("/run/containerd/containerd.sock", "facts", "f017")
        );
        assert_eq!(clean(&["", "a", "../.."]), "..");
        assert_eq!(clean(&["/a", "../../b"]), "/b");
    }
}

//! What passes from a shim to the one that is responsible after it, beside the record.
//!
//! ```text
//! crash     record + <socket>.requests + descriptors that somebody has kept  ──▶ a new process
//! upgrade   the whole loop, in memory  + its own descriptors, by number      ──▶ the same process
//! ```
//!
//! *After a crash* the keeper (`recoverd supervise`, or `recoverd upgrade` after an upgrade that
//! went wrong) starts the verb `adopt` (see [`crate::adoption`]) with the descriptors that it has
//! kept, inherited at 3, 4, 5… in the order of [`Adoption::descriptors`]. The names there are for
//! people: a successor looks at each descriptor itself, and knows a connection by the inode of its
//! socket, under which its requests are written down. So a descriptor that was taken out of the
//! dead shim's table is as good as one that it has sent. What is missing is opened anew as far as
//! it can be, what is of no use is closed.
//!
//! | name | is |
//! | --- | --- |
//! | `listener` | the socket on which the shim accepts |
//! | `connection` | one that it has accepted |
//! | `master:<id>/<exec>` | the master of a process's terminal; without exec that of an init |
//! | `stdin:<id>/<exec>` | the write end of the pipe that is its stdin |
//! | `output:<id>/<exec>` | the read end of a pipe into which it writes |
//! | `stdin-fifo:<id>/<exec>` | the client's fifo for it: without a reader the client meets a broken pipe |
//!
//! *An upgrade* begins with a request on the shim's own socket: service [`SERVICE`], method
//! [`UPGRADE`], [`UpgradeRequest`]. The shim starts the executable that it names with
//! `-handoff-check` and the real message as its standard input; one that can read it says
//! [`READS`]. Then the shim writes the message anew, into a sealed file in memory, and becomes the executable
//! with `-handoff=<number of that file>`: same process, so its children, its lock and its
//! descriptors stay, each under its number. The new image answers the request, on the connection
//! where it was asked: that is its word that it serves. A refusal comes from the old image, and
//! nothing has changed. No answer in time, and whoever has asked starts the old executable as after
//! a crash, with descriptors that it has duplicated before; that one ends the process.
//!
//! ```text
//! {"format": 1, "version": of who wrote it, "shim": everything}
//! ```
//!
//! `format` is read before anything else; a message of another format is refused, and a shim that
//! is refused stays as it is. What `shim` holds is held by the golden file of the shim's tests
//! (`shim/testdata/handoff-1.json`): a new field needs a default, or a new format.
//!
//! [`Adoption::descriptors`]: crate::adoption::Adoption::descriptors

use std::io::Write;

use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::record::Process;

/// The socket on which the shim accepts connections.
pub const LISTENER: &str = "listener";
/// An accepted connection.
pub const CONNECTION: &str = "connection";

/// What the name of a pidfd begins with: of a process of the shim, opened while that lived. Here
/// the name counts, for a pidfd of a process that was collected says no longer whose it is.
const PIDFD: &str = "pidfd:";

/// The name of the pidfd of this process.
pub fn pidfd_name(process: Process) -> String {
    format!("{PIDFD}{}.{}", process.pid, process.start_time)
}

/// Whose pidfd bears this name; none if it is the name of something else.
pub fn pidfd_of(name: &str) -> Option<Process> {
    let (pid, start_time) = name.strip_prefix(PIDFD)?.split_once('.')?;
    Some(Process {
        pid: pid.parse().ok()?,
        start_time: start_time.parse().ok()?,
    })
}

/// More descriptors than a shim has.
pub const MAX_DESCRIPTORS: usize = 4096;

/// The service of an upgrade, on a shim's socket.
pub const SERVICE: &str = "recoverd.shim.v1.Shim";
/// Its method.
pub const UPGRADE: &str = "Upgrade";

/// What an executable says, before its version, when it can read the message that it was given.
pub const READS: &str = "reads handoff 1, version ";

/// The format that is written, and the only one that is read.
pub const FORMAT: u32 = 1;

/// Asks a shim to become another executable.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct UpgradeRequest {
    /// Its path.
    #[prost(string, tag = "1")]
    pub executable: String,
}

/// The new image serves.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct UpgradeResponse {
    /// Its version.
    #[prost(string, tag = "1")]
    pub version: String,
}

/// Why a message is not what it should be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Misunderstood {
    /// Not JSON, or fields are missing or of another type.
    #[error("handoff is not understood: {0}")]
    Malformed(String),
    /// Of another format.
    #[error("handoff has format {0}, not {FORMAT}")]
    Format(u32),
}

#[derive(Serialize)]
struct Sent<'a, T> {
    format: u32,
    version: &'a str,
    shim: &'a T,
}

#[derive(Deserialize)]
struct Head {
    format: u32,
}

#[derive(Deserialize)]
struct Received<T> {
    shim: T,
}

/// Writes the message of an image of `version`.
pub fn encode<T: Serialize>(version: &str, shim: &T, to: impl Write) -> std::io::Result<()> {
    let sent = Sent {
        format: FORMAT,
        version,
        shim,
    };
    serde_json::to_writer(to, &sent).map_err(Into::into)
}

/// Reads it.
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Misunderstood> {
    let malformed = |e: serde_json::Error| Misunderstood::Malformed(e.to_string());
    let head: Head = serde_json::from_slice(bytes).map_err(malformed)?;
    if head.format != FORMAT {
        return Err(Misunderstood::Format(head.format));
    }
    let received: Received<T> = serde_json::from_slice(bytes).map_err(malformed)?;
    Ok(received.shim)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_format_is_read_before_anything_else() {
        let mut bytes = Vec::new();
        encode("1.2.3", &[7, 8], &mut bytes).unwrap();
        assert_eq!(bytes, br#"{"format":1,"version":"1.2.3","shim":[7,8]}"#);
        assert_eq!(decode::<Vec<u32>>(&bytes), Ok(vec![7, 8]));
        let newer = br#"{"shim": "what?", "format": 2}"#;
        assert_eq!(decode::<Vec<u32>>(newer), Err(Misunderstood::Format(2)));
        for bad in [&b""[..], b"{}", b"[]", br#"{"format":1}"#, b"\xff"] {
            let found = decode::<Vec<u32>>(bad);
            assert!(matches!(found, Err(Misunderstood::Malformed(_))));
        }
    }

    #[test]
    fn the_name_of_a_pidfd_says_whose_it_is() {
        let process = Process {
            pid: 7,
            start_time: 1 << 40,
        };
        assert_eq!(pidfd_of(&pidfd_name(process)), Some(process));
        for other in ["listener", "pidfd:", "pidfd:7", "pidfd:7.", "pidfd:-1.2"] {
            assert_eq!(pidfd_of(other), None);
        }
    }
}

//! What `recoverd` and a successor shim say to each other: `recoverd` starts our shim with the
//! verb `adopt`, writes one [`Adoption`] to its standard input and reads one [`Adopted`] from its
//! standard output. Both are JSON, one object.
//!
//! ```text
//! containerd-shim-recoverd-v1 -namespace NS -address GRPC -id GROUP [-debug] adopt
//! exit 0   adopted: the successor serves on the socket; [`Adopted`] on stdout
//! exit 3   stood back: somebody holds the tasks and answers, or nothing is left to adopt
//! exit 1   could not; one line on stderr, and the tasks are as they were
//! ```
//!
//! One format serves both kinds of shim: for a shim of ours the record is the one beside the
//! socket, for a stock shim `recoverd` writes the record that it would have had.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::handoff::MAX_DESCRIPTORS;
use crate::record::{
    Exit, Phase, Process, Record,
    version::{self, Plain, Unreadable},
};
use crate::timestamp::Timestamp;

/// The format of both messages.
const FORMAT: u32 = 1;

/// Exit status of the verb: somebody else is responsible, nothing was touched.
pub const STOOD_BACK: u8 = 3;

/// What a successor is to take over.
#[derive(Debug, Clone, PartialEq)]
pub struct Adoption {
    /// Where containerd will look: the successor listens here.
    pub socket: PathBuf,
    /// What is known of the tasks; none: the record beside the socket says it.
    pub record: Option<Record>,
    /// A shim that lives and does not answer. The successor stops it, takes the descriptors that
    /// only it has, ends it, and only then serves.
    pub predecessor: Option<Process>,
    /// Descriptors of a predecessor that has died, kept by who starts the successor: this one is
    /// started with them at 3, 4, 5…, and here are their names (see [`crate::handoff`]).
    pub descriptors: Vec<String>,
    /// How processes ended that nobody may be able to say of any more, as a supervisor saw it.
    pub observed: Vec<Observed>,
}

/// An end that somebody has witnessed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Observed {
    /// Who.
    pub process: Process,
    /// Exit code, or 128 + signal.
    pub status: u32,
    /// When it was seen.
    pub at: Timestamp,
}

/// What became of one task.
#[derive(Debug, Clone, PartialEq)]
pub struct AdoptedTask {
    /// The container's id.
    pub id: String,
    /// How far it is now.
    pub phase: Phase,
    /// Its init, if there is one.
    pub init: Option<Process>,
    /// How it ended, if it has.
    pub exit: Option<Exit>,
    /// What could not be had back, one line each: a terminal, a reader, an exec's status.
    pub remarks: Vec<String>,
}

/// The successor's answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Adopted {
    /// The successor.
    pub shim: Process,
    /// Its tasks, by id.
    pub tasks: Vec<AdoptedTask>,
    /// What concerns no task alone: a cgroup or limit that could not be restored.
    pub remarks: Vec<String>,
}

/// Why bytes are not what they should be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Misunderstood {
    /// Not JSON, or fields are missing or of another type.
    #[error("is not understood: {0}")]
    Malformed(String),
    /// Of another version of the other program.
    #[error("has format {0}, not {FORMAT}")]
    Format(u32),
    /// No shim has so many.
    #[error("names {0} descriptors, more than {MAX_DESCRIPTORS}")]
    TooMany(usize),
    /// Its record is not readable.
    #[error("record {0}")]
    Record(#[source] Unreadable),
}

#[derive(Serialize, Deserialize)]
struct AdoptionOnWire {
    format: u32,
    socket: PathBuf,
    record: Option<Value>,
    predecessor: Option<version::Process>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    descriptors: Vec<String>,
    #[serde(default)]
    observed: Vec<ObservedOnWire>,
}

#[derive(Serialize, Deserialize)]
struct ObservedOnWire {
    process: version::Process,
    status: u32,
    at: Timestamp,
}

#[derive(Serialize, Deserialize)]
struct AdoptedOnWire {
    format: u32,
    shim: version::Process,
    tasks: Vec<TaskOnWire>,
    remarks: Vec<String>,
}

#[derive(Serialize, Deserialize)]
struct TaskOnWire {
    id: String,
    phase: version::Phase,
    init: Option<version::Process>,
    exit: Option<version::Exit>,
    remarks: Vec<String>,
}

#[derive(Deserialize)]
struct Head {
    format: u32,
}

fn head(bytes: &[u8]) -> Result<(), Misunderstood> {
    let head: Head = serde_json::from_slice(bytes).map_err(malformed)?;
    match head.format {
        FORMAT => Ok(()),
        other => Err(Misunderstood::Format(other)),
    }
}

fn malformed(error: serde_json::Error) -> Misunderstood {
    Misunderstood::Malformed(error.to_string())
}

impl Adoption {
    /// For the successor's standard input.
    pub fn encode(&self) -> Vec<u8> {
        let record = self.record.as_ref().map(version::encode);
        let wire = AdoptionOnWire {
            format: FORMAT,
            socket: self.socket.clone(),
            record: record.and_then(|bytes| serde_json::from_slice(&bytes).ok()),
            predecessor: Plain::of(&self.predecessor),
            descriptors: self.descriptors.clone(),
            observed: self
                .observed
                .iter()
                .map(|seen| ObservedOnWire {
                    process: Plain::of(&seen.process),
                    status: seen.status,
                    at: seen.at,
                })
                .collect(),
        };
        // Only a path that is not UTF-8 can make this fail; a socket's is hexadecimal.
        serde_json::to_vec(&wire).unwrap_or_default()
    }

    /// From the successor's standard input.
    pub fn decode(bytes: &[u8]) -> Result<Self, Misunderstood> {
        head(bytes)?;
        let wire: AdoptionOnWire = serde_json::from_slice(bytes).map_err(malformed)?;
        let record = match wire.record {
            None => None,
            Some(value) => {
                let bytes = serde_json::to_vec(&value).map_err(malformed)?;
                Some(version::decode(&bytes).map_err(Misunderstood::Record)?)
            }
        };
        if wire.descriptors.len() > MAX_DESCRIPTORS {
            return Err(Misunderstood::TooMany(wire.descriptors.len()));
        }
        Ok(Self {
            socket: wire.socket,
            record,
            predecessor: wire.predecessor.back(),
            descriptors: wire.descriptors,
            observed: wire
                .observed
                .into_iter()
                .map(|seen| Observed {
                    process: seen.process.back(),
                    status: seen.status,
                    at: seen.at,
                })
                .collect(),
        })
    }
}

impl Adopted {
    /// For the successor's standard output.
    pub fn encode(&self) -> Vec<u8> {
        let task = |task: &AdoptedTask| TaskOnWire {
            id: task.id.clone(),
            phase: Plain::of(&task.phase),
            init: Plain::of(&task.init),
            exit: Plain::of(&task.exit),
            remarks: task.remarks.clone(),
        };
        let wire = AdoptedOnWire {
            format: FORMAT,
            shim: Plain::of(&self.shim),
            tasks: self.tasks.iter().map(task).collect(),
            remarks: self.remarks.clone(),
        };
        serde_json::to_vec(&wire).unwrap_or_default()
    }

    /// From the successor's standard output.
    pub fn decode(bytes: &[u8]) -> Result<Self, Misunderstood> {
        head(bytes)?;
        let wire: AdoptedOnWire = serde_json::from_slice(bytes).map_err(malformed)?;
        let task = |task: TaskOnWire| AdoptedTask {
            id: task.id,
            phase: task.phase.back(),
            init: task.init.back(),
            exit: task.exit.back(),
            remarks: task.remarks,
        };
        Ok(Self {
            shim: wire.shim.back(),
            tasks: wire.tasks.into_iter().map(task).collect(),
            remarks: wire.remarks,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::tests::full;

    const SHIM: Process = Process {
        pid: 7,
        start_time: 8,
    };

    #[test]
    fn both_messages_arrive_as_they_were_sent() {
        for record in [None, Some(full())] {
            let sent = Adoption {
                socket: "/run/containerd/s/0a".into(),
                record,
                predecessor: Some(SHIM),
                descriptors: vec!["listener".into(), "connection".into()],
                observed: vec![Observed {
                    process: SHIM,
                    status: 143,
                    at: Timestamp {
                        seconds: 9,
                        nanos: 8,
                    },
                }],
            };
            assert_eq!(Adoption::decode(&sent.encode()), Ok(sent));
        }
        let sent = Adopted {
            shim: SHIM,
            tasks: vec![AdoptedTask {
                id: "a".into(),
                phase: Phase::Stopped,
                init: Some(SHIM),
                exit: Some(Exit::Unknown { why: "gone".into() }),
                remarks: vec!["no terminal".into()],
            }],
            remarks: vec!["nice".into()],
        };
        assert_eq!(Adopted::decode(&sent.encode()), Ok(sent));
    }

    #[test]
    fn another_format_and_garbage_are_refused() {
        let other = br#"{"format": 2, "socket": 7}"#;
        assert_eq!(Adoption::decode(other), Err(Misunderstood::Format(2)));
        assert_eq!(Adopted::decode(other), Err(Misunderstood::Format(2)));
        for bad in [&b""[..], b"[]", b"{}", br#"{"format":1}"#] {
            assert!(matches!(
                Adoption::decode(bad),
                Err(Misunderstood::Malformed(_))
            ));
        }
    }
}

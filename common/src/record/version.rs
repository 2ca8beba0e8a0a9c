//! The record as it is on disk: JSON, one object. These types are the format and nothing else;
//! a change here is a change of the format, and goes with the golden file of its test.
//!
//! `format` is read before anything else is looked at. A reader that meets a newer one says so
//! and touches nothing; unknown fields of a known format are ignored, so that fields may be added
//! without a new format when a reader that misses them does no harm.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super as domain;
use crate::timestamp::Timestamp;

/// The format that this build writes, and the newest that it reads.
pub const FORMAT: u32 = 1;

/// Why bytes are no record of ours.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unreadable {
    /// Not JSON, or no object with a number `format`.
    #[error("is not a record: {0}")]
    NotARecord(String),
    /// Written by a newer version.
    #[error("has format {0}, newer than {FORMAT}")]
    Newer(u32),
    /// Format 0 was never written.
    #[error("has format {0}, which no version wrote")]
    Never(u32),
    /// The right format, wrong content.
    #[error("does not hold to format {FORMAT}: {0}")]
    Broken(String),
}

#[derive(Deserialize)]
struct Head {
    format: u32,
}

/// Reads a record from the bytes of its file.
pub fn decode(bytes: &[u8]) -> Result<domain::Record, Unreadable> {
    let head: Head =
        serde_json::from_slice(bytes).map_err(|e| Unreadable::NotARecord(e.to_string()))?;
    match head.format {
        1 => serde_json::from_slice::<Record>(bytes)
            .map(Into::into)
            .map_err(|e| Unreadable::Broken(e.to_string())),
        0 => Err(Unreadable::Never(0)),
        newer => Err(Unreadable::Newer(newer)),
    }
}

/// The bytes of the file for `record`, in the newest format.
pub fn encode(record: &domain::Record) -> Vec<u8> {
    // Only maps with keys that are no strings, and writers that fail, can make this fail.
    serde_json::to_vec(&Record::from(record)).unwrap_or_default()
}

/// Declares a persisted struct with the conversions from and to the domain type whose fields have
/// the same names, converting each field.
macro_rules! persisted {
    ($(#[$meta:meta])* $name:ident { $($(#[$attr:meta])* $field:ident: $type:ty,)* }) => {
        $(#[$meta])*
        #[derive(Serialize, Deserialize)]
        pub(crate) struct $name { $($(#[$attr])* $field: $type,)* }

        impl From<$name> for domain::$name {
            fn from(from: $name) -> Self {
                Self { $($field: Plain::back(from.$field),)* }
            }
        }
        impl From<&domain::$name> for $name {
            fn from(from: &domain::$name) -> Self {
                Self { $($field: Plain::of(&from.$field),)* }
            }
        }
        impl Plain<domain::$name> for $name {
            fn of(from: &domain::$name) -> Self { from.into() }
            fn back(self) -> domain::$name { self.into() }
        }
    };
}

/// A persisted form of `T`.
pub(crate) trait Plain<T> {
    /// The form on disk.
    fn of(from: &T) -> Self;
    /// The form in the program.
    fn back(self) -> T;
}

macro_rules! as_is {
    ($($type:ty),*) => { $(impl Plain<$type> for $type {
        fn of(from: &$type) -> Self { from.clone() }
        fn back(self) -> $type { self }
    })* };
}
as_is!(
    String,
    bool,
    u32,
    i32,
    u64,
    Timestamp,
    Vec<String>,
    Vec<u32>,
    Vec<(u64, u64)>,
    BTreeMap<String, String>,
    BTreeMap<String, (u64, u64)>
);

impl<T, P: Plain<T>> Plain<Option<T>> for Option<P> {
    fn of(from: &Option<T>) -> Self {
        from.as_ref().map(P::of)
    }
    fn back(self) -> Option<T> {
        self.map(P::back)
    }
}

/// A list; a type of its own, because `Vec<String>` above is already as it is.
#[derive(Serialize, Deserialize)]
#[serde(transparent)]
pub(crate) struct List<P>(Vec<P>);

impl<P> Default for List<P> {
    fn default() -> Self {
        List(Vec::new())
    }
}

impl<P> List<P> {
    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl<T, P: Plain<T>> Plain<Vec<T>> for List<P> {
    fn of(from: &Vec<T>) -> Self {
        List(from.iter().map(P::of).collect())
    }
    fn back(self) -> Vec<T> {
        self.0.into_iter().map(P::back).collect()
    }
}

/// The whole file; `format` comes first.
#[derive(Serialize, Deserialize)]
pub(crate) struct Record {
    format: u32,
    written_at: Timestamp,
    boot_id: String,
    shim: Shim,
    tasks: List<Task>,
    context: Context,
    running: List<Running>,
    descriptors: List<Descriptor>,
    unanswered: List<Unanswered>,
    #[serde(default, skip_serializing_if = "List::is_empty")]
    strays: List<Process>,
}

impl From<Record> for domain::Record {
    fn from(from: Record) -> Self {
        Self {
            written_at: from.written_at,
            boot_id: from.boot_id,
            shim: from.shim.into(),
            tasks: from.tasks.back(),
            context: from.context.into(),
            running: from.running.back(),
            descriptors: from.descriptors.back(),
            unanswered: from.unanswered.back(),
            strays: from.strays.back(),
        }
    }
}

impl From<&domain::Record> for Record {
    fn from(from: &domain::Record) -> Self {
        Self {
            format: FORMAT,
            written_at: from.written_at,
            boot_id: from.boot_id.clone(),
            shim: (&from.shim).into(),
            tasks: Plain::of(&from.tasks),
            context: (&from.context).into(),
            running: Plain::of(&from.running),
            descriptors: Plain::of(&from.descriptors),
            unanswered: Plain::of(&from.unanswered),
            strays: Plain::of(&from.strays),
        }
    }
}

persisted!(Process {
    pid: u32,
    start_time: u64,
});

persisted!(Shim {
    version: String,
    #[serde(flatten)]
    process: Process,
    exe: String,
    containerd_address: String,
    namespace: String,
    group_id: String,
    socket: String,
    api_versions: Vec<u32>,
});

persisted!(Runtime {
    binary: String,
    root: String,
    systemd_cgroup: bool,
});

persisted!(Mount {
    #[serde(rename = "type")]
    kind: String,
    source: String,
    #[serde(default)]
    target: String,
    options: Vec<String>,
});

persisted!(Logger {
    #[serde(flatten)]
    process: Process,
    argv: Vec<String>,
});

persisted!(Stdio {
    stdin: String,
    stdout: String,
    stderr: String,
    #[serde(default)]
    stdin_closed: bool,
    logger: Option<Logger>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    carried: Vec<(u64, u64)>,
    #[serde(default, skip_serializing_if = "List::is_empty")]
    holders: List<Process>,
});

persisted!(Task {
    id: String,
    bundle: String,
    phase: Phase,
    init: Option<Process>,
    runtime: Runtime,
    rootfs: List<Mount>,
    cgroup: Vec<String>,
    stdio: Stdio,
    terminal: bool,
    created_at: Timestamp,
    exit: Option<Exit>,
    #[serde(default)]
    oom: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    oom_kills: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    restore: Option<Restore>,
    execs: List<Exec>,
});

persisted!(Restore {
    image: String,
    #[serde(default)]
    parent: String,
});

persisted!(Exec {
    id: String,
    phase: Phase,
    process: Option<Process>,
    stdio: Stdio,
    terminal: bool,
    exit: Option<Exit>,
});

persisted!(Context {
    cgroup: Vec<String>,
    oom_score_adj: i32,
    rlimits: BTreeMap<String, (u64, u64)>,
    umask: u32,
    nice: i32,
    env: BTreeMap<String, String>,
});

persisted!(Running {
    op: String,
    id: String,
    exec_id: String,
    process: Option<Process>,
});

persisted!(Descriptor {
    name: String,
    number: i32,
});

persisted!(Unanswered {
    connection: u64,
    stream: u32,
    method: String,
    id: String,
    exec_id: String,
});

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Phase {
    Creating,
    Created,
    Running,
    Paused,
    Stopped,
    Deleting,
}

impl Plain<domain::Phase> for Phase {
    fn of(from: &domain::Phase) -> Self {
        match from {
            domain::Phase::Creating => Phase::Creating,
            domain::Phase::Created => Phase::Created,
            domain::Phase::Running => Phase::Running,
            domain::Phase::Paused => Phase::Paused,
            domain::Phase::Stopped => Phase::Stopped,
            domain::Phase::Deleting => Phase::Deleting,
        }
    }
    fn back(self) -> domain::Phase {
        match self {
            Phase::Creating => domain::Phase::Creating,
            Phase::Created => domain::Phase::Created,
            Phase::Running => domain::Phase::Running,
            Phase::Paused => domain::Phase::Paused,
            Phase::Stopped => domain::Phase::Stopped,
            Phase::Deleting => domain::Phase::Deleting,
        }
    }
}

/// `{"status", "at", "oom"}` or `{"unknown": why}`.
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
pub(crate) enum Exit {
    Observed {
        status: u32,
        at: Timestamp,
        oom: bool,
    },
    Unknown {
        unknown: String,
    },
}

impl Plain<domain::Exit> for Exit {
    fn of(from: &domain::Exit) -> Self {
        match from {
            domain::Exit::Observed { status, at, oom } => Exit::Observed {
                status: *status,
                at: *at,
                oom: *oom,
            },
            domain::Exit::Unknown { why } => Exit::Unknown {
                unknown: why.clone(),
            },
        }
    }
    fn back(self) -> domain::Exit {
        match self {
            Exit::Observed { status, at, oom } => domain::Exit::Observed { status, at, oom },
            Exit::Unknown { unknown } => domain::Exit::Unknown { why: unknown },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use domain::tests::full;

    #[test]
    fn the_golden_file_of_format_1_is_what_we_read_and_write() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/record-1.json");
        if std::env::var_os("RECOVERD_BLESS").is_some() {
            let value: serde_json::Value = serde_json::from_slice(&encode(&full())).unwrap();
            std::fs::write(path, serde_json::to_string_pretty(&value).unwrap() + "\n").unwrap();
        }
        let golden = std::fs::read(path).unwrap();
        assert_eq!(decode(&golden).unwrap(), full());
        let ours: serde_json::Value = serde_json::from_slice(&encode(&full())).unwrap();
        let kept: serde_json::Value = serde_json::from_slice(&golden).unwrap();
        assert_eq!(ours, kept);
        assert!(encode(&full()).starts_with(b"{\"format\":1,"));
    }

    #[test]
    fn format_1_as_it_was_before_fields_were_added_is_read() {
        let read = |name: &str| {
            let path = format!("{}/tests/golden/{name}.json", env!("CARGO_MANIFEST_DIR"));
            decode(&std::fs::read(path).unwrap()).unwrap()
        };
        let mut expected = full();
        expected.strays.clear();
        for task in &mut expected.tasks {
            let execs = task.execs.iter_mut().map(|exec| &mut exec.stdio);
            for stdio in execs.chain(std::iter::once(&mut task.stdio)) {
                stdio.holders.clear();
            }
        }
        assert_eq!(read("record-1-unheld"), expected);
        for task in &mut expected.tasks {
            (task.oom_kills, task.restore) = (None, None);
            for exec in &mut task.execs {
                exec.stdio.carried.clear();
            }
        }
        assert_eq!(read("record-1-uncounted"), expected);
    }

    #[test]
    fn a_newer_format_is_refused_whatever_else_it_says() {
        assert_eq!(
            decode(b"{\"tasks\": 7, \"format\": 2}"),
            Err(Unreadable::Newer(2))
        );
        assert_eq!(decode(b"{\"format\": 0}"), Err(Unreadable::Never(0)));
        for bad in [&b""[..], b"[]", b"{}", b"{\"format\":\"1\"}", b"\xff"] {
            assert!(matches!(decode(bad), Err(Unreadable::NotARecord(_))));
        }
        assert!(matches!(
            decode(b"{\"format\":1}"),
            Err(Unreadable::Broken(_))
        ));
    }

    #[test]
    fn white_space_after_the_object_is_no_harm_and_every_cut_is_noticed() {
        let mut bytes = encode(&full());
        let whole = bytes.len();
        bytes.resize(whole + 5000, b'\n');
        assert_eq!(decode(&bytes).unwrap(), full());
        for cut in 0..whole {
            assert!(decode(&bytes[..cut]).is_err(), "{cut}");
        }
    }
}

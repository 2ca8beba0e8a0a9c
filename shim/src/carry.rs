//! What a shim carries into its next image: the message of an upgrade, as it is on the wire. See
//! `recoverd_common::handoff`.
//!
//! A descriptor is its number: the next image is the same process, and takes each number once.
//! These types are those of the running shim, so that nothing can be forgotten; what they look
//! like in the message is held by the golden file of the format.

use std::{
    cell::RefCell,
    collections::{BTreeMap, BTreeSet},
    fs::File,
    io,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd, RawFd},
        unix::net::{UnixListener, UnixStream},
    },
    path::PathBuf,
};

use recoverd_common::{
    connector::{Connector, Ledger},
    handoff::{self, Misunderstood},
};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::{
    event_log::EventLog,
    info,
    serve::{Child, Witness},
    state::LoopState,
    stdio::Stdio,
    tasks::JobId,
    witness::Teller,
};

/// Everything, of the image that leaves.
#[derive(Debug, Serialize)]
pub struct Leaving<'a> {
    /// Where it listens.
    pub socket: &'a PathBuf,
    /// The loop.
    pub state: &'a LoopState,
    /// `<socket>.lock`, locked.
    pub lock: Numbered<&'a File>,
    /// Accepts.
    pub listener: Numbered<&'a UnixListener>,
    /// The connections.
    pub connections: Vec<Numbered<&'a UnixStream>>,
    /// containerd's event service.
    pub events: Option<Numbered<&'a UnixStream>>,
    /// Not yet written to it, of the event under way.
    pub events_unsent: &'a Vec<u8>,
    /// The log of events.
    pub event_log: &'a EventLog,
    /// Short-lived children at work.
    pub children: &'a BTreeMap<JobId, Child>,
    /// The descriptors of every process.
    pub stdio: &'a Stdio,
    /// OOM kills that were seen, by task.
    pub oom: BTreeMap<String, u64>,
    /// Processes that are not our children.
    pub witnesses: Vec<&'a Witness>,
    /// Who tells how those ended.
    #[serde(with = "teller")]
    pub teller: &'a Teller,
}

/// The same, of the image that comes.
#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(Serialize))]
pub struct Coming {
    /// As above.
    pub socket: PathBuf,
    /// As above.
    pub state: LoopState,
    /// As above.
    pub lock: Numbered<File>,
    /// As above.
    pub listener: Numbered<UnixListener>,
    /// As above.
    pub connections: Vec<Numbered<UnixStream>>,
    /// As above.
    pub events: Option<Numbered<UnixStream>>,
    /// As above.
    pub events_unsent: Vec<u8>,
    /// As above.
    pub event_log: EventLog,
    /// As above.
    pub children: BTreeMap<JobId, Child>,
    /// As above.
    pub stdio: Stdio,
    /// As above.
    pub oom: BTreeMap<String, u64>,
    /// As above.
    pub witnesses: Vec<Witness>,
    /// As above.
    #[serde(with = "teller")]
    pub teller: Teller,
}

/// Who reads or writes a message right now.
enum Turn {
    /// Nobody.
    Nobody,
    /// It is written: the numbers so far.
    Gives(BTreeSet<RawFd>),
    /// It is read, and the descriptors are taken over: the numbers so far.
    Takes(BTreeSet<RawFd>),
    /// It is read by a process that has none of them.
    Looks,
}

thread_local! {
    static TURN: RefCell<Turn> = const { RefCell::new(Turn::Nobody) };
}

fn with<R>(turn: Turn, act: impl FnOnce() -> R) -> (R, Turn) {
    TURN.set(turn);
    let result = act();
    (result, TURN.replace(Turn::Nobody))
}

/// The message, and the descriptors that it names.
pub fn write(leaving: &Leaving<'_>) -> io::Result<(Vec<u8>, BTreeSet<RawFd>)> {
    let mut bytes = Vec::new();
    let act = || handoff::encode(info::VERSION_NUMBER, leaving, &mut bytes);
    let (written, turn) = with(Turn::Gives(BTreeSet::new()), act);
    written?;
    match turn {
        Turn::Gives(numbers) => Ok((bytes, numbers)),
        Turn::Nobody | Turn::Takes(_) | Turn::Looks => Err(io::Error::other("no descriptors")),
    }
}

/// Reads it in the process that it is for.
pub fn take(bytes: &[u8]) -> Result<Coming, Misunderstood> {
    with(Turn::Takes(BTreeSet::new()), || handoff::decode(bytes)).0
}

/// Whether it can be read: in a process that touches nothing.
pub fn check(bytes: &[u8]) -> Result<(), Misunderstood> {
    with(Turn::Looks, || handoff::decode::<Coming>(bytes))
        .0
        .map(drop)
}

fn give(number: RawFd) -> Result<(), &'static str> {
    TURN.with_borrow_mut(|turn| match turn {
        Turn::Gives(numbers) => match numbers.insert(number) {
            true => Ok(()),
            false => Err("a descriptor has two owners"),
        },
        Turn::Nobody | Turn::Takes(_) | Turn::Looks => Err("nobody gives descriptors"),
    })
}

fn received(number: RawFd) -> Result<OwnedFd, String> {
    TURN.with_borrow_mut(|turn| match turn {
        Turn::Takes(numbers) => {
            if number < 3 || !numbers.insert(number) {
                return Err(format!("descriptor {number} has two owners"));
            }
            let fd = crate::sys::inherited(number);
            fd.ok_or_else(|| format!("descriptor {number} is not open"))
        }
        Turn::Looks => File::open("/dev/null")
            .map(OwnedFd::from)
            .map_err(|e| e.to_string()),
        Turn::Nobody | Turn::Gives(_) => Err("nobody takes descriptors".to_owned()),
    })
}

/// A descriptor as its number.
pub mod fd {
    use super::{
        AsFd, AsRawFd, Deserialize, Deserializer, OwnedFd, RawFd, Serialize, Serializer, give,
        received,
    };
    use serde::{de::Error as _, ser::Error as _};

    /// For `#[serde(with)]`.
    pub fn serialize<S: Serializer>(fd: &impl AsFd, to: S) -> Result<S::Ok, S::Error> {
        let number = fd.as_fd().as_raw_fd();
        give(number).map_err(S::Error::custom)?;
        number.serialize(to)
    }

    /// For `#[serde(with)]`.
    pub fn deserialize<'de, D: Deserializer<'de>, T: From<OwnedFd>>(
        from: D,
    ) -> Result<T, D::Error> {
        let fd = received(RawFd::deserialize(from)?).map_err(D::Error::custom)?;
        Ok(T::from(fd))
    }
}

/// A descriptor of any type.
#[derive(Debug, Serialize, Deserialize)]
#[serde(bound(serialize = "T: AsFd", deserialize = "T: From<OwnedFd>"))]
pub struct Numbered<T>(#[serde(with = "fd")] pub T);

/// A descriptor or none.
pub mod maybe_fd {
    use super::{AsFd, Deserialize, Deserializer, Numbered, OwnedFd, Serialize, Serializer};

    /// For `#[serde(with)]`.
    pub fn serialize<S: Serializer>(fd: &Option<impl AsFd>, to: S) -> Result<S::Ok, S::Error> {
        fd.as_ref().map(|fd| Numbered(fd.as_fd())).serialize(to)
    }

    /// For `#[serde(with)]`.
    pub fn deserialize<'de, D: Deserializer<'de>, T: From<OwnedFd>>(
        from: D,
    ) -> Result<Option<T>, D::Error> {
        let fd = Option::<Numbered<T>>::deserialize(from)?;
        Ok(fd.map(|Numbered(fd)| fd))
    }
}

/// Several descriptors.
pub mod fds {
    use super::{Deserialize, Deserializer, Numbered, OwnedFd, Serialize, Serializer};
    use std::os::fd::AsFd;

    /// For `#[serde(with)]`.
    pub fn serialize<S: Serializer>(fds: &[OwnedFd], to: S) -> Result<S::Ok, S::Error> {
        let numbered: Vec<_> = fds.iter().map(|fd| Numbered(fd.as_fd())).collect();
        numbered.serialize(to)
    }

    /// For `#[serde(with)]`.
    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<OwnedFd>, D::Error> {
        let numbered = Vec::<Numbered<OwnedFd>>::deserialize(from)?;
        Ok(numbered.into_iter().map(|Numbered(fd)| fd).collect())
    }
}

/// A map whose keys are no strings, as a list of pairs.
pub mod pairs {
    use super::{BTreeMap, Deserialize, Deserializer, Serialize, Serializer};

    /// For `#[serde(with)]`.
    pub fn serialize<S: Serializer, K: Serialize, V: Serialize>(
        map: &BTreeMap<K, V>,
        to: S,
    ) -> Result<S::Ok, S::Error> {
        to.collect_seq(map)
    }

    /// For `#[serde(with)]`.
    pub fn deserialize<'de, D, K, V>(from: D) -> Result<BTreeMap<K, V>, D::Error>
    where
        D: Deserializer<'de>,
        K: Deserialize<'de> + Ord,
        V: Deserialize<'de>,
    {
        let pairs = Vec::<(K, V)>::deserialize(from)?;
        Ok(pairs.into_iter().collect())
    }
}

/// Who tells how processes ended: a subscription goes on, nothing falls in between.
pub mod teller {
    use super::{
        Connector, Deserialize, Deserializer, Ledger, Numbered, OwnedFd, Serialize, Serializer,
        Teller,
    };
    use std::os::fd::{AsFd, BorrowedFd};

    #[derive(Serialize)]
    enum Leaving<'a> {
        Pidfd,
        Connector(Numbered<BorrowedFd<'a>>, &'a Ledger),
        Nobody(&'a str),
    }

    #[derive(Deserialize)]
    enum Coming {
        Pidfd,
        Connector(Numbered<OwnedFd>, Ledger),
        Nobody(String),
    }

    /// For `#[serde(with)]`.
    pub fn serialize<S: Serializer>(teller: &Teller, to: S) -> Result<S::Ok, S::Error> {
        let leaving = match teller {
            Teller::Pidfd => Leaving::Pidfd,
            Teller::Connector(connector) => {
                Leaving::Connector(Numbered(connector.as_fd()), connector.ledger())
            }
            Teller::Nobody(why) => Leaving::Nobody(why),
        };
        leaving.serialize(to)
    }

    /// For `#[serde(with)]`.
    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Teller, D::Error> {
        Ok(match Coming::deserialize(from)? {
            Coming::Pidfd => Teller::Pidfd,
            Coming::Connector(Numbered(socket), ledger) => {
                Teller::Connector(Connector::carried(socket, ledger))
            }
            Coming::Nobody(why) => Teller::Nobody(why),
        })
    }
}

/// A pid as its number.
pub mod pid {
    use super::{Deserialize, Deserializer, Serialize, Serializer};
    use nix::unistd::Pid;

    /// For `#[serde(with)]`.
    pub fn serialize<S: Serializer>(pid: &Pid, to: S) -> Result<S::Ok, S::Error> {
        pid.as_raw().serialize(to)
    }

    /// For `#[serde(with)]`.
    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Pid, D::Error> {
        i32::deserialize(from).map(Pid::from_raw)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    /// A real message (see `tests/upgrade.rs`): a task with an exec that talks and one that is being
    /// started, callers of Wait and Start, and what cannot be had there added by hand.
    const GOLDEN: &[u8] = include_bytes!("../testdata/handoff-1.json");
    /// As it was before outputs had holders.
    const UNHELD: &[u8] = include_bytes!("../testdata/handoff-1-unheld.json");

    /// Names, words and nesting; of numbers only that they are there.
    fn shape(value: Value) -> Value {
        match value {
            Value::Number(_) => json!(0),
            Value::Array(list) => list.into_iter().map(shape).collect(),
            Value::Object(map) => map.into_iter().map(|(k, v)| (k, shape(v))).collect(),
            other => other,
        }
    }

    #[test]
    fn the_golden_file_of_format_1_is_what_we_read_and_write() {
        assert_eq!(check(UNHELD), Ok(()));
        assert_eq!(check(GOLDEN), Ok(()));
        let (coming, _) = with(Turn::Looks, || handoff::decode::<Coming>(GOLDEN));
        let coming = coming.unwrap();
        assert!(!coming.children.is_empty() && !coming.connections.is_empty());
        let mut bytes = Vec::new();
        let act = || handoff::encode("0.1.0", &coming, &mut bytes);
        let (written, turn) = with(Turn::Gives(BTreeSet::new()), act);
        written.unwrap();
        assert!(matches!(turn, Turn::Gives(numbers) if numbers.len() > 8));
        let ours: Value = serde_json::from_slice(&bytes).unwrap();
        let golden: Value = serde_json::from_slice(GOLDEN).unwrap();
        assert_eq!(shape(ours), shape(golden));
    }

    #[test]
    fn a_descriptor_is_given_and_taken_once_and_only_by_an_upgrade() {
        let (one, two) = nix::unistd::pipe().unwrap();
        let twice = with(Turn::Gives(BTreeSet::new()), || {
            let first = serde_json::to_value(Numbered(&one));
            (first, serde_json::to_value(Numbered(&one)).is_err())
        });
        let (first, refused) = twice.0;
        assert_eq!(first.unwrap(), json!(one.as_raw_fd()));
        assert!(refused);
        assert!(
            serde_json::to_value(Numbered(&two)).is_err(),
            "nobody gives"
        );
        let number = json!(two.as_raw_fd());
        let read = || serde_json::from_value::<Numbered<OwnedFd>>(number.clone());
        assert!(read().is_err(), "nobody takes");
        let (looked, _) = with(Turn::Looks, read);
        assert_ne!(looked.unwrap().0.as_raw_fd(), two.as_raw_fd());
        let ((taken, again), _) = with(Turn::Takes(BTreeSet::new()), || (read(), read()));
        // It has one owner again.
        std::mem::forget(two);
        assert!(taken.is_ok() && again.is_err());
        for bad in [json!(2), json!(-1), json!(999_999)] {
            let read = || serde_json::from_value::<Numbered<OwnedFd>>(bad.clone());
            assert!(with(Turn::Takes(BTreeSet::new()), read).0.is_err(), "{bad}");
        }
    }
}

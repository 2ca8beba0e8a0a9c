//! What becomes of the requests that a shim which has died leaves unanswered, on connections that
//! somebody has kept open. Pure; `requests` reads them, the loop answers.
//!
//! | it | and the record | then |
//! | --- | --- | --- |
//! | asks something, or sets what may be set twice | - | is asked again |
//! | has changed something, or was at it | names it | is answered by what has become of it |
//! | was deleting, freezing, thawing | names it | goes on |
//! | has its answer | does not name it | gets that answer, maybe once more |
//! | is a signal other than SIGKILL | - | is refused: it may have been sent |
//! | was not kept whole, or cannot be told | - | is refused |
//!
//! Done twice is nothing. The record is older than an answer that is written down if it still names
//! the request; then the record counts.

use recoverd_common::record;
use serde::{Deserialize, Serialize};

use crate::{
    connections::Caller,
    requests::HowFar,
    service::{self, Call, Key},
};

const SIGKILL: i32 = 9;

/// What is to be done about a request.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Resumed {
    /// Ask it again; until then, by its own clock, in nanoseconds.
    Again(Box<Call>, Option<u64>),
    /// Send the answer that its predecessor had: the `ttrpc.Response`.
    Tell(Vec<u8>),
    /// Refuse it, because.
    Refuse(String),
    /// Answer by what has become of it.
    Settle(Settle),
}

/// A request that a predecessor was at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Settle {
    /// Create: what there is of it is undone.
    Create(String),
    /// Start of an init or an exec.
    Start(Key),
    /// Exec: its files may be half written.
    Add(Key),
    /// Pause.
    Pause(String),
    /// Resume.
    Resume(String),
}

/// Whether `record` names the request of `whose`.
pub fn is_named(record: &record::Record, whose: Caller) -> bool {
    named(record, whose).is_some()
}

fn named(record: &record::Record, whose: Caller) -> Option<&record::Unanswered> {
    let mut all = record.unanswered.iter();
    all.find(|named| named.connection == whose.connection && named.stream == whose.stream)
}

/// Decides on one of them.
pub fn decide(whose: Caller, how_far: &HowFar, record: &record::Record) -> Resumed {
    if let Some(named) = named(record, whose) {
        let key = Key {
            id: named.id.clone(),
            exec_id: named.exec_id.clone(),
        };
        match named.method.as_str() {
            "create" | "cleanup" => return Resumed::Settle(Settle::Create(key.id)),
            "start" | "exec" | "restore" | "undo" => return Resumed::Settle(Settle::Start(key)),
            "add" => return Resumed::Settle(Settle::Add(key)),
            "pause" => return Resumed::Settle(Settle::Pause(key.id)),
            "resume" => return Resumed::Settle(Settle::Resume(key.id)),
            "delete" => return Resumed::Again(Box::new(Call::Delete(key)), None),
            // Update and Kill, and what a later version calls something: by what was asked.
            _ => {}
        }
        return match how_far {
            HowFar::Asked(payload) => again(payload),
            HowFar::Cut | HowFar::Answered(_) | HowFar::Begun => unsure(),
        };
    }
    match how_far {
        HowFar::Asked(payload) => again(payload),
        HowFar::Answered(payload) => Resumed::Tell(payload.clone()),
        HowFar::Cut | HowFar::Begun => unsure(),
    }
}

fn again(payload: &[u8]) -> Resumed {
    match service::parse(payload) {
        Ok((Call::Create(_) | Call::Exec { .. } | Call::Checkpoint(_), _)) => unsure(),
        Ok((Call::Upgrade(executable), _)) => {
            Resumed::Refuse(format!("shim died of becoming {executable}"))
        }
        Ok((Call::Kill { signal, .. }, _)) if signal != 0 && signal != SIGKILL => unsure(),
        Ok((call, timeout)) => Resumed::Again(Box::new(call), timeout),
        Err(refusal) => Resumed::Refuse(refusal.message),
    }
}

fn unsure() -> Resumed {
    Resumed::Refuse("shim died while it was at it: it may be done or not".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use prost::Message;
    use recoverd_common::{pb::task, record::Record};

    const WHOSE: Caller = Caller {
        connection: 70,
        stream: 5,
    };

    fn record(method: &str) -> Record {
        let path = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../common/tests/golden/record-1.json"
        );
        let mut record = record::version::decode(&std::fs::read(path).unwrap()).unwrap();
        record.unanswered = vec![
            record::Unanswered {
                connection: 70,
                stream: 3,
                method: "create".into(),
                id: "other".into(),
                exec_id: String::new(),
            },
            record::Unanswered {
                connection: 70,
                stream: 5,
                method: method.into(),
                id: "c".into(),
                exec_id: "e".into(),
            },
        ];
        if method.is_empty() {
            record.unanswered.pop();
        }
        record
    }

    fn request(method: &str, payload: &impl Message) -> HowFar {
        let request = recoverd_common::pb::ttrpc::Request {
            service: "containerd.task.v2.Task".into(),
            method: method.into(),
            payload: payload.encode_to_vec(),
            ..Default::default()
        };
        HowFar::Asked(request.encode_to_vec())
    }

    fn kill(signal: u32) -> HowFar {
        let kill = task::KillRequest {
            id: "c".into(),
            signal,
            ..Default::default()
        };
        request("Kill", &kill)
    }

    fn key() -> Key {
        Key {
            id: "c".into(),
            exec_id: "e".into(),
        }
    }

    #[test]
    fn what_the_record_names_is_answered_by_what_has_become_of_it() {
        let delete = Resumed::Again(Box::new(Call::Delete(key())), None);
        for (method, expected) in [
            ("create", Resumed::Settle(Settle::Create("c".into()))),
            ("cleanup", Resumed::Settle(Settle::Create("c".into()))),
            ("start", Resumed::Settle(Settle::Start(key()))),
            ("exec", Resumed::Settle(Settle::Start(key()))),
            ("restore", Resumed::Settle(Settle::Start(key()))),
            ("checkpoint", unsure()),
            ("add", Resumed::Settle(Settle::Add(key()))),
            ("pause", Resumed::Settle(Settle::Pause("c".into()))),
            ("resume", Resumed::Settle(Settle::Resume("c".into()))),
            ("delete", delete),
            ("update", unsure()),
        ] {
            // An answer is younger than the record, and nothing says that it was sent.
            for how_far in [HowFar::Cut, HowFar::Answered(vec![1])] {
                let found = decide(WHOSE, &how_far, &record(method));
                assert_eq!(found, expected, "{method}");
            }
        }
    }

    #[test]
    fn questions_are_asked_again_answers_sent_again_and_signals_not_sent_twice() {
        let none = record("");
        let answered = HowFar::Answered(vec![1, 2]);
        assert_eq!(decide(WHOSE, &answered, &none), Resumed::Tell(vec![1, 2]));
        let wait = task::WaitRequest {
            id: "c".into(),
            exec_id: "e".into(),
        };
        assert_eq!(
            decide(WHOSE, &request("Wait", &wait), &none),
            Resumed::Again(Box::new(Call::Wait(key())), None)
        );
        for record in [&none, &record("kill")] {
            for (signal, again) in [(0, true), (9, true), (1, false), (15, false), (37, false)] {
                let found = decide(WHOSE, &kill(signal), record);
                assert_eq!(matches!(found, Resumed::Again(..)), again, "{signal}");
            }
        }
        let exec = task::ExecProcessRequest {
            id: "c".into(),
            exec_id: "e".into(),
            ..Default::default()
        };
        for how_far in [HowFar::Cut, request("Exec", &exec)] {
            assert!(matches!(decide(WHOSE, &how_far, &none), Resumed::Refuse(_)));
        }
        let unknown = decide(WHOSE, &request("Nonsense", &wait), &none);
        assert!(matches!(unknown, Resumed::Refuse(why) if why.contains("Nonsense")));
    }
}

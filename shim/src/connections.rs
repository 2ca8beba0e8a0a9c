//! The bytes of our connections: which of those that came in make whole requests, what is to go
//! out and has not been taken. Pure; `serve` owns the sockets. All of it can be carried into
//! another process.
//!
//! What has come in stays in the socket until it is a whole request that is written down: a shim
//! that dies leaves the rest to its successor. Only a giant request is taken piece by piece, for
//! it would not fit into the socket.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use recoverd_common::ttrpc::{HEADER, Header, Kind, MAX_PAYLOAD};
use serde::{Deserialize, Serialize};

/// A peer that has this much of ours unread is cut off, bytes: it stopped reading.
const MAX_UNSENT: usize = 8 << 20;
/// A request longer than this is giant, bytes. A socket holds some 200 KiB of its sender.
const GIANT: usize = 64 << 10;
/// At most this much is written at once, bytes, unless one answer is longer: the kernel takes as
/// much whole or not at all, so that a shim that dies has not written half an answer.
const AT_ONCE: usize = 64 << 10;

/// Which request of which connection; its answer goes there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Caller {
    /// The connection: the inode of its socket, which is the same in every process that has it.
    pub connection: u64,
    /// The stream id of its frame.
    pub stream: u32,
}

/// One connection's bytes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Connection {
    /// The beginning of a giant request.
    unread: Vec<u8>,
    unsent: Vec<u8>,
    /// The answers in `unsent`: whose, and how many bytes are left of each.
    answers: VecDeque<(u32, usize)>,
    /// Streams of requests that a predecessor has taken and that are still in the socket.
    seen: BTreeSet<u32>,
}

/// A whole request frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// Its stream.
    pub stream: u32,
    /// The `ttrpc.Request`.
    pub payload: Vec<u8>,
}

/// What is to be taken of what has come in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arrived {
    /// So many bytes: whole requests, or a piece of a giant one.
    Take(usize),
    /// Nothing before there are so many.
    Wait(usize),
}

/// What happens to a request, for the file that outlives us.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Note {
    /// It is here.
    Asked {
        /// Whose.
        from: Caller,
        /// The `ttrpc.Request`.
        payload: Vec<u8>,
        /// See [`crate::service::keeps_answer`].
        keeps_answer: bool,
    },
    /// Its answer is known, and not yet sent.
    Answered {
        /// Whose.
        to: Caller,
        /// The `ttrpc.Response`.
        payload: Vec<u8>,
    },
    /// Its answer is sent.
    Sent(Caller),
    /// Nobody waits there any more.
    Closed(u64),
}

/// Why a connection has to go.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// More than the protocol allows.
    #[error("frame of {0} bytes, more than {MAX_PAYLOAD}")]
    Giant(u32),
    /// A client sends requests only: the task API has no streams.
    #[error("frame of type {0:?} from a client")]
    NoRequest(Kind),
    /// Servers count evenly, clients oddly.
    #[error("stream id {0} is even")]
    EvenStream(u32),
    /// It stopped reading.
    #[error("{0} bytes are waiting to be read")]
    Unread(usize),
}

/// The header at the start of `bytes`, if it is there, and the payload's length. Checked as soon
/// as it is there: a giant frame is not waited for.
fn checked_header(bytes: &[u8]) -> Result<Option<(Header, usize)>, Violation> {
    let Some(header) = Header::parse(bytes) else {
        return Ok(None);
    };
    let length = usize::try_from(header.length).unwrap_or(usize::MAX);
    if length > MAX_PAYLOAD {
        return Err(Violation::Giant(header.length));
    }
    if header.kind != Kind::Request {
        return Err(Violation::NoRequest(header.kind));
    }
    if header.stream % 2 == 0 {
        return Err(Violation::EvenStream(header.stream));
    }
    Ok(Some((header, length)))
}

impl Connection {
    /// Takes `bytes`, gives the frames that are complete with them.
    fn feed(&mut self, bytes: &[u8]) -> Result<Vec<Frame>, Violation> {
        self.unread.extend_from_slice(bytes);
        let mut frames = Vec::new();
        let mut rest = self.unread.as_slice();
        let mut took = false;
        while let Some((header, length)) = checked_header(rest)? {
            let Some(payload) = rest.get(HEADER..HEADER.saturating_add(length)) else {
                break;
            };
            took = true;
            if !self.seen.remove(&header.stream) {
                frames.push(Frame {
                    stream: header.stream,
                    payload: payload.to_vec(),
                });
            }
            rest = rest.get(HEADER + length..).unwrap_or_default();
        }
        // A large frame comes in many pieces, and is not copied with each; idle connections hold
        // no buffer.
        if took {
            self.unread = rest.to_vec();
        }
        Ok(frames)
    }
}

/// Every connection.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Connections {
    all: BTreeMap<u64, Connection>,
}

impl Connections {
    /// A new connection.
    pub fn open(&mut self, connection: u64) {
        self.all.insert(connection, Connection::default());
    }

    /// Forgets a connection.
    pub fn close(&mut self, connection: u64) {
        self.all.remove(&connection);
    }

    /// A request that is already known will come once more, out of its socket.
    pub fn pass_over(&mut self, caller: Caller) {
        if let Some(connection) = self.all.get_mut(&caller.connection) {
            connection.seen.insert(caller.stream);
        }
    }

    /// Looks at what has come in on `connection`, without taking it.
    pub fn look(&self, connection: u64, bytes: &[u8]) -> Arrived {
        let giant = |connection: &Connection| !connection.unread.is_empty();
        if self.all.get(&connection).is_some_and(giant) {
            return Arrived::Take(bytes.len());
        }
        let mut whole = 0;
        loop {
            let rest = bytes.get(whole..).unwrap_or_default();
            let wanted = match checked_header(rest) {
                Ok(None) => HEADER,
                Ok(Some((_, length))) if length <= GIANT => HEADER + length,
                // Taken by pieces; and what breaks the rules is taken to be refused.
                Ok(Some(_)) | Err(_) if whole == 0 => return Arrived::Take(bytes.len()),
                Ok(Some(_)) | Err(_) => return Arrived::Take(whole),
            };
            if rest.len() < wanted {
                return match whole {
                    0 => Arrived::Wait(wanted),
                    _ => Arrived::Take(whole),
                };
            }
            whole += wanted;
        }
    }

    /// True while a giant request is half here.
    pub fn is_half_read(&self, connection: u64) -> bool {
        let connection = self.all.get(&connection);
        connection.is_some_and(|connection| !connection.unread.is_empty())
    }

    /// How many bytes of requests will be complete with `bytes` more; 0 while none is.
    pub fn complete(&self, connection: u64, bytes: &[u8]) -> usize {
        let Some(connection) = self.all.get(&connection) else {
            return 0;
        };
        let unread = &connection.unread;
        let total = unread.len() + bytes.len();
        let start: Vec<u8> = unread.iter().chain(bytes).take(HEADER).copied().collect();
        match checked_header(&start) {
            Ok(Some((_, length))) if total >= HEADER.saturating_add(length) => total,
            Ok(_) | Err(_) => 0,
        }
    }

    /// The numbers of all connections.
    pub fn numbers(&self) -> Vec<u64> {
        self.all.keys().copied().collect()
    }

    /// Takes bytes that came in.
    pub fn feed(&mut self, connection: u64, bytes: &[u8]) -> Result<Vec<Frame>, Violation> {
        match self.all.get_mut(&connection) {
            Some(connection) => connection.feed(bytes),
            None => Ok(Vec::new()),
        }
    }

    /// Queues the `ttrpc.Response` in `payload` for `to`. A connection that has gone is no error:
    /// nobody waits for the answer any more.
    pub fn answer(&mut self, to: Caller, payload: &[u8]) -> Result<(), Violation> {
        let Some(connection) = self.all.get_mut(&to.connection) else {
            return Ok(());
        };
        let header = Header {
            length: u32::try_from(payload.len()).unwrap_or(u32::MAX),
            stream: to.stream,
            kind: Kind::Response,
            flags: 0,
        };
        connection.unsent.extend_from_slice(&header.bytes());
        connection.unsent.extend_from_slice(payload);
        let length = HEADER.saturating_add(payload.len());
        connection.answers.push_back((to.stream, length));
        if connection.unsent.len() > MAX_UNSENT {
            return Err(Violation::Unread(connection.unsent.len()));
        }
        Ok(())
    }

    /// What is to be written to `connection`: whole answers, as many as go at once, or the first.
    pub fn unsent(&self, connection: u64) -> &[u8] {
        let Some(connection) = self.all.get(&connection) else {
            return &[];
        };
        let mut length = 0;
        for (_, answer) in &connection.answers {
            if length > 0 && length + answer > AT_ONCE {
                break;
            }
            length += answer;
        }
        connection.unsent.get(..length).unwrap_or_default()
    }

    /// The first `count` bytes of it are written; gives the streams whose answers are now sent.
    pub fn sent(&mut self, connection: u64, count: usize) -> Vec<u32> {
        let Some(connection) = self.all.get_mut(&connection) else {
            return Vec::new();
        };
        connection.unsent = connection.unsent.get(count..).unwrap_or_default().to_vec();
        let mut left = count;
        let mut done = Vec::new();
        while let Some((stream, length)) = connection.answers.front_mut() {
            if left < *length {
                *length -= left;
                break;
            }
            left -= *length;
            done.push(*stream);
            connection.answers.pop_front();
        }
        if connection.answers.is_empty() {
            connection.answers = VecDeque::new();
        }
        done
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(stream: u32, payload: &[u8]) -> Vec<u8> {
        let header = Header {
            length: payload.len() as u32,
            stream,
            kind: Kind::Request,
            flags: 0,
        };
        [&header.bytes()[..], payload].concat()
    }

    #[test]
    fn frames_arrive_whole_however_their_bytes_are_cut() {
        let bytes = [frame(1, b"one"), frame(3, b""), frame(5, &[7; 5000])].concat();
        for size in [1, 3, 10, 11, 4096, bytes.len()] {
            let mut connections = Connections::default();
            let number = 7;
            connections.open(number);
            let mut frames = Vec::new();
            for part in bytes.chunks(size) {
                frames.extend(connections.feed(number, part).unwrap());
            }
            let streams: Vec<_> = frames.iter().map(|f| f.stream).collect();
            assert_eq!(streams, [1, 3, 5]);
            assert_eq!(frames[2].payload, [7; 5000]);
            assert_eq!(connections.all[&number], Connection::default());
        }
    }

    #[test]
    fn a_violation_is_seen_with_the_header_and_costs_one_connection() {
        let mut connections = Connections::default();
        let (bad, good) = (1, 2);
        connections.open(bad);
        connections.open(good);
        let header = |length, stream, kind| {
            Header {
                length,
                stream,
                kind,
                flags: 0,
            }
            .bytes()
        };
        for (bytes, violation) in [
            (header(5 << 20, 1, Kind::Request), Violation::Giant(5 << 20)),
            (header(1, 1, Kind::Data), Violation::NoRequest(Kind::Data)),
            (header(1, 2, Kind::Request), Violation::EvenStream(2)),
        ] {
            assert_eq!(connections.feed(bad, &bytes), Err(violation));
            connections.close(bad);
            assert_eq!(connections.feed(bad, b"more"), Ok(Vec::new()));
            connections.all.insert(bad, Connection::default());
        }
        assert_eq!(connections.feed(good, &frame(1, b"x")).unwrap().len(), 1);
    }

    #[test]
    fn a_peer_that_does_not_read_is_cut_off() {
        let mut connections = Connections::default();
        let to = Caller {
            connection: 7,
            stream: 1,
        };
        connections.open(7);
        let answers = (0..).find(|_| connections.answer(to, &[0; 1 << 20]).is_err());
        assert_eq!(answers, Some(7));
        assert_eq!(connections.sent(7, 1 << 20), [0; 0]);
        assert_eq!(connections.unsent(7).len(), 10);
        assert_eq!(connections.sent(7, 10), [1]);
        assert_eq!(connections.unsent(7).len(), (1 << 20) + 10);
    }

    #[test]
    fn answers_are_written_whole_and_known_to_be_sent_when_their_last_byte_is() {
        let mut connections = Connections::default();
        connections.open(7);
        for stream in [1, 3, 5] {
            let to = Caller {
                connection: 7,
                stream,
            };
            connections.answer(to, &[0; 30_000]).unwrap();
        }
        assert_eq!(connections.unsent(7).len(), 60_020);
        assert_eq!(connections.sent(7, 30_009), [0; 0]);
        assert_eq!(connections.sent(7, 1), [1]);
        assert_eq!(connections.unsent(7).len(), 60_020);
        assert_eq!(connections.sent(7, 60_020), [3, 5]);
        let mut idle = Connections::default();
        idle.open(7);
        assert_eq!(connections, idle);
    }

    #[test]
    fn what_is_no_whole_request_stays_where_it_is() {
        let mut connections = Connections::default();
        connections.open(7);
        let bytes = [frame(1, b"one"), frame(3, &[0; 5000])].concat();
        for (length, arrived) in [
            (0, Arrived::Wait(10)),
            (9, Arrived::Wait(10)),
            (12, Arrived::Wait(13)),
            (13, Arrived::Take(13)),
            (5000, Arrived::Take(13)),
            (5023, Arrived::Take(5023)),
        ] {
            assert_eq!(connections.look(7, &bytes[..length]), arrived, "{length}");
        }
        assert_eq!(connections.look(7, &bytes[13..50]), Arrived::Wait(5010));
        // A violation is taken when it is the first; what comes before it is served.
        let even = frame(2, b"");
        assert_eq!(connections.look(7, &even), Arrived::Take(10));
        let late = [frame(1, b"one"), even].concat();
        assert_eq!(connections.look(7, &late), Arrived::Take(13));
        // A giant one is taken by pieces to its end.
        let giant = frame(5, &vec![0; GIANT + 1]);
        assert_eq!(connections.look(7, &giant[..100]), Arrived::Take(100));
        connections.feed(7, &giant[..100]).unwrap();
        assert!(connections.is_half_read(7));
        assert_eq!(connections.look(7, &[0; 9]), Arrived::Take(9));
        assert_eq!(connections.feed(7, &giant[100..]).unwrap().len(), 1);
        assert!(!connections.is_half_read(7));
    }
}

//! The bytes of our connections: what came in and is not yet a frame, what is to go out and has
//! not been taken. Pure; `serve` owns the sockets. All of it can be carried into another process.

use std::collections::BTreeMap;

use recoverd_common::ttrpc::{HEADER, Header, Kind, MAX_PAYLOAD};
use serde::{Deserialize, Serialize};

/// A peer that has this much of ours unread is cut off, bytes: it stopped reading.
const MAX_UNSENT: usize = 8 << 20;

/// Which request of which connection; its answer goes there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Caller {
    /// The connection, by our own count.
    pub connection: u64,
    /// The stream id of its frame.
    pub stream: u32,
}

/// One connection's bytes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Connection {
    unread: Vec<u8>,
    unsent: Vec<u8>,
}

/// A whole request frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// Its stream.
    pub stream: u32,
    /// The `ttrpc.Request`.
    pub payload: Vec<u8>,
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
        while let Some((header, length)) = checked_header(rest)? {
            let Some(payload) = rest.get(HEADER..HEADER.saturating_add(length)) else {
                break;
            };
            frames.push(Frame {
                stream: header.stream,
                payload: payload.to_vec(),
            });
            rest = rest.get(HEADER + length..).unwrap_or_default();
        }
        // A large frame comes in many pieces, and is not copied with each; idle connections hold
        // no buffer.
        if !frames.is_empty() {
            self.unread = rest.to_vec();
        }
        Ok(frames)
    }
}

/// Every connection.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Connections {
    all: BTreeMap<u64, Connection>,
    last: u64,
}

impl Connections {
    /// A new connection's number; numbers are not used twice.
    pub fn open(&mut self) -> u64 {
        self.last += 1;
        self.all.insert(self.last, Connection::default());
        self.last
    }

    /// Forgets a connection.
    pub fn close(&mut self, connection: u64) {
        self.all.remove(&connection);
    }

    /// The number given last.
    pub fn last(&self) -> u64 {
        self.last
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
        if connection.unsent.len() > MAX_UNSENT {
            return Err(Violation::Unread(connection.unsent.len()));
        }
        Ok(())
    }

    /// What is to be written to `connection`.
    pub fn unsent(&self, connection: u64) -> &[u8] {
        self.all
            .get(&connection)
            .map_or(&[], |connection| &connection.unsent)
    }

    /// The first `count` bytes of it are written.
    pub fn sent(&mut self, connection: u64, count: usize) {
        if let Some(connection) = self.all.get_mut(&connection) {
            connection.unsent = connection.unsent.get(count..).unwrap_or_default().to_vec();
        }
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
            let number = connections.open();
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
        let (bad, good) = (connections.open(), connections.open());
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
            connection: connections.open(),
            stream: 1,
        };
        let answers = (0..).find(|_| connections.answer(to, &[0; 1 << 20]).is_err());
        assert_eq!(answers, Some(7));
        connections.sent(to.connection, 1 << 20);
        assert_eq!(connections.unsent(to.connection).len(), (7 << 20) + 80);
    }
}

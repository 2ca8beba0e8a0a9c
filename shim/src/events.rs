//! Events on their way to containerd: kept in order until containerd has acknowledged them, for
//! as long as that takes. Pure; `serve` owns the socket, `event_log` the file.
//!
//! One event is under way at a time: containerd's server works on requests at once, and would
//! mix up the order of two.
//!
//! What comes back after a downtime of containerd is not only containerd: its subscribers (the
//! CRI, a client) come later, and an event that nobody subscribes to is gone. So exits and OOM
//! kills that had to wait are sent once more, [`ECHO_MS`] after the first acknowledgement; but
//! never after the event of their task's deletion: whoever deleted it knows how it ended.

mod message;

use std::collections::VecDeque;

use prost::Message;
use recoverd_common::{
    pb::{events, ttrpc as envelope},
    ttrpc::{HEADER, Header, Kind, MAX_PAYLOAD, code},
};
use serde::{Deserialize, Serialize};

use crate::{
    service::proto_time,
    tasks::{Notice, Now},
};
use message::{message, subject};

/// The topic after which nothing is told of a task.
const CREATE: &str = "/tasks/create";
const DELETE: &str = "/tasks/delete";
const SERVICE: &str = "containerd.services.events.ttrpc.v1.Events";
/// A larger event fits into no frame with its service and method, bytes.
const MAX_EVENT: usize = MAX_PAYLOAD - 256;
/// After the first acknowledgement that follows a downtime.
pub const ECHO_MS: u64 = 10_000;
/// containerd acknowledges within a millisecond; one that does not for this long is hung, and
/// another connection may fare better.
const ANSWER_MS: u64 = 5_000;
/// First and longest pause between two tries to connect.
const RETRY_MS: (u64, u64) = (50, 1_000);
/// An event that a living containerd has refused so often will never be taken; it must not hold
/// back the others for ever.
const MAX_REFUSALS: u32 = 120;

/// One event not yet acknowledged.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Its place in the order; also its name in the log.
    pub number: u64,
    /// The `ForwardRequest`.
    pub payload: Vec<u8>,
    /// An exit or OOM kill: worth saying twice.
    pub echo: bool,
    /// The task of an OOM kill.
    oom: Option<String>,
    /// A try to send it has failed.
    waited: bool,
    /// Sent and acknowledged once; to be said again at this time.
    again_at: Option<u64>,
    refusals: u32,
}

/// The connection to containerd's event service.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
enum Link {
    /// Not connected; next try at this time, with this pause before the one after.
    Down { retry_at: u64, pause: u64 },
    /// Connected.
    Up {
        unread: Vec<u8>,
        stream: u32,
        /// The event under way, and when its answer is overdue.
        under_way: Option<(u64, u64)>,
    },
}

/// What the outbox wants done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Post {
    /// Connect; `opened` follows.
    Open,
    /// Send these bytes; `lost` follows if that fails.
    Send(Vec<u8>),
    /// Close the connection.
    Close,
    /// The log may forget this event.
    Acknowledged(u64),
    /// A line for the log.
    Say(String),
}

/// The outbox.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outbox {
    entries: VecDeque<Entry>,
    last: u64,
    link: Link,
    /// When events of a downtime are said again; set by the first acknowledgement after it.
    echo_at: Option<u64>,
    /// Nobody can be told later: say the second time at once.
    hurry: bool,
    /// Refusals and silences in a row.
    troubles: u32,
}

impl Default for Outbox {
    fn default() -> Self {
        Self {
            entries: VecDeque::new(),
            last: 0,
            link: Link::Down {
                retry_at: 0,
                pause: RETRY_MS.0,
            },
            echo_at: None,
            hurry: false,
            troubles: 0,
        }
    }
}

impl Outbox {
    /// True when everything was acknowledged.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Takes what a predecessor left unacknowledged, in order.
    pub fn restore(&mut self, entries: Vec<(u64, bool, Vec<u8>)>) {
        for (number, echo, payload) in entries {
            self.last = self.last.max(number);
            if let Some((topic, id)) = subject(&payload)
                && [CREATE, DELETE].contains(&topic.as_str())
            {
                // As far as we know nothing of it was told yet: nothing is given up.
                let _nothing = self.deleted(&id);
            }
            self.entries.push_back(Entry {
                number,
                payload,
                echo,
                oom: None,
                waited: true,
                again_at: None,
                refusals: 0,
            });
        }
    }

    /// Takes an event; gives what has to be in the log before it is sent.
    pub fn push(&mut self, notice: &Notice, namespace: &str, now: Now) -> Entry {
        let (topic, event) = message(notice);
        let request = events::ForwardRequest {
            envelope: Some(events::Envelope {
                timestamp: Some(proto_time(now.wall)),
                namespace: namespace.to_owned(),
                topic: topic.to_owned(),
                event: Some(event),
            }),
        };
        self.last += 1;
        let entry = Entry {
            number: self.last,
            payload: request.encode_to_vec(),
            echo: matches!(notice, Notice::Exit { .. } | Notice::Oom(_)),
            oom: match notice {
                Notice::Oom(id) => Some(id.clone()),
                _ => None,
            },
            waited: self.is_downtime(now.mono_ms),
            again_at: None,
            refusals: 0,
        };
        self.entries.push_back(entry.clone());
        entry
    }

    /// The next event is that of a task's deletion: what was told of the task is not told again.
    pub fn deleted(&mut self, id: &str) -> Vec<Post> {
        let sent = match &self.link {
            Link::Up { under_way, .. } => under_way.map(|(number, _)| number),
            Link::Down { .. } => None,
        };
        let mut out = Vec::new();
        self.entries.retain_mut(|entry| {
            let of_task = |entry: &Entry| subject(&entry.payload).is_some_and(|(_, of)| of == id);
            if !entry.echo || !of_task(entry) {
                return true;
            }
            if entry.again_at.is_some() && sent != Some(entry.number) {
                out.push(Post::Acknowledged(entry.number));
                return false;
            }
            entry.echo = false;
            true
        });
        out
    }

    /// What happens between two failed tries to connect waits for containerd, too, even if the
    /// next try succeeds: its subscribers are not back yet.
    fn is_downtime(&self, now: u64) -> bool {
        match &self.link {
            // The first connection of all is made for the first event, without any failure.
            Link::Down { retry_at, .. } => *retry_at > now || self.entries.iter().any(|e| e.waited),
            Link::Up { .. } => false,
        }
    }

    /// True while an OOM kill of `id` is still to be told: another one says nothing new, and a
    /// crash loop has thousands in a night.
    pub fn tells_oom(&self, id: &str) -> bool {
        self.entries
            .iter()
            .any(|entry| entry.oom.as_deref() == Some(id))
    }

    /// The shim wants to leave: no echo waits for its time any more.
    pub fn hurry(&mut self) {
        self.hurry = true;
    }

    /// A new task came instead.
    pub fn no_hurry(&mut self) {
        self.hurry = false;
    }

    /// When [`Outbox::tick`] has to be called at the latest.
    pub fn deadline(&self) -> Option<u64> {
        let echoes = self.entries.iter().filter_map(|entry| entry.again_at);
        let next = if self.hurry { Some(0) } else { echoes.min() };
        match &self.link {
            _ if self.entries.is_empty() => None,
            Link::Up {
                under_way: Some((_, overdue)),
                ..
            } => Some(*overdue),
            Link::Up {
                under_way: None, ..
            } if self.first_due(u64::MAX).is_none() => None,
            Link::Up {
                under_way: None, ..
            } => {
                if self.entries.iter().any(|entry| entry.again_at.is_none()) {
                    Some(0)
                } else {
                    next
                }
            }
            Link::Down { retry_at, .. } => {
                if self.entries.iter().any(|entry| entry.again_at.is_none()) {
                    Some(*retry_at)
                } else {
                    next.map(|at| at.max(*retry_at))
                }
            }
        }
    }

    /// The first event that is to be sent now. New ones go before the second tellings, whose time
    /// is not exact.
    fn first_due(&self, now: u64) -> Option<&Entry> {
        let fresh = self.entries.iter().find(|entry| entry.again_at.is_none());
        fresh.or_else(|| {
            self.entries
                .iter()
                .find(|entry| self.hurry || entry.again_at.is_some_and(|at| at <= now))
        })
    }

    /// Does what is due.
    pub fn tick(&mut self, now: Now) -> Vec<Post> {
        let now = now.mono_ms;
        let mut out = Vec::new();
        let number = loop {
            let due = self.first_due(now);
            let Some((number, size)) = due.map(|entry| (entry.number, entry.payload.len())) else {
                return out;
            };
            if size <= MAX_EVENT {
                break number;
            }
            // No connection lives through it, and no other event would ever be sent.
            out.push(Post::Say(format!("an event of {size} bytes was dropped")));
            out.push(Post::Acknowledged(number));
            self.entries.retain(|entry| entry.number != number);
        };
        match &mut self.link {
            Link::Down { retry_at, .. } if *retry_at <= now => out.push(Post::Open),
            Link::Down { .. } => {}
            Link::Up {
                under_way: Some((_, overdue)),
                ..
            } => {
                if *overdue <= now {
                    out.push(Post::Close);
                    self.troubles = self.troubles.saturating_add(1);
                    self.lost_at(now, "event service does not answer", &mut out);
                }
            }
            Link::Up {
                stream, under_way, ..
            } => {
                // One that is stopped takes every copy when it goes on: few of them, then.
                let patience = ANSWER_MS << self.troubles.min(6);
                *under_way = Some((number, now.saturating_add(patience)));
                let entry = self.entries.iter().find(|entry| entry.number == number);
                let request = envelope::Request {
                    service: SERVICE.to_owned(),
                    method: "Forward".to_owned(),
                    payload: entry.map(|entry| entry.payload.clone()).unwrap_or_default(),
                    timeout_nano: 0,
                    metadata: Vec::new(),
                }
                .encode_to_vec();
                let header = Header {
                    length: u32::try_from(request.len()).unwrap_or(u32::MAX),
                    stream: *stream,
                    kind: Kind::Request,
                    flags: 0,
                };
                // Client streams are odd; a connection does not live for two billion events, and
                // if it does, the server refuses and we connect anew.
                *stream = stream.wrapping_add(2);
                out.push(Post::Send([&header.bytes()[..], &request].concat()));
            }
        }
        out
    }

    /// The connection is made.
    pub fn opened(&mut self) {
        self.link = Link::Up {
            unread: Vec::new(),
            stream: 1,
            under_way: None,
        };
    }

    /// The connection could not be made, or ended. One that ends while nothing is to be sent is
    /// no news.
    pub fn lost(&mut self, now: Now, why: &str) -> Vec<Post> {
        let mut out = Vec::new();
        self.lost_at(now.mono_ms, why, &mut out);
        out
    }

    fn lost_at(&mut self, now: u64, why: &str, out: &mut Vec<Post>) {
        let pause = match self.link {
            Link::Down { pause, .. } => pause.saturating_mul(2).min(RETRY_MS.1),
            // Refused again and again by one that can be reached: not so fast.
            Link::Up { .. } if self.troubles > 1 => RETRY_MS.1,
            Link::Up { .. } => RETRY_MS.0,
        };
        let waiting = self.entries.iter().filter(|entry| !entry.waited).count();
        for entry in &mut self.entries {
            entry.waited = true;
            // Who was told before has gone again, and so have those who would have listened.
            entry.again_at = None;
        }
        // The downtime has begun anew: echoes are due after its end.
        self.echo_at = None;
        self.link = Link::Down {
            retry_at: now.saturating_add(pause),
            pause,
        };
        // Once per event, not once per try.
        if waiting > 0 {
            out.push(Post::Say(format!(
                "{waiting} events wait for containerd: {why}"
            )));
        }
    }

    /// Bytes of containerd.
    pub fn feed(&mut self, bytes: &[u8], now: Now) -> Vec<Post> {
        let Link::Up { unread, .. } = &mut self.link else {
            return Vec::new();
        };
        unread.extend_from_slice(bytes);
        let mut out = Vec::new();
        loop {
            let Link::Up { unread, stream, .. } = &mut self.link else {
                return out;
            };
            let Some(header) = Header::parse(unread) else {
                return out;
            };
            let length = usize::try_from(header.length).unwrap_or(usize::MAX);
            if length > MAX_PAYLOAD {
                out.push(Post::Close);
                self.lost_at(now.mono_ms, "event service sent a giant frame", &mut out);
                return out;
            }
            let Some(payload) = unread.get(HEADER..HEADER.saturating_add(length)) else {
                return out;
            };
            let answer = envelope::Response::decode(payload);
            let expected = header.kind == Kind::Response && header.stream == stream.wrapping_sub(2);
            *unread = unread.get(HEADER + length..).unwrap_or_default().to_vec();
            match answer {
                Ok(answer) if expected => {
                    let status = answer.status.unwrap_or_default();
                    self.answered(status.code, &status.message, now.mono_ms, &mut out);
                }
                // Of a request that we gave up, or garbage: both end with the connection.
                _ => {
                    out.push(Post::Close);
                    self.lost_at(
                        now.mono_ms,
                        "event service sent no answer of ours",
                        &mut out,
                    );
                    return out;
                }
            }
        }
    }

    fn answered(&mut self, status: i32, message: &str, now: u64, out: &mut Vec<Post>) {
        let Link::Up { under_way, .. } = &mut self.link else {
            return;
        };
        let Some((number, _)) = under_way.take() else {
            return;
        };
        let Some(index) = self.entries.iter().position(|e| e.number == number) else {
            return;
        };
        let echo_at = *self.echo_at.get_or_insert(now.saturating_add(ECHO_MS));
        let hurry = self.hurry;
        let Some(entry) = self.entries.get_mut(index) else {
            return;
        };
        if status == code::OK {
            self.troubles = 0;
            if entry.echo && entry.waited && entry.again_at.is_none() && !hurry {
                entry.again_at = Some(echo_at);
                return;
            }
        } else {
            entry.refusals += 1;
            // A malformed event stays malformed; everything else may pass.
            if status != code::INVALID_ARGUMENT && entry.refusals < MAX_REFUSALS {
                out.push(Post::Close);
                self.troubles = self.troubles.saturating_add(1);
                // Who refuses is there: what was told was told, and is due when it was.
                let told: Vec<_> = self.entries.iter().map(|entry| entry.again_at).collect();
                let echo_at = self.echo_at;
                self.lost_at(now, message, out);
                for (entry, again_at) in self.entries.iter_mut().zip(told) {
                    entry.again_at = again_at;
                }
                self.echo_at = echo_at;
                return;
            }
            out.push(Post::Say(format!(
                "containerd refuses an event, dropped: {message}"
            )));
        }
        self.entries.remove(index);
        out.push(Post::Acknowledged(number));
    }
}

#[cfg(test)]
mod tests;

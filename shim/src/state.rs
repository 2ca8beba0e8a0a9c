//! The whole loop as plain data: tasks, connections, outgoing events, deadlines. Input in,
//! effects out; everything but the descriptors, so that it can be taken into another process
//! between any two inputs.

mod leaving;

use recoverd_common::ttrpc::code;
use serde::{Deserialize, Serialize};

use crate::{
    connections::{Caller, Connections, Note, Violation},
    events::{Outbox, Post},
    resume::Resumed,
    service::{self, Call, Refusal, Reply},
    tasks::{Adoptee, Effect, Event, Notice, Now, Tasks, Timer},
};
use leaving::Leaving;

/// A shim without tasks leaves after so long, milliseconds, unasked: whoever started it was killed
/// before he could tell, or died before he could ask it to leave. And so long it waits for a task
/// that `start` has announced. containerd's Create follows `start` at once.
const EMPTY_MS: u64 = 60_000;

/// `google.rpc.Code`: a full disk.
const RESOURCE_EXHAUSTED: i32 = 8;

/// What the loop is told.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Input {
    /// A peer has connected, on the socket with this inode.
    Accepted(u64),
    /// Bytes came in on a connection.
    Bytes(u64, Vec<u8>),
    /// This much of what was unsent has been written.
    Sent(u64, usize),
    /// A connection ended.
    Closed(u64),
    /// Something happened to the tasks.
    Event(Event),
    /// A predecessor's tasks and requests are ours.
    Resume(Box<Resume>),
    /// A reply that needed a look at the host.
    Reply(Caller, Result<Reply, Refusal>),
    /// containerd's event service is connected.
    EventsOpened,
    /// It is not, or no longer.
    EventsLost(String),
    /// Bytes of containerd's event service.
    EventsBytes(Vec<u8>),
    /// The shim is a new image by now, of this version; or not, because.
    Upgraded(Result<String, String>),
    /// Time has passed.
    Tick,
}

/// What a predecessor leaves. All at once: the record must name all tasks, and every request that
/// it has named must be answered, or named again.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Resume {
    /// Its connections that were kept.
    pub connections: Vec<u64>,
    /// Its tasks.
    pub adoptees: Vec<Adoptee>,
    /// Its requests on these connections.
    pub requests: Vec<(Caller, Resumed)>,
    /// Those of them that are still in their sockets.
    pub seen: Vec<Caller>,
}

/// What the loop does about it, in this order.
#[derive(Debug, Clone, PartialEq)]
pub enum Output {
    /// Of the tasks.
    Effect(Effect),
    /// Of the outgoing events.
    Post(Post),
    /// Write this event to the log of events.
    Log {
        /// Its number.
        number: u64,
        /// Worth saying twice.
        echo: bool,
        /// The request.
        payload: Vec<u8>,
    },
    /// Note what has become of a request.
    Note(Note),
    /// Become this executable; `Upgraded` follows.
    Upgrade(String),
    /// A line for the log of the shim.
    Say(String),
    /// Close a connection.
    Close(u64, Option<Violation>),
    /// Nobody new: close the listener, remove the socket and the files beside it.
    Retire,
    /// End the process.
    Exit,
}

/// Everything.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LoopState {
    namespace: String,
    /// The tasks.
    pub tasks: Tasks,
    /// The connections.
    pub connections: Connections,
    /// The outgoing events.
    pub outbox: Outbox,
    timers: Vec<(u64, Timer)>,
    leaving: Leaving,
    /// Without tasks: when it leaves.
    empty_until: Option<u64>,
    /// So long it stays without tasks, milliseconds.
    empty_ms: u64,
    /// Tasks that were announced and have not come, and until when they are waited for.
    joining: Vec<(String, u64)>,
    /// Who waits for an upgrade.
    upgrading: Option<Caller>,
    /// Why nothing new can be taken on: no room on disk for what it would need.
    pub no_room: Option<String>,
}

impl LoopState {
    /// At the start of a shim with pid `shim_pid`.
    pub fn new(namespace: &str, shim_pid: u32) -> Self {
        Self {
            namespace: namespace.to_owned(),
            tasks: Tasks::new(shim_pid),
            connections: Connections::default(),
            outbox: Outbox::default(),
            timers: Vec::new(),
            leaving: Leaving::No,
            empty_until: None,
            empty_ms: EMPTY_MS,
            joining: Vec::new(),
            upgrading: None,
            no_room: None,
        }
    }

    /// When [`Input::Tick`] is due at the latest, by the monotonic clock.
    pub fn deadline(&self) -> Option<u64> {
        let leaving = match &self.leaving {
            Leaving::No | Leaving::Lingering => None,
            Leaving::Flushing { until, .. } => Some(*until),
        };
        let timers = self.timers.iter().map(|(at, _)| *at);
        let due = timers.chain(self.outbox.deadline()).chain(leaving);
        due.chain(self.empty_until).min()
    }

    /// Takes one input.
    pub fn step(&mut self, input: Input, now: Now) -> Vec<Output> {
        let mut out = Vec::new();
        match input {
            Input::Accepted(connection) => self.connections.open(connection),
            Input::Bytes(connection, bytes) => self.bytes(connection, &bytes, now, &mut out),
            Input::Sent(connection, count) => {
                let sent = self.connections.sent(connection, count);
                let note = |stream| Note::Sent(Caller { connection, stream });
                out.extend(sent.into_iter().map(note).map(Output::Note));
            }
            Input::Closed(connection) => self.close(connection, None, now, &mut out),
            Input::Event(event) => self.event(event, now, &mut out),
            Input::Resume(resume) => self.resume(*resume, now, &mut out),
            Input::Reply(to, reply) => self.reply(to, &reply, now, &mut out),
            Input::EventsOpened => self.outbox.opened(),
            Input::EventsLost(why) => post(self.outbox.lost(now, &why), &mut out),
            Input::Upgraded(result) => {
                if let Some(to) = self.upgrading.take() {
                    let failed = |why| Refusal::new(code::FAILED_PRECONDITION, why);
                    self.reply(
                        to,
                        &result.map(Reply::Upgraded).map_err(failed),
                        now,
                        &mut out,
                    );
                }
            }
            Input::EventsBytes(bytes) => post(self.outbox.feed(&bytes, now), &mut out),
            Input::Tick => {
                let due = |(at, _): &(u64, Timer)| *at <= now.mono_ms;
                let (past, rest) = std::mem::take(&mut self.timers).into_iter().partition(due);
                self.timers = rest;
                let past: Vec<_> = past;
                for (_, timer) in past {
                    self.event(Event::Timer(timer), now, &mut out);
                }
            }
        }
        self.leave_when_empty(now);
        post(self.outbox.tick(now), &mut out);
        self.leave(now, &mut out);
        out
    }

    fn resume(&mut self, resume: Resume, now: Now, out: &mut Vec<Output>) {
        for connection in resume.connections {
            self.connections.open(connection);
        }
        for caller in resume.seen {
            self.connections.pass_over(caller);
        }
        self.event(Event::Adopt(resume.adoptees), now, out);
        for (from, resumed) in resume.requests {
            match resumed {
                Resumed::Again(call, timeout) => {
                    self.request(from, *call, deadline(timeout, now), now, out);
                }
                Resumed::Tell(payload) => self.send(from, payload, now, out),
                Resumed::Refuse(why) => {
                    let refusal = Refusal::new(code::UNAVAILABLE, why);
                    self.reply(from, &Err(refusal), now, out);
                }
                Resumed::Settle(what) => self.event(Event::Settle { from, what }, now, out),
            }
        }
    }

    fn bytes(&mut self, connection: u64, bytes: &[u8], now: Now, out: &mut Vec<Output>) {
        let frames = match self.connections.feed(connection, bytes) {
            Ok(frames) => frames,
            Err(violation) => return self.close(connection, Some(violation), now, out),
        };
        for frame in frames {
            let from = Caller {
                connection,
                stream: frame.stream,
            };
            self.asked(from, frame.payload, now, out);
        }
    }

    /// A request is here: the payload of its frame.
    fn asked(&mut self, from: Caller, payload: Vec<u8>, now: Now, out: &mut Vec<Output>) {
        let parsed = service::parse(&payload);
        let call = parsed.as_ref().map(|(call, _)| call);
        out.push(Output::Note(Note::Asked {
            from,
            payload,
            keeps_answer: call.is_ok_and(service::keeps_answer),
        }));
        match parsed {
            Ok((call, timeout)) => self.request(from, call, deadline(timeout, now), now, out),
            Err(refusal) => self.reply(from, &Err(refusal), now, out),
        }
    }

    fn request(
        &mut self,
        from: Caller,
        call: Call,
        until: Option<u64>,
        now: Now,
        out: &mut Vec<Output>,
    ) {
        if let Some(why) = &self.no_room
            && service::needs_room(&call)
        {
            let refusal = Refusal::new(RESOURCE_EXHAUSTED, why.clone());
            return self.reply(from, &Err(refusal), now, out);
        }
        if let Call::Create(_) | Call::Join(_) = &call {
            match &mut self.leaving {
                Leaving::No => {}
                Leaving::Flushing { callers, .. } => {
                    // It came while the last events of what was here before are on their way: stay.
                    let callers = std::mem::take(callers);
                    self.leaving = Leaving::No;
                    self.outbox.no_hurry();
                    for to in callers {
                        self.reply(to, &Ok(Reply::Empty), now, out);
                    }
                }
                Leaving::Lingering => {
                    let refusal = Refusal::new(code::UNAVAILABLE, "shim is shut down");
                    return self.reply(from, &Err(refusal), now, out);
                }
            }
        }
        if let Call::Upgrade(executable) = call {
            return self.upgrade(from, executable, now, out);
        }
        match &call {
            Call::Join(id) => {
                let until = now.mono_ms.saturating_add(EMPTY_MS);
                self.joining.push((id.clone(), until));
                self.empty_until = None;
                self.empty_ms = EMPTY_MS;
            }
            Call::Create(create) => {
                self.joining.retain(|(id, _)| *id != create.id);
                self.empty_ms = EMPTY_MS;
            }
            _ => {}
        }
        self.event(Event::Request { from, call, until }, now, out);
    }

    fn upgrade(&mut self, from: Caller, executable: String, now: Now, out: &mut Vec<Output>) {
        let why = match (&self.upgrading, &self.leaving) {
            (Some(_), _) => "an upgrade is under way",
            (None, Leaving::Flushing { .. } | Leaving::Lingering) => "shim is leaving",
            (None, Leaving::No) => {
                self.upgrading = Some(from);
                out.push(Output::Upgrade(executable));
                return;
            }
        };
        let refusal = Refusal::new(code::UNAVAILABLE, why);
        self.reply(from, &Err(refusal), now, out);
    }

    fn close(&mut self, connection: u64, why: Option<Violation>, now: Now, out: &mut Vec<Output>) {
        self.connections.close(connection);
        out.push(Output::Note(Note::Closed(connection)));
        out.push(Output::Close(connection, why));
        self.event(Event::Disconnected { connection }, now, out);
    }

    fn event(&mut self, event: Event, now: Now, out: &mut Vec<Output>) {
        if let Event::JobEnded { job, .. } = &event {
            let done = Timer::Job(*job);
            self.timers.retain(|(_, timer)| *timer != done);
        }
        if let Event::Adopt(adoptees) = &event
            && adoptees.iter().all(Adoptee::is_undone)
        {
            // Nobody knows of it, and nobody will tell it to go.
            self.empty_ms = 0;
        }
        for effect in self.tasks.handle(event, now) {
            match effect {
                Effect::Reply { to, reply } => self.reply(to, &reply, now, out),
                Effect::Publish(notice) => self.publish(&notice, now, out),
                Effect::Arm { at, timer } => self.timers.push((at, timer)),
                // While others are announced, it says yes and stays: they are as good as here.
                Effect::Leave { to } if self.leaving == Leaving::No && self.is_awaited(now) => {
                    self.reply(to, &Ok(Reply::Empty), now, out);
                }
                Effect::Leave { to } => match &mut self.leaving {
                    Leaving::Flushing { callers, .. } => callers.push(to),
                    // It has happened; what is at our paths now may be somebody else's.
                    Leaving::Lingering => self.reply(to, &Ok(Reply::Empty), now, out),
                    Leaving::No => self.begin_to_leave(vec![to], now),
                },
                other => {
                    // The same id may be used again at once.
                    match &other {
                        Effect::CloseStdio(key) => self.disarm(|timer| match timer {
                            Timer::Drain(of) => of == key,
                            Timer::Job(_) | Timer::LateExit(_) => false,
                        }),
                        Effect::Forget { id } => self.disarm(|timer| match timer {
                            Timer::Drain(of) => of.id == *id,
                            Timer::LateExit(of) => of == id,
                            Timer::Job(_) => false,
                        }),
                        _ => {}
                    }
                    out.push(Output::Effect(other));
                }
            }
        }
    }

    fn disarm(&mut self, which: impl Fn(&Timer) -> bool) {
        self.timers.retain(|(_, timer)| !which(timer));
    }

    fn reply(
        &mut self,
        to: Caller,
        reply: &Result<Reply, Refusal>,
        now: Now,
        out: &mut Vec<Output>,
    ) {
        // That something has just gone is everyday life, and not for the log.
        if let Err(refusal) = reply
            && refusal.code != code::NOT_FOUND
        {
            out.push(Output::Say(format!("refused: {}", refusal.message)));
        }
        self.send(to, service::response(reply), now, out);
    }

    fn send(&mut self, to: Caller, payload: Vec<u8>, now: Now, out: &mut Vec<Output>) {
        let answered = self.connections.answer(to, &payload);
        out.push(Output::Note(Note::Answered { to, payload }));
        if let Err(violation) = answered {
            self.close(to.connection, Some(violation), now, out);
        }
    }

    fn publish(&mut self, notice: &Notice, now: Now, out: &mut Vec<Output>) {
        if let Notice::Oom(id) = notice
            && self.outbox.tells_oom(id)
        {
            return;
        }
        // Whoever makes it anew knows how the one before it ended, and would take that for its end.
        if let Notice::Delete { id, .. } | Notice::Create { id, .. } = notice {
            post(self.outbox.deleted(id), out);
        }
        let entry = self.outbox.push(notice, &self.namespace, now);
        out.push(Output::Log {
            number: entry.number,
            echo: entry.echo,
            payload: entry.payload,
        });
    }
}

/// By the monotonic clock, of a caller who waits for so many nanoseconds.
fn deadline(timeout: Option<u64>, now: Now) -> Option<u64> {
    timeout.map(|nanos| now.mono_ms.saturating_add(nanos / 1_000_000))
}

fn post(posts: Vec<Post>, out: &mut Vec<Output>) {
    out.extend(posts.into_iter().map(Output::Post));
}

#[cfg(test)]
mod tests;

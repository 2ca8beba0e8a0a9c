//! Recorded runs, hostile peers, and when a shim leaves.

use super::{leaving::FLUSH_MS, *};
use recoverd_common::timestamp::Timestamp;
use recoverd_common::ttrpc::{Header, Kind};

/// Recorded under containerd 1.7.24 with the feature `trace`: a task, execs (with stdin,
/// failing, with a terminal), pause, resume, pids, metrics; containerd killed; exec and init
/// killed while it was away; containerd started anew; delete, shutdown. The shim was pid 1000.
const RUN: &str = include_str!("../../testdata/restart-1.7.jsonl");

fn inputs() -> Vec<(Input, Now)> {
    RUN.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

fn carried(state: &LoopState) -> LoopState {
    serde_json::from_slice(&serde_json::to_vec(state).unwrap()).unwrap()
}

#[test]
fn the_whole_loop_can_be_carried_over_after_every_event_of_a_recorded_run() {
    let mut stayed = LoopState::new("ns", 1000);
    let mut moved = stayed.clone();
    let mut left = false;
    for (number, (input, now)) in inputs().into_iter().enumerate() {
        let here = stayed.step(input.clone(), now);
        let there = moved.step(input, now);
        assert_eq!(here, there, "input {number}");
        left |= here.contains(&Output::Exit);
        moved = carried(&moved);
        assert_eq!(stayed, moved, "after input {number}");
    }
    // Its end, as it was: nothing is left, and it leaves.
    assert!(left && stayed.tasks.is_idle() && stayed.outbox.is_empty());
}

#[test]
fn a_recorded_run_ends_the_same_when_its_bytes_come_one_by_one() {
    let run = |cut: usize| {
        let mut state = LoopState::new("ns", 1000);
        let mut effects = Vec::new();
        for (input, now) in inputs() {
            let parts = match input {
                Input::Bytes(connection, bytes) => bytes
                    .chunks(cut)
                    .map(|part| Input::Bytes(connection, part.to_vec()))
                    .collect(),
                other => vec![other],
            };
            for part in parts {
                effects.extend(state.step(part, now));
                state = carried(&state);
            }
        }
        effects
    };
    let whole = run(usize::MAX);
    assert!(whole.contains(&Output::Exit));
    assert_eq!(run(7), whole);
}

#[test]
fn every_event_of_a_recorded_run_is_logged_and_acknowledged() {
    let mut state = LoopState::new("ns", 1000);
    let mut logged = Vec::new();
    let mut acknowledged = Vec::new();
    for (input, now) in inputs() {
        for output in state.step(input, now) {
            match output {
                Output::Log { number, .. } => logged.push(number),
                Output::Post(Post::Acknowledged(number)) => acknowledged.push(number),
                _ => {}
            }
        }
    }
    assert!(logged.len() > 10);
    acknowledged.sort_unstable();
    assert_eq!(acknowledged, logged);
}

fn at(mono_ms: u64) -> Now {
    Now {
        mono_ms,
        wall: Timestamp {
            seconds: 0,
            nanos: 0,
        },
    }
}

fn but_notes(mut out: Vec<Output>) -> Vec<Output> {
    out.retain(|output| !matches!(output, Output::Note(_)));
    out
}

fn frame(stream: u32, method: &str) -> Vec<u8> {
    use prost::Message;
    let payload = recoverd_common::pb::ttrpc::Request {
        service: "containerd.task.v2.Task".into(),
        method: method.into(),
        ..Default::default()
    }
    .encode_to_vec();
    let header = Header {
        length: payload.len() as u32,
        stream,
        kind: Kind::Request,
        flags: 0,
    };
    [&header.bytes()[..], &payload].concat()
}

#[test]
fn hostile_peers_cost_their_own_connection_only() {
    let mut state = LoopState::new("ns", 1);
    for number in 1..=4 {
        state.step(Input::Accepted(number), at(0));
    }
    let closed = |out: &[Output]| {
        let mut closes = out.iter().filter_map(|output| match output {
            Output::Close(number, Some(_)) => Some(*number),
            _ => None,
        });
        closes.next()
    };
    // Garbage, half a frame, silence (4), and one that behaves.
    let out = state.step(Input::Bytes(1, b"GET / HTTP/1.1\r\n\r\n".to_vec()), at(0));
    assert_eq!(closed(&out), Some(1));
    let half = frame(1, "Connect");
    let out = state.step(Input::Bytes(2, half[..half.len() - 1].to_vec()), at(0));
    assert_eq!(closed(&out), None);
    state.step(Input::Bytes(3, frame(1, "Connect")), at(0));
    assert!(!state.connections.unsent(3).is_empty());
    assert!(state.connections.unsent(2).is_empty());
    // Well framed, not a request: answered, and the connection lives.
    let header = Header {
        length: 2,
        stream: 3,
        kind: Kind::Request,
        flags: 0,
    };
    let bytes = [&header.bytes()[..], &[0xff, 0xff]].concat();
    let before = state.connections.unsent(3).len();
    let out = state.step(Input::Bytes(3, bytes), at(0));
    assert_eq!(closed(&out), None);
    assert!(state.connections.unsent(3).len() > before);
}

#[test]
fn shutdown_without_tasks_retires_before_it_answers_and_then_exits() {
    let mut state = LoopState::new("ns", 1);
    state.step(Input::Accepted(1), at(0));
    let out = state.step(Input::Bytes(1, frame(1, "Shutdown")), at(0));
    assert_eq!(but_notes(out), [Output::Retire, Output::Exit]);
    assert!(!state.connections.unsent(1).is_empty());
}

fn join(id: &str) -> Call {
    Call::Join(id.to_owned())
}

#[test]
fn a_shim_that_nobody_uses_leaves_by_itself() {
    let mut state = LoopState::new("ns", 1);
    assert_eq!(state.step(Input::Tick, at(5)), []);
    assert_eq!(state.deadline(), Some(5 + EMPTY_MS));
    assert_eq!(state.step(Input::Tick, at(4 + EMPTY_MS)), []);
    let out = state.step(Input::Tick, at(5 + EMPTY_MS));
    assert_eq!(out, [Output::Retire, Output::Exit]);
    // Being looked at is no use.
    let mut state = LoopState::new("ns", 1);
    state.step(Input::Accepted(1), at(0));
    state.step(Input::Bytes(1, frame(1, "Connect")), at(EMPTY_MS - 1));
    let out = state.step(Input::Tick, at(EMPTY_MS));
    assert_eq!(out, [Output::Retire, Output::Exit]);
}

#[test]
fn a_shim_waits_for_a_task_that_start_has_announced() {
    let to = Caller {
        connection: 1,
        stream: 9,
    };
    let mut state = LoopState::new("ns", 1);
    state.step(Input::Accepted(1), at(0));
    let mut out = Vec::new();
    state.request(to, join("b"), None, at(10), &mut out);
    let out = state.step(Input::Bytes(1, frame(1, "Shutdown")), at(20));
    assert_eq!(but_notes(out), [], "it has promised to stay");
    // Not for ever.
    let out = state.step(Input::Tick, at(20 + EMPTY_MS));
    assert_eq!(out, [Output::Retire, Output::Exit]);
}

#[test]
fn a_shim_that_is_leaving_stays_for_an_announced_task_or_refuses_it() {
    let to = Caller {
        connection: 1,
        stream: 9,
    };
    let mut state = LoopState::new("ns", 1);
    state.step(Input::Accepted(1), at(0));
    state.outbox.push(&Notice::Oom("a".into()), "ns", at(0));
    state.step(Input::Bytes(1, frame(1, "Shutdown")), at(0));
    assert!(matches!(state.leaving, Leaving::Flushing { .. }));
    state.request(to, join("b"), None, at(1), &mut Vec::new());
    assert_eq!(state.leaving, Leaving::No);
    // Asked again when it has gone from its place on disk.
    state.joining.clear();
    state.step(Input::Bytes(1, frame(3, "Shutdown")), at(2));
    state.step(Input::EventsLost("refused".into()), at(3));
    state.step(Input::Tick, at(3 + FLUSH_MS));
    assert_eq!(state.leaving, Leaving::Lingering);
    state.connections.sent(1, state.connections.unsent(1).len());
    state.request(to, join("c"), None, at(9_000), &mut Vec::new());
    let said = String::from_utf8_lossy(state.connections.unsent(1)).into_owned();
    assert!(said.contains("shut down"), "{said}");
}

#[test]
fn shutdown_waits_for_the_last_events_but_not_for_ever() {
    let mut state = LoopState::new("ns", 1);
    state.step(Input::Accepted(1), at(0));
    state.outbox.push(&Notice::Oom("a".into()), "ns", at(0));
    let out = state.step(Input::Bytes(1, frame(1, "Shutdown")), at(0));
    assert_eq!(but_notes(out), [Output::Post(Post::Open)]);
    assert!(state.connections.unsent(1).is_empty());
    state.step(Input::EventsLost("refused".into()), at(0));
    let out = state.step(Input::Tick, at(FLUSH_MS));
    assert!(out.contains(&Output::Retire) && !out.contains(&Output::Exit));
    assert!(!state.connections.unsent(1).is_empty());
    // A second one does not touch what may be somebody else's by now.
    let out = state.step(Input::Bytes(1, frame(3, "Shutdown")), at(FLUSH_MS + 1));
    assert!(!out.contains(&Output::Retire));
    assert!(!state.leave_now().contains(&Output::Retire));
    // A containerd that is away for a day is told all the same.
    let day = at(86_400_000);
    state.step(Input::EventsLost("refused".into()), day);
    let out = state.step(Input::Tick, day);
    assert!(!out.contains(&Output::Exit), "{out:?}");
    let back = at(86_400_000 + 2_000);
    state.step(Input::Tick, back);
    let sent = state.step(Input::EventsOpened, back);
    assert!(
        matches!(sent[..], [Output::Post(Post::Send(_))]),
        "{sent:?}"
    );
    let answer = Header {
        length: 0,
        stream: 1,
        kind: Kind::Response,
        flags: 0,
    };
    let out = state.step(Input::EventsBytes(answer.bytes().to_vec()), back);
    assert!(out.contains(&Output::Exit), "{out:?}");
}

#[test]
fn without_room_nothing_new_is_taken_on_and_everything_else_goes_on() {
    let mut state = LoopState::new("ns", 1);
    state.step(Input::Accepted(1), at(0));
    state.no_room = Some("make room for record: no space".into());
    let create = recoverd_common::pb::task::CreateTaskRequest {
        id: "a".into(),
        bundle: "/b".into(),
        ..Default::default()
    };
    let request = |method: &str, payload: Vec<u8>| {
        use prost::Message;
        let payload = recoverd_common::pb::ttrpc::Request {
            service: "containerd.task.v3.Task".into(),
            method: method.into(),
            payload,
            ..Default::default()
        };
        service::parse(&payload.encode_to_vec()).unwrap().0
    };
    let to = Caller {
        connection: 1,
        stream: 1,
    };
    let mut out = Vec::new();
    use prost::Message;
    let call = request("Create", create.encode_to_vec());
    state.request(to, call, None, at(0), &mut out);
    let effects = |output: &&Output| matches!(output, Output::Effect(_));
    assert_eq!(out.iter().filter(effects).count(), 0);
    assert!(state.tasks.is_idle());
    let said = String::from_utf8_lossy(state.connections.unsent(1)).into_owned();
    assert!(said.contains("no space"), "{said}");
}

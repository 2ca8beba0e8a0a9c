//! What leaves the outbox, in which order, whatever containerd does.

use super::*;
use crate::service::{Ended, Key, StdioWish};
use recoverd_common::timestamp::Timestamp;

fn at(mono_ms: u64) -> Now {
    Now {
        mono_ms,
        wall: Timestamp {
            seconds: 0,
            nanos: 0,
        },
    }
}

fn exit(id: &str) -> Notice {
    Notice::Exit {
        key: Key::init(id),
        ended: Ended {
            pid: 1,
            status: 42,
            at: None,
        },
    }
}

fn push(outbox: &mut Outbox, notice: &Notice) -> u64 {
    outbox.push(notice, "ns", at(0)).number
}

/// Sends the next event and answers it; gives its number when the log may forget it.
fn deliver(outbox: &mut Outbox, now: u64) -> Option<u64> {
    let posts = outbox.tick(at(now));
    let [Post::Send(bytes)] = posts.as_slice() else {
        panic!("{posts:?}");
    };
    let stream = Header::parse(bytes).unwrap().stream;
    match outbox.feed(&answer(stream, 0), at(now)).as_slice() {
        [] => None,
        [Post::Acknowledged(number)] => Some(*number),
        other => panic!("{other:?}"),
    }
}

fn answer(stream: u32, code: i32) -> Vec<u8> {
    let payload = envelope::Response {
        status: Some(envelope::Status {
            code,
            ..Default::default()
        }),
        payload: Vec::new(),
    }
    .encode_to_vec();
    let header = Header {
        length: payload.len() as u32,
        stream,
        kind: Kind::Response,
        flags: 0,
    };
    [&header.bytes()[..], &payload].concat()
}

#[test]
fn events_go_one_at_a_time_and_in_order() {
    let mut outbox = Outbox::default();
    let first = push(&mut outbox, &exit("a"));
    let second = push(&mut outbox, &Notice::Oom("b".into()));
    assert_eq!(outbox.tick(at(0)), [Post::Open]);
    outbox.opened();
    assert_eq!(deliver(&mut outbox, 0), Some(first));
    assert_eq!(deliver(&mut outbox, 0), Some(second));
    assert!(outbox.is_empty());
    assert_eq!(outbox.deadline(), None);
    assert_eq!(outbox.tick(at(9)), []);
}

#[test]
fn nothing_is_said_again_of_a_task_that_is_deleted() {
    let delete = Notice::Delete {
        id: "a".into(),
        ended: Ended {
            pid: 1,
            status: 42,
            at: None,
        },
    };
    // Nor of one that another is made in the place of, whose end it would be taken for.
    let create = Notice::Create {
        id: "a".into(),
        bundle: String::new(),
        rootfs: Vec::new(),
        stdio: StdioWish::default(),
        checkpoint: String::new(),
        pid: 2,
    };
    // Before it was told, after it was told, and by a successor.
    let whens = [(false, false), (true, false), (false, true)];
    let all = [&delete, &create].map(|last| whens.map(|when| (last, when)));
    for (last, (told, successor)) in all.into_iter().flatten() {
        let mut outbox = Outbox::default();
        outbox.lost(at(0), "away");
        let ended = push(&mut outbox, &exit("a"));
        let other = push(&mut outbox, &exit("b"));
        outbox.opened();
        if told {
            assert_eq!(deliver(&mut outbox, 50), None);
            assert_eq!(deliver(&mut outbox, 50), None);
        }
        let given_up = outbox.deleted("a");
        let expected: &[Post] = if told {
            &[Post::Acknowledged(ended)]
        } else {
            &[]
        };
        assert_eq!(given_up, expected);
        let deleted = push(&mut outbox, last);
        if successor {
            let left = outbox.entries.iter();
            let left = left.map(|e| (e.number, e.number < deleted, e.payload.clone()));
            let left = left.collect();
            outbox = Outbox::default();
            outbox.restore(left);
            outbox.opened();
        }
        if !told {
            assert_eq!(deliver(&mut outbox, 60), Some(ended));
            assert_eq!(deliver(&mut outbox, 60), None);
        }
        assert_eq!(deliver(&mut outbox, 60), Some(deleted));
        assert_eq!(deliver(&mut outbox, 60 + ECHO_MS), Some(other));
        assert!(outbox.is_empty());
    }
}

#[test]
fn a_downtime_of_any_length_loses_nothing_and_exits_are_said_again() {
    let mut outbox = Outbox::default();
    let start = push(
        &mut outbox,
        &Notice::Start {
            id: "a".into(),
            pid: 1,
        },
    );
    let ended = push(&mut outbox, &exit("a"));
    let mut now = 0;
    for _ in 0..10_000 {
        assert_eq!(outbox.tick(at(now)), [Post::Open]);
        outbox.lost(at(now), "connection refused");
        now = outbox.deadline().unwrap();
    }
    assert!(now > 9_000_000, "tries are seconds apart: {now}");
    outbox.opened();
    assert_eq!(deliver(&mut outbox, now), Some(start));
    assert_eq!(deliver(&mut outbox, now), None);
    assert_eq!(outbox.deadline(), Some(now + ECHO_MS));
    assert_eq!(outbox.tick(at(now + ECHO_MS - 1)), []);
    assert_eq!(deliver(&mut outbox, now + ECHO_MS), Some(ended));
    assert!(outbox.is_empty());
}

#[test]
fn what_happens_between_two_tries_to_connect_is_said_again_too() {
    let mut outbox = Outbox::default();
    let first = push(&mut outbox, &Notice::Oom("a".into()));
    assert_eq!(outbox.tick(at(0)), [Post::Open]);
    outbox.lost(at(0), "connection refused");
    let second = push(&mut outbox, &exit("a"));
    outbox.opened();
    assert_eq!(deliver(&mut outbox, 100), None);
    assert_eq!(deliver(&mut outbox, 100), None);
    assert_eq!(deliver(&mut outbox, 100 + ECHO_MS), Some(first));
    assert_eq!(deliver(&mut outbox, 100 + ECHO_MS), Some(second));
}

#[test]
fn who_leaves_says_the_second_time_at_once() {
    let mut outbox = Outbox::default();
    let ended = push(&mut outbox, &exit("a"));
    outbox.lost(at(0), "x");
    outbox.opened();
    assert_eq!(deliver(&mut outbox, 100), None);
    outbox.hurry();
    assert_eq!(deliver(&mut outbox, 101), Some(ended));
}

#[test]
fn silence_and_refusals_are_tried_again_but_a_poisoned_event_holds_nothing_back_for_ever() {
    let mut outbox = Outbox::default();
    let number = push(&mut outbox, &exit("a"));
    outbox.opened();
    assert!(matches!(outbox.tick(at(0))[..], [Post::Send(_)]));
    assert_eq!(outbox.tick(at(4_999)), []);
    assert_eq!(outbox.tick(at(5_000))[0], Post::Close);
    for refused in 1..=MAX_REFUSALS {
        outbox.opened();
        assert!(matches!(outbox.tick(at(10_000))[..], [Post::Send(_)]));
        let posts = outbox.feed(&answer(1, code::UNKNOWN), at(10_000));
        if refused == MAX_REFUSALS {
            assert_eq!(posts[1], Post::Acknowledged(number));
        } else {
            assert_eq!(posts[0], Post::Close);
        }
    }
    assert!(outbox.is_empty());
}

#[test]
fn a_second_downtime_before_the_second_telling_begins_anew() {
    let mut outbox = Outbox::default();
    let ended = push(&mut outbox, &exit("a"));
    outbox.lost(at(0), "x");
    outbox.opened();
    assert_eq!(deliver(&mut outbox, 100), None);
    outbox.lost(at(3_000), "x");
    outbox.opened();
    assert_eq!(deliver(&mut outbox, 20_000), None);
    assert_eq!(outbox.tick(at(20_000 + ECHO_MS - 1)), []);
    assert_eq!(deliver(&mut outbox, 20_000 + ECHO_MS), Some(ended));
}

#[test]
fn refusals_take_minutes_and_what_was_told_is_not_told_with_each() {
    let mut outbox = Outbox::default();
    let ended = push(&mut outbox, &exit("a"));
    outbox.lost(at(0), "connection refused");
    outbox.opened();
    assert_eq!(deliver(&mut outbox, 1_000), None);
    let refused = push(&mut outbox, &exit("b"));
    let mut now = 1_000;
    let mut sent = 0;
    loop {
        let posts = outbox.tick(at(now));
        let [Post::Send(bytes)] = posts.as_slice() else {
            assert_eq!(posts, [Post::Open]);
            outbox.opened();
            continue;
        };
        sent += 1;
        let stream = Header::parse(bytes).unwrap().stream;
        let posts = outbox.feed(&answer(stream, code::UNKNOWN), at(now));
        if posts.contains(&Post::Acknowledged(refused)) {
            break;
        }
        now = outbox.deadline().unwrap().max(now);
    }
    assert_eq!(sent, MAX_REFUSALS);
    assert!(now > 60_000, "{now}");
    assert_eq!(deliver(&mut outbox, now), Some(ended));
}

#[test]
fn an_event_that_no_frame_can_carry_holds_nothing_back() {
    let mut outbox = Outbox::default();
    let giant = push(&mut outbox, &Notice::Oom("x".repeat(MAX_PAYLOAD)));
    let small = push(&mut outbox, &exit("a"));
    outbox.opened();
    let posts = outbox.tick(at(0));
    assert_eq!(posts[1], Post::Acknowledged(giant));
    assert!(matches!(posts[2], Post::Send(_)));
    assert_eq!(
        outbox.feed(&answer(1, 0), at(0)),
        [Post::Acknowledged(small)]
    );
}

#[test]
fn an_idle_connection_that_ends_is_no_news() {
    let mut outbox = Outbox::default();
    outbox.opened();
    assert_eq!(outbox.lost(at(0), "closed"), []);
    assert_eq!(outbox.deadline(), None);
}

#[test]
fn garbage_from_the_event_service_ends_the_connection_only() {
    for garbage in [&[0xff; 10][..], &answer(7, 0), &answer(2, 0)[..]] {
        let mut outbox = Outbox::default();
        push(&mut outbox, &exit("a"));
        outbox.opened();
        outbox.tick(at(0));
        assert_eq!(outbox.feed(garbage, at(0))[0], Post::Close);
        assert!(!outbox.is_empty());
    }
}

use super::*;

const S: &str = "/s/0";

fn p(pid: u32) -> Process {
    Process {
        pid,
        start_time: u64::from(pid) + 1000,
    }
}

fn m(id: &str, exec_id: &str) -> Member {
    Member {
        id: id.into(),
        exec_id: exec_id.into(),
    }
}

fn sighting(kind: Kind, shim: u32, members: &[(&str, &str, u32)]) -> Sighting {
    Sighting {
        kind,
        namespace: "k8s.io".into(),
        address: "/a".into(),
        group: "g".into(),
        shim: p(shim),
        members: members
            .iter()
            .map(|(id, exec_id, pid)| (m(id, exec_id), p(*pid)))
            .collect(),
        tasks: members
            .iter()
            .filter(|(_, exec, _)| exec.is_empty())
            .count(),
    }
}

fn watching(kind: Kind) -> State {
    let mut state = State::default();
    state.step(
        Input::Seen(S.into(), sighting(kind, 1, &[("a", "", 10)])),
        0,
    );
    state
}

fn ended(shim: u32, how: How) -> Input {
    Input::ShimEnded(S.into(), p(shim), how)
}

fn tried_for(shim: u32, tried: Tried) -> Input {
    Input::Tried(S.into(), p(shim), tried)
}

const KILLED: How = How::Signalled(9);

fn resumes(out: &[Output]) -> bool {
    out.contains(&Output::Resume(S.into()))
}

fn follows(out: &[Output]) -> Option<Follows> {
    out.iter().find_map(|output| match output {
        Output::Died(_, _, _, follows) => Some(*follows),
        _ => None,
    })
}

#[test]
fn what_is_seen_is_watched_once_and_what_has_gone_is_not() {
    let mut state = State::default();
    let first = sighting(Kind::Ours, 1, &[("a", "", 10), ("a", "e", 11)]);
    let out = state.step(Input::Seen(S.into(), first.clone()), 0);
    assert_eq!(
        out,
        [
            Output::WatchShim(S.into(), p(1)),
            Output::WatchMember(S.into(), m("a", ""), p(10)),
            Output::WatchMember(S.into(), m("a", "e"), p(11)),
        ]
    );
    assert_eq!(state.step(Input::Seen(S.into(), first), 0), []);
    // The exec's id is used again; another container of the pod.
    let next = sighting(
        Kind::Ours,
        1,
        &[("a", "", 10), ("a", "e", 12), ("b", "", 20)],
    );
    let out = state.step(Input::Seen(S.into(), next), 0);
    assert_eq!(
        out,
        [
            Output::Unwatch(p(11)),
            Output::WatchMember(S.into(), m("a", "e"), p(12)),
            Output::WatchMember(S.into(), m("b", ""), p(20)),
        ]
    );
    assert_eq!(state.count(Kind::Ours).inits, 2);
    // All of them end, it retires and ends.
    for (member, pid) in [(m("a", ""), 10), (m("a", "e"), 12), (m("b", ""), 20)] {
        state.step(Input::MemberEnded(S.into(), member, p(pid)), 0);
    }
    assert_eq!(state.step(Input::Gone(S.into()), 0), []);
    let out = state.step(ended(1, How::Exited(0)), 0);
    assert!(
        out.contains(&Output::DropAll(S.into())) && !resumes(&out),
        "{out:?}"
    );
    assert_eq!(state.sockets().count(), 0);
}

#[test]
fn only_a_crash_of_our_shim_has_a_successor_and_at_once() {
    let table = [
        (Kind::Ours, KILLED, Follows::Successor),
        (Kind::Ours, How::Signalled(6), Follows::Successor),
        (Kind::Ours, How::Unknown, Follows::Successor),
        (Kind::Ours, How::Exited(1), Follows::Successor),
        (Kind::Ours, How::Exited(0), Follows::Nothing),
        (Kind::Stock, KILLED, Follows::Loss),
        // SIGTERM: what it leaves lives.
        (Kind::Stock, How::Exited(0), Follows::Loss),
    ];
    for (kind, how, expected) in table {
        let mut state = watching(kind);
        let out = state.step(ended(1, how), 7);
        assert_eq!(follows(&out), Some(expected), "{kind:?} {how:?}");
        let successor = expected == Follows::Successor;
        assert_eq!(resumes(&out), successor, "{kind:?} {how:?}");
        // What follows a loss may still be adopted.
        let drops = out.contains(&Output::DropAll(S.into()));
        assert_eq!(drops, expected == Follows::Nothing, "{kind:?} {how:?}");
        if successor {
            assert_eq!(out.first(), Some(&Output::Resume(S.into())));
        }
        // The same end twice is one.
        assert_eq!(state.step(ended(1, how), 7), []);
    }
}

#[test]
fn an_announced_end_and_one_without_tasks_have_no_successor() {
    let mut state = watching(Kind::Ours);
    state.step(Input::Leave(S.into(), p(2)), 0);
    assert!(
        resumes(&state.step(ended(1, KILLED), 0)),
        "another was meant"
    );
    let mut state = watching(Kind::Ours);
    state.step(Input::Leave(S.into(), p(1)), 0);
    assert!(
        resumes(&state.step(ended(1, KILLED), 60_000)),
        "its end was announced and did not come"
    );
    let mut state = watching(Kind::Ours);
    state.step(Input::Leave(S.into(), p(1)), 0);
    assert_eq!(
        follows(&state.step(ended(1, KILLED), 0)),
        Some(Follows::Nothing)
    );
    let mut state = State::default();
    state.step(Input::Seen(S.into(), sighting(Kind::Ours, 1, &[])), 0);
    assert_eq!(
        follows(&state.step(ended(1, KILLED), 0)),
        Some(Follows::Nothing)
    );
}

#[test]
fn a_record_that_somebody_took_away_is_nobodys_end_and_one_that_retires_has_none() {
    let gone = || Input::Gone(S.into());
    let mut state = watching(Kind::Ours);
    state.step(gone(), 0);
    assert_eq!(state.count(Kind::Ours).inits, 1, "it lives");
    let out = state.step(ended(1, KILLED), 0);
    assert!(resumes(&out), "{out:?}");
    // The same while a successor is on its way: it has written none yet.
    state.step(gone(), 0);
    state.step(tried_for(1, Tried::Serves(p(2))), 0);
    assert!(resumes(&state.step(ended(2, KILLED), 0)));

    // Its last process has ended: it retires, and dies while it does.
    let mut state = watching(Kind::Ours);
    state.step(Input::MemberEnded(S.into(), m("a", ""), p(10)), 0);
    state.step(gone(), 0);
    let out = state.step(ended(1, KILLED), 0);
    assert_eq!(follows(&out), Some(Follows::Nothing));
    assert!(out.contains(&Output::DropAll(S.into())), "{out:?}");
    assert_eq!(state.sockets().count(), 0);
    // With its record it has an exit to tell yet.
    let mut state = watching(Kind::Ours);
    state.step(Input::MemberEnded(S.into(), m("a", ""), p(10)), 0);
    assert!(resumes(&state.step(ended(1, KILLED), 0)));
    // What was taken away and written anew is there.
    let mut state = watching(Kind::Ours);
    state.step(gone(), 0);
    let again = sighting(Kind::Ours, 1, &[("a", "", 10)]);
    state.step(Input::Seen(S.into(), again), 0);
    state.step(Input::MemberEnded(S.into(), m("a", ""), p(10)), 0);
    assert!(resumes(&state.step(ended(1, KILLED), 0)));
}

#[test]
fn whose_record_is_lost_has_as_many_tries_as_any_and_is_kept_while_it_lives() {
    let gone = |state: &mut State, now| state.step(Input::Gone(S.into()), now);
    let mut state = watching(Kind::Ours);
    gone(&mut state, 0);
    assert!(resumes(&state.step(ended(1, KILLED), 0)));
    let mut now = 0;
    for _ in 0..4 {
        let out = state.step(tried_for(1, Tried::Failed), now);
        assert_eq!(out, [Output::Look(S.into())]);
        assert_eq!(gone(&mut state, now), []);
        now = state.deadline().unwrap();
        assert!(resumes(&state.step(Input::Tick, now)));
    }
    let out = state.step(tried_for(1, Tried::Failed), now);
    assert_eq!(follows(&out), Some(Follows::NoneCame));
    // It can be adopted by hand, with all that is kept.
    assert_eq!(gone(&mut state, now), []);
    assert_eq!(state.count(Kind::Ours).given_up, 1);
    // Until its last process has ended.
    let last = || Input::MemberEnded(S.into(), m("a", ""), p(10));
    let out = state.step(last(), now);
    assert_eq!(out, [Output::DropAll(S.into())]);
    assert_eq!(state.sockets().count(), 0);

    // Deleted while it waits for the next try: there is nothing to be resumed, whichever of the
    // two is heard of first.
    for order in [[0, 1], [1, 0]] {
        let mut state = watching(Kind::Ours);
        state.step(ended(1, KILLED), 0);
        state.step(tried_for(1, Tried::Failed), 0);
        let due = state.deadline().unwrap();
        for which in order {
            match which {
                0 => gone(&mut state, 1),
                _ => state.step(last(), 1),
            };
        }
        assert_eq!(state.deadline(), None);
        assert_eq!(state.step(Input::Tick, due), []);
        assert_eq!(state.sockets().count(), 0);
    }
}

#[test]
fn the_record_of_a_shim_that_left_brings_it_not_back() {
    let mut state = watching(Kind::Ours);
    let out = state.step(ended(1, How::Exited(0)), 5);
    assert_eq!(follows(&out), Some(Follows::Nothing));
    // A change of it, made just before, is heard of just after.
    let again = Input::Seen(S.into(), sighting(Kind::Ours, 1, &[("a", "", 10)]));
    assert_eq!(state.step(again, 9), []);
    // Whoever adopts them counts.
    let next = Input::Seen(S.into(), sighting(Kind::Ours, 2, &[("a", "", 10)]));
    let out = state.step(next, 20);
    assert!(out.contains(&Output::WatchShim(S.into(), p(2))), "{out:?}");
    assert!(resumes(&state.step(ended(2, KILLED), 30)));
}

#[test]
fn five_ends_in_a_minute_are_enough_and_slow_ones_are_not() {
    for (apart, tries) in [(100, 4), (14_000, 4), (15_100, 20)] {
        let mut state = watching(Kind::Ours);
        let (mut now, mut shim, mut tried) = (0, 1, 0);
        for _ in 0..20 {
            now += apart;
            let out = state.step(ended(shim, KILLED), now);
            match follows(&out) {
                Some(Follows::Successor) => {}
                Some(Follows::GivenUp) => {
                    assert!(out.contains(&Output::DropListener(S.into())));
                    assert_eq!(state.count(Kind::Ours).given_up, 1);
                    assert_eq!(state.deadline(), None);
                    break;
                }
                other => panic!("{other:?}"),
            }
            if let Some(at) = state.deadline() {
                assert!(!resumes(&out) && at > now && at <= now + 1_000);
                assert_eq!(state.step(Input::Tick, at - 1), []);
                assert!(resumes(&state.step(Input::Tick, at)));
            } else {
                assert!(resumes(&out));
            }
            tried += 1;
            shim += 1;
            let out = state.step(tried_for(shim - 1, Tried::Serves(p(shim))), now);
            assert_eq!(out.first(), Some(&Output::WatchShim(S.into(), p(shim))));
        }
        assert_eq!(tried, tries, "{apart} ms apart");
    }
}

#[test]
fn five_tries_in_a_row_may_fail_and_are_no_ends_and_somebody_elses_shim_ends_the_matter() {
    let mut state = watching(Kind::Ours);
    let (mut now, mut shim) = (0, 1);
    // However often it fails before one comes up: that is one end.
    for _ in 0..2 {
        assert!(resumes(&state.step(ended(shim, KILLED), now)));
        let begun = now;
        for _ in 0..4 {
            state.step(tried_for(shim, Tried::Failed), now);
            let due = state.deadline().unwrap();
            assert!(due > now, "a failure at once after a failure is of no use");
            now = due;
            assert!(resumes(&state.step(Input::Tick, now)));
        }
        assert!(now - begun >= 20_000, "a package is replaced meanwhile");
        shim += 1;
        state.step(tried_for(shim - 1, Tried::Serves(p(shim))), now);
    }
    // The third end within a minute, with its pause.
    assert!(!resumes(&state.step(ended(shim, KILLED), now)));
    now = state.deadline().unwrap();
    state.step(Input::Tick, now);
    for _ in 0..4 {
        state.step(tried_for(shim, Tried::Failed), now);
        now = state.deadline().unwrap();
        state.step(Input::Tick, now);
    }
    let out = state.step(tried_for(shim, Tried::Failed), now);
    assert_eq!(follows(&out), Some(Follows::NoneCame));
    assert_eq!(state.count(Kind::Ours).given_up, 1);
    assert_eq!(state.deadline(), None);
    // Adopted by hand.
    let by_hand = sighting(Kind::Ours, 9, &[("a", "", 10)]);
    let out = state.step(Input::Seen(S.into(), by_hand), now);
    assert_eq!(out, [Output::WatchShim(S.into(), p(9))]);
    assert_eq!(state.count(Kind::Ours).shims, 1);
}

#[test]
fn what_became_of_a_try_says_nothing_of_the_next_one() {
    for late in [Tried::Serves(p(2)), Tried::StoodBack, Tried::Failed] {
        let mut state = watching(Kind::Ours);
        assert!(resumes(&state.step(ended(1, KILLED), 0)));
        // The successor's record is seen, and its end, before the try is known to be over.
        let successor = sighting(Kind::Ours, 2, &[("a", "", 10)]);
        state.step(Input::Seen(S.into(), successor), 1);
        assert!(resumes(&state.step(ended(2, KILLED), 2)));
        assert_eq!(state.step(tried_for(1, late), 3), [], "{late:?}");
        assert_eq!(state.deadline(), None, "{late:?}: a second try beside it");
        let out = state.step(tried_for(2, Tried::Serves(p(3))), 4);
        assert_eq!(out.first(), Some(&Output::WatchShim(S.into(), p(3))));
    }
}

#[test]
fn whoever_stands_back_leaves_it_to_the_next_look() {
    let mut state = watching(Kind::Ours);
    state.step(ended(1, KILLED), 0);
    let out = state.step(tried_for(1, Tried::StoodBack), 1);
    assert_eq!(out, [Output::Look(S.into())]);
    let other = sighting(Kind::Ours, 9, &[("a", "", 10)]);
    let out = state.step(Input::Seen(S.into(), other), 2);
    assert_eq!(out, [Output::WatchShim(S.into(), p(9))]);
    // And if there is none but the dead one: it is seen to be dead by whoever watches it.
    let mut state = watching(Kind::Ours);
    state.step(ended(1, KILLED), 0);
    state.step(tried_for(1, Tried::StoodBack), 1);
    let same = sighting(Kind::Ours, 1, &[("a", "", 10)]);
    let out = state.step(Input::Seen(S.into(), same), 2);
    assert_eq!(out, [Output::WatchShim(S.into(), p(1))]);
    assert!(resumes(&state.step(ended(1, How::Unknown), 3)));
    // Not for ever.
    let round = |state: &mut State| {
        state.step(tried_for(1, Tried::StoodBack), 4);
        let same = sighting(Kind::Ours, 1, &[("a", "", 10)]);
        state.step(Input::Seen(S.into(), same), 4);
        let out = state.step(ended(1, How::Unknown), 4);
        let due = state.deadline().unwrap_or(4);
        state.step(Input::Tick, due);
        follows(&out)
    };
    let ends: Vec<_> = (0..3).map(|_| round(&mut state)).collect();
    let again = Some(Follows::Successor);
    assert_eq!(ends, [again, again, Some(Follows::GivenUp)]);
}

#[test]
fn tasks_of_a_stock_shim_are_seen_and_go_one_by_one() {
    let mut state = State::default();
    for (id, pid) in [("pause", 10), ("app", 11)] {
        let one = sighting(Kind::Stock, 1, &[(id, "", pid)]);
        state.step(Input::SeenAlso(S.into(), one), 0);
    }
    assert_eq!(state.count(Kind::Stock).inits, 2);
    let out = state.step(Input::MemberEnded(S.into(), m("app", ""), p(11)), 0);
    assert_eq!(out, [Output::DropMember(S.into(), m("app", ""))]);
    let out = state.step(Input::TaskGone(S.into(), "pause".into()), 0);
    assert_eq!(
        out,
        [
            Output::Unwatch(p(10)),
            Output::DropMember(S.into(), m("pause", ""))
        ]
    );
    state.step(ended(1, How::Exited(0)), 0);
    assert_eq!(state.sockets().count(), 0);
}

#[test]
fn a_lost_stock_shim_is_forgotten_with_its_last_task() {
    let mut state = watching(Kind::Stock);
    state.step(ended(1, KILLED), 0);
    let out = state.step(Input::TaskGone(S.into(), "a".into()), 0);
    assert!(out.contains(&Output::DropAll(S.into())), "{out:?}");
    // One with nothing that lives has no loss; nor has one whose end was announced.
    let mut state = watching(Kind::Stock);
    state.step(Input::MemberEnded(S.into(), m("a", ""), p(10)), 0);
    let out = state.step(ended(1, How::Exited(0)), 0);
    assert_eq!(follows(&out), Some(Follows::Nothing));
    let mut state = watching(Kind::Stock);
    state.step(Input::Leave(S.into(), p(1)), 0);
    let out = state.step(ended(1, How::Exited(0)), 0);
    assert_eq!(follows(&out), Some(Follows::Nothing));
    // Or our shim has adopted it.
    let mut state = watching(Kind::Stock);
    state.step(ended(1, KILLED), 0);
    let ours = sighting(Kind::Ours, 5, &[("a", "", 10)]);
    let out = state.step(Input::Seen(S.into(), ours), 0);
    assert_eq!(out, [Output::WatchShim(S.into(), p(5))]);
    let also = sighting(Kind::Stock, 1, &[("a", "", 10)]);
    assert_eq!(state.step(Input::SeenAlso(S.into(), also), 0), []);
}

#[test]
fn ends_from_before_a_restart_count() {
    // Before the restart: whose, and what followed. After it shim 9 is killed.
    let word = Follows::word;
    let successor = word(Follows::Successor);
    let four = [
        (1, successor),
        (2, successor),
        (3, successor),
        (4, successor),
    ];
    let rows: [(&[(u32, &str)], Follows); 5] = [
        (&four, Follows::GivenUp),
        (&four[..3], Follows::Successor),
        // Those that were meant count no more than then.
        (
            &[
                (1, successor),
                (2, word(Follows::Nothing)),
                (3, word(Follows::Nothing)),
                (4, successor),
            ],
            Follows::Successor,
        ),
        // No successor of 1 came up: that is told of 1 once more.
        (
            &[
                (1, successor),
                (1, word(Follows::NoneCame)),
                (2, successor),
                (2, word(Follows::NoneCame)),
            ],
            Follows::Successor,
        ),
        // It died while nobody was there to give it a successor: it is found dead.
        (
            &[
                (1, successor),
                (2, successor),
                (3, successor),
                (9, successor),
            ],
            Follows::Successor,
        ),
    ];
    for (before, expected) in rows {
        let mut state = State::default();
        for (at, (shim, follows)) in (1..).zip(before) {
            let old = sighting(Kind::Ours, *shim, &[]);
            state.remember(Path::new(S), old, at, follows);
        }
        let now = sighting(Kind::Ours, 9, &[("a", "", 10)]);
        let out = state.step(Input::Seen(S.into(), now), 10);
        assert_eq!(
            out,
            [
                Output::WatchShim(S.into(), p(9)),
                Output::WatchMember(S.into(), m("a", ""), p(10))
            ]
        );
        let out = state.step(ended(9, KILLED), 11);
        assert_eq!(follows(&out), Some(expected), "{before:?}");
    }
}

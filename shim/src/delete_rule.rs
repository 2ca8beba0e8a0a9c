//! What `delete` may do, and what it answers. Pure.
//!
//! containerd runs `delete` after every task, normally deleted or not, and whenever it has lost or
//! cannot reach a shim (facts, section 4). So the first question is whether anybody is responsible:
//!
//! | somebody answers at the socket | he knows the id | then |
//! | --- | --- | --- |
//! | yes | yes | nothing is touched, empty answer |
//! | yes | no (the task was deleted, others of its group live on) | clean up after this id |
//! | no | - | end what lives, clean up; nothing of it if the caller has ended meanwhile |
//!
//! A living shim that answers and claims the id counts whether or not it holds the lock: a stock
//! shim holds none, and containerd's having lost its connection is no reason to kill its workload
//! either. A shim that holds the lock and does not answer in time is treated as containerd treats
//! it, as dead; `recoverd` is there to come before that.

use recoverd_common::{proc::ProcessId, record::Exit, timestamp::Timestamp};

/// What asking at the socket brought.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// A shim knows this task.
    Claims,
    /// A shim answers and does not know it.
    Disclaims,
    /// Somebody is there and gives no answer in time.
    Silent,
    /// Nobody listens.
    Nobody,
}

/// The init process, as the record or the runtime's state names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Init {
    /// Nobody names one.
    Unknown,
    /// It lives.
    Alive(ProcessId),
    /// It has ended and nobody has collected its status, which the kernel still tells.
    Zombie(ProcessId, u32),
    /// It has ended, or its number belongs to somebody else.
    Gone(ProcessId),
}

/// What the record of this boot says of the task.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Recorded {
    /// It names it, with its exit if it has ended.
    Named(Option<Exit>),
    /// There is no record, or it does not name this task: it was deleted before, or belonged to a
    /// shim that keeps none.
    NotNamed,
    /// There is one that cannot be used, because.
    Unusable(String),
}

/// Everything that the decision depends on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Facts {
    /// Who answers.
    pub answer: Answer,
    /// We have the lock: nobody but `delete`s is responsible.
    pub locked_by_us: bool,
    /// The record's word.
    pub recorded: Recorded,
    /// The init.
    pub init: Init,
    /// Whoever asked has ended: nobody hears the answer, or acts on it.
    pub abandoned: bool,
}

/// What to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// Somebody is responsible.
    LeaveAlone,
    /// Nobody is.
    CleanUp(CleanUp),
}

/// The way to clean up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CleanUp {
    /// The process to end.
    pub end: Option<ProcessId>,
    /// The pid in the answer, 0 for none.
    pub pid: i32,
    /// The status in the answer.
    pub status: Status,
    /// What happens to the files beside the socket.
    pub group: Group,
}

/// The exit status, and how good it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Status {
    /// The shim saw it.
    Recorded {
        /// The code, or 128 and the signal.
        status: u32,
        /// When it was seen.
        at: Timestamp,
    },
    /// The kernel tells it now, or we end the process ourselves.
    Now(u32),
    /// Nobody knows, because; the wire wants a number.
    StandIn(String),
    /// There is no trace of such a task: this is the call that follows every normal deletion,
    /// and containerd has its status already.
    Nothing,
}

/// What containerd's own shim answers, always: died of SIGKILL.
pub const STAND_IN: u32 = 137;

/// What happens to the files beside the socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Group {
    /// Somebody else is responsible for them, or they cannot be understood.
    Keep,
    /// Nobody is: this task is taken out of the record, and with the last one everything goes.
    Settle,
}

/// Decides.
pub fn decide(facts: &Facts) -> Verdict {
    if facts.answer == Answer::Claims {
        return Verdict::LeaveAlone;
    }
    // Killed at once with the shim: its next start, or the hook before it, decides about what lives.
    if facts.abandoned && matches!(facts.init, Init::Alive(_)) {
        return Verdict::LeaveAlone;
    }
    let end = match facts.init {
        Init::Alive(init) => Some(init),
        Init::Unknown | Init::Zombie(..) | Init::Gone(_) => None,
    };
    let pid = match facts.init {
        Init::Alive(init) | Init::Zombie(init, _) | Init::Gone(init) => init.pid,
        Init::Unknown => 0,
    };
    Verdict::CleanUp(CleanUp {
        end,
        pid,
        status: status(facts),
        group: group(facts),
    })
}

fn status(facts: &Facts) -> Status {
    let stand_in = |why: &str| Status::StandIn(why.to_owned());
    match (&facts.recorded, facts.init) {
        (Recorded::Named(Some(Exit::Observed { status, at, oom: _ })), _) => Status::Recorded {
            status: *status,
            at: *at,
        },
        // Ended by us with SIGKILL: the number is no guess.
        (_, Init::Alive(_)) => Status::Now(STAND_IN),
        (_, Init::Zombie(_, status)) => Status::Now(status),
        (Recorded::Named(Some(Exit::Unknown { why })), _) => stand_in(why),
        (Recorded::Named(None), Init::Gone(_)) => stand_in("it ended while nobody watched"),
        (Recorded::Named(None), Init::Unknown) => stand_in("it never had an init process"),
        (Recorded::NotNamed, Init::Gone(_)) => stand_in("no shim of ours has recorded it"),
        (Recorded::NotNamed, Init::Unknown) => Status::Nothing,
        (Recorded::Unusable(why), Init::Gone(_) | Init::Unknown) => stand_in(why),
    }
}

fn group(facts: &Facts) -> Group {
    // With the lock in hand and nobody at the socket, the group is ours to close. A stock shim
    // that is only slow holds no lock, but it does listen.
    if !facts.locked_by_us || facts.answer != Answer::Nobody {
        return Group::Keep;
    }
    match facts.recorded {
        Recorded::Named(_) | Recorded::NotNamed => Group::Settle,
        // What it says of other tasks is not known.
        Recorded::Unusable(_) => Group::Keep,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const INIT: ProcessId = ProcessId {
        pid: 42,
        start_time: 7,
    };
    const AT: Timestamp = Timestamp {
        seconds: 5,
        nanos: 0,
    };

    fn facts() -> Facts {
        Facts {
            answer: Answer::Nobody,
            locked_by_us: true,
            recorded: Recorded::Named(None),
            init: Init::Gone(INIT),
            abandoned: false,
        }
    }

    #[test]
    fn nobody_is_ended_for_a_caller_that_is_gone_and_what_is_dead_is_cleaned_up() {
        let mut facts = facts();
        facts.abandoned = true;
        assert!(matches!(decide(&facts), Verdict::CleanUp(_)));
        facts.init = Init::Alive(INIT);
        assert_eq!(decide(&facts), Verdict::LeaveAlone);
    }

    fn clean_up(facts: &Facts) -> CleanUp {
        match decide(facts) {
            Verdict::CleanUp(clean_up) => clean_up,
            Verdict::LeaveAlone => panic!("{facts:?}"),
        }
    }

    #[test]
    fn a_task_that_a_living_shim_claims_is_left_alone_whatever_else_is_known() {
        for locked_by_us in [false, true] {
            for init in [Init::Unknown, Init::Alive(INIT), Init::Gone(INIT)] {
                let facts = Facts {
                    answer: Answer::Claims,
                    locked_by_us,
                    init,
                    ..facts()
                };
                assert_eq!(decide(&facts), Verdict::LeaveAlone);
            }
        }
    }

    #[test]
    fn only_a_verified_living_init_is_ended() {
        for answer in [Answer::Disclaims, Answer::Silent, Answer::Nobody] {
            for (init, end, pid) in [
                (Init::Alive(INIT), Some(INIT), 42),
                (Init::Zombie(INIT, 3), None, 42),
                (Init::Gone(INIT), None, 42),
                (Init::Unknown, None, 0),
            ] {
                let done = clean_up(&Facts {
                    answer,
                    init,
                    ..facts()
                });
                assert_eq!((done.end, done.pid), (end, pid), "{answer:?} {init:?}");
            }
        }
    }

    #[test]
    fn the_best_known_status_is_answered() {
        let observed = Exit::Observed {
            status: 3,
            at: AT,
            oom: false,
        };
        let observed = || Recorded::Named(Some(observed.clone()));
        let unknown = || {
            Recorded::Named(Some(Exit::Unknown {
                why: "adopted late".into(),
            }))
        };
        let unusable = || Recorded::Unusable("the record is cut".into());
        let stand_in = |why: &str| Status::StandIn(why.into());
        for (recorded, init, status) in [
            (
                observed(),
                Init::Gone(INIT),
                Status::Recorded { status: 3, at: AT },
            ),
            (
                observed(),
                Init::Zombie(INIT, 9),
                Status::Recorded { status: 3, at: AT },
            ),
            (unknown(), Init::Gone(INIT), stand_in("adopted late")),
            (unknown(), Init::Zombie(INIT, 4), Status::Now(4)),
            (unusable(), Init::Alive(INIT), Status::Now(137)),
            (unusable(), Init::Gone(INIT), stand_in("the record is cut")),
            (unusable(), Init::Unknown, stand_in("the record is cut")),
            (Recorded::Named(None), Init::Alive(INIT), Status::Now(137)),
            (
                Recorded::Named(None),
                Init::Gone(INIT),
                stand_in("it ended while nobody watched"),
            ),
            (
                Recorded::Named(None),
                Init::Unknown,
                stand_in("it never had an init process"),
            ),
            (Recorded::NotNamed, Init::Alive(INIT), Status::Now(137)),
            (
                Recorded::NotNamed,
                Init::Gone(INIT),
                stand_in("no shim of ours has recorded it"),
            ),
            (Recorded::NotNamed, Init::Unknown, Status::Nothing),
        ] {
            assert_eq!(
                clean_up(&Facts {
                    recorded,
                    init,
                    ..facts()
                })
                .status,
                status
            );
        }
    }

    #[test]
    fn the_files_of_a_group_go_with_its_last_task_and_never_while_somebody_may_need_them() {
        let named = Recorded::Named(None);
        let unusable = Recorded::Unusable("it is cut".into());
        for (answer, locked_by_us, recorded, group) in [
            (Answer::Nobody, true, &named, Group::Settle),
            (Answer::Nobody, true, &Recorded::NotNamed, Group::Settle),
            (Answer::Nobody, true, &unusable, Group::Keep),
            (Answer::Nobody, false, &named, Group::Keep),
            (Answer::Silent, true, &named, Group::Keep),
            (Answer::Silent, false, &named, Group::Keep),
            (Answer::Disclaims, true, &named, Group::Keep),
            (Answer::Disclaims, false, &named, Group::Keep),
        ] {
            let facts = Facts {
                answer,
                locked_by_us,
                recorded: recorded.clone(),
                ..facts()
            };
            assert_eq!(clean_up(&facts).group, group, "{facts:?}");
        }
    }
}

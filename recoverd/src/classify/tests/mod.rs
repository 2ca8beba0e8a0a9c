//! Each finding appears on the fact that makes it, and on none that is nearly it.

mod leftovers;
pub(crate) mod random;
mod shims;
mod tasks;

use recoverd_common::seen::Seen;

use super::*;
use crate::{
    correlate::correlate,
    facts::{
        Phase, Reply,
        fixture::{self, C1, SOCKET_DIR, Task, healthy},
    },
};

pub(crate) const SETTINGS: Settings = Settings {
    min_age: Duration::from_secs(600),
    settle: Duration::from_secs(10),
    run_full: 90,
};

/// Younger than [`Settings::min_age`] and older than [`Settings::settle`].
const YOUNG: u64 = 60;
/// Younger than both.
const NEW: u64 = 1;

type Break = fn(&mut Look);

fn judge(look: &Look) -> Vec<Suspicion> {
    let cases = correlate(look, Path::new(SOCKET_DIR));
    classify(look, &cases, &SETTINGS)
}

fn codes(look: &Look) -> Vec<Code> {
    judge(look).iter().map(|s| s.finding.code).collect()
}

/// The only finding of a look.
fn only(look: &Look) -> Suspicion {
    let mut found = judge(look);
    assert_eq!(found.len(), 1, "{found:#?}");
    found.remove(0)
}

/// What is evidence for a finding, one string.
fn facts(suspicion: &Suspicion) -> String {
    let facts = suspicion.finding.evidence.iter();
    facts.map(|e| format!("{}: {}\n", e.by, e.fact)).collect()
}

/// A healthy node on which `make` alone gives `code`, and which does not have it any more after
/// any one of `misses`.
fn finds(code: Code, make: Break, misses: &[(&str, Break)]) {
    let mut look = healthy();
    make(&mut look);
    assert!(
        codes(&look).contains(&code),
        "{code:?}: {:#?}",
        judge(&look)
    );
    for (what, miss) in misses {
        let mut look = healthy();
        make(&mut look);
        miss(&mut look);
        assert!(
            !codes(&look).contains(&code),
            "{code:?} although {what}: {:#?}",
            judge(&look)
        );
    }
}

fn unknown<T>() -> Seen<T> {
    Seen::Unknown("permission denied".into())
}

fn foreign(look: &mut Look) {
    look.shim_of(&C1).name = "containerd-shim-kata-v2".into();
}

fn down(look: &mut Look) {
    look.instances[0].api = Api::Down;
}

fn unsure(look: &mut Look) {
    look.instances[0].api = Api::Unknown("timed out".into());
}

fn unlisted(look: &mut Look) {
    look.unlisted(&C1);
}

fn busy(look: &mut Look) {
    look.busy_verbs.insert(C1.name());
}

fn blind(look: &mut Look) {
    look.processes = unknown();
}

fn deaf(look: &mut Look) {
    look.listeners = unknown();
}

fn end_init(look: &mut Look) {
    look.end_init(&C1);
}

#[test]
fn a_healthy_node_has_no_finding_and_no_gap() {
    let look = healthy();
    assert!(judge(&look).is_empty(), "{:#?}", judge(&look));
    let cases = correlate(&look, Path::new(SOCKET_DIR));
    assert_eq!(gaps(&look, &cases), []);
    assert!(judge(&fixture::empty()).is_empty());
}

#[test]
fn what_is_unknown_is_a_gap_once_and_names_its_containerd() {
    let seen = |change: Break| {
        let mut look = healthy();
        change(&mut look);
        let cases = correlate(&look, Path::new(SOCKET_DIR));
        gaps(&look, &cases)
    };
    let table: &[(&str, Break)] = &[
        ("task/default/c1/config.json", |l| {
            l.bundle_of(&C1).config = unknown()
        }),
        ("default/c1/state.json", |l| {
            l.runc_of(&C1).state = unknown()
        }),
        ("init of default/c1", blind),
        (fixture::SOCKET, |l| {
            l.answer_of(&C1).connection = Connection::Failed("EMFILE".into());
        }),
        (
            "tasks of containerd at /run/containerd/containerd.sock",
            |l| l.api(0).tasks = None,
        ),
    ];
    for (what, change) in table {
        let found = seen(*change);
        assert_eq!(found.len(), 1, "{what}: {found:?}");
        assert!(found[0].what.ends_with(what), "{found:?}");
        assert_eq!(
            found[0].instance.as_deref(),
            Some("/run/containerd/containerd.sock")
        );
    }
    // Who may not look is told so once, not for every file.
    let found = seen(|l| {
        blind(l);
        l.host.root = false;
        l.gaps = vec![Gap::new("the node", "needs root")];
    });
    assert_eq!(found, [Gap::new("the node", "needs root")]);
}

#[test]
fn findings_are_sorted_by_severity_code_and_subject() {
    const C2: Task = Task {
        id: "c2",
        group: "c2",
        shim: 16,
        init: 17,
        ..C1
    };
    const C0: Task = Task {
        id: "c0",
        group: "c0",
        shim: 26,
        init: 27,
        ..C1
    };
    let mut look = healthy();
    look.add(&C2);
    look.add(&C0);
    look.shim_of(&C1).threads = 1000;
    look.unlisted(&C1);
    look.end_shim(&C2);
    look.end_shim(&C0);
    let found: Vec<_> = judge(&look)
        .iter()
        .map(|s| (s.finding.code, s.finding.subject.text()))
        .collect();
    let expected = [
        (Code::OrphanedTask, "default/c0"),
        (Code::OrphanedTask, "default/c2"),
        (Code::TaskUnknownToContainerd, "default/c1"),
        (Code::BloatedShim, "default/c1"),
    ];
    assert_eq!(
        found,
        expected.map(|(code, subject)| (code, subject.to_owned()))
    );
}

#[test]
fn what_files_say_stays_one_line() {
    let mut look = healthy();
    look.end_shim(&C1);
    look.bundle_of(&C1).path = "/x\u{1b}[31m\ny".into();
    let shown = facts(&only(&look));
    assert!(
        !shown.contains('\u{1b}') && shown.contains("[31m\u{fffd}y"),
        "{shown}"
    );
}

#[test]
fn times_from_outside_may_be_anything() {
    let end = SystemTime::UNIX_EPOCH + Duration::from_secs(i64::MAX.unsigned_abs());
    for (time, seconds) in [(end, i64::MAX), (SystemTime::UNIX_EPOCH, i64::MIN)] {
        for (start_time, ticks) in [(u64::MAX, 0), (u64::MAX, u64::MAX), (0, 0)] {
            let mut look = healthy();
            look.host.ticks = ticks;
            look.end_init(&C1);
            look.told(&C1, Phase::Stopped);
            down(&mut look);
            let answer = look.answer_of(&C1);
            if let Some(Reply::Said(state)) = answer.states.get_mut(C1.id) {
                state.exited_at = Some(seconds);
            }
            assert_eq!(codes(&look), [Code::ExitUnreported]);

            let mut look = healthy();
            look.host.ticks = ticks;
            let id = ProcessId {
                pid: C1.init,
                start_time,
            };
            look.table().insert(C1.init, fixture::stat(id, 1));
            look.remove_runc(&C1);
            look.end_shim(&C1);
            look.sockets[0].changed_at = Some(time);
            look.cgroup_of(&C1).changed_at = Some(time);
            if let Seen::Present(init) = &mut look.bundle_of(&C1).init_pid {
                init.written_at = time;
            }
            judge(&look);
        }
    }
}

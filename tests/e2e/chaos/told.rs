//! What containerd's subscribers are told: every event at least once, in order, with the true exit.
//! A subscription ends with its containerd; what is told before the next one is nobody's to judge.

use std::collections::BTreeSet;

use recoverd_tests::{Containerd, Event, Events, wait_for};

/// What must be told in one subscription.
pub struct Told {
    events: Events,
    due: Vec<(String, Due)>,
    /// What happened without containerd: a subscriber that was late hears of it ten seconds later.
    late: Vec<(String, Due)>,
    seen: BTreeSet<String>,
    /// Whose end came in a downtime. A subscription may begin in the middle of its first telling.
    told_twice: BTreeSet<String>,
    /// Those of the last one.
    lately: BTreeSet<String>,
}

/// One event of a container: its topic, of which exec (empty: the init), its exit status.
pub struct Due {
    pub topic: &'static str,
    pub exec_id: String,
    pub status: Option<u32>,
}

impl Told {
    pub fn new(containerd: &Containerd) -> Told {
        Told {
            events: Events::of(containerd),
            due: Vec::new(),
            late: Vec::new(),
            seen: BTreeSet::new(),
            told_twice: BTreeSet::new(),
            lately: BTreeSet::new(),
        }
    }

    /// The next subscription. Who was told of an end in the middle of that, is told once more.
    pub fn anew(&mut self, containerd: &Containerd) -> Told {
        Told {
            told_twice: self.lately.clone(),
            ..Told::new(containerd)
        }
    }

    /// This has happened while somebody listened.
    pub fn expect(&mut self, id: &str, topic: &'static str, exec_id: &str, status: Option<u32>) {
        self.seen.insert(id.to_owned());
        let due = Due {
            topic,
            exec_id: exec_id.to_owned(),
            status,
        };
        self.due.push((id.to_owned(), due));
    }

    /// This end has come while there was no containerd.
    pub fn expect_late(&mut self, id: &str, exec_id: &str, status: Option<u32>) {
        self.expect(id, "/tasks/exit", exec_id, status);
        self.late.extend(self.due.pop());
        self.told_twice.insert(id.to_owned());
        self.lately.insert(id.to_owned());
    }

    /// All that has happened was told, that without containerd as well.
    #[track_caller]
    pub fn assert_late(&mut self) {
        self.due.append(&mut self.late);
        self.assert_all();
    }

    /// All that has happened while somebody listened was told.
    #[track_caller]
    pub fn assert_all(&mut self) {
        for (id, due) in std::mem::take(&mut self.due) {
            let Due {
                topic,
                exec_id,
                status,
            } = due;
            let what = format!("{topic} of {id} {exec_id:?} with {status:?}");
            wait_for(&what, || {
                let all = self.events.of_topic(&id, topic);
                let of_it = |event: &Event| whose(event, &id) == exec_id;
                let event = all.into_iter().find(of_it)?;
                if let Some(status) = status {
                    assert_eq!(event.number("exit_status"), u64::from(status), "{event:?}");
                }
                Some(())
            });
        }
        for id in &self.seen {
            let all = self.events.of_container(id);
            assert_order(id, &all, self.told_twice.contains(id));
        }
    }
}

/// The exec that an event is about; empty for the init.
fn whose<'a>(event: &'a Event, id: &str) -> &'a str {
    let exec_id = event.text("exec_id");
    match event.text("id") {
        of if !exec_id.is_empty() || of == id => exec_id,
        of => of,
    }
}

/// First of all each counts: what is sent again is older than what was sent before it. What is told
/// `twice` may have been heard from its middle on: then the last time counts.
#[track_caller]
fn assert_order(id: &str, all: &[Event], twice: bool) {
    let mut keys: Vec<(&str, &str)> = Vec::new();
    for event in all {
        keys.push((&event.topic, whose(event, id)));
    }
    let before = |first: (&str, &str), then: (&str, &str)| {
        let heard = keys.iter().position(|key| *key == first);
        let followed = match twice {
            true => keys.iter().rposition(|key| *key == then),
            false => keys.iter().position(|key| *key == then),
        };
        if let (Some(heard), Some(followed)) = (heard, followed) {
            assert!(heard < followed, "events of {id}: {keys:?}");
        }
    };
    let ladder = [
        "/tasks/create",
        "/tasks/start",
        "/tasks/exit",
        "/tasks/delete",
    ];
    for pair in ladder.windows(2) {
        before((pair[0], ""), (pair[1], ""));
    }
    for (_, exec_id) in keys.iter().filter(|(_, exec_id)| !exec_id.is_empty()) {
        before(
            ("/tasks/exec-added", exec_id),
            ("/tasks/exec-started", exec_id),
        );
        before(("/tasks/exec-started", exec_id), ("/tasks/exit", exec_id));
        before(("/tasks/exit", exec_id), ("/tasks/exit", ""));
    }
}

//! What containerd tells its subscribers.

use std::sync::atomic::{AtomicU32, Ordering};

use crate::containerd::Containerd;
use crate::node::Running;
use crate::wait::wait_for;

/// One line of `ctr events`.
#[derive(Clone, Debug)]
pub struct Event {
    /// `/tasks/exit`, …
    pub topic: String,
    /// The event.
    pub body: serde_json::Value,
}

impl Event {
    /// A text field; empty when it is not there.
    pub fn text(&self, field: &str) -> &str {
        self.body[field].as_str().unwrap_or_default()
    }

    /// A number; 0 when it is not there, as on the wire.
    pub fn number(&self, field: &str) -> u64 {
        self.body[field].as_u64().unwrap_or(0)
    }
}

/// Every event from now on.
pub struct Events(Running);

impl Events {
    /// Has subscribed when it returns; `containerd` runs.
    #[track_caller]
    pub fn of(containerd: &Containerd) -> Events {
        let events = Events(containerd.ctr_spawn("e2e", ["events"]));
        wait_for("the subscription", || {
            containerd.ctr_ok("e2e", ["namespaces", "label", "e2e", "probe=1"]);
            (!events.text().is_empty()).then_some(())
        });
        events
    }

    /// Returns when everything that `containerd` has been told until now can be read here.
    #[track_caller]
    pub fn catch_up(&self, containerd: &Containerd) {
        static PROBES: AtomicU32 = AtomicU32::new(2);
        let probe = format!("probe={}", PROBES.fetch_add(1, Ordering::Relaxed));
        containerd.ctr_ok("e2e", ["namespaces", "label", "e2e", &probe]);
        let said = probe.replace("probe=", "\"probe\":\"") + "\"";
        wait_for("events of now", || {
            self.text().contains(&said).then_some(())
        });
    }

    /// Everything so far, as `ctr` prints it.
    pub fn text(&self) -> String {
        self.0.text()
    }

    /// The events of one container so far, in order.
    #[track_caller]
    pub fn of_container(&self, id: &str) -> Vec<Event> {
        let parsed = self.0.text();
        // The last line may be half there.
        let whole = parsed.rfind('\n').map_or("", |end| &parsed[..end]);
        whole
            .lines()
            .filter_map(|line| {
                let (head, body) = line.split_at(line.find('{')?);
                let topic = head.split_whitespace().last()?.to_owned();
                let body = serde_json::from_str(body)
                    .unwrap_or_else(|error| panic!("event {line:?}: {error}"));
                Some(Event { topic, body })
            })
            .filter(|event| event.text("container_id") == id)
            .collect()
    }

    /// What came of one topic, for one container.
    #[track_caller]
    pub fn of_topic(&self, id: &str, topic: &str) -> Vec<Event> {
        let mut all = self.of_container(id);
        all.retain(|event| event.topic == topic);
        all
    }
}

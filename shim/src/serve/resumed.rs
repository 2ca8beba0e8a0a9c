//! Connections of a predecessor that somebody has kept open, and the requests that it has left
//! unanswered on them.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Shutdown,
    os::unix::net::UnixStream,
};

use recoverd_common::{failpoint, record::Record};

use super::Shim;
use crate::{
    adopt,
    connections::Note,
    log::Level,
    requests::{HowFar, Left},
    resume,
    state::Resume,
    tasks::Adoptee,
};

impl Shim {
    /// Takes over `connections`; gives what the loop is to do about their requests, and the tasks
    /// that these are about.
    pub(super) fn resume(
        &mut self,
        connections: Vec<UnixStream>,
        adoptees: Vec<Adoptee>,
        record: &Record,
    ) -> Resume {
        let left = match self.requests.take_over() {
            Ok(left) => left,
            Err(e) => {
                self.log
                    .say(Level::Error, &format!("requests of a predecessor: {e}"));
                Vec::new()
            }
        };
        let mut broken = BTreeSet::new();
        for left in &left {
            if left.how_far == HowFar::Begun {
                broken.insert(left.whose.connection);
            }
        }
        let mut within: BTreeMap<u64, Vec<u32>> = BTreeMap::new();
        for stream in connections {
            let streams = adopt::streams_within(&stream);
            let Some(number) = self.connected(stream) else {
                continue;
            };
            if broken.contains(&number) {
                // Half of a giant request has died with its reader.
                let text = "close a connection in the middle of a request";
                self.log.say(Level::Warning, text);
                if let Some(socket) = self.sockets.remove(&number) {
                    let _ = socket.stream.shutdown(Shutdown::Both);
                }
                continue;
            }
            within.insert(number, streams);
        }
        let mut resume = Resume {
            connections: within.keys().copied().collect(),
            adoptees,
            ..Resume::default()
        };
        failpoint!("handoff.requests.before");
        for Left { whose, how_far } in left {
            let Some(streams) = within.get(&whose.connection) else {
                let result = self.requests.note(&Note::Closed(whose.connection));
                self.noted(result);
                continue;
            };
            if streams.contains(&whose.stream) {
                if !resume::is_named(record, whose) {
                    // Nothing was done about it: it comes as if for the first time.
                    let result = self.requests.note(&Note::Sent(whose));
                    self.noted(result);
                    continue;
                }
                resume.seen.push(whose);
            }
            let resumed = resume::decide(whose, &how_far, record);
            resume.requests.push((whose, resumed));
        }
        failpoint!("handoff.requests.after");
        // In the order in which they came.
        resume.requests.sort_by_key(|(whose, _)| *whose);
        self.log.say(
            Level::Info,
            &format!(
                "{} connections are kept, {} requests to be answered",
                within.len(),
                resume.requests.len()
            ),
        );
        resume
    }
}

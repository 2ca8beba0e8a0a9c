//! Successors: started with what is kept; how it went, and which deaths led to them.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Instant,
};

use recoverd_common::{
    adoption::Adoption,
    failpoint, handoff,
    proc::ProcessId,
    record::{Process, Record, version},
    timestamp::Timestamp,
};
use serde_json::Map;

use super::{
    super::{
        decide::{Follows, How, Input, Sighting, Tried},
        look,
    },
    Daemon,
};
use crate::{
    adopt::{self, How as HowToAdopt, Order, Outcome, Verdict},
    commands::adopt as told,
    history::Event,
    witnessed::Death,
};

/// What a try has brought.
pub(super) struct TryEnded {
    pub(super) socket: PathBuf,
    /// Whose successor was to be started.
    pub(super) of: Process,
    pub(super) outcome: Outcome,
    pub(super) died: Instant,
}

impl Daemon {
    /// Duplicates of the pidfds of a shim's members.
    pub(super) fn pidfds(&self, sighting: &Sighting) -> adopt::Kept {
        let of = |process: &Process| {
            let key = (process.pid, process.start_time, false);
            let watch = self.watches.get(self.tokens.get(&key)?)?;
            let fd = watch.pidfd.try_clone().ok()?;
            Some((handoff::pidfd_name(*process), Arc::new(fd)))
        };
        sighting.members.values().filter_map(of).collect()
    }

    /// What a successor of this shim is told, where its record is lost: what was read of it last. It
    /// was written anew with each change, so nothing has changed since.
    fn lost_record(&self, socket: &Path, shim: Process) -> Option<Record> {
        if !look::record_is_lost(socket) {
            return None;
        }
        let record = version::decode(self.records.get(socket)?).ok()?;
        (record.shim.process == shim).then_some(record)
    }

    pub(super) fn resume(&mut self, socket: PathBuf) {
        let Some(sighting) = self.state.sighting(&socket) else {
            return;
        };
        let record = self.lost_record(&socket, sighting.shim);
        let mut because = vec![format!("shim {} has ended", sighting.shim.pid)];
        if record.is_some() {
            because.push("its record is lost: taken from what was read of it last".into());
        }
        let kept: adopt::Kept = self
            .bag
            .of(&socket)
            .iter()
            .map(|kept| (kept.name.clone(), Arc::clone(&kept.fd)))
            .chain(self.pidfds(sighting))
            .collect();
        let inits = sighting.members.iter();
        let members = inits
            .filter(|(member, _)| member.exec_id.is_empty())
            .map(|(member, process)| adopt::Member {
                name: (sighting.namespace.clone(), member.id.clone()),
                init: i32::try_from(process.pid).ok().map(|pid| ProcessId {
                    pid,
                    start_time: process.start_time,
                }),
            })
            .collect();
        let order = Order {
            address: sighting.address.clone(),
            state: None,
            namespace: sighting.namespace.clone(),
            group: sighting.group.clone(),
            adoption: Adoption {
                socket: socket.clone(),
                record,
                predecessor: None,
                // Named when they are handed over.
                descriptors: Vec::new(),
                observed: self.witnessed.observed(&sighting.namespace),
            },
            unreadable: None,
            members,
            because,
        };
        let how = HowToAdopt {
            binary: self.setup.binary.clone(),
            deadline: self.setup.deadline,
            until: Instant::now() + self.setup.deadline * 2,
            at_once: 1,
            run: self.history.run().to_owned(),
            run_dir: self.setup.run_dir.clone(),
        };
        let died = self.ends.get(&socket).copied();
        let died = died.unwrap_or_else(Instant::now);
        let of = sighting.shim;
        let places = Arc::clone(&self.places_to_try);
        failpoint!("supervise.resume.before");
        self.tries.spawn(async move {
            // Nobody closes it.
            let _place = places.acquire().await;
            let outcome = adopt::run_with(order, &kept, &how).await;
            TryEnded {
                socket,
                of,
                outcome,
                died,
            }
        });
    }

    pub(super) fn tried(&mut self, ended: TryEnded) {
        let TryEnded {
            socket,
            of,
            outcome,
            died,
        } = ended;
        let (word, tried) = match &outcome.verdict {
            Verdict::Adopted(adopted) => ("adopted", Tried::Serves(adopted.shim)),
            Verdict::StoodBack(_) => ("stood-back", Tried::StoodBack),
            Verdict::Failed(_) => ("failed", Tried::Failed),
        };
        self.metrics.resumed(word, died.elapsed());
        if let Verdict::Adopted(adopted) = &outcome.verdict {
            let process = (of.pid, of.start_time);
            let deaths = self.witnessed.deaths.iter_mut().rev();
            if let Some(death) = deaths.into_iter().find(|death| death.process == process) {
                death.successor = Some(adopted.shim.pid);
                self.dirty = true;
            }
        }
        if let Err(error) = told::tell(&self.history, &outcome) {
            tracing::warn!(%error, "history");
        }
        failpoint!("supervise.tried.after");
        self.inbox.push(Input::Tried(socket, of, tried));
    }

    pub(super) fn died(&mut self, socket: &Path, process: Process, how: How, follows: Follows) {
        let Some(sighting) = self.state.sighting(socket) else {
            return;
        };
        let kind = sighting.kind;
        self.metrics.died(kind, follows);
        let subject = format!("{}/{}", sighting.namespace, sighting.group);
        let next = match follows {
            Follows::Nothing => "as was meant",
            Follows::Successor => "a successor is started",
            Follows::GivenUp => {
                "it has ended five times in a minute and has no successor: recoverd adopt starts one"
            }
            Follows::NoneCame => {
                "five tries to start a successor have failed: recoverd adopt starts one"
            }
            Follows::Loss => "a stock shim: its containerd, if it runs, ends the workload",
        };
        let text = format!("shim {} {}: {next}", process.pid, how.text());
        match follows {
            Follows::Nothing => tracing::info!(subject, "{text}"),
            Follows::Successor | Follows::Loss => tracing::warn!(subject, "{text}"),
            Follows::GivenUp | Follows::NoneCame => tracing::error!(subject, "{text}"),
        }
        self.witnessed.died(Death {
            namespace: sighting.namespace.clone(),
            group: sighting.group.clone(),
            socket: socket.to_string_lossy().into_owned(),
            kind: kind.word().to_owned(),
            process: (process.pid, process.start_time),
            how: how.text(),
            follows: follows.word().to_owned(),
            successor: None,
            at: Timestamp::now(),
        });
        self.dirty = true;
        if follows != Follows::Nothing
            && let Err(error) = self.history.tell(Event::Noted, &subject, &text, Map::new())
        {
            tracing::warn!(%error, "history");
        }
    }
}

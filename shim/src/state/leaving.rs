//! When the shim goes, and what has to be told before. Pure.

use serde::{Deserialize, Serialize};

use super::{LoopState, Output};
use crate::{connections::Caller, service::Reply, tasks::Now};

/// Shutdown waits this long for the last events; containerd gives up after three seconds.
pub(super) const FLUSH_MS: u64 = 2_000;

/// Leaving, by stages.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Leaving {
    /// Not at all.
    No,
    /// The last events are on their way; the caller is answered when they are or time is up.
    Flushing {
        /// Who asked for it.
        callers: Vec<Caller>,
        /// When time is up.
        until: u64,
    },
    /// Answered and retired; unacknowledged events are still tried, for as long as it takes: they
    /// are nowhere else any more.
    Lingering,
}

impl LoopState {
    pub(super) fn leave_when_empty(&mut self, now: Now) {
        if !self.tasks.is_idle() || self.leaving != Leaving::No {
            self.empty_until = None;
            return;
        }
        let later = now.mono_ms.saturating_add(self.empty_ms);
        let until = *self.empty_until.get_or_insert(later);
        if until <= now.mono_ms {
            self.empty_until = None;
            self.begin_to_leave(Vec::new(), now);
        }
    }

    /// Without tasks, and in nobody's place: leaves when the events are told.
    pub fn linger(&mut self) {
        self.leaving = Leaving::Lingering;
    }

    pub(super) fn begin_to_leave(&mut self, callers: Vec<Caller>, now: Now) {
        self.outbox.hurry();
        self.leaving = Leaving::Flushing {
            callers,
            until: now.mono_ms.saturating_add(FLUSH_MS),
        };
    }

    /// True while `start` has sent somebody here who has not come yet.
    pub(super) fn is_awaited(&mut self, now: Now) -> bool {
        self.joining.retain(|(_, until)| *until > now.mono_ms);
        !self.joining.is_empty()
    }

    /// SIGTERM: leave now, whatever runs; containers go on.
    pub fn leave_now(&mut self) -> Vec<Output> {
        let mut out = Vec::new();
        let retired = matches!(self.leaving, Leaving::Lingering);
        if self.tasks.is_idle() && self.outbox.is_empty() && !retired {
            out.push(Output::Retire);
        }
        out.push(Output::Exit);
        out
    }

    pub(super) fn leave(&mut self, now: Now, out: &mut Vec<Output>) {
        match &mut self.leaving {
            Leaving::No => {}
            Leaving::Flushing { callers, until } => {
                let flushed = self.outbox.is_empty();
                if !flushed && *until > now.mono_ms {
                    return;
                }
                let callers = std::mem::take(callers);
                self.leaving = Leaving::Lingering;
                // Gone from the disk before containerd may begin anew under this name.
                out.push(Output::Retire);
                for to in callers {
                    self.reply(to, &Ok(Reply::Empty), now, out);
                }
                if flushed {
                    out.push(Output::Exit);
                }
            }
            Leaving::Lingering => {
                if self.outbox.is_empty() {
                    out.push(Output::Exit);
                }
            }
        }
    }
}

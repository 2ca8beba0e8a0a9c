//! Waiting for conditions. Nothing in the tests waits for a time.

use std::time::{Duration, Instant};

/// Generous: two busy cores may run two tests and a build.
const USUAL: Duration = Duration::from_secs(60);
const BETWEEN_LOOKS: Duration = Duration::from_millis(20);

/// Looks until `look` finds something; panics with `what` when it does not within a minute.
#[track_caller]
pub fn wait_for<T>(what: &str, look: impl FnMut() -> Option<T>) -> T {
    wait_within(USUAL, what, look)
}

/// As [`wait_for`], with a limit of its own.
#[track_caller]
pub fn wait_within<T>(limit: Duration, what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let began = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(
            began.elapsed() < limit,
            "waited {limit:?} in vain for: {what}"
        );
        std::thread::sleep(BETWEEN_LOOKS);
    }
}

//! Waiting for conditions. Nothing in the tests waits for a time.

use std::panic::resume_unwind;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// Generous: two busy cores may run two tests and a build.
pub(crate) const USUAL: Duration = Duration::from_secs(120);
pub(crate) const BETWEEN_LOOKS: Duration = Duration::from_millis(20);

/// Looks until `look` finds something; panics with `what` when it does not within two minutes.
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

/// Does `work` again and again in a thread of its own while `meanwhile` runs; how many times, and
/// what `meanwhile` gave. A panic of either is the caller's.
pub fn beside<R>(mut work: impl FnMut() + Send, meanwhile: impl FnOnce() -> R) -> (usize, R) {
    /// Ends the work however `meanwhile` ends: the scope waits for it.
    struct Over<'a>(&'a AtomicBool);
    impl Drop for Over<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let worker = scope.spawn(|| {
            let mut rounds = 0;
            while !over.load(Ordering::Relaxed) {
                work();
                rounds += 1;
            }
            rounds
        });
        let result = {
            let _over = Over(&over);
            meanwhile()
        };
        match worker.join() {
            Ok(rounds) => (rounds, result),
            Err(panic) => resume_unwind(panic),
        }
    })
}

//! Named places at which a test lets a process die as if by `kill -9`: no destructor runs, no
//! buffer is flushed. Nothing of it is compiled without the cargo feature `failpoints`.
//!
//! ```text
//! failpoint!("area.step.before");
//! the effect
//! failpoint!("area.step.after");
//! ```
//!
//! A name is used at one place only. Its first word is its area, by which the test that walks all
//! of them (`tests/e2e/failpoints.rs`) knows a scenario that comes by; the binary prints the whole
//! list (`containerd-shim-recoverd-v1 -failpoints`, `recoverd failpoints`), so that a new point
//! is walked without touching the test. A point stands directly before or after one effect that
//! somebody else can see: a file, a process, a message.
//!
//! | area | is about |
//! | --- | --- |
//! | `record` | the shim's record: its two files, their exchange |
//! | `events` | the log of events not yet acknowledged |
//! | `requests` | the file of requests not yet answered |
//! | `handoff` | a shim gives its descriptors to the supervisor; a successor answers what its predecessor was asked |
//! | `upgrade` | a shim becomes another executable, in the old image and in the new one |
//! | `start`, `daemon` | the `start` verb, and the daemon's first steps |
//! | `serve` | one input of the shim's loop: events, record, effects, answers |
//! | `retire` | a shim that leaves removes its files |
//! | `delete` | the `delete` verb |
//! | `remains` | what a group leaves beside its socket is removed |
//! | `adopt` | the shim's side of adoption |
//! | `order` | recoverd starts a successor |
//! | `repair`, `quarantine` | recoverd's plan at work |
//! | `prestart`, `poststart` | its hooks |
//! | `history` | what it writes about it |
//! | `supervise` | the supervisor: what it keeps and drops, sees, writes down and starts |
//!
//! In the environment, which containerd, `start` and recoverd hand on to what they start. It is in
//! no record: a successor dies only where those who start it want it to.
//!
//! | variable | means |
//! | --- | --- |
//! | `RECOVERD_FAILPOINT` | the name, or `name:N` for the Nth time that one process comes by |
//! | `RECOVERD_FAILPOINT_FILE` | made by whoever dies there; while it is there, nobody else does |
//! | `RECOVERD_FAILPOINT_STOPS` | set: whoever comes there is stopped, as if it hung, and does not die |
//! | `RECOVERD_FAILPOINT_ALSO` | a file with the pid of a process that is ended first |
//! | `RECOVERD_NO_PIDFD_STATUS` | not a point: pidfds tell no exit status, as before Linux 6.15 |

/// Where a test may let this process die; see the module's documentation.
#[cfg(feature = "failpoints")]
#[macro_export]
macro_rules! failpoint {
    ($name:literal) => {{
        #[$crate::failpoint::linkme::distributed_slice($crate::failpoint::POINTS)]
        #[linkme(crate = $crate::failpoint::linkme)]
        static POINT: &str = $name;
        $crate::failpoint::reached(POINT);
    }};
}

/// Where a test may let this process die; nothing without the feature `failpoints`.
#[cfg(not(feature = "failpoints"))]
#[macro_export]
macro_rules! failpoint {
    ($name:literal) => {{}};
}

#[cfg(feature = "failpoints")]
pub use registered::{POINTS, linkme, names, reached};

#[cfg(feature = "failpoints")]
mod registered {
    use std::{
        env, fs,
        io::Write,
        process,
        sync::{
            OnceLock,
            atomic::{AtomicU64, Ordering},
        },
        thread,
        time::Duration,
    };

    use nix::{
        sys::signal::{Signal, kill},
        unistd::Pid,
    };
    // The macro's expansion elsewhere needs it.
    pub use linkme;

    /// Every point that is compiled into this program.
    #[linkme::distributed_slice]
    pub static POINTS: [&str];

    /// All names, sorted; one that is used at two places comes twice.
    pub fn names() -> Vec<&'static str> {
        let mut names = POINTS.to_vec();
        names.sort_unstable();
        names
    }

    struct Chosen {
        name: String,
        time: u64,
    }

    /// What the environment says, looked at once.
    fn chosen() -> Option<&'static Chosen> {
        static CHOSEN: OnceLock<Option<Chosen>> = OnceLock::new();
        let read = || {
            let text = env::var("RECOVERD_FAILPOINT").ok()?;
            let (name, time) = match text.split_once(':') {
                Some((name, time)) => (name.to_owned(), time.parse().ok()?),
                None => (text, 1),
            };
            Some(Chosen { name, time })
        };
        CHOSEN.get_or_init(read).as_ref()
    }

    /// Ends the process here if the environment says so.
    pub fn reached(name: &str) {
        static TIMES: AtomicU64 = AtomicU64::new(0);
        let Some(chosen) = chosen().filter(|chosen| chosen.name == name) else {
            return;
        };
        if TIMES.fetch_add(1, Ordering::SeqCst).checked_add(1) != Some(chosen.time) || !first(name)
        {
            return;
        }
        if let Some(file) = env::var_os("RECOVERD_FAILPOINT_ALSO")
            && let Ok(text) = fs::read_to_string(file)
            && let Ok(pid) = text.trim().parse::<i32>()
            && pid > 1
        {
            // The test's own child, which it has not reaped: the number is its own.
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
        if env::var_os("RECOVERD_FAILPOINT_STOPS").is_some() {
            let _ = kill(Pid::this(), Signal::SIGSTOP);
            return;
        }
        let _ = kill(Pid::this(), Signal::SIGKILL);
        // Never comes back, but a thread may get that far before the kernel has ended it.
        thread::sleep(Duration::from_secs(60));
        process::abort();
    }

    /// Whether nobody has died here before us.
    fn first(name: &str) -> bool {
        let Some(path) = env::var_os("RECOVERD_FAILPOINT_FILE") else {
            return true;
        };
        match fs::File::create_new(path) {
            Ok(mut file) => {
                let _ = writeln!(file, "{name} {}", process::id());
                true
            }
            Err(_) => false,
        }
    }

    #[cfg(test)]
    mod tests {
        use super::*;
        use std::{
            os::unix::process::ExitStatusExt,
            process::{Command, Stdio},
        };

        fn come_by() {
            crate::failpoint!("test.first");
            crate::failpoint!("test.second");
        }

        /// The process that dies, below.
        #[test]
        fn victim() {
            if env::var_os("RECOVERD_FAILPOINT").is_some() {
                (0..3).for_each(|_| come_by());
            }
        }

        #[test]
        fn a_chosen_point_ends_the_process_once_and_the_others_do_not() {
            let folder = tempfile::tempdir().unwrap();
            let said = folder.path().join("hit");
            let run = |point: &str| {
                Command::new(env::current_exe().unwrap())
                    .args(["--exact", "failpoint::registered::tests::victim"])
                    .env("RECOVERD_FAILPOINT", point)
                    .env("RECOVERD_FAILPOINT_FILE", &said)
                    .stdout(Stdio::null())
                    .status()
                    .unwrap()
            };
            for other in ["test.third", "test.second:4", "test.second:x"] {
                assert!(run(other).success(), "{other}");
                assert!(!said.exists(), "{other}");
            }
            assert_eq!(run("test.second:3").signal(), Some(9));
            let text = fs::read_to_string(&said).unwrap();
            assert!(text.starts_with("test.second "), "{text}");
            assert!(run("test.first").success(), "it was told already");
            fs::remove_file(&said).unwrap();
            assert_eq!(run("test.first").signal(), Some(9));
        }

        #[test]
        fn every_point_is_in_the_list() {
            let names = names();
            assert!(names.contains(&"test.first") && names.contains(&"test.second"));
            assert!(names.is_sorted());
        }
    }
}

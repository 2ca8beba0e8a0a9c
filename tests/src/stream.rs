//! A stream of numbered lines: written in a container, read from its fifo, proof that no byte was
//! lost, doubled or moved.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::wait::wait_for;

/// `O_NONBLOCK`, so that a reader may come before and after every writer.
const NONBLOCK: i32 = 0o4000;
/// What a stock shim reads at once, bytes.
const BUFFER: u64 = 32 << 10;
const PAUSE: Duration = Duration::from_millis(2);

/// A line of shell that writes 1, 2, 3, … from when `go` exists until `stop` does, then says in
/// `count` how many these were. Some ten thousand a second, so that it does not eat a core.
pub fn numbers(go: &str, stop: &str, count: &str) -> String {
    format!(
        "while [ ! -e {go} ]; do usleep 20000; done; n=0; \
         while [ ! -e {stop} ]; do n=$((n+1)); echo $n; [ $((n % 200)) -ne 0 ] || usleep 10000; done; \
         echo $n >{count}"
    )
}

/// Reads a numbered stream in a thread of its own until its last writer is gone.
pub struct Reader {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    path: PathBuf,
    /// The last number that came in order.
    last: AtomicU64,
    /// Why the stream is not what it should be.
    fault: Mutex<Option<String>>,
    /// A gap may come.
    may_lose: AtomicBool,
    /// The reader has closed the fifo and waits.
    away: AtomicBool,
    is_away: AtomicBool,
    abandoned: AtomicBool,
}

impl Reader {
    /// Reads the fifo at `path`, a path of this test's own (see [`crate::Node::path`]).
    pub fn open(path: &Path) -> Reader {
        let shared = Arc::new(Shared {
            path: path.to_owned(),
            last: AtomicU64::new(0),
            fault: Mutex::new(None),
            may_lose: AtomicBool::new(false),
            away: AtomicBool::new(false),
            is_away: AtomicBool::new(true),
            abandoned: AtomicBool::new(false),
        });
        let thread = thread::spawn({
            let shared = Arc::clone(&shared);
            move || shared.read()
        });
        let reader = Reader {
            shared,
            thread: Some(thread),
        };
        wait_for("a reader's open", || {
            (!reader.shared.is_away.load(Ordering::SeqCst)).then_some(())
        });
        reader
    }

    /// Closes the fifo and stays away until [`Reader::back`], as a client does whose daemon died.
    #[track_caller]
    pub fn away(&self) {
        self.shared.away.store(true, Ordering::SeqCst);
        wait_for("a reader's close", || {
            self.shared.is_away.load(Ordering::SeqCst).then_some(())
        });
    }

    /// Opens the fifo again.
    pub fn back(&self) {
        self.shared.away.store(false, Ordering::SeqCst);
    }

    /// A stock shim copies through its own memory, and is stopped now: what it had read and not yet
    /// written, one buffer at most, is lost with it. That is met rarely, and seen even more rarely.
    pub fn may_lose_a_buffer(&self) {
        self.shared.may_lose.store(true, Ordering::SeqCst);
    }

    /// The last number that came, each after the one before it.
    #[track_caller]
    pub fn last(&self) -> u64 {
        self.assert_in_order();
        self.shared.last.load(Ordering::SeqCst)
    }

    /// Waits until numbers come that were not there before.
    #[track_caller]
    pub fn wait_advance(&self) {
        let before = self.last();
        wait_for("the stream to go on", || {
            (self.last() > before).then_some(())
        });
    }

    /// Waits for the end of the stream, which has to end after the number `count`.
    #[track_caller]
    pub fn finish(self, count: u64) {
        let began = Instant::now();
        let last = self.end();
        assert_eq!(last, count, "numbers, end after {:?}", began.elapsed());
    }

    /// Waits for the end of the stream, wherever its writer was; the last number.
    #[track_caller]
    pub fn end(mut self) -> u64 {
        let thread = self.thread.take();
        let ended = thread.as_ref();
        wait_for("the end of the stream", || {
            ended.is_none_or(JoinHandle::is_finished).then_some(())
        });
        self.last()
    }

    #[track_caller]
    fn assert_in_order(&self) {
        let fault = self.shared.fault.lock().map(|fault| fault.clone());
        if let Ok(Some(fault)) = fault {
            panic!("stream {}: {fault}", self.shared.path.display());
        }
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.shared.abandoned.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            let _said_already = thread.join();
        }
    }
}

impl Shared {
    fn read(&self) {
        let mut line = Vec::new();
        let result = loop {
            match self.read_until_away(&mut line) {
                Ok(true) => break self.end(&line),
                Ok(false) => {}
                Err(fault) => break Err(fault),
            }
            if self.abandoned.load(Ordering::SeqCst) {
                return;
            }
        };
        if let (Err(why), Ok(mut fault)) = (result, self.fault.lock()) {
            *fault = Some(why);
        }
    }

    fn end(&self, line: &[u8]) -> Result<(), String> {
        if line.is_empty() {
            return Ok(());
        }
        Err(format!(
            "ends in the middle of a line: {:?}",
            String::from_utf8_lossy(line)
        ))
    }

    /// True at the end of the stream.
    fn read_until_away(&self, line: &mut Vec<u8>) -> Result<bool, String> {
        if self.away.load(Ordering::SeqCst) {
            thread::sleep(PAUSE);
            return Ok(false);
        }
        let mut fifo = File::options()
            .read(true)
            .custom_flags(NONBLOCK)
            .open(&self.path)
            .map_err(|error| format!("open: {error}"))?;
        self.is_away.store(false, Ordering::SeqCst);
        let mut buffer = vec![0; 1 << 16];
        while !self.away.load(Ordering::SeqCst) && !self.abandoned.load(Ordering::SeqCst) {
            match fifo.read(&mut buffer) {
                Ok(0) => return Ok(true),
                Ok(count) => self.take(buffer.get(..count).unwrap_or_default(), line)?,
                Err(error) if error.kind() == ErrorKind::WouldBlock => thread::sleep(PAUSE),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(format!("read: {error}")),
            }
        }
        drop(fifo);
        self.is_away.store(true, Ordering::SeqCst);
        Ok(false)
    }

    /// Whether what is missing before `came` may be the one buffer that a stock shim has lost.
    fn is_lost_buffer(&self, expected: u64, came: u64) -> bool {
        let lines = came.saturating_sub(expected);
        let bytes = lines * (expected.to_string().len() as u64 + 1);
        lines > 0 && bytes <= BUFFER && self.may_lose.swap(false, Ordering::SeqCst)
    }

    fn take(&self, bytes: &[u8], line: &mut Vec<u8>) -> Result<(), String> {
        for byte in bytes {
            if *byte != b'\n' {
                line.push(*byte);
                continue;
            }
            let text = String::from_utf8_lossy(line).into_owned();
            let expected = self.last.load(Ordering::SeqCst) + 1;
            let came = text.parse().unwrap_or(0);
            if came != expected && !self.is_lost_buffer(expected, came) {
                return Err(format!("{text:?} came where {expected} was due"));
            }
            self.last.store(came, Ordering::SeqCst);
            line.clear();
        }
        Ok(())
    }
}

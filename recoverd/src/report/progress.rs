//! Tells a person at a terminal what a long look is doing; silent in a pipe and for short ones.

use std::{
    io::{self, IsTerminal, Write},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

/// A look shorter than this shows nothing.
const QUIET: Duration = Duration::from_millis(700);
const STEP: Duration = Duration::from_millis(200);

/// A line on standard error, taken away at the end.
pub struct Progress {
    stage: Arc<Mutex<String>>,
    ticker: Option<tokio::task::JoinHandle<()>>,
}

impl Progress {
    /// Starts it; must be called within the runtime.
    pub fn start() -> Self {
        let stage = Arc::new(Mutex::new(String::new()));
        let shown = Arc::clone(&stage);
        // With -v the steps are told line by line instead.
        let told = tracing::enabled!(tracing::Level::INFO);
        let ticker = (io::stderr().is_terminal() && !told).then(|| {
            tokio::spawn(async move {
                let began = Instant::now();
                tokio::time::sleep(QUIET).await;
                loop {
                    let text = shown.lock().map(|stage| stage.clone()).unwrap_or_default();
                    let seconds = began.elapsed().as_secs();
                    // Losing the terminal is no reason to stop looking.
                    let _ = write!(io::stderr(), "\r\x1b[Klooking at {text} ({seconds} s)");
                    tokio::time::sleep(STEP).await;
                }
            })
        });
        Self { stage, ticker }
    }

    /// What is being looked at now.
    pub fn stage(&self, text: &str) {
        if let Ok(mut stage) = self.stage.lock() {
            text.clone_into(&mut stage);
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(ticker) = &self.ticker {
            ticker.abort();
            let _ = write!(io::stderr(), "\r\x1b[K");
        }
    }
}

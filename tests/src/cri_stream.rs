//! The far end of the CRI's streaming server: an exec or attach session, over a WebSocket.

use std::fs::File;
use std::io::ErrorKind;
use std::net::TcpStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, setns};
use tungstenite::client::IntoClientRequest;
use tungstenite::error::Error;
use tungstenite::http::HeaderValue;
use tungstenite::{Message, WebSocket};

/// Kubernetes' name for: the first byte of every message is the number of its stream.
const PROTOCOL: &str = "v4.channel.k8s.io";
const STDIN: u8 = 0;
const STDOUT: u8 = 1;
const STDERR: u8 = 2;
const STATUS: u8 = 3;
const RESIZE: u8 = 4;
const LIMIT: Duration = Duration::from_secs(60);
const PROBED_AGAIN: Duration = Duration::from_millis(500);
/// What [`Session::wait_attached`] types.
const PROBE: &str = "?\n";

/// A session. Dropping it closes the connection, as a client does that goes away.
pub struct Session {
    socket: WebSocket<TcpStream>,
    /// What came on stdout so far.
    pub stdout: String,
    /// What came on stderr so far.
    pub stderr: String,
    /// The status that ends a session, JSON of a Kubernetes `Status`.
    pub status: Option<serde_json::Value>,
}

impl Session {
    /// None when nobody listens there: the CRI serves a moment before its streaming server does.
    #[track_caller]
    pub(crate) fn open(network: &Path, url: &str) -> Option<Session> {
        let mut request = url
            .replacen("http", "ws", 1)
            .into_client_request()
            .unwrap_or_else(|error| panic!("session at {url}: {error}"));
        let place = request.uri().authority().map(ToString::to_string);
        let place = place.unwrap_or_else(|| panic!("no host and port in {url}"));
        request
            .headers_mut()
            .insert("Sec-WebSocket-Protocol", HeaderValue::from_static(PROTOCOL));
        let stream = connect_in(network, place)?;
        stream
            .set_read_timeout(Some(LIMIT))
            .unwrap_or_else(|error| panic!("set a timeout for {url}: {error}"));
        let (socket, _) = tungstenite::client(request, stream)
            .unwrap_or_else(|error| panic!("session at {url}: {error}"));
        Some(Session {
            socket,
            stdout: String::new(),
            stderr: String::new(),
            status: None,
        })
    }

    /// Types this.
    #[track_caller]
    pub fn write(&mut self, text: &str) {
        self.send(STDIN, text);
    }

    /// The terminal's size is now that.
    #[track_caller]
    pub fn resize(&mut self, width: u16, height: u16) {
        self.send(RESIZE, &format!(r#"{{"Width":{width},"Height":{height}}}"#));
    }

    fn send(&mut self, stream: u8, text: &str) {
        let mut message = vec![stream];
        message.extend_from_slice(text.as_bytes());
        self.socket
            .send(Message::Binary(message.into()))
            .unwrap_or_else(|error| panic!("send {text:?}: {error}"));
    }

    /// Types a line that the other side answers, until an answer comes here: containerd
    /// hands on what is typed a moment before it hands back what is said.
    #[track_caller]
    pub fn wait_attached(&mut self) {
        let began = Instant::now();
        self.limit(PROBED_AGAIN);
        while self.stdout.is_empty() {
            self.send(STDIN, PROBE);
            let goes_on = self.read_if_any();
            assert!(
                goes_on && began.elapsed() < LIMIT,
                "no answer; {:?} {:?}",
                self.stderr,
                self.status
            );
        }
        self.limit(LIMIT);
    }

    fn limit(&self, limit: Duration) {
        let stream = self.socket.get_ref();
        stream
            .set_read_timeout(Some(limit))
            .unwrap_or_else(|error| panic!("set a timeout: {error}"));
    }

    /// Reads until stdout has this in it.
    #[track_caller]
    pub fn wait_for(&mut self, text: &str) {
        let began = Instant::now();
        while !self.stdout.contains(text) {
            let goes_on = self.read();
            assert!(
                goes_on && began.elapsed() < LIMIT,
                "no {text:?} in {:?}, {:?} {:?}",
                self.stdout,
                self.stderr,
                self.status
            );
        }
    }

    /// Reads until the other side closes; the exit code that it told, `None` when it told none.
    #[track_caller]
    pub fn finish(&mut self) -> Option<i32> {
        while self.read() {}
        let status = self.status.as_ref()?;
        if status["status"] == "Success" {
            return Some(0);
        }
        let causes = status["details"]["causes"].as_array()?;
        let cause = causes.iter().find(|cause| cause["reason"] == "ExitCode")?;
        cause["message"].as_str()?.parse().ok()
    }

    /// One message; false at the end.
    #[track_caller]
    fn read(&mut self) -> bool {
        let message = self.socket.read();
        self.take(message)
    }

    /// The same, if one comes in time.
    #[track_caller]
    fn read_if_any(&mut self) -> bool {
        match self.socket.read() {
            Err(Error::Io(error))
                if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) =>
            {
                true
            }
            message => self.take(message),
        }
    }

    #[track_caller]
    fn take(&mut self, message: Result<Message, Error>) -> bool {
        let message = match message {
            Ok(message) => message,
            Err(Error::ConnectionClosed | Error::AlreadyClosed | Error::Protocol(_)) => {
                return false;
            }
            Err(Error::Io(error)) if error.kind() == ErrorKind::ConnectionReset => {
                return false;
            }
            Err(error) => panic!("session: {error}; so far {:?}", self.stdout),
        };
        let Message::Binary(bytes) = message else {
            return true;
        };
        let Some((stream, bytes)) = bytes.split_first() else {
            return true;
        };
        let text = String::from_utf8_lossy(bytes);
        match *stream {
            STDOUT => self.stdout.push_str(&text),
            STDERR => self.stderr.push_str(&text),
            STATUS if !text.is_empty() => {
                let status = serde_json::from_str(&text);
                self.status =
                    Some(status.unwrap_or_else(|error| panic!("status {text:?}: {error}")));
            }
            _ => {}
        }
        true
    }
}

/// A socket belongs to the network namespace that its thread was in when it was made. None: nobody
/// listens there.
#[track_caller]
fn connect_in(namespace: &Path, place: String) -> Option<TcpStream> {
    let namespace = File::open(namespace)
        .unwrap_or_else(|error| panic!("open {}: {error}", namespace.display()));
    let connected = thread::spawn(move || {
        setns(namespace, CloneFlags::CLONE_NEWNET)
            .unwrap_or_else(|error| panic!("enter the node's network: {error}"));
        match TcpStream::connect(&place) {
            Ok(stream) => Some(stream),
            Err(error) if error.kind() == ErrorKind::ConnectionRefused => None,
            Err(error) => panic!("connect to {place}: {error}"),
        }
    })
    .join();
    match connected {
        Ok(stream) => stream,
        Err(panic) => std::panic::resume_unwind(panic),
    }
}

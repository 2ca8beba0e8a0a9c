//! One call at a time to a shim's socket, each within a deadline. Never waits longer, whatever the
//! other side does: it may be stopped, deadlocked, or no shim at all.

use std::{
    io::{self, Read, Write},
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::Path,
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    sys::socket::{
        AddressFamily, SockFlag, SockType, UnixAddr, UnixCredentials, connect, getsockopt, socket,
        sockopt::PeerCredentials,
    },
};
use prost::Message;

use crate::{
    pb::{task, ttrpc as pb},
    ttrpc::{HEADER, Header, Kind, MAX_PAYLOAD, code},
};

/// The task services, in the order in which they are tried: 1.x shims and ours have the first,
/// the stock shim of 2.x only the second.
pub const TASK_SERVICES: [&str; 2] = ["containerd.task.v2.Task", "containerd.task.v3.Task"];

/// The metadata key that makes `Connect` of an id a promise of ours to stay until that task comes:
/// what `start` asks before it sends containerd to a shim that may be about to leave. Others
/// ignore it, as they ignore every key that they do not know.
pub const JOIN: &str = "recoverd-join";

/// Why a call brought no answer.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// Nobody listens: there is no socket, or nobody behind it.
    #[error("nobody listens: {0}")]
    NobodyListens(io::Error),
    /// Somebody else's process listens.
    #[error("the listener runs as uid {0}")]
    Foreign(u32),
    /// Somebody listens and does not answer in time.
    #[error("no answer in time")]
    Silent,
    /// The connection ended before the answer.
    #[error("connection closed before the answer")]
    Closed,
    /// The answer is an error of the shim.
    #[error("{message} (code {code})")]
    Status {
        /// A code of `google.rpc.Status`.
        code: i32,
        /// The shim's words.
        message: String,
    },
    /// The answer is no ttrpc.
    #[error("answer is not ttrpc: {0}")]
    Garbage(String),
    /// Anything else that the kernel says.
    #[error(transparent)]
    Io(io::Error),
}

impl CallError {
    /// True when the other side is a ttrpc server that spoke, if only to refuse.
    pub fn is_answer(&self) -> bool {
        matches!(self, CallError::Status { .. })
    }

    /// The ttrpc crate's servers say INVALID_ARGUMENT for a service that they do not have.
    fn no_such_service(&self) -> bool {
        matches!(
            self,
            CallError::Status {
                code: code::UNIMPLEMENTED | code::INVALID_ARGUMENT,
                ..
            }
        )
    }
}

/// A connection to a shim.
#[derive(Debug)]
pub struct ShimClient {
    stream: UnixStream,
    namespace: String,
    deadline: Instant,
    next_stream: u32,
    joins: bool,
}

/// The process that made the listener at `path`: it need not live any more, as others may keep what it
/// made (SO_PEERCRED, unix(7)).
pub fn listener_of(path: &Path) -> Result<i32, CallError> {
    Ok(dial(path)?.1.pid())
}

fn dial(path: &Path) -> Result<(OwnedFd, UnixCredentials), CallError> {
    // Non-blocking: with a full backlog a plain connect(2) would wait for the listener.
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = socket(AddressFamily::Unix, SockType::Stream, flags, None)
        .map_err(|e| CallError::Io(e.into()))?;
    let address = UnixAddr::new(path).map_err(|e| CallError::Io(e.into()))?;
    match connect(fd.as_raw_fd(), &address) {
        Ok(()) => {}
        Err(e @ (Errno::ENOENT | Errno::ECONNREFUSED)) => {
            return Err(CallError::NobodyListens(e.into()));
        }
        Err(Errno::EAGAIN) => return Err(CallError::Silent),
        Err(e) => return Err(CallError::Io(e.into())),
    }
    let peer = getsockopt(&fd, PeerCredentials).map_err(|e| CallError::Io(e.into()))?;
    Ok((fd, peer))
}

impl ShimClient {
    /// Connects to `path`; everything until the client is dropped has to happen by `deadline`.
    pub fn connect(path: &Path, namespace: &str, deadline: Instant) -> Result<Self, CallError> {
        let (fd, peer) = dial(path)?;
        if peer.uid() != nix::unistd::geteuid().as_raw() {
            return Err(CallError::Foreign(peer.uid()));
        }
        let stream = UnixStream::from(fd);
        stream.set_nonblocking(false).map_err(CallError::Io)?;
        Ok(Self {
            stream,
            namespace: namespace.to_owned(),
            deadline,
            next_stream: 1,
            joins: false,
        })
    }

    /// The task service's `State` of `id`.
    pub fn state(&mut self, id: &str) -> Result<task::StateResponse, CallError> {
        self.exec_state(id, "")
    }

    /// The same of an exec of `id`.
    pub fn exec_state(
        &mut self,
        id: &str,
        exec_id: &str,
    ) -> Result<task::StateResponse, CallError> {
        let request = task::StateRequest {
            id: id.to_owned(),
            exec_id: exec_id.to_owned(),
        };
        self.task_call("State", &request)
    }

    /// The task service's `Connect`; a shim that does not know `id` answers with pid 0.
    pub fn connect_task(&mut self, id: &str) -> Result<task::ConnectResponse, CallError> {
        self.task_call("Connect", &task::ConnectRequest { id: id.to_owned() })
    }

    /// Which version of the task API to talk to this shim in: 2 if it has it, else 3. Any answer
    /// counts, a refusal too.
    pub fn api_version(&mut self, id: &str) -> Result<u8, CallError> {
        let request = task::ConnectRequest { id: id.to_owned() };
        for (service, version) in TASK_SERVICES.into_iter().zip([2, 3]) {
            match self.call::<task::ConnectResponse>(service, "Connect", &request) {
                Ok(_) => return Ok(version),
                Err(error) if error.no_such_service() => {}
                Err(error) if error.is_answer() => return Ok(version),
                Err(error) => return Err(error),
            }
        }
        Err(CallError::Garbage("it has no task service".into()))
    }

    /// As [`Self::api_version`], and a shim of ours stays until task `id` comes; one that has left
    /// for good refuses.
    pub fn join(&mut self, id: &str) -> Result<u8, CallError> {
        let request = task::ConnectRequest { id: id.to_owned() };
        self.joins = true;
        for (service, version) in TASK_SERVICES.into_iter().zip([2, 3]) {
            match self.call::<task::ConnectResponse>(service, "Connect", &request) {
                Ok(_) => return Ok(version),
                Err(error) if error.no_such_service() => {}
                Err(CallError::Status { code, .. }) if code != code::UNAVAILABLE => {
                    return Ok(version);
                }
                Err(error) => return Err(error),
            }
        }
        Err(CallError::Garbage("it has no task service".into()))
    }

    /// Calls `method` of whichever task service the shim has.
    fn task_call<R: Message + Default>(
        &mut self,
        method: &str,
        request: &impl Message,
    ) -> Result<R, CallError> {
        let [first, second] = TASK_SERVICES;
        match self.call(first, method, request) {
            Err(error) if error.no_such_service() => self.call(second, method, request),
            other => other,
        }
    }

    /// One unary call.
    pub fn call<R: Message + Default>(
        &mut self,
        service: &str,
        method: &str,
        request: &impl Message,
    ) -> Result<R, CallError> {
        let stream = self.next_stream;
        self.next_stream = stream.wrapping_add(2);
        let left = self.left()?;
        let mut metadata = vec![pb::KeyValue {
            key: "containerd-namespace-ttrpc".into(),
            value: self.namespace.clone(),
        }];
        if self.joins {
            metadata.push(pb::KeyValue {
                key: JOIN.into(),
                value: String::new(),
            });
        }
        let payload = pb::Request {
            service: service.to_owned(),
            method: method.to_owned(),
            payload: request.encode_to_vec(),
            timeout_nano: i64::try_from(left.as_nanos()).unwrap_or(i64::MAX),
            metadata,
        }
        .encode_to_vec();
        let length = u32::try_from(payload.len())
            .map_err(|_| CallError::Garbage("request is too long".into()))?;
        let header = Header {
            length,
            stream,
            kind: Kind::Request,
            flags: 0,
        };
        let frame = [header.bytes().as_slice(), &payload].concat();
        self.stream
            .set_write_timeout(Some(left))
            .map_err(CallError::Io)?;
        self.stream.write_all(&frame).map_err(ended)?;
        loop {
            let mut bytes = [0; HEADER];
            self.read(&mut bytes)?;
            let header =
                Header::parse(&bytes).ok_or_else(|| CallError::Garbage("short header".into()))?;
            let length = header.length as usize;
            if length > MAX_PAYLOAD {
                return Err(CallError::Garbage(format!("frame of {length} bytes")));
            }
            let mut body = vec![0; length];
            self.read(&mut body)?;
            if header.stream != stream || header.kind != Kind::Response {
                continue;
            }
            return answer(&body);
        }
    }

    fn left(&self) -> Result<Duration, CallError> {
        match self.deadline.checked_duration_since(Instant::now()) {
            Some(left) if !left.is_zero() => Ok(left),
            Some(_) | None => Err(CallError::Silent),
        }
    }

    /// Fills `bytes`; a peer that sends a byte now and then gains no time by it.
    fn read(&mut self, bytes: &mut [u8]) -> Result<(), CallError> {
        let mut rest = bytes;
        while !rest.is_empty() {
            let left = self.left()?;
            self.stream
                .set_read_timeout(Some(left))
                .map_err(CallError::Io)?;
            match self.stream.read(rest) {
                Ok(0) => return Err(CallError::Closed),
                Ok(n) => rest = rest.get_mut(n..).unwrap_or_default(),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(ended(e)),
            }
        }
        Ok(())
    }
}

fn ended(error: io::Error) -> CallError {
    match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => CallError::Silent,
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => CallError::Closed,
        _ => CallError::Io(error),
    }
}

fn answer<R: Message + Default>(body: &[u8]) -> Result<R, CallError> {
    let garbage = |e: prost::DecodeError| CallError::Garbage(e.to_string());
    let response = pb::Response::decode(body).map_err(garbage)?;
    match response.status {
        Some(status) if status.code != code::OK => Err(CallError::Status {
            code: status.code,
            message: status.message,
        }),
        Some(_) | None => R::decode(response.payload.as_slice()).map_err(garbage),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{os::unix::net::UnixListener, thread};

    /// For answers that come: a busy machine may take its time.
    fn later() -> Instant {
        Instant::now() + Duration::from_secs(30)
    }

    /// A server that reads one request and sends `frames` for it.
    fn serve_once(listener: UnixListener, frames: Vec<u8>) -> thread::JoinHandle<pb::Request> {
        thread::spawn(move || {
            let (mut peer, _) = listener.accept().unwrap();
            let mut header = [0; HEADER];
            peer.read_exact(&mut header).unwrap();
            let mut body = vec![0; Header::parse(&header).unwrap().length as usize];
            peer.read_exact(&mut body).unwrap();
            peer.write_all(&frames).unwrap();
            pb::Request::decode(body.as_slice()).unwrap()
        })
    }

    fn frame(stream: u32, response: &pb::Response) -> Vec<u8> {
        let body = response.encode_to_vec();
        let header = Header {
            length: body.len() as u32,
            stream,
            kind: Kind::Response,
            flags: 0,
        };
        [header.bytes().as_slice(), &body].concat()
    }

    #[test]
    fn a_shim_is_asked_and_its_answer_or_refusal_comes_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        let state = task::StateResponse {
            pid: 7,
            ..Default::default()
        };
        let mut frames = frame(9, &pb::Response::default());
        frames.extend(frame(
            1,
            &pb::Response {
                status: None,
                payload: state.encode_to_vec(),
            },
        ));
        let server = serve_once(listener.try_clone().unwrap(), frames);
        let mut client = ShimClient::connect(&path, "ns", later()).unwrap();
        assert_eq!(client.state("c").unwrap().pid, 7);
        let request = server.join().unwrap();
        assert_eq!(
            (request.service.as_str(), request.method.as_str()),
            (TASK_SERVICES[0], "State")
        );
        assert_eq!(request.metadata[0].value, "ns");

        let status = pb::Status {
            code: code::NOT_FOUND,
            message: "no".into(),
            details: vec![],
        };
        let refusal = pb::Response {
            status: Some(status),
            payload: vec![],
        };
        let server = serve_once(listener, frame(1, &refusal));
        let error = ShimClient::connect(&path, "ns", later())
            .unwrap()
            .state("c")
            .unwrap_err();
        assert!(matches!(
            error,
            CallError::Status {
                code: code::NOT_FOUND,
                ..
            }
        ));
        assert!(error.is_answer());
        server.join().unwrap();
    }

    #[test]
    fn the_dead_the_silent_and_the_mad_are_told_apart_in_time() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let connect = || ShimClient::connect(&path, "ns", later());
        assert!(matches!(connect(), Err(CallError::NobodyListens(_))));
        let listener = UnixListener::bind(&path).unwrap();
        let started = Instant::now();
        let soon = started + Duration::from_millis(200);
        let silent = ShimClient::connect(&path, "ns", soon);
        assert!(matches!(silent.unwrap().state("c"), Err(CallError::Silent)));
        assert!(started.elapsed() < Duration::from_secs(20));
        // The silent connection is still in the backlog.
        drop(listener.accept().unwrap());
        let server = serve_once(listener.try_clone().unwrap(), vec![0xff; 10]);
        assert!(matches!(
            connect().unwrap().state("c"),
            Err(CallError::Garbage(_))
        ));
        server.join().unwrap();
        let server = serve_once(listener.try_clone().unwrap(), vec![0; 3]);
        assert!(matches!(
            connect().unwrap().state("c"),
            Err(CallError::Closed)
        ));
        server.join().unwrap();
        drop(listener);
        assert!(matches!(connect(), Err(CallError::NobodyListens(_))));
    }
}

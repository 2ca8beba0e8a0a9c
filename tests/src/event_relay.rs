//! A stand-in for containerd's event service that hands everything on to it and writes down what
//! came, and whether it was acknowledged: a subscriber of containerd ends with it and may miss what
//! was acknowledged right before.

use std::fs;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use prost::Message;
use recoverd_common::pb::events::{
    ForwardRequest, TaskCreate, TaskDelete, TaskExecAdded, TaskExecStarted, TaskExit, TaskOom,
    TaskPaused, TaskResumed, TaskStart,
};
use recoverd_common::pb::ttrpc::{Request, Response};
use recoverd_common::ttrpc::{HEADER, Header};

use crate::containerd::Containerd;
use crate::node::Node;

/// An event that a shim has sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sent {
    /// The container.
    pub id: String,
    /// `/tasks/exit`, …
    pub topic: String,
    /// Of an exec: its id.
    pub exec_id: String,
    /// containerd has said that it has it.
    pub acknowledged: bool,
    /// On which connection it came, by their count: a successor has a later one.
    pub connection: usize,
}

/// Everything that shims have sent by way of it, in order.
pub struct EventRelay {
    place: PathBuf,
    sent: Arc<Mutex<Vec<Sent>>>,
}

impl EventRelay {
    /// In front of `containerd`, which may come and go.
    #[track_caller]
    pub fn of(containerd: &Containerd) -> EventRelay {
        let node = containerd.node();
        let place = node.folder().join("events.sock");
        let listener = UnixListener::bind(&place)
            .unwrap_or_else(|error| panic!("bind {}: {error}", place.display()));
        let service = format!("{}.ttrpc", containerd.address().display());
        let service = node.path(service);
        let sent: Arc<Mutex<Vec<Sent>>> = Arc::default();
        let of_thread = Arc::clone(&sent);
        // Lives as long as this test's process, and does nothing without clients.
        thread::spawn(move || {
            for (connection, client) in listener.incoming().flatten().enumerate() {
                // Nobody there: the client meets the end that it would meet.
                if let Ok(service) = UnixStream::connect(&service) {
                    relay(client, service, connection, &of_thread);
                }
            }
        });
        EventRelay { place, sent }
    }

    /// A shim that is `shim` and sends its events here; its file stands in a folder of this name.
    #[track_caller]
    pub fn shim(&self, node: &Node, folder: &str, shim: &Path) -> PathBuf {
        let name = shim.file_name().unwrap_or_default();
        let path = node.folder().join(folder).join(name);
        let script = format!(
            "#!/bin/sh\nTTRPC_ADDRESS={} exec {} \"$@\"\n",
            self.place.display(),
            shim.display()
        );
        let write = || {
            fs::create_dir_all(path.parent().unwrap_or(&path))?;
            fs::write(&path, script)?;
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755))
        };
        write().unwrap_or_else(|error| panic!("write {}: {error}", path.display()));
        path
    }

    /// What came of one container, in order.
    pub fn of_container(&self, id: &str) -> Vec<Sent> {
        let sent = self.sent.lock().unwrap_or_else(PoisonError::into_inner);
        sent.iter().filter(|sent| sent.id == id).cloned().collect()
    }
}

/// Both directions, until one ends.
fn relay(client: UnixStream, service: UnixStream, connection: usize, sent: &Arc<Mutex<Vec<Sent>>>) {
    let (Ok(client_too), Ok(service_too)) = (client.try_clone(), service.try_clone()) else {
        return;
    };
    let waiting: Arc<Mutex<Vec<(u32, usize)>>> = Arc::default();
    let (asks, all) = (Arc::clone(&waiting), Arc::clone(sent));
    thread::spawn(move || {
        frames(client, service, |header, payload| {
            let Some(event) = event_in(payload, connection) else {
                return;
            };
            let mut all = all.lock().unwrap_or_else(PoisonError::into_inner);
            let mut asks = asks.lock().unwrap_or_else(PoisonError::into_inner);
            asks.push((header.stream, all.len()));
            all.push(event);
        });
    });
    let all = Arc::clone(sent);
    thread::spawn(move || {
        frames(service_too, client_too, |header, payload| {
            let answer = Response::decode(payload);
            let fine = answer.is_ok_and(|answer| answer.status.is_none_or(|s| s.code == 0));
            // In the order of the other direction, or each would wait for the other.
            let mut all = all.lock().unwrap_or_else(PoisonError::into_inner);
            let waiting = waiting.lock().unwrap_or_else(PoisonError::into_inner);
            let asked = waiting.iter().find(|(stream, _)| *stream == header.stream);
            if let Some(event) = asked.and_then(|(_, at)| all.get_mut(*at)) {
                event.acknowledged |= fine;
            }
        });
    });
}

/// Hands on frame by frame; `look` sees each before its receiver does.
fn frames(mut from: UnixStream, mut to: UnixStream, look: impl Fn(Header, &[u8])) {
    let mut next = || -> std::io::Result<()> {
        let mut head = [0; HEADER];
        from.read_exact(&mut head)?;
        let header = Header::parse(&head).ok_or(std::io::ErrorKind::InvalidData)?;
        let mut payload = vec![0; usize::try_from(header.length).unwrap_or(0)];
        from.read_exact(&mut payload)?;
        look(header, &payload);
        to.write_all(&head)?;
        to.write_all(&payload)
    };
    while next().is_ok() {}
    for stream in [&from, &to] {
        let _ended_already = stream.shutdown(Shutdown::Both);
    }
}

fn event_in(payload: &[u8], connection: usize) -> Option<Sent> {
    let request = Request::decode(payload).ok()?;
    let envelope = ForwardRequest::decode(request.payload.as_slice())
        .ok()?
        .envelope?;
    let event = envelope.event?.value;
    let event = event.as_slice();
    let init = |id: String| (id, String::new());
    // In an exit the init has the container's id.
    let (id, exec_id) = match envelope.topic.as_str() {
        "/tasks/create" => init(TaskCreate::decode(event).ok()?.container_id),
        "/tasks/start" => init(TaskStart::decode(event).ok()?.container_id),
        "/tasks/delete" => init(TaskDelete::decode(event).ok()?.container_id),
        "/tasks/exit" => {
            let exit = TaskExit::decode(event).ok()?;
            let exec_id = if exit.id == exit.container_id {
                String::new()
            } else {
                exit.id
            };
            (exit.container_id, exec_id)
        }
        "/tasks/oom" => init(TaskOom::decode(event).ok()?.container_id),
        "/tasks/exec-added" => {
            let added = TaskExecAdded::decode(event).ok()?;
            (added.container_id, added.exec_id)
        }
        "/tasks/exec-started" => {
            let started = TaskExecStarted::decode(event).ok()?;
            (started.container_id, started.exec_id)
        }
        "/tasks/paused" => init(TaskPaused::decode(event).ok()?.container_id),
        "/tasks/resumed" => init(TaskResumed::decode(event).ok()?.container_id),
        _ => return None,
    };
    Some(Sent {
        id,
        topic: envelope.topic,
        exec_id,
        acknowledged: false,
        connection,
    })
}

//! What a service manager does for one service: starts it again when it dies, and keeps the
//! descriptors that it is given meanwhile (systemd's FDSTORE, sd_pid_notify_with_fds(3)).

use std::collections::VecDeque;
use std::io::IoSliceMut;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::process::Command;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use recoverd_common::sys;

use crate::node::{Node, Running};
use crate::process::Process;
use crate::wait::wait_for;

/// As in `recoverd.service`.
const RESTART_AFTER: Duration = Duration::from_millis(100);
const BETWEEN_LOOKS: Duration = Duration::from_millis(5);
/// More than fit in one message.
const MAX_FILES: usize = 16;

/// One that was stored.
struct Stored {
    name: String,
    fd: OwnedFd,
    /// It is given up when its other side has gone.
    polled: bool,
}

/// A service, and what is kept for it. It is stopped when this is dropped.
pub struct ServiceManager {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    node: Arc<Node>,
    socket: UnixDatagram,
    place: PathBuf,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    running: Option<Running>,
    stored: VecDeque<Stored>,
    starts: usize,
    stopping: bool,
}

impl ServiceManager {
    /// Starts what `command` makes, which is run in `node`; again whenever it ends.
    #[track_caller]
    pub fn start(
        node: &Arc<Node>,
        name: &str,
        command: impl Fn() -> Command + Send + 'static,
    ) -> ServiceManager {
        let place = node.folder().join(format!("{name}.notify"));
        let socket = UnixDatagram::bind(&place)
            .unwrap_or_else(|error| panic!("bind {}: {error}", place.display()));
        let shared = Arc::new(Shared {
            node: Arc::clone(node),
            socket,
            place,
            state: Mutex::default(),
        });
        let at_work = Arc::clone(&shared);
        let thread = thread::spawn(move || at_work.serve(command));
        ServiceManager {
            shared,
            thread: Some(thread),
        }
    }

    /// The process that runs now; none while it is between two lives.
    pub fn process(&self) -> Option<Process> {
        let state = self.shared.state();
        state
            .running
            .as_ref()
            .map(|running| running.process.clone())
    }

    /// How often it was started.
    pub fn starts(&self) -> usize {
        self.shared.state().starts
    }

    /// Asks it to stop; gone when this returns.
    pub fn stop(mut self) {
        self.end();
    }

    fn end(&mut self) {
        self.shared.state().stopping = true;
        if let Some(thread) = self.thread.take() {
            // A panic there is told by its own thread.
            let _told = thread.join();
        }
    }
}

impl Drop for ServiceManager {
    fn drop(&mut self) {
        self.end();
    }
}

impl Shared {
    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn serve(&self, command: impl Fn() -> Command) {
        loop {
            self.hear();
            let mut state = self.state();
            if state.stopping {
                let running = state.running.take();
                drop(state);
                return self.stop(running);
            }
            let Some(running) = &mut state.running else {
                drop(state);
                self.start(command());
                continue;
            };
            let pause = match running.is_running() {
                true => BETWEEN_LOOKS,
                false => {
                    state.running = None;
                    RESTART_AFTER
                }
            };
            drop(state);
            thread::sleep(pause);
        }
    }

    fn start(&self, command: Command) {
        let mut state = self.state();
        state
            .stored
            .retain(|stored| !stored.polled || !has_gone(&stored.fd));
        let names: Vec<&str> = state.stored.iter().map(|s| s.name.as_str()).collect();
        let mut whole = self
            .node
            .command("sh", ["-c", "LISTEN_PID=$$ exec \"$@\"", "sh"]);
        whole.arg(command.get_program()).args(command.get_args());
        for (name, value) in command.get_envs() {
            whole.env(name, value.unwrap_or_default());
        }
        whole.env("NOTIFY_SOCKET", &self.place);
        if !names.is_empty() {
            whole.env("LISTEN_FDS", names.len().to_string());
            whole.env("LISTEN_FDNAMES", names.join(":"));
        }
        let files: Vec<&OwnedFd> = state.stored.iter().map(|stored| &stored.fd).collect();
        let given = sys::give(&mut whole, &files, false);
        given.unwrap_or_else(|error| panic!("give descriptors: {error}"));
        let running = self.node.spawn_command(whole);
        state.running = Some(running);
        state.starts += 1;
    }

    fn stop(&self, running: Option<Running>) {
        let Some(mut running) = running else {
            return;
        };
        let pid = running.process.pid.to_string();
        let _gone_already = self.node.output("kill", ["-s", "TERM", &pid]);
        wait_for("a service to stop", || {
            self.hear();
            (!running.is_running()).then_some(())
        });
    }

    /// Takes every message that is there.
    fn hear(&self) {
        loop {
            let mut bytes = [0; 4096];
            let mut control = nix::cmsg_space!([RawFd; MAX_FILES]);
            let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_CMSG_CLOEXEC;
            let mut slices = [IoSliceMut::new(&mut bytes)];
            let got = recvmsg::<()>(
                self.socket.as_raw_fd(),
                &mut slices,
                Some(&mut control),
                flags,
            );
            let Ok(got) = got else {
                return;
            };
            let mut numbers = Vec::new();
            for message in got.cmsgs().into_iter().flatten() {
                if let ControlMessageOwned::ScmRights(more) = message {
                    numbers.extend(more);
                }
            }
            let length = got.bytes;
            let files = sys::received(&numbers);
            let text = String::from_utf8_lossy(bytes.get(..length).unwrap_or_default());
            self.word(&text, files);
        }
    }

    fn word(&self, text: &str, files: Vec<OwnedFd>) {
        let value = |key: &str| text.lines().find_map(|line| line.strip_prefix(key));
        let name = value("FDNAME=").unwrap_or("stored").to_owned();
        let mut state = self.state();
        if value("FDSTOREREMOVE=") == Some("1") {
            state.stored.retain(|stored| stored.name != name);
        }
        if value("FDSTORE=") == Some("1") {
            let polled = value("FDPOLL=") != Some("0");
            for fd in files {
                let name = name.clone();
                // It gives them back in any order.
                state.stored.push_front(Stored { name, fd, polled });
            }
        }
    }
}

fn has_gone(fd: &OwnedFd) -> bool {
    let mut asked = [PollFd::new(fd.as_fd(), PollFlags::empty())];
    let gone = PollFlags::POLLHUP | PollFlags::POLLERR;
    poll(&mut asked, PollTimeout::ZERO).is_ok()
        && asked[0]
            .revents()
            .is_some_and(|events| events.intersects(gone))
}

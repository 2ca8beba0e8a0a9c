//! The task API on the wire: requests into calls, replies into bytes. Pure but for one thing:
//! options that name a file (`config_path`) are read from it here, because a request is parsed
//! once, into types.
//!
//! v2 and v3 differ in the name of the service only.

use prost::Message;
use prost_types::{Any, Timestamp as ProtoTimestamp};
use recoverd_common::{
    handoff,
    ids::Id,
    pb::{task, ttrpc as envelope},
    shim_client::JOIN,
    timestamp::Timestamp,
    ttrpc::code,
};
use serde::{Deserialize, Serialize};

use crate::{
    checkpoint::{Checkpoint, Restore},
    options::Options,
};

/// The services that are served, one implementation behind both.
const SERVICES: [&str; 2] = ["containerd.task.v2.Task", "containerd.task.v3.Task"];
/// Highest signal number of Linux on every architecture that containerd supports.
const LAST_SIGNAL: u32 = 64;

/// A request refused, or one that failed: what crosses as `google.rpc.Status`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    /// One of [`code`].
    pub code: i32,
    /// One line.
    pub message: String,
}

impl Refusal {
    /// A refusal with `code`.
    pub fn new(code: i32, message: impl Into<String>) -> Self {
        let mut message: String = message.into();
        // Some of the text comes from the runtime or from the request.
        if message.contains(['\n', '\r']) {
            message = message.replace(['\n', '\r'], " ");
        }
        Self { code, message }
    }

    /// A plain error, which is what most of the stock shim's are.
    pub fn unknown(message: impl Into<String>) -> Self {
        Self::new(code::UNKNOWN, message)
    }

    /// No such task, exec or process.
    pub fn not_found(message: impl Into<String>) -> Self {
        Self::new(code::NOT_FOUND, message)
    }

    fn invalid(message: impl Into<String>) -> Self {
        Self::new(code::INVALID_ARGUMENT, message)
    }
}

/// Names the init of a task, or one of its execs.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Key {
    /// The task.
    pub id: String,
    /// The exec; empty for the init.
    pub exec_id: String,
}

impl Key {
    /// The init of task `id`.
    pub fn init(id: &str) -> Self {
        Self {
            id: id.to_owned(),
            exec_id: String::new(),
        }
    }

    /// True for an init.
    pub fn is_init(&self) -> bool {
        self.exec_id.is_empty()
    }
}

/// Stdio as requested.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StdioWish {
    /// A fifo, or empty.
    pub stdin: String,
    /// A fifo, a URI, or empty.
    pub stdout: String,
    /// As `stdout`.
    pub stderr: String,
    /// Whether the process gets a terminal.
    pub terminal: bool,
}

/// A mount of the root file system.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mount {
    /// File system, or `bind`.
    pub kind: String,
    /// Device or folder.
    pub source: String,
    /// Below the rootfs; empty for the rootfs itself.
    pub target: String,
    /// As in `mount -o`.
    pub options: Vec<String>,
}

/// What Create asks for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Create {
    /// The new task's id.
    pub id: String,
    /// Its bundle, an absolute path.
    pub bundle: String,
    /// To be mounted on the bundle's `rootfs`, in this order.
    pub rootfs: Vec<Mount>,
    /// The init's stdio.
    pub stdio: StdioWish,
    /// The runtime's options.
    pub options: Options,
    /// Nothing is run before Start, which restores this.
    #[serde(default)]
    pub restore: Option<Restore>,
}

/// A request, parsed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Call {
    /// Answers with the phase of a process.
    State(Key),
    /// Makes a task.
    Create(Box<Create>),
    /// Starts an init or an exec.
    Start(Key),
    /// Deletes an init's task or an exec.
    Delete(Key),
    /// Lists the pids of a task.
    Pids(String),
    /// Freezes a task.
    Pause(String),
    /// Thaws a task.
    Resume(String),
    /// Sends a signal.
    Kill {
        /// To whom.
        key: Key,
        /// 0 to 64.
        signal: i32,
        /// To every process of the container.
        all: bool,
    },
    /// Adds an exec.
    Exec {
        /// Its id.
        key: Key,
        /// Its stdio.
        stdio: StdioWish,
        /// The OCI process, JSON.
        spec: Vec<u8>,
    },
    /// Sets the size of a terminal.
    ResizePty {
        /// Whose.
        key: Key,
        /// Columns.
        width: u16,
        /// Rows.
        height: u16,
    },
    /// Ends a process's stdin.
    CloseIo(Key),
    /// Sets resource limits.
    Update {
        /// Of which task.
        id: String,
        /// `LinuxResources`, JSON.
        resources: Vec<u8>,
    },
    /// Writes a container's processes to files.
    Checkpoint(Box<Checkpoint>),
    /// Answers when a process has exited.
    Wait(Key),
    /// Answers with the cgroup's figures.
    Stats(String),
    /// Answers with the shim's pid and the task's.
    Connect(String),
    /// The same, of a task that will come: the shim stays until then.
    Join(String),
    /// Asks the shim to leave when it has no task.
    Shutdown,
    /// Asks the shim to become this executable.
    Upgrade(String),
}

/// An answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Reply {
    /// Of calls without one.
    Empty,
    /// Create and Start.
    Pid(u32),
    /// State.
    State(Box<State>),
    /// Delete.
    Deleted(Ended),
    /// Wait.
    Exited(Ended),
    /// Connect.
    Connected {
        /// The shim.
        shim_pid: u32,
        /// The task's init, 0 when there is none.
        task_pid: u32,
    },
    /// Pids: each with the exec's id, empty for others.
    Pids(Vec<(u32, String)>),
    /// Stats: type URL and value.
    Stats(String, Vec<u8>),
    /// Upgrade: the version that serves now.
    Upgraded(String),
}

/// How a process ended, for Delete and Wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ended {
    /// Its pid, 0 when it never had one.
    pub pid: u32,
    /// Exit status.
    pub status: u32,
    /// When; none when it never ran.
    pub at: Option<Timestamp>,
}

/// Answer of State.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// Whose.
    pub key: Key,
    /// The task's bundle.
    pub bundle: String,
    /// 0 before there is one.
    pub pid: u32,
    /// As on the wire: `task::Status`.
    pub status: i32,
    /// As requested.
    pub stdio: StdioWish,
    /// Exit status and time, once exited.
    pub exit: Option<(u32, Timestamp)>,
}

/// A request frame's payload, parsed: the call and how long its caller waits, in nanoseconds.
pub fn parse(payload: &[u8]) -> Result<(Call, Option<u64>), Refusal> {
    let request = envelope::Request::decode(payload)
        .map_err(|e| Refusal::invalid(format!("unmarshal request error: {e}")))?;
    if request.service == handoff::SERVICE && request.method == handoff::UPGRADE {
        let asked: handoff::UpgradeRequest = decode(&request.payload)?;
        return Ok((Call::Upgrade(asked.executable), None));
    }
    if !SERVICES.contains(&request.service.as_str()) {
        return Err(Refusal::new(
            code::UNIMPLEMENTED,
            format!("service {}", cut(&request.service)),
        ));
    }
    let timeout = u64::try_from(request.timeout_nano).ok().filter(|t| *t > 0);
    let mut call = call(&request.method, &request.payload)?;
    if let Call::Connect(id) = &call
        && request.metadata.iter().any(|pair| pair.key == JOIN)
    {
        call = Call::Join(id.clone());
    }
    Ok((call, timeout))
}

/// The methods that change something and may need new room on disk: the only ones that a full
/// `/run` may fail.
pub fn needs_room(call: &Call) -> bool {
    matches!(call, Call::Create(_) | Call::Exec { .. })
}

/// Calls whose answer is worth keeping until it is sent: asked once more, they would be done once
/// more, or refused because they are done. A signal is not one of them, for its answer comes
/// before it is sent.
pub fn keeps_answer(call: &Call) -> bool {
    match call {
        Call::Create(_)
        | Call::Start(_)
        | Call::Delete(_)
        | Call::Pause(_)
        | Call::Resume(_)
        | Call::Update { .. }
        | Call::Checkpoint(_)
        | Call::Exec { .. } => true,
        Call::State(_)
        | Call::Pids(_)
        | Call::Kill { .. }
        | Call::ResizePty { .. }
        | Call::CloseIo(_)
        | Call::Wait(_)
        | Call::Stats(_)
        | Call::Connect(_)
        | Call::Join(_)
        | Call::Shutdown
        | Call::Upgrade(_) => false,
    }
}

fn decode<M: Message + Default>(payload: &[u8]) -> Result<M, Refusal> {
    M::decode(payload).map_err(|e| Refusal::invalid(format!("unmarshal payload error: {e}")))
}

fn call(method: &str, payload: &[u8]) -> Result<Call, Refusal> {
    Ok(match method {
        "State" => {
            let r: task::StateRequest = decode(payload)?;
            Call::State(key(r.id, r.exec_id))
        }
        "Create" => create(decode(payload)?)?,
        "Start" => {
            let r: task::StartRequest = decode(payload)?;
            Call::Start(key(r.id, r.exec_id))
        }
        "Delete" => {
            let r: task::DeleteRequest = decode(payload)?;
            Call::Delete(key(r.id, r.exec_id))
        }
        "Pids" => Call::Pids(decode::<task::PidsRequest>(payload)?.id),
        "Pause" => Call::Pause(decode::<task::PauseRequest>(payload)?.id),
        "Resume" => Call::Resume(decode::<task::ResumeRequest>(payload)?.id),
        "Kill" => {
            let r: task::KillRequest = decode(payload)?;
            let signal = i32::try_from(r.signal)
                .ok()
                .filter(|_| r.signal <= LAST_SIGNAL)
                .ok_or_else(|| {
                    Refusal::unknown(format!(
                        "invalid signal {} (allowed: 0 to {LAST_SIGNAL})",
                        r.signal
                    ))
                })?;
            Call::Kill {
                key: key(r.id, r.exec_id),
                signal,
                all: r.all,
            }
        }
        "Exec" => exec(decode(payload)?)?,
        "ResizePty" => {
            let r: task::ResizePtyRequest = decode(payload)?;
            // The kernel's field has 16 bits; so does the stock shim's.
            let side = |value: u32| u16::try_from(value).unwrap_or(u16::MAX);
            Call::ResizePty {
                width: side(r.width),
                height: side(r.height),
                key: key(r.id, r.exec_id),
            }
        }
        "CloseIO" => {
            let r: task::CloseIoRequest = decode(payload)?;
            Call::CloseIo(key(r.id, r.exec_id))
        }
        "Update" => {
            let r: task::UpdateTaskRequest = decode(payload)?;
            Call::Update {
                id: r.id,
                resources: json(r.resources, "resources")?,
            }
        }
        "Checkpoint" => Call::Checkpoint(Box::new(Checkpoint::from_request(decode(payload)?)?)),
        "Wait" => {
            let r: task::WaitRequest = decode(payload)?;
            Call::Wait(key(r.id, r.exec_id))
        }
        "Stats" => Call::Stats(decode::<task::StatsRequest>(payload)?.id),
        "Connect" => Call::Connect(decode::<task::ConnectRequest>(payload)?.id),
        "Shutdown" => {
            decode::<task::ShutdownRequest>(payload)?;
            Call::Shutdown
        }
        other => {
            return Err(Refusal::new(
                code::UNIMPLEMENTED,
                format!("method {}", cut(other)),
            ));
        }
    })
}

fn key(id: String, exec_id: String) -> Key {
    Key { id, exec_id }
}

/// At most a line of a text that a stranger chose.
fn cut(text: &str) -> String {
    text.chars().take(100).collect()
}

fn checked_id(id: &str) -> Result<(), Refusal> {
    Id::new(id)
        .map(drop)
        .map_err(|e| Refusal::invalid(e.to_string()))
}

fn create(r: task::CreateTaskRequest) -> Result<Call, Refusal> {
    checked_id(&r.id)?;
    if !r.bundle.starts_with('/') {
        return Err(Refusal::invalid(format!(
            "bundle {:?} is not an absolute path",
            cut(&r.bundle)
        )));
    }
    let options =
        Options::from_request(r.options.as_ref()).map_err(|e| Refusal::invalid(e.to_string()))?;
    Ok(Call::Create(Box::new(Create {
        id: r.id,
        bundle: r.bundle,
        rootfs: r
            .rootfs
            .into_iter()
            .map(|m| Mount {
                kind: m.r#type,
                source: m.source,
                target: m.target,
                options: m.options,
            })
            .collect(),
        stdio: StdioWish {
            stdin: r.stdin,
            stdout: r.stdout,
            stderr: r.stderr,
            terminal: r.terminal,
        },
        options,
        restore: (!r.checkpoint.is_empty()).then_some(Restore {
            image: r.checkpoint,
            parent: r.parent_checkpoint,
        }),
    })))
}

fn exec(r: task::ExecProcessRequest) -> Result<Call, Refusal> {
    checked_id(&r.exec_id)?;
    let text = json(r.spec, "spec")?;
    // The request decides about the terminal, whatever the process says.
    let mut process: serde_json::Map<String, serde_json::Value> = serde_json::from_slice(&text)
        .map_err(|e| Refusal::invalid(format!("decode spec of exec {}: {e}", r.exec_id)))?;
    process.insert("terminal".to_owned(), r.terminal.into());
    let spec = serde_json::to_vec(&process)
        .map_err(|e| Refusal::invalid(format!("encode spec of exec {}: {e}", r.exec_id)))?;
    Ok(Call::Exec {
        key: key(r.id, r.exec_id),
        stdio: StdioWish {
            stdin: r.stdin,
            stdout: r.stdout,
            stderr: r.stderr,
            terminal: r.terminal,
        },
        spec,
    })
}

/// JSON inside an `Any`; containerd's type URL for it varies with the version, so it is not
/// looked at.
fn json(any: Option<Any>, what: &str) -> Result<Vec<u8>, Refusal> {
    any.map(|any| any.value)
        .filter(|value| !value.is_empty())
        .ok_or_else(|| Refusal::invalid(format!("{what} missing")))
}

/// `at` on the wire.
pub fn proto_time(at: Timestamp) -> ProtoTimestamp {
    ProtoTimestamp {
        seconds: at.seconds,
        nanos: i32::try_from(at.nanos).unwrap_or(0),
    }
}

/// The payload of a response frame.
pub fn response(reply: &Result<Reply, Refusal>) -> Vec<u8> {
    let message = match reply {
        Ok(reply) => envelope::Response {
            status: Some(envelope::Status::default()),
            payload: body(reply),
        },
        Err(refusal) => envelope::Response {
            status: Some(envelope::Status {
                code: refusal.code,
                message: refusal.message.clone(),
                details: Vec::new(),
            }),
            payload: Vec::new(),
        },
    };
    message.encode_to_vec()
}

fn body(reply: &Reply) -> Vec<u8> {
    match reply {
        Reply::Empty => Vec::new(),
        // StartResponse has the same field.
        Reply::Pid(pid) => task::CreateTaskResponse { pid: *pid }.encode_to_vec(),
        Reply::State(state) => task::StateResponse {
            id: state.key.id.clone(),
            bundle: state.bundle.clone(),
            pid: state.pid,
            status: state.status,
            stdin: state.stdio.stdin.clone(),
            stdout: state.stdio.stdout.clone(),
            stderr: state.stdio.stderr.clone(),
            terminal: state.stdio.terminal,
            exit_status: state.exit.map_or(0, |(status, _)| status),
            // Go's zero time before the exit, as the stock shim: left out, containerd 1.7 and
            // later would show 1970.
            exited_at: Some(state.exit.map_or(GO_ZERO_TIME, |(_, at)| proto_time(at))),
            exec_id: state.key.exec_id.clone(),
        }
        .encode_to_vec(),
        Reply::Deleted(ended) => task::DeleteResponse {
            pid: ended.pid,
            exit_status: ended.status,
            exited_at: Some(ended.at.map_or(GO_ZERO_TIME, proto_time)),
        }
        .encode_to_vec(),
        Reply::Exited(ended) => task::WaitResponse {
            exit_status: ended.status,
            exited_at: Some(ended.at.map_or(GO_ZERO_TIME, proto_time)),
        }
        .encode_to_vec(),
        Reply::Connected { shim_pid, task_pid } => task::ConnectResponse {
            shim_pid: *shim_pid,
            task_pid: *task_pid,
            version: String::new(),
        }
        .encode_to_vec(),
        Reply::Pids(pids) => task::PidsResponse {
            processes: pids.iter().map(process_info).collect(),
        }
        .encode_to_vec(),
        Reply::Upgraded(version) => handoff::UpgradeResponse {
            version: version.clone(),
        }
        .encode_to_vec(),
        Reply::Stats(type_url, value) => task::StatsResponse {
            stats: Some(Any {
                type_url: type_url.clone(),
                value: value.clone(),
            }),
        }
        .encode_to_vec(),
    }
}

/// 0001-01-01T00:00:00Z.
const GO_ZERO_TIME: ProtoTimestamp = ProtoTimestamp {
    seconds: -62_135_596_800,
    nanos: 0,
};

fn process_info((pid, exec_id): &(u32, String)) -> task::ProcessInfo {
    use recoverd_common::pb::{runc, type_url};
    let info = (!exec_id.is_empty()).then(|| Any {
        type_url: type_url::PROCESS_DETAILS.to_owned(),
        value: runc::ProcessDetails {
            exec_id: exec_id.clone(),
        }
        .encode_to_vec(),
    });
    task::ProcessInfo { pid: *pid, info }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(service: &str, method: &str, payload: Vec<u8>) -> Vec<u8> {
        envelope::Request {
            service: service.into(),
            method: method.into(),
            payload,
            timeout_nano: 5,
            metadata: Vec::new(),
        }
        .encode_to_vec()
    }

    #[test]
    fn both_services_are_routed_and_others_are_unimplemented() {
        for service in SERVICES {
            let bytes = request(service, "Connect", Vec::new());
            assert_eq!(
                parse(&bytes),
                Ok((Call::Connect(String::new()), Some(5))),
                "{service}"
            );
        }
        for (service, method) in [
            ("containerd.runtime.sandbox.v1.Sandbox", "PingSandbox"),
            ("containerd.task.v3.Task", "Fly"),
        ] {
            let refusal = parse(&request(service, method, Vec::new())).unwrap_err();
            assert_eq!(refusal.code, code::UNIMPLEMENTED, "{method}");
        }
        assert_eq!(parse(b"\xff\xff").unwrap_err().code, code::INVALID_ARGUMENT);
    }

    #[test]
    fn signals_out_of_range_are_refused_and_real_time_ones_pass() {
        let kill = |signal| {
            let payload = task::KillRequest {
                signal,
                ..Default::default()
            };
            parse(&request(SERVICES[0], "Kill", payload.encode_to_vec()))
        };
        assert!(kill(37).is_ok());
        assert!(kill(64).is_ok());
        for bad in [65, 1 << 31, u32::MAX] {
            assert_eq!(kill(bad).unwrap_err().code, code::UNKNOWN);
        }
    }

    #[test]
    fn an_exec_takes_its_terminal_from_the_request() {
        let payload = |spec: &str| {
            let payload = task::ExecProcessRequest {
                id: "c".into(),
                exec_id: "e".into(),
                terminal: true,
                spec: Some(Any {
                    type_url: String::new(),
                    value: spec.into(),
                }),
                ..Default::default()
            };
            parse(&request(SERVICES[1], "Exec", payload.encode_to_vec()))
        };
        let (call, _) = payload("{\"args\":[\"x\"],\"terminal\":false}").unwrap();
        let Call::Exec { spec, .. } = call else {
            panic!("{call:?}");
        };
        assert_eq!(spec, b"{\"args\":[\"x\"],\"terminal\":true}");
        for bad in ["", "[]", "{", &"[".repeat(1 << 16)] {
            assert!(payload(bad).is_err());
        }
    }

    #[test]
    fn ids_and_bundles_that_could_leave_their_folder_are_refused() {
        let create = |id: &str, bundle: &str| {
            let payload = task::CreateTaskRequest {
                id: id.into(),
                bundle: bundle.into(),
                ..Default::default()
            };
            parse(&request(SERVICES[1], "Create", payload.encode_to_vec()))
        };
        assert!(create("a", "/b").is_ok());
        assert!(create("../a", "/b").is_err());
        assert!(create("a", "b").is_err());
    }

    #[test]
    fn a_refusal_is_one_line() {
        assert_eq!(Refusal::unknown("a\nb\r\nc").message, "a b  c");
    }
}

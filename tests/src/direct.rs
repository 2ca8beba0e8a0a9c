//! Calls to a shim past containerd: what no client of containerd can bring about.

use std::path::Path;
use std::time::{Duration, Instant};

use prost::Message;
use recoverd_common::pb::task;
use recoverd_common::record::{self, Record, store};
use recoverd_common::seen::Seen;
use recoverd_common::shim_client::{CallError, ShimClient, TASK_SERVICES};
use recoverd_common::ttrpc::code;

use crate::container::Task;
use crate::node::Node;
use crate::process::Process;

/// Generous, yet a call that hangs fails its test and not the whole run.
pub(crate) const ANSWERS_WITHIN: Duration = Duration::from_secs(180);

/// Calls `method` of the task service at `socket`, a path of the node: v2, and v3 of a shim that has
/// no other.
pub fn call<R: Message + Default>(
    node: &Node,
    socket: &Path,
    method: &str,
    request: &impl Message,
) -> Result<R, CallError> {
    let deadline = Instant::now() + ANSWERS_WITHIN;
    let mut client = ShimClient::connect(&node.path(socket), "e2e", deadline)?;
    let [second, third] = TASK_SERVICES;
    match client.call(second, method, request) {
        Err(CallError::Status {
            code: code::UNIMPLEMENTED,
            ..
        }) => client.call(third, method, request),
        answer => answer,
    }
}

/// The refusal that a call brought: its code and text, which must be one line.
#[track_caller]
pub fn refusal<R: std::fmt::Debug>(result: Result<R, CallError>) -> (i32, String) {
    match result {
        Err(CallError::Status { code, message }) => {
            assert!(
                !message.is_empty() && !message.contains('\n'),
                "not one line: {message:?}"
            );
            (code, message)
        }
        other => panic!("not refused: {other:?}"),
    }
}

/// The process of the shim that answers at `socket`.
pub(crate) fn serving(node: &Node, socket: &Path, id: &str) -> Option<Process> {
    let request = task::ConnectRequest { id: id.into() };
    let answer: task::ConnectResponse = call(node, socket, "Connect", &request).ok()?;
    node.process(answer.shim_pid)
}

impl Task {
    /// Its shim's word on one of its execs; none if there is no such exec.
    pub fn exec_state(&self, exec_id: &str) -> Option<task::StateResponse> {
        let request = task::StateRequest {
            id: self.id().into(),
            exec_id: exec_id.into(),
        };
        self.call("State", &request).ok()
    }

    /// Calls `method` of its shim's task service.
    pub fn call<R: Message + Default>(
        &self,
        method: &str,
        request: &impl Message,
    ) -> Result<R, CallError> {
        call(self.node(), self.socket(), method, request)
    }

    /// Its shim's word on it, or on one of its execs.
    #[track_caller]
    pub fn state(&self, exec_id: &str) -> task::StateResponse {
        let request = task::StateRequest {
            id: self.id().into(),
            exec_id: exec_id.into(),
        };
        self.call("State", &request)
            .unwrap_or_else(|error| panic!("State of {} {exec_id:?}: {error}", self.name()))
    }

    /// The answer of `Wait`, for its init or one of its execs.
    #[track_caller]
    pub fn wait(&self, exec_id: &str) -> task::WaitResponse {
        let request = task::WaitRequest {
            id: self.id().into(),
            exec_id: exec_id.into(),
        };
        self.call("Wait", &request)
            .unwrap_or_else(|error| panic!("Wait of {} {exec_id:?}: {error}", self.name()))
    }

    /// What its shim has written down; see SPEC.
    #[track_caller]
    pub fn record(&self) -> Record {
        record_at(self.node(), self.socket())
    }

    /// Its part of the record.
    #[track_caller]
    pub fn recorded(&self) -> record::Task {
        let record = self.record();
        let found = record.tasks.iter().find(|task| task.id == self.id());
        found
            .cloned()
            .unwrap_or_else(|| panic!("{} is not in {record:#?}", self.name()))
    }
}

/// The record beside a socket of the node.
#[track_caller]
pub fn record_at(node: &Node, socket: &Path) -> Record {
    let path = recoverd_common::paths::Beside::of(&node.path(socket)).record;
    match store::read(&path) {
        Seen::Present(record) => record,
        other => panic!("record {}: {other:?}", path.display()),
    }
}

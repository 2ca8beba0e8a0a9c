//! What an event says: what containerd's own shim would say of the same. Pure.

use prost::Message;
use prost_types::Any;
use recoverd_common::pb::{events, task, type_url};

use super::{CREATE, DELETE};
use crate::{
    service::{Mount, proto_time},
    tasks::Notice,
};

/// Topic and task of an event. Every one of ours names its task first.
pub(super) fn subject(payload: &[u8]) -> Option<(String, String)> {
    let envelope = events::ForwardRequest::decode(payload).ok()?.envelope?;
    let event = events::TaskOom::decode(envelope.event?.value.as_slice()).ok()?;
    Some((envelope.topic, event.container_id))
}

/// Topic and event of a notice.
pub(super) fn message(notice: &Notice) -> (&'static str, Any) {
    fn any(type_url: &str, message: &impl Message) -> Any {
        Any {
            type_url: type_url.to_owned(),
            value: message.encode_to_vec(),
        }
    }
    match notice {
        Notice::Create {
            id,
            bundle,
            rootfs,
            stdio,
            checkpoint,
            pid,
        } => (
            CREATE,
            any(
                type_url::TASK_CREATE,
                &events::TaskCreate {
                    container_id: id.clone(),
                    bundle: bundle.clone(),
                    rootfs: rootfs.iter().map(proto_mount).collect(),
                    io: Some(events::TaskIo {
                        stdin: stdio.stdin.clone(),
                        stdout: stdio.stdout.clone(),
                        stderr: stdio.stderr.clone(),
                        terminal: stdio.terminal,
                    }),
                    checkpoint: checkpoint.clone(),
                    pid: *pid,
                },
            ),
        ),
        Notice::Start { id, pid } => (
            "/tasks/start",
            any(
                type_url::TASK_START,
                &events::TaskStart {
                    container_id: id.clone(),
                    pid: *pid,
                },
            ),
        ),
        Notice::ExecAdded(key) => (
            "/tasks/exec-added",
            any(
                type_url::TASK_EXEC_ADDED,
                &events::TaskExecAdded {
                    container_id: key.id.clone(),
                    exec_id: key.exec_id.clone(),
                },
            ),
        ),
        Notice::ExecStarted { key, pid } => (
            "/tasks/exec-started",
            any(
                type_url::TASK_EXEC_STARTED,
                &events::TaskExecStarted {
                    container_id: key.id.clone(),
                    exec_id: key.exec_id.clone(),
                    pid: *pid,
                },
            ),
        ),
        Notice::Exit { key, ended } => (
            "/tasks/exit",
            any(
                type_url::TASK_EXIT,
                &events::TaskExit {
                    container_id: key.id.clone(),
                    id: if key.is_init() {
                        key.id.clone()
                    } else {
                        key.exec_id.clone()
                    },
                    pid: ended.pid,
                    exit_status: ended.status,
                    exited_at: ended.at.map(proto_time),
                },
            ),
        ),
        Notice::Delete { id, ended } => (
            DELETE,
            any(
                type_url::TASK_DELETE,
                &events::TaskDelete {
                    container_id: id.clone(),
                    pid: ended.pid,
                    exit_status: ended.status,
                    exited_at: ended.at.map(proto_time),
                    id: String::new(),
                },
            ),
        ),
        Notice::Oom(id) => (
            "/tasks/oom",
            any(
                type_url::TASK_OOM,
                &events::TaskOom {
                    container_id: id.clone(),
                },
            ),
        ),
        Notice::Checkpointed { id, path } => (
            "/tasks/checkpointed",
            any(
                type_url::TASK_CHECKPOINTED,
                &events::TaskCheckpointed {
                    container_id: id.clone(),
                    checkpoint: path.clone(),
                },
            ),
        ),
        Notice::Paused(id) => (
            "/tasks/paused",
            any(
                type_url::TASK_PAUSED,
                &events::TaskPaused {
                    container_id: id.clone(),
                },
            ),
        ),
        Notice::Resumed(id) => (
            "/tasks/resumed",
            any(
                type_url::TASK_RESUMED,
                &events::TaskResumed {
                    container_id: id.clone(),
                },
            ),
        ),
    }
}

fn proto_mount(mount: &Mount) -> task::Mount {
    task::Mount {
        r#type: mount.kind.clone(),
        source: mount.source.clone(),
        target: mount.target.clone(),
        options: mount.options.clone(),
    }
}

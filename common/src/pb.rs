#![allow(missing_docs, clippy::all)]
//! Messages of containerd and of ttrpc, generated from `common/proto` (see
//! `common/tests/generated.rs`); field names and numbers are containerd's. Module names are
//! short; what containerd calls a message on the wire is in [`type_url`].

pub mod bootstrap {
    include!("pb/bootstrap.rs");
}
pub mod cgroups1 {
    include!("pb/cgroups1.rs");
}
pub mod cgroups2 {
    include!("pb/cgroups2.rs");
}
pub mod events {
    include!("pb/events.rs");
}
pub mod info {
    include!("pb/info.rs");
}
pub mod runc {
    include!("pb/runc.rs");
}
pub mod runtimeoptions {
    include!("pb/runtimeoptions.rs");
}
pub mod task {
    include!("pb/task.rs");
}
pub mod ttrpc {
    include!("pb/ttrpc.rs");
}

/// Type URLs of what travels inside a `google.protobuf.Any`: bare, without the usual
/// `type.googleapis.com/`, because containerd 1.6 compares the whole string.
pub mod type_url {
    pub const RUNC_OPTIONS: &str = "containerd.runc.v1.Options";
    pub const CHECKPOINT_OPTIONS: &str = "containerd.runc.v1.CheckpointOptions";
    pub const PROCESS_DETAILS: &str = "containerd.runc.v1.ProcessDetails";
    pub const RUNTIME_OPTIONS: &str = "runtimeoptions.v1.Options";
    pub const METRICS_V1: &str = "io.containerd.cgroups.v1.Metrics";
    pub const METRICS_V2: &str = "io.containerd.cgroups.v2.Metrics";
    pub const FEATURES: &str =
        "types.containerd.io/opencontainers/runtime-spec/1/features/Features";
    pub const TASK_CREATE: &str = "containerd.events.TaskCreate";
    pub const TASK_START: &str = "containerd.events.TaskStart";
    pub const TASK_DELETE: &str = "containerd.events.TaskDelete";
    pub const TASK_EXIT: &str = "containerd.events.TaskExit";
    pub const TASK_OOM: &str = "containerd.events.TaskOOM";
    pub const TASK_EXEC_ADDED: &str = "containerd.events.TaskExecAdded";
    pub const TASK_EXEC_STARTED: &str = "containerd.events.TaskExecStarted";
    pub const TASK_PAUSED: &str = "containerd.events.TaskPaused";
    pub const TASK_RESUMED: &str = "containerd.events.TaskResumed";
    pub const TASK_CHECKPOINTED: &str = "containerd.events.TaskCheckpointed";
}

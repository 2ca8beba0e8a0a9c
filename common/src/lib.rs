//! What the shim and `recoverd` share: names checked once, every path, the record, facts about
//! one thing of the host each, and the messages of the task API. No policy lives here.

pub mod adoption;
pub mod bundle;
pub mod cgroup;
pub mod connector;
pub mod event_log;
pub mod exec_files;
pub mod failpoint;
pub mod handoff;
pub mod ids;
pub mod mounts;
pub mod own_file;
pub mod paths;
pub mod pb;
pub mod proc;
pub mod read;

pub mod record;
pub mod runc;
pub mod seen;
pub mod shim_client;
pub mod supervision;
pub mod sys;
pub mod timestamp;
pub mod ttrpc;
pub mod witness;

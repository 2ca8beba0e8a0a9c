#![allow(missing_docs, clippy::all)]
//! Messages of the task API and of ttrpc, generated from `common/proto` (see
//! `common/tests/generated.rs`); field names and numbers are containerd's.

pub mod task {
    include!("pb/task.rs");
}
pub mod ttrpc {
    include!("pb/ttrpc.rs");
}

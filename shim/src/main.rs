//! `containerd-shim-recoverd-v1`, runtime name `io.containerd.recoverd.v1`.
#![cfg_attr(
    not(test),
    deny(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::indexing_slicing,
        clippy::panic
    )
)]
mod args;
mod oom;
mod options;
mod stats;
fn main() {}

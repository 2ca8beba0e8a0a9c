//! `containerd-shim-recoverd-v1`, runtime name `io.containerd.recoverd.v1`.

fn main() {}

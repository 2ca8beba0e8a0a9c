//! The harness of the end-to-end tests: a host of its own with real containerds in it.
//!
//! ```text
//! Release ── one containerd release, unpacked by tests/setup; or why it cannot be had
//! Node ───── a host: own mounts, pids, network, cgroups, an empty /run and /var/lib, a reaping init
//!   └ Containerd ── a real one in it; start, kill, stop, switch to another release
//!       ├ Task ──── a real container: its init, its shim, its bundle, its socket
//!       └ Api ───── its gRPC API, for what ctr cannot bring about; Fifos are a client's ends
//! SystemdBox  a host with real systemd and Debian's own containerd, for units and packages
//! Recoverd ─ the binary under test, run in the node; its JSON report, parsed strictly
//! ```
//!
//! Everything fails by panicking with what it tried: a test has no use for an error value. A failed
//! test prints the logs of its containerds and the processes of its node. A node that goes takes
//! everything with it, also when the test panicked or was killed.
//!
//! A test file lists its tests with [`tests!`], which registers each once per release; one that
//! takes a [`ShimUnderTest`] too is listed under `with_each_shim`, one that needs no particular
//! release under `once`; one that needs a program of a
//! newer Debian under `with_criu` and the like; one that needs a [`SystemdBox`] under `in_a_box`, a vm `in_a_vm`. Its `[[test]]` in `Cargo.toml` says `harness = false`.
//!
//! ```no_run
//! use recoverd_tests::{Container, Node, Release};
//!
//! fn healthy_task_has_no_finding(release: &Release) {
//!     let node = Node::start();
//!     let containerd = node.containerd(release);
//!     let task = containerd.run(&Container::new("well"));
//!     let scan = containerd.scan();
//!     assert_eq!((scan.exit, scan.codes(&task.name()).len()), (0, 0), "{scan:?}");
//! }
//!
//! recoverd_tests::tests! { on_every_release: [healthy_task_has_no_finding] }
//! ```

mod api;
mod box_client;
mod client;
mod container;
mod containerd;
mod cri;
mod cri_stream;
mod direct;
mod docker;
mod event_relay;
mod events;
mod failpoints;
mod fifo;
mod held_runc;
mod held_stdio;
mod hooks;
mod installed;
mod loop_device;
mod metrics;
mod newer;
mod node;
mod process;
mod readme;
mod recoverd;
mod releases;
mod service_manager;
mod shared;
mod stream;
mod supervisor;
mod systemd_box;
mod traces;
mod wait;

pub use api::{
    Api, Ended, KILLED, SLEEPER, Stdio, assert_refused, oci_process, oci_spec, runc_options,
};
pub use box_client::BoxClient;
pub use client::Refused;
pub use container::{Container, Task};
pub use containerd::{Containerd, TaskRow};
pub use containerd_client::tonic::Code;
pub use containerd_client::types::v1::Status;
pub use cri::{ContainerSpec, Cri, Handler, Pod};
pub use cri_stream::Session;
pub use direct::{call, record_at, refusal};
pub use docker::Docker;
pub use event_relay::{EventRelay, Sent};
pub use events::{Event, Events};
pub use failpoints::{Armed, Failpoints};
pub use fifo::{Fifos, Input, Output, make_fifo};
pub use held_runc::HeldRunc;
pub use held_stdio::{HeldStdio, HeldTerminal};
pub use hooks::{Fate, PostStart, PreStart};
pub use installed::{Installed, OTHER, VERSION, as_version};
pub use loop_device::LoopDevice;
pub use metrics::differences;
pub use newer::newest_with;
pub use node::{Node, Running};
pub use process::Process;
pub use readme::{readme, readme_words};
pub use recoverd::{Finding, Gap, Report, Scan, Shim, TaskCase, parse};
pub use releases::{OnRelease, Release, ShimUnderTest, Tests, WithShim, built, trial};
pub use service_manager::ServiceManager;
pub use stream::{Reader, numbers};
pub use supervisor::{Supervisor, metric};
pub use systemd_box::{
    BoxKind, BoxTask, InVm, Instance, SystemdBox, run_in_vm, run_installed_in_vm,
};
pub use traces::Traces;
pub use wait::{beside, wait_for, wait_within};

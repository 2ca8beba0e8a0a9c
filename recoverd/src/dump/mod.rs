//! One tar with all that is known of one task, for a bug report.
//!
//! Reads only, and nothing below a bundle's `rootfs`. The one exception is asked for by name:
//! `--stack` sends one signal to a Go shim (`stack`). Values of environment variables are left
//! out (`redact`): they hold secrets that nobody on the host but root sees. Arguments are kept,
//! since every user of the host sees them, and a report without them is often useless.

pub mod archive;
pub mod collect;
mod redact;
pub mod stack;

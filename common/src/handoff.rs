//! What passes from a shim to the one that is responsible after it, beside the record.
//!
//! ```text
//! crash     record + <socket>.requests + descriptors that somebody has kept  ──▶ a new process
//! upgrade   the whole loop, in memory  + its own descriptors, by number      ──▶ the same process
//! ```
//!
//! *After a crash* the keeper (`recoverd supervise`, or `recoverd upgrade` after an upgrade that
//! went wrong) starts the verb `adopt` (see [`crate::adoption`]) with the descriptors that it has
//! kept, inherited at 3, 4, 5… in the order of [`Adoption::descriptors`]. The names there are for
//! people: a successor looks at each descriptor itself, and knows a connection by the inode of its
//! socket, under which its requests are written down. So a descriptor that was taken out of the
//! dead shim's table is as good as one that it has sent. What is missing is opened anew as far as
//! it can be, what is of no use is closed.
//!
//! | name | is |
//! | --- | --- |
//! | `listener` | the socket on which the shim accepts |
//! | `connection` | one that it has accepted |
//! | `master:<id>/<exec>` | the master of a process's terminal; without exec that of an init |
//! | `stdin:<id>/<exec>` | the write end of the pipe that is its stdin |
//! | `output:<id>/<exec>` | the read end of a pipe into which it writes |
//! | others of this form | fifos of the client that nobody but the shim holds open: without them the client meets an end, or a pipe without a reader, the moment the shim dies |
//!
//! [`Adoption::descriptors`]: crate::adoption::Adoption::descriptors

/// The socket on which the shim accepts connections.
pub const LISTENER: &str = "listener";
/// An accepted connection.
pub const CONNECTION: &str = "connection";

/// More descriptors than a shim has.
pub const MAX_DESCRIPTORS: usize = 4096;

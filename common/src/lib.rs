//! What the shim and `recoverd` share: names checked once, every path, the record, facts about
//! one thing of the host each, and the messages of the task API. No policy lives here.

pub mod ids;
pub mod paths;
pub mod pb;
pub mod read;
pub mod record;
pub mod seen;
pub mod timestamp;
pub mod ttrpc;

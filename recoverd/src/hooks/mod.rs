//! The two hooks around containerd's start: what was there before ([`baseline`]), which files a
//! containerd of another release needs ([`twins`]), how many unresponsive shims are replaced at
//! once ([`batches`]), what to do about those of other runtimes ([`foreign`]), which bundles would
//! stop containerd ([`stoppers`]), and what became of every task ([`compare`]). The commands that use them are `commands::pre_start` and `post_start`.

pub mod baseline;
pub mod batches;
pub mod compare;
pub mod foreign;
pub mod stoppers;
pub mod twins;

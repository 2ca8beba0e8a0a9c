//! The two hooks around containerd's start: what was there before ([`baseline`]), which files a
//! containerd of another release needs ([`twins`]), which release that is ([`coming`]) and which
//! shims it cannot speak to ([`downgrade`]), how many living shims are replaced at once
//! ([`batches`]), what to do about those of other runtimes ([`foreign`]), which bundles would stop
//! containerd ([`stoppers`]), and what became of every task ([`compare`]). The commands that use
//! them are `commands::pre_start` and `post_start`.

pub mod baseline;
pub mod batches;
pub mod coming;
pub mod compare;
pub mod downgrade;
pub mod foreign;
pub mod stoppers;
pub mod twins;

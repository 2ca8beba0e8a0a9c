//! One file per command: what it asks for, and what it prints.

pub mod config;
pub mod dump;
pub mod explain;
pub mod history;
pub mod look;
pub mod preflight;
pub mod scan;
pub mod show;

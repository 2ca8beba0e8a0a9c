//! One file per command: what it asks for, and what it prints.

pub mod adopt;
pub mod config;
pub mod dump;
pub mod explain;
pub mod history;
pub mod look;
pub mod post_start;
pub mod pre_start;
pub mod preflight;
pub mod repair;
pub mod scan;
pub mod show;
pub mod supervise;
pub mod upgrade;

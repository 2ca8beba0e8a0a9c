//! `recoverd`: the command line.
mod cli;
mod config;
mod facts;
mod findings;
mod observe;
fn main() {}

//! `recoverd`: the command line.
#![allow(dead_code)]

mod cli;
mod commands;
mod config;
mod explain;
mod facts;
mod findings;
mod observe;

fn main() {}

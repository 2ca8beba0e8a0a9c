//! `recoverd`: the command line.

fn main() {}

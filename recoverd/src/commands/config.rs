//! `recoverd config`: the effective configuration and where each value comes from.

use std::io::{self, Write};

use crate::config::Config;

/// Prints it as TOML.
pub fn run(config: &Config, out: &mut impl Write) -> io::Result<()> {
    write!(out, "{config}")?;
    out.flush()
}

//! The keys of the file, a row each: what is allowed, how it is kept, how it is printed.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use toml::de::DeValue;

use super::{
    Config,
    duration::{format_duration, parse_duration},
    shown,
};
use crate::cli::Color;

/// One key of the file.
pub(super) struct Key {
    /// `""` for the top level.
    pub(super) table: &'static str,
    pub(super) name: &'static str,
    pub(super) about: &'static str,
    pub(super) allowed: &'static str,
    /// Stores a value; `None` when it is not allowed.
    pub(super) set: fn(&mut Config, &DeValue<'_>) -> Option<()>,
    pub(super) show: fn(&Config) -> toml::Value,
}

impl Key {
    pub(super) fn full(&self) -> String {
        match self.table {
            "" => self.name.to_owned(),
            table => format!("{table}.{}", self.name),
        }
    }
}

pub(super) const PATH: &str = "an absolute path";

macro_rules! path_key {
    ($name:literal, $field:ident, $about:literal) => {
        Key {
            table: "",
            name: $name,
            about: $about,
            allowed: PATH,
            set: |config, value| {
                config.$field = absolute(value)?;
                Some(())
            },
            show: |config| shown(&config.$field).into(),
        }
    };
}

macro_rules! time_key {
    ($table:ident $table_name:literal, $name:literal, $field:ident,
     $least:literal to $most:literal, $about:literal) => {
        Key {
            table: $table_name,
            name: $name,
            about: $about,
            allowed: concat!("a time from ", $least, " to ", $most, ", such as \"2s\""),
            set: |config, value| {
                config.$table.$field = time(value, $least, $most)?;
                Some(())
            },
            show: |config| format_duration(config.$table.$field).into(),
        }
    };
}

/// Every key except those of `[[containerd]]`, in the order in which they are printed.
pub(super) const KEYS: &[Key] = &[
    path_key!("socket-dir", socket_dir, "shims' sockets"),
    path_key!(
        "runc-root",
        runc_root,
        "runc's state, when a task names no other root"
    ),
    path_key!("run-dir", run_dir, "recoverd's own runtime files"),
    path_key!("history", history, "what recoverd did"),
    path_key!("proc", proc, "the kernel's processes"),
    path_key!("cgroup", cgroup, "the kernel's cgroups"),
    path_key!("fifo-dir", fifo_dir, "clients' fifos"),
    Key {
        table: "",
        name: "color",
        about: "when to colour",
        allowed: "\"auto\", \"always\" or \"never\"",
        set: |config, value| {
            config.color = match value.as_str()? {
                "auto" => Color::Auto,
                "always" => Color::Always,
                "never" => Color::Never,
                _ => return None,
            };
            Some(())
        },
        show: |config| {
            let word = match config.color {
                Color::Auto => "auto",
                Color::Always => "always",
                Color::Never => "never",
            };
            word.into()
        },
    },
    time_key!(scan "scan", "shim-deadline", shim_deadline, "200ms" to "60s",
        "in total for one shim, which is asked twice, half of this apart"),
    time_key!(scan "scan", "budget", budget, "1s" to "10m",
        "for everything that is asked in one look"),
    time_key!(scan "scan", "min-age", min_age, "0s" to "8760h",
        "leaked resources younger than this are not reported"),
    time_key!(scan "scan", "settle", settle, "0s" to "1h",
        "tasks and shims younger than this may be in transition"),
    time_key!(scan "scan", "second-look", second_look, "50ms" to "60s",
        "how long after the first look suspects are looked at again"),
    Key {
        table: "scan",
        name: "run-full",
        about: "percent of bytes or inodes from which on a file system is nearly full",
        allowed: "a whole number from 1 to 100",
        set: |config, value| {
            let number = value.as_integer()?;
            let number = u8::from_str_radix(number.as_str(), number.radix()).ok()?;
            (1..=100).contains(&number).then_some(())?;
            config.scan.run_full = number;
            Some(())
        },
        show: |config| i64::from(config.scan.run_full).into(),
    },
    Key {
        table: "adopt",
        name: "binary",
        about: "the shim that adopts; \"\" is the one beside recoverd, else in PATH",
        allowed: "an absolute path or \"\"",
        set: |config, value| {
            config.adopt.binary = match value.as_str()? {
                "" => None,
                _ => Some(absolute(value)?),
            };
            Some(())
        },
        show: |config| {
            config
                .adopt
                .binary
                .as_deref()
                .map_or_else(String::new, shown)
                .into()
        },
    },
    time_key!(adopt "adopt", "deadline", deadline, "500ms" to "60s",
        "for one successor, until it serves"),
    Key {
        table: "pre-start",
        name: "foreign",
        about: "foreign shims that hang, stopped or idle, are ended before containerd starts",
        allowed: "true or false",
        set: |config, value| {
            config.pre_start.foreign = value.as_bool()?;
            Some(())
        },
        show: |config| config.pre_start.foreign.into(),
    },
    time_key!(pre_start "pre-start", "deadline", deadline, "1s" to "10m",
        "for the whole hook"),
    Key {
        table: "repair",
        name: "max-actions",
        about: "at most so many steps in one run of repair",
        allowed: "a whole number from 1 to 10000",
        set: |config, value| {
            let number = value.as_integer()?;
            let number = u16::from_str_radix(number.as_str(), number.radix()).ok()?;
            (1..=10_000).contains(&number).then_some(())?;
            config.repair.max_actions = number;
            Some(())
        },
        show: |config| i64::from(config.repair.max_actions).into(),
    },
    Key {
        table: "supervise",
        name: "metrics-listen",
        about: "metrics by HTTP there too; \"\" is nowhere",
        allowed: "a loopback address with a port, such as \"127.0.0.1:9464\", or \"\"",
        set: |config, value| {
            config.supervise.metrics_listen = match value.as_str()? {
                "" => None,
                text => {
                    let address: SocketAddr = text.parse().ok()?;
                    // They tell everybody how many tasks there are.
                    address.ip().is_loopback().then_some(())?;
                    Some(address)
                }
            };
            Some(())
        },
        show: |config| {
            let address = config.supervise.metrics_listen;
            address.map_or_else(String::new, |a| a.to_string()).into()
        },
    },
    Key {
        table: "supervise",
        name: "textfile",
        about: "metrics for node_exporter's textfile collector; \"\" is none",
        allowed: "an absolute path or \"\"",
        set: |config, value| {
            config.supervise.textfile = match value.as_str()? {
                "" => None,
                _ => Some(absolute(value)?),
            };
            Some(())
        },
        show: |config| {
            let path = config.supervise.textfile.as_deref();
            path.map_or_else(String::new, shown).into()
        },
    },
];

/// Tables of [`KEYS`], in order.
pub(super) const TABLES: [&str; 5] = ["scan", "adopt", "pre-start", "repair", "supervise"];

/// A path as the file may give it.
pub(super) fn absolute(value: &DeValue<'_>) -> Option<PathBuf> {
    let text = value.as_str()?;
    is_sound(text).then(|| PathBuf::from(text))
}

/// Absolute, and nothing that would break a line or a system call.
pub(super) fn is_sound(path: &str) -> bool {
    path.starts_with('/') && !path.chars().any(char::is_control)
}

fn time(value: &DeValue<'_>, least: &str, most: &str) -> Option<Duration> {
    let time = parse_duration(value.as_str()?).ok()?;
    let (least, most) = (parse_duration(least).ok()?, parse_duration(most).ok()?);
    (least..=most).contains(&time).then_some(time)
}

//! The effective configuration: defaults, then `/etc/recoverd/config.toml`, then flags. Every
//! key is one row of [`KEYS`], from which reading, refusing, printing and the list of allowed
//! keys follow; where each value came from is kept, because `recoverd config` says it.
//!
//! The file is walked by hand instead of being deserialised: a refusal has to name the line, the
//! key and what is allowed, which serde's errors do only in part.

mod duration;
mod keys;

use std::{
    collections::BTreeMap,
    fmt,
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use recoverd_common::{paths, read::read_text, seen::Seen};
use toml::de::{DeTable, DeValue};

pub use duration::parse_duration;

use crate::cli::{Color, Global};
use duration::format_duration;
use keys::{KEYS, Key, PATH, TABLES, absolute, is_sound};

/// Read when no `--config` names another one.
pub const DEFAULT_FILE: &str = "/etc/recoverd/config.toml";
/// Longest file that is read, bytes; one with every key and a hundred instances has some 10 KiB.
const MAX_FILE: u64 = 256 << 10;

/// What holds for this run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// Where shims' sockets are.
    pub socket_dir: PathBuf,
    /// Where runc keeps its state when a task's options name no other root.
    pub runc_root: PathBuf,
    /// recoverd's own runtime files.
    pub run_dir: PathBuf,
    /// What recoverd did.
    pub history: PathBuf,
    /// `/proc`.
    pub proc: PathBuf,
    /// `/sys/fs/cgroup`.
    pub cgroup: PathBuf,
    /// Where clients make the fifos of their tasks.
    pub fifo_dir: PathBuf,
    /// When to colour.
    pub color: Color,
    /// Containerds that the file names, beside those that are found.
    pub containerd: Vec<Containerd>,
    /// Of looking.
    pub scan: Scan,
    /// Of successors of shims.
    pub adopt: Adopt,
    /// Of the hook before containerd's start.
    pub pre_start: PreStart,
    /// Of mending.
    pub repair: Repair,
    /// Of the daemon.
    pub supervise: Supervise,
    origin: Origin,
}

/// A `[[containerd]]` table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Containerd {
    /// Its gRPC address, a path.
    pub address: String,
    /// Its state folder.
    pub state: Option<PathBuf>,
    /// Its root folder.
    pub root: Option<PathBuf>,
    /// The line of its header.
    line: usize,
}

/// The `[scan]` table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Scan {
    /// In total for one shim, which is asked twice, half of this apart.
    pub shim_deadline: Duration,
    /// For everything that is asked in one look, containerd included.
    pub budget: Duration,
    /// Leaked resources younger than this are not reported: their task may be on its way.
    pub min_age: Duration,
    /// Tasks and shims younger than this may be in transition.
    pub settle: Duration,
    /// How long after the first look suspects are looked at again.
    pub second_look: Duration,
    /// Percent of a file system, bytes or inodes, from which on it is nearly full.
    pub run_full: u8,
}

/// The `[adopt]` table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Adopt {
    /// The shim's binary; none: the one beside recoverd, else in PATH.
    pub binary: Option<PathBuf>,
    /// For one successor, until it serves.
    pub deadline: Duration,
}

/// The `[pre-start]` table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PreStart {
    /// Foreign shims that hang are ended: `hooks::foreign`.
    pub foreign: bool,
    /// For the whole hook.
    pub deadline: Duration,
}

/// The `[repair]` table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Repair {
    /// Steps in one run.
    pub max_actions: u16,
}

/// The `[supervise]` table.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Supervise {
    /// Metrics by HTTP on this loopback address, beside the socket in the run folder.
    pub metrics_listen: Option<SocketAddr>,
    /// Metrics in this file, for node_exporter's textfile collector.
    pub textfile: Option<PathBuf>,
}

/// Where values come from.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Origin {
    file: Option<PathBuf>,
    found: bool,
    sources: BTreeMap<String, Source>,
    narrowed: Vec<(&'static str, PathBuf)>,
}

/// Where one value comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Source {
    Line(usize),
    Flag(&'static str),
}

/// Why there is no configuration. One line each; all are usage errors (exit 2).
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// The file is there, or was asked for, and cannot be read.
    #[error("read configuration {}: {why}", shown(.file))]
    File {
        /// Which.
        file: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// A line of it is no good.
    #[error("{}:{line}: {why}", shown(.file))]
    Line {
        /// Which file.
        file: PathBuf,
        /// Its line, from 1.
        line: usize,
        /// The key and what is allowed, or the syntax error.
        why: String,
    },
    /// A flag is no good.
    #[error("flag {flag}: {why}")]
    Flag {
        /// Which.
        flag: &'static str,
        /// What is allowed.
        why: String,
    },
}

impl Default for Config {
    fn default() -> Self {
        Self {
            socket_dir: paths::SOCKET_DIR.into(),
            runc_root: paths::RUNC_ROOT.into(),
            run_dir: "/run/recoverd".into(),
            history: "/var/lib/recoverd/history.jsonl".into(),
            proc: "/proc".into(),
            cgroup: "/sys/fs/cgroup".into(),
            fifo_dir: "/run/containerd/fifo".into(),
            color: Color::Auto,
            containerd: Vec::new(),
            scan: Scan {
                shim_deadline: Duration::from_secs(2),
                budget: Duration::from_secs(20),
                min_age: Duration::from_secs(600),
                settle: Duration::from_secs(10),
                second_look: Duration::from_millis(500),
                run_full: 90,
            },
            adopt: Adopt {
                binary: None,
                deadline: Duration::from_secs(5),
            },
            pre_start: PreStart {
                foreign: false,
                deadline: Duration::from_secs(20),
            },
            repair: Repair { max_actions: 50 },
            supervise: Supervise::default(),
            origin: Origin::default(),
        }
    }
}

/// The keys of a `[[containerd]]` table.
const CONTAINERD_KEYS: &str = "address, state, root";

impl Config {
    /// The configuration of this run: defaults, the file, then flags.
    ///
    /// A file that nobody asked for may be missing; any other trouble with it is an error, never
    /// a silent default: a mistyped key would otherwise look as if it held.
    pub fn load(global: &Global) -> Result<Self, ConfigError> {
        let file = (global.config.as_deref()).unwrap_or(Path::new(DEFAULT_FILE));
        let mut config = Self::default();
        config.origin.file = Some(file.to_owned());
        match read_text(file, MAX_FILE) {
            Seen::Present(text) => {
                config.origin.found = true;
                config.read(file, &text)?;
            }
            Seen::Absent if global.config.is_none() => {}
            Seen::Absent => return Err(no_file(file, "no such file")),
            Seen::Unknown(why) => return Err(no_file(file, &why)),
        }
        config.apply_flags(global)?;
        Ok(config)
    }

    /// For a hook and the supervisor: containerd's start and dying shims wait for no mended typing
    /// error. A file that is no good is left out as a whole, and told.
    pub fn load_or_default(global: &Global) -> Result<(Self, Option<ConfigError>), ConfigError> {
        match Self::load(global) {
            Ok(config) => Ok((config, None)),
            Err(error @ ConfigError::Flag { .. }) => Err(error),
            Err(error @ (ConfigError::File { .. } | ConfigError::Line { .. })) => {
                let mut config = Self::default();
                config.apply_flags(global)?;
                Ok((config, Some(error)))
            }
        }
    }

    /// `--min-age` of `scan`.
    pub fn override_min_age(&mut self, min_age: Duration) {
        self.scan.min_age = min_age;
        self.came_from("scan.min-age", Source::Flag("--min-age"));
    }

    /// `--deadline` of `pre-start`.
    pub fn override_deadline(&mut self, deadline: Duration) {
        self.pre_start.deadline = deadline;
        self.came_from("pre-start.deadline", Source::Flag("--deadline"));
    }

    fn came_from(&mut self, key: &str, source: Source) {
        self.origin.sources.insert(key.to_owned(), source);
    }

    fn apply_flags(&mut self, global: &Global) -> Result<(), ConfigError> {
        let origin = &mut self.origin;
        for (flag, key, given, field) in [
            (
                "--socket-dir",
                "socket-dir",
                &global.socket_dir,
                &mut self.socket_dir,
            ),
            (
                "--runc-root",
                "runc-root",
                &global.runc_root,
                &mut self.runc_root,
            ),
            ("--run-dir", "run-dir", &global.run_dir, &mut self.run_dir),
            ("--history", "history", &global.history, &mut self.history),
        ] {
            if let Some(path) = given {
                *field = checked_flag(flag, path)?;
                origin.sources.insert(key.to_owned(), Source::Flag(flag));
            }
        }
        if let Some(color) = global.color {
            self.color = color;
            self.came_from("color", Source::Flag("--color"));
        }
        for (flag, value) in [
            ("--address", &global.address),
            ("--state", &global.state),
            ("--root", &global.root),
        ] {
            if let Some(path) = value {
                let path = checked_flag(flag, path)?;
                self.origin.narrowed.push((flag, path));
            }
        }
        Ok(())
    }

    /// Takes over what `text`, the content of `file`, says.
    fn read(&mut self, file: &Path, text: &str) -> Result<(), ConfigError> {
        let refuse = |offset: usize, why: String| ConfigError::Line {
            file: file.to_owned(),
            line: line_of(text, offset),
            why,
        };
        let document = DeTable::parse(text).map_err(|error| {
            let span = error.span().unwrap_or_default();
            let what = text.get(span.clone()).unwrap_or_default().trim();
            let near = match what {
                "" => String::new(),
                what => format!(" at {:?}", one_line(what)),
            };
            refuse(span.start, one_line(error.message()) + &near)
        })?;
        for (name, value) in document.get_ref() {
            let (at, key) = (name.span().start, name.get_ref().as_ref());
            match (key, value.get_ref()) {
                ("containerd", DeValue::Array(entries)) => {
                    for entry in entries.iter() {
                        let line = line_of(text, entry.span().start);
                        let read = containerd(entry.get_ref(), entry.span().start, line);
                        let read = read.map_err(|(at, why)| refuse(at, why))?;
                        if self.containerd.iter().any(|c| c.address == read.address) {
                            let why = format!(
                                "containerd.address: {:?} is named twice; allowed is once",
                                read.address
                            );
                            return Err(refuse(entry.span().start, why));
                        }
                        self.containerd.push(read);
                    }
                }
                ("containerd", _) => {
                    let why = "containerd: must be [[containerd]] tables".to_owned();
                    return Err(refuse(at, why));
                }
                (key, DeValue::Table(entries)) if TABLES.contains(&key) => {
                    for (name, value) in entries {
                        let at = name.span().start;
                        self.set(key, name.get_ref(), value.get_ref(), line_of(text, at))
                            .map_err(|why| refuse(at, why))?;
                    }
                }
                (key, _) if TABLES.contains(&key) => {
                    return Err(refuse(at, format!("{key}: must be a table, [{key}]")));
                }
                (key, value) => {
                    self.set("", key, value, line_of(text, at))
                        .map_err(|why| refuse(at, why))?;
                }
            }
        }
        self.check_together()
            .map_err(|(line, why)| ConfigError::Line {
                file: file.to_owned(),
                line,
                why,
            })
    }

    fn set(
        &mut self,
        table: &str,
        name: &str,
        value: &DeValue<'_>,
        line: usize,
    ) -> Result<(), String> {
        let Some(key) = KEYS.iter().find(|k| k.table == table && k.name == name) else {
            return Err(unknown_key(table, name));
        };
        let full = key.full();
        (key.set)(self, value).ok_or_else(|| format!("{full}: must be {}", key.allowed))?;
        self.came_from(&full, Source::Line(line));
        Ok(())
    }

    /// What no key can say alone; the line of the one that was set.
    fn check_together(&self) -> Result<(), (usize, String)> {
        if self.scan.budget >= self.scan.shim_deadline {
            return Ok(());
        }
        let line_of = |key: &str| match self.origin.sources.get(key) {
            Some(Source::Line(line)) => Some(*line),
            Some(Source::Flag(_)) | None => None,
        };
        let line = line_of("scan.budget")
            .or_else(|| line_of("scan.shim-deadline"))
            .unwrap_or(1);
        let why = format!(
            "scan.budget: must be at least scan.shim-deadline, {}",
            format_duration(self.scan.shim_deadline)
        );
        Err((line, why))
    }

    fn source(&self, key: &str) -> String {
        match self.origin.sources.get(key) {
            None => "default".into(),
            Some(Source::Line(line)) => self.at_line(*line),
            Some(Source::Flag(flag)) => format!("flag {flag}"),
        }
    }

    fn at_line(&self, line: usize) -> String {
        let file = self.origin.file.as_deref().unwrap_or(Path::new(""));
        format!("{}:{line}", shown(file))
    }
}

/// The effective configuration as TOML, with a comment on each value that says where it comes
/// from. Read back as a file it gives the same values.
impl fmt::Display for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.origin.file, self.origin.found) {
            (Some(file), true) => writeln!(f, "# file: {}", shown(file))?,
            (Some(file), false) => writeln!(f, "# file: {}, not there", shown(file))?,
            (None, _) => writeln!(f, "# file: none")?,
        }
        for (flag, path) in &self.origin.narrowed {
            writeln!(f, "# flag {flag} {}: only this containerd", shown(path))?;
        }
        let print = |f: &mut fmt::Formatter<'_>, key: &Key| {
            let pair = format!("{} = {}", key.name, (key.show)(self));
            writeln!(f, "\n# {}: {}", key.about, key.allowed)?;
            writeln!(f, "{pair:<46} # {}", self.source(&key.full()))
        };
        for key in KEYS.iter().filter(|key| key.table.is_empty()) {
            print(f, key)?;
        }
        if self.containerd.is_empty() {
            writeln!(f, "\n# containerds beside those that are found")?;
            writeln!(f, "{:<46} # default", "containerd = []")?;
        }
        for containerd in &self.containerd {
            writeln!(
                f,
                "\n{:<46} # {}",
                "[[containerd]]",
                self.at_line(containerd.line)
            )?;
            let address = toml::Value::from(containerd.address.as_str());
            writeln!(f, "address = {address}")?;
            for (name, path) in [("state", &containerd.state), ("root", &containerd.root)] {
                if let Some(path) = path {
                    writeln!(f, "{name} = {}", toml::Value::from(shown(path)))?;
                }
            }
        }
        for table in TABLES {
            writeln!(f, "\n[{table}]")?;
            for key in KEYS.iter().filter(|key| key.table == table) {
                print(f, key)?;
            }
        }
        Ok(())
    }
}

fn no_file(file: &Path, why: &str) -> ConfigError {
    ConfigError::File {
        file: file.to_owned(),
        why: why.to_owned(),
    }
}

fn unknown_key(table: &str, name: &str) -> String {
    let mut allowed: Vec<String> = (KEYS.iter())
        .filter(|key| key.table == table)
        .map(|key| key.name.to_owned())
        .collect();
    let place = if table.is_empty() {
        allowed.push("[[containerd]]".to_owned());
        allowed.extend(TABLES.map(|table| format!("[{table}]")));
        String::new()
    } else {
        format!("{table}.")
    };
    format!(
        "{place}{}: unknown key; allowed are {}",
        one_line(name),
        allowed.join(", ")
    )
}

fn containerd(value: &DeValue<'_>, at: usize, line: usize) -> Result<Containerd, (usize, String)> {
    let Some(table) = value.as_table() else {
        return Err((at, "containerd: must be [[containerd]] tables".into()));
    };
    let (mut address, mut state, mut root) = (None, None, None);
    for (name, value) in table {
        let at = name.span().start;
        let place = match name.get_ref().as_ref() {
            "address" => &mut address,
            "state" => &mut state,
            "root" => &mut root,
            other => {
                let why = format!(
                    "containerd.{}: unknown key; allowed are {CONTAINERD_KEYS}",
                    one_line(other)
                );
                return Err((at, why));
            }
        };
        let path = absolute(value.get_ref());
        *place = Some(path.ok_or_else(|| {
            let why = format!("containerd.{}: must be {PATH}", name.get_ref());
            (at, why)
        })?);
    }
    let Some(address) = address else {
        return Err((at, format!("containerd.address: must be given, {PATH}")));
    };
    Ok(Containerd {
        // It came from a TOML string, so it is UTF-8.
        address: address.to_string_lossy().into_owned(),
        state,
        root,
        line,
    })
}

fn checked_flag(flag: &'static str, path: &Path) -> Result<PathBuf, ConfigError> {
    match path.to_str() {
        Some(text) if is_sound(text) => Ok(path.to_owned()),
        Some(_) | None => Err(ConfigError::Flag {
            flag,
            why: format!("{} is not allowed; must be {PATH}", shown(path)),
        }),
    }
}

/// The line, from 1, of the byte at `offset`.
fn line_of(text: &str, offset: usize) -> usize {
    let before = text.as_bytes().iter().take(offset);
    before.filter(|byte| **byte == b'\n').count() + 1
}

/// What somebody wrote, as part of one short line.
fn one_line(text: &str) -> String {
    let part = text.chars().take(120);
    part.map(|c| if c.is_control() { ' ' } else { c }).collect()
}

fn shown(path: &Path) -> String {
    path.to_string_lossy()
        .chars()
        .map(|c| if c.is_control() { '\u{fffd}' } else { c })
        .collect()
}

#[cfg(test)]
mod tests;

//! The effective configuration: defaults, then `/etc/recoverd/config.toml`, then flags. Every
//! key is one row of [`KEYS`], from which reading, refusing, printing and the list of allowed
//! keys follow; where each value came from is kept, because `recoverd config` says it.
//!
//! The file is walked by hand instead of being deserialised: a refusal has to name the line, the
//! key and what is allowed, which serde's errors do only in part.

use std::{
    collections::BTreeMap,
    fmt,
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use recoverd_common::{paths, read::read_text, seen::Seen};
use toml::de::{DeTable, DeValue};

use crate::cli::{Color, Global};

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

/// One key of the file.
struct Key {
    /// `""` for the top level.
    table: &'static str,
    name: &'static str,
    about: &'static str,
    allowed: &'static str,
    /// Stores a value; `None` when it is not allowed.
    set: fn(&mut Config, &DeValue<'_>) -> Option<()>,
    show: fn(&Config) -> toml::Value,
}

impl Key {
    fn full(&self) -> String {
        match self.table {
            "" => self.name.to_owned(),
            table => format!("{table}.{}", self.name),
        }
    }
}

const PATH: &str = "an absolute path";

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
const KEYS: &[Key] = &[
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
const TABLES: [&str; 5] = ["scan", "adopt", "pre-start", "repair", "supervise"];
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

    /// For a hook: containerd's start waits for no mended typing error. A file that is no good is
    /// left out as a whole, and told.
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
    let mut allowed: Vec<&str> = (KEYS.iter())
        .filter(|key| key.table == table)
        .map(|key| key.name)
        .collect();
    let place = if table.is_empty() {
        allowed.extend([
            "[[containerd]]",
            "[scan]",
            "[adopt]",
            "[pre-start]",
            "[repair]",
        ]);
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

/// A path as the file may give it.
fn absolute(value: &DeValue<'_>) -> Option<PathBuf> {
    let text = value.as_str()?;
    is_sound(text).then(|| PathBuf::from(text))
}

/// Absolute, and nothing that would break a line or a system call.
fn is_sound(path: &str) -> bool {
    path.starts_with('/') && !path.chars().any(char::is_control)
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

fn time(value: &DeValue<'_>, least: &str, most: &str) -> Option<Duration> {
    let time = parse_duration(value.as_str()?).ok()?;
    let (least, most) = (parse_duration(least).ok()?, parse_duration(most).ok()?);
    (least..=most).contains(&time).then_some(time)
}

/// `200ms`, `0s`, `90s`, `10m`, `2h`: a whole number and its unit.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    const ALLOWED: &str = "a whole number and ms, s, m or h, such as 200ms, 90s, 10m";
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let number: u64 = match (number.parse(), number) {
        (Ok(number), _) => number,
        (Err(_), "") => return Err(format!("must be {ALLOWED}")),
        (Err(_), _) => return Err(format!("is too long a time; must be {ALLOWED}")),
    };
    let millis = match unit {
        "ms" => Some(number),
        "s" => number.checked_mul(1000),
        "m" => number.checked_mul(60_000),
        "h" => number.checked_mul(3_600_000),
        "" => return Err(format!("has no unit; must be {ALLOWED}")),
        _ => return Err(format!("has an unknown unit; must be {ALLOWED}")),
    };
    // Times are added to the clock: nothing near the end of u64 may get there.
    const LONGEST: u64 = 100 * 365 * 24 * 3_600_000;
    match millis {
        Some(millis) if millis <= LONGEST => Ok(Duration::from_millis(millis)),
        Some(_) | None => Err(format!("is too long a time; must be {ALLOWED}")),
    }
}

/// As [`parse_duration`] reads it, in the largest unit that is exact.
pub fn format_duration(time: Duration) -> String {
    let millis = time.as_millis();
    for (unit, size) in [("h", 3_600_000), ("m", 60_000), ("s", 1000)] {
        if millis != 0 && millis.is_multiple_of(size) {
            return format!("{}{unit}", millis / size);
        }
    }
    match millis {
        0 => "0s".into(),
        _ => format!("{millis}ms"),
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
mod tests {
    use std::fs;

    use clap::Parser;

    use super::*;
    use crate::cli::Cli;

    fn global(flags: &[&str]) -> Global {
        let words = ["recoverd"].iter().chain(flags).chain(&["config"]);
        Cli::try_parse_from(words).unwrap().global
    }

    fn read(text: &str) -> Result<Config, ConfigError> {
        let mut config = Config::default();
        let file = Path::new("/etc/recoverd/config.toml");
        config.origin.file = Some(file.to_owned());
        config.origin.found = true;
        config.read(file, text)?;
        Ok(config)
    }

    const FULL: &str = r#"
        socket-dir = "/a/s"
        runc-root = "/a/runc"
        run-dir = "/a/run"
        history = "/a/history.jsonl"
        proc = "/a/proc"
        cgroup = "/a/cgroup"
        fifo-dir = "/a/fifo"
        color = "never"

        [[containerd]]
        address = "/a/containerd.sock"
        state = "/a/state"
        root = "/a/root"
        [[containerd]]
        address = "/b/containerd.sock"

        [scan]
        shim-deadline = "200ms"
        budget = "10m"
        min-age = "0s"
        settle = "90s"
        second-look = "1s"
        run-full = 80

        [adopt]
        binary = "/a/shim"
        deadline = "9s"

        [pre-start]
        foreign = true
        deadline = "45s"

        [repair]
        max-actions = 7

        [supervise]
        metrics-listen = "127.0.0.1:9464"
        textfile = "/a/recoverd.prom"
    "#;

    #[test]
    fn every_key_is_read_and_what_is_printed_reads_back_the_same() {
        let config = read(FULL).unwrap();
        assert_eq!(config.scan.shim_deadline, Duration::from_millis(200));
        assert_eq!((config.scan.run_full, config.color), (80, Color::Never));
        assert_eq!(config.containerd.len(), 2);
        assert!(config.pre_start.foreign);
        for key in KEYS {
            assert_ne!(
                (key.show)(&config),
                (key.show)(&Config::default()),
                "the test's file sets {} to its default",
                key.full()
            );
        }
        let printed = config.to_string();
        let mut again = read(&printed).unwrap();
        assert_eq!(again.containerd.len(), 2);
        again.origin = config.origin.clone();
        for (new, old) in again.containerd.iter_mut().zip(&config.containerd) {
            new.line = old.line;
        }
        assert_eq!(again, config);
        assert!(read(&Config::default().to_string()).is_ok());
    }

    #[test]
    fn each_value_says_where_it_comes_from() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("config.toml");
        let name = file.to_str().unwrap();
        fs::write(&file, "color = \"always\"\n[scan]\nbudget = \"30s\"\n").unwrap();
        let flags = ["--config", name, "--run-dir", "/x", "--address", "/y"];
        let printed = Config::load(&global(&flags)).unwrap().to_string();
        let line = |key: &str| {
            let start = format!("{key} = ");
            let line = printed.lines().find(|line| line.starts_with(&start));
            line.unwrap().to_owned()
        };
        assert!(line("color").ends_with(&format!("# {name}:1")));
        assert!(line("budget").ends_with(&format!("# {name}:3")));
        assert!(line("run-dir").ends_with("# flag --run-dir"));
        assert!(line("settle").ends_with("# default"));
        assert!(printed.contains("# flag --address /y: only this containerd"));
    }

    #[test]
    fn a_bad_file_is_refused_in_one_line_that_names_line_key_and_what_is_allowed() {
        for (text, line, words) in [
            ("\nsocketdir = \"/x\"", 2, ["socketdir", "socket-dir"]),
            ("socket-dir = \"x\"", 1, ["socket-dir", "absolute path"]),
            ("socket-dir = 1", 1, ["socket-dir", "absolute path"]),
            ("proc = \"/a\\nb\"", 1, ["proc", "absolute path"]),
            ("color = \"pink\"", 1, ["color", "\"never\""]),
            ("scan = 1", 1, ["scan", "table"]),
            ("[scan]\nbudget = 20", 2, ["scan.budget", "from 1s to 10m"]),
            ("[scan]\n\nbudget = \"11m\"", 3, ["scan.budget", "10m"]),
            (
                "[scan]\nshim-deadline = \"199ms\"",
                2,
                ["shim-deadline", "200ms"],
            ),
            (
                "[scan]\nbudget = \"1s\"",
                2,
                ["scan.budget", "shim-deadline, 2s"],
            ),
            (
                "[scan]\nshim-deadline = \"30s\"",
                2,
                ["budget", "shim-deadline, 30s"],
            ),
            ("[scan]\nrun-full = 0", 2, ["scan.run-full", "1 to 100"]),
            (
                "[scan]\nrun-full = 99999999999999999999",
                2,
                ["run-full", "100"],
            ),
            (
                "[scan]\nrun-full = 9.5",
                2,
                ["scan.run-full", "whole number"],
            ),
            ("[scan]\nfast = true", 2, ["scan.fast", "run-full"]),
            (
                "[pre-start]\nforeign = \"yes\"",
                2,
                ["foreign", "true or false"],
            ),
            ("[prestart]\nforeign = true", 1, ["prestart", "[pre-start]"]),
            ("containerd = 3", 1, ["containerd", "[[containerd]]"]),
            ("containerd = [3]", 1, ["containerd", "[[containerd]]"]),
            (
                "[[containerd]]\nstate = \"/x\"",
                1,
                ["containerd.address", "given"],
            ),
            (
                "[[containerd]]\nadress = \"/x\"",
                2,
                ["containerd.adress", "address"],
            ),
            (
                "[[containerd]]\naddress = \"x\"",
                2,
                ["containerd.address", "absolute"],
            ),
            (
                "[[containerd]]\naddress = \"/x\"\n[[containerd]]\naddress = \"/x\"",
                3,
                ["containerd.address", "twice"],
            ),
            (
                "color = \"auto\"\ncolor = \"auto\"",
                2,
                ["color", "duplicate"],
            ),
            ("a\n= 1", 1, ["config.toml:1", ""]),
            ("\n\n[scan", 3, ["config.toml:3", ""]),
        ] {
            let error = read(text).unwrap_err();
            let ConfigError::Line { line: found, .. } = &error else {
                panic!("{text:?}: {error}");
            };
            let said = error.to_string();
            assert_eq!(*found, line, "{text:?}: {said}");
            assert!(!said.contains('\n'), "{text:?}: {said}");
            for word in words {
                assert!(said.contains(word), "{text:?} should say {word:?}: {said}");
            }
        }
    }

    #[test]
    fn a_file_that_was_asked_for_must_be_there_and_be_a_regular_one() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
        fs::write(at("real"), "").unwrap();
        std::os::unix::fs::symlink(at("real"), at("link")).unwrap();
        nix::unistd::mkfifo(at("fifo").as_str(), nix::sys::stat::Mode::S_IRWXU).unwrap();
        fs::write(at("latin"), b"\xe4").unwrap();
        fs::write(at("large"), " ".repeat(300 << 10)).unwrap();
        assert!(Config::load(&global(&["--config", &at("real")])).is_ok());
        for name in ["none", "link", "fifo", "latin", "large", "."] {
            let error = Config::load(&global(&["--config", &at(name)])).unwrap_err();
            assert!(matches!(error, ConfigError::File { .. }), "{name}: {error}");
            assert!(error.to_string().contains(dir.path().to_str().unwrap()));
        }
    }

    #[test]
    fn flags_hold_over_the_file_and_must_be_absolute() {
        let load = |flags: &[&str]| {
            let mut config = Config::default();
            config.apply_flags(&global(flags)).map(|()| config)
        };
        let config = load(&["--socket-dir", "/x/s"]).unwrap();
        assert_eq!(config.socket_dir, Path::new("/x/s"));
        let error = load(&["--runc-root", "here"]).unwrap_err();
        let said = "flag --runc-root: here is not allowed; must be an absolute path";
        assert_eq!(error.to_string(), said);
        assert!(load(&["--state", "x"]).is_err());
    }

    #[test]
    fn times_are_read_and_printed_alike() {
        for (text, millis, printed) in [
            ("200ms", 200, "200ms"),
            ("0s", 0, "0s"),
            ("0ms", 0, "0s"),
            ("90s", 90_000, "90s"),
            ("60s", 60_000, "1m"),
            ("10m", 600_000, "10m"),
            ("2h", 7_200_000, "2h"),
        ] {
            let time = Duration::from_millis(millis);
            assert_eq!(parse_duration(text), Ok(time), "{text}");
            assert_eq!(format_duration(time), printed);
        }
        for (text, word) in [
            ("", "whole number"),
            ("s", "whole number"),
            ("-1s", "whole number"),
            ("1.5s", "unit"),
            ("10", "no unit"),
            ("10d", "unknown unit"),
            ("10 s", "unknown unit"),
            ("5mm", "unknown unit"),
            ("99999999999999999999s", "too long"),
            ("18446744073709551615h", "too long"),
            ("18446744073709551615ms", "too long"),
        ] {
            let error = parse_duration(text).unwrap_err();
            assert!(error.contains(word), "{text:?}: {error}");
        }
    }
}

//! The runtime's options: from the `Any` of a request to what the shim uses, and to and from the
//! two files that the stock shim keeps of them in the bundle.
//!
//! Three senders word them differently. containerd's own runc options come as
//! `containerd.runc.v1.Options`. The CRI, for every runtime that is not literally
//! `io.containerd.runc.v2`, sends `runtimeoptions.v1.Options`, whose TOML (`config_body`, from
//! 1.7 on) or file (`config_path`, all that 1.6 passes on) has the same words. And `options.json`,
//! the copy in the bundle, is Go's JSON of the first.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use prost::Message;
use prost_types::Any;
use recoverd_common::{
    paths,
    pb::{runc, runtimeoptions, type_url},
    read::{read_file, read_text},
    seen::Seen,
};
use serde::{Deserialize, Serialize};

/// The binary that is run when the options name none, looked up in `PATH`.
pub const DEFAULT_BINARY: &str = "runc";
/// Longest options file that is read, bytes; real ones are below one KiB.
const MAX_OPTIONS: u64 = 64 << 10;
const JSON_FILE: &str = "options.json";
const BINARY_FILE: &str = "runtime";

/// containerd's runc options, as they are kept in `options.json` (Go leaves out empty ones).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Options {
    /// `runc create --no-pivot`.
    #[serde(skip_serializing_if = "is_default")]
    pub no_pivot_root: bool,
    /// `runc create --no-new-keyring`.
    #[serde(skip_serializing_if = "is_default")]
    pub no_new_keyring: bool,
    /// Where `start` moves the daemon: a v1 path below each controller, or a v2 group.
    #[serde(skip_serializing_if = "is_default")]
    pub shim_cgroup: String,
    /// Owner of the pipes of stdio.
    #[serde(skip_serializing_if = "is_default")]
    pub io_uid: u32,
    /// As above.
    #[serde(skip_serializing_if = "is_default")]
    pub io_gid: u32,
    /// The OCI runtime; see [`Options::binary`].
    #[serde(skip_serializing_if = "is_default")]
    pub binary_name: String,
    /// The OCI runtime's root without the namespace; see [`Options::root`].
    #[serde(skip_serializing_if = "is_default")]
    pub root: String,
    /// `runc --criu`. Only containerd 1.x knows it.
    #[serde(skip_serializing_if = "is_default")]
    pub criu_path: String,
    /// `runc --systemd-cgroup`.
    #[serde(skip_serializing_if = "is_default")]
    pub systemd_cgroup: bool,
    /// Where checkpoints are written when the request names no place.
    #[serde(skip_serializing_if = "is_default")]
    pub criu_image_path: String,
    /// CRIU's work folder.
    #[serde(skip_serializing_if = "is_default")]
    pub criu_work_path: String,
    /// Of other shims (2.x); kept so that the file says what was asked.
    #[serde(skip_serializing_if = "is_default")]
    pub task_api_address: String,
    /// As above.
    #[serde(skip_serializing_if = "is_default")]
    pub task_api_version: u32,
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// Why options are refused.
#[derive(Debug, thiserror::Error)]
pub enum OptionsError {
    /// Neither of the two types.
    #[error(
        "options of unknown type {0:?} (allowed: {runc}, {cri})",
        runc = type_url::RUNC_OPTIONS,
        cri = type_url::RUNTIME_OPTIONS
    )]
    UnknownType(String),
    /// The bytes are not what the type says.
    #[error("decode options of type {kind}: {cause}")]
    Undecodable {
        /// The type.
        kind: &'static str,
        /// What the decoder says.
        cause: String,
    },
    /// `config_path` cannot be read.
    #[error("read runtime options {}: {cause}", path.display())]
    Unreadable {
        /// `config_path`.
        path: PathBuf,
        /// Why not.
        cause: String,
    },
    /// The TOML is broken, or a value has the wrong type.
    #[error("runtime options {place}: line {line}: {cause}")]
    Config {
        /// `config_body` or the path.
        place: String,
        /// Counted from one.
        line: usize,
        /// What is wrong and what is allowed.
        cause: String,
    },
    /// The copy in the bundle could not be written or read.
    #[error("{verb} {}: {cause}", path.display())]
    File {
        /// `read` or `write`.
        verb: &'static str,
        /// The file.
        path: PathBuf,
        /// Why not.
        cause: String,
    },
}

impl Options {
    /// The options of a request: none at all and an `Any` without value (1.7 on) are the defaults.
    pub fn from_request(any: Option<&Any>) -> Result<Self, OptionsError> {
        let Some(any) = any else {
            return Ok(Self::default());
        };
        if any.value.is_empty() {
            return Ok(Self::default());
        }
        // containerd writes type URLs bare; other clients of protobuf put a host before them.
        match bare(&any.type_url) {
            type_url::RUNC_OPTIONS => {
                let options = runc::Options::decode(any.value.as_slice())
                    .map_err(|e| undecodable(type_url::RUNC_OPTIONS, &e))?;
                Ok(Self::from(options))
            }
            type_url::RUNTIME_OPTIONS => {
                let options = runtimeoptions::Options::decode(any.value.as_slice())
                    .map_err(|e| undecodable(type_url::RUNTIME_OPTIONS, &e))?;
                Self::from_runtime_options(&options)
            }
            _ => Err(OptionsError::UnknownType(any.type_url.clone())),
        }
    }

    /// `type_url` says what the CRI's configuration calls the content; containerd fills it with
    /// its own type or leaves it empty, and the stock runtime's words are all we can read.
    fn from_runtime_options(options: &runtimeoptions::Options) -> Result<Self, OptionsError> {
        if !options.config_path.is_empty() {
            let path = PathBuf::from(&options.config_path);
            return match read_text(&path, MAX_OPTIONS) {
                Seen::Present(text) => from_toml(&text, &options.config_path),
                Seen::Absent => Err(OptionsError::Unreadable {
                    path,
                    cause: "no such file".into(),
                }),
                Seen::Unknown(cause) => Err(OptionsError::Unreadable { path, cause }),
            };
        }
        match std::str::from_utf8(&options.config_body) {
            Ok(text) => from_toml(text, "config_body"),
            Err(e) => Err(undecodable(type_url::RUNTIME_OPTIONS, &e)),
        }
    }

    /// The OCI runtime to execute.
    pub fn binary(&self) -> &str {
        if self.binary_name.is_empty() {
            DEFAULT_BINARY
        } else {
            &self.binary_name
        }
    }

    /// The OCI runtime's `--root` for `namespace`.
    pub fn root(&self, namespace: &str) -> PathBuf {
        let root = if self.root.is_empty() {
            paths::RUNC_ROOT
        } else {
            &self.root
        };
        Path::new(root).join(namespace)
    }

    /// Writes `options.json` and `runtime`, as the stock shim does at Create: its `delete`, and
    /// ours, read them when nobody can be asked any more.
    pub fn write(&self, bundle: &Path) -> Result<(), OptionsError> {
        let json = serde_json::to_vec(self).map_err(|e| OptionsError::File {
            verb: "write",
            path: bundle.join(JSON_FILE),
            cause: e.to_string(),
        })?;
        write_private(&bundle.join(JSON_FILE), &json)?;
        write_private(&bundle.join(BINARY_FILE), self.binary_name.as_bytes())
    }

    /// Reads what [`Options::write`] (or the stock shim) left in `bundle`; *absent* when neither
    /// file is there.
    pub fn read(bundle: &Path) -> Seen<Self> {
        let options = read_file(&bundle.join(JSON_FILE), MAX_OPTIONS).and_then(|bytes| {
            match serde_json::from_slice::<Self>(&bytes) {
                Ok(options) => Seen::Present(options),
                Err(e) => Seen::Unknown(format!("{JSON_FILE}: {e}")),
            }
        });
        let binary = read_text(&bundle.join(BINARY_FILE), MAX_OPTIONS);
        match (options, binary) {
            (Seen::Present(mut options), Seen::Present(binary)) => {
                // The stock shim lets `runtime` decide.
                options.binary_name = binary;
                Seen::Present(options)
            }
            (Seen::Present(options), Seen::Absent | Seen::Unknown(_)) => Seen::Present(options),
            (Seen::Absent, Seen::Present(binary_name)) => Seen::Present(Self {
                binary_name,
                ..Self::default()
            }),
            (Seen::Absent, Seen::Absent) => Seen::Absent,
            (Seen::Unknown(why), _) | (Seen::Absent, Seen::Unknown(why)) => Seen::Unknown(why),
        }
    }
}

/// The type's name without `type.googleapis.com/` or any other host.
pub fn bare(type_url: &str) -> &str {
    type_url.rsplit('/').next().unwrap_or(type_url)
}

fn undecodable(kind: &'static str, cause: &dyn std::error::Error) -> OptionsError {
    OptionsError::Undecodable {
        kind,
        cause: cause.to_string(),
    }
}

fn write_private(path: &Path, bytes: &[u8]) -> Result<(), OptionsError> {
    use std::{io::Write as _, os::unix::fs::OpenOptionsExt as _};
    let written = fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .custom_flags(nix::libc::O_NOFOLLOW)
        .open(path)
        .and_then(|mut file| file.write_all(bytes));
    written.map_err(|e: io::Error| OptionsError::File {
        verb: "write",
        path: path.to_owned(),
        cause: e.to_string(),
    })
}

impl From<runc::Options> for Options {
    fn from(o: runc::Options) -> Self {
        Self {
            no_pivot_root: o.no_pivot_root,
            no_new_keyring: o.no_new_keyring,
            shim_cgroup: o.shim_cgroup,
            io_uid: o.io_uid,
            io_gid: o.io_gid,
            binary_name: o.binary_name,
            root: o.root,
            criu_path: o.criu_path,
            systemd_cgroup: o.systemd_cgroup,
            criu_image_path: o.criu_image_path,
            criu_work_path: o.criu_work_path,
            task_api_address: o.task_api_address,
            task_api_version: o.task_api_version,
        }
    }
}

/// Reads `Key = value` lines. A whole TOML library would be a tenth of the shim's memory for a
/// dozen flat keys that containerd itself has just serialised; what is not flat (a table, an
/// array, a multi-line string) belongs to keys that no runc shim knows, and is skipped as the
/// stock shim's decoder skips unknown keys. A known key with a value of the wrong type is an error.
fn from_toml(text: &str, place: &str) -> Result<Options, OptionsError> {
    let mut options = Options::default();
    for (index, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.starts_with('[') {
            // A table: nothing of ours can follow.
            break;
        }
        let Some((key, value)) = line.split_once('=').filter(|_| !line.starts_with('#')) else {
            continue;
        };
        let key = key.trim().trim_matches('"');
        set(&mut options, key, value.trim()).map_err(|expected| OptionsError::Config {
            place: place.to_owned(),
            line: index.saturating_add(1),
            cause: format!("{key} is not {expected}"),
        })?;
    }
    Ok(options)
}

/// Sets one key. Both spellings count: the CRI's configuration has Go's field names, `options.json`
/// the proto's. Unknown keys are ignored.
fn set(options: &mut Options, key: &str, value: &str) -> Result<(), &'static str> {
    match key {
        "NoPivotRoot" | "no_pivot_root" => options.no_pivot_root = toml_boolean(value)?,
        "NoNewKeyring" | "no_new_keyring" => options.no_new_keyring = toml_boolean(value)?,
        "ShimCgroup" | "shim_cgroup" => options.shim_cgroup = toml_string(value)?,
        "IoUid" | "io_uid" => options.io_uid = toml_number(value)?,
        "IoGid" | "io_gid" => options.io_gid = toml_number(value)?,
        "BinaryName" | "binary_name" => options.binary_name = toml_string(value)?,
        "Root" | "root" => options.root = toml_string(value)?,
        "CriuPath" | "criu_path" => options.criu_path = toml_string(value)?,
        "SystemdCgroup" | "systemd_cgroup" => options.systemd_cgroup = toml_boolean(value)?,
        "CriuImagePath" | "criu_image_path" => options.criu_image_path = toml_string(value)?,
        "CriuWorkPath" | "criu_work_path" => options.criu_work_path = toml_string(value)?,
        "TaskApiAddress" | "task_api_address" => options.task_api_address = toml_string(value)?,
        "TaskApiVersion" | "task_api_version" => options.task_api_version = toml_number(value)?,
        _ => {}
    }
    Ok(())
}

/// The part before a comment; only for values without quotes.
fn uncommented(value: &str) -> &str {
    value.split('#').next().unwrap_or(value).trim()
}

fn toml_boolean(value: &str) -> Result<bool, &'static str> {
    match uncommented(value) {
        "true" => Ok(true),
        "false" => Ok(false),
        _ => Err("true or false"),
    }
}

fn toml_number(value: &str) -> Result<u32, &'static str> {
    uncommented(value)
        .replace('_', "")
        .parse()
        .map_err(|_| "a number from 0 to 4294967295")
}

fn toml_string(value: &str) -> Result<String, &'static str> {
    const EXPECTED: &str = "a string in quotes on one line";
    if let Some(rest) = value.strip_prefix('\'') {
        let (text, after) = rest.split_once('\'').ok_or(EXPECTED)?;
        return ends(after).then(|| text.to_owned()).ok_or(EXPECTED);
    }
    let mut text = String::new();
    let mut rest = value.strip_prefix('"').ok_or(EXPECTED)?.chars();
    loop {
        match rest.next().ok_or(EXPECTED)? {
            '"' => return ends(rest.as_str()).then_some(text).ok_or(EXPECTED),
            '\\' => text.push(match rest.next().ok_or(EXPECTED)? {
                'n' => '\n',
                't' => '\t',
                'r' => '\r',
                'b' => '\u{8}',
                'f' => '\u{c}',
                same @ ('"' | '\\') => same,
                'u' => unicode(&mut rest, 4).ok_or(EXPECTED)?,
                'U' => unicode(&mut rest, 8).ok_or(EXPECTED)?,
                _ => return Err(EXPECTED),
            }),
            c => text.push(c),
        }
    }
}

fn ends(after: &str) -> bool {
    let after = after.trim();
    after.is_empty() || after.starts_with('#')
}

fn unicode(rest: &mut std::str::Chars<'_>, digits: usize) -> Option<char> {
    let mut code: u32 = 0;
    for _ in 0..digits {
        code = code
            .checked_mul(16)?
            .checked_add(rest.next()?.to_digit(16)?)?;
    }
    char::from_u32(code)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn any(type_url: &str, message: &impl Message) -> Any {
        Any {
            type_url: type_url.into(),
            value: message.encode_to_vec(),
        }
    }

    #[test]
    fn both_types_are_understood_with_and_without_a_host_before_their_name() {
        let message = runc::Options {
            binary_name: "/usr/bin/crun".into(),
            systemd_cgroup: true,
            io_uid: 7,
            ..Default::default()
        };
        let expected = Options {
            binary_name: "/usr/bin/crun".into(),
            systemd_cgroup: true,
            io_uid: 7,
            ..Default::default()
        };
        for url in [
            "containerd.runc.v1.Options",
            "type.googleapis.com/containerd.runc.v1.Options",
        ] {
            assert_eq!(
                Options::from_request(Some(&any(url, &message))).unwrap(),
                expected
            );
        }
        // As containerd 1.7 writes it (go-toml): two spaces of indentation are possible.
        let body = "BinaryName = \"/usr/bin/crun\"\nCriuImagePath = \"\"\nIoUid = 7\n  SystemdCgroup = true # x\n";
        let message = runtimeoptions::Options {
            config_body: body.into(),
            ..Default::default()
        };
        let url = "runtimeoptions.v1.Options";
        assert_eq!(
            Options::from_request(Some(&any(url, &message))).unwrap(),
            expected
        );

        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("options.toml");
        fs::write(
            &path,
            "binary_name = '/usr/bin/crun'\nio_uid = 7\nsystemd_cgroup=true\n",
        )
        .unwrap();
        let message = runtimeoptions::Options {
            config_path: path.to_str().unwrap().into(),
            ..Default::default()
        };
        assert_eq!(
            Options::from_request(Some(&any(url, &message))).unwrap(),
            expected
        );
    }

    #[test]
    fn no_options_and_empty_options_are_the_defaults() {
        let defaults = Options::default();
        assert_eq!(Options::from_request(None).unwrap(), defaults);
        assert_eq!(
            Options::from_request(Some(&Any::default())).unwrap(),
            defaults
        );
        let empty = any("whatever", &runc::Options::default());
        assert_eq!(Options::from_request(Some(&empty)).unwrap(), defaults);
        assert_eq!(defaults.binary(), "runc");
        assert_eq!(defaults.root("ns"), Path::new("/run/containerd/runc/ns"));
    }

    #[test]
    fn what_cannot_be_understood_is_named_in_one_line() {
        let cri = |body: &str| {
            any(
                "runtimeoptions.v1.Options",
                &runtimeoptions::Options {
                    config_body: body.into(),
                    ..Default::default()
                },
            )
        };
        let missing = any(
            "runtimeoptions.v1.Options",
            &runtimeoptions::Options {
                config_path: "/nonexistent/x".into(),
                ..Default::default()
            },
        );
        for (any, says) in [
            (
                Any {
                    type_url: "windows.Options".into(),
                    value: vec![1],
                },
                "unknown type \"windows.Options\"",
            ),
            (
                Any {
                    type_url: "containerd.runc.v1.Options".into(),
                    value: vec![0xff; 9],
                },
                "decode options",
            ),
            (
                cri("\n\nSystemdCgroup = 1"),
                "config_body: line 3: SystemdCgroup is not true or false",
            ),
            (
                cri("BinaryName = runc"),
                "line 1: BinaryName is not a string in quotes",
            ),
            (cri("Root = \"/x"), "line 1: Root is not a string"),
            (cri("IoUid = -1"), "line 1: IoUid is not a number"),
            (missing, "read runtime options /nonexistent/x: no such file"),
        ] {
            let said = Options::from_request(Some(&any)).unwrap_err().to_string();
            assert!(said.contains(says) && !said.contains('\n'), "{said}");
        }
    }

    #[test]
    fn strings_are_read_as_toml_has_them() {
        for (written, read) in [
            (r#""a\"b\\c\u0041" # comment"#, Some("a\"b\\cA")),
            (r"'C:\x' # y", Some(r"C:\x")),
            (r#""a" b"#, None),
            (r#""\q""#, None),
            (r#""\uD800""#, None),
            (r#"""""#, None),
            ("'", None),
        ] {
            assert_eq!(toml_string(written).ok().as_deref(), read, "{written}");
        }
        let unknown = "Other = [\n \"a\",\n]\nBinaryName = 'x'\n[sub]\nBinaryName = 'y'\n";
        assert_eq!(from_toml(unknown, "t").unwrap().binary_name, "x");
    }

    #[test]
    fn the_files_in_the_bundle_are_the_stock_shims() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Options::read(dir.path()), Seen::Absent);
        // Recorded from containerd 1.6.20 with the default runtime, and with options.
        fs::write(dir.path().join("options.json"), "{}").unwrap();
        fs::write(dir.path().join("runtime"), "").unwrap();
        assert_eq!(Options::read(dir.path()), Seen::Present(Options::default()));
        let json = br#"{"binary_name":"runc","root":"/run/x","systemd_cgroup":true}"#;
        fs::write(dir.path().join("options.json"), json).unwrap();
        fs::write(dir.path().join("runtime"), "runc").unwrap();
        let options = Options::read(dir.path()).present().cloned().unwrap();
        assert!(options.systemd_cgroup && options.root == "/run/x");
        options.write(dir.path()).unwrap();
        assert_eq!(fs::read(dir.path().join("options.json")).unwrap(), json);
        assert_eq!(fs::read(dir.path().join("runtime")).unwrap(), b"runc");

        fs::write(dir.path().join("options.json"), "{").unwrap();
        assert!(matches!(Options::read(dir.path()), Seen::Unknown(_)));
        fs::remove_file(dir.path().join("options.json")).unwrap();
        assert!(matches!(Options::read(dir.path()), Seen::Present(o) if o.binary_name == "runc"));
    }

    proptest! {
        #[test]
        fn no_text_and_no_bytes_panic(text in "\\PC{0,60}", bytes: Vec<u8>) {
            let _ = from_toml(&format!("BinaryName = {text}\n{text}"), "x");
            let _ = toml_string(&text);
            for type_url in [type_url::RUNC_OPTIONS, type_url::RUNTIME_OPTIONS] {
                let any = Any { type_url: type_url.into(), value: bytes.clone() };
                let _ = Options::from_request(Some(&any));
            }
        }

        #[test]
        fn every_string_survives_its_quotes(text: String) {
            let mut quoted = String::from("\"");
            for c in text.chars() {
                match c {
                    '"' | '\\' => quoted.extend(['\\', c]),
                    c if c.is_control() => quoted.push_str(&format!("\\u{:04X}", u32::from(c))),
                    c => quoted.push(c),
                }
            }
            quoted.push('"');
            prop_assert_eq!(toml_string(&quoted), Ok(text));
        }
    }
}

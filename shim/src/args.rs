//! The command line, as containerd passes it to every runc shim: Go's `flag` conventions, then at
//! most one action. Pure.
//!
//! Go accepts `-flag`, `--flag`, `-flag value` and `-flag=value` (booleans only the last form),
//! and stops at the first word that is no flag. containerd 1.6 to 2.4 pass
//! `-namespace NS -address A -publish-binary P -id ID [-bundle B] [-debug] start|delete`; the
//! daemon runs without an action. A flag that nobody defines is exit status 2 in Go, and here.

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
};

use recoverd_common::ids::{Id, InvalidId, Namespace};

/// What this invocation is to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Invocation {
    /// `start`: make sure that a shim serves this task's group, print its address.
    Start(Flags),
    /// `delete`: clean up after a task whose shim is gone.
    Delete(Flags),
    /// `adopt`: take over the tasks of a shim that is gone.
    Adopt(Flags),
    /// `tell`: send what a dead shim could not; ours, started by `delete`.
    Tell(Flags),
    /// Write what comes on standard input to a log file.
    Copy,
    /// Hold a client's fifos until they are let go.
    Hold,
    /// No action: be the shim.
    Serve(Flags),
    /// `-adopt`: be the shim that takes over.
    Successor(Flags),
    /// `-handoff=N`: be the shim that goes on in this process, from the message at descriptor N.
    GoOn(Flags, i32),
    /// `-handoff-check`: say whether this executable reads the message on standard input.
    HandoffCheck,
    /// `-v`.
    Version,
    /// `-info`.
    RuntimeInfo,
    /// `-h`.
    Help,
    /// `-failpoints`, of builds for tests only.
    #[cfg(feature = "failpoints")]
    Failpoints,
}

/// The flags of the actions that concern one task.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Flags {
    /// `-namespace`.
    pub namespace: Namespace,
    /// `-id`: the task for `start` and `delete`, the group's first task for the daemon.
    pub id: Id,
    /// `-address`: containerd's grpc address, a path without scheme; part of the socket's name.
    pub address: String,
    /// `-bundle`, of `delete` only.
    pub bundle: Option<PathBuf>,
    /// `-socket`: serve here instead of on the inherited descriptor.
    pub socket: Option<PathBuf>,
    /// `-group`: ours, given to the daemon when the group is not named like its first task.
    pub group: Option<String>,
    /// `-debug`: containerd logs at debug level.
    pub debug: bool,
}

/// Why a command line is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Go's text for it.
    #[error("flag provided but not defined: -{0} (allowed: {FLAG_NAMES})")]
    UnknownFlag(String),
    /// `-` or `-=x` and the like.
    #[error("bad flag syntax: {0:?}")]
    Syntax(String),
    /// The last word is a flag that wants a value.
    #[error("flag needs an argument: -{0}")]
    NoValue(&'static str),
    /// `-debug=maybe`.
    #[error("invalid boolean value {value:?} for -{flag} (allowed: true, false)")]
    NotBoolean {
        /// The flag.
        flag: &'static str,
        /// Its value.
        value: String,
    },
    /// `-handoff=x`.
    #[error("-handoff wants the number of a descriptor, above 2")]
    NotADescriptor,
    /// Neither `start` nor `delete`.
    #[error("unknown action {0:?} (allowed: start, delete, adopt, tell, or none to serve)")]
    UnknownAction(String),
    /// containerd never passes such.
    #[error("argument {0:?} is not valid UTF-8")]
    NotText(OsString),
    /// As the stock shim words it.
    #[error("shim namespace cannot be empty")]
    NoNamespace,
    /// As above.
    #[error("shim id cannot be empty")]
    NoId,
    /// A path or an option where a name belongs.
    #[error(transparent)]
    InvalidId(#[from] InvalidId),
}

impl Refusal {
    /// Exit status: 2 for what Go's `flag` package refuses, 1 for what the stock shim does.
    pub fn exit_status(&self) -> u8 {
        match self {
            Refusal::UnknownFlag(_)
            | Refusal::Syntax(_)
            | Refusal::NoValue(_)
            | Refusal::NotBoolean { .. }
            | Refusal::NotADescriptor
            | Refusal::UnknownAction(_)
            | Refusal::NotText(_) => 2,
            Refusal::NoNamespace | Refusal::NoId | Refusal::InvalidId(_) => 1,
        }
    }
}

const FLAG_NAMES: &str = "-address -adopt -bundle -debug -debug-socket -group -handoff -handoff-check \
                          -id -info -namespace -publish-binary -socket -v -version";

/// What `-h` prints.
pub const HELP: &str = "\
containerd-shim-recoverd-v1: a containerd shim for runc that survives upgrades and crashes.

containerd runs it; by hand only -v and -info are of use.

  -namespace NS -address A -id ID [-debug] start             serve a task, print the address
  -namespace NS -address A -id ID -bundle B [-debug] delete  clean up after a task
  -namespace NS -address A -id ID [-debug] adopt             serve the tasks of a shim that is
                                                             gone (recoverd runs it)
  -namespace NS -address A -id ID -socket S tell             send the events that a shim has left
                                                             behind (delete runs it)
  -namespace NS -id ID hold                                  keep what a client reads from ending
                                                             with the shim (the shim runs it)
  -namespace NS -id ID copy                                  write output to a file (the shim runs it)
  -v        print the version
  -info     print what this runtime can do, as protobuf (options on standard input)

Exit status: 0 done, 1 failed, 2 wrong usage, 3 (adopt) somebody else serves them. Errors are one line on standard error.
";

/// Where a flag's value goes.
enum Flag {
    Text(&'static str),
    Boolean(&'static str),
}

/// Every flag that some release of containerd's runc shim knows, and `-group`.
fn flag(name: &str) -> Option<Flag> {
    Some(match name {
        "address" => Flag::Text("address"),
        "bundle" => Flag::Text("bundle"),
        "debug-socket" => Flag::Text("debug-socket"),
        "group" => Flag::Text("group"),
        "handoff" => Flag::Text("handoff"),
        "handoff-check" => Flag::Boolean("handoff-check"),
        "id" => Flag::Text("id"),
        "namespace" => Flag::Text("namespace"),
        "publish-binary" => Flag::Text("publish-binary"),
        "socket" => Flag::Text("socket"),
        "adopt" => Flag::Boolean("adopt"),
        "debug" => Flag::Boolean("debug"),
        "info" => Flag::Boolean("info"),
        "v" | "version" => Flag::Boolean("v"),
        "h" | "help" => Flag::Boolean("help"),
        #[cfg(feature = "failpoints")]
        "failpoints" => Flag::Boolean("failpoints"),
        _ => return None,
    })
}

/// What was given, before it is checked.
#[derive(Default)]
struct Given {
    address: String,
    bundle: String,
    group: String,
    handoff: String,
    id: String,
    namespace: String,
    socket: String,
    adopt: bool,
    handoff_check: bool,
    debug: bool,
    info: bool,
    version: bool,
    help: bool,
    #[cfg(feature = "failpoints")]
    failpoints: bool,
}

impl Given {
    fn set_text(&mut self, name: &'static str, value: String) {
        match name {
            "address" => self.address = value,
            "bundle" => self.bundle = value,
            "group" => self.group = value,
            "handoff" => self.handoff = value,
            "id" => self.id = value,
            "namespace" => self.namespace = value,
            "socket" => self.socket = value,
            // `-publish-binary` (we speak ttrpc) and `-debug-socket` (there is no profiler here)
            // are accepted because containerd passes them, and not needed.
            _ => {}
        }
    }

    fn set_boolean(&mut self, name: &'static str, value: bool) {
        match name {
            "adopt" => self.adopt = value,
            "handoff-check" => self.handoff_check = value,
            "debug" => self.debug = value,
            "info" => self.info = value,
            "v" => self.version = value,
            #[cfg(feature = "failpoints")]
            "failpoints" => self.failpoints = value,
            _ => self.help = value,
        }
    }
}

/// Reads the words after the program's name.
pub fn parse(words: impl IntoIterator<Item = OsString>) -> Result<Invocation, Refusal> {
    let mut words = words.into_iter();
    let mut given = Given::default();
    let mut action = None;
    while let Some(word) = words.next() {
        let word = word.into_string().map_err(Refusal::NotText)?;
        let Some(rest) = word.strip_prefix('-').filter(|rest| !rest.is_empty()) else {
            action = Some(word);
            break;
        };
        let rest = rest.strip_prefix('-').unwrap_or(rest);
        if rest.is_empty() {
            // A bare `--` ends the flags.
            action = words
                .next()
                .map(OsString::into_string)
                .transpose()
                .map_err(Refusal::NotText)?;
            break;
        }
        let (name, value) = match rest.split_once('=') {
            Some((name, value)) => (name, Some(value)),
            None => (rest, None),
        };
        if name.is_empty() || name.starts_with('-') {
            return Err(Refusal::Syntax(word));
        }
        match flag(name).ok_or_else(|| Refusal::UnknownFlag(name.into()))? {
            Flag::Boolean(name) => {
                let value = match value {
                    None => true,
                    Some(value) => boolean(value).ok_or_else(|| Refusal::NotBoolean {
                        flag: name,
                        value: value.into(),
                    })?,
                };
                given.set_boolean(name, value);
            }
            Flag::Text(name) => {
                let value = match value {
                    Some(value) => value.to_owned(),
                    None => words
                        .next()
                        .ok_or(Refusal::NoValue(name))?
                        .into_string()
                        .map_err(Refusal::NotText)?,
                };
                given.set_text(name, value);
            }
        }
    }
    check(given, action.as_deref())
}

fn check(given: Given, action: Option<&str>) -> Result<Invocation, Refusal> {
    if given.help {
        return Ok(Invocation::Help);
    }
    #[cfg(feature = "failpoints")]
    if given.failpoints {
        return Ok(Invocation::Failpoints);
    }
    // Both win over any action, and need no namespace: so does the stock shim.
    if given.version {
        return Ok(Invocation::Version);
    }
    if given.info {
        return Ok(Invocation::RuntimeInfo);
    }
    if given.handoff_check {
        return Ok(Invocation::HandoffCheck);
    }
    let handoff = match given.handoff.as_str() {
        "" => None,
        text => {
            let number = text.parse().ok().filter(|number| *number > 2);
            Some(number.ok_or(Refusal::NotADescriptor)?)
        }
    };
    let act: fn(Flags) -> Invocation = match action {
        Some("start") => Invocation::Start,
        Some("delete") => Invocation::Delete,
        Some("adopt") => Invocation::Adopt,
        Some("tell") => Invocation::Tell,
        Some("copy") => |_| Invocation::Copy,
        Some("hold") => |_| Invocation::Hold,
        None if given.adopt => Invocation::Successor,
        None => Invocation::Serve,
        Some(other) => return Err(Refusal::UnknownAction(other.into())),
    };
    if given.namespace.is_empty() {
        return Err(Refusal::NoNamespace);
    }
    if given.id.is_empty() {
        return Err(Refusal::NoId);
    }
    let path = |text: String| (!text.is_empty()).then(|| PathBuf::from(text));
    let flags = Flags {
        namespace: Namespace::new(given.namespace)?,
        id: Id::new(given.id)?,
        address: given.address,
        bundle: path(given.bundle),
        socket: path(given.socket),
        group: (!given.group.is_empty()).then_some(given.group),
        debug: given.debug,
    };
    Ok(match handoff {
        Some(number) if action.is_none() => Invocation::GoOn(flags, number),
        Some(_) | None => act(flags),
    })
}

/// Go's `strconv.ParseBool`.
fn boolean(text: &str) -> Option<bool> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Some(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Some(false),
        _ => None,
    }
}

impl Flags {
    /// The group that the daemon serves.
    pub fn group(&self) -> &str {
        self.group.as_deref().unwrap_or(self.id.as_str())
    }

    /// What the daemon of this group is started with: what the stock daemon carries (tools read
    /// it from `/proc`), and the group where it is not the id.
    pub fn of_daemon(&self, group: &str) -> Vec<String> {
        let mut words = vec![
            "-namespace".to_owned(),
            self.namespace.to_string(),
            "-id".to_owned(),
            self.id.to_string(),
            "-address".to_owned(),
            self.address.clone(),
        ];
        if group != self.id.as_str() {
            // One word, so that a group that looks like a flag stays a value.
            words.push(format!("-group={group}"));
        }
        if self.debug {
            words.push("-debug".to_owned());
        }
        words
    }

    /// The bundle that `delete` is about: `-bundle`, else the sibling of the working directory
    /// that is named like the task (the stock shim's rule).
    pub fn bundle_to_delete(&self, working_directory: &Path) -> PathBuf {
        match &self.bundle {
            Some(bundle) if bundle.is_absolute() => bundle.clone(),
            Some(_) | None => working_directory
                .parent()
                .unwrap_or(working_directory)
                .join(self.id.as_str()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parse_words(line: &str) -> Result<Invocation, Refusal> {
        parse(
            line.split(' ')
                .filter(|w| !w.is_empty())
                .map(OsString::from),
        )
    }

    fn flags() -> Flags {
        Flags {
            namespace: Namespace::new("k8s.io").unwrap(),
            id: Id::new("abc").unwrap(),
            address: "/run/containerd/containerd.sock".into(),
            bundle: None,
            socket: None,
            group: None,
            debug: false,
        }
    }

    #[test]
    fn what_containerd_passes_is_understood_in_every_go_spelling() {
        let start = "-namespace k8s.io -address /run/containerd/containerd.sock \
                     -publish-binary /usr/bin/containerd -id abc";
        assert_eq!(
            parse_words(&format!("{start} start")),
            Ok(Invocation::Start(flags()))
        );
        assert_eq!(parse_words(start), Ok(Invocation::Serve(flags())));
        let debug = Flags {
            debug: true,
            ..flags()
        };
        assert_eq!(
            parse_words(&format!("{start} -debug start")),
            Ok(Invocation::Start(debug.clone()))
        );
        assert_eq!(
            parse_words(&format!("{start} --debug=T -- start")),
            Ok(Invocation::Start(debug))
        );
        assert_eq!(
            parse_words(&format!("{start} -bundle /b/abc delete")),
            Ok(Invocation::Delete(Flags {
                bundle: Some("/b/abc".into()),
                ..flags()
            }))
        );
        assert_eq!(
            parse_words(
                "--namespace=k8s.io --address=/run/containerd/containerd.sock --id=abc start"
            ),
            Ok(Invocation::Start(flags()))
        );
        // Go ignores what follows the action.
        assert_eq!(
            parse_words(&format!("{start} start -nonsense")),
            Ok(Invocation::Start(flags()))
        );
        for (line, invocation) in [
            ("-v", Invocation::Version),
            ("-version start", Invocation::Version),
            ("-info", Invocation::RuntimeInfo),
            ("-help", Invocation::Help),
        ] {
            assert_eq!(parse_words(line), Ok(invocation), "{line}");
        }
    }

    #[test]
    fn what_go_refuses_is_refused_in_one_line_with_its_exit_status() {
        let refused = |line: &str| parse_words(line).unwrap_err();
        for (line, status, text) in [
            (
                "-nonsense start",
                2,
                "flag provided but not defined: -nonsense",
            ),
            ("-=x", 2, "bad flag syntax"),
            ("---id=x", 2, "bad flag syntax"),
            ("-id", 2, "flag needs an argument: -id"),
            (
                "-debug=maybe start",
                2,
                "invalid boolean value \"maybe\" for -debug",
            ),
            ("-namespace a -id b stop", 2, "unknown action \"stop\""),
            ("-id abc start", 1, "shim namespace cannot be empty"),
            (
                "-namespace= -id abc start",
                1,
                "shim namespace cannot be empty",
            ),
            ("-namespace a start", 1, "shim id cannot be empty"),
            (
                "-namespace a -id ../b delete",
                1,
                "is not a containerd identifier",
            ),
        ] {
            let refusal = refused(line);
            assert_eq!(refusal.exit_status(), status, "{line}");
            let said = refusal.to_string();
            assert!(
                said.contains(text) && !said.contains('\n'),
                "{line}: {said}"
            );
        }
        use std::os::unix::ffi::OsStringExt;
        assert!(parse([OsString::from_vec(vec![b'-', 0xff])]).is_err());
    }

    #[test]
    fn the_daemon_reads_back_what_start_gives_it() {
        for group in ["abc", "pod-1", "-odd=group"] {
            let flags = Flags {
                debug: true,
                ..flags()
            };
            let words = flags.of_daemon(group).into_iter().map(OsString::from);
            match parse(words).unwrap() {
                Invocation::Serve(daemon) => {
                    assert_eq!(daemon.group(), group);
                    assert_eq!((daemon.id, daemon.debug), (flags.id, true));
                }
                other => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn the_bundle_to_delete_is_named_like_the_task() {
        let here = Path::new("/state/ns/other");
        assert_eq!(flags().bundle_to_delete(here), Path::new("/state/ns/abc"));
        let given = Flags {
            bundle: Some("/b/abc".into()),
            ..flags()
        };
        assert_eq!(given.bundle_to_delete(here), Path::new("/b/abc"));
    }

    proptest! {
        #[test]
        fn no_words_panic_and_every_refusal_is_one_line(words: Vec<String>) {
            if let Err(refusal) = parse(words.into_iter().map(OsString::from)) {
                prop_assert!(!refusal.to_string().contains('\n'));
            }
        }
    }
}

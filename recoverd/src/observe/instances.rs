//! Which containerds there are: the one that was named, the configured one, those that run,
//! the known places of distributions, and those that living shims name.

use std::path::{Path, PathBuf};

use recoverd_common::{paths, read, seen::Seen};

use super::{
    NamedInstance, Plan,
    processes::{Daemon, Seeing},
};
use crate::facts::{Api, Gap, Instance, Shim};

const DEFAULT_CONFIG: &str = "/etc/containerd/config.toml";
/// Where containerd listens unless told otherwise.
pub const DEFAULT_ADDRESS: &str = "/run/containerd/containerd.sock";
const DEFAULT_STATE: &str = "/run/containerd";
const DEFAULT_ROOT: &str = "/var/lib/containerd";

/// Address, state and root of containerds that distributions bring.
const KNOWN: [(&str, &str, &str, &str); 3] = [
    (
        "k3s or rke2",
        "/run/k3s/containerd/containerd.sock",
        "/run/k3s/containerd",
        "/var/lib/rancher/k3s/agent/containerd",
    ),
    (
        "microk8s",
        "/var/snap/microk8s/common/run/containerd.sock",
        "/var/snap/microk8s/common/run/containerd",
        "/var/snap/microk8s/common/var/lib/containerd",
    ),
    (
        "Docker",
        "/run/docker/containerd/containerd.sock",
        "/run/docker/containerd/daemon",
        "/var/lib/docker/containerd/daemon",
    ),
];

/// What a containerd's configuration file says of its places.
#[derive(Debug, Default, PartialEq, Eq)]
struct Places {
    address: Option<String>,
    state: Option<PathBuf>,
    root: Option<PathBuf>,
}

fn parse_config(text: &str) -> Result<Places, String> {
    let table: toml::Table = text
        .parse()
        .map_err(|e: toml::de::Error| e.message().to_owned())?;
    let word = |value: Option<&toml::Value>| {
        let text = value.and_then(toml::Value::as_str)?;
        (!text.is_empty()).then(|| text.to_owned())
    };
    let path = |name: &str| word(table.get(name)).map(PathBuf::from);
    // Version 4 files have the server's settings below plugins.
    let server = || {
        let plugins = table.get("plugins")?.as_table()?;
        plugins.get("io.containerd.server.v1.grpc")?.get("address")
    };
    let grpc = table.get("grpc").and_then(|grpc| grpc.get("address"));
    Ok(Places {
        address: word(grpc).or_else(|| word(server())),
        state: path("state"),
        root: path("root"),
    })
}

/// The value that containerd's arguments give to a flag.
fn flag(arguments: &[String], names: [&str; 2]) -> Option<String> {
    arguments.iter().enumerate().find_map(|(at, argument)| {
        let flag = argument.trim_start_matches('-');
        if flag.len() == argument.len() {
            return None;
        }
        match flag.split_once('=') {
            Some((name, value)) if names.contains(&name) => Some(value.to_owned()),
            None if names.contains(&flag) => arguments.get(at.checked_add(1)?).cloned(),
            Some(_) | None => None,
        }
    })
}

/// Where a containerd will listen that is started in `/` with these arguments.
pub fn address_of(arguments: &[String]) -> Seen<String> {
    if let Some(address) = flag(arguments, ["address", "a"]) {
        return Seen::Present(address);
    }
    let config = flag(arguments, ["config", "c"]).unwrap_or_else(|| DEFAULT_CONFIG.to_owned());
    let mut gaps = Vec::new();
    let file = read_config(&Path::new("/").join(config), &mut gaps);
    match gaps.pop() {
        Some(Gap { what, why, .. }) => Seen::Unknown(format!("{what}: {why}")),
        None => Seen::Present(file.address.unwrap_or_else(|| DEFAULT_ADDRESS.to_owned())),
    }
}

/// A daemon's flags over its configuration file over the defaults.
fn of_daemon(daemon: &Daemon, gaps: &mut Vec<Gap>) -> Instance {
    let value = |names| flag(&daemon.arguments, names);
    let config = value(["config", "c"]).unwrap_or_else(|| DEFAULT_CONFIG.to_owned());
    // A relative name is relative to where the daemon works; unseen, it leads to no file, which
    // is told.
    let base = daemon.cwd.as_deref().unwrap_or(Path::new("/proc/nowhere"));
    let path = base.join(config);
    if Path::new(DEFAULT_CONFIG) != path && !path.exists() {
        gaps.push(Gap::new(
            path.display().to_string(),
            format!(
                "configuration of containerd {}: no such file",
                daemon.id.pid
            ),
        ));
    }
    let file = read_config(&path, gaps);
    let or = |path: Option<PathBuf>, default: &str| Some(path.unwrap_or_else(|| default.into()));
    Instance {
        address: value(["address", "a"])
            .or(file.address)
            .unwrap_or_else(|| DEFAULT_ADDRESS.to_owned()),
        state: or(
            value(["state", "state"]).map(PathBuf::from).or(file.state),
            DEFAULT_STATE,
        ),
        root: or(
            value(["root", "root"]).map(PathBuf::from).or(file.root),
            DEFAULT_ROOT,
        ),
        source: format!("process {}", daemon.id.pid),
        daemon: Some(daemon.id),
        api: Api::Down,
        aliases: Vec::new(),
    }
}

fn read_config(path: &Path, gaps: &mut Vec<Gap>) -> Places {
    let why = match read::read_text(path, read::MAX_FILE) {
        Seen::Present(text) => match parse_config(&text) {
            Ok(places) => return places,
            Err(why) => why,
        },
        Seen::Absent => return Places::default(),
        Seen::Unknown(why) => why,
    };
    gaps.push(Gap::new(path.display().to_string(), why));
    Places::default()
}

/// The state folder of the containerd that started a shim, from the bundle it works in.
fn state_of(shim: &Shim) -> Option<PathBuf> {
    let (cwd, _) = shim.cwd.present()?;
    // <state>/<plugin>/<namespace>/<id>
    let plugin = cwd.parent()?.parent()?;
    let known = [paths::TASK_PLUGIN, paths::SANDBOX_PLUGIN];
    let name = plugin.file_name()?.to_str()?;
    known
        .contains(&name)
        .then(|| plugin.parent().map(Path::to_owned))?
}

/// The one of `daemons` that has this address, whether it listens or not. *Unknown* where the
/// address of one of them is.
pub fn daemon_at(daemons: &[Daemon], address: &str) -> Seen<i32> {
    let mut unknown = None;
    for daemon in daemons {
        let mut gaps = Vec::new();
        let instance = of_daemon(daemon, &mut gaps);
        let flagged = flag(&daemon.arguments, ["address", "a"]).is_some();
        match gaps.pop() {
            Some(gap) if !flagged => unknown = Some(format!("{}: {}", gap.what, gap.why)),
            Some(_) | None if same_address(&instance.address, address) => {
                return Seen::Present(daemon.id.pid);
            }
            Some(_) | None => {}
        }
    }
    unknown.map_or(Seen::Absent, Seen::Unknown)
}

/// Lists the instances of the node, sorted by address, one per address. Who is named first wins;
/// later words fill what the earlier left open.
pub fn observe(plan: &Plan, seen: &Seeing, gaps: &mut Vec<Gap>) -> Vec<Instance> {
    let mut found: Vec<Instance> = Vec::new();
    for named in &plan.named {
        merge(&mut found, of_named(named));
    }
    for daemon in &seen.daemons {
        merge(&mut found, of_daemon(daemon, gaps));
    }
    for shim in &seen.shims {
        merge(
            &mut found,
            Instance {
                address: shim.address.clone(),
                state: state_of(shim),
                root: None,
                source: format!("shim {}", shim.id.pid),
                daemon: None,
                api: Api::Down,
                aliases: Vec::new(),
            },
        );
    }
    let file = read_config(Path::new(DEFAULT_CONFIG), gaps);
    let configured = Instance {
        address: file.address.unwrap_or_else(|| DEFAULT_ADDRESS.to_owned()),
        state: Some(file.state.unwrap_or_else(|| DEFAULT_STATE.into())),
        root: Some(file.root.unwrap_or_else(|| DEFAULT_ROOT.into())),
        source: "configuration".into(),
        daemon: None,
        api: Api::Down,
        aliases: Vec::new(),
    };
    let known = KNOWN.iter().map(|(who, address, state, root)| Instance {
        address: (*address).to_owned(),
        state: Some(state.into()),
        root: Some(root.into()),
        source: format!("place of {who}"),
        daemon: None,
        api: Api::Down,
        aliases: Vec::new(),
    });
    for instance in std::iter::once(configured).chain(known) {
        // A place where nothing ever was is no instance, but its defaults complete one that is.
        let there = Path::new(&instance.address).exists()
            || instance
                .state
                .as_ref()
                .is_some_and(|s| s.join(paths::TASK_PLUGIN).exists());
        if there
            || found
                .iter()
                .any(|f| same_address(&f.address, &instance.address))
        {
            merge(&mut found, instance);
        }
    }
    found.sort_by(|a, b| a.address.cmp(&b.address));
    found
}

fn of_named(named: &NamedInstance) -> Instance {
    Instance {
        address: named.address_or_default(),
        state: named.state.clone(),
        root: named.root.clone(),
        source: named.source.clone(),
        daemon: None,
        api: Api::Down,
        aliases: Vec::new(),
    }
}

/// Docker's `/var/run` is `/run`: addresses are compared by the folder they are in.
fn same_address(one: &str, other: &str) -> bool {
    one == other || resolve(one) == resolve(other)
}

fn resolve(address: &str) -> PathBuf {
    let path = Path::new(address);
    match (
        path.parent().and_then(|p| p.canonicalize().ok()),
        path.file_name(),
    ) {
        (Some(parent), Some(name)) => parent.join(name),
        (Some(_), None) | (None, Some(_) | None) => path.to_owned(),
    }
}

fn merge(found: &mut Vec<Instance>, new: Instance) {
    match found
        .iter_mut()
        .find(|old| same_address(&old.address, &new.address))
    {
        Some(old) => {
            if old.address != new.address && !old.aliases.contains(&new.address) {
                old.aliases.push(new.address);
            }
            if old.state.is_none() {
                old.state = new.state;
            }
            if old.root.is_none() {
                old.root = new.root;
            }
            if old.daemon.is_none() {
                old.daemon = new.daemon;
            }
        }
        None => found.push(new),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_a_command_will_listen_its_flag_says_else_its_file_else_nobody() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("config.toml");
        let of = |words: &[&str]| {
            let words: Vec<String> = words.iter().map(|word| (*word).to_owned()).collect();
            address_of(&words)
        };
        let path = file.to_str().unwrap();
        std::fs::write(&file, "[grpc]\naddress='/a'\n").unwrap();
        assert_eq!(of(&["--config", path]), Seen::Present("/a".into()));
        let config = format!("-c={path}");
        assert_eq!(
            of(&[&config, "--address", "/b"]),
            Seen::Present("/b".into())
        );
        std::fs::write(&file, "").unwrap();
        assert_eq!(
            of(&["--config", path]),
            Seen::Present(DEFAULT_ADDRESS.into())
        );
        std::fs::write(&file, "address = [").unwrap();
        assert!(matches!(of(&["--config", path]), Seen::Unknown(_)));
    }

    #[test]
    fn a_daemon_has_its_address_before_it_listens_there() {
        let dir = tempfile::tempdir().unwrap();
        let daemon = |pid: i32, words: &[&str]| Daemon {
            id: recoverd_common::proc::ProcessId { pid, start_time: 1 },
            arguments: words.iter().map(|word| (*word).to_owned()).collect(),
            cwd: Some(dir.path().to_owned()),
        };
        std::fs::write(dir.path().join("of-file"), "[grpc]\naddress='/a'\n").unwrap();
        let by_flag = daemon(1, &["-c", "gone", "--address=/b"]);
        let by_file = daemon(2, &["--config", "of-file"]);
        let nobody_knows = daemon(3, &["--config", "gone"]);
        let known = [by_flag, by_file];
        assert_eq!(daemon_at(&known, "/a"), Seen::Present(2));
        assert_eq!(daemon_at(&known, "/b"), Seen::Present(1));
        assert_eq!(daemon_at(&known, "/c"), Seen::Absent);
        let [by_flag, by_file] = known;
        let all = [nobody_knows, by_flag, by_file];
        assert_eq!(daemon_at(&all, "/a"), Seen::Present(2));
        assert!(matches!(daemon_at(&all, "/c"), Seen::Unknown(_)));
    }

    #[test]
    fn configuration_of_each_generation_is_understood() {
        let old =
            parse_config("version = 2\nstate='/s'\nroot='/r'\n[grpc]\naddress='/a'\n").unwrap();
        assert_eq!(old.address.as_deref(), Some("/a"));
        assert_eq!(
            (old.state, old.root),
            (Some("/s".into()), Some("/r".into()))
        );
        let new =
            parse_config("version=4\n[plugins.'io.containerd.server.v1.grpc']\naddress='/b'\n");
        assert_eq!(new.unwrap().address.as_deref(), Some("/b"));
        assert_eq!(parse_config("").unwrap(), Places::default());
        assert!(parse_config("state = [").is_err());
    }
}

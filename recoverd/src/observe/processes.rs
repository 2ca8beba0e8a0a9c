//! The process table: shims of any name, containerd daemons, who listens on which socket.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    path::{Path, PathBuf},
};

use rayon::prelude::*;
use recoverd_common::{
    paths,
    proc::{FileId, Memory, Proc, ProcessId, Stat},
    seen::Seen,
};

use super::Roots;
use crate::facts::{Address, Answer, Gap, Host, Reply, Shim, TaskName};

/// A containerd process.
#[derive(Debug, Clone)]
pub struct Daemon {
    /// Who.
    pub id: ProcessId,
    /// Its arguments, without the first.
    pub arguments: Vec<String>,
    /// Its working folder.
    pub cwd: Option<PathBuf>,
}

/// What the table holds.
#[derive(Debug, Default)]
pub struct Seeing {
    /// Every process.
    pub table: HashMap<i32, Stat>,
    /// Shims that serve.
    pub shims: Vec<Shim>,
    /// containerds.
    pub daemons: Vec<Daemon>,
    /// Tasks for which a shim binary runs a verb.
    pub busy_verbs: BTreeSet<TaskName>,
    /// Shims, daemons and verbs.
    interesting: BTreeSet<ProcessId>,
}

impl Seeing {
    /// What this reading says of a process that has not executed another program since: a shim, or
    /// nothing of interest. Nothing for one that is new, or whose verb may be done.
    fn known(&self, stat: &Stat) -> Option<Found> {
        let old = self.table.get(&stat.id.pid)?;
        if old.id != stat.id || old.comm != stat.comm || !stat.alive() {
            return None;
        }
        if !self.interesting.contains(&stat.id) {
            return Some(Found::Other);
        }
        let at = self
            .shims
            .binary_search_by_key(&stat.id, |shim| shim.id)
            .ok()?;
        self.shims
            .get(at)
            .map(|shim| Found::Again(Box::new(shim.clone())))
    }
}

/// The verb of a process that keeps the write ends of a client's fifos beside a shim of ours.
const HOLD: &str = "hold";

/// A shim's command line, as containerd writes it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct ShimLine {
    namespace: String,
    id: String,
    address: String,
    verb: bool,
}

/// A shim is known by its flags, not by its name: `runtime_path` may be any file.
fn parse_shim_line(arguments: &[String]) -> Option<ShimLine> {
    let value = |name: &str| {
        arguments
            .iter()
            .enumerate()
            .skip(1)
            .find_map(|(at, argument)| {
                let flag = argument
                    .strip_prefix("--")
                    .or_else(|| argument.strip_prefix('-'))?;
                match flag.split_once('=') {
                    Some((flag, value)) if flag == name => Some(value.to_owned()),
                    None if flag == name => arguments.get(at.checked_add(1)?).cloned(),
                    Some(_) | None => None,
                }
            })
    };
    // Sends a dead shim's last events, writes a log file, or holds a client's fifos: serves nobody.
    let verb = arguments.last().map(String::as_str);
    if matches!(verb, Some("tell" | "copy" | HOLD)) {
        return None;
    }
    let line = ShimLine {
        namespace: value("namespace")?,
        id: value("id")?,
        address: value("address")?,
        verb: matches!(
            arguments.last().map(String::as_str),
            Some("start" | "delete" | "adopt")
        ),
    };
    // A shim's other flags tell it from a tool that has words in common with it (ctr has
    // --namespace and --address, but no --id).
    let named = arguments
        .first()
        .is_some_and(|program| file_name(program).contains("shim"));
    let plain = arguments
        .iter()
        .skip(1)
        .all(|a| a.starts_with('-') || !a.contains(char::is_whitespace));
    (named || plain).then_some(line)
}

fn file_name(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
}

/// Reads the table. Processes that live in another file system tree (a containerd in a container
/// with a `/run` of its own) are not this node's and are left out.
///
/// `before` is an earlier reading: what was a shim or nothing of interest then, and has not executed
/// another program since (its name would differ), is not asked for its arguments again.
pub fn observe(
    proc: &Proc,
    roots: &Roots,
    host: &Host,
    before: Option<&Seeing>,
    gaps: &mut Vec<Gap>,
) -> Seeing {
    let pids = match proc.pids() {
        Ok(pids) => pids,
        Err(error) => {
            gaps.push(Gap::new(
                "processes",
                format!("list {}: {error}", roots.proc.display()),
            ));
            return Seeing::default();
        }
    };
    let own_tree = FileId::of(&roots.socket_dir);
    let own_mounts = proc.namespace(own_pid(), "mnt");
    let read: Vec<(Stat, Found)> = pids
        .par_iter()
        .filter_map(|pid| {
            // A process that ended since it was listed is no fact.
            let stat = proc.stat(*pid).present().cloned()?;
            if let Some(known) = before.and_then(|before| before.known(&stat)) {
                return Some((stat, known));
            }
            let found = match proc.arguments(*pid) {
                Seen::Present(arguments) => sort(proc, &stat, arguments),
                Seen::Absent | Seen::Unknown(_) => Found::Other,
            };
            Some((stat, found))
        })
        .collect();

    let mut seeing = Seeing::default();
    let ours = |pid: i32| {
        let mounts = proc.namespace(pid, "mnt");
        if !host.root || mounts == own_mounts || mounts.present().is_none() {
            return true;
        }
        let below = roots
            .socket_dir
            .strip_prefix("/")
            .unwrap_or(&roots.socket_dir);
        let theirs = FileId::of(&proc.path(pid, "root").join(below));
        theirs.present().is_some() && theirs == own_tree
    };
    for (stat, found) in read {
        if !matches!(found, Found::Other) {
            seeing.interesting.insert(stat.id);
        }
        match found {
            Found::Other => {}
            Found::Daemon(arguments) if ours(stat.id.pid) => seeing.daemons.push(Daemon {
                id: stat.id,
                arguments,
                cwd: proc
                    .cwd(stat.id.pid)
                    .present()
                    .map(|(path, _)| path.clone()),
            }),
            Found::Shim(line, _) if line.verb => {
                seeing.busy_verbs.insert((line.namespace, line.id));
            }
            Found::Again(mut shim) => {
                shim.state = stat.state;
                shim.threads = stat.threads;
                shim.cpu_ticks = stat.cpu_ticks;
                seeing.shims.push(*shim);
            }
            Found::Shim(line, name) if ours(stat.id.pid) => {
                seeing.shims.push(shim(proc, &stat, line, name));
            }
            Found::Daemon(_) | Found::Shim(..) => {}
        }
        seeing.table.insert(stat.id.pid, stat);
    }
    seeing.shims.sort_by_key(|shim| shim.id);
    seeing
}

fn own_pid() -> i32 {
    nix::unistd::getpid().as_raw()
}

enum Found {
    /// A shim that an earlier reading knows.
    Again(Box<Shim>),
    Shim(ShimLine, String),
    Daemon(Vec<String>),
    Other,
}

fn sort(proc: &Proc, stat: &Stat, arguments: Vec<String>) -> Found {
    if !stat.alive() {
        return Found::Other;
    }
    let found = by_arguments(proc, stat, arguments);
    // Anybody can give a process any arguments. containerd and its shims are root's, or, without
    // root, those of the user who looks; what anybody else runs under such a name is nothing.
    let trusted = |user: &u32| *user == 0 || *user == nix::unistd::geteuid().as_raw();
    match (&found, proc.users(stat.id.pid)) {
        (Found::Other, _) => found,
        (_, Seen::Present(users)) if !users.is_empty() && users.iter().all(trusted) => found,
        (_, Seen::Present(_) | Seen::Absent | Seen::Unknown(_)) => Found::Other,
    }
}

fn by_arguments(proc: &Proc, stat: &Stat, arguments: Vec<String>) -> Found {
    if let Some(line) = parse_shim_line(&arguments) {
        let shown = proc.exe(stat.id.pid).present().map(|exe| exe.path.clone());
        let name = shown
            .as_deref()
            .and_then(Path::file_name)
            .map(|name| name.to_string_lossy().into_owned())
            .or_else(|| {
                arguments
                    .first()
                    .map(|program| file_name(program).to_owned())
            })
            .unwrap_or_default();
        return Found::Shim(line, name);
    }
    if arguments
        .first()
        .is_some_and(|program| file_name(program) == "containerd")
    {
        return Found::Daemon(arguments.into_iter().skip(1).collect());
    }
    Found::Other
}

fn shim(proc: &Proc, stat: &Stat, line: ShimLine, name: String) -> Shim {
    let exe = proc.exe(stat.id.pid);
    // Where the shim finds it: a shim in a mount namespace of its own still sees the node's files.
    let installed = exe.clone().and_then(|exe| FileId::of(&exe.path));
    Shim {
        id: stat.id,
        namespace: line.namespace,
        task: line.id,
        address: line.address,
        name,
        exe,
        installed,
        cwd: proc.cwd(stat.id.pid),
        state: stat.state,
        threads: stat.threads,
        cpu_ticks: stat.cpu_ticks,
        cpu_ticks_after: None,
        listens: Vec::new(),
        descriptors: None,
        memory: Seen::Absent,
    }
}

/// Finds out who listens on which named socket, and notes it in the shims.
pub fn listeners(
    proc: &Proc,
    roots: &Roots,
    host: &Host,
    shims: &mut [Shim],
    gaps: &mut Vec<Gap>,
) -> Seen<HashMap<Address, Vec<i32>>> {
    let sockets = match proc.unix_sockets() {
        Seen::Present(sockets) => sockets,
        Seen::Absent => return unseen(roots, "is not there", gaps),
        Seen::Unknown(why) => return unseen(roots, &why, gaps),
    };
    let listening: HashMap<u64, Address> = sockets
        .into_iter()
        .filter(|socket| socket.listening)
        .map(|socket| (socket.inode, socket.path))
        .collect();
    let mut by_address: HashMap<Address, Vec<i32>> = listening
        .values()
        .map(|address| (address.clone(), Vec::new()))
        .collect();

    let of = |pid: i32| -> (Option<usize>, Vec<Address>) {
        match proc.descriptors(pid) {
            Seen::Present(descriptors) => {
                let inodes = descriptors.iter().filter_map(|d| d.socket_inode());
                let mut addresses: Vec<Address> = inodes
                    .filter_map(|inode| listening.get(&inode).cloned())
                    .collect();
                addresses.sort();
                addresses.dedup();
                (Some(descriptors.len()), addresses)
            }
            Seen::Absent | Seen::Unknown(_) => (None, Vec::new()),
        }
    };
    let found: Vec<_> = shims.par_iter().map(|shim| of(shim.id.pid)).collect();
    for (shim, (count, addresses)) in shims.iter_mut().zip(found) {
        for address in &addresses {
            by_address
                .entry(address.clone())
                .or_default()
                .push(shim.id.pid);
        }
        shim.descriptors = count;
        shim.listens = addresses;
    }

    // A socket of the folder whose listener is no shim that we know: find its owner.
    let in_folder = |address: &str| {
        let path = Path::new(address);
        path.parent() == Some(&roots.socket_dir)
            && path
                .file_name()
                .and_then(|n| n.to_str())
                .is_some_and(paths::is_socket_name)
    };
    let unowned = by_address
        .iter()
        .any(|(address, pids)| pids.is_empty() && in_folder(address));
    if unowned && host.root {
        let pids = proc.pids().unwrap_or_default();
        let found: Vec<_> = pids.par_iter().map(|pid| (*pid, of(*pid).1)).collect();
        for (pid, addresses) in found {
            for address in addresses {
                let pids = by_address.entry(address).or_default();
                if !pids.contains(&pid) {
                    pids.push(pid);
                }
            }
        }
    }
    if host.root {
        Seen::Present(by_address)
    } else {
        Seen::Unknown("needs root".into())
    }
}

fn unseen(roots: &Roots, why: &str, gaps: &mut Vec<Gap>) -> Seen<HashMap<Address, Vec<i32>>> {
    let what = roots.proc.join("net/unix").display().to_string();
    gaps.push(Gap::new(what.clone(), why.to_owned()));
    Seen::Unknown(format!("{what} {why}"))
}

/// Measures the memory of each shim.
pub fn memory(proc: &Proc, shims: &[Shim]) -> Vec<Seen<Memory>> {
    shims
        .par_iter()
        .map(|shim| proc.memory(shim.id.pid))
        .collect()
}

/// Tells a shim that is busy from one that is idle: did it use CPU while it owed an answer?
pub fn look_at_cpu_again(proc: &Proc, shims: &mut [Shim], answers: &BTreeMap<Address, Answer>) {
    for shim in shims {
        let owes = shim
            .listens
            .iter()
            .filter_map(|address| answers.get(address))
            .any(|answer| {
                matches!(answer.greeting, Reply::Silent)
                    || answer
                        .states
                        .values()
                        .any(|state| matches!(state, Reply::Silent))
            });
        if owes && let Seen::Present(stat) = proc.living(shim.id) {
            shim.state = stat.state;
            shim.cpu_ticks_after = Some(stat.cpu_ticks);
        }
    }
}

/// Which of `wanted` each process has open, by pid; a walk over every descriptor of the node.
pub fn users_of(proc: &Proc, wanted: &BTreeSet<PathBuf>) -> HashMap<i32, BTreeSet<PathBuf>> {
    let me = own_pid();
    let pids = proc.pids().unwrap_or_default();
    pids.par_iter()
        .filter(|pid| **pid != me)
        .filter_map(|pid| {
            let descriptors = proc.descriptors(*pid).present().cloned()?;
            let open: BTreeSet<PathBuf> = descriptors
                .into_iter()
                .map(|d| d.target)
                .filter(|target| wanted.contains(target))
                .collect();
            (!open.is_empty()).then_some((*pid, open))
        })
        .collect()
}

/// A process of our shim's own that only keeps fifos open.
pub fn holds_for_a_shim(proc: &Proc, pid: i32) -> bool {
    let arguments = proc.arguments(pid);
    let words = arguments.present().map_or(&[][..], Vec::as_slice);
    let flagged = |flag: &str| words.iter().any(|word| word == flag);
    words.last().is_some_and(|verb| verb == HOLD) && flagged("-namespace") && flagged("-id")
}

/// A process whose arguments name a task as a shim's do: one that serves it, or runs `start` or
/// `delete` for it.
pub fn names_shim(proc: &Proc, namespace: &str, id: &str, address: &str) -> Seen<i32> {
    let pids = match proc.pids() {
        Ok(pids) => pids,
        Err(error) => return Seen::Unknown(error.to_string()),
    };
    for pid in pids {
        let arguments = match proc.arguments(pid) {
            Seen::Present(arguments) => arguments,
            Seen::Absent => continue,
            Seen::Unknown(why) => return Seen::Unknown(why),
        };
        let named = parse_shim_line(&arguments).is_some_and(|line| {
            line.namespace == namespace && line.id == id && line.address == address
        });
        if named {
            return Seen::Present(pid);
        }
    }
    Seen::Absent
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(text: &str) -> Option<ShimLine> {
        parse_shim_line(&text.split(' ').map(str::to_owned).collect::<Vec<_>>())
    }

    #[test]
    fn shims_are_known_by_their_flags() {
        let stock =
            line("/usr/bin/containerd-shim-runc-v2 -namespace k8s.io -id c1 -address /run/c.sock")
                .unwrap();
        assert_eq!(
            (stock.namespace.as_str(), stock.id.as_str(), stock.verb),
            ("k8s.io", "c1", false)
        );
        assert!(line("/opt/any --namespace=n --id=i --address=/a").is_some());
        assert!(
            line("s -namespace n -address a -publish-binary c -id i -bundle b delete")
                .unwrap()
                .verb
        );
        for other in [
            "ctr -n default -a /run/c.sock tasks ls",
            "sleep 1",
            "",
            "x -namespace",
        ] {
            assert_eq!(line(other), None, "{other}");
        }
    }
}

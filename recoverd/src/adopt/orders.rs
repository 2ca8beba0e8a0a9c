//! What a successor has to know. Pure.
//!
//! A group of tasks becomes an order: a record of them as the predecessor would have written it, by
//! what the bundles, runc, the shim's answers and the clues say.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, HashMap},
    path::Path,
};

use recoverd_common::{
    adoption::Adoption,
    bundle::Bundle,
    paths,
    proc::{ProcessId, Stat},
    record::{self, Exit, Process, Record, Runtime},
    seen::Seen,
    timestamp::Timestamp,
};

use super::{
    Member, Order,
    clues::{Clues, ExecClue, TaskClues},
    decide::{
        Decision, Group, Refused, Selection, created_at, process, record_at, told_exit, witnessed,
        zombie,
    },
};
use crate::{
    correlate::{Case, Init},
    facts::{Instance, Look, one_line},
};
/// Turns groups into orders, most valuable first: what lives before what has ended, many before
/// one, the older before the younger.
pub fn orders(look: &Look, selection: Selection<'_>, clues: &Clues) -> Decision {
    let Selection {
        groups,
        mut refused,
    } = selection;
    let mut orders = Vec::new();
    for group in groups {
        match order(look, &group, clues) {
            Ok(order) => orders.push(order),
            Err(why) => refused.extend(group.members.iter().map(|case| Refused {
                name: case.name.clone(),
                why: why.clone(),
                lost: false,
            })),
        }
    }
    orders.sort_by_key(|order| (Reverse(order.living()), eldest(order), order.group.clone()));
    refused.sort();
    Decision { orders, refused }
}

fn eldest(order: &Order) -> u64 {
    let starts = order
        .members
        .iter()
        .filter_map(|m| Some(m.init?.start_time));
    starts.min().unwrap_or(u64::MAX)
}

fn order(look: &Look, group: &Group<'_>, clues: &Clues) -> Result<Order, String> {
    let instance = look
        .instances
        .get(group.instance)
        .ok_or("its containerd is not known")?;
    let mut because = group.because.clone();
    let mut unreadable = None;
    let record = if group.recorded {
        None
    } else {
        if let Some(Seen::Unknown(why)) = record_at(look, &group.socket) {
            because.push(format!("its record {why}: taken from bundle and runc"));
            unreadable = Some(paths::Beside::of(&group.socket).record);
        }
        Some(record_of(look, group, instance, clues)?)
    };
    Ok(Order {
        address: instance.address.clone(),
        state: instance.state.clone(),
        unreadable,
        namespace: group.namespace.clone(),
        group: group.id.clone(),
        adoption: Adoption {
            socket: group.socket.clone(),
            record,
            predecessor: group.predecessor.map(|shim| process(shim.id)),
            descriptors: Vec::new(),
            observed: look.witnessed.observed(&group.namespace),
        },
        members: group
            .members
            .iter()
            .map(|case| Member {
                name: case.name.clone(),
                init: case.init.alive(),
            })
            .collect(),
        because,
    })
}

/// The record that a shim of ours would have left.
fn record_of(
    look: &Look,
    group: &Group<'_>,
    instance: &Instance,
    clues: &Clues,
) -> Result<Record, String> {
    let Some(boot_id) = look.host.boot_id.clone() else {
        return Err("the boot id cannot be read, so that no pid can be proven".into());
    };
    let exe = group
        .members
        .iter()
        .find_map(|case| case.bundle?.shim_binary.present())
        .map_or_else(String::new, |path| path.to_string_lossy().into_owned());
    Ok(Record {
        written_at: Timestamp::from(look.at),
        boot_id,
        shim: record::Shim {
            version: String::new(),
            process: group.predecessor.map_or(NOBODY, |shim| process(shim.id)),
            exe,
            containerd_address: instance.address.clone(),
            namespace: group.namespace.clone(),
            group_id: group.id.clone(),
            socket: group.socket.to_string_lossy().into_owned(),
            api_versions: vec![2, 3],
        },
        tasks: group
            .members
            .iter()
            .filter_map(|case| task_of(look, case, clues))
            .collect(),
        context: clues
            .contexts
            .get(&group.instance)
            .cloned()
            .unwrap_or_default(),
        running: Vec::new(),
        descriptors: Vec::new(),
        unanswered: Vec::new(),
        strays: Vec::new(),
    })
}

/// A process of which nothing is known.
const NOBODY: Process = Process {
    pid: 0,
    start_time: 0,
};

/// One task; none without an init, living or ended: nobody made it yet.
fn task_of(look: &Look, case: &Case<'_>, clues: &Clues) -> Option<record::Task> {
    let bundle = case.bundle?;
    let clue = clues.tasks.get(&bundle.path);
    let (init, exit) = match &case.init {
        Init::Alive(id) => (Some(*id), None),
        // The successor reads a zombie's status itself, and is told what a supervisor has seen.
        Init::Dead(Some(id), _) if zombie(look, case).is_some() || witnessed(look, *id) => {
            (Some(*id), None)
        }
        Init::Dead(id, why) => {
            let unknown = || Exit::Unknown {
                why: one_line(&format!("it ended before it was adopted ({why})")),
            };
            let told = told_exit(case).map(|(status, at)| Exit::Observed {
                status,
                at,
                // It does not say.
                oom: false,
            });
            (*id, Some(told.unwrap_or_else(unknown)))
        }
        Init::None | Init::Unknown(_) => return None,
    };
    let phase = match (&exit, clue) {
        // Its shim may have told nobody: containerd was away for longer than it tries.
        (Some(_), _) => record::Phase::Running,
        (None, Some(clue)) if clue.paused => record::Phase::Paused,
        (None, Some(clue)) if clue.created => record::Phase::Created,
        (None, _) => record::Phase::Running,
    };
    let terminal = bundle
        .config
        .present()
        .is_some_and(|config| config.terminal);
    let rootfs = bundle.path.join("rootfs");
    let mounts = look.mounts.present().map_or(&[][..], Vec::as_slice);
    Some(record::Task {
        id: case.name.1.clone(),
        bundle: bundle.path.to_string_lossy().into_owned(),
        phase,
        init: init.map(process),
        runtime: runtime_of(case, bundle),
        rootfs: mounts
            .iter()
            .filter(|mount| mount.point == rootfs)
            .map(|mount| record::Mount {
                kind: mount.kind.clone(),
                source: mount.source.clone(),
                target: String::new(),
                options: Vec::new(),
            })
            .collect(),
        cgroup: clue.map(|clue| clue.cgroup.clone()).unwrap_or_default(),
        stdio: stdio_of(look, case, init, clue),
        terminal,
        created_at: Timestamp::from(created_at(case)),
        exit,
        oom: false,
        // What its stock shim has told of is unknown.
        oom_kills: None,
        restore: None,
        execs: init.map_or_else(Vec::new, |init| execs_of(look, case, init, clues)),
    })
}

fn runtime_of(case: &Case<'_>, bundle: &Bundle) -> Runtime {
    let options = bundle.options.present();
    let named = |name: &&String| !name.is_empty();
    let binary = bundle.runtime.present().filter(named);
    let binary = binary.or_else(|| options.map(|options| &options.binary_name).filter(named));
    // The folder in which runc's state was found is the word of the kernel's files; options may
    // be unreadable.
    let found = case
        .runc
        .and_then(|entry| entry.path.parent())
        .map(|root| root.to_string_lossy().into_owned());
    let root = match options.map(|options| &options.root).filter(named) {
        Some(root) => Path::new(root).join(&case.name.0),
        None => Path::new(paths::RUNC_ROOT).join(&case.name.0),
    };
    Runtime {
        binary: binary.map_or_else(|| "runc".into(), String::clone),
        root: found.unwrap_or_else(|| root.to_string_lossy().into_owned()),
        systemd_cgroup: options.is_some_and(|options| options.systemd_cgroup),
    }
}

/// The execs: what a pid file of the bundle names, and is in the task's cgroup, and no child of its
/// init or of another of its processes brought forth; and those that have ended, on their shim's
/// word.
fn execs_of(look: &Look, case: &Case<'_>, init: ProcessId, clues: &Clues) -> Vec<record::Exec> {
    let clue = case.bundle.and_then(|bundle| clues.tasks.get(&bundle.path));
    let members = case.cgroup.and_then(|cgroup| cgroup.processes.present());
    let members = members.into_iter().flatten();
    let members: BTreeMap<i32, ProcessId> = members.map(|p| (p.id.pid, p.id)).collect();
    let living = |exec: &ExecClue| {
        let table = look.processes.present()?;
        let id = members.get(&exec.pid).copied()?;
        let stat = table.get(&exec.pid).filter(|stat| stat.id == id)?;
        let first = !descends(table, stat, &members, init);
        (stat.alive() && first && id.start_time != 0).then_some(process(id))
    };
    let known = |exec: &ExecClue| {
        let exit = exec.exit.map(|(status, at)| Exit::Observed {
            status,
            at,
            oom: false,
        });
        let process = match exit {
            // To be told by its number, which may be another's by now.
            Some(_) => Process {
                pid: exec.pid.unsigned_abs(),
                start_time: 0,
            },
            None => living(exec)?,
        };
        Some(record::Exec {
            id: exec.id.clone(),
            // As with the init: an exit may not have been told.
            phase: record::Phase::Running,
            process: Some(process),
            stdio: exec.stdio.clone(),
            terminal: exec.terminal,
            exit,
        })
    };
    let execs = clue.map_or(&[][..], |clue| &clue.execs);
    execs.iter().filter_map(known).collect()
}

/// Its parent is a process of the container: `runc exec` starts its process from outside.
fn descends(
    table: &HashMap<i32, Stat>,
    stat: &Stat,
    members: &BTreeMap<i32, ProcessId>,
    init: ProcessId,
) -> bool {
    stat.id == init
        || members
            .get(&stat.ppid)
            .is_some_and(|parent| table.get(&parent.pid).is_some_and(|p| p.id == *parent))
}

/// As its shim says, or said to a supervisor while it lived; else what its client's fifos tell.
fn stdio_of(
    look: &Look,
    case: &Case<'_>,
    init: Option<ProcessId>,
    clue: Option<&TaskClues>,
) -> record::Stdio {
    let says = case.state().map(|state| {
        let [stdin, stdout, stderr] = state.stdio.clone();
        record::Stdio {
            stdin,
            stdout,
            stderr,
            ..record::Stdio::default()
        }
    });
    let said = || {
        let init = process(init?);
        let init = (init.pid, init.start_time);
        look.witnessed.stdio_of(&case.name, init)
    };
    says.or_else(said)
        .or_else(|| clue.map(|clue| clue.stdio.clone()))
        .unwrap_or_default()
}

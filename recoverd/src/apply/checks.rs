//! Looks again at what a step requires, just before it. What cannot be seen does not hold.

use std::path::Path;

use recoverd_common::{mounts, proc::FileId, seen::Seen};

use super::{CALL, Hands};
use crate::{
    facts::Phase,
    observe::{self, containerd, grounds, processes},
    plan::Requirement,
};

/// The requirement holds, or why not.
pub fn holds(requirement: &Requirement, hands: &Hands<'_>) -> Result<(), String> {
    let proc = &hands.proc;
    match requirement {
        Requirement::Lives(id) => match proc.living(*id) {
            Seen::Present(_) => Ok(()),
            Seen::Absent => Err("it ended".into()),
            Seen::Unknown(why) => Err(why),
        },
        Requirement::Gone(id) => match proc.living(*id) {
            Seen::Absent => Ok(()),
            Seen::Present(_) => Err("it lives".into()),
            Seen::Unknown(why) => Err(why),
        },
        Requirement::Childless(id) => {
            let pids = proc.pids().map_err(|error| error.to_string())?;
            for pid in pids {
                match proc.stat(pid) {
                    Seen::Present(stat) if stat.ppid == id.pid && stat.alive() => {
                        return Err(format!("{pid} is its child"));
                    }
                    Seen::Present(_) | Seen::Absent => {}
                    Seen::Unknown(why) => return Err(why),
                }
            }
            Ok(())
        }
        Requirement::Same(path, file) => match FileId::of_entry(path) {
            Seen::Present(there) if there == *file => Ok(()),
            Seen::Present(_) => Err("another one is there".into()),
            Seen::Absent => Err("it is gone".into()),
            Seen::Unknown(why) => Err(why),
        },
        Requirement::NobodyListens(address) => grounds::nobody_listens(address),
        Requirement::Down(address) => observe::down(&hands.roots, address),
        Requirement::NobodyConnected(address) => match grounds::connections(proc, address) {
            Seen::Present(0) => Ok(()),
            Seen::Present(count) => Err(format!("{count} are")),
            Seen::Absent => Err("sockets cannot be seen".into()),
            Seen::Unknown(why) => Err(why),
        },
        Requirement::NoShim(name, address) => {
            match processes::names_shim(proc, &name.0, &name.1, address) {
                Seen::Present(pid) => Err(format!("{pid} does")),
                Seen::Absent => Ok(()),
                Seen::Unknown(why) => Err(why),
            }
        }
        Requirement::Mounted(point, id) => match mounted(point, *id, hands) {
            Seen::Present(()) => Ok(()),
            Seen::Absent => Err("it is gone".into()),
            Seen::Unknown(why) => Err(why),
        },
        Requirement::Unlisted(address, name) => {
            match hands
                .runtime
                .block_on(containerd::task_of(address, name, CALL))
            {
                Ok(None) => Ok(()),
                Ok(Some(_)) => Err("it does".into()),
                Err(why) => Err(why),
            }
        }
        Requirement::Running(address, name) => {
            match hands
                .runtime
                .block_on(containerd::task_of(address, name, CALL))
            {
                Ok(Some(task)) if task.phase == Phase::Running => Ok(()),
                Ok(Some(task)) => Err(format!("it is {}", task.phase.word())),
                Ok(None) => Err("it is not listed".into()),
                Err(why) => Err(why),
            }
        }
        Requirement::NobodyHas(files) => {
            let wanted = files.iter().cloned().collect();
            let users = processes::users_of(proc, &wanted);
            match users.keys().next() {
                Some(pid) => Err(format!("{pid} has")),
                None => Ok(()),
            }
        }
    }
}

/// This very mount is there.
pub fn mounted(point: &Path, id: u64, hands: &Hands<'_>) -> Seen<()> {
    mounts::read(&hands.roots.proc).and_then(|all| {
        let there = |mount: &mounts::Mount| mount.point == point && mount.id == id;
        if all.iter().any(there) {
            Seen::Present(())
        } else {
            Seen::Absent
        }
    })
}

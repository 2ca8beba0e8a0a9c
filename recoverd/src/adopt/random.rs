//! What holds of every decision to adopt, whatever is wrong with the node.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;
use recoverd_common::{proc::ProcessId, record, seen::Seen};

use super::{
    Order,
    clues::Clues,
    decide::{Decision, Stillness, Wish, select, stillness, unreachable},
    orders::orders,
};
use crate::{
    classify::tests::random::{Broken, broken},
    correlate::{Kind, correlate},
    facts::{Answer, Api, Connection, Look, Reply, Shim, TaskState, fixture::SOCKET_DIR},
};

/// Which shims two looks saw unresponsive, by a bit for each.
fn ill(look: &Look, bits: u8) -> BTreeSet<ProcessId> {
    let shims = look.shims.iter().enumerate();
    shims
        .filter(|(at, _)| bits >> (at % 8) & 1 == 1)
        .map(|(_, shim)| shim.id)
        .collect()
}

fn decide(look: &Look, unresponsive: &BTreeSet<ProcessId>) -> Decision {
    let wish = Wish {
        address: None,
        namespace: None,
        only: None,
        unresponsive,
        unheard: None,
        unit: None,
    };
    let cases = correlate(look, SOCKET_DIR.as_ref());
    orders(look, select(look, &cases, &wish), &Clues::default())
}

/// Some containerds are down, as in their hook.
fn look_of(broken: &Broken, stopped: bool) -> Look {
    let mut look = broken.look();
    if stopped {
        for instance in &mut look.instances {
            instance.api = Api::Down;
            instance.daemon = None;
        }
    }
    look
}

fn named(process: record::Process) -> ProcessId {
    ProcessId {
        pid: i32::try_from(process.pid).unwrap(),
        start_time: process.start_time,
    }
}

/// Every process that an order names.
fn processes(order: &Order) -> Vec<ProcessId> {
    let mut all: Vec<ProcessId> = order.members.iter().filter_map(|m| m.init).collect();
    all.extend(order.adoption.predecessor.map(named));
    for task in order
        .adoption
        .record
        .iter()
        .flat_map(|record| &record.tasks)
    {
        all.extend(task.init.map(named));
        all.extend(task.execs.iter().filter_map(|exec| exec.process.map(named)));
    }
    all
}

/// The order was carried out: our shim serves its tasks where containerd looks.
fn adopted(look: &mut Look, order: &Order, pid: i32) {
    if let Some(gone) = order.adoption.predecessor {
        look.shims.retain(|shim| shim.id != named(gone));
    }
    let socket = order.adoption.socket.to_string_lossy().into_owned();
    let id = ProcessId { pid, start_time: 1 };
    let template = crate::facts::fixture::shim(&crate::facts::fixture::C1);
    look.shims.push(Shim {
        id,
        namespace: order.namespace.clone(),
        task: order.group.clone(),
        address: order.address.clone(),
        name: "containerd-shim-recoverd-v1".into(),
        listens: vec![socket.clone()],
        ..template
    });
    if let Seen::Present(listeners) = &mut look.listeners {
        for pids in listeners.values_mut() {
            let gone = order.adoption.predecessor.map(|gone| named(gone).pid);
            pids.retain(|pid| Some(*pid) != gone);
        }
        listeners.retain(|_, pids| !pids.is_empty());
        listeners.insert(socket.clone(), vec![pid]);
    }
    let states = order.members.iter().map(|member| {
        let state = TaskState {
            phase: crate::facts::Phase::Running,
            pid: member.init.map_or(0, |init| init.pid.unsigned_abs()),
            exit_status: 0,
            exited_at: None,
            terminal: false,
            stdio: Default::default(),
        };
        (member.name.1.clone(), Reply::Said(state))
    });
    let answer = Answer {
        connection: Connection::Made,
        greeting: Reply::Said(crate::facts::Greeting {
            shim_pid: pid.unsigned_abs(),
            version: String::new(),
        }),
        states: states.collect(),
        api: Some(2),
        took: None,
        asked: 1,
        patient: true,
    };
    look.answers.insert(socket, answer);
}

proptest! {
    #[test]
    fn who_is_named_has_a_start_time_and_is_in_the_process_table(
        broken in broken(), stopped: bool, bits: u8,
    ) {
        let look = look_of(&broken, stopped);
        let table = look.processes.present().unwrap();
        for order in decide(&look, &ill(&look, bits)).orders {
            for member in &order.members {
                if let Some(id) = member.init {
                    let lives = table.get(&id.pid).is_some_and(|stat| stat.id == id && stat.alive());
                    prop_assert!(lives, "{order:#?}");
                }
            }
            for id in processes(&order) {
                prop_assert!(id.pid > 0 && id.start_time != 0, "{order:#?}");
            }
        }
    }

    #[test]
    fn a_shim_is_replaced_only_if_it_hangs_or_cannot_be_reached_and_containerd_is_down(
        broken in broken(), stopped: bool, bits: u8,
    ) {
        let look = look_of(&broken, stopped);
        let unresponsive = ill(&look, bits);
        let cases = correlate(&look, SOCKET_DIR.as_ref());
        for order in decide(&look, &unresponsive).orders {
            let Some(predecessor) = order.adoption.predecessor.map(named) else { continue };
            prop_assert!(unresponsive.contains(&predecessor));
            let shim = look.shims.iter().find(|shim| shim.id == predecessor).unwrap();
            let of_it = cases.cases.iter().filter(|case| {
                case.shim.process().is_some_and(|found| found.id == predecessor)
            });
            let lost = of_it.into_iter().any(unreachable);
            let still = matches!(stillness(shim), Stillness::Stopped | Stillness::Idle);
            prop_assert!(still || lost && stillness(shim) != Stillness::Device, "{order:#?}");
            let instance = look.instances.iter().find(|i| i.is(&order.address)).unwrap();
            prop_assert!(matches!(instance.api, Api::Down) && instance.daemon.is_none());
        }
    }

    #[test]
    fn what_is_foreign_is_in_no_order_and_nobody_is_in_two(
        broken in broken(), stopped: bool, bits: u8,
    ) {
        let look = look_of(&broken, stopped);
        let cases = correlate(&look, SOCKET_DIR.as_ref());
        let decision = decide(&look, &ill(&look, bits));
        let mut seen = BTreeSet::new();
        let mut sockets = BTreeSet::new();
        for order in &decision.orders {
            prop_assert!(sockets.insert((&order.address, &order.adoption.socket)), "{decision:#?}");
            for member in &order.members {
                prop_assert!(seen.insert((&order.address, &member.name)), "{decision:#?}");
                let foreign = cases.cases.iter().any(|case| {
                    let instance = case.instance.and_then(|at| look.instances.get(at));
                    case.name == member.name
                        && instance.is_some_and(|i| i.is(&order.address))
                        && case.kind() == Some(Kind::Foreign)
                });
                prop_assert!(!foreign, "{order:#?}");
            }
        }
        prop_assert!(decision.refused.iter().all(|refused| !refused.why.is_empty()));
    }

    #[test]
    fn unknown_claims_nobody(broken in broken(), stopped: bool, bits: u8, which in 0..3) {
        let mut look = look_of(&broken, stopped);
        let unresponsive = ill(&look, bits);
        let unknown = || "permission denied".to_owned();
        match which {
            0 => look.processes = Seen::Unknown(unknown()),
            1 => look.listeners = Seen::Unknown(unknown()),
            _ => for instance in &mut look.instances {
                instance.api = Api::Unknown(unknown());
            },
        }
        for order in decide(&look, &unresponsive).orders {
            let replaces = order.adoption.predecessor.is_some();
            let harmless = match which {
                0 => order.living() == 0 && !replaces,
                // Nobody is orphaned where somebody may listen.
                1 => replaces,
                // Whether containerd runs matters only where a living shim would be ended.
                _ => !replaces,
            };
            prop_assert!(harmless, "{which}: {order:#?}");
        }
    }

    #[test]
    fn what_was_adopted_is_not_adopted_again(broken in broken(), stopped: bool, bits: u8) {
        let mut look = look_of(&broken, stopped);
        let unresponsive = ill(&look, bits);
        let first = decide(&look, &unresponsive);
        let mut served = BTreeMap::new();
        for (order, pid) in first.orders.iter().zip(5000..) {
            adopted(&mut look, order, pid);
            served.insert(order.adoption.socket.clone(), order);
        }
        let again = decide(&look, &unresponsive);
        for order in &again.orders {
            let before = served.get(&order.adoption.socket);
            prop_assert!(before.is_none(), "{order:#?}\n{before:#?}");
        }
    }
}

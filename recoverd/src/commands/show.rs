//! `recoverd show NS/ID`: everything known of one task, whose word each fact is, and where the
//! words differ.

use std::io::{self, Write};

use recoverd_common::{seen::Seen, timestamp::Timestamp};
use serde::Serialize;

use super::look;
use crate::{
    Failure, Verdict, classify,
    cli::{Global, Show, TextOrJson},
    config::Config,
    correlate::{Case, Init, Known, ShimOf},
    facts::{Api, Connection, Look, Phase, Reply, one_line},
    findings::{Evidence, Finding},
    report::{Report, json},
};

/// A supervisor may have seen thousands of execs of one task.
const SHOWN_EXITS: usize = 10;

/// Looks and prints.
pub fn run(args: &Show, global: &Global, config: &Config) -> Result<Verdict, Failure> {
    let name = look::task_name(&args.task)?;
    let plan = look::plan(global, config);
    let narrow = look::narrow(global, &plan);
    let examined = look::examine(&plan, config)?;
    let cases = examined.cases(&plan);
    let report = Report::new(&examined, &cases, &narrow);
    let mut text = String::new();
    let mut any = false;
    for case in look::cases_named(&report, &name)? {
        let findings = findings(&report, case);
        any |= !findings.is_empty();
        text.push_str(&match args.output {
            TextOrJson::Text => self::text(&report, case),
            TextOrJson::Json => json::line(&Shown {
                schema: "recoverd/show/1",
                task: json::task(&report, case),
                facts: &facts(report.look, case),
                differences: &differences(case),
                findings: &findings,
            }),
        });
    }
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()?;
    Ok(if any {
        Verdict::Findings
    } else {
        Verdict::Clean
    })
}

fn findings<'a>(report: &Report<'a>, case: &Case<'_>) -> Vec<&'a Finding> {
    let name = format!("{}/{}", case.name.0, case.name.1);
    report
        .findings
        .iter()
        .filter(|s| s.finding.subject.text() == name)
        .filter(|s| s.instance == case.instance || s.instance.is_none())
        .map(|s| &s.finding)
        .collect()
}

#[derive(Serialize)]
struct Shown<'a> {
    schema: &'static str,
    task: json::Task<'a>,
    facts: &'a [Evidence],
    differences: &'a [String],
    findings: &'a [&'a Finding],
}

/// What is told of one task, for people; `dump` packs it too.
pub fn text(report: &Report<'_>, case: &Case<'_>) -> String {
    let mut text = format!("{}/{}: {}\n", case.name.0, case.name.1, case.phase().word());
    let mut last = "";
    for fact in facts(report.look, case) {
        let by = if fact.by == last { "" } else { fact.by };
        text.push_str(&format!("  {by:<11} {}\n", fact.fact));
        last = fact.by;
    }
    for line in differences(case) {
        text.push_str(&format!("  {:<11} {line}\n", "differ:"));
    }
    for finding in findings(report, case) {
        text.push_str(&format!(
            "\n{} {}\n",
            finding.severity.word(),
            finding.code.word()
        ));
        for evidence in &finding.evidence {
            text.push_str(&format!("  {:<11} {}\n", evidence.by, evidence.fact));
        }
        text.push_str(&format!("  {:<11} {}\n", "action", finding.action));
    }
    text
}

/// Every fact, with its witness.
fn facts(look: &Look, case: &Case<'_>) -> Vec<Evidence> {
    let mut all = Vec::new();
    let mut say = |by: &'static str, fact: String| {
        all.push(Evidence {
            by,
            fact: one_line(&fact),
        });
    };
    if let Some(pod) = &case.pod {
        let container = if pod.container.is_empty() {
            "sandbox"
        } else {
            &pod.container
        };
        say(
            "bundle",
            format!("pod {}/{}, container {container}", pod.namespace, pod.name),
        );
    }
    match &case.init {
        Init::Alive(id) => say(
            "kernel",
            format!(
                "init {} lives since {} (start time {})",
                id.pid,
                Timestamp::from(look.host.started_at(*id)),
                id.start_time
            ),
        ),
        Init::Dead(Some(id), why) => say("kernel", format!("init {} ended: {why}", id.pid)),
        Init::Dead(None, why) => say("kernel", format!("the init ended: {why}")),
        Init::None => say("kernel", "nothing names an init".into()),
        Init::Unknown(why) => say("kernel", format!("init unknown: {why}")),
    }
    if let Some(cgroup) = case.cgroup {
        let count = match &cgroup.processes {
            Seen::Present(processes) => match processes.len() {
                1 => "1 process".into(),
                many => format!("{many} processes"),
            },
            Seen::Absent => "gone".into(),
            Seen::Unknown(why) => why.clone(),
        };
        say("kernel", format!("cgroup {}: {count}", cgroup.path));
    }
    for exec in look.execs.iter().filter(|exec| exec.name == case.name) {
        let id = exec.exec_id.as_deref().unwrap_or("of unknown id");
        say(
            "kernel",
            format!("exec {id}: process {} lives", exec.id.pid),
        );
    }
    match &case.shim {
        ShimOf::Lives(shim) => {
            let exe = match &shim.exe {
                Seen::Present(exe) => exe.path.display().to_string(),
                Seen::Absent => "gone".into(),
                Seen::Unknown(why) => format!("unknown ({why})"),
            };
            let memory = shim.memory.present().map_or(String::new(), |m| {
                format!(", {} KiB PSS, {} KiB private", m.pss_kib, m.private_kib)
            });
            say(
                "kernel",
                format!(
                    "shim {} runs {exe} (state {}, {} threads, {} descriptors{memory})",
                    shim.id.pid,
                    shim.state,
                    shim.threads,
                    shim.descriptors.map_or("unknown".into(), |n| n.to_string()),
                ),
            );
            if let Some(why) = classify::outdated(shim) {
                say("kernel", format!("shim {} {why}", shim.id.pid));
            }
            for address in &shim.listens {
                say(
                    "kernel",
                    format!("shim {} listens on {address}", shim.id.pid),
                );
            }
            say(
                "shim",
                format!("its command line names containerd at {}", shim.address),
            );
        }
        ShimOf::Stranger(pids) => {
            say(
                "kernel",
                format!("listener {pids:?} has no shim's command line"),
            );
        }
        ShimOf::None => say("kernel", "no shim process serves the task".into()),
        ShimOf::Unknown(why) => say("kernel", format!("shim unknown: {why}")),
    }
    let address = case.written.as_ref().or(case.address.as_ref());
    if let Some(death) = address.and_then(|address| look.witnessed.death_at(address)) {
        say("supervisor", death);
    }
    for exit in look.witnessed.exits_of(&case.name).take(SHOWN_EXITS) {
        say("supervisor", exit);
    }
    if let Some(bundle) = case.bundle {
        say("bundle", bundle.path.display().to_string());
        say(
            "bundle",
            format!("address: {}", seen(&bundle.address, Clone::clone)),
        );
        let bootstrap = seen(&bundle.bootstrap, |b| {
            format!("version {}, {}, {}", b.version, b.protocol, b.address)
        });
        say("bundle", format!("bootstrap.json: {bootstrap}"));
        let binary = seen(&bundle.shim_binary, |path| path.display().to_string());
        say("bundle", format!("shim-binary-path: {binary}"));
        say(
            "bundle",
            format!("runtime: {}", seen(&bundle.runtime, Clone::clone)),
        );
        say(
            "bundle",
            format!(
                "init.pid: {}",
                seen(&bundle.init_pid, |init| init.pid.to_string())
            ),
        );
        if let Seen::Unknown(why) = &bundle.config {
            say("bundle", format!("config.json: {why}"));
        }
    } else {
        say("bundle", "there is none".into());
    }
    match case.runc {
        Some(entry) => {
            let state = seen(&entry.state, |state| match state.init {
                Some(id) => format!("init {} (start time {})", id.pid, id.start_time),
                None => "no init".into(),
            });
            say("runc", format!("{}: {state}", entry.path.display()));
        }
        None => say("runc", "knows no such container".into()),
    }
    answers(case, &mut say);
    for record in look
        .records
        .iter()
        .filter(|r| case.address.as_ref() == Some(&r.socket))
    {
        let text = seen(&record.record, |record| {
            let task = record.tasks.iter().find(|task| task.id == case.name.1);
            format!(
                "shim {} {}, written {}{}",
                record.shim.process.pid,
                record.shim.version,
                record.written_at,
                task.map_or(String::new(), |task| format!(", task {:?}", task.phase)
                    .to_lowercase()),
            )
        });
        say("record", format!("{}: {text}", record.path.display()));
    }
    match (
        case.containerd,
        case.instance.and_then(|at| look.instances.get(at)),
    ) {
        (Known::Yes(task), Some(i)) => say(
            "containerd",
            format!(
                "at {} lists it as {}, pid {}",
                i.address,
                task.phase.word(),
                task.pid
            ),
        ),
        (Known::No, Some(i)) => say("containerd", format!("at {} does not list it", i.address)),
        (Known::CannotSay, Some(i)) => match &i.api {
            Api::Down => say("containerd", format!("at {} is down", i.address)),
            Api::Unknown(why) => say("containerd", format!("at {}: {why}", i.address)),
            Api::Up(_) => say(
                "containerd",
                format!("at {} did not list it in time", i.address),
            ),
        },
        (_, None) => say("containerd", "which one it belongs to is not known".into()),
    }
    let record = case
        .instance
        .and_then(|at| look.instances.get(at)?.api.up()?.containers.get(&case.name));
    if let Some(record) = record {
        say(
            "containerd",
            format!("its container record names runtime {}", record.runtime),
        );
    }
    all
}

fn answers(case: &Case<'_>, say: &mut dyn FnMut(&'static str, String)) {
    let (Some(answer), Some(address)) = (case.answer, &case.address) else {
        return;
    };
    match &answer.connection {
        Connection::Made => {}
        Connection::Refused => return say("kernel", format!("nobody listens on {address}")),
        Connection::NoFile => return say("kernel", format!("there is no {address}")),
        Connection::QueueFull => return say("kernel", format!("{address}: its queue is full")),
        Connection::Failed(why) => return say("kernel", format!("{address}: {why}")),
    }
    match &answer.greeting {
        Reply::Said(greeting) => say(
            "shim",
            format!(
                "Connect: pid {}, task API v{}{}",
                greeting.shim_pid,
                answer.api.map_or("?".into(), |api| api.to_string()),
                if greeting.version.is_empty() {
                    String::new()
                } else {
                    format!(", version {}", greeting.version)
                },
            ),
        ),
        Reply::Error(code, text) => say("shim", format!("Connect: error {code}: {text}")),
        Reply::Silent => say(
            "shim",
            format!("Connect: no answer, asked {} times", answer.asked),
        ),
        Reply::Garbage(why) => say("shim", format!("Connect: no ttrpc: {why}")),
        Reply::NotAsked => {}
    }
    match answer.states.get(&case.name.1) {
        Some(Reply::Said(state)) => {
            let exit = match (state.phase, state.exited_at) {
                (Phase::Stopped, Some(seconds)) => format!(
                    ", exited with {} at {}",
                    state.exit_status,
                    Timestamp { seconds, nanos: 0 }
                ),
                (Phase::Stopped, None) => format!(", exited with {}", state.exit_status),
                _ => String::new(),
            };
            let terminal = if state.terminal { ", terminal" } else { "" };
            say(
                "shim",
                format!(
                    "State: {}, pid {}{exit}{terminal}",
                    state.phase.word(),
                    state.pid
                ),
            );
            for (name, path) in ["stdin", "stdout", "stderr"].iter().zip(&state.stdio) {
                if !path.is_empty() {
                    say("shim", format!("{name}: {path}"));
                }
            }
        }
        Some(Reply::Error(code, text)) => say("shim", format!("State: error {code}: {text}")),
        Some(Reply::Silent) => say("shim", "State: no answer".into()),
        Some(Reply::Garbage(why)) => say("shim", format!("State: no ttrpc: {why}")),
        Some(Reply::NotAsked) | None => {}
    }
}

fn seen<T>(value: &Seen<T>, text: impl FnOnce(&T) -> String) -> String {
    match value {
        Seen::Present(value) => text(value),
        Seen::Absent => "none".into(),
        Seen::Unknown(why) => why.clone(),
    }
}

/// Where the witnesses contradict each other.
fn differences(case: &Case<'_>) -> Vec<String> {
    let mut pids: Vec<(&str, u32)> = Vec::new();
    let mut pid = |by: &'static str, value: i64| {
        if let Ok(value @ 1..) = u32::try_from(value) {
            pids.push((by, value));
        }
    };
    let runc = case.runc.and_then(|entry| entry.state.present()?.init);
    pid("runc", runc.map_or(0, |id| id.pid.into()));
    let file = case.bundle.and_then(|bundle| bundle.init_pid.present());
    pid("init.pid", file.map_or(0, |init| init.pid.into()));
    pid("shim", case.state().map_or(0, |state| state.pid.into()));
    if let Known::Yes(task) = case.containerd {
        pid("containerd", task.pid.into());
    }
    let mut found = Vec::new();
    if pids
        .iter()
        .any(|(_, value)| Some(*value) != pids.first().map(|(_, first)| *first))
    {
        let words: Vec<String> = pids
            .iter()
            .map(|(by, value)| format!("{by} {value}"))
            .collect();
        found.push(format!("init: {}", words.join(", ")));
    }
    let mut phases: Vec<(&str, Phase)> = Vec::new();
    match &case.init {
        Init::Alive(_) => {}
        Init::Dead(..) => phases.push(("kernel", Phase::Stopped)),
        Init::None | Init::Unknown(_) => {}
    }
    phases.extend(case.state().map(|state| ("shim", state.phase)));
    if let Known::Yes(task) = case.containerd {
        phases.push(("containerd", task.phase));
    }
    if phases
        .iter()
        .any(|(_, phase)| Some(*phase) != phases.first().map(|(_, first)| *first))
    {
        let words: Vec<String> = phases
            .iter()
            .map(|(by, phase)| format!("{by} {}", phase.word()))
            .collect();
        found.push(format!("phase: {}", words.join(", ")));
    }
    found
}

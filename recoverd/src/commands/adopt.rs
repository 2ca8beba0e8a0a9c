//! `recoverd adopt`: starts our shim for tasks whose shim is gone.

use std::{
    collections::BTreeSet,
    io::{self, Write},
    time::{Duration, Instant},
};

use serde::Serialize;
use serde_json::{Map, Value, json};

use super::look;
use crate::{
    Failure, Verdict,
    adopt::{self, How, Order, Outcome, Wish, decide::Refused, run::find_binary},
    cli::{self, TableOrJson},
    config::Config,
    facts::{Api, Gap, TaskName},
    findings::{Code, Subject},
    history::{Event, History},
    lock,
    verify::{Again, Examined},
};

/// Successors that are started at the same time. Each is a process and the runc state of a pod;
/// more than a few per processor only wait for each other.
pub const AT_ONCE: usize = 16;
/// All of `adopt` together.
const TOTAL: Duration = Duration::from_secs(60);

/// Takes the lock, looks, adopts, prints.
pub fn run(args: &cli::Adopt, global: &cli::Global, config: &Config) -> Result<Verdict, Failure> {
    let only: Option<BTreeSet<TaskName>> = match args.tasks.as_slice() {
        [] => None,
        names => Some(
            names
                .iter()
                .map(|n| look::task_name(n))
                .collect::<Result<_, _>>()?,
        ),
    };
    let binary = find_binary(config.adopt.binary.as_deref()).map_err(Failure::Blind)?;
    let _lock = lock::take(&config.run_dir, "adopt").map_err(refused)?;
    let plan = look::plan(global, config);
    let narrow = look::narrow(global, &plan);
    let runtime = look::runtime()?;
    let examined = look::examine_again(&runtime, &plan, config, Again::All);
    if !examined.look.host.root {
        return Err(Failure::Blind("adopting needs root".into()));
    }
    let cases = examined.cases(&plan);
    let wish = Wish {
        address: narrow.address.as_deref(),
        namespace: narrow.namespace.as_deref(),
        only: only.as_ref(),
        unresponsive: &BTreeSet::new(),
        unheard: None,
        unit: None,
    };
    let mut decision = adopt::decide(&plan.roots, &examined.look, &cases, &wish);
    let (orders, passing): (Vec<Order>, Vec<Order>) = decision
        .orders
        .into_iter()
        .partition(|order| stays(&examined, order));
    decision.refused.extend(passing.iter().flat_map(|order| {
        order.members.iter().map(|member| Refused {
            name: member.name.clone(),
            why: "is being changed by containerd right now".into(),
            lost: false,
        })
    }));
    let history = History::new(&config.history, "adopt");
    let how = How {
        binary,
        deadline: config.adopt.deadline,
        until: Instant::now() + TOTAL,
        at_once: AT_ONCE,
        run: history.run().to_owned(),
        run_dir: config.run_dir.clone(),
    };
    let mut complaint = Complaint::default();
    let outcomes = if orders.is_empty() {
        Vec::new()
    } else {
        complaint.of(begin(&history, orders.len()));
        for order in &orders {
            complaint.of(intend(&history, order));
        }
        let outcomes = runtime.block_on(adopt::run(orders, &how));
        for outcome in &outcomes {
            complaint.of(tell(&history, outcome));
        }
        outcomes
    };
    complaint.say();
    let result = Told {
        schema: "recoverd/adopt/1",
        tasks: rows(&outcomes, &decision.refused),
        gaps: &examined.gaps,
    };
    let mut out = io::stdout().lock();
    out.write_all(print(&result, args.output).as_bytes())?;
    out.flush()?;
    Ok(verdict(&result))
}

/// As exit codes go.
pub fn refused(refused: lock::Refused) -> Failure {
    match refused {
        lock::Refused::Held { .. } => Failure::Held(refused.to_string()),
        lock::Refused::Failed { .. } => Failure::Blind(refused.to_string()),
    }
}

/// What is orphaned under a containerd that runs may be on its way to be deleted: then only what
/// two looks saw, and what lives, is adopted.
fn stays(examined: &Examined, order: &Order) -> bool {
    let look = &examined.look;
    let instance = look.instances.iter().find(|i| i.is(&order.address));
    if instance.is_some_and(|i| matches!(i.api, Api::Down) && i.daemon.is_none()) {
        return true;
    }
    order.members.iter().any(|member| {
        let subject = Subject::Task {
            namespace: member.name.0.clone(),
            id: member.name.1.clone(),
        };
        member.init.is_some()
            && examined
                .suspicions
                .iter()
                .any(|s| s.finding.code == Code::OrphanedTask && s.finding.subject == subject)
    })
}

/// Trouble with the history is told once, on standard error, and stops nothing.
#[derive(Debug, Default)]
pub struct Complaint(Option<String>);

impl Complaint {
    /// Remembers the first.
    pub fn of(&mut self, result: Result<(), crate::history::NotWritten>) {
        if let Err(error) = result {
            self.0.get_or_insert_with(|| error.to_string());
        }
    }

    /// Says it, if there is any.
    pub fn say(self) {
        if let Some(line) = self.0 {
            crate::complain(&line);
        }
    }
}

/// The history's line before the first of these adoptions.
pub fn begin(history: &History, groups: usize) -> Result<(), crate::history::NotWritten> {
    let text = format!("{groups} shims to be succeeded");
    history.tell(Event::Began, "", &text, Map::new())
}

/// The history's line before an adoption.
pub fn intend(history: &History, order: &Order) -> Result<(), crate::history::NotWritten> {
    let text = format!(
        "adopt {} at {}: {}",
        names(order),
        order.adoption.socket.display(),
        order.because.join("; ")
    );
    history.tell(Event::Intended, &subject(order), &text, Map::new())
}

/// The history's lines after it.
pub fn tell(history: &History, outcome: &Outcome) -> Result<(), crate::history::NotWritten> {
    let subject = subject(&outcome.order);
    let millis = u64::try_from(outcome.took.as_millis()).unwrap_or(u64::MAX);
    let details = |more: Value| match json!({"millis": millis, "more": more}) {
        Value::Object(map) => map,
        _ => Map::new(),
    };
    match &outcome.verdict {
        adopt::Verdict::Adopted(adopted) => {
            let pid = adopted.shim.pid;
            let mut remarks = adopted.remarks.clone();
            for task in &adopted.tasks {
                remarks.extend(task.remarks.iter().map(|r| format!("{}: {r}", task.id)));
            }
            let mut text = format!("shim {pid} serves {}", names(&outcome.order));
            if !remarks.is_empty() {
                text.push_str(&format!("; {}", remarks.join("; ")));
            }
            history.tell(Event::Done, &subject, &text, details(json!({"shim": pid})))
        }
        adopt::Verdict::StoodBack(why) => {
            history.tell(Event::Skipped, &subject, why, details(Value::Null))
        }
        adopt::Verdict::Failed(why) => history.tell(
            Event::Failed,
            &subject,
            &why.to_string(),
            details(Value::Null),
        ),
    }
}

fn subject(order: &Order) -> String {
    format!("{}/{}", order.namespace, order.group)
}

fn names(order: &Order) -> String {
    let names: Vec<String> = order
        .members
        .iter()
        .map(|member| format!("{}/{}", member.name.0, member.name.1))
        .collect();
    names.join(" ")
}

/// What became of one task.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Row {
    namespace: String,
    id: String,
    /// `adopted`, `stood-back`, `failed`, `refused`, `lost`.
    verdict: &'static str,
    /// The new shim.
    shim: Option<u32>,
    /// How far the task is.
    phase: Option<&'static str>,
    /// Why, or what could not be had back.
    why: String,
}

#[derive(Serialize)]
struct Told<'a> {
    schema: &'static str,
    tasks: Vec<Row>,
    gaps: &'a [Gap],
}

/// One row for each task, by name.
fn rows(outcomes: &[Outcome], refused: &[Refused]) -> Vec<Row> {
    let mut rows: Vec<Row> = outcomes.iter().flat_map(rows_of).collect();
    rows.extend(refused.iter().map(|refused| Row {
        namespace: refused.name.0.clone(),
        id: refused.name.1.clone(),
        verdict: if refused.lost { "lost" } else { "refused" },
        shim: None,
        phase: None,
        why: refused.why.clone(),
    }));
    rows.sort_by(|a, b| (&a.namespace, &a.id).cmp(&(&b.namespace, &b.id)));
    rows
}

fn rows_of(outcome: &Outcome) -> Vec<Row> {
    let row = |name: &TaskName, verdict, why: String| Row {
        namespace: name.0.clone(),
        id: name.1.clone(),
        verdict,
        shim: None,
        phase: None,
        why,
    };
    let members = outcome.order.members.iter();
    match &outcome.verdict {
        adopt::Verdict::StoodBack(why) => members
            .map(|member| row(&member.name, "stood-back", why.clone()))
            .collect(),
        adopt::Verdict::Failed(why) => members
            .map(|member| row(&member.name, "failed", why.to_string()))
            .collect(),
        adopt::Verdict::Adopted(adopted) => adopted
            .tasks
            .iter()
            .map(|task| Row {
                shim: Some(adopted.shim.pid),
                phase: Some(phase(task.phase)),
                ..row(
                    &(outcome.order.namespace.clone(), task.id.clone()),
                    "adopted",
                    task.remarks.join("; "),
                )
            })
            .collect(),
    }
}

fn phase(phase: recoverd_common::record::Phase) -> &'static str {
    use recoverd_common::record::Phase;
    match phase {
        Phase::Creating => "creating",
        Phase::Created => "created",
        Phase::Running => "running",
        Phase::Paused => "paused",
        Phase::Stopped => "stopped",
        Phase::Deleting => "deleting",
    }
}

fn verdict(result: &Told<'_>) -> Verdict {
    let kept = |row: &Row| matches!(row.verdict, "adopted" | "stood-back");
    if !result.tasks.iter().all(kept) {
        Verdict::Unkept
    } else if !result.gaps.is_empty() {
        Verdict::Gaps
    } else {
        Verdict::Clean
    }
}

fn print(result: &Told<'_>, format: TableOrJson) -> String {
    match format {
        TableOrJson::Json => format!("{:#}\n", json!(result)),
        TableOrJson::Table => {
            let mut text = String::new();
            if result.tasks.is_empty() {
                text.push_str("nothing to adopt\n");
            }
            for row in &result.tasks {
                let shim = row
                    .shim
                    .map_or_else(String::new, |pid| format!(" by shim {pid}"));
                let phase = row
                    .phase
                    .map_or_else(String::new, |phase| format!(", {phase}"));
                let why = match row.why.as_str() {
                    "" => String::new(),
                    why => format!(": {why}"),
                };
                text.push_str(&format!(
                    "{:<10}  {}/{}{shim}{phase}{why}\n",
                    row.verdict, row.namespace, row.id
                ));
            }
            for gap in result.gaps {
                text.push_str(&format!("{:<10}  {}: {}\n", "unseen", gap.what, gap.why));
            }
            text
        }
    }
}

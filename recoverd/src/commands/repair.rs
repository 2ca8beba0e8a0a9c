//! `recoverd repair`: looks, plans, shows; with `--apply` does it, looks again and goes on with what
//! the first steps laid bare (a shim that was ended leaves a bundle), within one run's limit.

use std::{
    collections::BTreeSet,
    io::{self, Write},
};

use recoverd_common::proc::{Proc, ProcessId};
use serde_json::{Map, Value, json};

use super::{adopt::Complaint, look};
use crate::{
    Failure, Verdict,
    adopt::{self, Decision, Wish},
    apply::{self, Hands, Outcome},
    cli::{self, TableOrJson},
    config::Config,
    correlate::Cases,
    facts::{Gap, TaskName},
    findings::Code,
    history::{self, Event, History},
    lock,
    observe::{self, grounds},
    permit::Permits,
    plan::{Act, ByHand, Input, Only, Plan, Policy, Step, plan},
    report::{Narrow, Report},
    verify::{Again, Examined},
};

/// A leaked shim, then its bundle, then what was in it.
const ROUNDS: usize = 3;

/// A step, and what became of it when it was done.
struct Told {
    step: Step,
    outcome: Option<Outcome>,
}

/// Everything that is printed.
struct Sheet {
    applied: bool,
    steps: Vec<Told>,
    by_hand: Vec<ByHand>,
    left_out: usize,
    gaps: Vec<Gap>,
}

/// Looks, and acts if told to.
pub fn run(args: &cli::Repair, global: &cli::Global, config: &Config) -> Result<Verdict, Failure> {
    let mut policy = Policy {
        min_age: config.scan.min_age,
        max_actions: usize::from(config.repair.max_actions),
        allowed: args.allow.iter().copied().collect(),
        only: only(&args.only)?,
    };
    let looking = look::plan(global, config);
    let narrow = look::narrow(global, &looking);
    let runtime = look::runtime()?;
    let sheet = if args.apply {
        apply_all(args, config, &looking, &narrow, &runtime, &mut policy)?
    } else {
        let examined = look::examine_in(&runtime, &looking, config);
        let plan = planned(&examined, &looking, &narrow, config, &policy, &[]);
        sheet_of(&examined, &looking, &narrow, plan)
    };
    let text = match args.output {
        TableOrJson::Table => table(&sheet),
        TableOrJson::Json => format!("{:#}\n", json(&sheet)),
    };
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()?;
    Ok(verdict(&sheet))
}

fn sheet_of(examined: &Examined, looking: &observe::Plan, narrow: &Narrow, plan: Plan) -> Sheet {
    let cases = examined.cases(looking);
    let report = Report::new(examined, &cases, narrow);
    let told = |step| Told {
        step,
        outcome: None,
    };
    Sheet {
        applied: false,
        steps: plan.steps.into_iter().map(told).collect(),
        by_hand: plan.by_hand,
        left_out: plan.left_out,
        gaps: report.gaps.into_iter().cloned().collect(),
    }
}

/// `--only` words: a finding's code, or a task.
fn only(words: &[String]) -> Result<Only, Failure> {
    let mut only = Only::default();
    for word in words {
        if let Some(code) = Code::parse(word) {
            only.codes.insert(code);
        } else if word.contains('/') {
            only.tasks.insert(look::task_name(word)?);
        } else {
            let word: String = word.chars().take(64).collect();
            return Err(Failure::Usage(format!(
                "--only {word:?}: must be a finding's code (`recoverd explain` lists them) or NAMESPACE/ID"
            )));
        }
    }
    Ok(only)
}

fn planned(
    examined: &Examined,
    looking: &observe::Plan,
    narrow: &Narrow,
    config: &Config,
    policy: &Policy,
    tried: &[&Act],
) -> Plan {
    let cases = examined.cases(looking);
    let report = Report::new(examined, &cases, narrow);
    let adoption = decision(examined, looking, narrow, &cases);
    let grounds = grounds::observe(&looking.roots.proc, examined);
    let told = told_before(config);
    plan(
        &Input {
            look: &examined.look,
            cases: &cases,
            findings: report.findings.clone(),
            adoption: &adoption,
            grounds: &grounds,
            told: &told,
            tried,
        },
        policy,
    )
}

/// Who could be adopted; a shim that does not answer, or cannot be reached, has its successor.
fn decision(
    examined: &Examined,
    looking: &observe::Plan,
    narrow: &Narrow,
    cases: &Cases<'_>,
) -> Decision {
    let ill: BTreeSet<(usize, &str, &str)> = examined
        .suspicions
        .iter()
        .filter(|s| matches!(s.finding.code, Code::UnresponsiveShim | Code::SocketMissing))
        .filter_map(|s| match &s.finding.subject {
            crate::findings::Subject::Task { namespace, id } => {
                Some((s.instance?, namespace.as_str(), id.as_str()))
            }
            crate::findings::Subject::Shim { .. } | crate::findings::Subject::Path { .. } => None,
        })
        .collect();
    let unresponsive: BTreeSet<ProcessId> = cases
        .cases
        .iter()
        .filter(|case| {
            case.instance
                .is_some_and(|at| ill.contains(&(at, case.name.0.as_str(), case.name.1.as_str())))
        })
        .filter_map(|case| Some(case.shim.process()?.id))
        .collect();
    let wish = Wish {
        address: narrow.address.as_deref(),
        namespace: narrow.namespace.as_deref(),
        only: None,
        unresponsive: &unresponsive,
        unheard: None,
        unit: None,
    };
    adopt::decide(&looking.roots, &examined.look, cases, &wish)
}

fn told_before(config: &Config) -> BTreeSet<(TaskName, ProcessId)> {
    let (entries, _) = history::read(&config.history);
    entries.iter().filter_map(apply::told_before).collect()
}

fn apply_all(
    args: &cli::Repair,
    config: &Config,
    looking: &observe::Plan,
    narrow: &Narrow,
    runtime: &tokio::runtime::Runtime,
    policy: &mut Policy,
) -> Result<Sheet, Failure> {
    if !nix::unistd::geteuid().is_root() {
        return Err(Failure::Blind("repairing needs root".into()));
    }
    let lock = lock::take(&config.run_dir, "repair").map_err(|refused| match refused {
        lock::Refused::Held { .. } => Failure::Held(refused.to_string()),
        lock::Refused::Failed { .. } => Failure::Blind(refused.to_string()),
    })?;
    let history = History::new(&config.history, "repair");
    let permits = Permits::of(&args.allow);
    let hands = Hands {
        permits: &permits,
        history: &history,
        runtime,
        proc: Proc::new(&looking.roots.proc),
        roots: looking.roots.clone(),
        shim: apply::how(config, history.run()),
        _lock: &lock,
    };
    let mut complaint = Complaint::default();
    let mut all: Vec<Told> = Vec::new();
    for round in 0..ROUNDS {
        // No limit on the look's time: this process must not end itself between two steps.
        let examined = look::examine_again(runtime, looking, config, Again::All);
        let tried: Vec<&Act> = all.iter().map(|told| &told.step.does).collect();
        let plan = planned(&examined, looking, narrow, config, policy, &tried);
        if round == 0 && !plan.steps.is_empty() {
            let text = format!("{} steps", plan.steps.len());
            complaint.of(history.tell(Event::Began, "", &text, Map::new()));
        }
        let mut sheet = sheet_of(&examined, looking, narrow, plan);
        let mut done = 0_usize;
        for told in &mut sheet.steps {
            let outcome = apply::apply(&told.step, &hands, &mut |error| complaint.of(Err(error)));
            if matches!(outcome, Outcome::Done(_)) {
                done = done.saturating_add(1);
            }
            told.outcome = Some(outcome);
        }
        let ended = |told: &Told| {
            matches!(told.outcome, Some(Outcome::Done(_))) && !told.step.does.ends().is_empty()
        };
        if sheet.steps.iter().any(ended) {
            // Its shim first clears up after an init that was ended, and is not leaked until then.
            std::thread::sleep(config.scan.second_look);
        }
        policy.max_actions = policy.max_actions.saturating_sub(done);
        all.append(&mut sheet.steps);
        sheet.steps = all;
        sheet.applied = true;
        let last = round.saturating_add(1) == ROUNDS;
        // What could not be done made no room for what was left out; the next round has it.
        let idle = done == 0 && sheet.left_out == 0;
        if idle || last || policy.max_actions == 0 {
            if !sheet.steps.is_empty() {
                let text = summary(&sheet);
                complaint.of(history.tell(Event::Ended, "", &text, Map::new()));
            }
            complaint.say();
            return Ok(sheet);
        }
        all = sheet.steps;
    }
    Err(Failure::Blind("nothing was looked at".into()))
}

fn verdict(sheet: &Sheet) -> Verdict {
    let kept = |told: &Told| matches!(told.outcome, Some(Outcome::Done(_)));
    if sheet.applied {
        if !sheet.steps.iter().all(kept) || sheet.left_out > 0 {
            Verdict::Unkept
        } else if !sheet.gaps.is_empty() {
            Verdict::Gaps
        } else {
            Verdict::Clean
        }
    } else if !sheet.gaps.is_empty() {
        Verdict::Gaps
    } else if sheet.steps.is_empty() {
        Verdict::Clean
    } else {
        Verdict::Findings
    }
}

fn count(sheet: &Sheet, word: &str) -> usize {
    let outcomes = sheet.steps.iter().filter_map(|told| told.outcome.as_ref());
    outcomes.filter(|outcome| outcome.text().0 == word).count()
}

fn summary(sheet: &Sheet) -> String {
    if !sheet.applied {
        return match sheet.steps.len() {
            0 => "nothing to do".into(),
            1 => "1 step; nothing was done: --apply does it".into(),
            steps => format!("{steps} steps; nothing was done: --apply does them"),
        };
    }
    let words = ["done", "refused", "skipped", "failed"];
    let counts: Vec<String> = words
        .into_iter()
        .map(|word| (count(sheet, word), word))
        .filter(|(count, _)| *count > 0)
        .map(|(count, word)| format!("{count} {word}"))
        .collect();
    match counts.as_slice() {
        [] => "nothing to do".into(),
        counts => counts.join(", "),
    }
}

fn table(sheet: &Sheet) -> String {
    let mut text = String::new();
    for told in &sheet.steps {
        let step = &told.step;
        text.push_str(&format!("{} {}\n", step.code.word(), step.subject));
        let mut line = |word: &str, what: &str| text.push_str(&format!("  {word:<9} {what}\n"));
        line("does", &step.does.text());
        for requirement in &step.requires {
            line("requires", &requirement.text());
        }
        for promise in &step.promises {
            line("promises", &promise.text());
        }
        if let Some(word) = step.destroys {
            line("needs", &format!("--allow {}", word.word()));
        }
        if let Some(outcome) = &told.outcome {
            let (word, what) = outcome.text();
            line(word, what);
        }
        text.push('\n');
    }
    if !sheet.by_hand.is_empty() {
        text.push_str("not for repair:\n");
        for line in &sheet.by_hand {
            text.push_str(&format!(
                "  {} {}: {}\n",
                line.code.word(),
                line.subject,
                line.why
            ));
        }
        text.push('\n');
    }
    if !sheet.gaps.is_empty() {
        text.push_str("could not be seen:\n");
        for gap in &sheet.gaps {
            text.push_str(&format!("  {}: {}\n", gap.what, gap.why));
        }
        text.push('\n');
    }
    text.push_str(&summary(sheet));
    if sheet.left_out > 0 {
        text.push_str(&format!(
            "; {} more steps are beyond repair.max-actions: run again",
            sheet.left_out
        ));
    }
    text.push('\n');
    text
}

fn json(sheet: &Sheet) -> Value {
    let steps: Vec<Value> = sheet
        .steps
        .iter()
        .map(|told| {
            let step = &told.step;
            let requires: Vec<String> = step.requires.iter().map(|r| r.text()).collect();
            let promises: Vec<String> = step.promises.iter().map(|p| p.text()).collect();
            let outcome = told.outcome.as_ref().map(|outcome| {
                let (word, what) = outcome.text();
                json!({"verdict": word, "what": what})
            });
            json!({
                "code": step.code,
                "subject": step.subject,
                "does": step.does.text(),
                "ends": step.does.ends(),
                "requires": requires,
                "promises": promises,
                "needs": step.destroys,
                "outcome": outcome,
            })
        })
        .collect();
    json!({
        "schema": "recoverd/repair/1",
        "applied": sheet.applied,
        "steps": steps,
        "by_hand": sheet.by_hand,
        "left_out": sheet.left_out,
        "gaps": sheet.gaps,
        "summary": summary(sheet),
    })
}

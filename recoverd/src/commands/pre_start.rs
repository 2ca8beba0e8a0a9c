//! `recoverd pre-start`: runs while no containerd does, and has none of its workloads die at the
//! start that follows. In this order, as time may run out: the baseline; the files that a
//! containerd of another release needs; what is orphaned; whose shim that release cannot speak to;
//! what does not answer; what would stop containerd. Never keeps containerd from starting: it exits 0 unless told otherwise.

mod clear;
mod tally;

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{self, Write},
    time::{Duration, Instant},
};

use recoverd_common::{failpoint, proc::ProcessId, seen::Seen};
use serde_json::{Map, Value, json};
use tally::{Tally, note};

use super::{
    adopt::{AT_ONCE, Complaint, begin, intend, tell},
    look,
};
use crate::{
    Failure, Verdict,
    adopt::{self, Decision, How, Order, Outcome, Wish, run::find_binary},
    cli,
    config::Config,
    correlate::{Case, Cases},
    facts::{Api, Instance, Look},
    findings::{Code, Subject},
    history::{Event, History},
    hooks::{
        baseline::{self, Baseline, Did},
        batches,
        coming::{self, Named},
        downgrade, twins,
    },
    lock, observe,
    report::Narrow,
    verify::{Again, Examined},
};

/// What another recoverd gets to finish its work, of the whole deadline.
const PATIENCE: u32 = 4;
/// Looks and answers get this part of the deadline.
const LOOKING: u32 = 3;
/// Work ends so much of the deadline before it, at least: successors under way are ended then, and
/// the baseline and the history are written.
const LAST_WORDS: (u32, Duration) = (10, Duration::from_millis(500));

/// Between two looks at what may have been there for a moment only.
const AGAIN: Duration = Duration::from_millis(500);
/// The baseline is another hook's for as long as it writes it.
const WRITES: Duration = Duration::from_secs(1);

/// Why containerd cannot talk to a shim that lives.
const UNREACHABLE: [Code; 3] = [Code::UnresponsiveShim, Code::SocketMissing, Code::Foreign];

/// Runs the hook. What it prints is one line, for the journal.
pub fn run(
    args: &cli::PreStart,
    global: &cli::Global,
    config: &Config,
) -> Result<Verdict, Failure> {
    let began = Instant::now();
    give_up_at(config.pre_start.deadline, args.strict);
    let result = Hook::new(args, global, config, began).and_then(|hook| hook.run());
    match result {
        Ok(done) => {
            let mut out = io::stdout().lock();
            let line = format!(
                "recoverd: pre-start: {}, {} ms\n",
                done.line,
                began.elapsed().as_millis()
            );
            // A journal that is away does not keep containerd from starting.
            let written = out.write_all(line.as_bytes()).and_then(|()| out.flush());
            failpoint!("prestart.said.after");
            match (args.strict, written, done.held) {
                (false, _, _) => Ok(Verdict::Clean),
                (true, Err(error), _) => Err(error.into()),
                (true, Ok(()), Some(held)) => Err(Failure::Held(held)),
                (true, Ok(()), None) => Ok(done.verdict),
            }
        }
        Err(failure) if args.strict => Err(failure),
        Err(failure) => {
            crate::complain(&format!(
                "pre-start: {failure}: containerd starts without it"
            ));
            Ok(Verdict::Clean)
        }
    }
}

/// Ends this process at its deadline: a read of `/proc` may wait for ever. What it started goes on
/// and finishes by itself, or is finished by the next run.
fn give_up_at(deadline: Duration, strict: bool) {
    std::thread::spawn(move || {
        std::thread::sleep(deadline);
        crate::complain(&format!(
            "pre-start: was not done in {} ms: containerd starts now",
            deadline.as_millis()
        ));
        std::process::exit(if strict { 3 } else { 0 });
    });
}

struct Hook<'a> {
    args: &'a cli::PreStart,
    config: Config,
    plan: observe::Plan,
    narrow: Narrow,
    address: String,
    began: Instant,
    history: History,
    /// Who holds the lock, if it is not us.
    held: Option<String>,
}

struct Done {
    line: String,
    verdict: Verdict,
    /// By whom the lock is held, if the rest was therefore left alone.
    held: Option<String>,
}

impl Done {
    fn nothing(line: impl Into<String>, verdict: Verdict) -> Self {
        Self {
            line: line.into(),
            verdict,
            held: None,
        }
    }
}

impl<'a> Hook<'a> {
    fn new(
        args: &'a cli::PreStart,
        global: &cli::Global,
        config: &Config,
        began: Instant,
    ) -> Result<Self, Failure> {
        let mut config = config.clone();
        let most = config.pre_start.deadline / LOOKING;
        config.scan.budget = config.scan.budget.min(most);
        config.scan.shim_deadline = config.scan.shim_deadline.min(config.scan.budget);
        let (plan, address) = look::plan_of_one(global, &config);
        let narrow = Narrow {
            address: Some(address.clone()),
            namespace: global.namespace.clone(),
        };
        let history = History::new(&config.history, "pre-start");
        Ok(Self {
            args,
            config,
            plan,
            narrow,
            address,
            began,
            history,
            held: None,
        })
    }

    fn run(mut self) -> Result<Done, Failure> {
        let deadline = self.config.pre_start.deadline;
        let mut complaint = Complaint::default();
        let mut remarks = Vec::new();
        let lock = lock::take_within(
            &self.config.run_dir,
            lock::ALL,
            "pre-start",
            deadline / PATIENCE,
        );
        let _lock = match lock {
            Ok(lock) => Some(lock),
            // What is orphaned dies at containerd's start, whoever is at work: that is adopted, for
            // which each group has a lock of its own. Nobody is ended, and nothing else touched.
            Err(held @ lock::Refused::Held { .. }) => {
                remarks.push(format!("{held}: only orphaned tasks were seen to"));
                self.held = Some(held.to_string());
                None
            }
            // On a full /run there is nobody else either.
            Err(failed @ lock::Refused::Failed { .. }) => {
                remarks.push(failed.to_string());
                None
            }
        };
        failpoint!("prestart.lock.after");
        let runtime = look::runtime()?;
        let again = Again::Only(&UNREACHABLE);
        let examined = look::examine_again(&runtime, &self.plan, &self.config, again);
        let look = &examined.look;
        if !look.host.root {
            return Err(Failure::Blind("needs root".into()));
        }
        let Some(at) = look.instances.iter().position(|i| i.is(&self.address)) else {
            let line = format!("nothing is known of a containerd at {}", self.address);
            return Ok(Done::nothing(line, Verdict::Clean));
        };
        if let Some(why) = look.instances.get(at).and_then(runs) {
            let line = format!("containerd at {} {why}: nothing done", self.address);
            return Ok(Done::nothing(line, Verdict::Unkept));
        }
        let cases = examined.cases(&self.plan);
        let mut baseline = baseline::of(look, &cases.cases, at);
        let hung = unresponsive(&examined, &cases, at);
        let unheard = self.unheard(&runtime, look, &cases, at);
        remarks.extend(unheard.left);
        let wish = Wish {
            address: self.narrow.address.as_deref(),
            namespace: self.narrow.namespace.as_deref(),
            only: None,
            unresponsive: &hung,
            unheard: Some(&unheard.replace),
            unit: Some(self.args.unit.as_deref().unwrap_or(cli::UNIT)),
        };
        let decision = adopt::decide(&self.plan.roots, look, &cases, &wish);
        for order in &decision.orders {
            baseline.learn(look, order);
        }
        remarks.extend(self.keep(&baseline));
        let twins = match &self.held {
            None => self.write_twins(&cases, at, &mut complaint),
            Some(_) => 0,
        };
        let shims = look.shims.iter();
        let shims = shims.filter(|s| look.instances.get(at).is_some_and(|i| i.is(&s.address)));
        let at_once = batches::at_once(shims.count());
        let outcomes = self.adopt(&runtime, &decision, &hung, at_once, &mut complaint);
        failpoint!("prestart.adopted.after");
        note(&mut baseline, &decision, &outcomes);
        let foreign = self.foreign(look, &cases, at, &hung, at_once);
        let ended = self.end_foreign(&foreign, &mut baseline, &mut complaint);
        let aside = self.set_aside(look, &cases, at, &hung, &outcomes, &mut complaint);
        for (name, why) in &aside.bundles {
            if let Some(task) = baseline.task_mut(name) {
                task.did = Did::SetAside;
                task.why.clone_from(why);
            }
        }
        failpoint!("prestart.aside.after");
        remarks.extend(self.keep(&baseline));
        let mut tally = Tally::of(&baseline, &decision);
        tally.twins = twins;
        tally.foreign = ended;
        tally.hung = aside.shims.len();
        let done = Done {
            verdict: tally.verdict(),
            line: tally.line(&remarks),
            held: self.held.clone(),
        };
        complaint.of(self.end(&tally, &done.line));
        complaint.say();
        Ok(done)
    }

    /// Writes the baseline; without one post-start has less to say, and that is all.
    fn keep(&self, baseline: &Baseline) -> Option<String> {
        // On a full /run there is no lock, and no other hook either.
        let turn = lock::take_within(&self.config.run_dir, "baseline.lock", "pre-start", WRITES);
        if let Err(held @ lock::Refused::Held { .. }) = &turn {
            return Some(format!("write baseline: {held}"));
        }
        baseline::write(&self.config.run_dir, &self.address, baseline)
            .err()
            .map(|error| format!("write baseline: {error}"))
    }

    /// The shims that are well and cannot be spoken to by the containerd that is about to start.
    fn unheard(
        &self,
        runtime: &tokio::runtime::Runtime,
        look: &Look,
        cases: &Cases<'_>,
        at: usize,
    ) -> downgrade::Decision {
        let suspects = downgrade::suspects(look, &cases.cases, at);
        let Some(instance) = look.instances.get(at).filter(|_| !suspects.is_empty()) else {
            return downgrade::Decision::default();
        };
        let named = Named {
            program: self.args.containerd.as_deref(),
            unit: self.args.unit.as_deref(),
        };
        let release = coming::release(named, instance);
        let spoken = match &release {
            Seen::Present(release) if release.is_1() => runtime.block_on(coming::spoken(&suspects)),
            Seen::Present(_) | Seen::Absent | Seen::Unknown(_) => BTreeMap::new(),
        };
        downgrade::decide(&suspects, &release, &spoken)
    }

    /// Looked at again before anybody is ended or anything set aside: whether nobody else is at work,
    /// time is left, and containerd is down. Somebody may have started it meanwhile, by hand, and it
    /// ends the task of each shim that it loses.
    fn goes_on(&self) -> Result<(), String> {
        if let Some(held) = &self.held {
            return Err(held.clone());
        }
        if Instant::now() >= self.until() {
            return Err("no time was left for it".into());
        }
        let down = || observe::down(&self.plan.roots, &self.address);
        // Somebody may only have asked its program for its version.
        let down = down().or_else(|_| {
            std::thread::sleep(AGAIN);
            down()
        });
        down.map_err(|why| {
            format!(
                "containerd at {} is not certainly down: {why}",
                self.address
            )
        })
    }

    fn until(&self) -> Instant {
        let deadline = self.config.pre_start.deadline;
        let (part, least) = LAST_WORDS;
        self.began + deadline.saturating_sub((deadline / part).max(least))
    }

    fn write_twins(&self, cases: &Cases<'_>, at: usize, complaint: &mut Complaint) -> usize {
        let of_instance = cases.cases.iter().filter(|case| case.instance == Some(at));
        let mut written = 0_usize;
        for case in of_instance {
            for twin in twins::missing(case) {
                let subject = format!("{}/{}", case.name.0, case.name.1);
                let path = twin.path.display();
                let (event, text) = match twins::write(&twin) {
                    Ok(()) => {
                        written = written.saturating_add(1);
                        (Event::Done, format!("wrote {path}: {}", twin.why))
                    }
                    Err(error) => (Event::Failed, format!("write {path}: {error}")),
                };
                complaint.of(self.history.tell(event, &subject, &text, Map::new()));
            }
        }
        written
    }

    /// First what has no shim at all, and what has one that containerd cannot speak to: their tasks
    /// end for certain if nothing is done. Then what has one of `hung`, a batch at a time, the next
    /// as long as there is time and not all of the last one failed.
    fn adopt(
        &self,
        runtime: &tokio::runtime::Runtime,
        decision: &Decision,
        hung: &BTreeSet<ProcessId>,
        at_once: usize,
        complaint: &mut Complaint,
    ) -> Vec<Outcome> {
        if decision.orders.is_empty() {
            return Vec::new();
        }
        let binary = match find_binary(self.config.adopt.binary.as_deref()) {
            Ok(binary) => binary,
            Err(why) => {
                complaint.of(self.history.tell(Event::Failed, "", &why, Map::new()));
                let orders = decision.orders.iter().cloned();
                return orders.map(|order| refused(order, &why)).collect();
            }
        };
        complaint.of(begin(&self.history, decision.orders.len()));
        let how = How {
            binary,
            deadline: self.config.adopt.deadline,
            until: self.until(),
            at_once: AT_ONCE,
            run: self.history.run().to_owned(),
            run_dir: self.config.run_dir.clone(),
        };
        let (with_shim, orphaned): (Vec<Order>, Vec<Order>) = decision
            .orders
            .iter()
            .cloned()
            .partition(|order| order.adoption.predecessor.is_some());
        let (hung, unheard): (Vec<Order>, Vec<Order>) = with_shim
            .into_iter()
            .partition(|order| hung.iter().any(|shim| order.replaces(*shim)));
        let mut outcomes = Vec::new();
        let mut go = |orders: Vec<Order>, outcomes: &mut Vec<Outcome>| {
            for order in &orders {
                complaint.of(intend(&self.history, order));
            }
            let done = runtime.block_on(adopt::run(orders, &how));
            for outcome in &done {
                complaint.of(tell(&self.history, outcome));
            }
            let failed = |outcome: &&Outcome| matches!(outcome.verdict, adopt::Verdict::Failed(_));
            let goes_on = batches::goes_on(done.len(), done.iter().filter(failed).count());
            outcomes.extend(done);
            goes_on
        };
        // For these nobody is ended. For all others somebody is, so they go a few at a time.
        go(orphaned, &mut outcomes);
        let mut well = true;
        let unheard = unheard.chunks(AT_ONCE).map(|batch| (false, batch.to_vec()));
        let hung = hung.chunks(at_once).map(|batch| (true, batch.to_vec()));
        for (hang, batch) in unheard.chain(hung) {
            let why = match self.goes_on() {
                Ok(()) if well => {
                    well = go(batch, &mut outcomes) || !hang;
                    continue;
                }
                Ok(()) => "not tried: every replacement just before it failed".into(),
                Err(why) => why,
            };
            outcomes.extend(batch.into_iter().map(|order| refused(order, &why)));
        }
        outcomes
    }

    fn end(&self, tally: &Tally, line: &str) -> Result<(), crate::history::NotWritten> {
        for (name, why) in &tally.not_adopted {
            let subject = format!("{}/{}", name.0, name.1);
            self.history.tell(Event::Noted, &subject, why, Map::new())?;
        }
        let details = match json!({"containerd": self.address}) {
            Value::Object(map) => map,
            _ => Map::new(),
        };
        self.history.tell(Event::Ended, "", line, details)
    }
}

fn refused(order: Order, why: &str) -> Outcome {
    Outcome {
        order,
        verdict: adopt::Verdict::Failed(adopt::run::Failed::Refused(why.to_owned())),
        took: Duration::ZERO,
    }
}

/// Why the hook must not act: that containerd is there.
fn runs(instance: &Instance) -> Option<String> {
    match (instance.daemon, &instance.api) {
        (Some(daemon), _) => Some(format!("runs (pid {})", daemon.pid)),
        (None, Api::Up(_)) => Some("runs".into()),
        (None, Api::Unknown(why)) => Some(format!("may run: {why}")),
        (None, Api::Down) => None,
    }
}

/// Shims of that containerd that did not answer, or had no socket, in two looks. One that answers
/// elsewhere than its bundle says is well: the bundle gets the right address.
fn unresponsive(examined: &Examined, cases: &Cases<'_>, at: usize) -> BTreeSet<ProcessId> {
    let found: BTreeSet<(Code, &Subject)> = examined
        .suspicions
        .iter()
        .filter(|s| s.instance == Some(at))
        .map(|s| (s.finding.code, &s.finding.subject))
        .collect();
    let ill = |case: &&Case<'_>| {
        let subject = Subject::Task {
            namespace: case.name.0.clone(),
            id: case.name.1.clone(),
        };
        UNREACHABLE.iter().any(|code| {
            let elsewhere = *code == Code::SocketMissing && case.answered();
            found.contains(&(*code, &subject)) && !elsewhere
        })
    };
    cases
        .cases
        .iter()
        .filter(|case| case.instance == Some(at))
        .filter(ill)
        .filter_map(|case| Some(case.shim.process()?.id))
        .collect()
}

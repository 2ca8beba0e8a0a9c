//! Does a plan, one step after the other, under recoverd's lock: looks again at what the step
//! requires, writes into the history what it is about to do, does it, and looks whether what it
//! promised is so. What is done is in `effects`; nothing is decided here.
//!
//! A step whose requirements changed is skipped, not forced. A step that was cut off (this process
//! killed, a call that failed) leaves a finding again, and the next run goes on from there: every
//! effect may be done to what is half done already.

mod checks;
mod effects;
mod group;

use std::time::{Duration, Instant};

use recoverd_common::{
    failpoint,
    proc::{Proc, ProcessId},
    seen::Seen,
    shim_client::ShimClient,
};
use serde_json::{Map, Value, json};

use crate::{
    adopt::{self, How},
    config::Config,
    facts::TaskName,
    history::{Event, History, NotWritten},
    lock::Lock,
    observe::Roots,
    permit::{Missing, Permits},
    plan::{Act, Promise, Step},
};

/// How long a promise may take to come true: a process that was ended, a shim that begins to serve.
const KEPT_WITHIN: Duration = Duration::from_secs(5);
/// Between two looks at a promise.
const AGAIN: Duration = Duration::from_millis(50);
/// For one call to a shim or containerd.
const CALL: Duration = Duration::from_secs(5);
/// For an umount; one that takes longer waits for a device or a server that is away.
const UNMOUNT: Duration = Duration::from_secs(10);

/// What became of a step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// Done, and what it promised is so.
    Done(String),
    /// Not done: a word is missing.
    Refused(Missing),
    /// Not done: something changed.
    Skipped(String),
    /// Tried, and what it promised is not so.
    Failed(String),
}

impl Outcome {
    /// The word and, where it went otherwise than planned, why.
    pub fn text(&self) -> (&'static str, &str) {
        match self {
            Outcome::Done(what) => ("done", what),
            Outcome::Refused(missing) => match missing.0 {
                crate::permit::Word::Kill => ("refused", "needs --allow kill"),
                crate::permit::Word::Delete => ("refused", "needs --allow delete"),
            },
            Outcome::Skipped(why) => ("skipped", why),
            Outcome::Failed(why) => ("failed", why),
        }
    }
}

/// What doing needs.
pub struct Hands<'a> {
    /// What was allowed.
    pub permits: &'a Permits,
    /// Where it is told.
    pub history: &'a History,
    /// For what waits for many.
    pub runtime: &'a tokio::runtime::Runtime,
    /// The kernel's processes.
    pub proc: Proc,
    /// Where to look again.
    pub roots: Roots,
    /// Our shim; why not, where it was not found.
    pub shim: Result<How, String>,
    /// Nobody else changes the host meanwhile.
    pub _lock: &'a Lock,
}

/// Does one step. `told` is asked to say that the history could not be written.
pub fn apply(step: &Step, hands: &Hands<'_>, told: &mut dyn FnMut(NotWritten)) -> Outcome {
    let mut tell = |event, text: &str, details| {
        if let Err(error) = hands.history.tell(event, &step.subject, text, details) {
            told(error);
        }
    };
    let code = || -> Map<String, Value> {
        [("code".to_owned(), json!(step.code))]
            .into_iter()
            .collect()
    };
    if let Err(missing) = hands.permits.check(step.destroys) {
        let text = format!("{}: {missing}", step.does.text());
        tell(Event::Skipped, &text, code());
        return Outcome::Refused(missing);
    }
    for requirement in &step.requires {
        if let Err(why) = checks::holds(requirement, hands) {
            let why = format!("{} no more: {why}", requirement.text());
            tell(
                Event::Skipped,
                &format!("{}: {why}", step.does.text()),
                code(),
            );
            return Outcome::Skipped(why);
        }
    }
    failpoint!("repair.intent.before");
    tell(Event::Intended, &step.does.text(), code());
    failpoint!("repair.intent.after");
    let outcome = match effects::act(step, hands) {
        Ok(what) => match kept(&step.promises, hands) {
            Ok(()) => Outcome::Done(what),
            Err(why) => Outcome::Failed(why),
        },
        Err(effects::NotDone::Changed(why)) => Outcome::Skipped(why),
        Err(effects::NotDone::Failed(why)) => Outcome::Failed(why),
        Err(effects::NotDone::Missing(missing)) => Outcome::Refused(missing),
    };
    let mut details = code();
    if let (Act::Publish(exited), Outcome::Done(_)) = (&step.does, &outcome) {
        details.insert("told".into(), told_of(&exited.name, exited.init));
    }
    match &outcome {
        Outcome::Done(what) => tell(Event::Done, what, details),
        Outcome::Failed(why) => tell(
            Event::Failed,
            &format!("{}: {why}", step.does.text()),
            details,
        ),
        Outcome::Skipped(why) => tell(Event::Skipped, why, details),
        Outcome::Refused(missing) => tell(Event::Skipped, &missing.to_string(), details),
    }
    failpoint!("repair.outcome.after");
    outcome
}

/// As it stands in the history, and is read back from it by [`told_before`].
fn told_of(name: &TaskName, init: ProcessId) -> Value {
    json!({"namespace": name.0, "id": name.1, "pid": init.pid, "start_time": init.start_time})
}

/// The exits of which an entry of the history says that containerd was told.
pub fn told_before(entry: &crate::history::Entry) -> Option<(TaskName, ProcessId)> {
    let told = entry.details.get("told")?;
    let text = |key| told.get(key)?.as_str().map(str::to_owned);
    let init = ProcessId {
        pid: i32::try_from(told.get("pid")?.as_i64()?).ok()?,
        start_time: told.get("start_time")?.as_u64()?,
    };
    Some(((text("namespace")?, text("id")?), init))
}

/// Waits until every promise is so.
fn kept(promises: &[Promise], hands: &Hands<'_>) -> Result<(), String> {
    let until = Instant::now() + KEPT_WITHIN;
    for promise in promises {
        loop {
            match is_kept(promise, hands) {
                Ok(()) => break,
                Err(why) if Instant::now() >= until => {
                    return Err(format!("{} is not so: {why}", promise.text()));
                }
                Err(_) => std::thread::sleep(AGAIN),
            }
        }
    }
    Ok(())
}

fn is_kept(promise: &Promise, hands: &Hands<'_>) -> Result<(), String> {
    use recoverd_common::proc::FileId;
    match promise {
        Promise::Gone(id) => match hands.proc.living(*id) {
            Seen::Absent => Ok(()),
            Seen::Present(_) => Err("it lives".into()),
            Seen::Unknown(why) => Err(why),
        },
        Promise::Lives(id) => match hands.proc.living(*id) {
            Seen::Present(_) => Ok(()),
            Seen::Absent => Err("it ended".into()),
            Seen::Unknown(why) => Err(why),
        },
        // Something new of that name is somebody else's.
        Promise::Removed(path, file) => match FileId::of_entry(path) {
            Seen::Present(there) if there == *file => Err("it is there".into()),
            Seen::Present(_) | Seen::Absent => Ok(()),
            Seen::Unknown(why) => Err(why),
        },
        Promise::NoFolder(path) => match FileId::of_entry(path) {
            Seen::Present(_) => Err("it is there".into()),
            Seen::Absent => Ok(()),
            Seen::Unknown(why) => Err(why),
        },
        Promise::Unmounted(point, id) => match checks::mounted(point, *id, hands) {
            Seen::Present(()) => Err("it is mounted".into()),
            Seen::Absent => Ok(()),
            Seen::Unknown(why) => Err(why),
        },
        Promise::Served(socket) => {
            let client = ShimClient::connect(socket, "recoverd", Instant::now() + CALL);
            client
                .and_then(|mut client| client.connect_task(""))
                .map(|_| ())
                .map_err(|error| error.to_string())
        }
        // Its effect is the acknowledgement.
        Promise::Told => Ok(()),
    }
}

/// How successors are started by a repair, one at a time.
pub fn how(config: &Config, run: &str) -> Result<How, String> {
    let deadline = config.adopt.deadline;
    Ok(How {
        binary: adopt::run::find_binary(config.adopt.binary.as_deref())?,
        deadline,
        until: Instant::now() + deadline,
        at_once: 1,
        run: run.to_owned(),
        run_dir: config.run_dir.clone(),
    })
}

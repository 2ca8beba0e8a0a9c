//! The shims' own answers. Every socket is asked `Connect`, and `State` for each of its tasks,
//! nothing else: a stock shim's `Pids` forks runc.
//!
//! A shim that does not answer `Connect` is asked once more on a new connection, half its
//! deadline later, while the first question still stands: an answer to either counts. So a miss
//! is two misses, apart by at least a second at the default deadline.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::{Duration, Instant},
};

use recoverd_common::{paths, pb::task, ttrpc::code};
use tokio::{net::UnixStream, sync::Semaphore, time};
use ttrpc::{
    asynchronous::{Client, transport::Socket},
    proto::{KeyValue, Request},
};

use super::{Limits, Roots, Scope};
use crate::facts::{
    Address, Answer, BundleFacts, Connection, Greeting, Instance, Phase, Reply, RuncEntry, Shim,
    TaskState, address_of,
};

/// Asked at the same time: enough to hide silent ones, few enough for 1,024 descriptors.
const AT_ONCE: usize = 256;
/// Two misses count as silence when they are this far apart.
const PATIENCE: Duration = Duration::from_secs(1);
/// More tasks than this are not asked of one shim; no pod is that large.
const MAX_TASKS: usize = 1024;

/// A socket and what to ask there.
#[derive(Debug, Clone)]
pub struct Question {
    address: Address,
    namespace: String,
    tasks: BTreeSet<String>,
    /// The task API to try first.
    api: u8,
}

/// Which sockets are asked about which tasks: what bundles name, where shims listen, and where
/// containerd's rule puts a task that lost its bundle.
pub fn questions(
    instances: &[Instance],
    bundles: &[BundleFacts],
    runc: &[RuncEntry],
    shims: &[Shim],
    roots: &Roots,
) -> Vec<Question> {
    let mut all: BTreeMap<Address, Question> = BTreeMap::new();
    let mut ask = |address: Address, namespace: &str, task: Option<&str>, api: Option<u8>| {
        let question = all.entry(address.clone()).or_insert_with(|| Question {
            address,
            namespace: namespace.to_owned(),
            tasks: BTreeSet::new(),
            api: 2,
        });
        question.tasks.extend(task.map(str::to_owned));
        if let Some(api) = api {
            question.api = api;
        }
    };
    for facts in bundles {
        let bundle = &facts.bundle;
        if let Some(address) = bundle.socket_address() {
            let api = bundle
                .api_version()
                .map(|version| if version >= 3 { 3 } else { 2 });
            let id = bundle.id.as_str();
            ask(
                address_of(&address),
                bundle.namespace.as_str(),
                Some(id),
                api,
            );
        }
    }
    let listening: BTreeSet<&String> = shims.iter().flat_map(|shim| &shim.listens).collect();
    for shim in shims {
        for address in &shim.listens {
            // The debug socket of a 2.x shim speaks HTTP; containerd's rule tells which it is.
            let debug = paths::socket(
                &roots.socket_dir,
                &shim.address,
                &shim.namespace,
                &format!("{}/debug", shim.task),
            );
            if address.as_str() != debug.to_string_lossy() {
                ask(address.clone(), &shim.namespace, None, None);
            }
        }
    }
    // A task whose bundle is gone, or names no address, or a wrong one: its shim is where its
    // group's socket is.
    let groups = bundles.iter().map(|facts| {
        let bundle = &facts.bundle;
        let group = bundle.config.present().and_then(|config| config.group());
        (bundle.namespace.as_str(), bundle.id.as_str(), group)
    });
    let groups = groups.chain(runc.iter().map(|entry| {
        let group = entry.state.present().and_then(|state| state.group());
        (entry.name.0.as_str(), entry.name.1.as_str(), group)
    }));
    for (namespace, id, group) in groups {
        for spelling in instances.iter().flat_map(Instance::spellings) {
            let path = paths::socket(&roots.socket_dir, spelling, namespace, group.unwrap_or(id));
            let address = path.to_string_lossy().into_owned();
            if listening.contains(&address) {
                ask(address, namespace, Some(id), None);
            }
        }
    }
    all.into_values().collect()
}

/// Asks them all in parallel, each within its own deadline, all within the budget.
pub async fn ask(
    questions: Vec<Question>,
    scope: Scope,
    limits: Limits,
) -> BTreeMap<Address, Answer> {
    let end = time::Instant::now() + limits.budget;
    let places = Arc::new(Semaphore::new(AT_ONCE));
    let mut running = Vec::new();
    for question in questions {
        if let Scope::Again(only) = &scope
            && !only.contains(&question.address)
        {
            continue;
        }
        let places = Arc::clone(&places);
        let address = question.address.clone();
        running.push((
            address,
            tokio::spawn(async move {
                // Closing the semaphore is the only error, and nobody closes it.
                let place = time::timeout_at(end, places.acquire()).await;
                match place {
                    Ok(_place) => ask_one(question, limits.shim_deadline, end).await,
                    Err(_) => unasked("not asked: the budget of the whole look was used up"),
                }
            }),
        ));
    }
    let mut answers = BTreeMap::new();
    for (address, task) in running {
        let answer = super::joined(task.await);
        tracing::debug!(
            address,
            connection = ?answer.connection,
            greeting = ?answer.greeting,
            took = ?answer.took,
            "asked"
        );
        answers.insert(address, answer);
    }
    answers
}

fn unasked(why: &str) -> Answer {
    Answer {
        connection: Connection::Failed(why.to_owned()),
        greeting: Reply::NotAsked,
        states: BTreeMap::new(),
        api: None,
        took: None,
        asked: 0,
        patient: false,
    }
}

async fn ask_one(question: Question, deadline: Duration, end: time::Instant) -> Answer {
    let began = Instant::now();
    let until = time::Instant::now() + deadline;
    if until > end {
        return unasked("not asked: the budget of the whole look was used up");
    }
    let first = converse(&question, until);
    let again = async {
        time::sleep(deadline / 2).await;
        converse(&question, until).await
    };
    tokio::pin!(first, again);
    // The second question is asked only while the first stands without any answer.
    let (mut answer, mut asked) = (None, 1);
    tokio::select! {
        done = &mut first => {
            if done.greeting == Reply::Silent {
                asked = 2;
            }
            answer = Some(done);
        }
        done = &mut again => {
            asked = 2;
            if !done.silent() {
                answer = Some(done);
            }
        }
    }
    let mut answer = match answer {
        Some(answer) => answer,
        None => first.await,
    };
    answer.asked = asked;
    answer.patient = deadline / 2 >= PATIENCE;
    if answer.took.is_some() {
        answer.took = Some(began.elapsed());
    }
    answer
}

impl Answer {
    fn silent(&self) -> bool {
        matches!(self.greeting, Reply::Silent) || self.connection == Connection::QueueFull
    }
}

async fn converse(question: &Question, until: time::Instant) -> Answer {
    let mut answer = unasked("");
    answer.connection = Connection::Made;
    let stream = match connect(&question.address).await {
        Ok(stream) => stream,
        Err(error) => {
            answer.connection = match error.raw_os_error().map(nix::errno::Errno::from_raw) {
                // Reset: the listener has gone while we stood in its queue.
                Some(nix::errno::Errno::ECONNREFUSED | nix::errno::Errno::ECONNRESET) => {
                    Connection::Refused
                }
                Some(nix::errno::Errno::ENOENT | nix::errno::Errno::ENOTDIR) => Connection::NoFile,
                Some(nix::errno::Errno::EAGAIN) => Connection::QueueFull,
                Some(_) | None => Connection::Failed(error.to_string()),
            };
            return answer;
        }
    };
    let client = Client::new(Socket::from(stream));
    let id = question.tasks.first().cloned().unwrap_or_default();
    let mut api = question.api;
    let mut greeting = Reply::Silent;
    // A shim that serves the other version only says so by an error.
    for _ in 0..2 {
        let request = task::ConnectRequest { id: id.clone() };
        greeting = call(&client, api, question, "Connect", &request, until).await;
        match &greeting {
            Reply::Error(code::UNIMPLEMENTED | code::INVALID_ARGUMENT, _) => {
                api = if api == 2 { 3 } else { 2 };
            }
            Reply::Said(_)
            | Reply::Error(..)
            | Reply::Silent
            | Reply::Garbage(_)
            | Reply::NotAsked => break,
        }
    }
    answer.greeting = map(greeting, |response: task::ConnectResponse| Greeting {
        shim_pid: response.shim_pid,
        version: response.version,
    });
    if !matches!(answer.greeting, Reply::Said(_) | Reply::Error(..)) {
        return answer;
    }
    answer.took = Some(Duration::ZERO);
    answer.api = Some(api);
    for task in question.tasks.iter().take(MAX_TASKS) {
        let request = task::StateRequest {
            id: task.clone(),
            exec_id: String::new(),
        };
        let reply = call(&client, api, question, "State", &request, until).await;
        answer.states.insert(task.clone(), map(reply, state));
    }
    answer
}

fn state(response: task::StateResponse) -> TaskState {
    let phase = Phase::of_number(response.status);
    TaskState {
        phase,
        pid: response.pid,
        exit_status: response.exit_status,
        // Before an exit Go sends year 1, others 1970.
        exited_at: response
            .exited_at
            .map(|at| at.seconds)
            .filter(|seconds| *seconds > 0),
        terminal: response.terminal,
        stdio: [response.stdin, response.stdout, response.stderr],
    }
}

async fn connect(address: &str) -> std::io::Result<UnixStream> {
    match address.strip_prefix('@') {
        // A leading zero byte is how tokio is told of an abstract name.
        Some(name) => UnixStream::connect(format!("\0{name}")).await,
        None => UnixStream::connect(address).await,
    }
}

async fn call<Q: prost::Message, A: prost::Message + Default>(
    client: &Client,
    api: u8,
    question: &Question,
    method: &str,
    request: &Q,
    until: time::Instant,
) -> Reply<A> {
    let envelope = Request {
        service: format!("containerd.task.v{api}.Task"),
        method: method.to_owned(),
        payload: request.encode_to_vec(),
        metadata: vec![KeyValue {
            key: "containerd-namespace-ttrpc".into(),
            value: question.namespace.clone(),
            ..KeyValue::default()
        }],
        ..Request::default()
    };
    match time::timeout_at(until, client.request(envelope)).await {
        Err(_) => Reply::Silent,
        Ok(Ok(response)) => match A::decode(response.payload.as_slice()) {
            Ok(message) => Reply::Said(message),
            Err(error) => Reply::Garbage(format!("an undecodable {method} response: {error}")),
        },
        Ok(Err(ttrpc::Error::RpcStatus(status))) => {
            Reply::Error(status.code.value(), status.message)
        }
        Ok(Err(error)) => Reply::Garbage(error.to_string()),
    }
}

fn map<A, B>(reply: Reply<A>, f: impl FnOnce(A) -> B) -> Reply<B> {
    match reply {
        Reply::Said(value) => Reply::Said(f(value)),
        Reply::Error(code, message) => Reply::Error(code, message),
        Reply::Silent => Reply::Silent,
        Reply::Garbage(why) => Reply::Garbage(why),
        Reply::NotAsked => Reply::NotAsked,
    }
}

#[cfg(test)]
mod tests {
    use std::os::{
        linux::net::SocketAddrExt,
        unix::net::{SocketAddr, UnixListener},
    };

    use super::*;

    fn ask_at(address: &str) -> Answer {
        let question = Question {
            address: address.to_owned(),
            namespace: "n".into(),
            tasks: BTreeSet::from(["c".to_owned()]),
            api: 2,
        };
        let limits = Limits {
            shim_deadline: Duration::from_millis(900),
            budget: Duration::from_secs(10),
            run_full: 90,
        };
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let mut answers = runtime.block_on(ask(vec![question], Scope::Full, limits));
        answers.remove(address).unwrap()
    }

    #[test]
    fn a_silent_socket_is_asked_twice_by_path_and_by_abstract_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let name = format!("recoverd-test-{}", std::process::id());
        let _by_path = UnixListener::bind(&path).unwrap();
        let abstract_name = SocketAddr::from_abstract_name(&name).unwrap();
        let _by_name = UnixListener::bind_addr(&abstract_name).unwrap();
        for address in [path.to_str().unwrap().to_owned(), format!("@{name}")] {
            let answer = ask_at(&address);
            assert_eq!(answer.connection, Connection::Made, "{address}");
            assert_eq!(
                (answer.greeting, answer.asked),
                (Reply::Silent, 2),
                "{address}"
            );
            assert!(!answer.patient, "two misses 450 ms apart prove nothing");
        }
    }

    #[test]
    fn nobody_listening_is_told_from_no_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let address = path.to_str().unwrap();
        assert_eq!(ask_at(address).connection, Connection::NoFile);
        drop(UnixListener::bind(&path).unwrap());
        assert_eq!(ask_at(address).connection, Connection::Refused);
    }

    #[test]
    fn a_budget_that_is_used_up_is_no_silence() {
        let question = Question {
            address: "/nonexistent".into(),
            namespace: "n".into(),
            tasks: BTreeSet::new(),
            api: 2,
        };
        let limits = Limits {
            shim_deadline: Duration::from_secs(2),
            budget: Duration::from_millis(100),
            run_full: 90,
        };
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let answers = runtime.block_on(ask(vec![question], Scope::Full, limits));
        let answer = answers.get("/nonexistent").unwrap();
        assert!(matches!(answer.connection, Connection::Failed(_)));
        assert_eq!(answer.greeting, Reply::NotAsked);
    }
}

//! containerd's own word: version, namespaces, container records, tasks. Read calls only.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use containerd_client::{
    services::v1::{
        GetRequest, ListContainersRequest, ListNamespacesRequest, ListTasksRequest,
        containers_client::ContainersClient, namespaces_client::NamespacesClient,
        tasks_client::TasksClient, version_client::VersionClient,
    },
    tonic::{Code, Request, Status, metadata::MetadataValue, transport::Channel},
};
use recoverd_common::bundle::Config;
use tokio::{sync::Semaphore, time};

use super::Limits;
use crate::facts::{Api, ApiFacts, Container, ContainerdTask, Instance, Phase, TaskName};

/// `Tasks.Get` calls under way at once, should the list not come.
const AT_ONCE: usize = 64;
/// Largest message taken, bytes: a list of 10,000 tasks has about 2 MiB.
const MAX_MESSAGE: usize = 32 << 20;

/// Asks every instance; the answers are in the order of `instances`.
pub async fn ask(instances: Vec<Instance>, limits: Limits) -> Vec<Api> {
    let running: Vec<_> = instances
        .into_iter()
        .map(|instance| tokio::spawn(ask_one(instance.address, limits)))
        .collect();
    let mut apis = Vec::new();
    for task in running {
        apis.push(super::joined(task.await));
    }
    apis
}

async fn ask_one(address: String, limits: Limits) -> Api {
    // Tried first by hand, as tonic's errors do not tell *nobody listens* from other failures.
    match time::timeout(
        limits.shim_deadline,
        tokio::net::UnixStream::connect(&address),
    )
    .await
    {
        Ok(Ok(_)) => {}
        Ok(Err(error)) => {
            return match error.kind() {
                std::io::ErrorKind::NotFound | std::io::ErrorKind::ConnectionRefused => Api::Down,
                _ => Api::Unknown(format!("connect: {error}")),
            };
        }
        Err(_) => return Api::Unknown("does not accept a connection".into()),
    }
    match time::timeout(limits.budget, facts(&address, limits)).await {
        Ok(Ok(facts)) => Api::Up(Box::new(facts)),
        Ok(Err(why)) => Api::Unknown(why),
        Err(_) => Api::Unknown("does not answer".into()),
    }
}

async fn facts(address: &str, limits: Limits) -> Result<ApiFacts, String> {
    let channel = connect(address)
        .await
        .map_err(|error| chain("connect", &error))?;
    // One that hangs is to be told from one that is slow to list much.
    let within = |what: &'static str| move |_| format!("{what}: no answer");
    let mut version = VersionClient::new(channel.clone());
    let version = time::timeout(limits.shim_deadline, version.version(()))
        .await
        .map_err(within("version"))?
        .map_err(|error| said("version", &error))?
        .into_inner()
        .version;
    let namespaces = NamespacesClient::new(channel.clone())
        .list(ListNamespacesRequest::default())
        .await
        .map_err(|error| said("list namespaces", &error))?;
    let mut names: Vec<String> = namespaces
        .into_inner()
        .namespaces
        .into_iter()
        .map(|n| n.name)
        .collect();
    names.sort();

    // containerd's list of tasks asks each shim in turn and waits 2 s for each that hangs: begun at
    // once, and once it takes too long tasks are asked for one by one beside it.
    let began = time::Instant::now();
    let listed = list_tasks(&channel, &names);
    tokio::pin!(listed);
    let all_containers = async {
        let mut containers = BTreeMap::new();
        for namespace in &names {
            list_containers(&channel, namespace, &mut containers).await?;
        }
        Ok::<_, String>(containers)
    };
    tokio::pin!(all_containers);
    let mut early = None;
    let containers = loop {
        tokio::select! {
            containers = &mut all_containers => break containers?,
            tasks = &mut listed, if early.is_none() => early = Some(tasks?),
        }
    };
    let count = u32::try_from(containers.len()).unwrap_or(u32::MAX);
    let patience = LIST_PATIENCE.saturating_add(LIST_PATIENCE_EACH.saturating_mul(count));
    let first = match early {
        Some(tasks) => Ok(Ok(tasks)),
        None => time::timeout_at(began + patience, &mut listed).await,
    };
    let mut by_record = false;
    let tasks = match first {
        Ok(tasks) => tasks?,
        Err(_) => {
            let single = get_tasks(&channel, containers.keys().cloned().collect());
            let either = async {
                tokio::select! {
                    tasks = &mut listed => tasks.map(|tasks| (tasks, false)),
                    tasks = single => tasks.map(|tasks| (tasks, true)),
                }
            };
            let (tasks, single) = either.await?;
            by_record = single;
            tasks
        }
    };
    Ok(ApiFacts {
        version,
        namespaces: names.clone(),
        containers,
        tasks: Some(tasks),
        by_record,
    })
}

/// How long containerd's own list of tasks is waited for alone, and how much longer for each task
/// in it. A thousand tasks take some 400 ms on two cores.
const LIST_PATIENCE: Duration = Duration::from_millis(300);
const LIST_PATIENCE_EACH: Duration = Duration::from_micros(400);
/// How long one task is waited for. containerd itself waits for a hung shim for 2 s
/// (`io.containerd.timeout.task.state`); that it waits is answer enough.
const GET_PATIENCE: Duration = Duration::from_secs(1);

pub(super) async fn connect(
    address: &str,
) -> Result<Channel, containerd_client::tonic::transport::Error> {
    containerd_client::connect(address).await
}

async fn list_containers(
    channel: &Channel,
    namespace: &str,
    all: &mut BTreeMap<TaskName, Container>,
) -> Result<(), String> {
    let mut client = ContainersClient::new(channel.clone());
    // The stream, because every record carries its whole spec.
    let request = in_namespace(ListContainersRequest::default(), namespace)?;
    let mut stream = client
        .list_stream(request)
        .await
        .map_err(|error| said("list containers", &error))?
        .into_inner();
    while let Some(message) = stream
        .message()
        .await
        .map_err(|e| said("list containers", &e))?
    {
        let Some(container) = message.container else {
            continue;
        };
        // A spec of another runtime kind has no such fields, which is no error.
        let spec = container
            .spec
            .and_then(|spec| Config::parse(&spec.value).ok())
            .unwrap_or_default();
        all.insert(
            (namespace.to_owned(), container.id),
            Container {
                runtime: container
                    .runtime
                    .map(|runtime| runtime.name)
                    .unwrap_or_default(),
                group: spec.group().map(str::to_owned),
                cgroups_path: spec.cgroups_path,
            },
        );
    }
    Ok(())
}

async fn list_tasks(
    channel: &Channel,
    namespaces: &[String],
) -> Result<BTreeMap<TaskName, ContainerdTask>, String> {
    let mut all = BTreeMap::new();
    for namespace in namespaces {
        let mut client = TasksClient::new(channel.clone()).max_decoding_message_size(MAX_MESSAGE);
        let request = in_namespace(ListTasksRequest::default(), namespace)?;
        let response = client
            .list(request)
            .await
            .map_err(|error| said("list tasks", &error))?;
        for process in response.into_inner().tasks {
            let name = (namespace.clone(), process.id.clone());
            all.insert(name, task(process.status, process.pid));
        }
    }
    Ok(all)
}

async fn get_tasks(
    channel: &Channel,
    names: Vec<TaskName>,
) -> Result<BTreeMap<TaskName, ContainerdTask>, String> {
    let places = Arc::new(Semaphore::new(AT_ONCE));
    let mut running = Vec::new();
    for name in names {
        let (places, channel) = (Arc::clone(&places), channel.clone());
        let request = in_namespace(
            GetRequest {
                container_id: name.1.clone(),
                exec_id: String::new(),
            },
            &name.0,
        )?;
        running.push((
            name,
            tokio::spawn(async move {
                // Closing the semaphore is the only error, and nobody closes it.
                let _place = places.acquire().await;
                let mut client = TasksClient::new(channel);
                time::timeout(GET_PATIENCE, client.get(request)).await
            }),
        ));
    }
    let mut all = BTreeMap::new();
    for (name, asked) in running {
        match super::joined(asked.await) {
            Ok(Ok(response)) => {
                if let Some(process) = response.into_inner().process {
                    all.insert(name, task(process.status, process.pid));
                }
            }
            Ok(Err(status)) if status.code() == Code::NotFound => {}
            // It knows the task, but cannot say more; or it waits for the task's shim, which it
            // does not for a task that it does not know.
            Ok(Err(_)) | Err(_) => {
                all.insert(name, task(0, 0));
            }
        }
    }
    Ok(all)
}

/// What one containerd says of one task now.
pub async fn task_of(
    address: &str,
    name: &TaskName,
    deadline: Duration,
) -> Result<Option<ContainerdTask>, String> {
    let asked = async {
        let channel = connect(address)
            .await
            .map_err(|error| chain("connect", &error))?;
        let request = GetRequest {
            container_id: name.1.clone(),
            exec_id: String::new(),
        };
        let request = in_namespace(request, &name.0)?;
        match TasksClient::new(channel).get(request).await {
            Ok(response) => {
                let process = response.into_inner().process;
                Ok(process.map(|process| task(process.status, process.pid)))
            }
            Err(status) if status.code() == Code::NotFound => Ok(None),
            Err(status) => Err(said("get task", &status)),
        }
    };
    time::timeout(deadline, asked)
        .await
        .unwrap_or_else(|_| Err("get task: no answer".into()))
}

fn task(status: i32, pid: u32) -> ContainerdTask {
    ContainerdTask {
        phase: Phase::of_number(status),
        pid,
    }
}

pub(super) fn in_namespace<T>(message: T, namespace: &str) -> Result<Request<T>, String> {
    let mut request = Request::new(message);
    let value = MetadataValue::try_from(namespace)
        .map_err(|error| format!("namespace {namespace:?}: {error}"))?;
    request.metadata_mut().insert("containerd-namespace", value);
    Ok(request)
}

pub(super) fn said(what: &str, status: &Status) -> String {
    format!("{what}: {:?}: {}", status.code(), status.message())
}

pub(super) fn chain(what: &str, error: &dyn std::error::Error) -> String {
    let mut text = format!("{what}: {error}");
    let mut source = error.source();
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    text
}

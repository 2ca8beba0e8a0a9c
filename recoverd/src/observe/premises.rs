//! What only `preflight` asks for: the shim binaries that bundles name, the CRI's sandboxes, and
//! the unit that runs containerd.

use std::{collections::BTreeSet, fs, os::unix::fs::PermissionsExt, path::Path};

use containerd_client::services::v1::{ListContainersRequest, containers_client::ContainersClient};
use recoverd_common::{paths, read::absent_or_unknown, seen::Seen};
use serde::Deserialize;

use super::{containerd, unit};
use crate::facts::{Api, Instance, Look, Premises, Sandbox};

/// The namespace of the CRI plugin; it has no other.
const CRI: &str = "k8s.io";
/// Under this name the CRI keeps a sandbox's metadata in its container's record.
const METADATA: &str = "io.cri-containerd.sandbox.metadata";

/// Looks. Takes no longer than `limits.budget`, each containerd in parallel.
pub async fn observe(look: &Look, unit_name: &str, limits: super::Limits) -> Premises {
    let asked: Vec<_> = (look.instances.iter().cloned())
        .map(|instance| {
            tokio::spawn(async move {
                match tokio::time::timeout(limits.budget, sandboxes(&instance)).await {
                    Ok(seen) => seen,
                    Err(_) => {
                        Seen::Unknown("containerd did not list its containers in time".into())
                    }
                }
            })
        })
        .collect();
    let name = unit_name.to_owned();
    let unit = tokio::task::spawn_blocking(move || unit::observe(&name));
    let mut premises = Premises {
        unit: super::joined(unit.await),
        binaries: (shim_binaries(look).into_iter())
            .map(|path| (path.to_owned(), executable(path)))
            .collect(),
        sandboxes: Vec::new(),
        shim_sandboxes: (look.instances.iter()).map(shim_sandboxes).collect(),
        cpus: std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
    };
    for sandboxes in asked {
        premises.sandboxes.push(super::joined(sandboxes.await));
    }
    premises
}

/// Every binary that a bundle names by an absolute path, once.
fn shim_binaries(look: &Look) -> BTreeSet<&Path> {
    (look.bundles.iter())
        .filter_map(|facts| Some(facts.bundle.shim_binary.present()?.as_path()))
        .filter(|path| path.is_absolute())
        .collect()
}

/// Follows symlinks, as containerd does.
fn executable(path: &Path) -> Seen<bool> {
    match fs::metadata(path) {
        Ok(meta) => Seen::Present(meta.is_file() && meta.permissions().mode() & 0o111 != 0),
        Err(error) => absent_or_unknown(&error),
    }
}

/// Bundles of sandboxes that a shim's own sandbox service runs.
fn shim_sandboxes(instance: &Instance) -> Seen<usize> {
    let Some(state) = &instance.state else {
        return Seen::Unknown("nothing says where its state folder is".into());
    };
    let namespaces = match fs::read_dir(state.join(paths::SANDBOX_PLUGIN)) {
        Ok(namespaces) => namespaces,
        Err(error) => return absent_or_unknown(&error),
    };
    let mut count: usize = 0;
    for namespace in namespaces.flatten() {
        match fs::read_dir(namespace.path()) {
            Ok(bundles) => count = count.saturating_add(bundles.count()),
            // A plain file, or a namespace that went away.
            Err(error) => match absent_or_unknown::<()>(&error) {
                Seen::Unknown(why) if namespace.path().is_dir() => return Seen::Unknown(why),
                Seen::Present(()) | Seen::Absent | Seen::Unknown(_) => {}
            },
        }
    }
    Seen::Present(count)
}

/// The sandboxes in containerd's container records. *Absent* for one without the CRI's namespace.
async fn sandboxes(instance: &Instance) -> Seen<Vec<Sandbox>> {
    match &instance.api {
        Api::Up(api) if api.namespaces.iter().any(|name| name == CRI) => {}
        Api::Up(_) => return Seen::Absent,
        Api::Down => return Seen::Unknown("containerd is not up".into()),
        Api::Unknown(why) => return Seen::Unknown(why.clone()),
    }
    match list(&instance.address).await {
        Ok(sandboxes) => Seen::Present(sandboxes),
        Err(why) => Seen::Unknown(why),
    }
}

async fn list(address: &str) -> Result<Vec<Sandbox>, String> {
    let channel = containerd::connect(address)
        .await
        .map_err(|error| containerd::chain("connect", &error))?;
    let request = ListContainersRequest {
        filters: vec!["labels.\"io.cri-containerd.kind\"==sandbox".into()],
    };
    let said = |error| containerd::said("list sandboxes", &error);
    let mut stream = ContainersClient::new(channel)
        .list_stream(containerd::in_namespace(request, CRI)?)
        .await
        .map_err(said)?
        .into_inner();
    let mut found = Vec::new();
    while let Some(message) = stream.message().await.map_err(said)? {
        let Some(container) = message.container else {
            continue;
        };
        // A record whose metadata is no good is skipped by the CRI plugin as well, with a word
        // in its log.
        if let Some(name) = (container.extensions.get(METADATA)).and_then(|any| name(&any.value)) {
            found.push(Sandbox {
                id: container.id,
                name,
            });
        }
    }
    found.sort();
    Ok(found)
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Versioned {
    metadata: Metadata,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Metadata {
    name: String,
}

/// The reserved name in the CRI's metadata, `{"Version":"v1","Metadata":{"Name":…}}`.
fn name(json: &[u8]) -> Option<String> {
    let versioned: Versioned = serde_json::from_slice(json).ok()?;
    Some(versioned.metadata.name).filter(|name| !name.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reserved_name_is_found_in_the_metadata_of_the_cri() {
        let json = br#"{"Version":"v1","Metadata":{"ID":"ab12","Name":"web_default_9f_0","Config":
            {"metadata":{"name":"web","uid":"9f","namespace":"default"}},"NetNSPath":"/x"}}"#;
        assert_eq!(name(json).as_deref(), Some("web_default_9f_0"));
        assert_eq!(name(b"{}"), None);
        assert_eq!(name(br#"{"Metadata":{"Name":""}}"#), None);
    }

    #[test]
    fn a_binary_is_executable_or_not_or_gone() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("shim");
        assert_eq!(executable(&file), Seen::Absent);
        fs::write(&file, "").unwrap();
        assert_eq!(executable(&file), Seen::Present(false));
        fs::set_permissions(&file, fs::Permissions::from_mode(0o755)).unwrap();
        assert_eq!(executable(&file), Seen::Present(true));
        assert_eq!(executable(dir.path()), Seen::Present(false));
    }
}

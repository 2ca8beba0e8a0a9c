//! What names tasks on disk: bundles, runc's state, records.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    time::SystemTime,
};

use rayon::prelude::*;
use recoverd_common::{
    bundle::{self, Bundle, Listed},
    paths, record, runc,
    seen::Seen,
};

use super::Roots;
use crate::facts::{BundleFacts, Gap, Instance, RecordFile, RuncEntry};

/// Reads the bundles of every instance.
pub fn observe(instances: &[Instance], gaps: &mut Vec<Gap>) -> Vec<BundleFacts> {
    let mut all = Vec::new();
    for (index, instance) in instances.iter().enumerate() {
        let Some(state) = &instance.state else {
            continue;
        };
        let listed = match bundle::list(state) {
            Seen::Present(listed) => listed,
            Seen::Absent => continue,
            Seen::Unknown(why) => {
                let top = state.join(paths::TASK_PLUGIN);
                gaps.push(Gap::of(instance, top.display().to_string(), why));
                continue;
            }
        };
        let read: Vec<(PathBuf, Seen<Bundle>)> = listed
            .into_par_iter()
            .filter_map(|listed| match listed {
                Listed::Bundle(namespace, id) => {
                    let path = paths::bundle(state, &namespace, &id);
                    Some((path.clone(), Bundle::read(path, namespace, id)))
                }
                // containerd's loader skips these too; what they hold is nobody's task.
                Listed::Other(_) => None,
            })
            .collect();
        for (path, read) in read {
            match read {
                Seen::Present(bundle) => all.push(BundleFacts {
                    instance: index,
                    bundle,
                }),
                // Removed since it was listed.
                Seen::Absent => {}
                Seen::Unknown(why) => {
                    gaps.push(Gap::of(instance, path.display().to_string(), why));
                }
            }
        }
    }
    all
}

/// Reads runc's state below the default root and the roots that bundles' options name.
pub fn observe_runc(roots: &Roots, bundles: &[BundleFacts], gaps: &mut Vec<Gap>) -> Vec<RuncEntry> {
    let mut tops: BTreeSet<PathBuf> = BTreeSet::from([roots.runc_root.clone()]);
    tops.extend(bundles.iter().filter_map(|facts| {
        let root = &facts.bundle.options.present()?.root;
        (!root.is_empty()).then(|| PathBuf::from(root))
    }));
    let mut all = Vec::new();
    for top in tops {
        let listed = match runc::list(&top) {
            Seen::Present(listed) => listed,
            Seen::Absent => continue,
            Seen::Unknown(why) => {
                gaps.push(Gap::new(top.display().to_string(), why));
                continue;
            }
        };
        all.par_extend(listed.into_par_iter().map(|(namespace, id)| {
            let path = top.join(namespace.as_str()).join(id.as_str());
            RuncEntry {
                changed_at: changed_at(&path),
                state: runc::read(&top, &namespace, &id),
                name: (namespace.into(), id.into()),
                path,
            }
        }));
    }
    all
}

/// Reads the records beside sockets, and those whose socket is gone.
pub fn observe_records(roots: &Roots) -> Vec<RecordFile> {
    // A folder that cannot be listed is a gap already, noted with the sockets.
    let Ok(entries) = fs::read_dir(&roots.socket_dir) else {
        return Vec::new();
    };
    let mut found: Vec<RecordFile> = entries
        .flatten()
        .filter_map(|entry| {
            let name = entry.file_name();
            let socket = name.to_str()?.strip_suffix(".record")?;
            if !paths::is_socket_name(socket) {
                return None;
            }
            let path = entry.path();
            Some(RecordFile {
                socket: roots.socket_dir.join(socket).to_string_lossy().into_owned(),
                record: record::read(&path),
                path,
            })
        })
        .collect();
    found.sort_by(|a, b| a.path.cmp(&b.path));
    found
}

/// When a file or folder was last changed; `None` when it is gone.
pub fn changed_at(path: &Path) -> Option<SystemTime> {
    fs::symlink_metadata(path)
        .and_then(|meta| meta.modified())
        .ok()
}

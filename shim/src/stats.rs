//! What `Stats` answers: the counters of a task's cgroup as containerd's `Metrics`, v1 or v2, with
//! the fields that the stock shim fills. Reads a few dozen small files, never forks.
//!
//! A file that is not there (a controller that is off, an older kernel) leaves its field empty, as
//! in the stock shim: no kernel has them all.

mod v1;
mod v2;

use std::path::Path;

use prost::Message;
use prost_types::Any;
use recoverd_common::{
    cgroup::{Cgroup, MAX_FILE, Roots},
    pb::type_url,
    read::read_text,
    seen::Seen,
};

/// The metrics of `cgroup`; *absent* when the group is gone.
pub fn read(roots: &Roots, cgroup: &Cgroup) -> Seen<Any> {
    match cgroup.any_folder() {
        Some(folder) if folder.is_dir() => {}
        Some(_) | None => return Seen::Absent,
    }
    Seen::Present(match cgroup {
        Cgroup::V1(_) => Any {
            type_url: type_url::METRICS_V1.into(),
            value: v1::metrics(roots, cgroup).encode_to_vec(),
        },
        Cgroup::V2(folder) => Any {
            type_url: type_url::METRICS_V2.into(),
            value: v2::metrics(roots, folder).encode_to_vec(),
        },
    })
}

fn text(folder: &Path, file: &str) -> Option<String> {
    match read_text(&folder.join(file), MAX_FILE) {
        Seen::Present(text) => Some(text),
        // Also *unknown*: some files answer EOPNOTSUPP, and one field less is better than no stats.
        Seen::Absent | Seen::Unknown(_) => None,
    }
}

/// The machine's sizes of huge pages as the kernel's cgroup files name them (`2MB`). Like the stock
/// shim we have an entry for each, also where the group does not count them.
fn page_sizes(hugepages: &Path) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(hugepages) else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter_map(|entry| page_size(entry.file_name().to_str()?))
        .collect()
}

/// `hugepages-2048kB` is `2MB`.
fn page_size(folder: &str) -> Option<String> {
    let text = folder.strip_prefix("hugepages-")?.strip_suffix("kB")?;
    let mut size: u64 = text.parse().ok()?;
    let mut units = ["KB", "MB", "GB", "TB"].into_iter();
    let mut unit = units.next()?;
    while size >= 1024 {
        let Some(next) = units.next() else { break };
        (size, unit) = (size / 1024, next);
    }
    Some(format!("{size}{unit}"))
}

/// `DEVICE hca_handle=N hca_object=N` lines; `max` is the largest there is.
fn rdma(text: &str) -> impl Iterator<Item = (String, u32, u32)> {
    text.lines().filter_map(|line| {
        let mut fields = line.split_ascii_whitespace();
        let device = fields.next()?.to_owned();
        let (mut handles, mut objects) = (0, 0);
        for field in fields {
            let (key, value) = field.split_once('=')?;
            let value = if value == "max" {
                u32::MAX
            } else {
                value.parse().ok()?
            };
            match key {
                "hca_handle" => handles = value,
                "hca_object" => objects = value,
                _ => {}
            }
        }
        Some((device, handles, objects))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use recoverd_common::pb::{cgroups1, cgroups2};
    use std::{fs, path::PathBuf};

    pub(super) fn write(folder: &Path, files: &[(&str, &str)]) {
        fs::create_dir_all(folder).unwrap();
        for (name, content) in files {
            fs::write(folder.join(name), content).unwrap();
        }
    }

    #[test]
    fn a_cgroup_that_is_gone_has_no_metrics() {
        let gone = PathBuf::from("/nonexistent/group");
        assert!(read(&Roots::default(), &Cgroup::V2(gone.clone())).is_absent());
        assert!(read(&Roots::default(), &Cgroup::V1(vec![("pids".into(), gone)])).is_absent());
    }

    #[test]
    fn the_group_of_this_process_has_metrics() {
        let roots = Roots::default();
        let pid = i32::try_from(std::process::id()).unwrap();
        let cgroup = Cgroup::of(&roots, pid).present().cloned().unwrap();
        let any = read(&roots, &cgroup).present().cloned().unwrap();
        let memory = match &cgroup {
            Cgroup::V1(_) => {
                let memory = cgroups1::Metrics::decode(any.value.as_slice())
                    .unwrap()
                    .memory;
                memory
                    .and_then(|memory| memory.usage)
                    .map(|entry| (entry.usage, entry.limit))
            }
            Cgroup::V2(_) => {
                let memory = cgroups2::Metrics::decode(any.value.as_slice())
                    .unwrap()
                    .memory;
                memory.map(|memory| (memory.usage, memory.usage_limit))
            }
        };
        if let (Some((usage, limit)), Some(folder)) = (memory, cgroup.folder("memory"))
            && folder.join("memory.limit_in_bytes").exists()
        {
            assert!(usage > 0 && limit >= usage, "{usage} of {limit}");
        }
    }
}

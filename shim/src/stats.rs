//! What `Stats` answers: the counters of a task's cgroup as containerd's `Metrics`, v1 or v2, with
//! the fields that the stock shim fills. Reads a few dozen small files, never forks.
//!
//! A file that is not there (a controller that is off, an older kernel) leaves its field empty, as
//! in the stock shim: no kernel has them all.

use std::path::Path;

use prost::Message;
use prost_types::Any;
use recoverd_common::{
    cgroup::{Cgroup, MAX_FILE, Roots, parse_number, parse_pairs},
    pb::{cgroups1 as v1, cgroups2 as v2, type_url},
    read::read_text,
    seen::Seen,
};

/// The kernel's `USER_HZ`, part of its interface on every architecture that containerd runs on.
const TICKS_PER_SECOND: u64 = 100;
const NANOSECONDS_PER_TICK: u64 = 1_000_000_000 / TICKS_PER_SECOND;

/// The metrics of `cgroup`; *absent* when the group is gone.
pub fn read(roots: &Roots, cgroup: &Cgroup) -> Seen<Any> {
    match cgroup.any_folder() {
        Some(folder) if folder.is_dir() => {}
        Some(_) | None => return Seen::Absent,
    }
    Seen::Present(match cgroup {
        Cgroup::V1(_) => Any {
            type_url: type_url::METRICS_V1.into(),
            value: metrics_v1(roots, cgroup).encode_to_vec(),
        },
        Cgroup::V2(folder) => Any {
            type_url: type_url::METRICS_V2.into(),
            value: metrics_v2(roots, folder).encode_to_vec(),
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

/// A number of v2, where `max` is the largest there is; 0 when it cannot be read.
fn number(folder: &Path, file: &str) -> u64 {
    text(folder, file)
        .and_then(|text| parse_number(&text))
        .unwrap_or(0)
}

/// A number of v1, where the stock shim says 0 for `max`.
fn number_v1(folder: &Path, file: &str) -> u64 {
    match text(folder, file) {
        Some(text) if text.trim() != "max" => parse_number(&text).unwrap_or(0),
        Some(_) | None => 0,
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

// ---- cgroup v1 ----

fn metrics_v1(roots: &Roots, cgroup: &Cgroup) -> v1::Metrics {
    let mut metrics = v1::Metrics {
        cpu: Some(v1::CpuStat {
            usage: Some(v1::CpuUsage::default()),
            throttling: Some(v1::Throttle::default()),
        }),
        ..Default::default()
    };
    if let Some(folder) = cgroup.folder("hugetlb") {
        metrics.hugetlb = page_sizes(&roots.hugepages)
            .into_iter()
            .map(|size| v1::HugetlbStat {
                usage: number_v1(folder, &format!("hugetlb.{size}.usage_in_bytes")),
                max: number_v1(folder, &format!("hugetlb.{size}.max_usage_in_bytes")),
                failcnt: number_v1(folder, &format!("hugetlb.{size}.failcnt")),
                pagesize: size,
            })
            .collect();
    }
    if let Some(folder) = cgroup.folder("pids") {
        metrics.pids = Some(v1::PidsStat {
            current: number_v1(folder, "pids.current"),
            limit: number_v1(folder, "pids.max"),
        });
    }
    if let Some(cpu) = &mut metrics.cpu {
        if let Some(folder) = cgroup.folder("cpuacct") {
            cpu.usage = Some(cpu_usage_v1(folder));
        }
        let cpu_stat = cgroup
            .folder("cpu")
            .and_then(|folder| text(folder, "cpu.stat"));
        cpu.throttling = Some(throttle_v1(&cpu_stat.unwrap_or_default()));
    }
    if let Some(folder) = cgroup.folder("memory") {
        metrics.memory = Some(memory_v1(folder));
        metrics.memory_oom_control = text(folder, "memory.oom_control").map(|t| oom_control(&t));
    }
    if let Some(folder) = cgroup.folder("blkio") {
        metrics.blkio = Some(blkio_v1(roots, folder));
    }
    if let Some(folder) = cgroup.folder("rdma")
        && let (Some(current), Some(limit)) =
            (text(folder, "rdma.current"), text(folder, "rdma.max"))
    {
        let entries = |text: &str| {
            rdma(text)
                .map(|(device, hca_handles, hca_objects)| v1::RdmaEntry {
                    device,
                    hca_handles,
                    hca_objects,
                })
                .collect()
        };
        metrics.rdma = Some(v1::RdmaStat {
            current: entries(&current),
            limit: entries(&limit),
        });
    }
    metrics
}

fn cpu_usage_v1(folder: &Path) -> v1::CpuUsage {
    let mut usage = v1::CpuUsage {
        total: number_v1(folder, "cpuacct.usage"),
        ..Default::default()
    };
    for (key, ticks) in parse_pairs(&text(folder, "cpuacct.stat").unwrap_or_default()) {
        let nanoseconds = ticks.saturating_mul(NANOSECONDS_PER_TICK);
        match key {
            "user" => usage.user = nanoseconds,
            "system" => usage.kernel = nanoseconds,
            _ => {}
        }
    }
    usage.per_cpu = text(folder, "cpuacct.usage_percpu")
        .unwrap_or_default()
        .split_ascii_whitespace()
        .filter_map(|n| n.parse().ok())
        .collect();
    usage
}

fn throttle_v1(cpu_stat: &str) -> v1::Throttle {
    let mut throttle = v1::Throttle::default();
    for (key, value) in parse_pairs(cpu_stat) {
        match key {
            "nr_periods" => throttle.periods = value,
            "nr_throttled" => throttle.throttled_periods = value,
            "throttled_time" => throttle.throttled_time = value,
            _ => {}
        }
    }
    throttle
}

fn oom_control(text: &str) -> v1::MemoryOomControl {
    let mut control = v1::MemoryOomControl::default();
    for (key, value) in parse_pairs(text) {
        match key {
            "oom_kill_disable" => control.oom_kill_disable = value,
            "under_oom" => control.under_oom = value,
            "oom_kill" => control.oom_kill = value,
            _ => {}
        }
    }
    control
}

fn memory_v1(folder: &Path) -> v1::MemoryStat {
    let entry = |module: &str| {
        Some(v1::MemoryEntry {
            limit: number_v1(folder, &format!("memory.{module}limit_in_bytes")),
            usage: number_v1(folder, &format!("memory.{module}usage_in_bytes")),
            max: number_v1(folder, &format!("memory.{module}max_usage_in_bytes")),
            failcnt: number_v1(folder, &format!("memory.{module}failcnt")),
        })
    };
    v1::MemoryStat {
        usage: entry(""),
        swap: entry("memsw."),
        kernel: entry("kmem."),
        kernel_tcp: entry("kmem.tcp."),
        ..memory_stat_v1(&text(folder, "memory.stat").unwrap_or_default())
    }
}

fn memory_stat_v1(text: &str) -> v1::MemoryStat {
    let mut stat = v1::MemoryStat::default();
    for (key, value) in parse_pairs(text) {
        let field = match key {
            "cache" => &mut stat.cache,
            "rss" => &mut stat.rss,
            "rss_huge" => &mut stat.rss_huge,
            "mapped_file" => &mut stat.mapped_file,
            "dirty" => &mut stat.dirty,
            "writeback" => &mut stat.writeback,
            "pgpgin" => &mut stat.pg_pg_in,
            "pgpgout" => &mut stat.pg_pg_out,
            "pgfault" => &mut stat.pg_fault,
            "pgmajfault" => &mut stat.pg_maj_fault,
            "inactive_anon" => &mut stat.inactive_anon,
            "active_anon" => &mut stat.active_anon,
            "inactive_file" => &mut stat.inactive_file,
            "active_file" => &mut stat.active_file,
            "unevictable" => &mut stat.unevictable,
            "hierarchical_memory_limit" => &mut stat.hierarchical_memory_limit,
            "hierarchical_memsw_limit" => &mut stat.hierarchical_swap_limit,
            "total_cache" => &mut stat.total_cache,
            "total_rss" => &mut stat.total_rss,
            "total_rss_huge" => &mut stat.total_rss_huge,
            "total_mapped_file" => &mut stat.total_mapped_file,
            "total_dirty" => &mut stat.total_dirty,
            "total_writeback" => &mut stat.total_writeback,
            "total_pgpgin" => &mut stat.total_pg_pg_in,
            "total_pgpgout" => &mut stat.total_pg_pg_out,
            "total_pgfault" => &mut stat.total_pg_fault,
            "total_pgmajfault" => &mut stat.total_pg_maj_fault,
            "total_inactive_anon" => &mut stat.total_inactive_anon,
            "total_active_anon" => &mut stat.total_active_anon,
            "total_inactive_file" => &mut stat.total_inactive_file,
            "total_active_file" => &mut stat.total_active_file,
            "total_unevictable" => &mut stat.total_unevictable,
            _ => continue,
        };
        *field = value;
    }
    stat
}

/// The CFQ counters where the kernel has them and they count anything, else the throttling ones.
fn blkio_v1(roots: &Roots, folder: &Path) -> v1::BlkIoStat {
    let partitions = text(&roots.proc, "partitions").unwrap_or_default();
    let read = |name: &str| {
        text(folder, &format!("blkio.{name}"))
            .map(|text| blkio_entries(&text, &partitions))
            .unwrap_or_default()
    };
    let cfq = v1::BlkIoStat {
        io_service_bytes_recursive: read("io_service_bytes_recursive"),
        io_serviced_recursive: read("io_serviced_recursive"),
        io_queued_recursive: read("io_queued_recursive"),
        io_service_time_recursive: read("io_service_time_recursive"),
        io_wait_time_recursive: read("io_wait_time_recursive"),
        io_merged_recursive: read("io_merged_recursive"),
        io_time_recursive: read("time_recursive"),
        sectors_recursive: read("sectors_recursive"),
    };
    if cfq != v1::BlkIoStat::default() {
        return cfq;
    }
    v1::BlkIoStat {
        io_serviced_recursive: read("throttle.io_serviced"),
        io_service_bytes_recursive: read("throttle.io_service_bytes"),
        ..Default::default()
    }
}

/// `MAJOR:MINOR OP VALUE` or `MAJOR:MINOR VALUE` lines; the closing `Total VALUE` is skipped.
fn blkio_entries(text: &str, partitions: &str) -> Vec<v1::BlkIoEntry> {
    text.lines()
        .filter_map(|line| {
            let (device, rest) = line.split_once(' ')?;
            let (major, minor) = device.split_once(':')?;
            let (major, minor) = (major.parse().ok()?, minor.parse().ok()?);
            let (op, value) = rest.split_once(' ').unwrap_or(("", rest));
            Some(v1::BlkIoEntry {
                op: op.to_owned(),
                device: device_name(partitions, major, minor).unwrap_or_default(),
                major,
                minor,
                value: value.trim().parse().ok()?,
            })
        })
        .collect()
}

/// `/dev/<name>` by `/proc/partitions`: `MAJOR MINOR BLOCKS NAME`.
fn device_name(partitions: &str, major: u64, minor: u64) -> Option<String> {
    partitions.lines().find_map(|line| {
        let mut fields = line.split_ascii_whitespace();
        let found = fields.next()?.parse() == Ok(major) && fields.next()?.parse() == Ok(minor);
        found.then(|| fields.nth(1).map(|name| format!("/dev/{name}")))?
    })
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

// ---- cgroup v2 ----

fn metrics_v2(roots: &Roots, folder: &Path) -> v2::Metrics {
    let rdma = |file: &str| {
        rdma(&text(folder, file).unwrap_or_default())
            .map(|(device, hca_handles, hca_objects)| v2::RdmaEntry {
                device,
                hca_handles,
                hca_objects,
            })
            .collect()
    };
    v2::Metrics {
        pids: Some(v2::PidsStat {
            current: number(folder, "pids.current"),
            limit: number(folder, "pids.max"),
        }),
        cpu: Some(v2::CpuStat {
            psi: psi(folder, "cpu.pressure"),
            ..cpu_v2(&text(folder, "cpu.stat").unwrap_or_default())
        }),
        memory: Some(v2::MemoryStat {
            usage: number(folder, "memory.current"),
            usage_limit: number(folder, "memory.max"),
            max_usage: number(folder, "memory.peak"),
            swap_usage: number(folder, "memory.swap.current"),
            swap_limit: number(folder, "memory.swap.max"),
            swap_max_usage: number(folder, "memory.swap.peak"),
            psi: psi(folder, "memory.pressure"),
            ..memory_stat_v2(&text(folder, "memory.stat").unwrap_or_default())
        }),
        rdma: Some(v2::RdmaStat {
            current: rdma("rdma.current"),
            limit: rdma("rdma.max"),
        }),
        io: Some(v2::IoStat {
            usage: io_v2(&text(folder, "io.stat").unwrap_or_default()),
            psi: psi(folder, "io.pressure"),
        }),
        hugetlb: page_sizes(&roots.hugepages)
            .into_iter()
            .map(|size| v2::HugeTlbStat {
                current: number(folder, &format!("hugetlb.{size}.current")),
                max: number(folder, &format!("hugetlb.{size}.max")),
                failcnt: text(folder, &format!("hugetlb.{size}.events"))
                    .and_then(|text| {
                        parse_pairs(&text)
                            .find(|(key, _)| *key == "max")
                            .map(|(_, n)| n)
                    })
                    .unwrap_or(0),
                pagesize: size,
            })
            .collect(),
        memory_events: text(folder, "memory.events").map(|text| memory_events(&text)),
        network: Vec::new(),
    }
}

fn cpu_v2(text: &str) -> v2::CpuStat {
    let mut cpu = v2::CpuStat::default();
    for (key, value) in parse_pairs(text) {
        let field = match key {
            "usage_usec" => &mut cpu.usage_usec,
            "user_usec" => &mut cpu.user_usec,
            "system_usec" => &mut cpu.system_usec,
            "nr_periods" => &mut cpu.nr_periods,
            "nr_throttled" => &mut cpu.nr_throttled,
            "throttled_usec" => &mut cpu.throttled_usec,
            "nr_bursts" => &mut cpu.nr_bursts,
            "burst_usec" => &mut cpu.burst_usec,
            _ => continue,
        };
        *field = value;
    }
    cpu
}

fn memory_stat_v2(text: &str) -> v2::MemoryStat {
    let mut stat = v2::MemoryStat::default();
    for (key, value) in parse_pairs(text) {
        let field = match key {
            "anon" => &mut stat.anon,
            "file" => &mut stat.file,
            "kernel_stack" => &mut stat.kernel_stack,
            "slab" => &mut stat.slab,
            "sock" => &mut stat.sock,
            "shmem" => &mut stat.shmem,
            "file_mapped" => &mut stat.file_mapped,
            "file_dirty" => &mut stat.file_dirty,
            "file_writeback" => &mut stat.file_writeback,
            "anon_thp" => &mut stat.anon_thp,
            "inactive_anon" => &mut stat.inactive_anon,
            "active_anon" => &mut stat.active_anon,
            "inactive_file" => &mut stat.inactive_file,
            "active_file" => &mut stat.active_file,
            "unevictable" => &mut stat.unevictable,
            "slab_reclaimable" => &mut stat.slab_reclaimable,
            "slab_unreclaimable" => &mut stat.slab_unreclaimable,
            "pgfault" => &mut stat.pgfault,
            "pgmajfault" => &mut stat.pgmajfault,
            "workingset_refault" => &mut stat.workingset_refault,
            "workingset_activate" => &mut stat.workingset_activate,
            "workingset_nodereclaim" => &mut stat.workingset_nodereclaim,
            "pgrefill" => &mut stat.pgrefill,
            "pgscan" => &mut stat.pgscan,
            "pgsteal" => &mut stat.pgsteal,
            "pgactivate" => &mut stat.pgactivate,
            "pgdeactivate" => &mut stat.pgdeactivate,
            "pglazyfree" => &mut stat.pglazyfree,
            "pglazyfreed" => &mut stat.pglazyfreed,
            "thp_fault_alloc" => &mut stat.thp_fault_alloc,
            "thp_collapse_alloc" => &mut stat.thp_collapse_alloc,
            _ => continue,
        };
        *field = value;
    }
    stat
}

fn memory_events(text: &str) -> v2::MemoryEvents {
    let mut events = v2::MemoryEvents::default();
    for (key, value) in parse_pairs(text) {
        match key {
            "low" => events.low = value,
            "high" => events.high = value,
            "max" => events.max = value,
            "oom" => events.oom = value,
            "oom_kill" => events.oom_kill = value,
            _ => {}
        }
    }
    events
}

/// `MAJOR:MINOR rbytes=N wbytes=N rios=N wios=N …` lines.
fn io_v2(text: &str) -> Vec<v2::IoEntry> {
    text.lines()
        .filter_map(|line| {
            let (device, rest) = line.split_once(' ')?;
            let (major, minor) = device.split_once(':')?;
            let mut entry = v2::IoEntry {
                major: major.parse().ok()?,
                minor: minor.parse().ok()?,
                ..Default::default()
            };
            for (key, value) in rest.split(' ').filter_map(|pair| pair.split_once('=')) {
                let Ok(value) = value.parse() else { continue };
                match key {
                    "rbytes" => entry.rbytes = value,
                    "wbytes" => entry.wbytes = value,
                    "rios" => entry.rios = value,
                    "wios" => entry.wios = value,
                    _ => {}
                }
            }
            Some(entry)
        })
        .collect()
}

/// `some avg10=0.00 avg60=0.00 avg300=0.00 total=0` and the same for `full`. Pressure stall
/// information may be compiled in and switched off: then the file is there and cannot be read.
fn psi(folder: &Path, file: &str) -> Option<v2::PsiStats> {
    text(folder, file).map(|text| parse_psi(&text))
}

fn parse_psi(text: &str) -> v2::PsiStats {
    let mut stats = v2::PsiStats::default();
    for line in text.lines() {
        let Some((kind, rest)) = line.split_once(' ') else {
            continue;
        };
        let mut values = v2::PsiData::default();
        for (key, value) in rest.split(' ').filter_map(|pair| pair.split_once('=')) {
            match key {
                "avg10" => values.avg10 = value.parse().unwrap_or(0.0),
                "avg60" => values.avg60 = value.parse().unwrap_or(0.0),
                "avg300" => values.avg300 = value.parse().unwrap_or(0.0),
                "total" => values.total = value.parse().unwrap_or(0),
                _ => {}
            }
        }
        match kind {
            "some" => stats.some = Some(values),
            "full" => stats.full = Some(values),
            _ => {}
        }
    }
    stats
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{fs, path::PathBuf};

    fn write(folder: &Path, files: &[(&str, &str)]) {
        fs::create_dir_all(folder).unwrap();
        for (name, content) in files {
            fs::write(folder.join(name), content).unwrap();
        }
    }

    #[test]
    fn v1_metrics_have_what_the_stock_shim_gives() {
        // Recorded in a `ctr run --memory-limit 64000000` container on Linux 6.18, shortened.
        let dir = tempfile::tempdir().unwrap();
        let at = |c: &str| dir.path().join(c).join("ns/c1");
        write(
            &at("pids"),
            &[("pids.current", "2\n"), ("pids.max", "max\n")],
        );
        write(
            &at("cpuacct"),
            &[
                ("cpuacct.usage", "123456789\n"),
                ("cpuacct.stat", "user 7\nsystem 5\n"),
                ("cpuacct.usage_percpu", "100000000 23456789 \n"),
            ],
        );
        write(
            &at("cpu"),
            &[(
                "cpu.stat",
                "nr_periods 3\nnr_throttled 2\nthrottled_time 99\nwait_sum 1\n",
            )],
        );
        write(
            &at("memory"),
            &[
                (
                    "memory.stat",
                    "cache 1\nrss 2\nmapped_file 3\npgpgin 4\nhierarchical_memory_limit 63999\nhierarchical_memsw_limit 9\ntotal_rss 5\ntotal_inactive_file 6\ntotal_pgmajfault 7\n",
                ),
                ("memory.usage_in_bytes", "4096\n"),
                ("memory.limit_in_bytes", "64000000\n"),
                ("memory.max_usage_in_bytes", "8192\n"),
                ("memory.failcnt", "1\n"),
                ("memory.kmem.usage_in_bytes", "77\n"),
                (
                    "memory.oom_control",
                    "oom_kill_disable 0\nunder_oom 0\noom_kill 4\n",
                ),
            ],
        );
        write(
            &at("blkio"),
            &[
                (
                    "blkio.throttle.io_serviced",
                    "8:0 Read 5\n8:0 Total 5\nTotal 5\n",
                ),
                (
                    "blkio.throttle.io_service_bytes",
                    "8:0 Read 20480\nTotal 20480\n",
                ),
            ],
        );
        write(
            &at("hugetlb"),
            &[
                ("hugetlb.2MB.usage_in_bytes", "2097152\n"),
                ("hugetlb.2MB.max_usage_in_bytes", "4194304\n"),
                ("hugetlb.2MB.failcnt", "1\n"),
                ("hugetlb.2MB.rsvd.usage_in_bytes", "0\n"),
            ],
        );
        let rdma = (
            "mlx4_0 hca_handle=2 hca_object=10\n",
            "mlx4_0 hca_handle=max hca_object=2000\n",
        );
        write(
            &at("rdma"),
            &[("rdma.current", rdma.0), ("rdma.max", rdma.1)],
        );
        let partitions = "major minor  #blocks  name\n\n   8        0   41943040 sda\n";
        write(&dir.path().join("p"), &[("partitions", partitions)]);

        let roots = Roots {
            proc: dir.path().join("p"),
            cgroup: dir.path().into(),
            hugepages: dir.path().join("h"),
        };
        fs::create_dir_all(roots.hugepages.join("hugepages-2048kB")).unwrap();
        let controllers = [
            "pids", "cpu", "cpuacct", "memory", "blkio", "hugetlb", "rdma",
        ];
        let cgroup = Cgroup::V1(controllers.map(|c| (c.to_owned(), at(c))).into());
        let any = read(&roots, &cgroup).present().cloned().unwrap();
        assert_eq!(any.type_url, "io.containerd.cgroups.v1.Metrics");
        let m = v1::Metrics::decode(any.value.as_slice()).unwrap();
        assert_eq!(
            m.pids,
            Some(v1::PidsStat {
                current: 2,
                limit: 0
            })
        );
        let cpu = m.cpu.unwrap();
        assert_eq!(
            cpu.usage.unwrap(),
            v1::CpuUsage {
                total: 123_456_789,
                kernel: 50_000_000,
                user: 70_000_000,
                per_cpu: vec![100_000_000, 23_456_789],
            }
        );
        assert_eq!(
            cpu.throttling.unwrap(),
            v1::Throttle {
                periods: 3,
                throttled_periods: 2,
                throttled_time: 99
            }
        );
        let memory = m.memory.unwrap();
        assert_eq!(
            memory.usage,
            Some(v1::MemoryEntry {
                limit: 64_000_000,
                usage: 4096,
                max: 8192,
                failcnt: 1
            })
        );
        assert_eq!(
            (memory.kernel.unwrap().usage, memory.hierarchical_swap_limit),
            (77, 9)
        );
        assert_eq!((memory.total_rss, memory.total_inactive_file), (5, 6));
        assert_eq!(m.memory_oom_control.unwrap().oom_kill, 4);
        let blkio = m.blkio.unwrap();
        assert_eq!(blkio.io_serviced_recursive.len(), 2);
        assert_eq!(
            blkio.io_service_bytes_recursive,
            [v1::BlkIoEntry {
                op: "Read".into(),
                device: "/dev/sda".into(),
                major: 8,
                minor: 0,
                value: 20480,
            }]
        );
        assert_eq!(
            m.hugetlb,
            [v1::HugetlbStat {
                usage: 2 << 20,
                max: 4 << 20,
                failcnt: 1,
                pagesize: "2MB".into()
            }]
        );
        let rdma = m.rdma.unwrap();
        assert_eq!(
            (rdma.current[0].hca_handles, rdma.limit[0].hca_handles),
            (2, u32::MAX)
        );
    }

    #[test]
    fn v2_metrics_have_what_the_stock_shim_gives() {
        // Recorded on Linux 6.12 with systemd cgroups, shortened.
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("system.slice/c1.scope");
        write(
            &folder,
            &[
                ("pids.current", "3\n"),
                ("pids.max", "max\n"),
                (
                    "cpu.stat",
                    "usage_usec 10\nuser_usec 6\nsystem_usec 4\nnice_usec 0\nnr_periods 1\nnr_throttled 2\nthrottled_usec 3\nnr_bursts 4\nburst_usec 5\n",
                ),
                (
                    "cpu.pressure",
                    "some avg10=0.50 avg60=0.25 avg300=0.00 total=17\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=3\n",
                ),
                (
                    "memory.stat",
                    "anon 1\nfile 2\ninactive_file 3\npgfault 4\npgmajfault 5\nthp_collapse_alloc 6\n",
                ),
                ("memory.current", "4096\n"),
                ("memory.max", "max\n"),
                ("memory.peak", "8192\n"),
                ("memory.swap.current", "0\n"),
                ("memory.swap.max", "100\n"),
                (
                    "memory.events",
                    "low 0\nhigh 1\nmax 2\noom 3\noom_kill 4\noom_group_kill 0\n",
                ),
                (
                    "io.stat",
                    "8:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=0 dios=0\nbad\n",
                ),
                ("hugetlb.1GB.current", "0\n"),
                ("hugetlb.1GB.max", "max\n"),
                ("hugetlb.1GB.events", "max 6\n"),
                ("hugetlb.1GB.rsvd.current", "0\n"),
            ],
        );
        let roots = Roots {
            hugepages: dir.path().join("h"),
            ..Roots::default()
        };
        // The kernel has both, this group counts the first.
        for name in ["hugepages-1048576kB", "hugepages-64kB", "demote"] {
            fs::create_dir_all(roots.hugepages.join(name)).unwrap();
        }
        let any = read(&roots, &Cgroup::V2(folder))
            .present()
            .cloned()
            .unwrap();
        assert_eq!(any.type_url, "io.containerd.cgroups.v2.Metrics");
        let m = v2::Metrics::decode(any.value.as_slice()).unwrap();
        assert_eq!(
            m.pids,
            Some(v2::PidsStat {
                current: 3,
                limit: u64::MAX
            })
        );
        let cpu = m.cpu.unwrap();
        assert_eq!(
            (cpu.usage_usec, cpu.throttled_usec, cpu.burst_usec),
            (10, 3, 5)
        );
        assert_eq!(cpu.psi.unwrap().some.unwrap().total, 17);
        let memory = m.memory.unwrap();
        assert_eq!(
            (memory.usage, memory.usage_limit, memory.max_usage),
            (4096, u64::MAX, 8192)
        );
        assert_eq!((memory.inactive_file, memory.thp_collapse_alloc), (3, 6));
        assert_eq!((memory.swap_limit, memory.psi), (100, None));
        assert_eq!(m.memory_events.unwrap().oom_kill, 4);
        assert_eq!(
            m.io.unwrap().usage,
            [v2::IoEntry {
                major: 8,
                minor: 0,
                rbytes: 1,
                wbytes: 2,
                rios: 3,
                wios: 4
            }]
        );
        let mut sizes: Vec<_> = m
            .hugetlb
            .iter()
            .map(|h| (&*h.pagesize, h.failcnt))
            .collect();
        // In whatever order the file system has them.
        sizes.sort();
        assert_eq!(sizes, [("1GB", 6), ("64KB", 0)]);
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
        let Seen::Present(cgroup) = Cgroup::of(&roots, pid) else {
            eprintln!("SKIPPED: this test needs cgroups");
            return;
        };
        let any = read(&roots, &cgroup).present().cloned().unwrap();
        let memory = match &cgroup {
            Cgroup::V1(_) => {
                let memory = v1::Metrics::decode(any.value.as_slice()).unwrap().memory;
                memory
                    .and_then(|memory| memory.usage)
                    .map(|entry| (entry.usage, entry.limit))
            }
            Cgroup::V2(_) => {
                let memory = v2::Metrics::decode(any.value.as_slice()).unwrap().memory;
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

//! The counters of cgroup v1.

use std::path::Path;

use recoverd_common::{
    cgroup::{Cgroup, Roots, parse_number, parse_pairs},
    pb::cgroups1 as v1,
};

use super::{page_sizes, rdma, text};

/// The kernel's `USER_HZ`, part of its interface on every architecture that containerd runs on.
const TICKS_PER_SECOND: u64 = 100;
const NANOSECONDS_PER_TICK: u64 = 1_000_000_000 / TICKS_PER_SECOND;

/// A number of v1, where the stock shim says 0 for `max`.
fn number_v1(folder: &Path, file: &str) -> u64 {
    match text(folder, file) {
        Some(text) if text.trim() != "max" => parse_number(&text).unwrap_or(0),
        Some(_) | None => 0,
    }
}

/// The metrics of `cgroup`.
pub(super) fn metrics(roots: &Roots, cgroup: &Cgroup) -> v1::Metrics {
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

#[cfg(test)]
mod tests {
    use std::fs;

    use prost::Message;

    use super::{
        super::{read, tests::write},
        *,
    };

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
}

//! The counters of cgroup v2.

use std::path::Path;

use recoverd_common::{
    cgroup::{Roots, parse_number, parse_pairs},
    pb::cgroups2 as v2,
};

use super::{page_sizes, rdma, text};

/// A number of v2, where `max` is the largest there is; 0 when it cannot be read.
fn number(folder: &Path, file: &str) -> u64 {
    text(folder, file)
        .and_then(|text| parse_number(&text))
        .unwrap_or(0)
}

/// The metrics of the group at `folder`.
pub(super) fn metrics(roots: &Roots, folder: &Path) -> v2::Metrics {
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
    use std::fs;

    use prost::Message;
    use recoverd_common::cgroup::Cgroup;

    use super::{
        super::{read, tests::write},
        *,
    };

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
}

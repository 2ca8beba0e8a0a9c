//! The kernel's own words on an OOM kill, for a cgroup that is gone with its counter: systemd removes
//! a scope the moment it is empty, and may come before anybody has looked.
//!
//! ```text
//! 6,1234,5678901,-;oom-kill:constraint=CONSTRAINT_MEMCG,…,oom_memcg=/a,task_memcg=/a/b,task=x,pid=7,uid=0
//! ```
//!
//! The third number is microseconds of the kernel's own clock (`Documentation/ABI/testing/dev-kmsg`),
//! which nobody corrects, as CLOCK_MONOTONIC_RAW, and which began with it, about. The path is the
//! cgroup's, from the root of the hierarchy: in a cgroup namespace, where paths are others, nothing
//! is found.

use std::{
    fs::{File, OpenOptions},
    io::{self, Read},
    os::unix::fs::OpenOptionsExt,
    path::Path,
};

use nix::{
    fcntl::OFlag,
    time::{ClockId, clock_gettime},
};
use recoverd_common::timestamp::Timestamp;

const LOG: &str = "/dev/kmsg";
/// A record is never longer, bytes (the kernel's `PRINTK_MESSAGE_MAX` and its escapes).
const MAX_RECORD: usize = 8 << 10;
/// The largest log has some 100,000; no more is read of one that grows meanwhile.
const MAX_RECORDS: usize = 200_000;

/// The log's clock and ours do not begin at once, nor in an order, microseconds.
const APART_US: u64 = 1_000_000;
/// Of a process's start time (USER_HZ is 100 on every architecture of ours), microseconds.
const TICK_US: u64 = 10_000;

/// What the clocks show at one moment, microseconds.
#[derive(Debug, Clone, Copy)]
pub struct Clocks {
    /// The log's, about.
    log: u64,
    /// That of the start times of processes.
    boot: u64,
    /// The wall's.
    wall: i128,
}

impl Clocks {
    /// Now.
    pub fn now() -> Self {
        let us = |clock| {
            let time = clock_gettime(clock).map_or(0, |time| {
                time.tv_sec().saturating_mul(1_000_000) + time.tv_nsec() / 1_000
            });
            u64::try_from(time).unwrap_or(0)
        };
        Self {
            log: us(ClockId::CLOCK_MONOTONIC_RAW),
            boot: us(ClockId::CLOCK_BOOTTIME),
            wall: wall_us(Timestamp::now()),
        }
    }

    /// By the log's clock, or a little earlier.
    pub fn log(&self) -> u64 {
        self.log.saturating_sub(APART_US)
    }

    /// When something was written, by the log's clock or a little earlier, but later than the start,
    /// at tick `start` of this boot, of a process: what a container of the same name has died of
    /// before is not its death. The wall's clock may have been set meanwhile: then something older
    /// may be taken for new, back to that start, or something new not be found.
    pub fn since(&self, written_at: Timestamp, start: u64) -> u64 {
        let age = self.wall.saturating_sub(wall_us(written_at));
        let age = u64::try_from(age.max(0)).unwrap_or(u64::MAX);
        let written = self.log().saturating_sub(age);
        let lived = self.boot.saturating_sub(start.saturating_mul(TICK_US));
        let started = self.log.saturating_sub(lived).saturating_add(APART_US);
        written.max(started)
    }
}

fn wall_us(at: Timestamp) -> i128 {
    i128::from(at.seconds) * 1_000_000 + i128::from(at.nanos / 1_000)
}

/// How many OOM kills the kernel tells of in the cgroup at `folder`, or below, since `since_us` of
/// its clock. `root` is where the hierarchy is mounted. 0 where it tells nothing, or not us.
pub fn kills_since(folder: &Path, root: &Path, since_us: u64) -> u64 {
    let flags = (OFlag::O_NONBLOCK | OFlag::O_CLOEXEC).bits();
    let log = OpenOptions::new().read(true).custom_flags(flags).open(LOG);
    log.map_or(0, |log| count(records(log), folder, root, since_us))
}

fn records(mut log: File) -> impl Iterator<Item = String> {
    let mut buffer = vec![0; MAX_RECORD];
    let next = move || loop {
        match log.read(&mut buffer) {
            Ok(0) => return None,
            Ok(length) => {
                let record = buffer.get(..length).unwrap_or_default();
                return Some(String::from_utf8_lossy(record).into_owned());
            }
            // Overwritten before it was read: the next read is of the oldest that is there.
            Err(e) if e.kind() == io::ErrorKind::BrokenPipe => {}
            // All is read (EAGAIN), or it is not for us to read.
            Err(_) => return None,
        }
    };
    std::iter::from_fn(next).take(MAX_RECORDS)
}

fn count(records: impl Iterator<Item = String>, folder: &Path, root: &Path, since_us: u64) -> u64 {
    let told = records.filter(|record| {
        killed_in(record).is_some_and(|(at, cgroup)| {
            let cgroup = root.join(cgroup.trim_start_matches('/'));
            at >= since_us && cgroup.starts_with(folder)
        })
    });
    u64::try_from(told.count()).unwrap_or(u64::MAX)
}

/// Of a record of an OOM kill: when, and in which cgroup.
fn killed_in(record: &str) -> Option<(u64, &str)> {
    let (head, text) = record.split_once(';')?;
    let text = text.strip_prefix("oom-kill:")?;
    let at = head.split(',').nth(2)?.parse().ok()?;
    // The name of the task is the container's own choice, and comes after the path.
    let (_, rest) = text.split_once(",task_memcg=")?;
    let (cgroup, _) = rest.split_once(",task=")?;
    Some((at, cgroup))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_moment_of_the_wall_is_found_on_the_logs_clock_within_the_processs_life() {
        let second = 1_000_000;
        let clocks = Clocks {
            log: 100 * second,
            // The machine has slept for half an hour.
            boot: 1_900 * second,
            wall: 5_000 * 1_000_000,
        };
        let at = |seconds| Timestamp { seconds, nanos: 0 };
        let since = |written, start| clocks.since(at(written), start);
        // Ten seconds ago, and a second for the clocks; of a process that is older.
        assert_eq!(since(4_990, 1_000 * 100), 89 * second);
        assert_eq!(since(4_990, 0), 89 * second);
        // Of one that is younger: not before it.
        assert_eq!(since(4_000, 1_895 * 100), 96 * second);
        // The clock of the wall was set back, or far ahead; the process is of another boot.
        assert_eq!(since(6_000, 1_000 * 100), 99 * second);
        assert_eq!(since(0, 1_880 * 100), 81 * second);
        assert_eq!(since(4_990, u64::MAX), 101 * second);
        assert_eq!(since(i64::MIN, 0), second);
        assert_eq!(since(i64::MAX, 0), 99 * second);
    }

    const RECORD: &str = "6,37,5000,-;oom-kill:constraint=CONSTRAINT_MEMCG,nodemask=(null),\
        cpuset=/,mems_allowed=0,oom_memcg=/pods.slice,task_memcg=/pods.slice/c.scope,task=tail,\
        pid=7,uid=0\n";

    fn kills(records: &[&str], folder: &str, since_us: u64) -> u64 {
        let records = records.iter().map(|record| (*record).to_owned());
        let root = Path::new("/sys/fs/cgroup");
        count(records, &root.join(folder), root, since_us)
    }

    #[test]
    fn kills_in_a_cgroup_and_below_are_counted_since_then() {
        let other = RECORD.replace("c.scope", "cc.scope");
        let below = RECORD.replace("c.scope", "c.scope/inner");
        let records = [RECORD, &other, "6,38,5001,-;Memory cgroup stats\n", &below];
        assert_eq!(kills(&records, "pods.slice/c.scope", 5000), 2);
        assert_eq!(kills(&records, "pods.slice/c.scope", 5001), 0);
        assert_eq!(kills(&records, "c.scope", 0), 0);
    }

    #[test]
    fn nothing_else_is_taken_for_a_kill() {
        for record in [
            "",
            ";",
            "6,37,5000,-",
            "6,37,x,-;oom-kill:,task_memcg=/c,task=x",
            "6,37;oom-kill:,task_memcg=/c,task=x",
            "6,37,5000,-;oom-kill:,task_memcg=/c",
            "6,37,5000,-;oom-kill:task=,task_memcg=/d,task=,task_memcg=/c,task=x",
            // Whoever may write to the log (`/dev/kmsg`) has another facility than the kernel, but
            // must be root; a container's own words come from its name only.
            "6,37,5000,-;x oom-kill:,task_memcg=/c,task=x",
        ] {
            assert_eq!(kills(&[record], "c", 0), 0, "{record:?}");
        }
    }
}

//! What `recoverd supervise` has seen over time: `<run-dir>/witnessed.json`, one object, replaced by
//! rename with each thing seen. It outlives the daemon, so that its restart loses nothing; commands
//! read it whether the daemon runs or not. Every process is named with its start time and the boot,
//! so what stands here is true for good.

use std::{
    fs,
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use recoverd_common::{
    adoption::Observed,
    failpoint,
    read::{MAX_FILE, read_file},
    record::{Process, Stdio},
    seen::Seen,
    timestamp::Timestamp,
};
use serde::{Deserialize, Serialize};

use crate::{facts::TaskName, own_dir};

/// The file below the run folder.
pub const FILE: &str = "witnessed.json";
const FORMAT: u32 = 1;
/// Exits of inits that are remembered, the latest: more than a node has tasks.
const MAX_INITS: usize = 4096;
/// And of execs: probes come every few seconds.
const MAX_EXECS: usize = 512;
/// Ends of shims that are remembered.
const MAX_DEATHS: usize = 512;

/// All of it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Witnessed {
    /// In which boot.
    pub boot_id: String,
    /// Since when somebody has been looking, this time.
    pub since: Option<Timestamp>,
    /// Exits of inits and execs, in order.
    pub exits: Vec<SeenExit>,
    /// Ends of shims, in order.
    pub deaths: Vec<Death>,
    /// What stock shims said of their tasks' stdio.
    pub stdio: Vec<Words>,
}

/// How an init or exec ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SeenExit {
    /// containerd's namespace.
    pub namespace: String,
    /// The container.
    pub id: String,
    /// The exec; empty for the init.
    pub exec_id: String,
    /// Its pid and start time.
    pub process: (u32, u64),
    /// Exit code, or 128 + signal; none when the kernel did not say.
    pub status: Option<u32>,
    /// When it was seen.
    pub at: Timestamp,
}

/// How a shim ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Death {
    /// containerd's namespace.
    pub namespace: String,
    /// The group that it served.
    pub group: String,
    /// Where it listened.
    pub socket: String,
    /// `ours` or `stock`.
    pub kind: String,
    /// Its pid and start time.
    pub process: (u32, u64),
    /// How, in words.
    pub how: String,
    /// What followed: `successor`, `given-up`, `loss`, `nothing`.
    pub follows: String,
    /// The successor, once it serves.
    pub successor: Option<u32>,
    /// When it was seen.
    pub at: Timestamp,
}

/// The stdio of a stock shim's task, as its State said.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Words {
    /// containerd's namespace.
    pub namespace: String,
    /// The container.
    pub id: String,
    /// Its bundle: gone with the task.
    #[serde(default)]
    pub bundle: PathBuf,
    /// Its init's pid and start time.
    pub init: (u32, u64),
    /// A path or URI; empty for none.
    pub stdin: String,
    /// As above.
    pub stdout: String,
    /// As above.
    pub stderr: String,
}

#[derive(Serialize, Deserialize)]
struct File<T> {
    format: u32,
    #[serde(flatten)]
    witnessed: T,
}

#[derive(Deserialize)]
struct Head {
    format: u32,
}

impl Witnessed {
    /// One more exit.
    pub fn exited(&mut self, exit: SeenExit) {
        self.exits.push(exit);
        self.keep_latest(MAX_INITS, |exit| exit.exec_id.is_empty());
        self.keep_latest(MAX_EXECS, |exit| !exit.exec_id.is_empty());
    }

    fn keep_latest(&mut self, most: usize, is_one: impl Fn(&SeenExit) -> bool) {
        let count = self.exits.iter().filter(|exit| is_one(exit)).count();
        let mut surplus = count.saturating_sub(most);
        self.exits.retain(|exit| {
            let goes = surplus > 0 && is_one(exit);
            surplus = surplus.saturating_sub(usize::from(goes));
            !goes
        });
    }

    /// One more end of a shim.
    pub fn died(&mut self, death: Death) {
        self.deaths.push(death);
        let surplus = self.deaths.len().saturating_sub(MAX_DEATHS);
        self.deaths.drain(..surplus);
    }

    /// What a stock shim said; replaces what it said before. False: it said the same.
    pub fn said(&mut self, words: Words) -> bool {
        if self.stdio.contains(&words) {
            return false;
        }
        self.stdio
            .retain(|old| (&old.namespace, &old.id) != (&words.namespace, &words.id));
        self.stdio.push(words);
        true
    }

    /// Forgets what was said of tasks whose bundle is `gone`: a successor needs it until then, also
    /// when the init has ended. False: there are none.
    pub fn forget(&mut self, gone: impl Fn(&Path) -> bool) -> bool {
        let before = self.stdio.len();
        // What an earlier version wrote names none: it stays until it is said anew.
        let named = |words: &Words| !words.bundle.as_os_str().is_empty();
        self.stdio
            .retain(|words| !(named(words) && gone(&words.bundle)));
        self.stdio.len() != before
    }

    /// Every exit whose status is known, for a successor.
    pub fn observed(&self, namespace: &str) -> Vec<Observed> {
        let of_namespace = self.exits.iter().filter(|exit| exit.namespace == namespace);
        of_namespace
            .filter_map(|exit| {
                let (pid, start_time) = exit.process;
                Some(Observed {
                    process: Process { pid, start_time },
                    status: exit.status?,
                    at: exit.at,
                })
            })
            .collect()
    }

    /// How this very process ended.
    pub fn exit_of(&self, process: (u32, u64)) -> Option<&SeenExit> {
        self.exits.iter().rev().find(|exit| exit.process == process)
    }

    /// The stdio of a task, if it has this very init.
    pub fn stdio_of(&self, name: &TaskName, init: (u32, u64)) -> Option<Stdio> {
        let words = self.stdio.iter().find(|words| {
            (&words.namespace, &words.id) == (&name.0, &name.1) && words.init == init
        })?;
        Some(Stdio {
            stdin: words.stdin.clone(),
            stdout: words.stdout.clone(),
            stderr: words.stderr.clone(),
            ..Stdio::default()
        })
    }

    /// The last end of a shim that listened at `socket`, and what followed, in words.
    pub fn death_at(&self, socket: &str) -> Option<String> {
        let mut deaths = self.deaths.iter().rev();
        let death = deaths.find(|death| death.socket == socket)?;
        let follows = match death.successor {
            Some(pid) => format!("successor {pid}"),
            None => death.follows.clone(),
        };
        let (pid, _) = death.process;
        Some(format!(
            "shim {pid} {} at {}: {follows}",
            death.how, death.at
        ))
    }

    /// How a task's processes ended, the latest first, in words.
    pub fn exits_of(&self, name: &TaskName) -> impl Iterator<Item = String> {
        let of_task = self.exits.iter().rev();
        let of_task = of_task.filter(move |exit| (&exit.namespace, &exit.id) == (&name.0, &name.1));
        of_task.map(|exit| {
            let what = match exit.exec_id.as_str() {
                "" => "init".to_owned(),
                exec_id => format!("exec {exec_id}, process"),
            };
            let status = match exit.status {
                Some(status) => format!("with {status}"),
                None => "nobody can say how".to_owned(),
            };
            format!("{what} {} ended {status} at {}", exit.process.0, exit.at)
        })
    }
}

/// Reads the file, if it is of the boot `boot_id`.
pub fn read(run_dir: &Path, boot_id: &str) -> Seen<Witnessed> {
    let bytes = match read_file(&run_dir.join(FILE), MAX_FILE) {
        Seen::Present(bytes) => bytes,
        Seen::Absent => return Seen::Absent,
        Seen::Unknown(why) => return Seen::Unknown(why),
    };
    let read = || -> Result<Witnessed, String> {
        let head: Head = serde_json::from_slice(&bytes).map_err(|e| e.to_string())?;
        if head.format != FORMAT {
            return Err(format!("has format {}, not {FORMAT}", head.format));
        }
        let file: File<Witnessed> = serde_json::from_slice(&bytes).map_err(|e| e.to_string())?;
        Ok(file.witnessed)
    };
    match read() {
        Ok(witnessed) if witnessed.boot_id == boot_id => Seen::Present(witnessed),
        // Pids of another boot mean nothing.
        Ok(_) => Seen::Absent,
        Err(why) => Seen::Unknown(why),
    }
}

/// Replaces the file.
pub fn write(run_dir: &Path, witnessed: &Witnessed) -> io::Result<()> {
    own_dir::open(run_dir)?;
    let spare = run_dir.join(format!("{FILE}.new"));
    match fs::remove_file(&spare) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        Ok(()) | Err(_) => {}
    }
    let mut out = fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&spare)?;
    failpoint!("supervise.witnessed.opened");
    let file = File {
        format: FORMAT,
        witnessed,
    };
    out.write_all(&serde_json::to_vec(&file)?)?;
    drop(out);
    failpoint!("supervise.witnessed.written");
    fs::rename(&spare, run_dir.join(FILE))?;
    failpoint!("supervise.witnessed.after");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exit(pid: u32, status: Option<u32>) -> SeenExit {
        SeenExit {
            namespace: "n".into(),
            id: "a".into(),
            exec_id: String::new(),
            process: (pid, 7),
            status,
            at: Timestamp {
                seconds: 0,
                nanos: 0,
            },
        }
    }

    #[test]
    fn what_was_seen_is_read_back_in_the_same_boot_only() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(read(dir.path(), "b"), Seen::Absent);
        let mut witnessed = Witnessed {
            boot_id: "b".into(),
            ..Witnessed::default()
        };
        witnessed.exited(exit(1, Some(23)));
        witnessed.exited(exit(2, None));
        witnessed.said(Words {
            namespace: "n".into(),
            id: "a".into(),
            bundle: "/b/n/a".into(),
            init: (1, 7),
            stdin: String::new(),
            stdout: "/f/out".into(),
            stderr: String::new(),
        });
        write(dir.path(), &witnessed).unwrap();
        write(dir.path(), &witnessed).unwrap();
        assert_eq!(read(dir.path(), "b"), Seen::Present(witnessed.clone()));
        assert_eq!(read(dir.path(), "c"), Seen::Absent);
        let observed = witnessed.observed("n");
        assert_eq!((observed.len(), observed[0].status), (1, 23));
        assert!(witnessed.observed("m").is_empty());
        let name = ("n".to_owned(), "a".to_owned());
        let stdio = witnessed.stdio_of(&name, (1, 7)).unwrap();
        assert_eq!(stdio.stdout, "/f/out");
        assert_eq!(witnessed.stdio_of(&name, (1, 8)), None);
        assert_eq!(witnessed.exit_of((1, 7)).unwrap().status, Some(23));
        assert_eq!(witnessed.exit_of((1, 8)), None);
        let exits: Vec<String> = witnessed.exits_of(&name).collect();
        assert_eq!(exits[1], "init 1 ended with 23 at 1970-01-01T00:00:00Z");
        assert!(exits[0].starts_with("init 2 ended nobody can say how at "));
        for bad in ["", "{}", r#"{"format":2}"#, r#"{"format":1}"#] {
            fs::write(dir.path().join(FILE), bad).unwrap();
            assert!(matches!(read(dir.path(), "b"), Seen::Unknown(_)), "{bad}");
        }
    }

    #[test]
    fn the_latest_are_remembered() {
        let mut witnessed = Witnessed::default();
        for pid in 0..5000 {
            witnessed.exited(exit(pid, Some(0)));
        }
        assert_eq!(witnessed.exits.len(), MAX_INITS);
        assert_eq!(witnessed.exits.last().unwrap().process.0, 4999);
    }

    #[test]
    fn probes_push_out_no_exit_of_an_init() {
        let mut witnessed = Witnessed::default();
        witnessed.exited(exit(1, Some(23)));
        for pid in 2..5002 {
            witnessed.exited(SeenExit {
                exec_id: "probe".into(),
                ..exit(pid, Some(0))
            });
        }
        assert_eq!(witnessed.exits.len(), 1 + MAX_EXECS);
        assert_eq!(witnessed.exit_of((1, 7)).unwrap().status, Some(23));
        assert_eq!(witnessed.exit_of((5001, 7)).unwrap().status, Some(0));
        assert_eq!(witnessed.exit_of((2, 7)), None, "the oldest go first");
    }

    #[test]
    fn what_was_said_of_a_task_is_forgotten_with_its_bundle() {
        let words = |id: &str, pid| Words {
            namespace: "n".into(),
            id: id.into(),
            bundle: Path::new("/b/n").join(id),
            init: (pid, 7),
            stdin: String::new(),
            stdout: String::new(),
            stderr: String::new(),
        };
        let mut witnessed = Witnessed::default();
        assert!(witnessed.said(words("a", 1)) && witnessed.said(words("b", 2)));
        assert!(!witnessed.said(words("a", 1)));
        assert!(witnessed.said(words("a", 3)), "another task by this name");
        assert!(!witnessed.forget(|_| false));
        assert!(witnessed.forget(|bundle| bundle == Path::new("/b/n/a")));
        assert_eq!(witnessed.stdio, [words("b", 2)]);
    }
}

//! The files that an exec has in its task's bundle. Names only, and one reader: who lost the record
//! of an exec finds it by these.
//!
//! The stock shim lets runc write `<id>.pid`; an exec called `init` takes the init's file with it. Ours
//! lets it write `exec-<id>.pid`, and keeps the exec's process in `<id>.process.json` for as long as it
//! knows the exec. An adopted bundle may hold both forms, and a stock exec may be called `exec-a`, so
//! no kind of shim tells what a name means: the other file does.

use std::{
    fs,
    path::{Path, PathBuf},
    time::SystemTime,
};

use crate::{ids::Id, read::read_text};

/// Before the id of our shim's execs.
const OURS: &str = "exec-";
const PID: &str = ".pid";
/// Longest pid file that is read, bytes.
const MAX_PID_FILE: u64 = 64;

/// An exec by its pid file.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct PidFile {
    /// The exec's id.
    pub id: Id,
    /// The pid in it, above 0.
    pub pid: i32,
    /// When it was written.
    pub written_at: Option<SystemTime>,
}

/// Where our shim has runc write the pid of the exec `id`.
pub fn pid_file(bundle: &Path, id: &str) -> PathBuf {
    bundle.join(format!("{OURS}{id}{PID}"))
}

/// Where our shim keeps the OCI process of the exec `id`.
pub fn process_file(bundle: &Path, id: &str) -> PathBuf {
    bundle.join(format!("{id}.process.json"))
}

/// The execs of which a pid file tells, of either shim; sorted.
pub fn pid_files(bundle: &Path) -> Vec<PidFile> {
    let Ok(entries) = fs::read_dir(bundle) else {
        return Vec::new();
    };
    let mut found: Vec<PidFile> = entries
        .flatten()
        .filter_map(|entry| {
            let id = exec_of(bundle, entry.file_name().to_str()?)?;
            let text = read_text(&entry.path(), MAX_PID_FILE);
            let pid = text.present()?.trim().parse().ok().filter(|pid| *pid > 0)?;
            let written_at = entry.metadata().and_then(|meta| meta.modified()).ok();
            Some(PidFile {
                id,
                pid,
                written_at,
            })
        })
        .collect();
    found.sort();
    found
}

/// Whose pid file `name` is; nothing for the init's and for what is none.
fn exec_of(bundle: &Path, name: &str) -> Option<Id> {
    let stem = name.strip_suffix(PID)?;
    if stem == "init" {
        return None;
    }
    let kept = |id: &Id| {
        let path = process_file(bundle, id.as_str());
        fs::symlink_metadata(path).is_ok_and(|meta| meta.is_file())
    };
    let ours = stem.strip_prefix(OURS).and_then(|id| Id::new(id).ok());
    ours.filter(kept).or_else(|| Id::new(stem).ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn execs_of_either_shim_are_found_under_their_own_names() {
        let dir = tempfile::tempdir().unwrap();
        let bundle = dir.path();
        let write = |name: &str, text: &str| fs::write(bundle.join(name), text).unwrap();
        write("init.pid", "1");
        // Ours: one that is called as the init is, and one whose name begins as our files' do.
        for (id, pid) in [("session", "2"), ("init", "3"), ("exec-a", "4")] {
            fs::write(pid_file(bundle, id), pid).unwrap();
            fs::write(process_file(bundle, id), "{}").unwrap();
        }
        // The stock shim's, of an adopted bundle.
        write("stock.pid", "5\n");
        write("exec-b.pid", "6");
        // What names nobody.
        for (name, text) in [
            ("exec-c.pid", "0"),
            ("d.pid", "what"),
            ("..pid", "7"),
            ("e.log", "8"),
        ] {
            write(name, text);
        }
        let huge = fs::File::create(bundle.join("f.pid")).unwrap();
        huge.set_len(1 << 30).unwrap();
        std::os::unix::fs::symlink("init.pid", bundle.join("g.pid")).unwrap();

        let found = pid_files(bundle);
        assert!(found.iter().all(|file| file.written_at.is_some()));
        let found: Vec<(&str, i32)> = found.iter().map(|f| (f.id.as_str(), f.pid)).collect();
        let wanted = [
            ("exec-a", 4),
            ("exec-b", 6),
            ("init", 3),
            ("session", 2),
            ("stock", 5),
        ];
        assert_eq!(found, wanted);
        assert_eq!(pid_files(&bundle.join("none")), []);
    }
}

//! Programs of a newer Debian, which `tests/setup` unpacks beside the machine's own.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::PathBuf;

use crate::node::Node;
use crate::releases::{Release, cache};

/// The path of a program, or why it cannot be had.
pub(crate) fn find(program: &str) -> Result<PathBuf, String> {
    let why = cache().join(format!("newer-{program}.unavailable"));
    if let Ok(why) = fs::read_to_string(why) {
        return Err(why.trim().to_owned());
    }
    let path = cache().join("newer/bin").join(program);
    match path.exists() {
        true => Ok(path),
        false => Err(format!("{} is not there: run tests/setup", path.display())),
    }
}

/// A unit that the package of one of these programs brings.
pub(crate) fn unit(name: &str) -> PathBuf {
    cache().join("newer/usr/lib/systemd/system").join(name)
}

/// The newest release of containerd, for a test that needs this program of a newer Debian; why there
/// is none.
pub fn newest_with(program: &str) -> Result<Release, String> {
    find(program)?;
    let newest = Release::available().pop();
    newest.ok_or_else(|| "no release of containerd is there: run tests/setup".to_owned())
}

impl Node {
    /// A folder with these programs of a newer Debian, for the front of a PATH.
    #[track_caller]
    pub fn newer(&self, programs: &[&str]) -> PathBuf {
        let folder = self.folder().join("newer");
        fs::create_dir_all(&folder).unwrap_or_else(|e| panic!("make {}: {e}", folder.display()));
        for program in programs {
            let path = find(program).unwrap_or_else(|why| panic!("{program}: {why}"));
            let link = folder.join(program);
            symlink(&path, &link).unwrap_or_else(|e| panic!("make {}: {e}", link.display()));
        }
        folder
    }
}

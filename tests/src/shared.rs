//! What a test and its containers share: a folder, the fifo of a process's stdout, and words that
//! tell processes apart.

use std::fs;
use std::path::PathBuf;

use crate::container::Container;
use crate::node::Node;
use crate::process::Process;
use crate::wait::wait_for;

impl Container {
    /// With the node's folder at `/mnt`.
    pub fn shares(self, node: &Node) -> Container {
        let folder = node.folder().display();
        self.option(&[
            "--mount",
            &format!("type=bind,src={folder},dst=/mnt,options=rbind:rw"),
        ])
    }
}

impl Node {
    /// The fifo that `ctr` made for a process's stdout, as this test reaches it.
    #[track_caller]
    pub fn stdout_of(&self, process: &str) -> PathBuf {
        let found = self.shell(&format!("ls -d /run/containerd/fifo/*/{process}-stdout"));
        self.path(found.trim())
    }

    /// Makes the file that containers wait for at `/mnt/NAME` (see [`Container::shares`]).
    pub fn tell(&self, name: &str) {
        let path = self.folder().join(name);
        fs::write(&path, "").unwrap_or_else(|error| panic!("write {}: {error}", path.display()));
    }

    /// What a writer of [`crate::numbers`] said in the end.
    #[track_caller]
    pub fn count_in(&self, name: &str) -> u64 {
        wait_for("a writer's count", || {
            let text = fs::read_to_string(self.folder().join(name)).ok()?;
            text.strip_suffix('\n')?.parse().ok()
        })
    }

    /// The folder of a process's cgroup (v1) of that controller, as the node names it.
    #[track_caller]
    pub fn cgroup(&self, pid: u32, controller: &str) -> PathBuf {
        let folder = self.shell(&format!(
            "of=',{controller},'
             mount=$(awk -v of=$of '$3 == \"cgroup\" && index(\",\" $4 \",\", of) {{ print $2; exit }}' /proc/mounts)
             path=$(awk -F: -v of=$of 'index(\",\" $2 \",\", of) {{ print $3; exit }}' /proc/{pid}/cgroup)
             echo $mount$path"
        ));
        folder.trim().into()
    }

    /// The shell in the node with this word among its arguments.
    #[track_caller]
    pub fn shell_with(&self, word: &str) -> Process {
        wait_for("a process in the container", || {
            let all = self.processes().into_iter();
            all.filter(|process| process.program() == "sh")
                .find(|process| process.argv.iter().any(|w| w == word))
        })
    }
}

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

    /// The first number in a file of a process's cgroup: that of a controller on cgroup v1, or
    /// the one that cgroup v2 has for it.
    #[track_caller]
    pub fn cgroup_number(&self, pid: u32, v1: (&str, &str), v2: &str) -> u64 {
        let (controller, file) = v1;
        let text = self.shell(&format!(
            "of=',{controller},'
             mount=$(awk -v of=$of '$3 == \"cgroup\" && index(\",\" $4 \",\", of) {{ print $2; exit }}' /proc/mounts)
             path=$(awk -F: -v of=$of 'index(\",\" $2 \",\", of) {{ print $3; exit }}' /proc/{pid}/cgroup)
             if [ \"$mount\" ]; then exec cat \"$mount$path/{file}\"; fi
             path=$(awk -F: '$1 == 0 {{ print $3 }}' /proc/{pid}/cgroup)
             exec cat \"/sys/fs/cgroup$path/{v2}\""
        ));
        let number = text.split_whitespace().find_map(|word| word.parse().ok());
        number.unwrap_or_else(|| panic!("no number in {file} or {v2} of {pid}: {text:?}"))
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

//! A runc that stops in front of a verb for as long as a test wants: what goes wrong then goes wrong
//! in the middle of a request, however fast the machine is.

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;

use crate::containerd::Containerd;
use crate::node::Node;
use crate::wait::wait_for;

/// The runc that a containerd, and its shims, find first.
pub struct HeldRunc {
    node: Arc<Node>,
}

impl HeldRunc {
    /// Restarts `containerd` with it.
    #[track_caller]
    pub fn of(containerd: &mut Containerd) -> HeldRunc {
        let node = Arc::clone(containerd.node());
        let folder = node.folder().join("held");
        let path = folder.join("runc");
        let shared = node.folder().display();
        let runc = node.shell("command -v runc");
        let script = format!(
            "#!/bin/sh\nfor word in \"$@\"; do case $word in create|start|exec|kill|delete|update) \
             verb=${{verb:-$word}};; esac; done\necho \"$verb\" >>{shared}/calls\n\
             while [ -e {shared}/hold-$verb ]; do sleep 0.02; done\nexec {} \"$@\"\n",
            runc.trim()
        );
        let written = fs::create_dir(&folder).and_then(|()| fs::write(&path, script));
        written.unwrap_or_else(|e| panic!("write {}: {e}", path.display()));
        node.run("chmod", ["0755", &path.display().to_string()]);
        containerd.kill();
        containerd.programs_from(folder);
        containerd.start();
        HeldRunc { node }
    }

    fn hold_file(&self, verb: &str) -> PathBuf {
        self.node.folder().join(format!("hold-{verb}"))
    }

    /// Does what makes somebody call `runc VERB`, which stops there; gives what that gave.
    #[track_caller]
    pub fn held<T>(&self, verb: &str, begin: impl FnOnce() -> T) -> T {
        let before = self.calls(verb);
        self.node.tell(&format!("hold-{verb}"));
        let begun = begin();
        wait_for(&format!("runc {verb}"), || {
            (self.calls(verb) > before).then_some(())
        });
        begun
    }

    /// Whoever stopped there goes on.
    #[track_caller]
    pub fn go_on(&self, verb: &str) {
        fs::remove_file(self.hold_file(verb)).unwrap_or_else(|e| panic!("go on: {e}"));
    }

    /// How often this verb was called.
    pub fn calls(&self, verb: &str) -> usize {
        let text = fs::read_to_string(self.node.folder().join("calls")).unwrap_or_default();
        text.lines().filter(|line| *line == verb).count()
    }
}

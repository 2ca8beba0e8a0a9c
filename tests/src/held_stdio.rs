//! A terminal and a standard input that their client holds: what dies first when a shim does.

use std::sync::Arc;

use serde_json::json;

use crate::api::oci_spec;
use crate::container::{Container, Task};
use crate::containerd::Containerd;
use crate::fifo::{Fifos, Input, Output};
use crate::node::Node;
use crate::releases::ShimUnderTest;

/// A shell with a terminal and a `cat`, and a client's ends of both.
pub struct HeldStdio {
    node: Arc<Node>,
    /// The shell.
    pub shell: Task,
    /// The reader of a standard input.
    pub cat: Task,
    shell_fifos: Fifos,
    cat_fifos: Fifos,
    screen: Output,
    copy: Output,
    _errors: Output,
    keys: Input,
    lines: Input,
}

impl HeldStdio {
    /// Runs both; they have answered once when this returns.
    #[track_caller]
    pub fn run(containerd: &Containerd, shim: ShimUnderTest) -> HeldStdio {
        let node = containerd.node();
        let api = containerd.api("e2e");
        let shell_fifos = Fifos::of_client(node, "shell", true);
        let cat_fifos = Fifos::of_client(node, "cat", false);
        let (screen, copy) = (output(node, &shell_fifos), output(node, &cat_fifos));
        let errors = Output::of(&node.path(&cat_fifos.stdio.stderr));
        let mut spec = oci_spec("shell", &["sh"]);
        spec["process"]["terminal"] = json!(true);
        api.run("shell", &spec, shim, &shell_fifos.stdio);
        api.run("cat", &oci_spec("cat", &["cat"]), shim, &cat_fifos.stdio);
        let mut keys = Input::of(&node.path(&shell_fifos.stdio.stdin));
        let mut lines = Input::of(&node.path(&cat_fifos.stdio.stdin));
        keys.write("echo before=$((1+1))\n");
        screen.wait_text("before=2");
        lines.write("before\n");
        copy.wait_text("before\n");
        HeldStdio {
            node: Arc::clone(node),
            shell: containerd.task_of(&Container::new("shell").shim(shim)),
            cat: containerd.task_of(&Container::new("cat").shim(shim)),
            shell_fifos,
            cat_fifos,
            screen,
            copy,
            _errors: errors,
            keys,
            lines,
        }
    }

    /// What is typed and written goes on and comes back, and both end as they should.
    #[track_caller]
    pub fn assert_goes_on(self, containerd: &Containerd) {
        let (mut keys, mut lines) = (self.keys, self.lines);
        // A client whose daemon was away opens its fifos again.
        let again = |old: Output, fifos: &Fifos| match old.has_ended() {
            true => output(&self.node, fifos),
            false => old,
        };
        let screen = again(self.screen, &self.shell_fifos);
        let copy = again(self.copy, &self.cat_fifos);
        keys.write("echo after=$((2+2)); tty\n");
        screen.wait_text("after=4");
        screen.wait_text("/dev/pts/0");
        lines.write("after\n");
        copy.wait_text("after\n");
        let api = containerd.api("e2e");
        // The end of its standard input is told, too: its client closes, and says so.
        drop(lines);
        api.close_stdin("cat", "")
            .unwrap_or_else(|refused| panic!("{refused:?}"));
        assert_eq!(api.status("cat", ""), 0);
        keys.write("exit 9\n");
        assert_eq!(api.status("shell", ""), 9);
        for (id, status) in [("cat", 0), ("shell", 9)] {
            let ended = api.delete(id, "");
            assert_eq!(ended.map(|ended| ended.status), Ok(status), "{id}");
        }
    }
}

fn output(node: &Node, fifos: &Fifos) -> Output {
    Output::of(&node.path(&fifos.stdio.stdout))
}

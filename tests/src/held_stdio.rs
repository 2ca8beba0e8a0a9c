//! A terminal and a standard input that their client holds: what dies first when a shim does.

use std::sync::Arc;

use serde_json::json;

use crate::api::oci_spec;
use crate::container::{Container, Task};
use crate::containerd::Containerd;
use crate::fifo::{Fifos, Input, Output};
use crate::node::Node;
use crate::releases::ShimUnderTest;

/// A shell with a terminal, and its client's ends of that.
pub struct HeldTerminal {
    node: Arc<Node>,
    /// The shell.
    pub shell: Task,
    fifos: Fifos,
    screen: Output,
    keys: Input,
}

impl HeldTerminal {
    /// Runs it; it has answered once when this returns.
    #[track_caller]
    pub fn run(containerd: &Containerd, shim: ShimUnderTest) -> HeldTerminal {
        let node = containerd.node();
        let fifos = Fifos::of_client(node, "shell", true);
        let screen = output(node, &fifos);
        let mut spec = oci_spec("shell", &["sh"]);
        spec["process"]["terminal"] = json!(true);
        containerd
            .api("e2e")
            .run("shell", &spec, shim, &fifos.stdio);
        let mut keys = Input::of(&node.path(&fifos.stdio.stdin));
        keys.write("echo before=$((1+1))\n");
        screen.wait_text("before=2");
        HeldTerminal {
            node: Arc::clone(node),
            shell: containerd.task_of(&Container::new("shell").shim(shim)),
            fifos,
            screen,
            keys,
        }
    }

    /// What is typed goes on and is answered, and the shell ends as it should.
    #[track_caller]
    pub fn assert_goes_on(self, containerd: &Containerd) {
        let mut keys = self.keys;
        let screen = again(&self.node, self.screen, &self.fifos);
        keys.write("echo after=$((2+2)); tty\n");
        screen.wait_text("after=4");
        screen.wait_text("/dev/pts/0");
        keys.write("exit 9\n");
        assert_ends(containerd, "shell", 9);
    }
}

/// The same, and beside it a `cat` with its client's ends of that.
pub struct HeldStdio {
    /// The shell's.
    pub terminal: HeldTerminal,
    /// The reader of a standard input.
    pub cat: Task,
    fifos: Fifos,
    copy: Output,
    _errors: Output,
    lines: Input,
}

impl HeldStdio {
    /// Runs both; they have answered once when this returns.
    #[track_caller]
    pub fn run(containerd: &Containerd, shim: ShimUnderTest) -> HeldStdio {
        let node = containerd.node();
        let terminal = HeldTerminal::run(containerd, shim);
        let fifos = Fifos::of_client(node, "cat", false);
        let copy = output(node, &fifos);
        let errors = Output::of(&node.path(&fifos.stdio.stderr));
        let api = containerd.api("e2e");
        api.run("cat", &oci_spec("cat", &["cat"]), shim, &fifos.stdio);
        let mut lines = Input::of(&node.path(&fifos.stdio.stdin));
        lines.write("before\n");
        copy.wait_text("before\n");
        HeldStdio {
            terminal,
            cat: containerd.task_of(&Container::new("cat").shim(shim)),
            fifos,
            copy,
            _errors: errors,
            lines,
        }
    }

    /// The tasks of both.
    pub fn tasks(&self) -> [&Task; 2] {
        [&self.terminal.shell, &self.cat]
    }

    /// What is typed and written goes on and comes back, and both end as they should.
    #[track_caller]
    pub fn assert_goes_on(self, containerd: &Containerd) {
        let mut lines = self.lines;
        let copy = again(containerd.node(), self.copy, &self.fifos);
        lines.write("after\n");
        copy.wait_text("after\n");
        // The end of its standard input is told, too: its client closes, and says so.
        drop(lines);
        let told = containerd.api("e2e").close_stdin("cat", "");
        told.unwrap_or_else(|refused| panic!("{refused:?}"));
        assert_ends(containerd, "cat", 0);
        self.terminal.assert_goes_on(containerd);
    }
}

#[track_caller]
fn assert_ends(containerd: &Containerd, id: &str, status: u32) {
    let api = containerd.api("e2e");
    assert_eq!(api.status(id, ""), status);
    let ended = api.delete(id, "");
    assert_eq!(ended.map(|ended| ended.status), Ok(status), "{id}");
}

/// A client whose daemon was away opens its fifos again.
fn again(node: &Node, old: Output, fifos: &Fifos) -> Output {
    match old.has_ended() {
        true => output(node, fifos),
        false => old,
    }
}

fn output(node: &Node, fifos: &Fifos) -> Output {
    Output::of(&node.path(&fifos.stdio.stdout))
}

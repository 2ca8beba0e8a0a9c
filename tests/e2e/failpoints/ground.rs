//! A node with one containerd, on which one scenario after the other is played, each for one
//! point; every one leaves it as it was.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;

use recoverd_tests::{
    Api, Armed, Containerd, EventRelay, Failpoints, Node, Release, Running, ServiceManager, Traces,
    metric, record_at, wait_for,
};

/// The containerd namespace of everything here.
pub const NAMESPACE: &str = "e2e";

/// How long a successor takes is not what is proven here.
const PATIENT: &str = "[adopt]\ndeadline = \"60s\"\n";

pub struct Ground {
    pub node: Arc<Node>,
    pub containerd: Containerd,
    pub built: Failpoints,
    /// Between shims and containerd's event service.
    pub events: EventRelay,
    /// The shim of most containers here.
    pub shim: PathBuf,
    api: Option<Api>,
    /// containerd has a point in its environment.
    armed: bool,
    before: Traces,
    round: u32,
}

impl Ground {
    #[track_caller]
    pub fn new(release: &Release, built: &Failpoints) -> Ground {
        Ground::with(release, built, &[])
    }

    /// The same with programs of a newer Debian.
    #[track_caller]
    pub fn with(release: &Release, built: &Failpoints, programs: &[&str]) -> Ground {
        let node = Node::start();
        let containerd = node.containerd_with(release, programs);
        // Everything counts as old, and nothing as in transition.
        let config = config(&node);
        fs::write(
            config,
            format!("[scan]\nsettle = \"0s\"\n[pre-start]\ndeadline = \"120s\"\n{PATIENT}"),
        )
        .unwrap_or_else(|error| panic!("write configuration: {error}"));
        let events = EventRelay::of(&containerd);
        let before = Traces::of(&node);
        Ground {
            shim: events.shim(&node, "relayed", &built.shim()),
            events,
            node,
            containerd,
            built: built.clone(),
            api: None,
            armed: false,
            before,
            round: 0,
        }
    }

    /// A word that no other round's names begin with.
    pub fn round(&mut self) -> String {
        self.round += 1;
        format!("r{}", self.round)
    }

    /// A client of containerd as it runs now.
    #[track_caller]
    pub fn api(&mut self) -> &Api {
        self.api
            .get_or_insert_with(|| self.containerd.api(NAMESPACE))
    }

    /// SIGKILLs containerd.
    #[track_caller]
    pub fn kill(&mut self) {
        self.api = None;
        self.containerd.kill();
    }

    /// SIGKILLs containerd and then the shim of the record beside `socket`, while `call` is under
    /// way and has come to where this file is made.
    #[track_caller]
    pub fn kill_during(&mut self, call: impl FnOnce(&Api) + Send, reached: &Path, socket: &Path) {
        self.api();
        let Some(api) = self.api.take() else {
            unreachable!("there is a client")
        };
        std::thread::scope(|scope| {
            scope.spawn(|| call(&api));
            wait_for("the runtime to come to its wait", || {
                reached.exists().then_some(())
            });
            self.containerd.kill();
            let shim = record_at(&self.node, socket).shim.process.pid;
            let shim = self.node.process(shim);
            let shim = shim.unwrap_or_else(|| panic!("the record's shim is not there"));
            self.node.kill(&shim);
        });
    }

    /// containerd was killed together with who died.
    #[track_caller]
    pub fn wait_ended(&mut self) {
        self.api = None;
        self.containerd.gone();
    }

    /// Starts containerd; who it starts may die at `armed`.
    #[track_caller]
    pub fn start(&mut self, armed: Option<&Armed>) {
        let environment = armed.map(Armed::environment).unwrap_or_default();
        self.containerd.environment(environment);
        self.armed = armed.is_some();
        self.containerd.start();
    }

    /// Nobody whom containerd starts from now on is armed.
    #[track_caller]
    pub fn disarm(&mut self) {
        if self.armed {
            self.kill();
            self.start(None);
        }
    }

    fn command(&self, args: &[&str], armed: Option<&Armed>) -> Command {
        let config = config(&self.node).display().to_string();
        let mut command = self
            .node
            .command(self.built.recoverd(), ["--config", &config]);
        command.args(self.containerd.flags()).args(args);
        command.envs(armed.map(Armed::environment).unwrap_or_default());
        command
    }

    /// Runs `recoverd` to its end; it, or who it starts, may die at `armed`.
    #[track_caller]
    pub fn recoverd(&self, args: &[&str], armed: Option<&Armed>) -> Output {
        let mut command = self.command(args, armed);
        command
            .output()
            .unwrap_or_else(|error| panic!("start {command:?}: {error}"))
    }

    /// `recoverd supervise` as its unit has it; it, or who it starts, may die at `armed`. It serves.
    #[track_caller]
    pub fn supervise(&mut self, armed: Option<&Armed>) -> ServiceManager {
        let metrics = self.node.folder().join("recoverd.prom");
        let config = self.node.folder().join("supervise.toml");
        let text = format!(
            "[supervise]\ntextfile = {:?}\n{PATIENT}",
            metrics.display().to_string()
        );
        fs::write(&config, text).unwrap_or_else(|error| panic!("write configuration: {error}"));
        let mut words = vec!["--config".to_owned(), config.display().to_string()];
        words.extend(self.containerd.flags());
        words.push("supervise".into());
        let program = self.built.recoverd();
        let environment = armed.map(Armed::environment).unwrap_or_default();
        let name = self.round();
        let service = ServiceManager::start(&self.node, &name, move || {
            let mut command = Command::new(&program);
            command.args(&words).envs(environment.clone());
            command
        });
        self.wait_watching(0);
        service
    }

    /// Waits until a supervisor serves that watches so many shims and keeps their connections.
    #[track_caller]
    pub fn wait_watching(&self, shims: usize) {
        wait_for("a supervisor that watches", || {
            let number = |name: &str| metric(&self.node, name);
            let watched = number("recoverd_supervised_shims{kind=\"ours\"}")?;
            let kept = |what| number(&format!("recoverd_kept_descriptors{{what=\"{what}\"}}"));
            let (listeners, connections) = (kept("listener")?, kept("connection")?);
            #[expect(clippy::cast_precision_loss, reason = "a few shims")]
            let shims = shims as f64;
            (watched == shims && listeners == shims && connections >= shims).then_some(())
        });
    }

    /// Starts `recoverd`.
    #[track_caller]
    pub fn spawn_recoverd(&self, args: &[&str]) -> Running {
        self.node.spawn_command(self.command(args, None))
    }

    /// `recoverd repair` with every word, again and again until nothing is left to do.
    #[track_caller]
    pub fn repair(&self) {
        const ROUNDS: usize = 4;
        let all = [
            "repair",
            "--apply",
            "--allow",
            "kill",
            "--allow",
            "delete",
            "--min-age",
            "0s",
        ];
        let mut last = None;
        for _ in 0..ROUNDS {
            let output = self.recoverd(&all, None);
            if output.status.code() == Some(0) {
                return;
            }
            last = Some(output);
        }
        panic!("repair is not done after {ROUNDS} runs: {last:?}");
    }

    /// Fails unless the node is as it was.
    #[track_caller]
    pub fn assert_restored(&self) {
        self.before.wait_restored(&self.node);
    }
}

fn config(node: &Node) -> std::path::PathBuf {
    node.folder().join("any-age.toml")
}

//! Docker in a node: Debian's newest dockerd, beside a containerd of its own or of the node's.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Output};
use std::sync::Arc;
use std::time::Duration;

use crate::containerd::Containerd;
use crate::newer;
use crate::node::{Node, Running};
use crate::process::Process;
use crate::releases::{Release, built, image_archive};
use crate::systemd_box::SystemdBox;
use crate::wait::{wait_for, wait_within};

impl SystemdBox {
    /// Installs Docker as Debian's packages have it, with their units; starts nothing. That a box
    /// has no firewall and no overlay is told to dockerd on its command line, in Debian's own file
    /// for that: `/etc/docker/daemon.json` is the operator's.
    #[track_caller]
    pub fn install_docker(&self) {
        for (program, place) in [("dockerd", "/usr/sbin"), ("docker", "/usr/bin")] {
            let from = newer::find(program).unwrap_or_else(|why| panic!("{program}: {why}"));
            self.put(from, format!("{place}/{program}"));
        }
        for unit in ["docker.service", "docker.socket"] {
            let from = newer::unit(unit);
            self.put(from, format!("/etc/systemd/system/{unit}"));
        }
        let options = "--iptables=false --ip6tables=false --bridge=none --storage-driver=vfs \
                       --userland-proxy=false";
        self.write(
            "/etc/default/docker",
            &format!("DOCKER_OPTS=\"{options}\"\n"),
        );
        self.shell("groupadd --force docker; systemctl daemon-reload");
    }

    /// Makes the image `hello-world`, which says hello, by a dockerd that runs.
    #[track_caller]
    pub fn docker_image(&self) {
        self.shell(
            "tar --create --directory /usr/share/box/rootfs . |
             docker import --change 'CMD [\"/bin/echo\", \"Hello from Docker!\"]' - hello-world",
        );
    }
}

/// A dockerd that leaves the node's network alone. Dropping it does not stop it; the node's end does.
pub struct Docker {
    node: Arc<Node>,
    release: Release,
    /// Its containerd's address; none when it starts one itself.
    containerd: Option<PathBuf>,
    config: PathBuf,
    log: PathBuf,
    running: Option<Running>,
}

/// As `docker inspect` shows them.
const HOST: &str = "unix:///run/docker.sock";

impl Docker {
    /// On a containerd of the node, started.
    #[track_caller]
    pub fn on(containerd: &Containerd) -> Docker {
        let address = containerd.address().to_owned();
        Docker::new(containerd.node(), containerd.release(), Some(address))
    }

    /// With a containerd of that release that it starts itself, started.
    #[track_caller]
    pub fn alone(node: &Arc<Node>, release: &Release) -> Docker {
        Docker::new(node, release, None)
    }

    #[track_caller]
    fn new(node: &Arc<Node>, release: &Release, containerd: Option<PathBuf>) -> Docker {
        let config = node.folder().join("daemon.json");
        let shim = built("containerd-shim-recoverd-v1");
        // Of these, `runtimes` and `live-restore` are what the README tells operators to write.
        let text = serde_json::json!({
            "runtimes": {
                "recoverd": {"runtimeType": "io.containerd.recoverd.v1"},
                "by-path": {"runtimeType": shim},
            },
            "live-restore": true,
            "hosts": [HOST],
            "iptables": false,
            "ip6tables": false,
            "bridge": "none",
            "userland-proxy": false,
            "storage-driver": "vfs",
        });
        fs::write(&config, text.to_string())
            .unwrap_or_else(|e| panic!("write {}: {e}", config.display()));
        let mut docker = Docker {
            log: node.folder().join("dockerd.log"),
            node: Arc::clone(node),
            release: release.clone(),
            containerd,
            config,
            running: None,
        };
        docker.start();
        docker.ok(&[
            "load",
            "--input",
            &image_archive("busybox").display().to_string(),
        ]);
        docker
    }

    /// Starts it and returns when it answers.
    #[track_caller]
    pub fn start(&mut self) {
        assert!(self.running.is_none(), "dockerd runs already");
        let ours = built("").display().to_string();
        let programs = self.release.folder.display();
        let path = format!("PATH={programs}:/usr/sbin:/usr/bin:/sbin:/bin:{ours}");
        let dockerd = newer::find("dockerd").unwrap_or_else(|why| panic!("dockerd: {why}"));
        let line = "log=$1; shift; exec \"$@\" >>\"$log\" 2>&1";
        let mut command = self
            .node
            .command("env", [path.as_str(), "sh", "-c", line, "sh"]);
        command.arg(&self.log).arg(dockerd);
        command.arg("--config-file").arg(&self.config);
        command.args(["--pidfile", "/run/docker.pid"]);
        if let Some(address) = &self.containerd {
            command.arg("--containerd").arg(address);
        }
        let mut running = self.node.spawn_command(command);
        running.process = wait_for("dockerd's process", || {
            let now = self.node.process(running.process.pid)?;
            (now.program() == "dockerd").then_some(now)
        });
        self.running = Some(running);
        wait_within(Duration::from_secs(120), "dockerd to answer", || {
            let running = self.running.as_mut()?;
            let log = fs::read_to_string(&self.log).unwrap_or_default();
            assert!(running.is_running(), "dockerd ended at its start:\n{log}");
            self.output(&["version"]).status.success().then_some(())
        });
    }

    /// SIGKILLs it.
    #[track_caller]
    pub fn kill(&mut self) {
        self.end("KILL");
    }

    /// Stops it as an operator would, with SIGTERM.
    #[track_caller]
    pub fn stop(&mut self) {
        self.end("TERM");
    }

    #[track_caller]
    fn end(&mut self, signal: &str) {
        let Some(mut running) = self.running.take() else {
            panic!("dockerd does not run")
        };
        self.node.signal(&running.process, signal);
        running.wait();
        self.node.wait_gone(&running.process);
    }

    /// A `docker` command in the node.
    pub fn command(&self, args: &[&str]) -> Command {
        let docker = newer::find("docker").unwrap_or_else(|why| panic!("docker: {why}"));
        let mut command = self.node.command("env", [format!("DOCKER_HOST={HOST}")]);
        command.arg(docker).args(args);
        command
    }

    /// Runs it to its end, whatever that is.
    #[track_caller]
    pub fn output(&self, args: &[&str]) -> Output {
        let mut command = self.command(args);
        command
            .output()
            .unwrap_or_else(|e| panic!("start {command:?}: {e}"))
    }

    /// Runs it; it must succeed; its stdout.
    #[track_caller]
    pub fn ok(&self, args: &[&str]) -> String {
        let output = self.output(args);
        assert!(output.status.success(), "docker {args:?}: {output:?}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Starts it and returns while it runs.
    #[track_caller]
    pub fn spawn(&self, args: &[&str]) -> Running {
        self.node.spawn_command(self.command(args))
    }

    /// As [`Docker::spawn`], on a terminal of its own.
    #[track_caller]
    pub fn on_terminal(&self, args: &[&str]) -> Running {
        let docker = newer::find("docker").unwrap_or_else(|why| panic!("docker: {why}"));
        let words = [&docker.display().to_string(), "--host", HOST];
        let words: Vec<String> = words
            .iter()
            .chain(args)
            .map(|word| format!("'{}'", word.replace('\'', r"'\''")))
            .collect();
        let line = words.join(" ");
        let script = [
            "--quiet",
            "--return",
            "--flush",
            "--command",
            &line,
            "/dev/null",
        ];
        self.node.spawn("script", script)
    }

    /// One value of `docker inspect`.
    #[track_caller]
    pub fn inspect(&self, container: &str, value: &str) -> String {
        let format = format!("{{{{{value}}}}}");
        let said = self.ok(&["inspect", "--format", &format, container]);
        said.trim().to_owned()
    }

    /// The init of a running container.
    #[track_caller]
    pub fn init(&self, container: &str) -> Process {
        let pid = self.inspect(container, ".State.Pid");
        let found = pid.parse().ok().and_then(|pid| self.node.process(pid));
        found.unwrap_or_else(|| panic!("init of {container} is {pid:?}"))
    }

    /// Waits until Docker says that it is not running any more; its exit code, and whether it was
    /// killed for want of memory.
    #[track_caller]
    pub fn wait_exited(&self, container: &str) -> (i64, bool) {
        let state = wait_for(&format!("the end of {container}"), || {
            let state = self.inspect(container, "json .State");
            let state: serde_json::Value = serde_json::from_str(&state).ok()?;
            (state["Status"] == "exited").then_some(state)
        });
        let code = state["ExitCode"].as_i64();
        let code = code.unwrap_or_else(|| panic!("state of {container}: {state}"));
        (code, state["OOMKilled"] == true)
    }
}

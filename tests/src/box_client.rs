//! A client in a [`SystemdBox`]: a `ctr` that stays attached, in a unit of its own, whose stdin is
//! held open and typed into.

use std::fs::{self, File};
use std::io::Write;

use crate::systemd_box::{BoxTask, Instance, OURS, SystemdBox, run_options};
use crate::wait::wait_for;

/// One of them.
pub struct BoxClient<'a> {
    host: &'a SystemdBox,
    name: String,
    typed: File,
}

impl SystemdBox {
    /// Runs a container of our shim, a shell with that line, which has no `'`, with a client
    /// attached to it; running when this returns.
    #[track_caller]
    pub fn run_attached(&self, id: &str, command: &str) -> (BoxTask, BoxClient<'_>) {
        let options = run_options(OURS);
        let line = format!("ctr run {options} {id} /bin/sh -c '{command}'");
        let client = BoxClient::start(self, id, &line);
        (self.task_at(&Instance::DEBIAN, id), client)
    }

    /// The same with a terminal, at which a shell waits.
    #[track_caller]
    pub fn run_terminal(&self, id: &str) -> (BoxTask, BoxClient<'_>) {
        let ctr = format!("ctr run --tty {} {id} /bin/sh", run_options(OURS));
        let line = format!("script --quiet --return --flush --command '{ctr}' /dev/null");
        let client = BoxClient::start(self, id, &line);
        (self.task_at(&Instance::DEBIAN, id), client)
    }

    /// Runs that line of shell in a container, with a client attached to it.
    #[track_caller]
    pub fn exec_attached(&self, task: &BoxTask, exec_id: &str, command: &str) -> BoxClient<'_> {
        let id = &task.id;
        let line = format!("ctr task exec --exec-id {exec_id} {id} /bin/sh -c '{command}'");
        BoxClient::start(self, exec_id, &line)
    }
}

impl<'a> BoxClient<'a> {
    #[track_caller]
    fn start(host: &'a SystemdBox, name: &str, line: &str) -> BoxClient<'a> {
        let script = format!(
            "cd /root; exec <>{name}.in; {line} >{name}.out 2>&1 && code=0 || code=$?; \
             echo $code >{name}.new; mv {name}.new {name}.code\n"
        );
        host.write(format!("/root/{name}.sh"), &script);
        host.shell(&format!(
            "mkfifo /root/{name}.in; touch /root/{name}.out; \
             systemd-run --quiet --unit client-{name} bash /root/{name}.sh"
        ));
        let path = host.path(format!("/root/{name}.in"));
        let typed = File::options().read(true).write(true).open(&path);
        BoxClient {
            host,
            name: name.to_owned(),
            typed: typed.unwrap_or_else(|e| panic!("open {}: {e}", path.display())),
        }
    }

    /// What it was given so far.
    pub fn text(&self) -> String {
        let path = self.host.path(format!("/root/{}.out", self.name));
        String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned()
    }

    /// Its exit code, if it has ended.
    pub fn code(&self) -> Option<i32> {
        let path = self.host.path(format!("/root/{}.code", self.name));
        fs::read_to_string(path).ok()?.trim().parse().ok()
    }

    /// Waits for its end.
    #[track_caller]
    pub fn wait(&self) -> i32 {
        wait_for(&format!("the end of client {}", self.name), || self.code())
    }

    /// Types a line.
    #[track_caller]
    pub fn line(&mut self, line: &str) {
        let written = self.typed.write_all(format!("{line}\n").as_bytes());
        written.unwrap_or_else(|e| panic!("type {line:?}: {e}"));
    }

    /// Waits until it was given this.
    #[track_caller]
    pub fn wait_text(&self, text: &str) {
        wait_for(&format!("{text:?} at client {}", self.name), || {
            let code = self.code();
            assert_eq!(code, None, "{} ended: {}", self.name, self.text());
            self.text().contains(text).then_some(())
        });
    }

    /// Waits until it was given more than by now.
    #[track_caller]
    pub fn wait_more(&self) {
        let was = self.text().len();
        wait_for(&format!("more at client {}", self.name), || {
            let code = self.code();
            assert_eq!(code, None, "{} ended: {}", self.name, self.text());
            (self.text().len() > was).then_some(())
        });
    }
}

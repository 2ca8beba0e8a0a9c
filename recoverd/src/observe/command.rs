//! Output of another program that only looks (`systemctl show`, `journalctl`): bounded in time
//! and size, ended when it takes too long.

use std::{
    io::Read,
    process::{Child, Command, Stdio},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use recoverd_common::seen::Seen;

/// How often a program that has closed its output is asked whether it ended.
const POLL: Duration = Duration::from_millis(5);

/// Runs `program`, looked up in PATH, and gives its standard output, at most `limit` bytes of it.
///
/// *Absent* when there is no such program; *unknown* when it failed or took longer than
/// `timeout`.
pub fn output(program: &str, arguments: &[&str], timeout: Duration, limit: u64) -> Seen<Vec<u8>> {
    let until = Instant::now() + timeout;
    let mut command = Command::new(program);
    command
        .args(arguments)
        // What is printed is parsed, and no pager may wait for a key.
        .env("LC_ALL", "C")
        .env("SYSTEMD_PAGER", "")
        .env("SYSTEMD_COLORS", "0")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        // Its words, not its complaints; the exit status tells that there were some.
        .stderr(Stdio::null());
    let mut child = match command.spawn() {
        Ok(child) => child,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Seen::Absent,
        Err(error) => return Seen::Unknown(format!("start {program}: {error}")),
    };
    let Some(stdout) = child.stdout.take() else {
        end(&mut child);
        return Seen::Unknown(format!("{program} has no output"));
    };
    // A thread reads, because a read of a pipe has no deadline. It ends with the pipe: at the
    // latest when the child is ended below.
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        let mut bytes = Vec::new();
        let read = stdout.take(limit).read_to_end(&mut bytes);
        // Nobody waits any more when it took too long.
        let _ = sender.send(read.map(|_| bytes));
    });
    let read = receiver.recv_timeout(timeout);
    let (Ok(read), Some(status)) = (read, ended(&mut child, until)) else {
        end(&mut child);
        let seconds = timeout.as_secs_f32();
        return Seen::Unknown(format!("{program} took longer than {seconds} s"));
    };
    match read {
        // One that was cut may have got SIGPIPE: its output is good all the same.
        Ok(bytes) if status || bytes.len() as u64 == limit => Seen::Present(bytes),
        Ok(_) => Seen::Unknown(format!("{program} failed")),
        Err(error) => Seen::Unknown(format!("read from {program}: {error}")),
    }
}

/// Whether it succeeded, once it ended; `None` when it did not in time.
fn ended(child: &mut Child, until: Instant) -> Option<bool> {
    loop {
        match child.try_wait() {
            Ok(Some(status)) => return Some(status.success()),
            Ok(None) if Instant::now() < until => thread::sleep(POLL),
            Ok(None) | Err(_) => return None,
        }
    }
}

/// Ends our own child; its number cannot be another's before it is waited for.
fn end(child: &mut Child) {
    // It may have ended by itself meanwhile, which is as good.
    let _ = child.kill();
    let _ = child.wait();
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn output_is_bounded_in_time_and_size_and_failures_are_told_from_absence() {
        let shell = |script: &str, timeout, limit| output("sh", &["-c", script], timeout, limit);
        assert_eq!(
            shell("echo $LC_ALL", LONG, 99),
            Seen::Present(b"C\n".into())
        );
        assert_eq!(shell("yes", LONG, 4), Seen::Present(b"y\ny\n".into()));
        assert!(matches!(
            shell("echo x; exit 1", LONG, 99),
            Seen::Unknown(_)
        ));
        let begun = Instant::now();
        let slow = shell("exec sleep 300", Duration::from_millis(50), 99);
        assert!(matches!(slow, Seen::Unknown(_)) && begun.elapsed() < LONG);
        let slow = shell("exec >&-; exec sleep 300", Duration::from_millis(50), 99);
        assert!(matches!(slow, Seen::Unknown(_)) && begun.elapsed() < LONG);
        assert_eq!(output("no-such-program", &[], LONG, 9), Seen::Absent);
    }
}

//! What each finding means, for somebody who meets it at night: how it comes about, what
//! containerd makes of it, what to do, and what would make it worse. No I/O.
//!
//! What is said of containerd was seen on releases 1.6, 1.7 and 2.0 to 2.4.

use std::fmt::Write as _;

use crate::findings::{Code, Severity};

/// The texts of one code; each is one paragraph, wrapped when printed.
struct Explanation {
    /// How it comes about.
    origin: &'static str,
    /// What containerd does with it, now and at its next start.
    containerd: &'static str,
    /// What to do.
    remedy: &'static str,
    /// What not to do, and why.
    avoid: &'static str,
}

/// Columns of a printed text.
const WIDTH: usize = 80;

/// The text of `recoverd explain CODE`.
pub fn text(code: Code) -> String {
    let parts = explanation(code);
    let mut out = format!("{} ({})\n", code.word(), code.severity().word());
    wrap(&mut out, code.summary());
    for (title, paragraph) in [
        ("How it comes about", parts.origin),
        ("What containerd does", parts.containerd),
        ("What to do", parts.remedy),
        ("What `recoverd repair` does", repair(code)),
        ("What not to do", parts.avoid),
    ] {
        out.push('\n');
        out.push_str(title);
        out.push('\n');
        wrap(&mut out, paragraph);
    }
    out
}

/// What `repair --apply` makes of it.
fn repair(code: Code) -> &'static str {
    match code {
        Code::OrphanedTask => "Starts our shim for it, as `recoverd adopt` does.",
        Code::UnresponsiveShim | Code::SocketMissing => {
            "With --allow kill, and only while its containerd does not run: ends the shim and \
                starts ours for its tasks. Else nothing."
        }
        Code::TaskUnknownToContainerd => {
            "With --allow kill: SIGTERM to its init, SIGKILL five seconds later; then what is \
                left of it."
        }
        Code::LeakedShim => {
            "With --allow kill, and only if nobody is connected to it: SIGTERM, SIGKILL five \
                seconds later."
        }
        Code::StuckTask => {
            "Publishes the exit, if somebody observed it and a running containerd lists the task \
                as running. Else nothing."
        }
        Code::ExitUnreported => {
            "Nothing: a containerd that is down can be told nothing. One that is up and still \
                lists the task as running makes it a `stuck-task`, and then it does."
        }
        Code::StaleBundle => {
            "With --allow delete: unmounts what is in it, removes what runc knows of it, removes \
                it. Not while a record of our shim still needs it."
        }
        Code::StaleSocket => "Removes it, if it is known whose it was.",
        Code::StaleRecord => {
            "Removes it and the files beside it, unless events wait there that containerd has \
                not acknowledged."
        }
        Code::UnreadableRecord => {
            "Moves it into the folder recoverd-quarantine, unless its shim lives."
        }
        Code::LeakedMount => {
            "Unmounts it, not lazily. What lives in memory only needs --allow delete."
        }
        Code::LeakedCgroup => "Removes it; the kernel refuses one that has a process.",
        Code::LeakedFifo => "Removes the fifos, and their folder if nothing else is in it.",
        Code::LeakedRuncState => "With --allow delete: removes the folder.",
        Code::DuplicateWorkload
        | Code::OutdatedShim
        | Code::RunNearlyFull
        | Code::LeakedExec
        | Code::BloatedShim => "Nothing.",
        Code::Foreign => "Nothing: repair never touches what is foreign.",
    }
}

/// The text of `recoverd explain`: every code, worst first.
pub fn list() -> String {
    let width = Code::ALL.iter().map(|code| code.word().len()).max();
    let width = width.unwrap_or(0);
    let mut out = String::new();
    for severity in Severity::ALL {
        for code in Code::ALL.iter().filter(|c| c.severity() == severity) {
            // Writing to a String cannot fail.
            let _ = writeln!(
                out,
                "{:<width$}  {:<8}  {}",
                code.word(),
                severity.word(),
                code.summary()
            );
        }
    }
    out
}

/// The code that somebody who typed `word` most likely meant.
pub fn nearest(word: &str) -> Option<Code> {
    // Longer than any code: measuring it would only cost time.
    let word: Vec<char> = word.to_lowercase().chars().take(64).collect();
    let distances = Code::ALL.iter().map(|code| {
        let code_word: Vec<char> = code.word().chars().collect();
        // Who types a part of a code means it, however short the others are.
        let part: String = word.iter().collect();
        let has_part = !part.is_empty() && code.word().contains(&part);
        ((!has_part, distance(&word, &code_word)), *code)
    });
    distances
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, code)| code)
}

/// Characters to insert, remove or replace to get from `a` to `b` (Levenshtein).
fn distance(a: &[char], b: &[char]) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, from) in a.iter().enumerate() {
        let mut left = i + 1;
        let mut cells = row.iter_mut();
        let mut diagonal = match cells.next() {
            Some(first) => std::mem::replace(first, left),
            None => break,
        };
        for (to, above) in b.iter().zip(cells) {
            let replaced = diagonal + usize::from(from != to);
            diagonal = *above;
            left = replaced.min(left + 1).min(*above + 1);
            *above = left;
        }
    }
    row.last().copied().unwrap_or(0)
}

fn wrap(out: &mut String, paragraph: &str) {
    const INDENT: &str = "  ";
    let mut column = 0;
    for word in paragraph.split_whitespace() {
        let length = word.chars().count();
        if column == 0 {
            out.push_str(INDENT);
            column = INDENT.len();
        } else if column + 1 + length > WIDTH {
            out.push('\n');
            out.push_str(INDENT);
            column = INDENT.len();
        } else {
            out.push(' ');
            column += 1;
        }
        out.push_str(word);
        column += length;
    }
    out.push('\n');
}

fn explanation(code: Code) -> Explanation {
    match code {
        Code::OrphanedTask => Explanation {
            origin: "The shim was killed (by the OOM killer, a bug, `kill -9`) while its container \
                went on. Most often containerd was down at that moment. With containerd up it \
                happens when the `delete` verb could not do its work (bundle or shim binary \
                gone), or to the app containers of a pod under a shim that speaks version 3.",
            containerd: "At its next start it gets no connection to the shim, runs `<shim> \
                delete`, and that KILLS THE LIVING WORKLOAD; the exit status becomes a made-up \
                137. Where the bundle is gone too, containerd does not know the workload at all \
                and the CRI says it has exited (255).",
            remedy: "`recoverd adopt NS/ID`, before containerd starts: our shim takes the place \
                of the dead one, for its whole pod, and containerd finds it where it looks. With \
                the hooks installed `recoverd pre-start` does it by itself. What cannot be \
                adopted (it says why) ends at that start: drain it first. `recoverd dump NS/ID` \
                keeps the facts for a bug report.",
            avoid: "Do not restart containerd to see whether it helps: that is what kills it. Do \
                not start a second container with this id: runc refuses or both write to the \
                same volumes.",
        },
        Code::UnresponsiveShim => Explanation {
            origin: "The shim process is there and its socket takes connections, but two calls \
                went unanswered. It is stopped (SIGSTOP, a debugger, a frozen cgroup), waits for \
                a device (state D), or is deadlocked; the evidence says which. A node short of \
                CPU looks alike for a moment, hence two calls.",
            containerd: "Now: `task ls` says UNKNOWN after 2 s; kill, exec and delete block. At \
                its next start it waits 5 s (each, one after another up to 2.1), then kills the \
                workload and leaves shim and socket behind. A shim that answers the first call \
                and hangs in the second (1.7 and later) stops containerd from ever starting.",
            remedy: "If it is stopped: find who stopped it, then send SIGCONT to that pid. Busy \
                or in state D: look at the node and its storage first; it may answer yet. \
                Otherwise keep the facts (`recoverd dump --stack NS/ID` has a Go shim write its \
                stacks), stop containerd, `recoverd repair --apply --allow kill --only NS/ID`, \
                start it. `recoverd pre-start` does that between the two by itself.",
            avoid: "Do not kill the shim while containerd is up: it takes that as the end of the \
                container and kills the workload. Do not restart containerd with many of these: \
                18 of them exceed systemd's 90 s start timeout.",
        },
        Code::DuplicateWorkload => Explanation {
            origin: "A workload outlived its shim or its bundle, the orchestrator believed it \
                dead and started another one. Or a shim that hung at containerd's start was \
                dropped, and a task with the same id was made beside it.",
            containerd: "Nothing: it knows one of the two at most. On 2.x, if the dropped shim is \
                killed later, containerd runs `delete` for the id that both share and so kills \
                the NEW container.",
            remedy: "Find out which of the two is wanted: the one that containerd lists. Both may \
                write to the same volumes, so stop the service first if that can corrupt them. \
                Then end the other one's processes by pid, its shim first being cut off: with \
                containerd stopped, end the old shim and remove its socket file.",
            avoid: "Do not run `runc delete --force` with the id when both share it: it ends \
                whichever runc's state names, which may be the wanted one.",
        },
        Code::SocketMissing => Explanation {
            origin: "Something removed the file of a listening socket: a cleaner of /run or \
                tmpfiles.d rule, a script that deletes what looks stale, an operator. The shim \
                and its container are well and notice nothing.",
            containerd: "A containerd that is connected goes on with the connection it has. At \
                its next start it cannot reach the shim, runs `delete` and KILLS THE LIVING \
                WORKLOAD, while the shim process stays behind.",
            remedy: "Find and stop what removes files below the socket folder before the next \
                one goes. Then as for a shim that hangs: stop containerd, `recoverd repair \
                --apply --allow kill --only NS/ID`, start it, or have `recoverd pre-start` do it \
                in between. An address that is merely wrong in the bundle pre-start puts right.",
            avoid: "Do not restart containerd without that. Do not make the file again by hand: a socket is \
                bound by its listener, a new file of that name leads nowhere, and neither \
                renaming nor linking brings the old one back.",
        },
        Code::TaskUnknownToContainerd => Explanation {
            origin: "containerd started without being able to load the task and did not end it: \
                its bundle or its `shim-binary-path` was missing, the shim's binary had been \
                removed, or the shim refused Delete (a ghost of 1.7 and later). Or its database \
                was replaced while the task ran.",
            containerd: "Neither lists it nor ends it, at this start or a later one, and its work \
                folder is removed. A new task with the same id fails (`container with given ID \
                already exists`) as long as runc knows the old one.",
            remedy: "See with `recoverd show NS/ID` what still holds. When its work is \
                elsewhere or no longer needed: `recoverd repair --apply --allow kill --allow \
                delete --only NS/ID` ends it and then clears up after it. If it must go on, leave \
                it alone: it runs, only nobody manages it.",
            avoid: "Do not end the shim first: its container goes on without anybody to collect \
                it. Do not remove the bundle of a living task.",
        },
        Code::LeakedShim => Explanation {
            origin: "A shim without a container: containerd went away between starting the shim \
                and creating the task, dropped it at its start because it hung then, or the \
                Shutdown call never reached it.",
            containerd: "Does not know it. 1.7 and later end one that still has a bundle at their \
                next start; 1.6 keeps it for ever. While its socket stands, `start` of the same \
                id answers with this shim's address, and Create may block in it.",
            remedy: "`recoverd repair --apply --allow kill --only NS/ID`: it looks twice, sees \
                that nobody is connected, and ends it with SIGTERM, so that it unlinks its socket \
                itself; with SIGKILL if it does not listen to that.",
            avoid: "Do not end a shim to which a living containerd holds a connection: containerd \
                runs `delete` for its id then, which may by now belong to a new container.",
        },
        Code::StuckTask => Explanation {
            origin: "The kernel, the shim and containerd say different things about how far the \
                task is: the init is dead but the shim says running (it missed the exit), the \
                shim says stopped but containerd says running (an event got lost), processes \
                outlived the init in its cgroup, or a task stays created or paused.",
            containerd: "Trusts the shim. `Wait` goes on for ever where the shim missed the exit; \
                a paused task that was killed dies (on cgroup v1) only when it is resumed; a \
                created task waits for a Start that nobody sends.",
            remedy: "`recoverd show NS/ID` prints the three words side by side. Dead init, shim \
                says running: delete the task by its client (`ctr task delete --force`, the \
                kubelet). Left-over processes: end them by pid, then delete the task. Created or \
                paused: ask its client whether it still wants it; resume before killing.",
            avoid: "Do not kill the shim to get rid of the task: the exit status that it may \
                still hold is lost with it.",
        },
        Code::ExitUnreported => Explanation {
            origin: "The container exited while containerd is down, and a stock shim holds its \
                status: it sends the event again for 15 s and then drops it.",
            containerd: "1.6 asks the shim after its start and keeps the true status. 1.7 and \
                later take a shim without processes for leaked, delete the task and lose its \
                status and its events; the CRI then says 255, Unknown. One that is up and goes on \
                listing the task as running is another finding, `stuck-task`.",
            remedy: "Write the status down before containerd starts: it is in the evidence, and \
                `recoverd show NS/ID` prints it as the shim's word.",
            avoid: "Do not take a 137 or 255 that containerd shows after its restart for the real \
                status, nor for an OOM kill.",
        },
        Code::OutdatedShim => Explanation {
            origin: "The package that holds the shim was upgraded while the shim ran. A running \
                process keeps the file it was started from, also when it has no name any more.",
            containerd: "Works with it: shims and containerd of different releases understand \
                each other upwards (1.6 shims with 2.x). `delete` runs the installed binary, not \
                the one that serves. New containers of the same pod come to the old process.",
            remedy: "Our shim: `recoverd upgrade NS/ID`, or `--all`. It becomes the installed \
                executable in the same process; no container, stream or connection notices. A \
                stock shim: nothing breaks, but a fix of the package does not hold for this \
                container until it is restarted: restart it at the next occasion, a pod as a \
                whole. After a security fix make that soon.",
            avoid: "Do not kill the shim to refresh it: its container dies with it.",
        },
        Code::StaleBundle => Explanation {
            origin: "A task's folder outlived its shim and its init: both died while containerd \
                was down (a crash of the node's memory management, a reboot with the state \
                folder on a disk), or removing it failed because its rootfs was busy.",
            containerd: "At its next start it runs `delete` for it and removes it; up to 1.7 it \
                stays where `delete` fails and is tried again at every start. Until then a new \
                task of the same id fails with `file exists`.",
            remedy: "Let containerd's next start remove it. If the id is needed before, or that \
                start does not remove it: `recoverd repair --apply --allow delete --only NS/ID` \
                unmounts its `rootfs`, sees that nobody uses the bundle, and removes it.",
            avoid: "Do not remove it with `rm -r` while its rootfs is mounted: that deletes the \
                container's files, and those of volumes mounted below.",
        },
        Code::StaleSocket => Explanation {
            origin: "A shim that is killed leaves its socket file; one that ends in order unlinks \
                it (2.x shims of a group with another name than their id forget to).",
            containerd: "Nothing ever cleans it. A later `start` for the same group finds that \
                nobody listens, unlinks it and binds again.",
            remedy: "Harmless. It may be removed once nobody listens (`ss -xl`) and no bundle's \
                `address` or `bootstrap.json` names it.",
            avoid: "Do not clean the socket folder by age or by a wildcard: a file whose shim \
                lives cannot be brought back, and its workload dies at containerd's next start. \
                Several containerds share the folder.",
        },
        Code::StaleRecord => Explanation {
            origin: "A recoverd shim's record from before a reboot, or one whose shim, socket and \
                tasks are gone: a shim was killed after its last task had ended.",
            containerd: "Does not read records.",
            remedy: "Harmless. The pids in it mean nothing any more. It may be removed together \
                with the `.lock`, `.events` and `.requests` files of the same name.",
            avoid: "Do not remove the record of a living shim or of an orphaned task: it holds \
                what a successor needs, exit statuses included.",
        },
        Code::UnreadableRecord => Explanation {
            origin: "A record that cannot be trusted: cut or corrupt (a full /run, a hand at \
                work), of a newer format than this recoverd knows (a downgrade), a symlink, too \
                large, or writable by somebody else than its owner.",
            containerd: "Does not read records. The shim itself goes on from memory as long as it \
                lives; what is at risk is its successor's knowledge.",
            remedy: "The evidence says what is wrong. Newer format: use the recoverd of that \
                release. Wrong owner or mode: find out who changed it before you trust it. \
                Otherwise keep a copy; the shim writes it anew at its next change of state.",
            avoid: "Do not edit a record: a wrong pid in it leads to a stranger's process.",
        },
        Code::LeakedMount => Explanation {
            origin: "A bundle's rootfs stayed mounted after its task: unmounting failed (busy), \
                the bundle was dropped without `delete`, or the shim was killed in between.",
            containerd: "Unmounts it only together with its bundle; without one, never. The \
                snapshot below cannot be removed as long as it is mounted, and image garbage \
                collection fails on it.",
            remedy: "See that no process has its root or a file in it (`fuser -m`), also in \
                other mount namespaces (`grep -l PATH /proc/*/mountinfo`). Then `umount PATH`.",
            avoid: "Do not use `umount -l`: it hides the mount while its users go on. Do not \
                remove anything below it; that is the container's file system.",
        },
        Code::LeakedCgroup => Explanation {
            origin: "A container's cgroup outlived it: runc's delete did not run (shim and bundle \
                were lost), or a process was still in it. A cgroup without processes can stay \
                for another reason: page cache charged to it.",
            containerd: "Does not look at cgroups without a task. A new container with the same \
                cgroup path joins the old group and inherits its limits and counters.",
            remedy: "If it is empty: `rmdir` it in every hierarchy, innermost folder first. If \
                it has processes, they are the finding: see whose they are first.",
            avoid: "Do not write 1 to `cgroup.kill` before you know whose processes it holds.",
        },
        Code::LeakedFifo => Explanation {
            origin: "A client's folder of fifos (`ctr`, the CRI) outlived its task: whenever a \
                task vanishes instead of being deleted by its client, and with clients that \
                were killed.",
            containerd: "Never removes those below its fifo folder: they are the client's. The \
                CRI removes its own with the container.",
            remedy: "Harmless but for inodes. When no process has one open (`fuser`), the folder \
                may be removed.",
            avoid: "Do not open them to look: a reader that goes away again ends a writer with \
                SIGPIPE, and opening one for writing wakes whoever waits.",
        },
        Code::LeakedRuncState => Explanation {
            origin: "runc keeps a folder per container below its root. It stays when nobody runs \
                `runc delete`: shim and bundle were lost, or `delete` failed.",
            containerd: "Does not look there. A new task with the same id fails: `container with \
                given ID already exists`.",
            remedy: "See that the init in its `state.json` is dead (compare the start time, not \
                only the pid), then `runc --root /run/containerd/runc/NS delete ID`; it removes \
                the cgroups as well.",
            avoid: "Do not use `delete --force` without that look: it kills what lives. Do not \
                remove the folder of a living container: exec, kill and delete fail then.",
        },
        Code::RunNearlyFull => Explanation {
            origin: "The file system that holds sockets, bundles and runc's state is nearly out \
                of bytes or inodes. Mostly logs or leaked fifos and bundles on a small tmpfs; \
                the evidence names the largest.",
            containerd: "Create and exec fail when it is full, and containerd may start but not \
                write `bootstrap.json`. Running containers go on.",
            remedy: "Look at the eaters first, then at leaked things in this scan. A tmpfs can be \
                enlarged while in use: `mount -o remount,size=50%,nr_inodes=1M /run`.",
            avoid: "Do not free room by removing bundles, sockets or runc's state of living \
                tasks. Do not restart containerd while it is full.",
        },
        Code::LeakedExec => Explanation {
            origin: "An exec whose client went away without ending it: a `kubectl exec` whose \
                connection broke, a probe that timed out. Its process lives, nobody reads its \
                output or writes its input.",
            containerd: "Keeps the exec until its process exits or the container ends. When its \
                output pipe is full it waits there for ever.",
            remedy: "See what it is (`recoverd show NS/ID`). If it is not wanted any more, end \
                its process by pid; the shim then collects it.",
            avoid: "Do not end it only because it is old: a detached exec (`ctr task exec -d`) \
                has nobody at the other end by design.",
        },
        Code::BloatedShim => Explanation {
            origin: "Memory, threads or descriptors of this shim are far beyond those of its \
                like. Usually a leak that grows with each exec: probes make thousands a day. \
                Blocked calls hold threads.",
            containerd: "Does not look. Shims count towards containerd's cgroup, and the OOM \
                killer that takes one orphans its container.",
            remedy: "Restart the container at the next occasion. `recoverd dump --stack NS/ID` \
                shows where a Go shim's threads wait, for a bug report.",
            avoid: "Do not kill the shim: with containerd up its container dies with it, with \
                containerd down it dies at the next start.",
        },
        Code::Foreign => Explanation {
            origin: "A shim of another runtime (Kata, gVisor, runwasi), or one that belongs to a \
                containerd which recoverd does not know: a test daemon, Docker's own, one in \
                another mount namespace.",
            containerd: "Whoever owns it treats it as its own. Another containerd never lists it, \
                which is no sign of trouble: all of them share the socket folder.",
            remedy: "If it should be known, name its containerd by --address, --state and --root \
                or in a [[containerd]] table of the configuration. Else use its owner's tools. \
                One that hangs costs containerd's start 5 s or, if it answers the first call \
                only, all of it: with `pre-start.foreign = true` `recoverd pre-start` ends it \
                before, if it is stopped or idle; its workload ends either way.",
            avoid: "Do not judge it by the list of a containerd that does not own it.",
        },
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn a_text_looks_like_this() {
        let golden = "\
stale-socket (info)
  a socket file on which nobody listens

How it comes about
  A shim that is killed leaves its socket file; one that ends in order unlinks
  it (2.x shims of a group with another name than their id forget to).

What containerd does
  Nothing ever cleans it. A later `start` for the same group finds that nobody
  listens, unlinks it and binds again.

What to do
  Harmless. It may be removed once nobody listens (`ss -xl`) and no bundle's
  `address` or `bootstrap.json` names it.

What `recoverd repair` does
  Removes it, if it is known whose it was.

What not to do
  Do not clean the socket folder by age or by a wildcard: a file whose shim
  lives cannot be brought back, and its workload dies at containerd's next
  start. Several containerds share the folder.
";
        assert_eq!(text(Code::StaleSocket), golden);
    }

    #[test]
    fn every_text_fits_a_terminal_and_names_only_commands_that_exist() {
        let commands = crate::cli::Cli::command();
        let known: Vec<&str> = commands.get_subcommands().map(|c| c.get_name()).collect();
        for code in Code::ALL {
            let text = text(*code);
            let lines = text.lines().count();
            assert!((13..=35).contains(&lines), "{}: {lines}", code.word());
            for line in text.lines() {
                assert!(line.chars().count() <= WIDTH, "{line}");
            }
            let words = text.split_whitespace().collect::<Vec<_>>().join(" ");
            for (at, _) in words.match_indices("`recoverd ") {
                let rest = &words[at + "`recoverd ".len()..];
                let command = rest.split([' ', '`']).next().unwrap();
                assert!(known.contains(&command), "{}: {command}", code.word());
            }
        }
    }

    #[test]
    fn the_list_has_every_code_worst_first() {
        let list = list();
        assert_eq!(list.lines().count(), Code::ALL.len());
        assert!(list.starts_with("orphaned-task"));
        let at = |code: Code| list.lines().position(|l| l.starts_with(code.word()));
        assert!(at(Code::UnreadableRecord) < at(Code::OutdatedShim));
    }

    #[test]
    fn a_mistyped_code_finds_its_neighbour() {
        for (typed, meant) in [
            ("orphaned", Code::OrphanedTask),
            ("orphan-task", Code::OrphanedTask),
            ("orphan", Code::OrphanedTask),
            ("mount", Code::LeakedMount),
            ("unresponsive", Code::UnresponsiveShim),
            ("STALE-SOCKETS", Code::StaleSocket),
            ("leaked-fifos", Code::LeakedFifo),
            ("run-full", Code::RunNearlyFull),
        ] {
            assert_eq!(nearest(typed), Some(meant), "{typed}");
        }
        assert!(nearest(&"x".repeat(1 << 20)).is_some());
    }
}

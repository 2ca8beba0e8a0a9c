//! What goes into a dump: which files of which process, bundle, cgroup.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    fs::{self, File},
    io::{self, Read, Seek, SeekFrom, Write},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::Path,
    time::Duration,
};

use recoverd_common::{
    cgroup::parse_memberships,
    paths::Beside,
    proc::{Proc, ProcessId},
    read::absent_or_unknown,
    seen::Seen,
};

use super::{
    archive::{Archive, read, within},
    redact,
};
use crate::{
    correlate::Case,
    facts::{Instance, Look},
    observe::command,
};

/// Small files of `/proc/<pid>`; `environ` is left out on purpose.
const PROCESS: [&str; 14] = [
    "status",
    "stat",
    "limits",
    "cgroup",
    "mountinfo",
    "cmdline",
    "stack",
    "wchan",
    "syscall",
    "io",
    "smaps_rollup",
    "oom_score",
    "oom_score_adj",
    "sched",
];
/// Files of a thread that say what it waits for.
const THREAD: [&str; 3] = ["wchan", "syscall", "stack"];
/// Threads of one process that are looked at.
const MAX_THREADS: usize = 64;
/// Files of a bundle; whatever else is in it is only listed.
const BUNDLE: [&str; 9] = [
    "address",
    "bootstrap.json",
    "shim-binary-path",
    "sandbox",
    "runtime",
    "options.json",
    "init.pid",
    "log.json",
    "config.json",
];
/// Files of a cgroup, of v1 and v2; those that are not there do not count as missing.
const CGROUP: [&str; 30] = [
    "cgroup.controllers",
    "cgroup.events",
    "cgroup.freeze",
    "cgroup.procs",
    "cgroup.stat",
    "cgroup.threads",
    "cpu.cfs_quota_us",
    "cpu.max",
    "cpu.pressure",
    "cpu.stat",
    "cpuacct.usage",
    "freezer.state",
    "io.pressure",
    "io.stat",
    "memory.current",
    "memory.events",
    "memory.failcnt",
    "memory.high",
    "memory.limit_in_bytes",
    "memory.max",
    "memory.max_usage_in_bytes",
    "memory.oom_control",
    "memory.peak",
    "memory.pressure",
    "memory.stat",
    "memory.swap.current",
    "memory.usage_in_bytes",
    "pids.current",
    "pids.max",
    "tasks",
];
/// Entries of a folder that are listed.
const MAX_LISTED: usize = 4096;
/// How much of a log's end is taken, bytes.
const LOG_TAIL: u64 = 1 << 20;
/// As [`LOG_TAIL`], in lines of the journal.
const JOURNAL_LINES: &str = "5000";
const JOURNAL: Duration = Duration::from_secs(10);
/// The unit that is asked for when containerd is down or runs outside of one.
const USUAL_UNIT: &str = "containerd.service";

/// Adds everything about `case`.
pub fn all<W: Write>(
    archive: &mut Archive<W>,
    look: &Look,
    case: &Case<'_>,
    proc_root: &Path,
) -> io::Result<()> {
    let proc = &Proc::new(proc_root);
    if let Some(shim) = case.shim.process() {
        process(archive, proc, "shim", shim.id)?;
    } else {
        archive.miss("shim", &format!("{:?}", case.shim));
    }
    match case.init.alive() {
        Some(id) => process(archive, proc, "init", id)?,
        None => archive.miss("init", &format!("{:?}", case.init)),
    }
    for exec in look.execs.iter().filter(|exec| exec.name == case.name) {
        process(archive, proc, &format!("exec-{}", exec.id.pid), exec.id)?;
    }
    if let Some(bundle) = case.bundle {
        folder(archive, "bundle", &bundle.path, &BUNDLE)?;
    }
    if let Some(runc) = case.runc {
        folder(archive, "runc", &runc.path, &["state.json"])?;
    }
    if let Some(path) = case.address.as_deref().filter(|a| a.starts_with('/')) {
        socket(archive, Path::new(path))?;
    }
    if let Some(cgroup) = case.cgroup {
        for folder in &cgroup.folders {
            cgroup_folder(archive, folder)?;
        }
    }
    // The lines of our tables that name the task.
    let (namespace, id) = &case.name;
    let bundle = format!("/{namespace}/{id}/");
    lines_with(
        archive,
        "mounts.txt",
        &proc_root.join("self/mountinfo"),
        &bundle,
    )?;
    if let Some(address) = &case.address {
        lines_with(
            archive,
            "unix-sockets.txt",
            &proc_root.join("net/unix"),
            address,
        )?;
    }
    let instance = case.instance.and_then(|at| look.instances.get(at));
    log(archive, proc, instance)
}

fn process<W: Write>(
    archive: &mut Archive<W>,
    proc: &Proc,
    role: &str,
    id: ProcessId,
) -> io::Result<()> {
    for name in PROCESS {
        archive.file(&format!("{role}/{name}"), &proc.path(id.pid, name))?;
    }
    let links = {
        let proc = proc.clone();
        within(move || links(&proc, id.pid))
    };
    text(archive, &format!("{role}/descriptors.txt"), links)?;
    let threads = {
        let proc = proc.clone();
        within(move || threads(&proc, id.pid))
    };
    text(archive, &format!("{role}/threads.txt"), threads)?;
    // Its number may have gone to another process while it was read.
    if !matches!(proc.living(id), Seen::Present(_)) {
        archive.miss(
            role,
            "ended while it was looked at; its files may be another's",
        );
    }
    Ok(())
}

/// Where its executable, root, folder, namespaces and descriptors lead, by name only.
fn links(proc: &Proc, pid: i32) -> Seen<String> {
    let mut text = String::new();
    let names = [
        "exe",
        "cwd",
        "root",
        "ns/cgroup",
        "ns/ipc",
        "ns/mnt",
        "ns/net",
        "ns/pid",
    ];
    for name in names {
        let target = match fs::read_link(proc.path(pid, name)) {
            Ok(target) => target.display().to_string(),
            Err(error) => error.to_string(),
        };
        // Writing to a String cannot fail, here and below.
        let _ = writeln!(text, "{name} -> {}", printable(&target));
    }
    proc.descriptors(pid).map(|descriptors| {
        for descriptor in descriptors {
            let target = descriptor.target.display().to_string();
            let _ = writeln!(text, "fd/{} -> {}", descriptor.number, printable(&target));
        }
        text
    })
}

fn threads(proc: &Proc, pid: i32) -> Seen<String> {
    let entries = match fs::read_dir(proc.path(pid, "task")) {
        Ok(entries) => entries,
        Err(error) => return absent_or_unknown(&error),
    };
    let mut text = String::new();
    for entry in entries.flatten().take(MAX_THREADS) {
        let thread = entry.path();
        let said = |name: &str| match read(&thread.join(name)) {
            Seen::Present(bytes) => String::from_utf8_lossy(&bytes).trim().to_owned(),
            Seen::Absent => "ended".to_owned(),
            Seen::Unknown(why) => format!("({why})"),
        };
        let _ = writeln!(text, "thread {}", printable(&said("stat")));
        for name in THREAD {
            let _ = writeln!(text, "{name}: {}", said(name));
        }
        text.push('\n');
    }
    Seen::Present(text)
}

/// Lists a folder, and takes these of its files. Never goes below it.
fn folder<W: Write>(
    archive: &mut Archive<W>,
    role: &str,
    path: &Path,
    files: &[&str],
) -> io::Result<()> {
    let listing = {
        let path = path.to_owned();
        within(move || listing(&path))
    };
    text(archive, &format!("{role}/listing.txt"), listing)?;
    for name in files {
        json_or_text(archive, &format!("{role}/{name}"), &path.join(name))?;
    }
    Ok(())
}

/// A file that may hold environment variables if it is JSON.
fn json_or_text<W: Write>(archive: &mut Archive<W>, name: &str, path: &Path) -> io::Result<()> {
    match read(path) {
        Seen::Present(bytes) if holds_environment(name) => match redact::json(&bytes) {
            Some(redacted) => archive.add(name, &redacted),
            None => {
                archive.miss(
                    name,
                    "is no JSON, so what is secret in it cannot be left out",
                );
                Ok(())
            }
        },
        Seen::Present(bytes) => archive.add(name, &bytes),
        // The generations of containerd leave different files.
        Seen::Absent => Ok(()),
        Seen::Unknown(why) => {
            archive.miss(name, &why);
            Ok(())
        }
    }
}

fn holds_environment(name: &str) -> bool {
    ["config.json", "state.json", ".record"]
        .iter()
        .any(|end| name.ends_with(end))
}

/// `type mode uid:gid size mtime name -> target` for each entry, sorted.
fn listing(path: &Path) -> Seen<String> {
    let entries = match fs::read_dir(path) {
        Ok(entries) => entries,
        Err(error) => return absent_or_unknown(&error),
    };
    let mut lines = BTreeMap::new();
    for entry in entries.flatten().take(MAX_LISTED) {
        // Of the entry itself, whatever it leads to.
        let Ok(meta) = entry.metadata() else { continue };
        let name = entry.file_name();
        let target = match fs::read_link(entry.path()) {
            Ok(target) => format!(" -> {}", target.display()),
            // Not a symlink.
            Err(_) => String::new(),
        };
        let line = format!(
            "{:06o} {}:{} {} {} {}{target}",
            meta.mode(),
            meta.uid(),
            meta.gid(),
            meta.size(),
            meta.mtime(),
            name.to_string_lossy()
        );
        lines.insert(name, printable(&line));
    }
    let mut text = format!("{}\n", printable(&path.display().to_string()));
    for line in lines.values() {
        text.push_str(line);
        text.push('\n');
    }
    Seen::Present(text)
}

/// The socket's file and those beside it: listed, and the record taken.
fn socket<W: Write>(archive: &mut Archive<W>, path: &Path) -> io::Result<()> {
    let beside = Beside::of(path);
    let mut text = String::new();
    for path in [
        path,
        &beside.record,
        &beside.lock,
        &beside.events,
        &beside.requests,
    ] {
        let said = match fs::symlink_metadata(path) {
            Ok(meta) => format!(
                "{:06o} {}:{} {} {}",
                meta.mode(),
                meta.uid(),
                meta.gid(),
                meta.size(),
                meta.mtime()
            ),
            Err(error) => error.to_string(),
        };
        let _ = writeln!(text, "{}: {said}", printable(&path.display().to_string()));
    }
    archive.add("socket/listing.txt", text.as_bytes())?;
    json_or_text(archive, "socket/shim.record", &beside.record)
}

fn cgroup_folder<W: Write>(archive: &mut Archive<W>, folder: &Path) -> io::Result<()> {
    let below = folder.strip_prefix("/").unwrap_or(folder);
    // Only plain names, so that the tar unpacks nowhere else.
    if below
        .components()
        .any(|part| !matches!(part, std::path::Component::Normal(_)))
    {
        archive.miss(&folder.display().to_string(), "is no plain path");
        return Ok(());
    }
    for name in CGROUP {
        match read(&folder.join(name)) {
            Seen::Present(bytes) => {
                archive.add(&format!("cgroup/{}/{name}", below.display()), &bytes)?;
            }
            Seen::Absent => {}
            Seen::Unknown(why) => archive.miss(&folder.join(name).display().to_string(), &why),
        }
    }
    Ok(())
}

fn lines_with<W: Write>(
    archive: &mut Archive<W>,
    name: &str,
    path: &Path,
    needle: &str,
) -> io::Result<()> {
    let found = read(path).map(|bytes| {
        let table = String::from_utf8_lossy(&bytes);
        let named = |line: &&str| line.contains(needle);
        table
            .lines()
            .filter(named)
            .map(|line| format!("{line}\n"))
            .collect::<String>()
    });
    text(archive, name, found)
}

/// The end of containerd's log, where it can be found.
fn log<W: Write>(
    archive: &mut Archive<W>,
    proc: &Proc,
    instance: Option<&Instance>,
) -> io::Result<()> {
    let daemon = instance.and_then(|instance| instance.daemon);
    let mut unit = USUAL_UNIT.to_owned();
    if let Some(daemon) = daemon {
        let link = proc.path(daemon.pid, "fd/2");
        let target = match fs::read_link(&link) {
            Ok(target) => target.display().to_string(),
            Err(error) => error.to_string(),
        };
        archive.add(
            "log/where.txt",
            format!("{}\n", printable(&target)).as_bytes(),
        )?;
        match within(move || tail(&link)) {
            Seen::Present(bytes) => return archive.add("log/containerd.txt", &bytes),
            // The journal, a terminal or a pipe: nothing that could be read without taking it.
            Seen::Absent => {}
            Seen::Unknown(why) => archive.miss("log/containerd.txt", &why),
        }
        if let Seen::Present(bytes) = read(&proc.path(daemon.pid, "cgroup"))
            && let Some(name) = unit_of(&String::from_utf8_lossy(&bytes))
        {
            unit = name;
        }
    }
    if !Path::new("/run/systemd/system").is_dir() {
        let why = "containerd's standard error is no file, and systemd does not run this machine";
        archive.miss("log/containerd.txt", why);
        return Ok(());
    }
    let arguments = [
        "--no-pager",
        "--output=short-iso-precise",
        "--lines",
        JOURNAL_LINES,
    ];
    let arguments: Vec<&str> = arguments.into_iter().chain(["--unit", &unit]).collect();
    // Lines of containerd are long; the journal gives the newest of them.
    match command::output("journalctl", &arguments, JOURNAL, LOG_TAIL * 8) {
        Seen::Present(bytes) => archive.add("log/journal.txt", &bytes),
        Seen::Absent => {
            archive.miss("log/journal.txt", "there is no journalctl in PATH");
            Ok(())
        }
        Seen::Unknown(why) => {
            archive.miss("log/journal.txt", &why);
            Ok(())
        }
    }
}

/// The end of the regular file that a descriptor leads to; *absent* when it leads elsewhere.
/// Opening any other kind could take part in what goes through it.
fn tail(link: &Path) -> Seen<Vec<u8>> {
    match fs::metadata(link) {
        Ok(meta) if meta.is_file() => {}
        Ok(_) => return Seen::Absent,
        Err(error) => return absent_or_unknown(&error),
    }
    let read = || -> io::Result<Vec<u8>> {
        let flags = nix::fcntl::OFlag::O_NONBLOCK.bits();
        let mut file = File::options().read(true).custom_flags(flags).open(link)?;
        let size = file.metadata()?.len();
        file.seek(SeekFrom::Start(size.saturating_sub(LOG_TAIL)))?;
        let mut bytes = Vec::new();
        file.take(LOG_TAIL).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    match read() {
        Ok(bytes) => Seen::Present(bytes),
        Err(error) => absent_or_unknown(&error),
    }
}

/// The systemd service that a process is in, from `/proc/<pid>/cgroup`.
fn unit_of(cgroups: &str) -> Option<String> {
    let memberships = parse_memberships(cgroups);
    let parts = memberships.iter().flat_map(|m| m.path.rsplit('/'));
    let mut services = parts.filter(|part| part.ends_with(".service") && !part.starts_with('-'));
    services.next().map(str::to_owned)
}

fn text<W: Write>(archive: &mut Archive<W>, name: &str, seen: Seen<String>) -> io::Result<()> {
    match seen {
        Seen::Present(text) => archive.add(name, text.as_bytes()),
        Seen::Absent => {
            archive.miss(name, "is not there");
            Ok(())
        }
        Seen::Unknown(why) => {
            archive.miss(name, &why);
            Ok(())
        }
    }
}

fn printable(text: &str) -> String {
    text.replace(char::is_control, "\u{fffd}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_unit_is_found_on_every_kind_of_hierarchy() {
        for (cgroups, unit) in [
            (
                "0::/system.slice/containerd.service\n",
                Some("containerd.service"),
            ),
            (
                "12:pids:/\n1:name=systemd:/system.slice/k3s.service\n0::/system.slice/k3s.service\n",
                Some("k3s.service"),
            ),
            (
                "0::/system.slice/docker.service/inner\n",
                Some("docker.service"),
            ),
            ("0::/user.slice/session-1.scope\n", None),
            ("", None),
        ] {
            assert_eq!(unit_of(cgroups).as_deref(), unit, "{cgroups:?}");
        }
    }

    #[test]
    fn a_log_is_cut_to_its_end_and_only_a_file_is_opened() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let mut content = vec![b'a'; 100];
        content.resize(100 + usize::try_from(LOG_TAIL).unwrap(), b'b');
        fs::write(&path, &content).unwrap();
        assert_eq!(tail(&path), Seen::Present(content[100..].to_vec()));
        assert_eq!(tail(dir.path()), Seen::Absent);
        let fifo = dir.path().join("fifo");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert_eq!(tail(&fifo), Seen::Absent);
    }

    #[test]
    fn a_listing_says_what_is_there_and_follows_nothing() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("rootfs")).unwrap();
        fs::write(dir.path().join("rootfs/inside"), "").unwrap();
        std::os::unix::fs::symlink("/etc/shadow", dir.path().join("work")).unwrap();
        let text = listing(dir.path()).present().cloned().unwrap();
        assert!(text.contains("work -> /etc/shadow") && text.contains("rootfs"));
        assert!(!text.contains("inside"));
        assert!(listing(&dir.path().join("none")).is_absent());
    }

    #[test]
    fn a_process_is_taken_without_its_environment() {
        let proc = Proc::new("/proc");
        let me = i32::try_from(std::process::id()).unwrap();
        let id = proc.stat(me).present().unwrap().id;
        let mut archive = Archive::new(Vec::new(), "dump".into(), 0);
        process(&mut archive, &proc, "shim", id).unwrap();
        let bytes = archive.finish().unwrap();
        let mut tar = tar::Archive::new(bytes.as_slice());
        let names: Vec<String> = tar
            .entries()
            .unwrap()
            .map(|entry| entry.unwrap().path().unwrap().display().to_string())
            .collect();
        for name in [
            "dump/shim/status",
            "dump/shim/cmdline",
            "dump/shim/threads.txt",
        ] {
            assert!(names.iter().any(|n| n == name), "{name} in {names:?}");
        }
        assert!(!names.iter().any(|name| name.contains("environ")));
    }
}

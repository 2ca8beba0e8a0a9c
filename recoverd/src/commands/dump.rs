//! `recoverd dump NS/ID`: one tar with all facts about a task, for a bug report.

use std::{
    fs::File,
    io::{self, IsTerminal, Write},
    os::unix::fs::OpenOptionsExt,
    path::Path,
    time::UNIX_EPOCH,
};

use recoverd_common::proc::Proc;

use super::{look, show};
use crate::{
    Failure, Verdict, cli,
    config::Config,
    correlate::Case,
    dump::{
        archive::Archive,
        collect,
        stack::{self, Outcome},
    },
    facts::{Api, Look},
    report::{Report, json},
};

/// A text that other commands make of the same look, as a file of the tar.
#[derive(Debug)]
struct Text {
    name: &'static str,
    content: String,
}

/// Looks and writes the tar. What was done to the shim is told on standard error.
pub fn run(args: &cli::Dump, global: &cli::Global, config: &Config) -> Result<Verdict, Failure> {
    let name = look::task_name(&args.task)?;
    let plan = look::plan(global, config);
    let narrow = look::narrow(global, &plan);
    let examined = look::examine(&plan, config)?;
    let cases = examined.cases(&plan);
    let report = Report::new(&examined, &cases, &narrow);
    let found = look::cases_named(&report, &name)?;
    let [case] = found.as_slice() else {
        let why = "several containerds have a task of that name: choose one with --address";
        return Err(Failure::Usage(why.into()));
    };
    let mut out = open(&args.output).map_err(|error| Failure::Usage(error.to_string()))?;
    let texts = [
        Text {
            name: "show.txt",
            content: show::text(&report, case),
        },
        Text {
            name: "scan.json",
            content: json::scan(&report),
        },
    ];
    let look = &examined.look;
    for line in write(&mut out, args.stack, look, case, &plan.roots.proc, &texts)? {
        // Whoever does not read standard error still gets the tar.
        let _ = writeln!(io::stderr(), "recoverd: {line}");
    }
    out.flush()?;
    Ok(Verdict::Clean)
}

/// Standard output, or a new file that only its owner may read. An existing file is not touched:
/// this runs as root, and a name may be mistyped.
fn open(path: &Path) -> io::Result<Box<dyn Write>> {
    let failed = |what: &str, error: io::Error| {
        io::Error::new(error.kind(), format!("{what} {}: {error}", path.display()))
    };
    if path == Path::new("-") {
        if io::stdout().is_terminal() {
            let why = "standard output is a terminal; name a file with -o";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, why));
        }
        return Ok(Box::new(io::BufWriter::new(io::stdout().lock())));
    }
    let file = File::options()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path);
    let file = file.map_err(|error| failed("create", error))?;
    Ok(Box::new(io::BufWriter::new(file)))
}

fn write(
    out: &mut dyn Write,
    stack: bool,
    look: &Look,
    case: &Case<'_>,
    proc_root: &Path,
    texts: &[Text],
) -> io::Result<Vec<String>> {
    let (namespace, id) = &case.name;
    let seconds = look
        .at
        .duration_since(UNIX_EPOCH)
        .map_or(0, |time| time.as_secs());
    // Both names were checked: letters, digits and single . _ -.
    let folder = format!("recoverd-dump-{namespace}-{id}");
    let mut archive = Archive::new(out, folder, seconds);
    archive.add("README.txt", readme(look, case).as_bytes())?;
    archive.add("case.txt", format!("{case:#?}\n").as_bytes())?;
    archive.add("node.txt", node(look).as_bytes())?;
    for text in texts {
        archive.add(text.name, text.content.as_bytes())?;
    }
    // First of all that takes time: the log is read afterwards, so it has what the shim wrote.
    let told = if stack {
        stacks(&mut archive, look, case, &Proc::new(proc_root))?
    } else {
        Vec::new()
    };
    collect::all(&mut archive, look, case, proc_root)?;
    archive.finish()?;
    Ok(told)
}

fn stacks<W: Write>(
    archive: &mut Archive<W>,
    look: &Look,
    case: &Case<'_>,
    proc: &Proc,
) -> io::Result<Vec<String>> {
    let Some(shim) = case.shim.process() else {
        archive.miss("stacks.txt", "no shim of the task was found");
        return Ok(vec!["no signal sent: no shim of the task was found".into()]);
    };
    let instance = case.instance.and_then(|at| look.instances.get(at));
    // Only one that is surely down does not read the fifo.
    let down = instance.is_some_and(|i| i.daemon.is_none() && matches!(i.api, Api::Down));
    let bundle = case.bundle.map(|bundle| bundle.path.as_path());
    let line = match stack::ask(proc, shim, case.kind(), bundle, !down) {
        Outcome::NotSent(why) => {
            archive.miss("stacks.txt", &why);
            format!("no signal sent to shim {}: {why}", shim.id.pid)
        }
        Outcome::ToContainerd => {
            let line = format!(
                "SIGUSR1 sent to shim {}: its stacks are in containerd's standard error (see log/ \
                 in the tar)",
                shim.id.pid
            );
            archive.add("stacks.txt", format!("{line}\n").as_bytes())?;
            line
        }
        Outcome::Caught(stacks) if stacks.is_empty() => {
            archive.miss("stacks.txt", "the shim wrote nothing");
            format!("SIGUSR1 sent to shim {}: it wrote nothing", shim.id.pid)
        }
        Outcome::Caught(stacks) => {
            archive.add("stacks.txt", &stacks)?;
            format!(
                "SIGUSR1 sent to shim {}: its stacks are in stacks.txt",
                shim.id.pid
            )
        }
    };
    Ok(vec![line])
}

fn readme(look: &Look, case: &Case<'_>) -> String {
    let (namespace, id) = &case.name;
    format!(
        "Task {namespace}/{id} on {}, kernel {}, looked at by recoverd {}.\n\n\
         case.txt       what belongs together\n\
         node.txt       the machine and its containerds\n\
         shim/ init/    from /proc; exec-<pid>/ likewise\n\
         bundle/ runc/  containerd's and runc's files\n\
         socket/        the shim's socket and what is beside it\n\
         cgroup/        the task's cgroups\n\
         log/           the end of containerd's log\n\
         missing.txt    what is not here, and why\n\n\
         Values of environment variables were left out. Arguments of processes and containerd's\n\
         log are as they were: read them before you pass this on.\n",
        look.host.name,
        look.host.kernel,
        env!("CARGO_PKG_VERSION"),
    )
}

fn node(look: &Look) -> String {
    let mut text = format!("{:#?}\n", look.host);
    for instance in &look.instances {
        let said = match &instance.api {
            Api::Up(api) => format!("up, {}", api.version),
            Api::Down => "down".into(),
            Api::Unknown(why) => format!("unknown: {why}"),
        };
        text.push_str(&format!(
            "containerd at {}: {said}; state {:?}, root {:?}, by {}, process {:?}\n",
            instance.address, instance.state, instance.root, instance.source, instance.daemon
        ));
    }
    for filesystem in &look.filesystems {
        text.push_str(&format!("{filesystem:?}\n"));
    }
    for gap in &look.gaps {
        text.push_str(&format!("not seen: {}: {}\n", gap.what, gap.why));
    }
    text
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_new_file_is_its_owners_alone_and_an_old_one_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("dump.tar");
        open(&path).unwrap().write_all(b"x").unwrap();
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let error = open(&path).err().unwrap().to_string();
        assert!(
            error.contains("dump.tar") && error.contains("create"),
            "{error}"
        );
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(dir.path().join("elsewhere"), &link).unwrap();
        assert!(open(&link).is_err() && !dir.path().join("elsewhere").exists());
    }
}

//! The containerd that is about to start: which release it is, and which of the living shims have
//! the task API that it speaks. Asks; judges and changes nothing.
//!
//! Nothing is guessed. Whoever starts pre-start names the program, or the unit that it is run by; a
//! program says itself which release it is. What is named by nobody, does not answer in time, or is
//! not for certain the containerd in question, is not known.

use std::{
    collections::BTreeMap,
    fs::File,
    io::Read,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use recoverd_common::{proc::ProcessId, seen::Seen, shim_client::ShimClient};

use super::downgrade::Suspect;
use crate::{
    facts::Instance,
    observe::{command, instances, unit},
    release::Release,
};

/// For `containerd --version`, which reads and starts nothing: 30 ms on an idle node. Where it is not
/// known nothing is replaced, so a disk that is busy gets its time.
const VERSION_WITHIN: Duration = Duration::from_secs(6);
/// Longest output of it that is read, bytes.
const MAX_VERSION: u64 = 4096;
/// For all shims to say which task API they have.
const SPOKEN_WITHIN: Duration = Duration::from_secs(2);

/// Who says what is about to start, as far as anybody does.
#[derive(Debug, Clone, Copy)]
pub struct Named<'a> {
    /// containerd's program, on the operator's word.
    pub program: Option<&'a Path>,
    /// The systemd unit that runs it.
    pub unit: Option<&'a str>,
}

/// The release that is about to start as `instance`. *Absent* when nobody names anything.
pub fn release(named: Named<'_>, instance: &Instance) -> Seen<Release> {
    let program = match (named.program, named.unit) {
        (Some(program), _) => Seen::Present(program.to_owned()),
        (None, Some(name)) => program_of_unit(name, instance),
        (None, None) => Seen::Absent,
    };
    program.and_then(|program| says(&program))
}

/// The program that the unit starts as `instance`.
fn program_of_unit(name: &str, instance: &Instance) -> Seen<PathBuf> {
    unit::command(name).and_then(|words| {
        let Some((program, arguments)) = words.split_first() else {
            return Seen::Unknown(format!("{name} starts nothing"));
        };
        let program = PathBuf::from(program);
        // Whatever else a unit may start, it is not for us to find out what it does with a word
        // that it may not know: `--version` given to a script could start a containerd.
        if program.file_name() != Some("containerd".as_ref()) {
            return Seen::Unknown(format!(
                "{name} starts {}, which is no containerd (--containerd names it)",
                program.display()
            ));
        }
        if let Err(why) = is_program(&program) {
            return Seen::Unknown(format!("{}: {why}", program.display()));
        }
        instances::address_of(arguments).and_then(|address| match instance.is(&address) {
            true => Seen::Present(program),
            false => Seen::Unknown(format!("{name} starts the containerd at {address}")),
        })
    })
}

/// An executable of its own, and no script.
fn is_program(path: &Path) -> Result<(), String> {
    const ELF: [u8; 4] = *b"\x7fELF";
    let mut magic = [0; ELF.len()];
    let read = File::open(path).and_then(|mut file| file.read_exact(&mut magic));
    read.map_err(|error| error.to_string())?;
    match magic == ELF {
        true => Ok(()),
        false => Err("is a script (--containerd names the program)".into()),
    }
}

/// What it says of itself.
fn says(program: &Path) -> Seen<Release> {
    let name = program.to_string_lossy();
    if !program.is_absolute() {
        return Seen::Unknown(format!("{name} is no absolute path"));
    }
    match command::output(&name, &["--version"], VERSION_WITHIN, MAX_VERSION) {
        Seen::Present(bytes) => {
            let text = String::from_utf8_lossy(&bytes);
            match Release::of_version_line(&text) {
                Some(release) => Seen::Present(release),
                None => {
                    let line = text.lines().next().unwrap_or_default();
                    Seen::Unknown(format!("{name} --version says {line:?}"))
                }
            }
        }
        Seen::Absent => Seen::Unknown(format!("there is no {name}")),
        Seen::Unknown(why) => Seen::Unknown(why),
    }
}

/// The lowest task API that each suspect has, as it says itself: the second is asked for first.
pub async fn spoken(suspects: &[Suspect]) -> BTreeMap<ProcessId, Seen<u8>> {
    let until = Instant::now() + SPOKEN_WITHIN;
    let asked: Vec<_> = suspects
        .iter()
        .cloned()
        .map(|suspect| {
            let shim = suspect.shim;
            (
                shim,
                tokio::task::spawn_blocking(move || ask(&suspect, until)),
            )
        })
        .collect();
    let mut spoken = BTreeMap::new();
    for (shim, answer) in asked {
        let answer = match answer.await {
            Ok(answer) => answer,
            // None is ever aborted: a panic of ours.
            Err(error) => std::panic::resume_unwind(error.into_panic()),
        };
        spoken.insert(shim, answer);
    }
    spoken
}

fn ask(suspect: &Suspect, until: Instant) -> Seen<u8> {
    let Some((namespace, id)) = suspect.tasks.first() else {
        return Seen::Absent;
    };
    let socket = Path::new(&suspect.socket);
    let said =
        ShimClient::connect(socket, namespace, until).and_then(|mut client| client.api_version(id));
    match said {
        Ok(version) => Seen::Present(version),
        Err(error) => Seen::Unknown(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::facts::fixture::instance;
    use std::{fs, os::unix::fs::PermissionsExt};

    #[test]
    fn a_program_says_its_release_and_nobody_is_believed_who_does_not() {
        let dir = tempfile::tempdir().unwrap();
        let says = |script: &str| {
            let path = dir.path().join("containerd");
            fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
            let named = Named {
                program: Some(&path),
                unit: None,
            };
            release(named, &instance(0))
        };
        let real = says("[ \"$1\" = --version ] && echo containerd containerd.io 1.7.27 abc");
        assert_eq!(real, Seen::Present(Release::parse("1.7.27").unwrap()));
        for script in [
            "",
            "echo hello",
            "echo containerd containerd.io 1.7.27; exit 1",
        ] {
            assert!(matches!(says(script), Seen::Unknown(_)), "{script}");
        }
        let nobody = Named {
            program: None,
            unit: None,
        };
        assert_eq!(release(nobody, &instance(0)), Seen::Absent);
        for path in ["containerd", "/no/such/containerd"] {
            let named = Named {
                program: Some(path.as_ref()),
                unit: None,
            };
            assert!(matches!(release(named, &instance(0)), Seen::Unknown(_)));
        }
    }

    #[test]
    fn a_script_is_never_run_on_the_word_of_a_unit() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("containerd");
        fs::write(&path, "#!/bin/sh\n").unwrap();
        assert!(is_program(&path).unwrap_err().contains("script"));
        assert!(is_program(&dir.path().join("none")).is_err());
        assert_eq!(is_program("/proc/self/exe".as_ref()), Ok(()));
    }
}

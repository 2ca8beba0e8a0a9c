//! A bundle says in a file where its shim listens: `address` for containerd 1.x, `bootstrap.json`
//! for 2.x. A containerd of the other generation, or a file that was emptied or lost, and the start
//! ends the workload of a healthy shim. Here is decided which file a bundle lacks, and written.
//!
//! Only what a shim itself proved is written: it answered at that address, for this task.

use std::{
    fs,
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use recoverd_common::{bundle::Bundle, failpoint, seen::Seen};

use crate::{
    correlate::{Case, Init, Kind},
    facts::address_of,
};

/// A file to be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Twin {
    /// Below the bundle.
    pub path: PathBuf,
    /// Its content, as whoever reads it wants it.
    pub content: String,
    /// Why, one line.
    pub why: &'static str,
}

/// What the bundle of a task lacks. Nothing unless its shim answers for it.
pub fn missing(case: &Case<'_>) -> Vec<Twin> {
    let (Some(bundle), Some(address)) = (case.bundle, &case.address) else {
        return Vec::new();
    };
    if !proven(case) || address.starts_with('@') || case.kind() == Some(Kind::Foreign) {
        return Vec::new();
    }
    let mut twins = Vec::new();
    // A shim of 2.x that speaks the third API only is of no use to 1.x, wherever it finds it.
    let speaks_second =
        case.kind() == Some(Kind::Ours) || case.answer.and_then(|answer| answer.api) == Some(2);
    let named = |text: &str| address_of(text) == *address;
    let plain = bundle.address.present().is_some_and(|text| named(text));
    if speaks_second && !plain {
        twins.push(Twin {
            path: bundle.path.join("address"),
            content: format!("unix://{address}"),
            why: "containerd 1.x finds no shim without it",
        });
    }
    if let Some(why) = bootstrap_lacks(bundle, &named, plain || speaks_second) {
        let version = if speaks_second { 2 } else { 3 };
        let json = serde_json::json!({
            "version": version,
            "address": format!("unix://{address}"),
            "protocol": "ttrpc",
        });
        twins.push(Twin {
            path: bundle.path.join("bootstrap.json"),
            content: json.to_string(),
            why,
        });
    }
    twins
}

/// The shim speaks for this very task.
pub fn proven(case: &Case<'_>) -> bool {
    let Some(state) = case.state() else {
        return false;
    };
    let listens = case.shim.process().is_some_and(|shim| {
        case.address
            .as_ref()
            .is_some_and(|address| shim.listens.contains(address))
    });
    listens
        && match &case.init {
            Init::Alive(id) => state.pid == id.pid.unsigned_abs(),
            Init::None | Init::Dead(..) | Init::Unknown(_) => false,
        }
}

fn bootstrap_lacks(
    bundle: &Bundle,
    named: &dyn Fn(&str) -> bool,
    address_will_do: bool,
) -> Option<&'static str> {
    match &bundle.bootstrap {
        Seen::Present(bootstrap) if named(&bootstrap.address) => None,
        Seen::Present(_) => Some("it names another address than the one where the shim listens"),
        Seen::Unknown(_) => Some("containerd 2.x cannot read the one that is there"),
        // Then 2.x reads `address`, and writes this file itself.
        Seen::Absent if address_will_do => None,
        Seen::Absent => Some("containerd 2.x finds no shim without it"),
    }
}

/// Writes it whole, beside, and renames it: whoever reads sees the old file or the new one.
pub fn write(twin: &Twin) -> io::Result<()> {
    let beside = beside(&twin.path);
    // A run that was killed half-way left it.
    match fs::remove_file(&beside) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        Ok(()) | Err(_) => {}
    }
    let mut file = fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        // As containerd's own.
        .mode(0o644)
        .custom_flags(libc::O_NOFOLLOW)
        .open(&beside)?;
    failpoint!("prestart.twin.opened");
    file.write_all(twin.content.as_bytes())?;
    drop(file);
    failpoint!("prestart.twin.written");
    fs::rename(&beside, &twin.path)?;
    failpoint!("prestart.twin.after");
    Ok(())
}

fn beside(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".recoverd");
    name.into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        correlate::correlate,
        facts::{
            Look,
            fixture::{SOCKET, SOCKET_DIR, healthy},
        },
    };
    use recoverd_common::bundle::Bootstrap;

    fn written(look: &Look) -> Vec<(String, String)> {
        let cases = correlate(look, SOCKET_DIR.as_ref());
        let twins = cases.cases.iter().flat_map(missing);
        let name = |path: PathBuf| path.file_name().unwrap().to_str().unwrap().to_owned();
        twins.map(|twin| (name(twin.path), twin.content)).collect()
    }

    fn bootstrap(address: &str, version: i32) -> Seen<Bootstrap> {
        Seen::Present(Bootstrap {
            version,
            address: format!("unix://{address}"),
            protocol: "ttrpc".into(),
        })
    }

    fn healthy_with(change: impl Fn(&mut Bundle), api: u8) -> Look {
        let mut look = healthy();
        change(&mut look.bundles[0].bundle);
        for answer in look.answers.values_mut() {
            answer.api = Some(api);
        }
        look
    }

    #[test]
    fn each_generation_gets_what_it_reads() {
        let plain = ("address".to_owned(), format!("unix://{SOCKET}"));
        let old_only = healthy_with(
            |bundle| {
                bundle.address = Seen::Present(format!("unix://{SOCKET}"));
                bundle.bootstrap = Seen::Absent;
            },
            2,
        );
        assert!(written(&old_only).is_empty(), "2.x reads address too");
        let new_only = healthy_with(
            |bundle| {
                bundle.address = Seen::Absent;
                bundle.bootstrap = bootstrap(SOCKET, 2);
            },
            2,
        );
        assert_eq!(written(&new_only), std::slice::from_ref(&plain));
        let third = healthy_with(
            |bundle| {
                bundle.address = Seen::Absent;
                bundle.bootstrap = bootstrap(SOCKET, 3);
            },
            3,
        );
        assert!(written(&third).is_empty(), "1.x cannot talk to it anyway");
        let broken = healthy_with(
            |bundle| {
                bundle.address = Seen::Absent;
                bundle.bootstrap = Seen::Unknown("cut".into());
            },
            2,
        );
        let files = written(&broken);
        assert_eq!(files[0], plain);
        assert!(files[1].1.contains(r#""version":2"#), "{files:?}");
        let elsewhere = healthy_with(
            |bundle| {
                bundle.address = Seen::Present("unix:///elsewhere".into());
                bundle.bootstrap = Seen::Absent;
            },
            2,
        );
        assert_eq!(written(&elsewhere), [plain]);
    }

    #[test]
    fn nothing_is_written_for_a_task_whose_shim_said_nothing() {
        let mut look = healthy_with(|bundle| bundle.address = Seen::Absent, 2);
        assert!(!written(&look).is_empty());
        look.answers.clear();
        assert!(written(&look).is_empty());
    }

    #[test]
    fn a_file_is_replaced_whole_and_a_leftover_is_no_hindrance() {
        let dir = tempfile::tempdir().unwrap();
        let twin = Twin {
            path: dir.path().join("address"),
            content: "unix:///x".into(),
            why: "test",
        };
        fs::write(&twin.path, "").unwrap();
        fs::write(beside(&twin.path), "half").unwrap();
        write(&twin).unwrap();
        assert_eq!(fs::read_to_string(&twin.path).unwrap(), "unix:///x");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}

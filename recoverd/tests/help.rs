//! What `--help` prints is an interface: change it freely, but on purpose.
//! `RECOVERD_BLESS=1 cargo test -p recoverd --test help` writes the files anew.

use std::{fs, path::Path, process::Command};

fn check(name: &str, args: &[&str]) {
    let output = Command::new(env!("CARGO_BIN_EXE_recoverd"))
        .args(args)
        .output()
        .unwrap();
    assert!(
        output.status.success() && output.stderr.is_empty(),
        "{args:?}: {output:?}"
    );
    let printed = String::from_utf8(output.stdout).unwrap();
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden")
        .join(name);
    if std::env::var_os("RECOVERD_BLESS").is_some() {
        fs::write(&path, &printed).unwrap();
    }
    let kept = fs::read_to_string(&path).unwrap_or_default();
    assert_eq!(printed, kept, "{} differs", path.display());
}

#[test]
fn help_of_every_command_is_what_was_agreed() {
    check("help.txt", &["--help"]);
    for command in [
        "scan",
        "show",
        "preflight",
        "dump",
        "adopt",
        "pre-start",
        "post-start",
        "supervise",
        "upgrade",
        "repair",
        "history",
        "explain",
        "config",
    ] {
        check(&format!("help-{command}.txt"), &[command, "--help"]);
    }
}

#[test]
fn every_usage_error_is_one_line_and_exits_2() {
    for args in [
        &[][..],
        &["scan", "--min-age", "-1s"],
        &["scan", "--min-age", "9x"],
        &["--color"],
        &["show"],
        &["show", "a/b/c"],
        &["show", "../x"],
        &["preflight", "--to", "banana"],
        &["repair", "--only", "no-such-code"],
        &["upgrade"],
        &["upgrade", "--all", "k8s.io/c"],
        &["upgrade", "not-a-task"],
        &["upgrade", "--check", "--dry-run"],
        &["repair", "--allow", "everything"],
        &["history", "--since", "yesterday"],
        &["history", "--limit", "-1"],
        &["adopt", "nonsense"],
        &["pre-start", "--deadline", "20"],
        &["post-start", "--output", "text"],
        &["explain", "no\u{1b}[31msuch"],
        &["--address", "/run/c.sock"],
    ] {
        let output = Command::new(env!("CARGO_BIN_EXE_recoverd"))
            .args(args)
            .output()
            .unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{args:?}: {said}");
        assert_eq!(said.trim_end().lines().count(), 1, "{args:?}: {said}");
        assert!(
            said.starts_with("recoverd: ") && !said.contains('\u{1b}'),
            "{args:?}: {said:?}"
        );
        assert!(output.stdout.is_empty(), "{args:?}");
    }
}

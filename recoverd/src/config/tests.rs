use std::fs;

use clap::Parser;

use super::*;
use crate::cli::Cli;

fn global(flags: &[&str]) -> Global {
    let words = ["recoverd"].iter().chain(flags).chain(&["config"]);
    Cli::try_parse_from(words).unwrap().global
}

fn read(text: &str) -> Result<Config, ConfigError> {
    let mut config = Config::default();
    let file = Path::new("/etc/recoverd/config.toml");
    config.origin.file = Some(file.to_owned());
    config.origin.found = true;
    config.read(file, text)?;
    Ok(config)
}

const FULL: &str = r#"
    socket-dir = "/a/s"
    runc-root = "/a/runc"
    run-dir = "/a/run"
    history = "/a/history.jsonl"
    proc = "/a/proc"
    cgroup = "/a/cgroup"
    fifo-dir = "/a/fifo"
    color = "never"

    [[containerd]]
    address = "/a/containerd.sock"
    state = "/a/state"
    root = "/a/root"
    [[containerd]]
    address = "/b/containerd.sock"

    [scan]
    shim-deadline = "200ms"
    budget = "10m"
    min-age = "0s"
    settle = "90s"
    second-look = "1s"
    run-full = 80

    [adopt]
    binary = "/a/shim"
    deadline = "9s"

    [pre-start]
    foreign = true
    deadline = "45s"

    [repair]
    max-actions = 7

    [supervise]
    metrics-listen = "127.0.0.1:9464"
    textfile = "/a/recoverd.prom"
"#;

#[test]
fn every_key_is_read_and_what_is_printed_reads_back_the_same() {
    let config = read(FULL).unwrap();
    assert_eq!(config.scan.shim_deadline, Duration::from_millis(200));
    assert_eq!((config.scan.run_full, config.color), (80, Color::Never));
    assert_eq!(config.containerd.len(), 2);
    assert!(config.pre_start.foreign);
    for key in KEYS {
        assert_ne!(
            (key.show)(&config),
            (key.show)(&Config::default()),
            "the test's file sets {} to its default",
            key.full()
        );
    }
    let printed = config.to_string();
    let mut again = read(&printed).unwrap();
    assert_eq!(again.containerd.len(), 2);
    again.origin = config.origin.clone();
    for (new, old) in again.containerd.iter_mut().zip(&config.containerd) {
        new.line = old.line;
    }
    assert_eq!(again, config);
    assert!(read(&Config::default().to_string()).is_ok());
}

#[test]
fn each_value_says_where_it_comes_from() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("config.toml");
    let name = file.to_str().unwrap();
    fs::write(&file, "color = \"always\"\n[scan]\nbudget = \"30s\"\n").unwrap();
    let flags = ["--config", name, "--run-dir", "/x", "--address", "/y"];
    let printed = Config::load(&global(&flags)).unwrap().to_string();
    let line = |key: &str| {
        let start = format!("{key} = ");
        let line = printed.lines().find(|line| line.starts_with(&start));
        line.unwrap().to_owned()
    };
    assert!(line("color").ends_with(&format!("# {name}:1")));
    assert!(line("budget").ends_with(&format!("# {name}:3")));
    assert!(line("run-dir").ends_with("# flag --run-dir"));
    assert!(line("settle").ends_with("# default"));
    assert!(printed.contains("# flag --address /y: only this containerd"));
}

#[test]
fn a_bad_file_is_refused_in_one_line_that_names_line_key_and_what_is_allowed() {
    for (text, line, words) in [
        ("\nsocketdir = \"/x\"", 2, ["socketdir", "socket-dir"]),
        ("socket-dir = \"x\"", 1, ["socket-dir", "absolute path"]),
        ("socket-dir = 1", 1, ["socket-dir", "absolute path"]),
        ("proc = \"/a\\nb\"", 1, ["proc", "absolute path"]),
        ("color = \"pink\"", 1, ["color", "\"never\""]),
        ("scan = 1", 1, ["scan", "table"]),
        ("[scan]\nbudget = 20", 2, ["scan.budget", "from 1s to 10m"]),
        ("[scan]\n\nbudget = \"11m\"", 3, ["scan.budget", "10m"]),
        (
            "[scan]\nshim-deadline = \"199ms\"",
            2,
            ["shim-deadline", "200ms"],
        ),
        (
            "[scan]\nbudget = \"1s\"",
            2,
            ["scan.budget", "shim-deadline, 2s"],
        ),
        (
            "[scan]\nshim-deadline = \"30s\"",
            2,
            ["budget", "shim-deadline, 30s"],
        ),
        ("[scan]\nrun-full = 0", 2, ["scan.run-full", "1 to 100"]),
        (
            "[scan]\nrun-full = 99999999999999999999",
            2,
            ["run-full", "100"],
        ),
        (
            "[scan]\nrun-full = 9.5",
            2,
            ["scan.run-full", "whole number"],
        ),
        ("[scan]\nfast = true", 2, ["scan.fast", "run-full"]),
        (
            "[pre-start]\nforeign = \"yes\"",
            2,
            ["foreign", "true or false"],
        ),
        ("[prestart]\nforeign = true", 1, ["prestart", "[pre-start]"]),
        ("[supervisor]", 1, ["supervisor", "[supervise]"]),
        ("containerd = 3", 1, ["containerd", "[[containerd]]"]),
        ("containerd = [3]", 1, ["containerd", "[[containerd]]"]),
        (
            "[[containerd]]\nstate = \"/x\"",
            1,
            ["containerd.address", "given"],
        ),
        (
            "[[containerd]]\nadress = \"/x\"",
            2,
            ["containerd.adress", "address"],
        ),
        (
            "[[containerd]]\naddress = \"x\"",
            2,
            ["containerd.address", "absolute"],
        ),
        (
            "[[containerd]]\naddress = \"/x\"\n[[containerd]]\naddress = \"/x\"",
            3,
            ["containerd.address", "twice"],
        ),
        (
            "color = \"auto\"\ncolor = \"auto\"",
            2,
            ["color", "duplicate"],
        ),
        ("a\n= 1", 1, ["config.toml:1", ""]),
        ("\n\n[scan", 3, ["config.toml:3", ""]),
    ] {
        let error = read(text).unwrap_err();
        let ConfigError::Line { line: found, .. } = &error else {
            panic!("{text:?}: {error}");
        };
        let said = error.to_string();
        assert_eq!(*found, line, "{text:?}: {said}");
        assert!(!said.contains('\n'), "{text:?}: {said}");
        for word in words {
            assert!(said.contains(word), "{text:?} should say {word:?}: {said}");
        }
    }
}

#[test]
fn a_file_that_was_asked_for_must_be_there_and_be_a_regular_one() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    fs::write(at("real"), "").unwrap();
    std::os::unix::fs::symlink(at("real"), at("link")).unwrap();
    nix::unistd::mkfifo(at("fifo").as_str(), nix::sys::stat::Mode::S_IRWXU).unwrap();
    fs::write(at("latin"), b"\xe4").unwrap();
    fs::write(at("large"), " ".repeat(300 << 10)).unwrap();
    assert!(Config::load(&global(&["--config", &at("real")])).is_ok());
    for name in ["none", "link", "fifo", "latin", "large", "."] {
        let error = Config::load(&global(&["--config", &at(name)])).unwrap_err();
        assert!(matches!(error, ConfigError::File { .. }), "{name}: {error}");
        assert!(error.to_string().contains(dir.path().to_str().unwrap()));
    }
}

#[test]
fn the_key_that_a_missing_shim_is_told_to_set_is_one() {
    let key = crate::adopt::run::KEY;
    let known: Vec<String> = KEYS.iter().map(Key::full).collect();
    assert!(known.iter().any(|known| known == key), "{known:?}");
    let missing = crate::adopt::run::find_binary(Some("/no/such".as_ref())).unwrap_err();
    assert_eq!(missing, format!("{key} /no/such: no executable file"));
}

#[test]
fn flags_hold_over_the_file_and_must_be_absolute() {
    let load = |flags: &[&str]| {
        let mut config = Config::default();
        config.apply_flags(&global(flags)).map(|()| config)
    };
    let config = load(&["--socket-dir", "/x/s"]).unwrap();
    assert_eq!(config.socket_dir, Path::new("/x/s"));
    let error = load(&["--runc-root", "here"]).unwrap_err();
    let said = "flag --runc-root: here is not allowed; must be an absolute path";
    assert_eq!(error.to_string(), said);
    assert!(load(&["--state", "x"]).is_err());
}

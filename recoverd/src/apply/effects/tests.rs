//! What is not, or not any more, what the step names is left alone.

use std::os::unix::fs::symlink;

use recoverd_common::proc::Proc;

use super::*;
use crate::{
    history::History, lock, observe::Roots, permit::Permits, permit::Word, plan::Requirement,
};

/// Calls `with` with hands that may do everything, whose files are in a folder of their own.
fn with_hands(with: impl FnOnce(&Hands<'_>, &Path)) {
    let dir = tempfile::tempdir().unwrap();
    let lock = lock::take(&dir.path().join("run"), "repair").unwrap();
    let hands = Hands {
        permits: &Permits::of(&[Word::Kill, Word::Delete]),
        history: &History::new(&dir.path().join("history.jsonl"), "repair"),
        runtime: &tokio::runtime::Runtime::new().unwrap(),
        proc: Proc::new("/proc"),
        roots: Roots {
            proc: "/proc".into(),
            cgroup: "/sys/fs/cgroup".into(),
            socket_dir: dir.path().to_owned(),
            runc_root: dir.path().to_owned(),
            fifo_dir: dir.path().to_owned(),
            run_dir: dir.path().to_owned(),
        },
        shim: Err("none".into()),
        _lock: &lock,
    };
    with(&hands, dir.path());
}

fn file(path: &Path) -> FileId {
    *FileId::of_entry(path).present().unwrap()
}

#[test]
fn a_process_that_took_the_number_of_another_is_not_ended() {
    with_hands(|hands, _| {
        let mut child = std::process::Command::new("sleep")
            .arg("300")
            .spawn()
            .unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        let id = hands.proc.stat(pid).present().unwrap().id;
        let earlier = ProcessId {
            start_time: id.start_time.saturating_sub(1),
            ..id
        };
        let permit = hands.permits.kill().unwrap();
        let refused = end(earlier, hands, permit);
        assert!(matches!(refused, Err(NotDone::Changed(_))), "{refused:?}");
        assert_eq!(child.try_wait().unwrap(), None, "a stranger was ended");
        let done = end(id, hands, permit).unwrap();
        assert_eq!(done, format!("{pid} ended by SIGTERM"));
        child.wait().unwrap();
        assert!(matches!(end(id, hands, permit), Err(NotDone::Changed(_))));
    });
}

#[test]
fn a_containerd_that_does_not_listen_yet_is_not_down() {
    use std::{os::unix::process::CommandExt, process::Command};
    with_hands(|hands, dir| {
        let address = dir.join("containerd.sock").display().to_string();
        let down = Requirement::Down(address.clone());
        assert_eq!(checks::holds(&down, hands), Ok(()));
        // By its name and its arguments it is one; it waits until its stdin ends.
        let mut starting = Command::new("sh")
            .arg0("containerd")
            .args(["-c", "read line", "--address", &address])
            .stdin(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let pid = starting.id().to_string();
        let why = checks::holds(&down, hands).unwrap_err();
        assert!(why.starts_with(&pid), "{why}");
        drop(starting.stdin.take());
        starting.wait().unwrap();
        assert_eq!(checks::holds(&down, hands), Ok(()));
    });
}

#[test]
fn a_tree_is_removed_without_following_links_and_only_if_it_is_the_one() {
    with_hands(|hands, dir| {
        let permit = hands.permits.delete().unwrap();
        let (tree, precious) = (dir.join("tree"), dir.join("precious"));
        fs::create_dir_all(tree.join("a/b")).unwrap();
        fs::create_dir(&precious).unwrap();
        fs::write(precious.join("file"), "").unwrap();
        symlink(&precious, tree.join("a/link")).unwrap();
        let other = file(&precious);
        let refused = remove_tree(&tree, other, permit);
        assert!(matches!(refused, Err(NotDone::Changed(_))), "{refused:?}");
        assert!(tree.join("a/b").exists());
        let which = file(&tree);
        remove_tree(&tree, which, permit).unwrap();
        assert!(!tree.exists() && precious.join("file").exists());
        // Done already is as good.
        remove_tree(&tree, which, permit).unwrap();
        // A link in its place, of whatever number, is no folder.
        symlink(&precious, &tree).unwrap();
        let refused = remove_tree(&tree, file(&tree), permit);
        assert!(matches!(refused, Err(NotDone::Changed(_))), "{refused:?}");
        // A folder that became a link is not gone through.
        let inside = tree.join("file");
        let refused = remove_file(&inside, file(&inside), SFlag::S_IFREG);
        assert!(matches!(refused, Err(NotDone::Failed(_))), "{refused:?}");
        assert!(precious.join("file").exists());
    });
}

#[test]
fn only_fifos_are_removed_from_a_folder_of_fifos() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("1");
    let make = |name: &str| {
        nix::unistd::mkfifo(&folder.join(name), Mode::S_IRWXU).unwrap();
    };
    fs::create_dir(&folder).unwrap();
    make("a-stdout");
    fs::write(folder.join("a-stderr"), "mine").unwrap();
    let names: Vec<String> = ["a-stdin", "a-stdout", "a-stderr"].map(String::from).into();
    let refused = remove_fifos(&folder, file(&folder), &names);
    assert!(matches!(refused, Err(NotDone::Changed(_))), "{refused:?}");
    assert!(folder.join("a-stderr").exists());
    make("a-stdout");
    let said = remove_fifos(&folder, file(&folder), &names[..2]).unwrap();
    assert!(said.contains("other files keep the folder"), "{said}");
    assert!(!folder.join("a-stdout").exists());
    fs::remove_file(folder.join("a-stderr")).unwrap();
    remove_fifos(&folder, file(&folder), &names).unwrap();
    assert!(!folder.exists());
}

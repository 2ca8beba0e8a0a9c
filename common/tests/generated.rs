//! `common/src/pb` is generated from `common/proto` and committed, so that a build needs no
//! protoc. This test fails when the two differ; `RECOVERD_BLESS=1 cargo test -p recoverd-common
//! --test generated` writes the files anew.

use std::{fs, path::Path};

#[test]
fn the_committed_messages_are_what_the_proto_files_say() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let proto = root.join("proto");
    let mut files: Vec<_> = fs::read_dir(&proto)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|e| e == "proto"))
        .collect();
    files.sort();
    let set = protox::compile(&files, [&proto]).unwrap();
    let out = tempfile::tempdir().unwrap();
    prost_build::Config::new()
        .out_dir(out.path())
        .compile_fds(set)
        .unwrap();
    let committed = root.join("src/pb");
    for entry in fs::read_dir(out.path()).unwrap() {
        let entry = entry.unwrap();
        let fresh = fs::read_to_string(entry.path()).unwrap();
        let path = committed.join(entry.file_name());
        if std::env::var_os("RECOVERD_BLESS").is_some() {
            fs::create_dir_all(&committed).unwrap();
            fs::write(&path, &fresh).unwrap();
        }
        let kept = fs::read_to_string(&path).unwrap_or_default();
        assert_eq!(
            fresh,
            kept,
            "{} differs: see the head of this file",
            path.display()
        );
    }
}

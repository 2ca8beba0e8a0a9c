//! The commands that findings recommend, as somebody types them. Pure.

use crate::{facts::TaskName, findings::Code, permit::Word};

/// Starts our shim for a task.
pub(super) fn adopt(name: &TaskName) -> String {
    format!("recoverd adopt {}/{}", name.0, name.1)
}

/// Has a shim of ours become the installed one.
pub(super) fn upgrade(name: Option<&TaskName>) -> String {
    match name {
        Some(name) => format!("recoverd upgrade {}/{}", name.0, name.1),
        None => "recoverd upgrade --all".to_owned(),
    }
}

/// Mends what is wrong with one task.
pub(super) fn repair_task(name: &TaskName, needs: Option<Word>) -> String {
    repair(&format!("{}/{}", name.0, name.1), needs)
}

/// Mends everything of one kind: where the subject is no task.
pub(super) fn repair_all(code: Code, needs: Option<Word>) -> String {
    repair(code.word(), needs)
}

fn repair(only: &str, needs: Option<Word>) -> String {
    let allow = needs.map_or_else(String::new, |word| format!(" --allow {}", word.word()));
    format!("recoverd repair --apply{allow} --only {only}")
}

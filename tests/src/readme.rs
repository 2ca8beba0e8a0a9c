//! What the README tells an operator to write and to type: tests do it as it stands there.

use std::fs;
use std::path::Path;

/// The first block of that language (`sh`, `toml`, `json`) below a line that begins like this.
#[track_caller]
pub fn readme(above: &str, language: &str) -> String {
    let text = text();
    let start = format!("```{language}\n");
    let found = text
        .split_once(&format!("\n{above}"))
        .and_then(|(_, rest)| rest.split_once(&start)?.1.split_once("```"))
        .unwrap_or_else(|| panic!("the README has no {language} below {above:?}"));
    found.0.to_owned()
}

/// The words between these two.
#[track_caller]
pub fn readme_words(before: &str, after: &str) -> String {
    let text = text();
    let found = text
        .split_once(before)
        .and_then(|(_, rest)| rest.split_once(after));
    let found = found.unwrap_or_else(|| panic!("the README has no {before:?}"));
    found.0.to_owned()
}

#[track_caller]
fn text() -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../README.md");
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("read {}: {error}", path.display()))
}

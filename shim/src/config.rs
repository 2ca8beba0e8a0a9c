//! The part of a bundle's `config.json` that the shim itself needs.

use std::path::Path;

use recoverd_common::{
    read::{MAX_FILE, read_file},
    seen::Seen,
};
use serde::Deserialize;

/// `config.json`, as far as it matters here.
#[derive(Deserialize)]
pub struct Config {
    linux: Option<Linux>,
}
#[derive(Deserialize)]
struct Linux {
    #[serde(default)]
    namespaces: Option<Vec<NamespaceEntry>>,
    resources: Option<Resources>,
}
#[derive(Deserialize)]
struct NamespaceEntry {
    #[serde(rename = "type")]
    kind: String,
    #[serde(default)]
    path: String,
}
#[derive(Deserialize)]
struct Resources {
    memory: Option<Memory>,
}
#[derive(Deserialize)]
struct Memory {
    limit: Option<i64>,
}

impl Config {
    /// Reads the one in `bundle`.
    pub fn read(bundle: &Path) -> Result<Self, String> {
        let path = bundle.join("config.json");
        let why = match read_file(&path, MAX_FILE) {
            Seen::Present(bytes) => match serde_json::from_slice(&bytes) {
                Ok(config) => return Ok(config),
                Err(e) => e.to_string(),
            },
            Seen::Absent => "does not exist".to_owned(),
            Seen::Unknown(why) => why,
        };
        Err(format!("read {}: {why}", path.display()))
    }

    /// A pid namespace of its own: it ends with the init.
    pub fn private_pids(&self) -> bool {
        self.linux
            .iter()
            .flat_map(|linux| linux.namespaces.iter().flatten())
            .any(|entry| entry.kind == "pid" && entry.path.is_empty())
    }

    /// Of the container, bytes.
    pub fn memory_limit(&self) -> Option<u64> {
        let memory = self.linux.as_ref()?.resources.as_ref()?.memory.as_ref()?;
        u64::try_from(memory.limit?).ok().filter(|limit| *limit > 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(text: &str) -> Result<Config, String> {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("config.json"), text).unwrap();
        Config::read(dir.path())
    }

    #[test]
    fn a_pid_namespace_is_private_unless_it_has_a_path() {
        let with = |namespaces: &str| {
            config(&format!("{{\"linux\": {{\"namespaces\": {namespaces}}}}}"))
                .unwrap()
                .private_pids()
        };
        assert!(with("[{\"type\": \"mount\"}, {\"type\": \"pid\"}]"));
        assert!(!with("[{\"type\": \"pid\", \"path\": \"/proc/1/ns/pid\"}]"));
        assert!(!with("null"));
        assert!(!config("{}").unwrap().private_pids());
    }

    #[test]
    fn a_limit_is_one_only_when_positive() {
        let with = |limit: &str| {
            let text =
                format!("{{\"linux\":{{\"resources\":{{\"memory\":{{\"limit\":{limit}}}}}}}}}");
            config(&text).unwrap().memory_limit()
        };
        assert_eq!(with("8000000"), Some(8_000_000));
        assert_eq!(with("-1"), None);
        assert_eq!(with("null"), None);
    }

    #[test]
    fn what_cannot_be_read_is_named() {
        for text in ["", "[]", "{\"linux\": 3}"] {
            assert!(config(text).err().unwrap().contains("config.json: "));
        }
        let why = Config::read(Path::new("/no/bundle")).err().unwrap();
        assert_eq!(why, "read /no/bundle/config.json: does not exist");
    }
}

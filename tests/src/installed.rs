//! A shim installed on a node at a place of its own, where a test replaces it as a package does.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use crate::container::Container;
use crate::node::Node;
use crate::releases::built;

const NAME: &str = "containerd-shim-recoverd-v1";
/// Our shim's version.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");
/// What a copy calls itself that is another version and the same otherwise; as long as the true one.
pub const OTHER: &str = "9.8.7";

/// This program of ours as another version.
#[track_caller]
pub fn as_version(program: &[u8], version: &str) -> Vec<u8> {
    assert_eq!(VERSION.len(), version.len());
    let mut bytes = program.to_vec();
    let places: Vec<usize> = (0..bytes.len() - VERSION.len())
        .filter(|at| bytes[*at..].starts_with(VERSION.as_bytes()))
        .collect();
    for at in places {
        bytes[at..at + version.len()].copy_from_slice(version.as_bytes());
    }
    bytes
}

/// The shim of one node.
pub struct Installed {
    path: PathBuf,
    original: Vec<u8>,
}

impl Installed {
    /// The true one.
    #[track_caller]
    pub fn on(node: &Node) -> Installed {
        Installed::copy_of(node, &built(NAME))
    }

    /// One that was built otherwise.
    #[track_caller]
    pub fn copy_of(node: &Node, shim: &Path) -> Installed {
        let original = fs::read(shim).unwrap_or_else(|e| panic!("read {}: {e}", shim.display()));
        let installed = Installed {
            path: node.folder().join(NAME),
            original,
        };
        installed.put(&installed.original);
        installed
    }

    /// A container that it runs.
    pub fn container(&self, id: &str) -> Container {
        Container::new(id).runtime(&self.path)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Installs it as this version.
    #[track_caller]
    pub fn install(&self, version: &str) {
        self.put(&as_version(&self.original, version));
    }

    /// Installs something else in its place; replaced as a package manager does it.
    #[track_caller]
    pub fn put(&self, bytes: &[u8]) {
        let new = self.path.with_extension("new");
        let put = || {
            fs::write(&new, bytes)?;
            fs::set_permissions(&new, fs::Permissions::from_mode(0o755))?;
            fs::rename(&new, &self.path)
        };
        put().unwrap_or_else(|e| panic!("install {}: {e}", self.path.display()));
    }
}

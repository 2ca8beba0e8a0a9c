//! Loop devices: the machine's, which its nodes share.

use std::fs;
use std::path::{Path, PathBuf};

use crate::releases::cache;

/// Whether the machine gives any; why not.
pub(crate) fn available() -> Result<(), String> {
    match fs::read_to_string(cache().join("loop-devices.unavailable")) {
        Ok(why) => Err(why.trim().to_owned()),
        Err(_) => Ok(()),
    }
}

/// A device that shows a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoopDevice {
    /// `/dev/loopN`.
    pub path: PathBuf,
    /// Nobody can write it.
    pub read_only: bool,
}

impl LoopDevice {
    /// Every device that shows this file, whose path is nobody else's.
    pub fn all_of(image: &Path) -> Vec<LoopDevice> {
        let Ok(all) = fs::read_dir("/sys/block") else {
            return Vec::new();
        };
        let mut found = Vec::new();
        for block in all.flatten() {
            let word = |name: &str| fs::read_to_string(block.path().join(name));
            // There only while it shows something.
            if word("loop/backing_file").is_ok_and(|file| Path::new(file.trim_end()) == image) {
                found.push(LoopDevice {
                    path: Path::new("/dev").join(block.file_name()),
                    read_only: word("ro").is_ok_and(|word| word.trim() == "1"),
                });
            }
        }
        found
    }
}

//! The mount table, `/proc/<pid>/mountinfo`.

use std::{
    ffi::OsString,
    os::unix::ffi::OsStringExt,
    path::{Path, PathBuf},
};

use crate::{read::read_file, seen::Seen};

/// One mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// The kernel's number for it. A later mount at the same place has another.
    pub id: u64,
    /// Where.
    pub point: PathBuf,
    /// File system type, `overlay`.
    pub kind: String,
    /// What the file system calls its source.
    pub source: String,
}

/// Parses mountinfo; lines of another form are skipped.
pub fn parse(bytes: &[u8]) -> Vec<Mount> {
    bytes
        .split(|b| *b == b'\n')
        .filter_map(parse_line)
        .collect()
}

fn parse_line(line: &[u8]) -> Option<Mount> {
    let mut fields = line.split(|b| *b == b' ');
    let id = std::str::from_utf8(fields.next()?).ok()?.parse().ok()?;
    let point = unescape(fields.nth(3)?);
    // Any number of optional fields, then a lone dash.
    fields.by_ref().find(|f| *f == b"-")?;
    Some(Mount {
        id,
        point: PathBuf::from(OsString::from_vec(point)),
        kind: String::from_utf8_lossy(fields.next()?).into_owned(),
        source: String::from_utf8_lossy(fields.next()?).into_owned(),
    })
}

/// The kernel writes blank, tab, newline and backslash as three octal digits.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&byte, tail)) = rest.split_first() {
        let octal = tail.first_chunk::<3>().and_then(|digits| {
            let text = std::str::from_utf8(digits).ok()?;
            u8::from_str_radix(text, 8).ok()
        });
        match (byte, octal) {
            (b'\\', Some(value)) => {
                out.push(value);
                rest = tail.get(3..).unwrap_or_default();
            }
            _ => {
                out.push(byte);
                rest = tail;
            }
        }
    }
    out
}

/// The mounts that `<proc>/self/mountinfo` shows.
pub fn read(proc: &Path) -> Seen<Vec<Mount>> {
    read_file(&proc.join("self/mountinfo"), crate::read::MAX_FILE).map(|bytes| parse(&bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escapes_and_optional_fields_are_understood() {
        let text =
            b"36 35 98:0 /mnt1 /mnt\\0402 rw,noatime master:1 shared:2 - ext3 /dev/root rw\n\
            bad line\n\
            37 35 0:1 / /a\\9 rw - tmpfs tmpfs rw\n";
        let mounts = parse(text);
        assert_eq!(mounts.len(), 2);
        assert_eq!(mounts[0].point, Path::new("/mnt 2"));
        assert_eq!(
            (mounts[0].kind.as_str(), mounts[0].source.as_str()),
            ("ext3", "/dev/root")
        );
        assert_eq!(mounts[1].point, Path::new("/a\\9"));
    }
}

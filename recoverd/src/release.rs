//! Releases of containerd: how packages write them, which hops between them are supported, and
//! what a release does at its start that others do not.

use std::fmt;

/// A release of containerd.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Release {
    major: u32,
    minor: u32,
    /// Not known when only `2.1` was said.
    patch: Option<u32>,
}

impl Release {
    /// From `2.1`, `1.7.24`, or what packages make of it: `v2.4.0-beta.0`, `1.7.24~ds1`.
    pub fn parse(text: &str) -> Option<Self> {
        let text = text.strip_prefix('v').unwrap_or(text);
        let end = text.find(|c: char| !c.is_ascii_digit() && c != '.');
        let (numbers, rest) = text.split_at(end.unwrap_or(text.len()));
        if !rest.is_empty() && !rest.starts_with(['-', '~', '+']) {
            return None;
        }
        let mut parts = numbers.split('.');
        let release = Self {
            major: parts.next()?.parse().ok()?,
            minor: parts.next()?.parse().ok()?,
            patch: parts.next().map(str::parse).transpose().ok()?,
        };
        parts.next().is_none().then_some(release)
    }

    /// As [`Release::parse`], for the command line.
    pub fn of_word(text: &str) -> Result<Self, String> {
        Self::parse(text).ok_or_else(|| "must be a release, such as 2.1 or 1.7.24".to_owned())
    }

    /// From what `containerd --version` prints, its source, version and revision:
    /// `containerd github.com/containerd/containerd 1.7.24~ds1 1.7.24~ds1-6+deb13u1`. Another
    /// program's words are no release of containerd, whatever stands in them.
    pub fn of_version_line(text: &str) -> Option<Self> {
        let mut words = text.lines().next()?.split_ascii_whitespace();
        (words.next()? == "containerd").then_some(())?;
        let source = words.next()?;
        // Docker's packages say `containerd.io`; 2.x says `…/containerd/v2`, k3s's names its own.
        let known = source == "containerd.io" || source.split('/').any(|part| part == "containerd");
        known.then(|| words.next().and_then(Self::parse))?
    }

    /// Major and minor.
    pub fn minor(self) -> (u32, u32) {
        (self.major, self.minor)
    }

    /// 1.6, or older.
    pub fn is_1_6(self) -> bool {
        self.minor() <= (1, 6)
    }

    /// The generation that speaks the second task API only: it takes a shim of the third for none.
    pub fn is_1(self) -> bool {
        self.major <= 1
    }
}

impl fmt::Display for Release {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)?;
        match self.patch {
            Some(patch) => write!(f, ".{patch}"),
            None => Ok(()),
        }
    }
}

/// Why containerd does not support going from one release to the other.
pub fn unsupported(from: Release, to: Release) -> Option<String> {
    let next = match from.minor() {
        (1, minor @ 0..=6) => vec![(1, minor + 1)],
        // Long-term releases, one to the next.
        (1, 7) => vec![(2, 0), (2, 3)],
        (2, minor) => vec![(2, minor.saturating_add(1))],
        _ => Vec::new(),
    };
    if from.minor() == to.minor() || next.contains(&to.minor()) {
        return None;
    }
    if to.minor() < from.minor() {
        return Some(format!(
            "going back from {from} to {to} is not supported by containerd; its database and \
             what newer shims left in their bundles may not be understood"
        ));
    }
    let allowed: Vec<String> = next.iter().map(|(a, b)| format!("{a}.{b}")).collect();
    Some(match allowed.is_empty() {
        true => format!("the way from {from} to {to} is not known to this recoverd"),
        false => format!(
            "containerd supports going from {from} to {} only, not to {to}",
            allowed.join(" or ")
        ),
    })
}

/// 2.0.0 to 2.0.5 do not try task API 2 when 3 is not served.
pub fn no_downgrade(to: Release) -> bool {
    to.minor() == (2, 0) && to.patch.is_none_or(|patch| patch < 6)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn release(text: &str) -> Release {
        Release::parse(text).unwrap()
    }

    #[test]
    fn releases_are_read_as_packages_write_them() {
        for (text, release) in [
            ("2.1", Some((2, 1, None))),
            ("1.7.24", Some((1, 7, Some(24)))),
            ("v2.4.0-beta.0", Some((2, 4, Some(0)))),
            ("1.6.20~ds1", Some((1, 6, Some(20)))),
            ("1.7.24+unknown", Some((1, 7, Some(24)))),
            ("2", None),
            ("", None),
            ("2.", None),
            ("2.1.", None),
            ("2.1.0.1", None),
            ("2.1 beta", None),
            ("two.one", None),
            ("99999999999.1", None),
        ] {
            let read = Release::parse(text).map(|r| (r.major, r.minor, r.patch));
            assert_eq!(read, release, "{text:?}");
        }
    }

    #[test]
    fn the_word_of_a_containerd_is_told_from_another_programs() {
        for (line, said) in [
            (
                "containerd github.com/containerd/containerd 1.6.20~ds1 1.6.20~ds1-1+deb12u3\n",
                Some("1.6.20"),
            ),
            (
                "containerd github.com/containerd/containerd 1.7.24~ds1 1.7.24~ds1-6+deb13u1",
                Some("1.7.24"),
            ),
            // The revision may be empty.
            (
                "containerd github.com/containerd/containerd/v2 2.1.9+unknown \n",
                Some("2.1.9"),
            ),
            (
                "containerd containerd.io 1.7.27 05044ec0a9a7",
                Some("1.7.27"),
            ),
            (
                "containerd github.com/k3s-io/containerd v1.7.11-k3s2 6c2b1a9",
                Some("1.7.11"),
            ),
            ("k3s version v1.27.4+k3s1 (36645e73)", None),
            ("Docker version 26.1.5, build a72d7cd", None),
            ("containerd", None),
            ("containerd somewhere 1.7.24", None),
            ("containerd github.com/containerd/containerd dev", None),
            ("1.7.24", None),
            ("", None),
        ] {
            let read = Release::of_version_line(line).map(|release| release.to_string());
            assert_eq!(read.as_deref(), said, "{line:?}");
        }
    }

    #[test]
    fn hops_are_supported_from_minor_to_minor_and_between_long_term_releases() {
        for (from, to, word) in [
            ("1.6.20", "1.6.39", None),
            ("1.6.39", "1.6.20", None),
            ("1.6", "1.7", None),
            ("1.7.24", "2.0.11", None),
            ("1.7", "2.3", None),
            ("2.0", "2.1", None),
            ("2.3", "2.4", None),
            ("1.6", "2.0", Some("to 1.7 only")),
            ("1.7", "2.1", Some("2.0 or 2.3 only")),
            ("2.0", "2.3", Some("2.1 only")),
            ("2.1", "1.7", Some("going back")),
            ("3.0", "3.1", Some("not known")),
            ("2.4", "3.0", Some("2.5 only")),
        ] {
            let said = unsupported(release(from), release(to));
            match word {
                None => assert_eq!(said, None, "{from} to {to}"),
                Some(word) => assert!(said.unwrap().contains(word), "{from} to {to}"),
            }
        }
    }
}

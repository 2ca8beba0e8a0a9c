//! Namespace and task names, checked once at the edge.
//!
//! Both become path components and arguments of processes that run as root, so nothing that is
//! not a containerd identifier gets past this file.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Longest identifier that containerd accepts (its `identifiers` package), in bytes.
pub const MAX_LENGTH: usize = 76;

/// Why a string is no identifier.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{what} {value:?} is not a containerd identifier (letters and digits, joined by single . _ -, at most {MAX_LENGTH} bytes)"
)]
pub struct InvalidId {
    what: &'static str,
    value: String,
}

/// `[A-Za-z0-9]+(?:[._-](?:[A-Za-z0-9]+))*`, containerd's own rule.
fn check(what: &'static str, value: &str) -> Result<(), InvalidId> {
    let parts_hold = value
        .split(['.', '_', '-'])
        .all(|part| !part.is_empty() && part.bytes().all(|b| b.is_ascii_alphanumeric()));
    if parts_hold && value.len() <= MAX_LENGTH {
        return Ok(());
    }
    // A hostile name may be megabytes long; the message need not.
    let value = value.chars().take(MAX_LENGTH).collect();
    Err(InvalidId { what, value })
}

macro_rules! id_type {
    ($(#[$doc:meta])* $name:ident, $what:literal) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// Checks `value`.
            pub fn new(value: impl Into<String>) -> Result<Self, InvalidId> {
                let value = value.into();
                check($what, &value)?;
                Ok(Self(value))
            }

            /// The name as containerd writes it.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl TryFrom<String> for $name {
            type Error = InvalidId;
            fn try_from(value: String) -> Result<Self, InvalidId> {
                Self::new(value)
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> String {
                id.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&self.0)
            }
        }
    };
}

id_type!(
    /// A containerd namespace (`k8s.io`, `moby`, `default`).
    Namespace,
    "namespace"
);
id_type!(
    /// A task, container or exec id.
    Id,
    "id"
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_containerd_accepts_pass_and_others_do_not() {
        for good in ["a", "k8s.io", "a-b_c.d", "0", &"x".repeat(MAX_LENGTH)] {
            assert_eq!(Id::new(good).unwrap().as_str(), good);
        }
        for bad in [
            "",
            ".",
            "..",
            "a/b",
            "a..b",
            "-a",
            "a-",
            "ä",
            "a b",
            "a\0",
            &"x".repeat(77),
        ] {
            assert!(Id::new(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn an_error_about_a_giant_name_stays_one_short_line() {
        let text = Namespace::new("y/".repeat(1 << 20))
            .unwrap_err()
            .to_string();
        assert!(text.len() < 300 && !text.contains('\n'), "{}", text.len());
    }
}

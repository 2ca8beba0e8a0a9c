//! Where output is to go: a path, or a URI. Pure.

use std::path::PathBuf;

/// Where output goes.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Target {
    None,
    Path(PathBuf),
    File(PathBuf),
    Binary(Vec<String>),
}

impl Target {
    pub(super) fn parse(uri: &str) -> Result<Self, String> {
        if uri.is_empty() {
            return Ok(Target::None);
        }
        let Some((scheme, rest)) = uri.split_once("://") else {
            return Ok(Target::Path(uri.into()));
        };
        let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
        let path = decode(path)?;
        if !path.starts_with('/') {
            return Err(format!("stdio {uri:?} names no absolute path"));
        }
        match scheme {
            "fifo" => Ok(Target::Path(path.into())),
            "file" => Ok(Target::File(path.into())),
            // They differ in how the logger says that it is ready.
            "binary" | "binary-v2" => {
                let mut argv = vec![path];
                for pair in query.split('&').filter(|pair| !pair.is_empty()) {
                    let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
                    argv.push(decode(&name.replace('+', " "))?);
                    argv.push(decode(&value.replace('+', " "))?);
                }
                Ok(Target::Binary(argv))
            }
            other => Err(format!(
                "unknown stdio scheme {other:?} (allowed: fifo, file, binary, binary-v2)"
            )),
        }
    }
}

/// `%41` and the like.
fn decode(text: &str) -> Result<String, String> {
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        if byte != b'%' {
            out.push(byte);
            continue;
        }
        let mut digit = || {
            let value = char::from(bytes.next()?).to_digit(16)?;
            u8::try_from(value).ok()
        };
        let (Some(high), Some(low)) = (digit(), digit()) else {
            return Err(format!("stdio {text:?} has a broken escape"));
        };
        out.push(high << 4 | low);
    }
    String::from_utf8(out).map_err(|_| format!("stdio {text:?} is not valid UTF-8"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_scheme_decides() {
        let words = |list: &[&str]| list.iter().map(|word| (*word).to_owned()).collect();
        for (uri, target) in [
            ("", Target::None),
            ("/a/b", Target::Path("/a/b".into())),
            ("fifo:///a", Target::Path("/a".into())),
            ("file:///a%20b", Target::File("/a b".into())),
            (
                "binary:///l?id=x%26y&flag&name=a+b",
                Target::Binary(words(&["/l", "id", "x&y", "flag", "", "name", "a b"])),
            ),
        ] {
            assert_eq!(Target::parse(uri), Ok(target), "{uri}");
        }
        assert_eq!(
            Target::parse("binary-v2:///l?id=1"),
            Ok(Target::Binary(words(&["/l", "id", "1"])))
        );
        for bad in [
            "foo:///a",
            "binary-v3:///l",
            "file://a",
            "file://",
            "file:///%",
            "file:///%4",
            "file:///%zz",
            "file:///%ff",
        ] {
            assert!(Target::parse(bad).is_err(), "{bad}");
        }
    }
}

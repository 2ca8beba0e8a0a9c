//! `recoverd explain [CODE]`: what a finding means and what to do.

use std::io::{self, Write};

use crate::{cli, explain, findings::Code};

/// A word that is no finding's code; a usage error (exit 2).
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{word:?} is no finding; did you mean {nearest}? `recoverd explain` lists all")]
pub struct UnknownCode {
    word: String,
    nearest: &'static str,
}

/// The text to print.
pub fn text(args: &cli::Explain) -> Result<String, UnknownCode> {
    let Some(word) = &args.code else {
        return Ok(explain::list());
    };
    match Code::parse(word) {
        Some(code) => Ok(explain::text(code)),
        None => Err(UnknownCode {
            word: word.chars().take(64).collect(),
            nearest: explain::nearest(word).map_or("", Code::word),
        }),
    }
}

/// Prints `text`.
pub fn run(text: &str, out: &mut impl Write) -> io::Result<()> {
    out.write_all(text.as_bytes())?;
    out.flush()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_code_is_refused_in_one_line_with_its_nearest() {
        let args = |code: &str| cli::Explain {
            code: Some(code.to_owned()),
        };
        let error = text(&args("orphan\ntask")).unwrap_err().to_string();
        assert!(error.contains("did you mean orphaned-task?"), "{error}");
        assert!(!error.contains('\n'));
        assert!(
            text(&args("foreign"))
                .unwrap()
                .starts_with("foreign (info)")
        );
        assert_eq!(text(&cli::Explain { code: None }), Ok(explain::list()));
    }
}

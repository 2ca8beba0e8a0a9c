//! Leave to destroy. What ends a process or deletes data takes one of the tokens below, and only
//! [`Permits::of`], the check of `--allow`, makes them: a call that forgot to ask does not compile.

use serde::Serialize;

/// What `--allow` may say.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Word {
    /// End processes
    Kill,
    /// Delete data
    Delete,
}

impl Word {
    /// The word.
    pub fn word(self) -> &'static str {
        match self {
            Word::Kill => "kill",
            Word::Delete => "delete",
        }
    }
}

/// Leave to end a process.
#[derive(Debug)]
pub struct Kill(());

/// Leave to delete data.
#[derive(Debug)]
pub struct Delete(());

/// What was allowed.
#[derive(Debug)]
pub struct Permits {
    kill: Option<Kill>,
    delete: Option<Delete>,
}

/// A word that is missing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("needs --allow {}", .0.word())]
pub struct Missing(pub Word);

impl Permits {
    /// From the words of the command line.
    pub fn of(words: &[Word]) -> Self {
        Self {
            kill: words.contains(&Word::Kill).then_some(Kill(())),
            delete: words.contains(&Word::Delete).then_some(Delete(())),
        }
    }

    /// Leave to end a process.
    pub fn kill(&self) -> Result<&Kill, Missing> {
        self.kill.as_ref().ok_or(Missing(Word::Kill))
    }

    /// Leave to delete data.
    pub fn delete(&self) -> Result<&Delete, Missing> {
        self.delete.as_ref().ok_or(Missing(Word::Delete))
    }

    /// Whether a step that needs `word` may be done.
    pub fn check(&self, word: Option<Word>) -> Result<(), Missing> {
        match word {
            None => Ok(()),
            Some(Word::Kill) => self.kill().map(|_| ()),
            Some(Word::Delete) => self.delete().map(|_| ()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_word_allows_itself_only() {
        let none = Permits::of(&[]);
        assert!(none.check(None).is_ok());
        assert_eq!(none.check(Some(Word::Kill)), Err(Missing(Word::Kill)));
        let kill = Permits::of(&[Word::Kill]);
        assert!(kill.kill().is_ok());
        let refused = kill.delete().unwrap_err();
        assert_eq!(refused.to_string(), "needs --allow delete");
        let both = Permits::of(&[Word::Delete, Word::Kill]);
        assert!(both.check(Some(Word::Delete)).is_ok() && both.check(Some(Word::Kill)).is_ok());
    }
}

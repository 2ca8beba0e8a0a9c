//! How many shims are replaced at once. Pure.
//!
//! A few that hang are ill; many that hang may be well on an ill machine. So at most a quarter of
//! the shims (or five) are replaced at once, and the next ones only after one of these at least
//! turned out well: whoever is left loses its task at containerd's start, so one that cannot be
//! replaced must not cost the others theirs. Where a whole batch failed, something is wrong that
//! concerns all of them. Who is left then is reported.

/// This many may always be replaced at once.
const FEW: usize = 5;

/// How many of `shims` are replaced at once.
pub fn at_once(shims: usize) -> usize {
    shims.div_ceil(4).max(FEW)
}

/// Whether the next ones are tried after a batch of `tried`, of which so many `failed`.
pub fn goes_on(tried: usize, failed: usize) -> bool {
    failed < tried
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quarter_but_five_always() {
        let expected = [(0, 5), (4, 5), (20, 5), (21, 6), (50, 13), (100, 25)];
        for (shims, at) in expected {
            assert_eq!(at_once(shims), at, "{shims}");
        }
    }

    #[test]
    fn one_that_fails_keeps_nobody_else_from_it_and_a_whole_batch_does() {
        for (tried, failed, on) in [(5, 0, true), (5, 1, true), (5, 4, true), (5, 5, false)] {
            assert_eq!(goes_on(tried, failed), on, "{failed} of {tried}");
        }
    }
}

//! How many shims are replaced at once. Pure.
//!
//! A few that hang are ill; many that hang may be well on an ill machine. So at most a quarter of
//! the shims (or five) are replaced at once, and the next ones only after all of these turned out
//! well. Who is left when one did not is reported.

/// This many may always be replaced at once.
const FEW: usize = 5;

/// How many of `shims` are replaced at once.
pub fn at_once(shims: usize) -> usize {
    shims.div_ceil(4).max(FEW)
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
}

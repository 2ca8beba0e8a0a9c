//! Times as a person writes them.

use std::time::Duration;

/// `200ms`, `0s`, `90s`, `10m`, `2h`: a whole number and its unit.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    const ALLOWED: &str = "a whole number and ms, s, m or h, such as 200ms, 90s, 10m";
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let number: u64 = match (number.parse(), number) {
        (Ok(number), _) => number,
        (Err(_), "") => return Err(format!("must be {ALLOWED}")),
        (Err(_), _) => return Err(format!("is too long a time; must be {ALLOWED}")),
    };
    let millis = match unit {
        "ms" => Some(number),
        "s" => number.checked_mul(1000),
        "m" => number.checked_mul(60_000),
        "h" => number.checked_mul(3_600_000),
        "" => return Err(format!("has no unit; must be {ALLOWED}")),
        _ => return Err(format!("has an unknown unit; must be {ALLOWED}")),
    };
    // Times are added to the clock: nothing near the end of u64 may get there.
    const LONGEST: u64 = 100 * 365 * 24 * 3_600_000;
    match millis {
        Some(millis) if millis <= LONGEST => Ok(Duration::from_millis(millis)),
        Some(_) | None => Err(format!("is too long a time; must be {ALLOWED}")),
    }
}

/// As [`parse_duration`] reads it, in the largest unit that is exact.
pub fn format_duration(time: Duration) -> String {
    let millis = time.as_millis();
    for (unit, size) in [("h", 3_600_000), ("m", 60_000), ("s", 1000)] {
        if millis != 0 && millis.is_multiple_of(size) {
            return format!("{}{unit}", millis / size);
        }
    }
    match millis {
        0 => "0s".into(),
        _ => format!("{millis}ms"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read_and_printed_alike() {
        for (text, millis, printed) in [
            ("200ms", 200, "200ms"),
            ("0s", 0, "0s"),
            ("0ms", 0, "0s"),
            ("90s", 90_000, "90s"),
            ("60s", 60_000, "1m"),
            ("10m", 600_000, "10m"),
            ("2h", 7_200_000, "2h"),
        ] {
            let time = Duration::from_millis(millis);
            assert_eq!(parse_duration(text), Ok(time), "{text}");
            assert_eq!(format_duration(time), printed);
        }
        for (text, word) in [
            ("", "whole number"),
            ("s", "whole number"),
            ("-1s", "whole number"),
            ("1.5s", "unit"),
            ("10", "no unit"),
            ("10d", "unknown unit"),
            ("10 s", "unknown unit"),
            ("5mm", "unknown unit"),
            ("99999999999999999999s", "too long"),
            ("18446744073709551615h", "too long"),
            ("18446744073709551615ms", "too long"),
        ] {
            let error = parse_duration(text).unwrap_err();
            assert!(error.contains(word), "{text:?}: {error}");
        }
    }
}

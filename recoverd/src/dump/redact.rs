//! Takes the values of environment variables out of JSON. Pure.

use serde_json::Value;

/// Put in the place of a value.
const REDACTED: &str = "(left out)";

/// `json` without the values of environment variables: wherever a key `env` is, of `process`, of
/// hooks or of a record's context. `None` when it is no JSON: what cannot be understood cannot
/// be redacted, so it is left out as a whole.
pub fn json(json: &[u8]) -> Option<Vec<u8>> {
    let mut value: Value = serde_json::from_slice(json).ok()?;
    walk(&mut value);
    serde_json::to_vec_pretty(&value).ok()
}

/// serde_json refuses nesting beyond 128, so this does not run out of stack.
fn walk(value: &mut Value) {
    match value {
        Value::Array(items) => items.iter_mut().for_each(walk),
        Value::Object(entries) => {
            for (key, value) in entries {
                if key.eq_ignore_ascii_case("env") {
                    redact(value);
                } else {
                    walk(value);
                }
            }
        }
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

/// Keeps the names of `["NAME=value"]` and `{"NAME": "value"}`, and nothing of any other form.
fn redact(value: &mut Value) {
    match value {
        Value::Array(items) => {
            for item in items {
                *item = match item.as_str().and_then(|text| text.split_once('=')) {
                    Some((name, _)) => format!("{name}={REDACTED}").into(),
                    None => REDACTED.into(),
                };
            }
        }
        Value::Object(entries) => {
            for (_, value) in entries {
                *value = REDACTED.into();
            }
        }
        Value::Null => {}
        Value::Bool(_) | Value::Number(_) | Value::String(_) => *value = REDACTED.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_variables_stay_and_values_go_wherever_they_are() {
        let text = br#"{"process":{"args":["sh","-c","x=y"],"env":["A=s3cret","B=","C"]},
            "hooks":{"createRuntime":[{"path":"/h","env":["T=s3cret=1"]}]},
            "context":{"Env":{"PATH":"s3cret"}},"odd":{"env":"s3cret"},"none":{"env":null}}"#;
        let text = String::from_utf8(json(text).unwrap()).unwrap();
        assert!(!text.contains("s3cret"), "{text}");
        for kept in [
            "A=(left out)",
            "B=(left out)",
            "T=(left out)",
            "\"PATH\"",
            "x=y",
            "/h",
        ] {
            assert!(text.contains(kept), "{kept} in {text}");
        }
        assert_eq!(json(b"{\"process\":{\"env\":[\"A=s3cret\"]"), None);
        assert_eq!(json(&b"[".repeat(100_000)), None);
    }
}

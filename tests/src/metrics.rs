//! Two shims' word on one cgroup, field by field.

use serde_json::Value;

/// Every number and text in `metrics`, what `ctr task metrics --format json` prints, by its place.
fn leaves(metrics: &Value) -> Vec<(String, Value)> {
    fn walk(place: &str, value: &Value, into: &mut Vec<(String, Value)>) {
        match value {
            Value::Object(fields) => {
                for (name, value) in fields {
                    walk(&format!("{place}.{name}"), value, into);
                }
            }
            Value::Array(items) => {
                for (index, value) in items.iter().enumerate() {
                    walk(&format!("{place}[{index}]"), value, into);
                }
            }
            Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {
                into.push((place.to_owned(), value.clone()));
            }
        }
    }
    let mut all = Vec::new();
    walk("", metrics, &mut all);
    all.sort_by(|one, other| one.0.cmp(&other.0));
    all
}

/// How `ours` differs from what the stock shim said of the same cgroup just `before` and just
/// `after`, a line for each field: numbers may lie between the two or within 5 % of them.
pub fn differences(before: &Value, ours: &Value, after: &Value) -> Vec<String> {
    let [before, ours, after] = [before, ours, after].map(leaves);
    let places = |leaves: &[(String, Value)]| -> Vec<String> {
        leaves.iter().map(|(place, _)| place.clone()).collect()
    };
    if places(&before) != places(&ours) {
        let only = |one: &[String], other: &[String]| -> Vec<String> {
            one.iter()
                .filter(|place| !other.contains(place))
                .cloned()
                .collect()
        };
        let (stock, ours) = (places(&before), places(&ours));
        return vec![
            format!("only the stock shim has {:?}", only(&stock, &ours)),
            format!("only ours has {:?}", only(&ours, &stock)),
        ];
    }
    if places(&before) != places(&after) {
        return vec!["the stock shim's own two answers differ in their fields".into()];
    }
    let triples = before.iter().zip(&ours).zip(&after);
    triples
        .filter(|(((_, before), (_, ours)), (_, after))| !agree(before, ours, after))
        .map(|(((place, before), (_, ours)), (_, after))| {
            format!("{place}: {before} before, {ours} ours, {after} after")
        })
        .collect()
}

fn agree(before: &Value, ours: &Value, after: &Value) -> bool {
    let (Some(before), Some(said), Some(after)) = (before.as_f64(), ours.as_f64(), after.as_f64())
    else {
        return before == ours && ours == after;
    };
    let (low, high) = (before.min(after), before.max(after));
    (low - low * 0.05..=high + high * 0.05).contains(&said)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn numbers_may_grow_and_differ_by_a_twentieth_and_nothing_else() {
        let stock = json!({"cpu": {"usage": 1000}, "hugetlb": [{"pagesize": "2MB"}]});
        let said = |usage: u64, size: &str| json!({"cpu": {"usage": usage}, "hugetlb": [{"pagesize": size}]});
        assert_eq!(differences(&stock, &said(1049, "2MB"), &stock), [""; 0]);
        assert_eq!(
            differences(&stock, &said(1499, "2MB"), &said(1500, "2MB")),
            [""; 0]
        );
        assert_eq!(
            differences(&stock, &said(1051, "1GB"), &stock),
            [
                ".cpu.usage: 1000 before, 1051 ours, 1000 after",
                ".hugetlb[0].pagesize: \"2MB\" before, \"1GB\" ours, \"2MB\" after"
            ]
        );
        assert_eq!(differences(&stock, &json!({"cpu": {}}), &stock).len(), 2);
    }
}

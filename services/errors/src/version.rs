//! Compares versions by the dotted numbers at their start.

use std::cmp::Ordering;

/// The numeric components without trailing zeros. `None`: the version starts with no number.
fn components(version: &str) -> Option<Vec<u64>> {
    let version = version.trim().trim_start_matches(['v', 'V']);
    let end = version.find(|letter: char| !letter.is_ascii_digit() && letter != '.');
    let text = &version[..end.unwrap_or(version.len())];
    let parts = text.split('.').take_while(|part| !part.is_empty());
    let mut components: Vec<u64> = parts.map_while(|part| part.parse().ok()).collect();
    if components.is_empty() {
        return None;
    }
    while components.last() == Some(&0) {
        components.pop();
    }
    Some(components)
}

/// Compares two versions. `None`: one of them has no numeric components.
pub(crate) fn compare(left: &str, right: &str) -> Option<Ordering> {
    Some(components(left)?.cmp(&components(right)?))
}

/// Whether `seen` is `version` or a later one. Versions without numbers match only if they are
/// equal.
pub(crate) fn is_at_least(seen: &str, version: &str) -> bool {
    compare(seen, version).map_or(seen == version, Ordering::is_ge)
}

/// The later of two versions.
pub(crate) fn later<'a>(left: &'a str, right: &'a str) -> &'a str {
    match compare(left, right) {
        Some(Ordering::Less) => right,
        Some(_) => left,
        // A version with numbers wins over one without.
        None if components(left).is_some() || right.is_empty() => left,
        None => right,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn dotted_numbers_are_compared_as_numbers() {
        for (seen, version, since) in [
            ("1.2.0", "1.2.0", true),
            ("1.2", "1.2.0", true),
            ("1.10.0", "1.9.9", true),
            ("v1.9.9", "1.10.0", false),
            ("1.2.0-rc1", "1.2.0", true),
            ("", "1.0.0", false),
            ("nightly", "1.0.0", false),
            ("nightly", "nightly", true),
        ] {
            assert_eq!(is_at_least(seen, version), since, "{seen} {version}");
        }
        assert_eq!(later("0.9.0", "0.10.0"), "0.10.0");
        assert_eq!(later("", "0.1.0"), "0.1.0");
        assert_eq!(later("0.1.0", ""), "0.1.0");
    }

    proptest! {
        #[test]
        fn any_texts_can_be_compared(left in "\\PC{0,20}", right in "[v0-9.]{0,20}") {
            prop_assert!(is_at_least(&left, &left));
            let _ = later(&left, &right);
            if let (Some(there), Some(back)) = (compare(&left, &right), compare(&right, &left)) {
                prop_assert_eq!(there, back.reverse());
            }
        }
    }
}

//! Versions, as far as they can be compared: the dotted numbers that they begin with.

use std::cmp::Ordering;

/// The numbers, without zeros at the end; none where there are none.
fn numbers(version: &str) -> Option<Vec<u64>> {
    let version = version.trim().trim_start_matches(['v', 'V']);
    let end = version.find(|letter: char| !letter.is_ascii_digit() && letter != '.');
    let text = &version[..end.unwrap_or(version.len())];
    let parts = text.split('.').take_while(|part| !part.is_empty());
    let mut numbers: Vec<u64> = parts.map_while(|part| part.parse().ok()).collect();
    if numbers.is_empty() {
        return None;
    }
    while numbers.last() == Some(&0) {
        numbers.pop();
    }
    Some(numbers)
}

/// How two versions relate; none where one of them has no numbers.
pub(crate) fn compare(one: &str, other: &str) -> Option<Ordering> {
    Some(numbers(one)?.cmp(&numbers(other)?))
}

/// Whether `seen` is `version` or came after it. What can't be compared is so only where it is the
/// same text.
pub(crate) fn is_since(seen: &str, version: &str) -> bool {
    compare(seen, version).map_or(seen == version, Ordering::is_ge)
}

/// The later of two.
pub(crate) fn later<'a>(one: &'a str, other: &'a str) -> &'a str {
    match compare(one, other) {
        Some(Ordering::Less) => other,
        Some(_) => one,
        // Any numbers say more than none.
        None if numbers(one).is_some() || other.is_empty() => one,
        None => other,
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
            assert_eq!(is_since(seen, version), since, "{seen} {version}");
        }
        assert_eq!(later("0.9.0", "0.10.0"), "0.10.0");
        assert_eq!(later("", "0.1.0"), "0.1.0");
        assert_eq!(later("0.1.0", ""), "0.1.0");
    }

    proptest! {
        #[test]
        fn any_texts_can_be_compared(one in "\\PC{0,20}", other in "[v0-9.]{0,20}") {
            prop_assert!(is_since(&one, &one));
            let _ = later(&one, &other);
            if let (Some(there), Some(back)) = (compare(&one, &other), compare(&other, &one)) {
                prop_assert_eq!(there, back.reverse());
            }
        }
    }
}

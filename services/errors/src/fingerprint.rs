//! Computes the fingerprint of a failure's cause: equal for all failures with one cause, whatever
//! numbers and ids their texts contain.
//!
//! Every word with a digit, and every id, address, path and quoted text, becomes the same `#`. The
//! border between these kinds therefore never separates two failures of one cause.

use hapa_proto::errors::v1::Occurrence;
use sha2::{Digest as _, Sha256};

/// Prefixes of ids.
const ID_PREFIXES: [&str; 6] = ["INC-", "key_", "usr_", "ses_", "req_", "mdl_"];
/// From this length on, a word of hexadecimal digits counts as a number.
const MIN_HEX_LEN: usize = 8;
const QUOTES: [char; 3] = ['"', '\'', '`'];
/// One pass may uncover another quoted text, so passes repeat until the text stays the same.
const MAX_PASSES: usize = 16;

/// The fingerprint: 16 hexadecimal digits of a SHA-256 over code, method and normalised first
/// cause.
pub(crate) fn fingerprint(occurrence: &Occurrence) -> String {
    let cause = occurrence.causes.first().unwrap_or(&occurrence.message);
    let mut hash = Sha256::new();
    for part in [&occurrence.error_code, &occurrence.method, &normalise(cause)] {
        hash.update(part.as_bytes());
        hash.update([0]);
    }
    let mut fingerprint = hex::encode(hash.finalize());
    fingerprint.truncate(16);
    fingerprint
}

/// Replaces the variable parts of a text (numbers, ids, addresses, paths, quotes) by `#`.
pub(crate) fn normalise(text: &str) -> String {
    let mut text = normalise_once(text);
    for _ in 0..MAX_PASSES {
        let next = normalise_once(&text);
        if next == text {
            break;
        }
        text = next;
    }
    text
}

fn normalise_once(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text.trim();
    let mut can_open_quote = true;
    while let Some(first) = rest.chars().next() {
        if first.is_whitespace() {
            out.push(' ');
            rest = rest.trim_start();
            can_open_quote = true;
        } else if let Some(length) = quoted_len(rest).filter(|_| can_open_quote) {
            out.push('#');
            rest = &rest[length..];
            can_open_quote = false;
        } else if is_delimiter(first) || QUOTES.contains(&first) {
            out.push(first);
            rest = &rest[first.len_utf8()..];
            can_open_quote = is_delimiter(first);
        } else {
            let word = &rest[..word_len(rest)];
            out.push_str(if is_variable(word) { "#" } else { word });
            rest = &rest[word.len()..];
            can_open_quote = false;
        }
    }
    out
}

fn is_delimiter(letter: char) -> bool {
    letter.is_whitespace() || "=,;()[]{}<>|".contains(letter)
}

/// The length in bytes of the quoted text at the start of `text`. `None`: it does not start with
/// one.
fn quoted_len(text: &str) -> Option<usize> {
    let quote = text.chars().next().filter(|first| QUOTES.contains(first))?;
    let ends = text.match_indices(quote).skip(1).map(|(index, found)| index + found.len());
    // The ' of "can't" closes nothing: a quote closes only before a delimiter.
    let mut ends = ends.filter(|&end| {
        text[end..].chars().next().is_none_or(|next| is_delimiter(next) || ".:!?".contains(next))
    });
    ends.next()
}

/// The length in bytes of the word at the start of `text`. An address extends to the next white
/// space.
fn word_len(text: &str) -> usize {
    let end = |is_end: &dyn Fn(char) -> bool| text.find(is_end).unwrap_or(text.len());
    let address_end = end(&|letter| letter.is_whitespace() || QUOTES.contains(&letter));
    if text[..address_end].contains("://") || text.starts_with(['/', '\\']) {
        return text[..address_end]
            .trim_end_matches(['.', ',', ';', ':', ')', ']', '>', '}'])
            .len()
            .max(1);
    }
    end(&|letter| is_delimiter(letter) || QUOTES.contains(&letter))
}

/// Whether a word is a number, an id, an address or a path.
fn is_variable(word: &str) -> bool {
    let bare = word.trim_end_matches(['.', ':', '!', '?']);
    let is_hex = |text: &str| {
        let letters = text.bytes().filter(|byte| *byte != b'-');
        letters.clone().count() >= MIN_HEX_LEN
            && letters.clone().all(|byte| byte.is_ascii_hexdigit())
    };
    word.chars().any(char::is_numeric)
        || word.contains("://")
        || word.contains('@')
        || (word.starts_with(['/', '\\', '~']) || word.starts_with("./")) && word.len() > 1
        || word.matches(['/', '\\']).count() > 1
        || ID_PREFIXES.iter().any(|id| word.len() > id.len() && word.starts_with(id))
        || is_hex(bare)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn numbers_ids_quotes_addresses_and_paths_become_a_placeholder() {
        for (text, expected) in [
            ("the store can't be asked at the moment", "the store can't be asked at the moment"),
            ("took 12.5 s of 30", "took # s of #"),
            ("no row 0190a5c7-7c3e-7d2a-9f00-aabbccddeeff here", "no row # here"),
            ("INC-20260101-0123ABCD, key_abc and usr_x", "#, # and #"),
            ("commit deadbeef", "commit #"),
            ("model \"kim's own\" is unknown", "model # is unknown"),
            ("there is no 'a' and no `b`.", "there is no # and no #."),
            ("connect to 10.0.0.1:5432 (db-1)", "connect to # (#)"),
            ("GET http://a.example/x?q=y,z failed", "GET # failed"),
            ("reading /var/lib/hapa: denied", "reading # denied"),
            ("retries=3, timeout=30s", "retries=#, timeout=#"),
            ("to  kim@example.com", "to #"),
        ] {
            let found = normalise(text);
            assert_eq!(found.replace("#:", "#"), expected, "{text}");
        }
    }

    #[test]
    fn a_fingerprint_depends_on_code_method_and_first_cause() {
        let base = Occurrence {
            error_code: "E5006".to_owned(),
            method: "/a.B/C".to_owned(),
            message: "the model can't be reached".to_owned(),
            causes: vec!["connection refused by 10.0.0.1:80".to_owned()],
            ..Occurrence::default()
        };
        let same = |change: &dyn Fn(&mut Occurrence)| {
            let mut other = base.clone();
            change(&mut other);
            fingerprint(&other) == fingerprint(&base)
        };
        assert_eq!(fingerprint(&base).len(), 16);
        assert!(same(&|one| one.causes[0] = "connection refused by 10.0.0.27:443".to_owned()));
        assert!(same(&|one| one.message = "else".to_owned()));
        assert!(same(&|one| one.causes.push("deeper".to_owned())));
        assert!(!same(&|one| one.causes[0] = "reset by peer".to_owned()));
        assert!(!same(&|one| one.causes.clear()));
        assert!(!same(&|one| one.error_code = "E5001".to_owned()));
        assert!(!same(&|one| one.method = "/a.B/D".to_owned()));
    }

    /// Replaces every run of digits by `number`.
    fn renumbered(text: &str, number: u32) -> String {
        let mut out = String::new();
        let mut in_run = false;
        for letter in text.chars() {
            if !letter.is_ascii_digit() {
                out.push(letter);
            } else if !in_run {
                out.push_str(&number.to_string());
            }
            in_run = letter.is_ascii_digit();
        }
        out
    }

    proptest! {
        #[test]
        fn normalising_twice_changes_nothing(text in "\\PC{0,80}") {
            let once = normalise(&text);
            prop_assert_eq!(normalise(&once), once);
        }

        #[test]
        fn normalising_twice_changes_nothing_with_quotes_and_delimiters(text in "[a-f0-9 '\"`=,./:()#_-]{0,60}") {
            let once = normalise(&text);
            prop_assert_eq!(normalise(&once), once);
        }

        #[test]
        fn numbers_do_not_change_the_cause(text in "[a-z0-9 .:=,()/'\"-]{0,60}", number: u32) {
            prop_assert_eq!(normalise(&renumbered(&text, number)), normalise(&text));
        }
    }
}

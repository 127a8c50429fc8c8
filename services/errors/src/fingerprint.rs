//! Names the cause of a failure: what is the same whenever it fails, numbers and ids aside.
//!
//! Whatever has a digit in it counts as a number, whatever looks like an id, an address, a path or a
//! quoted text as one too; all become `#`. So no border between these kinds can tell two failures of
//! one cause apart.

use hapa_proto::errors::v1::Occurrence;
use sha2::{Digest as _, Sha256};

/// How ids begin.
const IDS: [&str; 6] = ["INC-", "key_", "usr_", "ses_", "req_", "mdl_"];
/// Letters of a hexadecimal number that is one for its length alone.
const HEX_RUN: usize = 8;
const QUOTES: [char; 3] = ['"', '\'', '`'];
/// A pass may uncover a quoted text; each that changes something leaves less to change.
const MOST_PASSES: usize = 16;

/// 16 hex digits.
pub(crate) fn fingerprint(occurrence: &Occurrence) -> String {
    let cause = occurrence.causes.first().unwrap_or(&occurrence.message);
    let mut hash = Sha256::new();
    for part in [&occurrence.error_code, &occurrence.method, &normalised(cause)] {
        hash.update(part.as_bytes());
        hash.update([0]);
    }
    let mut text = hex::encode(hash.finalize());
    text.truncate(16);
    text
}

/// A text without its numbers and ids.
pub(crate) fn normalised(text: &str) -> String {
    let mut text = pass(text);
    for _ in 0..MOST_PASSES {
        let next = pass(&text);
        if next == text {
            break;
        }
        text = next;
    }
    text
}

fn pass(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text.trim();
    let mut may_quote = true;
    while let Some(first) = rest.chars().next() {
        if first.is_whitespace() {
            out.push(' ');
            rest = rest.trim_start();
            may_quote = true;
        } else if let Some(length) = quoted(rest).filter(|_| may_quote) {
            out.push('#');
            rest = &rest[length..];
            may_quote = false;
        } else if is_border(first) || QUOTES.contains(&first) {
            out.push(first);
            rest = &rest[first.len_utf8()..];
            may_quote = is_border(first);
        } else {
            let word = &rest[..word(rest)];
            out.push_str(if is_particular(word) { "#" } else { word });
            rest = &rest[word.len()..];
            may_quote = false;
        }
    }
    out
}

fn is_border(letter: char) -> bool {
    letter.is_whitespace() || "=,;()[]{}<>|".contains(letter)
}

/// The length of the quoted text that this begins with.
fn quoted(text: &str) -> Option<usize> {
    let quote = text.chars().next().filter(|first| QUOTES.contains(first))?;
    let ends = text.match_indices(quote).skip(1).map(|(index, found)| index + found.len());
    // The ' of "can't" ends nothing: a word goes on behind it.
    let mut ends = ends.filter(|&end| {
        text[end..].chars().next().is_none_or(|next| is_border(next) || ".:!?".contains(next))
    });
    ends.next()
}

/// The length of the word that this begins with. An address goes on to the next blank.
fn word(text: &str) -> usize {
    let end = |is_end: &dyn Fn(char) -> bool| text.find(is_end).unwrap_or(text.len());
    let long = end(&|letter| letter.is_whitespace() || QUOTES.contains(&letter));
    if text[..long].contains("://") || text.starts_with(['/', '\\']) {
        return text[..long]
            .trim_end_matches(['.', ',', ';', ':', ')', ']', '>', '}'])
            .len()
            .max(1);
    }
    end(&|letter| is_border(letter) || QUOTES.contains(&letter))
}

/// Whether a word is a number, an id, an address or a path.
fn is_particular(word: &str) -> bool {
    let bare = word.trim_end_matches(['.', ':', '!', '?']);
    let hex = |text: &str| {
        let letters = text.bytes().filter(|byte| *byte != b'-');
        letters.clone().count() >= HEX_RUN && letters.clone().all(|byte| byte.is_ascii_hexdigit())
    };
    word.chars().any(char::is_numeric)
        || word.contains("://")
        || word.contains('@')
        || (word.starts_with(['/', '\\', '~']) || word.starts_with("./")) && word.len() > 1
        || word.matches(['/', '\\']).count() > 1
        || IDS.iter().any(|id| word.len() > id.len() && word.starts_with(id))
        || hex(bare)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn numbers_ids_quotes_addresses_and_paths_are_taken_out() {
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
            let found = normalised(text);
            assert_eq!(found.replace("#:", "#"), expected, "{text}");
        }
    }

    #[test]
    fn a_fingerprint_tells_code_method_and_first_cause_apart() {
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

    /// Every run of digits becomes another.
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
        fn what_is_taken_out_stays_out(text in "\\PC{0,80}") {
            let once = normalised(&text);
            prop_assert_eq!(normalised(&once), once);
        }

        #[test]
        fn words_with_quotes_and_borders_are_no_exception(text in "[a-f0-9 '\"`=,./:()#_-]{0,60}") {
            let once = normalised(&text);
            prop_assert_eq!(normalised(&once), once);
        }

        #[test]
        fn other_numbers_make_no_other_cause(text in "[a-z0-9 .:=,()/'\"-]{0,60}", number: u32) {
            prop_assert_eq!(normalised(&renumbered(&text, number)), normalised(&text));
        }
    }
}

//! Redaction: removes secrets from text before it is logged or stored. Secrets are keys, tokens, passwords in URLs, and
//! long runs of characters that look random. It removes too much rather than too little, and is idempotent.
//!
//! Each search takes linear time, because `regex` does not backtrack. Inputs are limited to 16 KiB.

use std::sync::LazyLock;

use regex::{Regex, RegexSet};

/// Replaces a secret. None of its characters can be part of a secret.
const REMOVED: &str = "[removed]";
/// Maximum length of an input, in bytes; the rest is dropped.
const MAX_INPUT_BYTES: usize = 16 * 1024;
/// Maximum length of a run that can be a path or a name, in bytes.
const MAX_NAME_LEN: usize = 64;

/// Texts that are redacted. The groups `url`, `bearer`, `name`, `boundary` and `at` stay.
static SECRET: LazyLock<Regex> = LazyLock::new(|| {
    let pattern = r#"(?x)
        # The user information of a URL, up to the last @ of the word: a password may contain any character.
          (?<url> :// ) \S* (?<at> @ )
        # An access token in an Authorization header.
        | (?<bearer> (?: (?i-u: bearer ) \s+ )+ ) \S+
        # A value with the name of a secret.
        | (?<name> (?i-u: (?: password | passwd | secret | token | api[_-]?key ) = | x-mesh-token: ) \s* )
          [^\s&,;"']+
        # An API key, a refresh token, a JWT (with dots between its parts).
        | (?: hapa_ | hapr_ | eyJ ) [A-Za-z0-9_.-]{16,}
        # A key of a model provider. Words may end with "sk-" too, such as "task-force".
        | (?<boundary> (?-u: \b{start-half} ) | _ ) sk- [A-Za-z0-9_.-]{8,}
        # A run of hexadecimal or base64 characters, of either alphabet.
        | (?<run> [A-Za-z0-9+/_-]{32,} ) =*
    "#;
    Regex::new(pattern).unwrap_or_else(|error| unreachable!("{error}"))
});

/// Runs that are public ids.
static PUBLIC_ID: LazyLock<RegexSet> = LazyLock::new(|| {
    let patterns = [
        // A UUID.
        "^[0-9A-Fa-f]{8}(?:-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}$",
        // A `traceparent` header.
        "^[0-9A-Fa-f]{2}-[0-9A-Fa-f]{32}-[0-9A-Fa-f]{16}-[0-9A-Fa-f]{2}$",
    ];
    RegexSet::new(patterns).unwrap_or_else(|error| unreachable!("{error}"))
});

/// The text without its secrets, truncated to `max_chars` characters.
pub fn redact_secrets(text: &str, max_chars: usize) -> String {
    let text = match text.floor_char_boundary(MAX_INPUT_BYTES) {
        end if end < text.len() => without_partial_run(&text[..end]),
        _ => text,
    };
    let (mut clean, mut copied) = (String::with_capacity(text.len()), 0);
    for found in SECRET.captures_iter(text) {
        let whole = found.get_match();
        clean.push_str(&text[copied..whole.start()]);
        copied = whole.end();
        if found.name("run").is_some_and(|run| is_public(run.as_str(), &clean)) {
            clean.push_str(whole.as_str());
            continue;
        }
        let group = |name| found.name(name).map_or("", |group| group.as_str());
        clean.extend(["url", "bearer", "name", "boundary"].map(group));
        clean.push_str(REMOVED);
        clean.push_str(group("at"));
    }
    clean.push_str(&text[copied..]);
    match clean.char_indices().nth(max_chars) {
        Some((end, _)) => without_partial_run(&clean[..end]).to_owned(),
        None => clean,
    }
}

/// Drops the run that a truncation has cut: a part of it may look different from the whole.
fn without_partial_run(text: &str) -> &str {
    text.trim_end_matches(|letter: char| letter.is_ascii_alphanumeric() || "+/-_".contains(letter))
}

/// Whether a run is no secret: an id that users search for, or words.
fn is_public(run: &str, before: &str) -> bool {
    PUBLIC_ID.is_match(run) || is_trace_id(run, before) || is_words(run)
}

/// A trace id follows its name in the same word, such as `trace_id=…`.
fn is_trace_id(run: &str, before: &str) -> bool {
    let is_id = run.len() == 32 && run.bytes().all(|byte| byte.is_ascii_hexdigit());
    is_id && before.rsplit(char::is_whitespace).next().is_some_and(|word| word.contains("trace"))
}

/// Whether a run is a path or a name: letters and separators only, with few capitals.
fn is_words(run: &str) -> bool {
    let count = |test: fn(&u8) -> bool| run.bytes().filter(test).count();
    let (lower, upper) = (count(u8::is_ascii_lowercase), count(u8::is_ascii_uppercase));
    run.len() <= MAX_NAME_LEN
        && count(u8::is_ascii_digit) == 0
        && upper * 3 <= lower
        && !["hapa_", "hapr_", "eyJ", "sk-"].iter().any(|prefix| run.contains(prefix))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn clean(text: &str) -> String {
        redact_secrets(text, 2_000)
    }

    #[test]
    fn secrets_are_removed_and_useful_text_stays() {
        let key = "hapa_abcdefghijklABCDEFGHIJKLMNOPQRSTUVWXYZ012345abcdef";
        assert_eq!(clean(&format!("no key {key}, sorry")), "no key [removed], sorry");
        assert_eq!(clean("a Bearer  abc.def, x"), "a Bearer  [removed] x");
        assert_eq!(clean("postgres://me:p@ss/w@host/db down"), "postgres://[removed]@host/db down");
        assert_eq!(clean("use sk-abcd1234efgh now"), "use [removed] now");
        assert_eq!(clean("?password=x&sslmode=off"), "?password=[removed]&sslmode=off");
        let jwt = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.abc-def_ghi";
        assert_eq!(clean(jwt), "[removed]");
        assert_eq!(clean("5f4dcc3b5aa765d61d8327deb882cf99!"), "[removed]!");
        assert_eq!(clean("c2VjcmV0IHNlY3JldCBzZWNyZXQgc2VjcmV0IQ=="), "[removed]");
        for kept in [
            "INC-20260101-0123ABCD",
            "018f2c9e-7b1a-7c3d-8e4f-0123456789ab: not found",
            "trace_id=4bf92f3577b34da6a3ce929d0e0e4736",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "the method failed: /hapa.codegen.v1.CodegenService/StreamGenerateCode",
            "task-force in hapa_requests_total",
            "모델이 답하지 않습니다",
        ] {
            assert_eq!(clean(kept), kept);
        }
        assert_eq!(redact_secrets("one two three", 9), "one two ");
        assert_eq!(redact_secrets("가나다라", 2), "가나");
    }

    /// Secrets in their usual formats.
    fn secret() -> impl Strategy<Value = String> {
        prop_oneof![
            "hapa_[A-Za-z0-9]{50}",
            "hapr_[A-Za-z0-9]{43}",
            "eyJ[A-Za-z0-9_-]{20,40}\\.[A-Za-z0-9_-]{20,60}\\.[A-Za-z0-9_-]{43}",
            "sk-[A-Za-z0-9]{20,48}",
            "[0-9a-f]{33,64}",
            "[A-Za-z0-9+/]{20}[0-9][A-Za-z0-9+/]{20}",
        ]
    }

    proptest! {
        #[test]
        fn no_input_causes_a_panic_and_redaction_is_idempotent(text in any::<String>(), most in 0_usize..300) {
            let once = redact_secrets(&text, most);
            prop_assert!(once.chars().count() <= most);
            prop_assert_eq!(redact_secrets(&once, most), once);
        }

        #[test]
        fn redaction_of_text_like_secrets_is_idempotent(
            parts in prop::collection::vec(prop_oneof![
                secret(), "[a-zA-Z0-9/+=_.@: -]{0,40}", Just("://".to_owned()), Just("bearer ".to_owned()),
                Just("token=".to_owned()), Just("trace".to_owned()), Just("[removed]".to_owned()),
                Just("018f2c9e-7b1a-7c3d-8e4f-0123456789ab".to_owned()),
            ], 0..12),
            most in 0_usize..400,
        ) {
            let once = redact_secrets(&parts.concat(), most);
            prop_assert_eq!(redact_secrets(&once, most), once);
        }

        #[test]
        fn no_secret_survives(
            before in "[a-zA-Z .:=\"'(]{0,30}[ .:=\"'(]", secret in secret(), after in "[ ,.\"')][a-z ]{0,30}",
        ) {
            let text = format!("{before}{secret}{after}");
            let seen = clean(&text);
            prop_assert!(!seen.contains(&secret[8..20]), "{seen}");
        }

        #[test]
        fn no_password_of_a_url_and_no_bearer_token_survives(
            password in "[!-~]{8,40}", token in "[!-~]{8,40}",
        ) {
            prop_assume!(!"[removed]".contains(&password) && !token.to_lowercase().starts_with("bearer"));
            let url = clean(&format!("can't reach postgres://user:{password}@host/db today"));
            prop_assert!(!url.contains(&password) || "can't reach postgres://[removed]@host/db today".contains(&password));
            let header = clean(&format!("authorization: Bearer {token}"));
            prop_assert_eq!(header, "authorization: Bearer [removed]");
        }
    }
}

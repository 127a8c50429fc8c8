//! Takes secrets out of text before it is stored: keys, tokens, passwords in URLs, and long runs that
//! look random. It would rather take too much. What is scrubbed already stays as it is.

/// What stands in a secret's place: no character of it can be part of a secret.
const REMOVED: &str = "[removed]";
/// The longest text that is looked at, in bytes.
const LONGEST: usize = 16 * 1024;
/// A run of letters and digits from this length on is suspected.
const LONG_RUN: usize = 32;
/// No word is as long as this.
const LONGEST_WORD: usize = 64;
/// What begins a credential, and how much has to follow for it to be one.
const PREFIXES: [(&str, usize); 4] = [("hapa_", 16), ("hapr_", 16), ("eyJ", 16), ("sk-", 8)];
/// What is named like this is a secret, whatever it looks like.
const NAMES: [&str; 8] = [
    "password=",
    "passwd=",
    "secret=",
    "token=",
    "api_key=",
    "apikey=",
    "api-key=",
    "x-mesh-token:",
];

/// The text without its secrets, at most so many characters of it.
pub fn scrub(text: &str, most: usize) -> String {
    let text = match text.get(..LONGEST).or_else(|| text.get(..floor(text, LONGEST))) {
        Some(begin) if begin.len() < text.len() => whole_words(begin),
        _ => text,
    };
    let clean = Scrubber { text, at: 0, out: String::with_capacity(text.len()) }.run();
    match clean.char_indices().nth(most) {
        Some((end, _)) => whole_words(&clean[..end]).to_owned(),
        None => clean,
    }
}

/// Without the word that a cut went through: half of it may look like something else.
fn whole_words(cut: &str) -> &str {
    cut.trim_end_matches(|letter: char| letter.is_ascii() && is_run(letter as u8))
}

fn floor(text: &str, at: usize) -> usize {
    let mut at = at.min(text.len());
    while !text.is_char_boundary(at) {
        at -= 1;
    }
    at
}

struct Scrubber<'t> {
    text: &'t str,
    at: usize,
    out: String,
}

impl<'t> Scrubber<'t> {
    fn run(mut self) -> String {
        while let Some(letter) = self.rest().chars().next() {
            let taken = self.user_info() || self.bearer() || self.named();
            if !taken && !self.prefixed() && !self.long_run() {
                self.keep(letter.len_utf8());
            }
        }
        self.out
    }

    fn rest(&self) -> &'t str {
        &self.text[self.at..]
    }

    fn keep(&mut self, bytes: usize) {
        self.out.push_str(&self.rest()[..bytes]);
        self.at += bytes;
    }

    fn remove(&mut self, bytes: usize) -> bool {
        self.out.push_str(REMOVED);
        self.at += bytes;
        true
    }

    /// `://user:password@`. A password may hold anything, so the last @ of the word ends it.
    fn user_info(&mut self) -> bool {
        let Some(after) = self.rest().strip_prefix("://") else { return false };
        let Some(end) = word(after).rfind('@') else { return false };
        self.keep("://".len());
        self.remove(end)
    }

    /// `Bearer …`, however it is written.
    fn bearer(&mut self) -> bool {
        let Some(after) = without_case(self.rest(), "bearer") else { return false };
        let token = after.trim_start();
        let word = word(token);
        if token.len() == after.len() || word.is_empty() || without_case(word, "bearer").is_some() {
            return false;
        }
        self.keep("bearer".len() + after.len() - token.len());
        self.remove(word.len())
    }

    /// `password=…` and the like.
    fn named(&mut self) -> bool {
        let named = NAMES.iter().find(|name| without_case(self.rest(), name).is_some());
        let Some(name) = named else { return false };
        let after = &self.rest()[name.len()..];
        let value = after.trim_start();
        let ends = |letter: char| letter.is_whitespace() || "&,;\"'".contains(letter);
        let length = value.find(ends).unwrap_or(value.len());
        if length == 0 {
            return false;
        }
        self.keep(name.len() + after.len() - value.len());
        self.remove(length)
    }

    fn prefixed(&mut self) -> bool {
        let rest = self.rest();
        let found = PREFIXES.iter().find_map(|(prefix, least)| {
            let after = rest.strip_prefix(prefix)?;
            // A JWT has dots.
            let part = |byte: &u8| byte.is_ascii_alphanumeric() || b"-_.".contains(byte);
            let length = after.bytes().take_while(part).count();
            (length >= *least).then_some(prefix.len() + length)
        });
        // "sk-" also ends words.
        let in_word = self.out.ends_with(|letter: char| letter.is_ascii_alphanumeric());
        match found {
            Some(length) if !(in_word && rest.starts_with("sk-")) => self.remove(length),
            _ => false,
        }
    }

    /// Hex and base64. Kept: ids that people ask for, and what reads like words.
    fn long_run(&mut self) -> bool {
        if self.out.ends_with(|letter: char| letter.is_ascii() && is_run(letter as u8)) {
            return false;
        }
        let rest = self.rest();
        let length = rest.bytes().take_while(|byte| is_run(*byte)).count();
        let run = &rest[..length];
        if length < LONG_RUN {
            return false;
        }
        let traced = self.out.rsplit(char::is_whitespace).next().unwrap_or_default();
        let is_trace = traced.contains("trace") && is_trace_id(run);
        if is_trace || is_uuid(run) || is_traceparent(run) || is_words(run) {
            self.keep(length);
            return true;
        }
        let padding = rest[length..].bytes().take_while(|byte| *byte == b'=').count();
        self.remove(length + padding)
    }
}

/// Until the next white space.
fn word(text: &str) -> &str {
    text.split(char::is_whitespace).next().unwrap_or_default()
}

fn without_case<'t>(text: &'t str, begin: &str) -> Option<&'t str> {
    let (head, after) = text.split_at_checked(begin.len())?;
    head.eq_ignore_ascii_case(begin).then_some(after)
}

/// Hex, base64 of both alphabets.
fn is_run(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"+/-_".contains(&byte)
}

fn is_hex(text: &str) -> bool {
    text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

fn is_trace_id(run: &str) -> bool {
    run.len() == 32 && is_hex(run)
}

fn parts_are(run: &str, lengths: &[usize]) -> bool {
    let parts: Vec<_> = run.split('-').collect();
    let fits = parts.iter().zip(lengths).all(|(part, length)| part.len() == *length);
    parts.len() == lengths.len() && fits && parts.iter().all(|part| is_hex(part))
}

fn is_uuid(run: &str) -> bool {
    parts_are(run, &[8, 4, 4, 4, 12])
}

fn is_traceparent(run: &str) -> bool {
    parts_are(run, &[2, 32, 16, 2])
}

/// Paths and names: letters alone, with few capitals.
fn is_words(run: &str) -> bool {
    let count = |test: fn(&u8) -> bool| run.bytes().filter(test).count();
    let (small, capitals) = (count(u8::is_ascii_lowercase), count(u8::is_ascii_uppercase));
    run.len() <= LONGEST_WORD
        && count(u8::is_ascii_digit) == 0
        && capitals * 3 <= small
        && !PREFIXES.iter().any(|(prefix, _)| run.contains(prefix))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn clean(text: &str) -> String {
        scrub(text, 2_000)
    }

    #[test]
    fn secrets_go_and_what_helps_stays() {
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
        assert_eq!(scrub("one two three", 9), "one two ");
        assert_eq!(scrub("가나다라", 2), "가나");
    }

    /// Secrets as they are made.
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
        fn nothing_makes_it_panic_and_twice_is_once(text in any::<String>(), most in 0_usize..300) {
            let once = scrub(&text, most);
            prop_assert!(once.chars().count() <= most);
            prop_assert_eq!(scrub(&once, most), once);
        }

        #[test]
        fn twice_is_once_with_what_looks_like_secrets(
            parts in prop::collection::vec(prop_oneof![
                secret(), "[a-zA-Z0-9/+=_.@: -]{0,40}", Just("://".to_owned()), Just("bearer ".to_owned()),
                Just("token=".to_owned()), Just("trace".to_owned()), Just("[removed]".to_owned()),
                Just("018f2c9e-7b1a-7c3d-8e4f-0123456789ab".to_owned()),
            ], 0..12),
            most in 0_usize..400,
        ) {
            let once = scrub(&parts.concat(), most);
            prop_assert_eq!(scrub(&once, most), once);
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
        fn no_password_of_a_url_and_no_bearer_survives(
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

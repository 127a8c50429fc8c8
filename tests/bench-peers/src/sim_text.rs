//! The text that the simulator writes and the load generator expects. A gateway that loses, doubles or reorders
//! tokens therefore cannot look fast.

/// Length of a token.
pub(crate) const TOKEN_BYTES: usize = 4;
/// The question of every request ends with it.
pub(crate) const QUESTION: &str = "Write a function that parses a date in ISO 8601.";
/// Precedes the number of a request in its question, by which drops are matched with aborts.
pub(crate) const ID_MARK: &str = "bench-id:";

/// Appends a token: a space and three letters, which depend on its index only.
pub(crate) fn push_token(out: &mut Vec<u8>, index: u64) {
    const LETTERS: &[u8; 26] = b"abcdefghijklmnopqrstuvwxyz";
    out.push(b' ');
    let mut rest = index.wrapping_mul(2_654_435_761).wrapping_add(97);
    for _ in 1..TOKEN_BYTES {
        let letter = usize::try_from(rest % 26).unwrap_or_default();
        out.push(LETTERS[letter]);
        rest = rest / 26 + 7;
    }
}

/// The text of an answer.
pub(crate) fn answer(tokens: u64) -> Vec<u8> {
    let mut text = Vec::new();
    for index in 0..tokens {
        push_token(&mut text, index);
    }
    text
}

/// The number after the mark in a raw request body: it survives every gateway.
pub(crate) fn request_id(body: &[u8]) -> u64 {
    let Some(at) = memchr::memmem::find(body, ID_MARK.as_bytes()) else { return 0 };
    let digits = body[at + ID_MARK.len()..].iter().take_while(|byte| byte.is_ascii_digit());
    digits.fold(0, |id, digit| id * 10 + u64::from(digit - b'0'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_token_has_the_same_length() {
        assert_eq!(answer(500).len(), 500 * TOKEN_BYTES);
        assert!(answer(500).is_ascii());
    }

    #[test]
    fn the_id_of_a_request_is_read_from_its_body() {
        assert_eq!(request_id(br#"{"content":"bench-id:1207 Write"}"#), 1207);
        assert_eq!(request_id(b"{}"), 0);
    }
}

//! The words of a request. Engines repeat them in error messages, which must not be classified by them.

use serde_json::Value;

/// The texts of a request, as their ASCII letters and digits in lower case.
#[derive(Debug, Default)]
pub(super) struct RequestWords(String);

impl RequestWords {
    /// All strings of a request body.
    pub(super) fn of(request: &[u8]) -> RequestWords {
        let mut words = RequestWords::default();
        if let Ok(value) = serde_json::from_slice(request) {
            words.add(&value);
        }
        words
    }

    /// Whether the request contains a part of a message. The message may have escaped it.
    pub(super) fn contain(&self, part: &str) -> bool {
        let mut letters = String::new();
        push_letters(part, &mut letters);
        !letters.is_empty() && self.0.contains(&letters)
    }

    fn add(&mut self, value: &Value) {
        match value {
            Value::String(text) => {
                push_letters(text, &mut self.0);
                // Separates the texts.
                self.0.push(' ');
            }
            Value::Array(values) => values.iter().for_each(|value| self.add(value)),
            Value::Object(fields) => fields.values().for_each(|value| self.add(value)),
            _ => {}
        }
    }
}

/// Leaves out escape sequences, so that a text and its escaped form are the same.
fn push_letters(text: &str, letters: &mut String) {
    let mut rest = text.chars();
    while let Some(char) = rest.next() {
        if char.is_ascii_alphanumeric() {
            letters.push(char.to_ascii_lowercase());
        } else if char == '\\' {
            let mut escape = rest.clone();
            match escape.next() {
                Some('n' | 'r' | 't') => rest = escape,
                Some('u') => rest.nth(4).map_or((), drop),
                _ => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn words_of_a_request_are_found_in_any_escaped_form() {
        let text = "Say: the model\n\"x\" does \u{e9}not exist, c:\\new";
        let request = json!({"messages": [{"role": "user", "content": text}], "n": 1});
        let words = RequestWords::of(request.to_string().as_bytes());
        let escaped = json!(text).to_string();
        let twice = json!(escaped).to_string();
        for part in [text, &escaped, &twice, "model 'x' does not exist", "MODEL x does \\u00e9not"]
        {
            assert!(words.contain(part), "{part}");
        }
        for part in ["", "...", "the model y", "user say"] {
            assert!(!words.contain(part), "{part}");
        }
        assert!(!RequestWords::of(b"no JSON").contain("no"));
    }
}

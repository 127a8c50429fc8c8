//! The texts of a delta or message: strings, numbers, and lists of parts with a type.

use std::borrow::Cow;

use serde_json::{Map, Value};

use crate::upstream::engine::decode::oddity::Oddity;

/// Text, reasoning and refusal of one value, each concatenated.
#[derive(Debug, Default)]
pub(super) struct ContentTexts<'a> {
    pub(super) text: Cow<'a, str>,
    pub(super) reasoning: Cow<'a, str>,
    pub(super) refusal: Cow<'a, str>,
}

/// Reads a field with content. `kind` counts values of other types.
pub(super) fn read(value: Option<&Value>, kind: Oddity) -> ContentTexts<'_> {
    let mut texts = ContentTexts::default();
    match value {
        None | Some(Value::Null) => {}
        Some(Value::String(text)) => texts.text = Cow::Borrowed(text),
        Some(Value::Number(number)) => texts.text = Cow::Owned(number.to_string()),
        Some(Value::Array(parts)) => parts.iter().for_each(|part| texts.push_part(part, kind)),
        Some(part @ Value::Object(_)) => texts.push_part(part, kind),
        Some(Value::Bool(_)) => kind.count(),
    }
    texts
}

/// The reasoning of a delta: the first field that contains text. Engines repeat it under two names.
pub(super) fn reasoning(delta: &Map<String, Value>) -> Cow<'_, str> {
    for name in ["reasoning_content", "reasoning", "thinking"] {
        let text = flat_text(delta.get(name));
        if !text.is_empty() {
            return text;
        }
    }
    let mut whole = Cow::default();
    for detail in delta.get("reasoning_details").and_then(Value::as_array).into_iter().flatten() {
        let text = ["text", "summary"].iter().find_map(|name| detail.get(name)?.as_str());
        push(&mut whole, text.unwrap_or_default());
    }
    whole
}

/// A value that is reasoning as a whole, whatever the types of its parts.
fn flat_text(value: Option<&Value>) -> Cow<'_, str> {
    let mut texts = read(value, Oddity::Reasoning);
    push(&mut texts.reasoning, &texts.text);
    texts.reasoning
}

impl<'a> ContentTexts<'a> {
    fn push_part(&mut self, part: &'a Value, kind: Oddity) {
        let part = match part {
            Value::Null => return,
            Value::String(text) => return push(&mut self.text, text),
            Value::Object(part) => part,
            _ => return kind.count(),
        };
        let string = |name: &str| part.get(name).and_then(Value::as_str).unwrap_or_default();
        match part.get("type").and_then(Value::as_str).unwrap_or("text") {
            "text" | "output_text" => push(&mut self.text, string("text")),
            "thinking" | "reasoning" | "reasoning_text" => {
                // Mistral nests a list of text parts.
                let names = ["thinking", "reasoning", "text", "summary", "content"];
                let value = names.iter().find_map(|name| part.get(*name));
                push(&mut self.reasoning, &flat_text(value));
            }
            "refusal" => push(&mut self.refusal, string("refusal")),
            _ => kind.count(),
        }
    }
}

fn push(whole: &mut Cow<'_, str>, text: &str) {
    if !text.is_empty() {
        whole.to_mut().push_str(text);
    }
}

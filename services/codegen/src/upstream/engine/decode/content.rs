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
    for name in ["reasoning_content", "reasoning", "thinking", "thinking_blocks"] {
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
        match part.get("type").and_then(Value::as_str).unwrap_or("text") {
            // Mistral and Databricks nest a list of text parts.
            name if name.contains("thinking") || name.contains("reasoning") => {
                let names = ["thinking", "reasoning", "text", "summary", "content"];
                let mut texts = names.iter().map(|name| flat_text(part.get(*name)));
                push(&mut self.reasoning, &texts.find(|text| !text.is_empty()).unwrap_or_default());
            }
            "refusal" => {
                push(&mut self.refusal, part_text(part.get("refusal")).unwrap_or_default());
            }
            name => match part_text(part.get("text")) {
                Some(text) => push(&mut self.text, text),
                None if name == "text" => {}
                None => kind.count(),
            },
        }
    }
}

/// A string, or the object in which OpenAI's assistants contain it.
fn part_text(value: Option<&Value>) -> Option<&str> {
    let value = value?;
    value.as_str().or_else(|| value.get("value")?.as_str())
}

fn push(whole: &mut Cow<'_, str>, text: &str) {
    if !text.is_empty() {
        whole.to_mut().push_str(text);
    }
}

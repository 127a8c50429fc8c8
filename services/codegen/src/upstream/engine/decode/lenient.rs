//! Events in any form, read field by field. A field of an unexpected type counts as absent.

use std::borrow::Cow;

use serde_json::{Map, Value};

use crate::upstream::engine::decode::oddity::Oddity;
use crate::upstream::engine::decode::{
    ChoiceEvent, MAX_ENTRIES, content, counts, event_error, finish_reason, tool_call,
};
use crate::upstream::engine::delta::{EngineDelta, merge_usage};
use crate::upstream::engine::{EngineError, FinishReason, stream_error};

impl EngineDelta {
    /// Adds one event, or a list of events.
    pub(super) fn push_lenient(&mut self, value: &Value) -> Result<(), EngineError> {
        for event in entries(Some(value), Oddity::Event) {
            match event {
                Value::Object(event) => self.push_object(event)?,
                _ => Oddity::Event.count(),
            }
        }
        Ok(())
    }

    fn push_object(&mut self, event: &Map<String, Value>) -> Result<(), EngineError> {
        match event.get("model") {
            None | Some(Value::Null) => {}
            Some(Value::String(model)) => self.push_model(model),
            Some(_) => Oddity::Model.count(),
        }
        let groq = || counts::usage(event.get("x_groq").and_then(|groq| groq.get("usage")));
        let mut usage = counts::usage(event.get("usage")).or_else(groq);
        let choices = entries(event.get("choices"), Oddity::Choices);
        let is_single = choices.iter().filter(|choice| choice.is_object()).count() == 1;
        for (position, choice) in choices.iter().enumerate() {
            let Some(mut choice) = read_choice(position, choice) else { continue };
            if is_single {
                merge_usage(&mut choice.usage, usage.take());
            }
            self.push_choice(choice);
        }
        merge_usage(&mut self.usage, usage);
        event_error::read(event, choices).map_or(Ok(()), |error| Err(stream_error(&error)))
    }
}

fn read_choice(position: usize, choice: &Value) -> Option<ChoiceEvent<'_>> {
    let choice = match choice {
        Value::Null => return None,
        Value::Object(choice) => choice,
        _ => {
            Oddity::Choices.count();
            return None;
        }
    };
    let index = index(choice.get("index"), position)?;
    let mut event = ChoiceEvent { choice: index, ..ChoiceEvent::default() };
    // Engines that ignore `stream` send a message.
    if let Some(delta) = object(choice, "delta").or_else(|| object(choice, "message")) {
        let texts = content::read(delta.get("content"), Oddity::Content);
        let refusal = content::read(delta.get("refusal"), Oddity::Refusal).text;
        event.text = texts.text;
        event.refusal = first_text(refusal, texts.refusal);
        event.reasoning = first_text(content::reasoning(delta), texts.reasoning);
        event.tool_calls = tool_call::read(delta);
    }
    if event.text.is_empty() {
        event.text = content::read(choice.get("text"), Oddity::Content).text;
    }
    event.logprobs = counts::logprobs(choice.get("logprobs"));
    event.finish_reason = read_finish_reason(choice.get("finish_reason"));
    event.usage = counts::usage(choice.get("usage"));
    Some(event)
}

fn object<'a>(choice: &'a Map<String, Value>, name: &str) -> Option<&'a Map<String, Value>> {
    match choice.get(name)? {
        Value::Null => None,
        Value::Object(object) => Some(object),
        _ => {
            Oddity::Delta.count();
            None
        }
    }
}

fn first_text<'a>(first: Cow<'a, str>, second: Cow<'a, str>) -> Cow<'a, str> {
    if first.is_empty() { second } else { first }
}

fn read_finish_reason(value: Option<&Value>) -> Option<FinishReason> {
    match value? {
        Value::Null => None,
        Value::String(text) => finish_reason(text),
        _ => {
            Oddity::FinishReason.count();
            None
        }
    }
}

/// The entries of a list. An object counts as a list of one.
pub(super) fn entries(value: Option<&Value>, kind: Oddity) -> &[Value] {
    let list = match value {
        None | Some(Value::Null) => return &[],
        Some(Value::Array(list)) => list.as_slice(),
        Some(object @ Value::Object(_)) => std::slice::from_ref(object),
        Some(_) => {
            kind.count();
            return &[];
        }
    };
    if list.len() > MAX_ENTRIES {
        Oddity::OverLimit.count();
    }
    list.get(..MAX_ENTRIES).unwrap_or(list)
}

/// An index as a number or a string. Without one, the position counts. `None` if it exceeds the limit.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "such a cast saturates"
)]
pub(super) fn index(value: Option<&Value>, position: usize) -> Option<usize> {
    let number = match value {
        None | Some(Value::Null) => return Some(position),
        Some(Value::Number(number)) => number.as_f64(),
        Some(Value::String(text)) => text.trim().parse().ok(),
        Some(_) => None,
    };
    let is_index = |number: &f64| *number >= 0.0 && number.fract() == 0.0;
    let Some(number) = number.filter(is_index) else {
        Oddity::Index.count();
        return Some(position);
    };
    let index = number as usize;
    if index >= MAX_ENTRIES {
        Oddity::OverLimit.count();
    }
    (index < MAX_ENTRIES).then_some(index)
}

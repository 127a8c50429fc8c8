//! Events in any form, read field by field. A field of an unexpected type counts as absent.

use std::borrow::Cow;

use serde_json::{Map, Value};

use crate::upstream::engine::decode::oddity::Oddity;
use crate::upstream::engine::decode::{
    ChoiceEvent, MAX_ENTRIES, StreamDecoder, StreamedChoices, content, counts, event_error,
    finish_reason, tool_call,
};
use crate::upstream::engine::delta::{EngineDelta, merge_usage};
use crate::upstream::engine::{EngineError, FinishReason, stream_error};

impl StreamDecoder {
    /// Adds one event, or a list of events.
    pub(super) fn push_lenient(
        &mut self,
        value: &Value,
        delta: &mut EngineDelta,
    ) -> Result<(), EngineError> {
        for event in entries(Some(value), Oddity::Event) {
            match event {
                Value::Object(event) => self.push_object(event, delta)?,
                _ => Oddity::Event.count(),
            }
        }
        Ok(())
    }

    fn push_object(
        &mut self,
        event: &Map<String, Value>,
        delta: &mut EngineDelta,
    ) -> Result<(), EngineError> {
        match event.get("model") {
            None | Some(Value::Null) => {}
            Some(Value::String(model)) => delta.push_model(model),
            Some(_) => Oddity::Model.count(),
        }
        let groq = || counts::usage(event.get("x_groq").and_then(|groq| groq.get("usage")));
        let mut usage = counts::usage(event.get("usage")).or_else(groq);
        let choices = entries(event.get("choices"), Oddity::Choices);
        let is_single = choices.iter().filter(|choice| choice.is_object()).count() == 1;
        for (position, choice) in choices.iter().enumerate() {
            let Some(mut choice) = read_choice(position, choice, &mut self.streamed) else {
                continue;
            };
            if is_single {
                merge_usage(&mut choice.usage, usage.take());
            }
            delta.push_choice(choice);
        }
        merge_usage(&mut delta.usage, usage);
        event_error::read(event, choices)
            .map_or(Ok(()), |error| Err(stream_error(&error, &self.request)))
    }
}

fn read_choice<'a>(
    position: usize,
    choice: &'a Value,
    streamed: &mut StreamedChoices,
) -> Option<ChoiceEvent<'a>> {
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
    read_delta(choice.get("delta"), &mut event);
    for name in ["text", "content"] {
        if event.text.is_empty() {
            event.text = content::read(choice.get(name), Oddity::Content).text;
        }
    }
    if event.has_answer() || !event.reasoning.is_empty() {
        streamed.record(&event);
    } else {
        // Engines that ignore `stream` send a message. Others repeat the whole answer in one.
        read_delta(choice.get("message"), &mut event);
        streamed.remove_repeated(&mut event);
    }
    event.logprobs = counts::logprobs(choice.get("logprobs"));
    let holders = [Some(choice), choice.get("delta").and_then(Value::as_object)];
    event.finish_reason = holders
        .into_iter()
        .flatten()
        .find_map(|holder| read_finish_reason(holder.get("finish_reason"), &event));
    event.usage = counts::usage(choice.get("usage"));
    Some(event)
}

/// Reads a delta or a message.
fn read_delta<'a>(value: Option<&'a Value>, event: &mut ChoiceEvent<'a>) {
    match value {
        None | Some(Value::Null) => {}
        Some(Value::Object(delta)) => {
            let texts = content::read(delta.get("content"), Oddity::Content);
            let refusal = content::read(delta.get("refusal"), Oddity::Refusal).text;
            event.text = texts.text;
            event.refusal = first_text(refusal, texts.refusal);
            event.reasoning = first_text(content::reasoning(delta), texts.reasoning);
            event.tool_calls = tool_call::read(delta);
        }
        Some(Value::String(text)) => event.text = Cow::Borrowed(text),
        Some(_) => Oddity::Delta.count(),
    }
}

fn first_text<'a>(first: Cow<'a, str>, second: Cow<'a, str>) -> Cow<'a, str> {
    if first.is_empty() { second } else { first }
}

/// A value of another type shows that the answer has ended, but not why. Zero beside content may be a
/// default value.
fn read_finish_reason(value: Option<&Value>, event: &ChoiceEvent<'_>) -> Option<FinishReason> {
    let is_end = match value? {
        Value::Null => return None,
        Value::String(text) => return finish_reason(text),
        Value::Object(reason) => match reason.get("type") {
            Some(Value::String(text)) => return finish_reason(text),
            _ => false,
        },
        Value::Bool(is_end) => *is_end,
        Value::Number(number) => {
            number.as_f64() != Some(0.0) || !event.has_answer() && event.reasoning.is_empty()
        }
        Value::Array(_) => false,
    };
    Oddity::FinishReason.count();
    is_end.then_some(FinishReason::Other)
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

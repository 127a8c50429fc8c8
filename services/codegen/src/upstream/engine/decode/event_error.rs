//! Errors that an engine reports inside a stream.

use reqwest::StatusCode;
use serde_json::{Map, Value, json};

use crate::upstream::engine::RefusalReason;
use crate::upstream::engine::decode::oddity::Oddity;
use crate::upstream::engine::error_body::ErrorBody;

/// The error of an event, in the form that [`crate::upstream::engine::stream_error`] expects: an object
/// with `message`, `type` and `code` as far as they are known, or a text.
pub(super) fn read(event: &Map<String, Value>, choices: &[Value]) -> Option<Value> {
    let choices = choices.iter().filter_map(Value::as_object);
    let groq = event.get("x_groq").and_then(Value::as_object);
    let mut holders = std::iter::once(event).chain(choices).chain(groq);
    if let Some(error) = holders.find_map(field) {
        return Some(error);
    }
    is_flat(event).then(|| Value::Object(event.clone()))
}

/// The field `error` of an object. It may contain the error proper in a field of the same name.
fn field(holder: &Map<String, Value>) -> Option<Value> {
    match holder.get("error")? {
        error @ Value::Object(_) if is_blank(error) => None,
        Value::Object(error) => Some(field(error).unwrap_or_else(|| Value::Object(error.clone()))),
        Value::String(text) if text.trim().is_empty() => None,
        Value::String(text) => Some(with_neighbours(text, holder)),
        Value::Null | Value::Bool(false) => None,
        Value::Bool(true) | Value::Number(_) | Value::Array(_) => {
            Oddity::Error.count();
            None
        }
    }
}

/// TGI sends the text in `error`, and its type beside it.
fn with_neighbours(text: &str, holder: &Map<String, Value>) -> Value {
    let first = |names: &[&str]| names.iter().find_map(|name| holder.get(*name));
    let kind = first(&["error_type", "type"]);
    let code = first(&["code", "status", "status_code"]);
    if kind.is_none() && code.is_none() {
        return Value::from(text);
    }
    json!({"message": text, "type": kind, "code": code})
}

/// Some engines send an error in every event, without any content.
fn is_blank(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(value) => !value,
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::String(text) => text.trim().is_empty(),
        Value::Array(values) => values.iter().all(is_blank),
        Value::Object(fields) => fields.values().all(is_blank),
    }
}

/// An error without a field `error`: of SGLang and of older vLLM, or `detail` of FastAPI.
fn is_flat(event: &Map<String, Value>) -> bool {
    if event.get("choices").is_some_and(|choices| !choices.is_null()) {
        return false;
    }
    let has_text = |name: &str| {
        event.get(name).and_then(Value::as_str).is_some_and(|text| !text.trim().is_empty())
    };
    let has_detail = match event.get("detail") {
        Some(Value::Array(details)) => !details.is_empty(),
        Some(Value::Object(details)) => !details.is_empty(),
        _ => has_text("detail"),
    };
    let is_object_error = event.get("object").and_then(Value::as_str) == Some("error");
    if is_object_error || has_detail {
        return true;
    }
    if !has_text("message") {
        return false;
    }
    // Engines and proxies also send messages about their progress.
    let body = ErrorBody::from_value(&Value::Object(event.clone()));
    let reason = RefusalReason::classify(StatusCode::BAD_REQUEST, &body);
    let is_error =
        has_error_word(event) || body.status().is_some() || reason != RefusalReason::Other;
    if !is_error {
        Oddity::Event.count();
    }
    is_error
}

fn has_error_word(event: &Map<String, Value>) -> bool {
    let names = ["type", "object", "code", "status", "message"];
    let mut texts = names.iter().filter_map(|name| event.get(*name)?.as_str());
    texts.any(|text| text.to_ascii_lowercase().contains("error"))
}

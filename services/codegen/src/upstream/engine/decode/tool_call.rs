//! The tool calls of a delta or message.

use serde_json::{Map, Value};

use crate::upstream::engine::decode::oddity::Oddity;
use crate::upstream::engine::decode::{MAX_ENTRIES, lenient};
use crate::upstream::engine::delta::ToolCallDelta;

/// Reads `tool_calls`, and `function_call` of older engines.
pub(super) fn read(delta: &Map<String, Value>) -> Vec<ToolCallDelta> {
    // TGI sends an object in place of the list.
    let list = lenient::entries(delta.get("tool_calls"), Oddity::ToolCalls);
    let calls = list.iter().enumerate().filter_map(|(position, call)| read_call(position, call));
    let legacy = lenient::entries(delta.get("function_call"), Oddity::ToolCalls);
    let legacy = legacy.iter().take(1).filter_map(|call| read_call(0, call));
    calls.chain(legacy).collect()
}

/// `None` if it contains nothing.
fn read_call(position: usize, call: &Value) -> Option<ToolCallDelta> {
    let call = match call {
        Value::Null => return None,
        Value::Object(call) => call,
        _ => {
            Oddity::ToolCalls.count();
            return None;
        }
    };
    let function = call.get("function").and_then(Value::as_object).unwrap_or(call);
    let index = lenient::index(call.get("index"), position)?;
    let delta = ToolCallDelta {
        index,
        id: text(call.get("id")),
        name: text(function.get("name")),
        arguments: arguments(function.get("arguments")),
    };
    let is_empty = delta.id.is_none() && delta.name.is_none() && delta.arguments.is_empty();
    (!is_empty && index < MAX_ENTRIES).then_some(delta)
}

/// A string that is not empty, or the text of a number.
fn text(value: Option<&Value>) -> Option<String> {
    let text = match value {
        None | Some(Value::Null) => return None,
        Some(Value::String(text)) => text.clone(),
        Some(Value::Number(number)) => number.to_string(),
        Some(_) => {
            Oddity::ToolCalls.count();
            return None;
        }
    };
    (!text.is_empty()).then_some(text)
}

/// JSON in a string. Some engines send the JSON itself.
fn arguments(value: Option<&Value>) -> String {
    match value {
        None | Some(Value::Null) => String::new(),
        Some(Value::String(text)) => text.clone(),
        Some(object @ Value::Object(_)) => object.to_string(),
        Some(_) => {
            Oddity::ToolCalls.count();
            String::new()
        }
    }
}

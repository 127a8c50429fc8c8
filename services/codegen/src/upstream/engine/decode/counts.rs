//! Token counts and log probabilities. Numbers that cannot be right are skipped.

use hapa_proto::codegen::v1::Usage;
use serde_json::{Map, Value};

use crate::upstream::engine::decode::oddity::Oddity;

/// A sum of log probabilities.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct LogprobSum {
    pub(super) sum: f64,
    pub(super) tokens: u32,
}

impl FromIterator<f64> for LogprobSum {
    fn from_iter<I: IntoIterator<Item = f64>>(values: I) -> LogprobSum {
        let mut total = LogprobSum::default();
        for value in values.into_iter().filter(|value| value.is_finite()) {
            // A probability above 1 is a rounding error.
            total.sum += value.min(0.0);
            total.tokens = total.tokens.saturating_add(1);
        }
        total
    }
}

/// The log probabilities of a choice: a list of numbers, or else a list of rows.
pub(super) fn logprobs(value: Option<&Value>) -> LogprobSum {
    let lists = match value {
        None | Some(Value::Null) => return LogprobSum::default(),
        Some(Value::Object(lists)) => lists,
        Some(_) => {
            Oddity::Logprobs.count();
            return LogprobSum::default();
        }
    };
    let numbers = entries(lists.get("token_logprobs"));
    let sum: LogprobSum = numbers.iter().filter_map(logprob).collect();
    if sum.tokens > 0 {
        return sum;
    }
    let rows = entries(lists.get("content")).iter();
    let logprobs = rows.filter_map(|row| match row {
        Value::Null => None,
        Value::Object(row) => row.get("logprob").and_then(logprob),
        _ => {
            Oddity::Logprobs.count();
            None
        }
    });
    logprobs.collect()
}

fn entries(value: Option<&Value>) -> &[Value] {
    match value {
        None | Some(Value::Null) => &[],
        Some(Value::Array(entries)) => entries,
        Some(_) => {
            Oddity::Logprobs.count();
            &[]
        }
    }
}

fn logprob(value: &Value) -> Option<f64> {
    if !value.is_number() && !value.is_null() {
        Oddity::Logprobs.count();
    }
    value.as_f64()
}

/// The usage of an event or of a choice. `None` without a count above 0.
pub(super) fn usage(value: Option<&Value>) -> Option<Usage> {
    let counts = match value {
        None | Some(Value::Null) => return None,
        Some(Value::Object(counts)) => counts,
        Some(_) => {
            Oddity::Usage.count();
            return None;
        }
    };
    let nested = |parent: &str, name: &str| {
        let details = counts.get(parent).and_then(Value::as_object);
        details.and_then(|details| count(details, name))
    };
    let first = |name: &str, other: &str| count(counts, name).or_else(|| count(counts, other));
    let cached = nested("prompt_tokens_details", "cached_tokens");
    let cached = cached.or_else(|| count(counts, "prompt_cache_hit_tokens"));
    let reasoning = nested("completion_tokens_details", "reasoning_tokens");
    let reasoning = reasoning.or_else(|| count(counts, "reasoning_tokens"));
    complete_usage(Usage {
        prompt_tokens: first("prompt_tokens", "input_tokens").unwrap_or_default(),
        completion_tokens: first("completion_tokens", "output_tokens").unwrap_or_default(),
        total_tokens: count(counts, "total_tokens").unwrap_or_default(),
        reasoning_tokens: reasoning.unwrap_or_default(),
        cached_tokens: cached.unwrap_or_default(),
    })
}

/// Any number, also in a string, saturated to `u32`.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "such a cast saturates"
)]
fn count(counts: &Map<String, Value>, name: &str) -> Option<u32> {
    let number = match counts.get(name)? {
        Value::Null => return None,
        Value::Number(number) => number.as_f64(),
        Value::String(text) => text.trim().parse().ok(),
        _ => None,
    };
    let number: Option<f64> = number.filter(|number| *number >= 0.0);
    if number.is_none() {
        Oddity::Usage.count();
    }
    number.map(|number| number as u32)
}

/// Adds the sum, which some engines omit. xAI and Gemini count reasoning in the total only. Engines that do
/// not count report zeros.
pub(super) fn complete_usage(usage: Usage) -> Option<Usage> {
    let sum = usage.prompt_tokens.saturating_add(usage.completion_tokens);
    let total_tokens = usage.total_tokens.max(sum);
    let mut usage = Usage { total_tokens, ..usage };
    if usage.prompt_tokens > 0 && total_tokens > sum {
        usage.completion_tokens = total_tokens - usage.prompt_tokens;
    }
    (usage != Usage::default()).then_some(usage)
}

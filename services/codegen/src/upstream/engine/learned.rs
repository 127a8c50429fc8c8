//! The request fields that an engine does not support, learned from its refusals.
//!
//! A field is left out for good only after the engine has accepted a request without it. An error text that
//! repeats a prompt can therefore not switch off a field.

use std::sync::atomic::{AtomicU32, Ordering};

use bytes::Bytes;
use serde_json::{Map, Value};

use crate::upstream::engine::request_field::RequestField;
use crate::upstream::engine::{EngineError, Operation, RefusalReason};

/// Maximum number of fields that one attempt leaves out anew.
const MAX_NEW_FIELDS: u32 = 4;

/// What one engine does not support, by operation.
#[derive(Debug, Default)]
pub(crate) struct LearnedLimits {
    chat: AtomicU32,
    completion: AtomicU32,
}

/// A set of request fields.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct FieldSet(u32);

/// The fields that one attempt leaves out: those learned before, and new ones.
#[derive(Debug)]
pub(crate) struct Adaptation<'l> {
    limits: &'l LearnedLimits,
    operation: Operation,
    left_out: FieldSet,
    new: FieldSet,
}

impl LearnedLimits {
    /// Begins an attempt.
    pub(crate) fn adaptation(&self, operation: Operation) -> Adaptation<'_> {
        let left_out = FieldSet(self.operation(operation).load(Ordering::Relaxed));
        Adaptation { limits: self, operation, left_out, new: FieldSet::default() }
    }

    /// The names of all fields that are left out, for any operation.
    pub(crate) fn names(&self) -> Vec<&'static str> {
        let all = self.chat.load(Ordering::Relaxed) | self.completion.load(Ordering::Relaxed);
        FieldSet(all).names().collect()
    }

    fn operation(&self, operation: Operation) -> &AtomicU32 {
        match operation {
            Operation::Chat => &self.chat,
            Operation::Completion => &self.completion,
        }
    }
}

impl Adaptation<'_> {
    /// The body without the fields that are left out.
    pub(crate) fn apply(&self, body: &Bytes) -> Bytes {
        if self.left_out == FieldSet::default() {
            return body.clone();
        }
        let Ok(Value::Object(mut request)) = serde_json::from_slice(body) else {
            return body.clone();
        };
        for field in self.left_out.iter() {
            remove(&mut request, field);
        }
        serde_json::to_vec(&request).map_or_else(|_| body.clone(), Bytes::from)
    }

    /// Leaves out the field that an error names. Returns whether the request is different without it, so that
    /// the engine may accept it. `body` is the request before any adaptation.
    pub(crate) fn learn_from(&mut self, error: &EngineError, body: &Bytes) -> bool {
        let Some((_, RefusalReason::FieldRefused { field, is_unsupported })) = error.rejection()
        else {
            return false;
        };
        let is_learnable =
            is_extra(field) || (is_unsupported && is_optional(field, self.operation));
        let is_known = self.left_out.contains(field) || self.new.len() >= MAX_NEW_FIELDS;
        if !is_learnable || is_known || !contains(body, field) {
            return false;
        }
        self.left_out.insert(field);
        self.new.insert(field);
        true
    }

    /// The engine has accepted the request: the new fields are left out from now on. Returns the names of
    /// those that no other attempt has learned meanwhile.
    pub(crate) fn keep(self) -> Vec<&'static str> {
        let learned = self.limits.operation(self.operation);
        let before = learned.fetch_or(self.new.0, Ordering::Relaxed);
        FieldSet(self.new.0 & !before).names().collect()
    }
}

impl FieldSet {
    fn bit(field: RequestField) -> u32 {
        1 << field as u32
    }

    fn insert(&mut self, field: RequestField) {
        self.0 |= FieldSet::bit(field);
    }

    fn contains(self, field: RequestField) -> bool {
        self.0 & FieldSet::bit(field) != 0
    }

    fn len(self) -> u32 {
        self.0.count_ones()
    }

    fn iter(self) -> impl Iterator<Item = RequestField> {
        RequestField::ALL.into_iter().filter(move |field| self.contains(*field))
    }

    fn names(self) -> impl Iterator<Item = &'static str> {
        self.iter().map(RequestField::name)
    }
}

/// Fields that this server adds on its own: an engine may refuse them for any reason.
fn is_extra(field: RequestField) -> bool {
    matches!(
        field,
        RequestField::CacheSalt
            | RequestField::Priority
            | RequestField::StreamOptions
            | RequestField::ContinuousUsageStats
            | RequestField::Logprobs
    )
}

/// Fields without which an engine applies its own default. A refused value of them is the caller's.
fn is_optional(field: RequestField, operation: Operation) -> bool {
    match field {
        RequestField::N | RequestField::Stop | RequestField::Temperature | RequestField::TopP => {
            true
        }
        // Its replacement exists for chats only.
        RequestField::MaxTokens => matches!(operation, Operation::Chat),
        _ => false,
    }
}

fn contains(body: &Bytes, field: RequestField) -> bool {
    serde_json::from_slice(body)
        .is_ok_and(|mut request: Map<String, Value>| remove(&mut request, field))
}

/// Removes a field, or renames it. Returns whether the request had it.
fn remove(request: &mut Map<String, Value>, field: RequestField) -> bool {
    match field {
        RequestField::ContinuousUsageStats => request
            .get_mut(RequestField::StreamOptions.name())
            .and_then(Value::as_object_mut)
            .is_some_and(|options| options.remove(field.name()).is_some()),
        RequestField::MaxTokens => {
            let Some(limit) = request.remove(field.name()) else { return false };
            request.insert("max_completion_tokens".to_owned(), limit);
            true
        }
        RequestField::Logprobs => {
            request.remove("top_logprobs");
            request.remove(field.name()).is_some()
        }
        field => request.remove(field.name()).is_some(),
    }
}

#[cfg(test)]
mod tests {
    use reqwest::StatusCode;
    use serde_json::json;

    use super::*;

    fn body() -> Bytes {
        let body = json!({
            "model": "m", "messages": [], "temperature": 0.3, "top_p": 0.9, "max_tokens": 7, "n": 2,
            "stop": ["x"], "logprobs": 1, "stream": true, "cache_salt": "s", "priority": 1,
            "stream_options": {"include_usage": true, "continuous_usage_stats": true},
        });
        body.to_string().into()
    }

    fn refused(status: u16, error: &Value) -> EngineError {
        let body = json!({ "error": error }).to_string();
        EngineError::refused(StatusCode::from_u16(status).unwrap(), None, body.as_bytes())
    }

    fn applied(adaptation: &Adaptation<'_>) -> Value {
        serde_json::from_slice(&adaptation.apply(&body())).unwrap()
    }

    #[test]
    fn a_refused_extra_is_left_out_once_the_engine_accepts_the_rest() {
        let limits = LearnedLimits::default();
        let mut adaptation = limits.adaptation(Operation::Chat);
        assert_eq!(adaptation.apply(&body()), body());
        let error = refused(400, &json!("Unrecognized request argument supplied: cache_salt"));
        assert!(adaptation.learn_from(&error, &body()));
        assert!(applied(&adaptation).get("cache_salt").is_none());
        assert!(!adaptation.learn_from(&error, &body()), "the same refusal again");
        assert!(limits.names().is_empty(), "the engine has not accepted it yet");
        assert_eq!(adaptation.keep(), ["cache_salt"]);
        assert_eq!(limits.names(), ["cache_salt"]);
        let later = limits.adaptation(Operation::Chat);
        assert!(applied(&later).get("cache_salt").is_none());
        assert!(later.keep().is_empty());
        assert_eq!(limits.adaptation(Operation::Completion).apply(&body()), body());
    }

    #[test]
    fn each_field_is_left_out_or_renamed() {
        let without = |name: &str| {
            let mut expected: Value = serde_json::from_slice(&body()).unwrap();
            expected.as_object_mut().unwrap().remove(name);
            expected
        };
        for name in [
            "cache_salt",
            "priority",
            "stream_options",
            "logprobs",
            "n",
            "stop",
            "temperature",
            "top_p",
        ] {
            let limits = LearnedLimits::default();
            let mut adaptation = limits.adaptation(Operation::Completion);
            let error = refused(400, &json!({"param": name, "code": "unsupported_parameter"}));
            assert!(adaptation.learn_from(&error, &body()), "{name}");
            assert_eq!(applied(&adaptation), without(name));
        }
        let limits = LearnedLimits::default();
        let mut adaptation = limits.adaptation(Operation::Chat);
        let words = "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead.";
        assert!(adaptation.learn_from(&refused(400, &json!(words)), &body()));
        let mut expected = without("max_tokens");
        expected["max_completion_tokens"] = json!(7);
        assert_eq!(applied(&adaptation), expected);
        let nested = json!({"param": "stream_options.continuous_usage_stats"});
        assert!(adaptation.learn_from(&refused(400, &nested), &body()));
        assert_eq!(applied(&adaptation)["stream_options"], json!({"include_usage": true}));
    }

    #[test]
    fn what_the_caller_must_correct_is_not_learned() {
        for (status, operation, error) in [
            (400, Operation::Chat, json!({"message": "must be at most 2", "param": "temperature"})),
            (
                400,
                Operation::Chat,
                json!({"message": "max_tokens is too large", "param": "max_tokens"}),
            ),
            (400, Operation::Completion, json!("Unsupported parameter: 'max_tokens'")),
            (400, Operation::Chat, json!({"message": "is not supported", "param": "messages"})),
            (400, Operation::Chat, json!("unknown field context")),
            (500, Operation::Chat, json!("Unrecognized request argument supplied: cache_salt")),
        ] {
            let limits = LearnedLimits::default();
            let mut adaptation = limits.adaptation(operation);
            assert!(!adaptation.learn_from(&refused(status, &error), &body()), "{error}");
        }
    }

    #[test]
    fn an_attempt_leaves_out_four_new_fields_at_most_and_none_that_it_did_not_send() {
        let limits = LearnedLimits::default();
        let mut adaptation = limits.adaptation(Operation::Chat);
        let mut learn = |name: &str, body: &Bytes| {
            adaptation.learn_from(&refused(422, &json!({ "param": name })), body)
        };
        assert!(!learn("cache_salt", &Bytes::from_static(b"{\"model\":\"m\"}")));
        assert!(!learn("cache_salt", &Bytes::from_static(b"no JSON")));
        for name in ["cache_salt", "priority", "logprobs", "stream_options.continuous_usage_stats"]
        {
            assert!(learn(name, &body()), "{name}");
        }
        assert!(!learn("stream_options", &body()));
    }
}

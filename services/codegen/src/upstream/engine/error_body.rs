//! The error body of an engine, read tolerantly: vLLM, OpenAI, FastAPI, SGLang, TGI and others have
//! different shapes. All texts are untrusted. They are compared with fixed lists and then dropped.

use reqwest::StatusCode;
use serde_json::Value;

use crate::upstream::engine::echo::RequestWords;
use crate::upstream::engine::request_field::{self, RequestField};
use crate::upstream::engine::wordings::{self, Meaning};

/// Maximum number of characters of a message that are compared. Engines name the problem first, and may
/// repeat the prompt after it.
const MAX_COMPARED_CHARS: usize = 512;
/// Maximum depth of an error inside an error.
const MAX_DEPTH: usize = 3;
/// Where pydantic begins to repeat the request.
const ECHO_MARKS: [&str; 4] = ["'input':", "\"input\":", "input_value=", "'ctx':"];

/// Statuses by the name of an error's code or type, without case and punctuation.
const STATUS_NAMES: &[(&str, u16)] = &[
    ("badrequest", 400),
    ("badrequesterror", 400),
    ("invalidrequest", 400),
    ("invalidrequesterror", 400),
    ("contextlengthexceeded", 400),
    ("exceedcontextsizeerror", 400),
    ("unauthorized", 401),
    ("authenticationerror", 401),
    ("invalidapikey", 401),
    ("permissionerror", 403),
    ("permissiondeniederror", 403),
    ("notfound", 404),
    ("notfounderror", 404),
    ("modelnotfound", 404),
    ("validation", 422),
    ("validationerror", 422),
    ("unprocessableentity", 422),
    ("unprocessableentityerror", 422),
    ("ratelimiterror", 429),
    ("ratelimitexceeded", 429),
    ("toomanyrequests", 429),
    ("overloaded", 503),
    ("overloadederror", 503),
    ("serviceunavailable", 503),
    ("serviceunavailableerror", 503),
    ("unavailableerror", 503),
    ("internalservererror", 500),
    ("internalerror", 500),
    ("servererror", 500),
    ("apierror", 500),
];

/// The compared parts of an error body, in lower case. Missing parts are empty.
#[derive(Debug, Default)]
pub(super) struct ErrorBody {
    message: String,
    code: String,
    kind: String,
    /// The named field: `param`, or the location of a validation error.
    path: String,
    number: Option<u16>,
    /// The code of an error inside the error: Azure.
    inner_code: String,
    /// A message that repeats these words says nothing.
    request: RequestWords,
}

impl ErrorBody {
    /// From the body of a response. Text other than JSON is a message, unless it is HTML.
    pub(super) fn parse(body: &[u8]) -> ErrorBody {
        let mut error = ErrorBody::default();
        match serde_json::from_slice(body) {
            Ok(value) => error.read(&value, MAX_DEPTH),
            Err(_) if body.trim_ascii_start().starts_with(b"<") => {}
            Err(_) => {
                let start = &body[..body.len().min(4 * MAX_COMPARED_CHARS)];
                error.message = comparable(&String::from_utf8_lossy(start));
            }
        }
        error
    }

    /// From an error, or from the event or body that contains it.
    pub(super) fn from_value(value: &Value) -> ErrorBody {
        let mut error = ErrorBody::default();
        error.read(value, MAX_DEPTH);
        error
    }

    /// The same error, as the reply to this request body.
    pub(super) fn in_reply_to(mut self, request: &[u8]) -> ErrorBody {
        self.request = RequestWords::of(request);
        self
    }

    fn read(&mut self, value: &Value, depth: usize) {
        match value {
            Value::String(text) => fill(&mut self.message, text),
            Value::Array(list) => list.first().iter().for_each(|first| self.descend(first, depth)),
            Value::Object(object) => {
                for (name, value) in object {
                    match (name.as_str(), value) {
                        ("message" | "msg", Value::String(text)) => fill(&mut self.message, text),
                        ("code", Value::String(text)) => fill(&mut self.code, text),
                        ("type" | "error_type", Value::String(text)) => fill(&mut self.kind, text),
                        ("param", Value::String(text)) => fill(&mut self.path, text),
                        ("loc", Value::Array(parts)) => {
                            let parts: Vec<_> = parts.iter().filter_map(Value::as_str).collect();
                            fill(&mut self.path, &parts.join("."));
                        }
                        ("innererror", Value::Object(inner)) => {
                            let code = inner.get("code").and_then(Value::as_str);
                            fill(&mut self.inner_code, code.unwrap_or_default());
                        }
                        ("error" | "errors" | "detail", inner) => self.descend(inner, depth),
                        _ => {}
                    }
                    if matches!(name.as_str(), "code" | "status" | "status_code" | "http_status") {
                        self.number = self.number.or_else(|| status_number(value));
                    }
                }
            }
            _ => {}
        }
    }

    fn descend(&mut self, inner: &Value, depth: usize) {
        if let Some(depth) = depth.checked_sub(1) {
            self.read(inner, depth);
        }
    }

    /// The status that the body contains: a number, or the name of a code or type.
    pub(super) fn status(&self) -> Option<StatusCode> {
        let named = || {
            [&self.code, &self.kind].into_iter().find_map(|name| {
                let name: String = name.chars().filter(char::is_ascii_alphanumeric).collect();
                STATUS_NAMES.iter().find(|(known, _)| *known == name).map(|(_, status)| *status)
            })
        };
        self.number.or_else(named).and_then(|number| StatusCode::from_u16(number).ok())
    }

    /// Whether a code, a type or the message has the meaning.
    pub(super) fn means(&self, meaning: Meaning) -> bool {
        self.has_code(meaning) || self.says(meaning)
    }

    /// Whether a code or a type has the meaning.
    pub(super) fn has_code(&self, meaning: Meaning) -> bool {
        [&self.code, &self.kind, &self.inner_code].into_iter().any(|code| meaning.is_code(code))
    }

    /// Whether the message has the meaning by its own words.
    fn says(&self, meaning: Meaning) -> bool {
        meaning.find(&self.message).is_some_and(|words| !self.request.contain(words))
    }

    pub(super) fn is_context_too_long(&self) -> bool {
        matches!(self.path.as_str(), "input_tokens" | "input_text")
            || self.means(Meaning::ContextTooLong)
    }

    pub(super) fn is_model_missing(&self) -> bool {
        self.path == "model" || self.means(Meaning::ModelMissing)
    }

    /// The same where the status is 400, which most engines use for other problems.
    pub(super) fn is_model_rejected(&self) -> bool {
        let name = wordings::INVALID_MODEL_NAME;
        self.has_code(Meaning::ModelMissing)
            || (self.path == "model" && self.says(Meaning::ModelMissing))
            || (self.message.contains(name) && !self.request.contain(name))
    }

    /// The field that is refused, and whether it or its value is not supported at all.
    pub(super) fn refused_field(&self) -> Option<(RequestField, bool)> {
        let own = |found: Option<(RequestField, &str)>| {
            found.filter(|(_, words)| !self.request.contain(words)).map(|(field, _)| field)
        };
        let named = RequestField::from_path(&self.path)
            .or_else(|| own(RequestField::located_in(&self.message)));
        let in_message = own(RequestField::refused_in(&self.message));
        match named {
            Some(field) => {
                let is_unsupported = in_message == Some(field)
                    || [&self.code, &self.kind]
                        .iter()
                        .any(|text| request_field::is_unsupported(text))
                    || request_field::unsupported_words(&self.message)
                        .any(|words| !self.request.contain(words));
                Some((field, is_unsupported))
            }
            None => in_message.map(|field| (field, true)),
        }
    }
}

fn fill(part: &mut String, text: &str) {
    if part.is_empty() {
        *part = comparable(text);
    }
}

/// In lower case, truncated, and without what pydantic repeats of the request.
fn comparable(text: &str) -> String {
    let text: String = text.chars().take(MAX_COMPARED_CHARS).collect();
    let mut text = text.to_lowercase();
    let echo = ECHO_MARKS.iter().filter_map(|mark| text.find(mark)).min();
    if let Some(echo) = echo {
        text.truncate(echo);
    }
    text
}

/// A number, or a string of one, in the range of error statuses.
fn status_number(value: &Value) -> Option<u16> {
    let number = match value {
        Value::String(text) => text.trim().parse().ok(),
        value => value.as_u64(),
    };
    number.and_then(|number| u16::try_from(number).ok()).filter(|one| (400..600).contains(one))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_parts_of_all_shapes_are_read() {
        for body in [
            json!({"error": {"message": "No", "type": "T", "param": "n", "code": 400}}),
            json!({"object": "error", "message": "No", "type": "T", "param": "n", "code": 400}),
            json!([{"error": {"message": "No", "type": "T", "param": "n", "code": "400"}}]),
            json!({"detail": [{"type": "T", "loc": ["body", "n"], "msg": "No"}], "status": 400}),
            json!({"detail": {"error": {"message": "No", "type": "T", "param": "n"}}, "code": 400}),
        ] {
            let read = ErrorBody::parse(body.to_string().as_bytes());
            let found = (read.message.as_str(), read.kind.as_str(), read.number);
            assert_eq!(found, ("no", "t", Some(400)), "{body}");
            assert_eq!(RequestField::from_path(&read.path), Some(RequestField::N), "{body}");
        }
        let flat = json!({"error": "Input validation error", "error_type": "validation"});
        let flat = ErrorBody::from_value(&flat);
        assert_eq!(
            (flat.message.as_str(), flat.status()),
            ("input validation error", Some(StatusCode::UNPROCESSABLE_ENTITY))
        );
        assert_eq!(ErrorBody::parse(b"404 page not found").message, "404 page not found");
        assert_eq!(ErrorBody::parse(b"<html>model x not found</html>").message, "");
    }

    #[test]
    fn a_status_is_a_number_or_the_name_of_a_code_or_type() {
        for (error, expected) in [
            (json!({"code": 500}), Some(500)),
            (json!({"code": "429"}), Some(429)),
            (json!({"status": 422}), Some(422)),
            (json!({"type": "BadRequestError"}), Some(400)),
            (json!({"type": "invalid_request_error", "code": null}), Some(400)),
            (json!({"type": "Bad Request"}), Some(400)),
            (json!({"type": "InternalServerError"}), Some(500)),
            (json!({"type": "tokens", "code": "rate_limit_exceeded"}), Some(429)),
            (json!({"type": "unavailable_error"}), Some(503)),
            (json!({"code": 9_999_999}), None),
            (json!({"code": 200, "type": "what was asked"}), None),
            (json!("what was asked"), None),
        ] {
            let status = ErrorBody::from_value(&error).status().map(|status| status.as_u16());
            assert_eq!(status, expected, "{error}");
        }
    }

    #[test]
    fn what_pydantic_repeats_of_a_prompt_is_not_compared() {
        let message =
            "[{'type': 'missing', 'loc': ('body',), 'input': 'cache_salt is not supported'}]";
        let body = json!({ "error": { "message": message } });
        assert_eq!(ErrorBody::from_value(&body).refused_field(), None);
        let late = format!("{} cache_salt is not supported", "x".repeat(600));
        assert_eq!(ErrorBody::from_value(&json!(late)).refused_field(), None);
    }

    #[test]
    fn a_refused_value_is_distinguished_from_an_unsupported_field() {
        for (error, expected) in [
            (
                json!({"message": "must be at most 2", "param": "temperature"}),
                (RequestField::Temperature, false),
            ),
            (
                json!({"message": "no", "param": "temperature", "code": "unsupported_value"}),
                (RequestField::Temperature, true),
            ),
            (
                json!({"message": "max_tokens is too large", "param": "max_tokens"}),
                (RequestField::MaxTokens, false),
            ),
            (
                json!({"type": "extra_forbidden", "loc": ["body", "cache_salt"], "msg": "Extra inputs are not permitted"}),
                (RequestField::CacheSalt, true),
            ),
            (json!("Unknown field: `priority`"), (RequestField::Priority, true)),
        ] {
            assert_eq!(ErrorBody::from_value(&error).refused_field(), Some(expected), "{error}");
        }
    }
}

//! The fields of our requests that an engine can name when it refuses a request. The list is fixed, so
//! that a field's name in logs and errors never comes from an engine.

use std::fmt::Write as _;
use std::sync::LazyLock;

use regex::Regex;

/// A field of a request to an engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RequestField {
    CacheSalt,
    Priority,
    StreamOptions,
    ContinuousUsageStats,
    Logprobs,
    N,
    Stop,
    Temperature,
    TopP,
    MaxTokens,
    Model,
    Messages,
    Prompt,
    Stream,
}

impl RequestField {
    pub(super) const ALL: [RequestField; 14] = [
        RequestField::CacheSalt,
        RequestField::Priority,
        RequestField::StreamOptions,
        RequestField::ContinuousUsageStats,
        RequestField::Logprobs,
        RequestField::N,
        RequestField::Stop,
        RequestField::Temperature,
        RequestField::TopP,
        RequestField::MaxTokens,
        RequestField::Model,
        RequestField::Messages,
        RequestField::Prompt,
        RequestField::Stream,
    ];

    /// Name in request bodies.
    pub(crate) fn name(self) -> &'static str {
        match self {
            RequestField::CacheSalt => "cache_salt",
            RequestField::Priority => "priority",
            RequestField::StreamOptions => "stream_options",
            RequestField::ContinuousUsageStats => "continuous_usage_stats",
            RequestField::Logprobs => "logprobs",
            RequestField::N => "n",
            RequestField::Stop => "stop",
            RequestField::Temperature => "temperature",
            RequestField::TopP => "top_p",
            RequestField::MaxTokens => "max_tokens",
            RequestField::Model => "model",
            RequestField::Messages => "messages",
            RequestField::Prompt => "prompt",
            RequestField::Stream => "stream",
        }
    }

    /// The name in our API, if callers can set the field.
    pub(crate) fn caller_field(self) -> Option<&'static str> {
        match self {
            RequestField::Temperature | RequestField::TopP | RequestField::MaxTokens => {
                Some(self.name())
            }
            _ => None,
        }
    }

    /// No request is possible without it.
    fn is_required(self) -> bool {
        matches!(
            self,
            RequestField::Model
                | RequestField::Messages
                | RequestField::Prompt
                | RequestField::Stream
        )
    }

    fn from_name(name: &str) -> Option<RequestField> {
        match name {
            "top_logprobs" => Some(RequestField::Logprobs),
            "max_completion_tokens" => Some(RequestField::MaxTokens),
            name => RequestField::ALL.into_iter().find(|field| field.name() == name),
        }
    }

    /// From a path such as `stream_options.continuous_usage_stats`, `body.n` or `messages[0].content`.
    pub(super) fn from_path(path: &str) -> Option<RequestField> {
        let mut parts = path.split(['.', '[', ']', '/']).filter(|part| !part.is_empty());
        let first = parts.next().filter(|part| *part != "body").or_else(|| parts.next())?;
        match (RequestField::from_name(first)?, parts.next()) {
            (RequestField::StreamOptions, Some("continuous_usage_stats")) => {
                Some(RequestField::ContinuousUsageStats)
            }
            (field, _) => Some(field),
        }
    }

    /// The field that a lower-case message refuses as unknown or unsupported. Only the phrases of
    /// engines count, because field names such as `stop` are words of prompts too.
    /// Returns the matching part of the message too.
    pub(super) fn refused_in(message: &str) -> Option<(RequestField, &str)> {
        let found = REFUSED_FIELD.captures(message)?;
        let field = RequestField::from_name(found.iter().skip(1).flatten().next()?.as_str())?;
        Some((field, found.get(0)?.as_str()))
    }

    /// The field at a pydantic location inside a message, such as `'loc': ('body', 'cache_salt')`.
    /// Returns the matching part of the message too.
    pub(super) fn located_in(message: &str) -> Option<(RequestField, &str)> {
        let found = LOCATION.captures(message)?;
        let nested = found.get(2).map(|part| part.as_str()).unwrap_or_default();
        let field = RequestField::from_path(&format!("{}.{nested}", &found[1]))?;
        Some((field, found.get(0)?.as_str()))
    }
}

/// Whether a lower-case text, such as an error code, says that a field or its value is not supported.
pub(super) fn is_unsupported(text: &str) -> bool {
    unsupported_words(text).next().is_some()
}

/// The words by which a lower-case text says it.
pub(super) fn unsupported_words(text: &str) -> impl Iterator<Item = &'static str> {
    let all = UNSUPPORTED_CODES.iter().chain(PHRASES_BEFORE).chain(PHRASES_AFTER);
    all.copied().filter(move |one| text.contains(one))
}

/// Codes of OpenAI and pydantic.
const UNSUPPORTED_CODES: &[&str] = &[
    "unsupported_parameter",
    "unsupported_value",
    "unknown_parameter",
    "unrecognized_parameter",
    "extra_forbidden",
];

/// Phrases before the name of a refused field: OpenAI, Azure, TGI (serde), Python, JSON Schema, Groq,
/// Fireworks.
const PHRASES_BEFORE: &[&str] = &[
    "unrecognized request argument supplied",
    "unrecognized request arguments supplied",
    "unsupported parameter",
    "unsupported parameters",
    "unsupported value",
    "unsupported field",
    "unknown parameter",
    "unknown field",
    "unknown argument",
    "unexpected field",
    "unexpected keyword argument",
    "additional properties are not allowed",
    "extra inputs are not permitted",
    "not allowed to request",
    "does not support",
    "do not support",
    "doesn't support",
];

/// Phrases after the name of a refused field: pydantic, vLLM, llama.cpp, Groq and proxies.
const PHRASES_AFTER: &[&str] = &[
    "extra inputs are not permitted",
    "extra fields not permitted",
    "is not supported",
    "are not supported",
    "not supported",
    "is unsupported",
    "is not allowed",
    "are not allowed",
    "is not permitted",
    "was unexpected",
    "is deprecated",
    "scheduling is not enabled",
    "is not enabled",
    "is not available",
    "is unknown",
];

static REFUSED_FIELD: LazyLock<Regex> = LazyLock::new(|| {
    let mut names: Vec<_> =
        RequestField::ALL.into_iter().filter(|field| !field.is_required()).collect();
    names.sort_by_key(|field| std::cmp::Reverse(field.name().len()));
    let mut fields = String::from("max_completion_tokens|top_logprobs");
    for field in names {
        let _ = write!(fields, "|{}", field.name());
    }
    let (before, after) = (PHRASES_BEFORE.join("|"), PHRASES_AFTER.join("|"));
    let noun = "the|a|parameter|field|argument|property|option|values?|1";
    let pattern = format!(
        r"(?:{before})(?:\W{{1,4}}(?:{noun})\b)?\W{{0,4}}(?:stream_options\.)?\b({fields})\b|\b({fields})\b\W{{0,4}}(?:(?:{noun})\W{{1,3}})?(?:{after})"
    );
    Regex::new(&pattern).expect("the pattern is valid")
});

static LOCATION: LazyLock<Regex> = LazyLock::new(|| {
    Regex::new(r"loc\W{1,5}body\W{1,5}([a-z_]+)(?:\W{1,5}([a-z_]+))?")
        .expect("the pattern is valid")
});

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_field_is_found_in_the_wordings_of_engines() {
        for (message, field) in [
            ("unrecognized request argument supplied: cache_salt", RequestField::CacheSalt),
            ("unrecognized request arguments supplied: priority, n", RequestField::Priority),
            (
                "unsupported parameter: 'max_tokens' is not supported with this model. use 'max_completion_tokens' instead.",
                RequestField::MaxTokens,
            ),
            (
                "unsupported value: 'temperature' does not support 0.3 with this model. only the default (1) value is supported.",
                RequestField::Temperature,
            ),
            ("unknown field: `priority`", RequestField::Priority),
            ("unknown field `priority`, expected one of `model`, `n`", RequestField::Priority),
            (
                "extra inputs are not permitted, field: 'cache_salt', value: 'x'",
                RequestField::CacheSalt,
            ),
            ("cache_salt: extra inputs are not permitted", RequestField::CacheSalt),
            ("n > 1 is not supported", RequestField::N),
            ("logprobs is not supported", RequestField::Logprobs),
            ("this model does not support the `logprobs` parameter", RequestField::Logprobs),
            ("you are not allowed to request logprobs from this model", RequestField::Logprobs),
            ("got priority 1 but priority scheduling is not enabled.", RequestField::Priority),
            ("property 'stream_options' is unsupported", RequestField::StreamOptions),
            (
                "unknown parameter: 'stream_options.continuous_usage_stats'.",
                RequestField::ContinuousUsageStats,
            ),
            (
                "additional properties are not allowed ('cache_salt' was unexpected)",
                RequestField::CacheSalt,
            ),
            ("f() got an unexpected keyword argument 'top_p'", RequestField::TopP),
        ] {
            let found = RequestField::refused_in(message).map(|(field, _)| field);
            assert_eq!(found, Some(field), "{message}");
        }
    }

    #[test]
    fn other_messages_name_no_field() {
        for message in [
            "code_context is not allowed",
            "unknown field context",
            "this model is not supported",
            "stop_token_ids is not supported",
            "please stop; the temperature was high",
            "unsupported parameter: max_tokens_per_call",
            "",
        ] {
            assert_eq!(RequestField::refused_in(message), None, "{message}");
        }
    }

    #[test]
    fn paths_and_locations_name_a_field() {
        for (path, field) in [
            ("cache_salt", Some(RequestField::CacheSalt)),
            ("body.n", Some(RequestField::N)),
            ("stream_options", Some(RequestField::StreamOptions)),
            ("stream_options.include_usage", Some(RequestField::StreamOptions)),
            ("stream_options.continuous_usage_stats", Some(RequestField::ContinuousUsageStats)),
            ("messages[1].content", Some(RequestField::Messages)),
            ("max_completion_tokens", Some(RequestField::MaxTokens)),
            ("context", None),
            ("body", None),
            ("", None),
        ] {
            assert_eq!(RequestField::from_path(path), field, "{path}");
        }
        let message =
            "[{'type': 'extra_forbidden', 'loc': ('body', 'cache_salt'), 'msg': 'extra'}]";
        let located = |message| RequestField::located_in(message).map(|(field, _)| field);
        assert_eq!(located(message), Some(RequestField::CacheSalt));
        let nested = r#"{"loc":["body","stream_options","continuous_usage_stats"],"msg":"extra"}"#;
        assert_eq!(located(nested), Some(RequestField::ContinuousUsageStats));
        assert_eq!(located("location: body"), None);
    }
}

//! Errors of engines. They contain neither an engine's own text nor a URL, so they may be shown to
//! clients, logged and stored.

use std::error::Error as _;
use std::fmt;
use std::io::ErrorKind;
use std::time::Duration;

use reqwest::StatusCode;
use serde_json::Value;
use serde_json::error::Category;

use crate::upstream::engine::sse::EventTooLong;

/// An error of an engine or of the connection to it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum EngineError {
    /// The connection could not be opened, or broke.
    #[error("the engine can't be reached: {0}")]
    Unreachable(TransportError),
    /// No response, or no token, in time.
    #[error("the engine did not answer in time")]
    Timeout,
    /// The engine answered with an error status.
    #[error("the engine answered {status}{}", .refusal.suffix())]
    Refused { status: StatusCode, refusal: RefusalReason, retry_after: Option<Duration> },
    /// The engine sent an error inside a stream, with this status if it sent one.
    #[error("the engine ended its stream with an error{}", OptionalStatus(*.0))]
    StreamError(Option<u16>),
    /// The stream ended without `[DONE]` or without a finish reason.
    #[error("the engine's stream ended early")]
    Truncated,
    /// The reply does not follow the protocol.
    #[error("the engine's reply can't be read: {0}")]
    InvalidReply(DecodeError),
}

/// How a connection to an engine failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum TransportError {
    #[error("its name can't be looked up")]
    NoAddress,
    #[error("the connection was refused")]
    Refused,
    #[error("no connection in time")]
    ConnectTimeout,
    #[error("the TLS handshake failed")]
    Tls,
    #[error("the connection failed")]
    Connect,
    #[error("the connection was closed")]
    Closed,
    #[error("the connection timed out")]
    Timeout,
    #[error("the connection broke")]
    Broken,
}

/// Why an engine rejected a request, as far as its error body shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RefusalReason {
    /// Prompt and answer do not fit into the model's context.
    ContextTooLong,
    /// Anything else.
    Other,
}

/// Why a reply cannot be decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum DecodeError {
    #[error("it is not JSON, at line {line}, column {column}")]
    NotJson { line: usize, column: usize },
    #[error("its JSON has an unexpected shape, at line {line}, column {column}")]
    UnexpectedShape { line: usize, column: usize },
    #[error("it is not UTF-8")]
    NotUtf8,
    #[error("it is larger than {0} bytes")]
    TooLarge(usize),
    #[error("a line or event of its stream is larger than 1 MiB")]
    EventTooLong,
}

/// A status at the end of a sentence; empty without one.
struct OptionalStatus(Option<u16>);

impl fmt::Display for OptionalStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.map_or(Ok(()), |number| write!(f, " {number}"))
    }
}

impl RefusalReason {
    fn suffix(self) -> &'static str {
        match self {
            RefusalReason::ContextTooLong => ": the context of the model is too short",
            RefusalReason::Other => "",
        }
    }

    /// vLLM names the parameter; llama.cpp describes it in the message.
    fn parse(status: StatusCode, body: &[u8]) -> RefusalReason {
        let body: Option<Value> = serde_json::from_slice(body).ok();
        let Some(error) = body.as_ref().and_then(|body| body.get("error")) else {
            return RefusalReason::Other;
        };
        let text = |name: &str| error.get(name).and_then(Value::as_str).unwrap_or_default();
        let message = error.as_str().unwrap_or_else(|| text("message"));
        let is_long = text("param").starts_with("input_") || message.contains("context");
        if status == StatusCode::BAD_REQUEST && is_long {
            RefusalReason::ContextTooLong
        } else {
            RefusalReason::Other
        }
    }
}

impl TransportError {
    pub(crate) fn is_connect(self) -> bool {
        match self {
            TransportError::NoAddress
            | TransportError::Refused
            | TransportError::ConnectTimeout
            | TransportError::Tls
            | TransportError::Connect => true,
            TransportError::Closed | TransportError::Timeout | TransportError::Broken => false,
        }
    }

    fn classify(error: &reqwest::Error) -> TransportError {
        let links = || std::iter::successors(error.source(), |&link| link.source());
        let kinds: Vec<_> =
            links().filter_map(|link| link.downcast_ref::<std::io::Error>()).collect();
        let has = |kind: ErrorKind| kinds.iter().any(|error| error.kind() == kind);
        let is_tls = kinds
            .iter()
            .filter_map(|error| error.get_ref())
            .any(|inner| inner.downcast_ref::<rustls::Error>().is_some());
        if error.is_connect() {
            // hyper-util has no type for DNS errors, only this text.
            let is_name = links().any(|link| link.to_string() == "dns error");
            return match () {
                () if is_name => TransportError::NoAddress,
                () if is_tls => TransportError::Tls,
                () if has(ErrorKind::ConnectionRefused) => TransportError::Refused,
                () if error.is_timeout() || has(ErrorKind::TimedOut) => {
                    TransportError::ConnectTimeout
                }
                () => TransportError::Connect,
            };
        }
        match () {
            () if error.is_timeout() || has(ErrorKind::TimedOut) => TransportError::Timeout,
            () if has(ErrorKind::UnexpectedEof) || has(ErrorKind::ConnectionReset) => {
                TransportError::Closed
            }
            () => TransportError::Broken,
        }
    }
}

impl EngineError {
    /// Value of the `error.type` span attribute, from a fixed list.
    pub(crate) fn kind(&self) -> String {
        let word = match self {
            EngineError::Unreachable(how) if how.is_connect() => "connect",
            EngineError::Unreachable(_) => "broken",
            EngineError::Timeout => "silent",
            EngineError::Refused { status, .. } => status.as_str(),
            EngineError::StreamError(_) => "broke_off",
            EngineError::Truncated => "truncated",
            EngineError::InvalidReply(_) => "unreadable",
        };
        word.to_owned()
    }

    /// From an error status and its body.
    pub(super) fn refused(
        status: StatusCode,
        retry_after: Option<Duration>,
        body: &[u8],
    ) -> EngineError {
        EngineError::Refused { status, refusal: RefusalReason::parse(status, body), retry_after }
    }
}

impl From<EventTooLong> for EngineError {
    fn from(_: EventTooLong) -> EngineError {
        EngineError::InvalidReply(DecodeError::EventTooLong)
    }
}

impl From<&reqwest::Error> for EngineError {
    fn from(error: &reqwest::Error) -> EngineError {
        EngineError::Unreachable(TransportError::classify(error))
    }
}

/// serde quotes the invalid input, so only its position is kept.
impl From<&serde_json::Error> for EngineError {
    fn from(error: &serde_json::Error) -> EngineError {
        let (line, column) = (error.line(), error.column());
        EngineError::InvalidReply(match error.classify() {
            Category::Data => DecodeError::UnexpectedShape { line, column },
            Category::Syntax | Category::Eof | Category::Io => {
                DecodeError::NotJson { line, column }
            }
        })
    }
}

/// Converts an error inside a stream. Only its status is kept, if it has one.
pub(crate) fn stream_error(error: &Value) -> EngineError {
    let code = error.get("code").or_else(|| error.get("status"));
    let code = code.and_then(Value::as_u64).and_then(|code| u16::try_from(code).ok());
    EngineError::StreamError(code.filter(|code| (400..600).contains(code)))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn only_the_status_of_an_error_in_a_stream_is_kept() {
        for (error, expected) in [
            (serde_json::json!({"message": "what was asked", "code": 500}), Some(500)),
            (serde_json::json!({"message": "what was asked", "status": 422}), Some(422)),
            (serde_json::json!({"code": "what was asked"}), None),
            (serde_json::json!({"code": 9_999_999}), None),
            ("what was asked".into(), None),
        ] {
            assert_eq!(stream_error(&error), EngineError::StreamError(expected), "{error}");
        }
    }

    #[test]
    fn an_exceeded_context_is_recognized_by_parameter_or_by_message() {
        let read = |status: u16, body: &str| {
            RefusalReason::parse(StatusCode::from_u16(status).unwrap(), body.as_bytes())
        };
        let vllm = r#"{"error":{"message":"too much","param":"input_tokens"}}"#;
        assert_eq!(read(400, vllm), RefusalReason::ContextTooLong);
        assert_eq!(read(500, vllm), RefusalReason::Other);
        let llama = r#"{"error":"exceeds the available context size"}"#;
        assert_eq!(read(400, llama), RefusalReason::ContextTooLong);
        for other in ["", "no JSON", "{}", r#"{"error":7}"#, r#"{"error":{"message":"no"}}"#] {
            assert_eq!(read(400, other), RefusalReason::Other, "{other}");
        }
    }

    #[tokio::test]
    async fn a_connection_error_does_not_contain_the_url() {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let http = reqwest::Client::builder().no_proxy().build().unwrap();
        let failed = async |url: &str| {
            let error = http.get(url).send().await.unwrap_err();
            EngineError::from(&error)
        };
        let refused = failed("http://user:hunter2@127.0.0.1:1/v1/models").await;
        assert_eq!(refused, EngineError::Unreachable(TransportError::Refused));
        let unknown = failed("http://user:hunter2@no-such-host.invalid/v1/models").await;
        assert_eq!(unknown, EngineError::Unreachable(TransportError::NoAddress));
        for error in [refused, unknown] {
            let text = error.to_string();
            assert!(!text.contains("hunter2") && !text.contains("no-such-host"), "{text}");
            assert_eq!(error.kind(), "connect");
        }
    }

    proptest! {
        #[test]
        fn no_error_contains_an_engines_own_text(
            word in "[A-Z]{12}", status in 300_u16..600, shape in 0_usize..5,
        ) {
            let body = [
                format!(r#"{{"error":{{"message":"{word}","type":"{word}","code":"{word}"}}}}"#),
                format!(r#"{{"error":"{word}"}}"#),
                format!(r#"{{"{word}":"{word}"}}"#),
                word.clone(),
                format!(r#"{{"data":"{word}"}}"#),
            ];
            let body = body[shape].as_bytes();
            let status = StatusCode::from_u16(status).unwrap();
            let refused = EngineError::refused(status, None, body);
            let unread = serde_json::from_slice::<super::super::ModelList>(body).unwrap_err();
            for error in [refused, EngineError::from(&unread)] {
                let text = format!("{error} {error:?} {}", error.kind());
                prop_assert!(!text.contains(&word), "{}", text);
            }
        }
    }
}

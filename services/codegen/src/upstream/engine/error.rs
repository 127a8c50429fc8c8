//! Errors of engines. They contain neither an engine's own text nor a URL, so they may be shown to
//! clients, logged and stored.

use std::error::Error as _;
use std::io::ErrorKind;
use std::time::Duration;

use reqwest::StatusCode;
use serde_json::Value;
use serde_json::error::Category;

use crate::upstream::engine::error_body::ErrorBody;
use crate::upstream::engine::refusal::RefusalReason;
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
    #[error("the engine answered {status}{refusal}")]
    Refused { status: StatusCode, refusal: RefusalReason, retry_after: Option<Duration> },
    /// The engine sent an error inside a stream with status 200, with this status if it sent one.
    #[error("the engine ended its stream with an error{}{refusal}", spaced(*.status))]
    StreamError { status: Option<StatusCode>, refusal: RefusalReason },
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

/// Why a reply cannot be decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum DecodeError {
    #[error("it is not JSON, at line {line}, column {column}")]
    NotJson { line: usize, column: usize },
    #[error("its JSON has an unexpected shape, at line {line}, column {column}")]
    UnexpectedShape { line: usize, column: usize },
    #[error("it is not a list of models")]
    NotAModelList,
    #[error("it is not UTF-8")]
    NotUtf8,
    #[error("it is larger than {0} bytes")]
    TooLarge(usize),
    #[error("a line or event of its stream is larger than 1 MiB")]
    EventTooLong,
}

/// The number of a status at the end of a sentence; empty without one.
fn spaced(status: Option<StatusCode>) -> String {
    status.map(|status| format!(" {}", status.as_u16())).unwrap_or_default()
}

/// The peer has closed the connection.
const CLOSED_KINDS: [ErrorKind; 4] = [
    ErrorKind::UnexpectedEof,
    ErrorKind::ConnectionReset,
    ErrorKind::ConnectionAborted,
    ErrorKind::BrokenPipe,
];

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

    /// For a connection that was open.
    pub(super) fn of_open_connection(error: &std::io::Error) -> TransportError {
        match error.kind() {
            ErrorKind::TimedOut => TransportError::Timeout,
            kind if CLOSED_KINDS.contains(&kind) => TransportError::Closed,
            _ => TransportError::Broken,
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
        // hyper's type for the end of a connection before a response has only this text.
        let is_incomplete =
            || links().any(|link| link.to_string() == "connection closed before message completed");
        match () {
            () if error.is_timeout() || has(ErrorKind::TimedOut) => TransportError::Timeout,
            () if CLOSED_KINDS.into_iter().any(has) || is_incomplete() => TransportError::Closed,
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
            EngineError::StreamError { .. } => "broke_off",
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
        EngineError::refused_request(status, retry_after, body, &[])
    }

    /// From an error status and its body, in reply to this request body.
    pub(super) fn refused_request(
        status: StatusCode,
        retry_after: Option<Duration>,
        body: &[u8],
        request: &[u8],
    ) -> EngineError {
        let body = ErrorBody::parse(body).in_reply_to(request);
        let refusal = RefusalReason::classify(status, &body);
        EngineError::Refused { status, refusal, retry_after }
    }

    /// Status and reason of a rejection, whether it came as a status or inside a stream.
    pub(crate) fn rejection(&self) -> Option<(StatusCode, RefusalReason)> {
        match self {
            EngineError::Refused { status, refusal, .. } => Some((*status, *refusal)),
            EngineError::StreamError { status, refusal } => Some(((*status)?, *refusal)),
            _ => None,
        }
    }

    /// Nothing, or something else than the API, is at this path.
    pub(super) fn is_path_missing(&self) -> bool {
        match self {
            EngineError::Refused { refusal, .. } => *refusal == RefusalReason::PathMissing,
            EngineError::InvalidReply(reply) => {
                matches!(reply, DecodeError::NotJson { .. } | DecodeError::NotAModelList)
            }
            _ => false,
        }
    }

    /// The engine does not accept the credential of this server.
    pub(crate) fn is_credential_rejected(&self) -> bool {
        self.has_reason(RefusalReason::CredentialRejected)
    }

    pub(crate) fn has_reason(&self, reason: RefusalReason) -> bool {
        self.rejection().is_some_and(|(_, refusal)| refusal == reason)
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

/// Converts an error inside the stream that replies to this request body, or the event that contains the error. Only its
/// status and reason are kept.
pub(crate) fn stream_error(error: &Value, request: &[u8]) -> EngineError {
    let body = ErrorBody::from_value(error).in_reply_to(request);
    let status = body.status();
    let refusal = RefusalReason::classify(status.unwrap_or(StatusCode::BAD_REQUEST), &body);
    // A known reason is the caller's or ours, even if the engine sends no status.
    let implied = (refusal != RefusalReason::Other).then_some(StatusCode::BAD_REQUEST);
    EngineError::StreamError { status: status.or(implied), refusal }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn an_error_in_a_stream_keeps_its_status_and_reason() {
        use serde_json::json;
        let too_long = RefusalReason::ContextTooLong;
        let vllm = "This model's maximum context length is 8 tokens. However, you requested 9";
        for (error, status, refusal) in [
            (json!({"message": "what was asked", "code": 500}), Some(500), RefusalReason::Other),
            (
                json!({"message": "what was asked", "status": "422"}),
                Some(422),
                RefusalReason::Other,
            ),
            (json!({"code": "what was asked"}), None, RefusalReason::Other),
            (json!({"code": 9_999_999}), None, RefusalReason::Other),
            ("what was asked".into(), None, RefusalReason::Other),
            (json!({"message": vllm, "type": "BadRequestError", "code": 400}), Some(400), too_long),
            (json!({"message": vllm, "type": "invalid_request_error"}), Some(400), too_long),
            (json!({"message": vllm}), Some(400), too_long),
            (json!({"type": "InternalServerError"}), Some(500), RefusalReason::Other),
        ] {
            let status = status.map(|number| StatusCode::from_u16(number).unwrap());
            assert_eq!(
                stream_error(&error, &[]),
                EngineError::StreamError { status, refusal },
                "{error}"
            );
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
            let unread = super::super::models::parse_list(body).unwrap_err();
            let value = serde_json::from_slice(body).unwrap_or_default();
            for error in [refused, unread, stream_error(&value, &[])] {
                let text = format!("{error} {error:?} {}", error.kind());
                prop_assert!(!text.contains(&word), "{}", text);
            }
        }
    }
}

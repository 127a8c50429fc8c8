//! What an engine does wrong, in published words and numbers. Nothing of an engine's own text, and nothing
//! of a URL, is in these errors: so they may be shown, logged and stored wherever they get to.

use std::error::Error as _;
use std::fmt;
use std::io::ErrorKind;
use std::time::Duration;

use reqwest::StatusCode;
use serde_json::Value;
use serde_json::error::Category;

use crate::engine::sse::TooLong;

/// What an engine does wrong.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Error {
    /// It can't be reached, or the connection broke.
    #[error("the engine can't be reached: {0}")]
    Unreachable(Transport),
    /// It did not answer in time.
    #[error("the engine did not answer in time")]
    Silent,
    /// It answered with an error.
    #[error("the engine answered {status}{}", .refusal.words())]
    Refused { status: StatusCode, refusal: Refusal, retry_after: Option<Duration> },
    /// It sent an error inside of a stream, with this status, where it named one.
    #[error("the engine broke off its answer with an error{}", Number(*.0))]
    BrokeOff(Option<u16>),
    /// Its stream ended without saying that it was whole.
    #[error("the engine's stream ended early")]
    Truncated,
    /// It said what this protocol has not.
    #[error("the engine's reply can't be read: {0}")]
    Unreadable(Unreadable),
}

/// How a connection to an engine failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Transport {
    #[error("its name can't be looked up")]
    NoAddress,
    #[error("the connection was refused")]
    Refused,
    #[error("no connection in time")]
    ConnectTimeout,
    #[error("the TLS handshake failed")]
    Tls,
    #[error("it can't be connected to")]
    Connect,
    #[error("the connection was closed")]
    Closed,
    #[error("the connection timed out")]
    Timeout,
    #[error("the connection broke")]
    Broken,
}

/// Why an engine refused a request, as far as its error body tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// The prompt and the answer do not fit into the model's context.
    ContextTooLong,
    /// Anything else.
    Other,
}

/// What can't be read of a reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Unreadable {
    #[error("it is no JSON, at line {line}, column {column}")]
    NotJson { line: usize, column: usize },
    #[error("its JSON has another shape, at line {line}, column {column}")]
    OtherShape { line: usize, column: usize },
    #[error("it is no UTF-8")]
    NotUtf8,
    #[error("it is over {0} bytes")]
    TooLarge(usize),
    #[error("a line or event of its stream is over 1 MiB")]
    LongEvent,
}

/// Behind a sentence, where there is one.
struct Number(Option<u16>);

impl fmt::Display for Number {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.map_or(Ok(()), |number| write!(f, " {number}"))
    }
}

impl Refusal {
    fn words(self) -> &'static str {
        match self {
            Refusal::ContextTooLong => ": the context of the model is too short",
            Refusal::Other => "",
        }
    }

    /// vLLM names the parameter, llama.cpp says it in words.
    fn read(status: StatusCode, body: &[u8]) -> Refusal {
        let body: Option<Value> = serde_json::from_slice(body).ok();
        let Some(error) = body.as_ref().and_then(|body| body.get("error")) else {
            return Refusal::Other;
        };
        let text = |name: &str| error.get(name).and_then(Value::as_str).unwrap_or_default();
        let words = error.as_str().unwrap_or_else(|| text("message"));
        let is_long = text("param").starts_with("input_") || words.contains("context");
        if status == StatusCode::BAD_REQUEST && is_long {
            Refusal::ContextTooLong
        } else {
            Refusal::Other
        }
    }
}

impl Transport {
    pub(crate) fn is_connect(self) -> bool {
        match self {
            Transport::NoAddress
            | Transport::Refused
            | Transport::ConnectTimeout
            | Transport::Tls
            | Transport::Connect => true,
            Transport::Closed | Transport::Timeout | Transport::Broken => false,
        }
    }

    fn read(error: &reqwest::Error) -> Transport {
        let links = || std::iter::successors(error.source(), |&link| link.source());
        let kinds: Vec<_> =
            links().filter_map(|link| link.downcast_ref::<std::io::Error>()).collect();
        let has = |kind: ErrorKind| kinds.iter().any(|error| error.kind() == kind);
        let is_tls = kinds
            .iter()
            .filter_map(|error| error.get_ref())
            .any(|inner| inner.downcast_ref::<rustls::Error>().is_some());
        if error.is_connect() {
            // hyper-util has no type for it, only these words of its own.
            let is_name = links().any(|link| link.to_string() == "dns error");
            return match () {
                () if is_name => Transport::NoAddress,
                () if is_tls => Transport::Tls,
                () if has(ErrorKind::ConnectionRefused) => Transport::Refused,
                () if error.is_timeout() || has(ErrorKind::TimedOut) => Transport::ConnectTimeout,
                () => Transport::Connect,
            };
        }
        match () {
            () if error.is_timeout() || has(ErrorKind::TimedOut) => Transport::Timeout,
            () if has(ErrorKind::UnexpectedEof) || has(ErrorKind::ConnectionReset) => {
                Transport::Closed
            }
            () => Transport::Broken,
        }
    }
}

impl Error {
    /// A word for its kind, from a short list.
    pub(crate) fn kind(&self) -> String {
        let word = match self {
            Error::Unreachable(how) if how.is_connect() => "connect",
            Error::Unreachable(_) => "broken",
            Error::Silent => "silent",
            Error::Refused { status, .. } => status.as_str(),
            Error::BrokeOff(_) => "broke_off",
            Error::Truncated => "truncated",
            Error::Unreadable(_) => "unreadable",
        };
        word.to_owned()
    }

    /// Of a status that is no success, and the body that came with it.
    pub(super) fn refused(status: StatusCode, retry_after: Option<Duration>, body: &[u8]) -> Error {
        Error::Refused { status, refusal: Refusal::read(status, body), retry_after }
    }
}

impl From<TooLong> for Error {
    fn from(_: TooLong) -> Error {
        Error::Unreadable(Unreadable::LongEvent)
    }
}

impl From<&reqwest::Error> for Error {
    fn from(error: &reqwest::Error) -> Error {
        Error::Unreachable(Transport::read(error))
    }
}

/// serde quotes what it can't read: only the place of it is kept.
impl From<&serde_json::Error> for Error {
    fn from(error: &serde_json::Error) -> Error {
        let (line, column) = (error.line(), error.column());
        Error::Unreadable(match error.classify() {
            Category::Data => Unreadable::OtherShape { line, column },
            Category::Syntax | Category::Eof | Category::Io => Unreadable::NotJson { line, column },
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_context_that_is_too_short_is_told_by_a_parameter_or_by_words() {
        let read = |status: u16, body: &str| {
            Refusal::read(StatusCode::from_u16(status).unwrap(), body.as_bytes())
        };
        let vllm = r#"{"error":{"message":"too much","param":"input_tokens"}}"#;
        assert_eq!(read(400, vllm), Refusal::ContextTooLong);
        assert_eq!(read(500, vllm), Refusal::Other);
        let llama = r#"{"error":"exceeds the available context size"}"#;
        assert_eq!(read(400, llama), Refusal::ContextTooLong);
        for other in ["", "no JSON", "{}", r#"{"error":7}"#, r#"{"error":{"message":"no"}}"#] {
            assert_eq!(read(400, other), Refusal::Other, "{other}");
        }
    }

    #[tokio::test]
    async fn a_broken_connection_is_told_without_its_url() {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let http = reqwest::Client::builder().no_proxy().build().unwrap();
        let failed = async |url: &str| {
            let error = http.get(url).send().await.unwrap_err();
            Error::from(&error)
        };
        let refused = failed("http://user:hunter2@127.0.0.1:1/v1/models").await;
        assert_eq!(refused, Error::Unreachable(Transport::Refused));
        let unknown = failed("http://user:hunter2@no-such-host.invalid/v1/models").await;
        assert_eq!(unknown, Error::Unreachable(Transport::NoAddress));
        for error in [refused, unknown] {
            let words = error.to_string();
            assert!(!words.contains("hunter2") && !words.contains("no-such-host"), "{words}");
            assert_eq!(error.kind(), "connect");
        }
    }

    proptest! {
        #[test]
        fn no_word_of_an_engine_is_in_an_error(
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
            let refused = Error::refused(status, None, body);
            let unread = serde_json::from_slice::<super::super::ModelList>(body).unwrap_err();
            for error in [refused, Error::from(&unread)] {
                let shown = format!("{error} {error:?} {}", error.kind());
                prop_assert!(!shown.contains(&word), "{}", shown);
            }
        }
    }
}

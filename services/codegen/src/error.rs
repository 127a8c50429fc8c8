//! What can go wrong with a generation, and the one table from that to a published code. It depends
//! on whether text was sent: a broken answer must not look like one that never began.

use std::sync::Arc;
use std::time::Duration;

use hapa_core::rpc_error::{ErrorCode, Fault, INTERNAL};
use hapa_core::violations::Violations;
use reqwest::StatusCode;
use tonic::Status;

use crate::engine::{self, Refusal};
use crate::route;

/// What is too long where a question is.
const QUESTION: &str = "code_context";
/// When a refused caller should come back: a generation takes seconds.
const BUSY: Duration = Duration::from_secs(1);

#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error(transparent)]
    Invalid(#[from] Violations),
    #[error("this key may not use this model; ListModels names those that it may use")]
    ModelNotAllowed,
    /// No engine can be asked; the words say why, in published words.
    #[error("{0}")]
    Away(String),
    #[error(transparent)]
    Engine(#[from] engine::Error),
    #[error(transparent)]
    Asking(#[from] route::Error),
    /// The same for a completion, which several callers may share.
    #[error(transparent)]
    Completing(#[from] Arc<route::Error>),
    /// What another service has for the caller, in published words.
    #[error("{}", .0.message())]
    Told(Box<Status>),
    #[error("token budgets can't be checked at the moment; try again")]
    Budget(#[source] Box<Status>),
    #[error("too many generations at once; try again shortly")]
    Busy,
    #[error("this API key or session has expired or was revoked; ask for a new one")]
    KeyEnded,
    /// The deadline of the call or of the whole generation.
    #[error("the answer was not complete when its time was up; allow more time or ask for less")]
    TimeUp,
    #[error("the model did not begin to answer in time; try again")]
    NoFirstToken,
    #[error("the model fell silent in the middle of its answer")]
    Stalled,
    /// Others of the same caller read the same answer, and are far ahead.
    #[error("the answer was read too slowly")]
    ReadTooSlowly,
    #[error("too many are having code checked at the moment; try again shortly")]
    ChecksBusy,
    #[error("this server is shutting down; try again at once")]
    ShuttingDown,
    #[error("superseded by a newer request of the session")]
    Superseded,
    #[error("{INTERNAL}")]
    Internal(#[from] anyhow::Error),
}

impl Error {
    /// A word for its kind, from a short list.
    pub(crate) fn kind(&self) -> String {
        let word = match self {
            Error::Engine(error) => return error.kind(),
            Error::Asking(error) => return error.kind(),
            Error::Completing(error) => return error.kind(),
            Error::Away(_) => "no_engine",
            Error::TimeUp => "deadline",
            Error::NoFirstToken | Error::Stalled => "silent",
            Error::KeyEnded => "key_ended",
            Error::ShuttingDown => "shutting_down",
            Error::Superseded => "superseded",
            _ => "other",
        };
        word.to_owned()
    }

    /// As it is shown to a caller, who got text before or did not.
    pub(crate) fn fault(self, partial: bool) -> Fault {
        let words = self.to_string();
        match self {
            Error::Invalid(violations) => violations.into(),
            Error::ModelNotAllowed => Fault::new(ErrorCode::NoPermission, words),
            Error::Away(_) => Fault::new(ErrorCode::ModelUnreachable, words),
            Error::Engine(error) => engine_fault(&error, partial, QUESTION),
            Error::Asking(error) => asking_fault(&error, partial, QUESTION),
            Error::Completing(error) => asking_fault(&error, partial, "prefix"),
            Error::TimeUp | Error::NoFirstToken => Fault::new(ErrorCode::ModelTimeout, words),
            Error::Told(status) => Fault::internal(status),
            Error::Budget(status) => {
                Fault::new(ErrorCode::DatabaseError, words).because(status.as_ref())
            }
            Error::Busy | Error::ChecksBusy => {
                Fault::new(ErrorCode::Overloaded, words).retry_after(BUSY)
            }
            Error::Superseded | Error::ReadTooSlowly => Fault::new(ErrorCode::StreamGivenUp, words),
            Error::KeyEnded => Fault::new(ErrorCode::KeyEnded, words),
            Error::Stalled => Fault::new(ErrorCode::CutShort, words),
            Error::ShuttingDown => Fault::new(ErrorCode::ShuttingDown, words),
            Error::Internal(cause) => (&cause).into(),
        }
    }
}

impl From<Error> for Status {
    fn from(error: Error) -> Status {
        match error {
            Error::Told(status) => *status,
            error => error.fault(false).into(),
        }
    }
}

/// `longest` is the field that most of the prompt came in.
fn asking_fault(error: &route::Error, partial: bool, longest: &'static str) -> Fault {
    match error {
        route::Error::NoModel => Fault::new(ErrorCode::ModelUnreachable, error.to_string()),
        route::Error::CircuitOpen(wait) => {
            Fault::new(ErrorCode::CircuitOpen, error.to_string()).retry_after(*wait)
        }
        route::Error::Engine(error) => engine_fault(error, partial, longest),
    }
}

fn engine_fault(error: &engine::Error, partial: bool, longest: &'static str) -> Fault {
    if partial {
        let words = "the answer was cut short; what was sent is not all of it";
        return Fault::new(ErrorCode::CutShort, words).because(error);
    }
    match error {
        engine::Error::Refused { .. } => refused(error, longest),
        engine::Error::Silent => {
            Fault::new(ErrorCode::ModelTimeout, "the AI model did not answer in time; try again")
        }
        error => {
            let words = "the AI model can't be reached or broke off; try again";
            Fault::new(ErrorCode::ModelUnreachable, words).because(error)
        }
    }
}

fn refused(error: &engine::Error, longest: &'static str) -> Fault {
    let engine::Error::Refused { status, refusal, retry_after } = error else {
        return Fault::internal(error);
    };
    match *status {
        StatusCode::NOT_FOUND => {
            let words = "the engine does not serve this model; ListModels tells what it does";
            Fault::new(ErrorCode::NotFound, words)
        }
        StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE => {
            Fault::new(ErrorCode::Overloaded, "the AI model is overloaded; try again shortly")
                .retry_after(retry_after.unwrap_or(Duration::from_secs(1)))
        }
        StatusCode::BAD_REQUEST if *refusal == Refusal::ContextTooLong => {
            let words = "what was asked and its context are too long for the model";
            Fault::new(ErrorCode::InvalidInput, words)
                .field(longest, "is too long, together with the rest and max_tokens")
        }
        StatusCode::BAD_REQUEST => {
            Fault::new(ErrorCode::InvalidInput, "the engine refused the request's parameters")
        }
        // 401 too: it is our key that the engine refuses.
        _ => {
            let words = "the AI model failed or refused this server; try again";
            Fault::new(ErrorCode::ModelUnreachable, words).because(error)
        }
    }
}

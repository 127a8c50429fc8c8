//! All errors of this service, and their mapping to published codes. The code depends on whether text
//! was sent: a broken response must not look like one that never began.

use std::time::Duration;

use hapa_core::rpc_error::{ErrorCode, INTERNAL_MESSAGE, RpcError};
use hapa_core::violations::Violations;
use reqwest::StatusCode;
use tonic::Status;

use crate::upstream::engine::{EngineError, RefusalReason};
use crate::upstream::pool::DispatchError;

/// `retry-after` of a refused call: a generation takes seconds.
const OVERLOAD_RETRY_DELAY: Duration = Duration::from_secs(1);

#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error(transparent)]
    Invalid(#[from] Violations),
    #[error("this key may not use this model; ListModels returns the models that it may use")]
    ModelNotAllowed,
    /// No engine can be used. The text may be shown to clients.
    #[error("{0}")]
    NoEngine(String),
    #[error(transparent)]
    Engine(#[from] EngineError),
    #[error(transparent)]
    Routing(#[from] DispatchError),
    /// A status of another service that is passed on to the client, with its published code.
    #[error("{}", .0.message())]
    Upstream(Box<Status>),
    #[error("token budgets cannot be checked at the moment; try again")]
    BudgetUnavailable(#[source] Box<Status>),
    #[error("too many concurrent generations; try again shortly")]
    QueueFull,
    #[error("this API key or session has expired or was revoked; ask for a new one")]
    KeyEnded,
    /// The deadline of the call, or the timeout of the whole generation.
    #[error("the response was not complete before the deadline; allow more time or request less")]
    DeadlineExceeded,
    #[error("the model sent no first token in time; try again")]
    FirstTokenTimeout,
    #[error("the model stopped sending tokens in the middle of its response")]
    Stalled,
    /// REASONING_TIMEOUT_SECONDS.
    #[error("the model reasoned too long without an answer; ask for less, or allow more time")]
    ReasoningTimeout,
    /// The limit of the request.
    #[error("the model reached max_reasoning_tokens before its answer")]
    ReasoningLimit,
    /// Other subscribers of the same stream are too far ahead.
    #[error("the response was read too slowly")]
    SlowReader,
    #[error("too many concurrent code validations; try again shortly")]
    ValidatorsBusy,
    #[error("this server is shutting down; try again at once")]
    ShuttingDown,
    #[error("superseded by a newer request of the session")]
    Superseded,
    #[error("{INTERNAL_MESSAGE}")]
    Internal(#[from] anyhow::Error),
}

impl Error {
    /// Value of the `error.type` span attribute, from a fixed list.
    pub(crate) fn kind(&self) -> String {
        let kind = match self {
            Error::Engine(error) => return error.kind(),
            Error::Routing(error) => return error.kind(),
            Error::NoEngine(_) => "no_engine",
            Error::DeadlineExceeded => "deadline",
            Error::FirstTokenTimeout | Error::Stalled => "silent",
            Error::ReasoningTimeout | Error::ReasoningLimit => "reasoning",
            Error::KeyEnded => "key_ended",
            Error::ShuttingDown => "shutting_down",
            Error::Superseded => "superseded",
            _ => "other",
        };
        kind.to_owned()
    }

    /// The error with its published code. `partial`: the client has received text before. `longest_field` is the request
    /// field that holds most of the prompt.
    pub(crate) fn into_rpc_error(self, partial: bool, longest_field: &'static str) -> RpcError {
        let message = self.to_string();
        match self {
            Error::Invalid(violations) => violations.into(),
            Error::ModelNotAllowed => RpcError::new(ErrorCode::NoPermission, message),
            Error::NoEngine(_) => RpcError::new(ErrorCode::ModelUnreachable, message),
            Error::Engine(error) => from_engine(&error, partial, longest_field),
            Error::Routing(error) => from_dispatch(&error, partial, longest_field),
            Error::DeadlineExceeded | Error::FirstTokenTimeout => {
                RpcError::new(ErrorCode::ModelTimeout, message)
            }
            Error::Upstream(status) => RpcError::internal(status),
            Error::BudgetUnavailable(status) => {
                RpcError::new(ErrorCode::DatabaseError, message).with_cause(status.as_ref())
            }
            Error::QueueFull | Error::ValidatorsBusy => {
                RpcError::new(ErrorCode::Overloaded, message).retry_after(OVERLOAD_RETRY_DELAY)
            }
            Error::Superseded => RpcError::new(ErrorCode::Superseded, message),
            Error::SlowReader => RpcError::new(ErrorCode::SlowReader, message),
            Error::KeyEnded => RpcError::new(ErrorCode::KeyEnded, message),
            Error::ReasoningTimeout => RpcError::new(ErrorCode::ModelTimeout, message),
            Error::Stalled | Error::ReasoningLimit => RpcError::new(ErrorCode::CutShort, message),
            Error::ShuttingDown => RpcError::new(ErrorCode::ShuttingDown, message),
            Error::Internal(cause) => (&cause).into(),
        }
    }
}

impl Error {
    /// The status of a call whose response has not started.
    pub(crate) fn into_status(self, longest_field: &'static str) -> Status {
        match self {
            Error::Upstream(status) => *status,
            error => error.into_rpc_error(false, longest_field).into(),
        }
    }
}

impl From<Error> for Status {
    fn from(error: Error) -> Status {
        error.into_status("")
    }
}

/// `longest_field` is the field that holds most of the prompt.
fn from_dispatch(error: &DispatchError, partial: bool, longest_field: &'static str) -> RpcError {
    match error {
        DispatchError::NoModel => RpcError::new(ErrorCode::ModelUnreachable, error.to_string()),
        DispatchError::CircuitOpen(wait) => {
            RpcError::new(ErrorCode::CircuitOpen, error.to_string()).retry_after(*wait)
        }
        DispatchError::Engine(error) => from_engine(error, partial, longest_field),
    }
}

fn from_engine(error: &EngineError, partial: bool, longest_field: &'static str) -> RpcError {
    if partial {
        let message = "the response was cut short; the text received is incomplete";
        return RpcError::new(ErrorCode::CutShort, message).with_cause(error);
    }
    match error {
        EngineError::Timeout => {
            RpcError::new(ErrorCode::ModelTimeout, "the AI model did not answer in time; try again")
        }
        error => match error.rejection() {
            Some((_, refusal)) if refusal != RefusalReason::Other => {
                from_refusal(error, refusal, longest_field)
            }
            Some((status, _)) => from_status(error, status),
            None => {
                let message = "the AI model is unreachable or its stream failed; try again";
                RpcError::new(ErrorCode::ModelUnreachable, message).with_cause(error)
            }
        },
    }
}

fn from_refusal(
    error: &EngineError,
    refusal: RefusalReason,
    longest_field: &'static str,
) -> RpcError {
    match refusal {
        RefusalReason::ModelMissing => {
            let message =
                "the engine does not serve this model; ListModels returns the models it serves";
            RpcError::new(ErrorCode::NotFound, message)
        }
        RefusalReason::ContextTooLong => {
            let message = "the request and its context are too long for the model";
            RpcError::new(ErrorCode::InvalidInput, message)
                .field(longest_field, "is too long together with the other fields and max_tokens")
        }
        RefusalReason::PathMissing => {
            let message =
                "the engine of this model does not offer this operation; choose another model";
            RpcError::new(ErrorCode::ModelUnreachable, message).with_cause(error)
        }
        RefusalReason::FieldRefused { field, .. } => match field.caller_field() {
            Some(field) => {
                let message = "the engine rejected a parameter of the request";
                RpcError::new(ErrorCode::InvalidInput, message)
                    .field(field, "has a value that the model does not accept")
            }
            None => engine_failure(error),
        },
        RefusalReason::ContentFiltered => {
            let message = "the content filter of the engine rejected the request; change its texts";
            RpcError::new(ErrorCode::InvalidInput, message)
        }
        RefusalReason::SystemRoleRefused
        | RefusalReason::CredentialRejected
        | RefusalReason::Unpaid
        | RefusalReason::Other => engine_failure(error),
    }
}

/// For a status whose body shows no known reason.
fn from_status(error: &EngineError, status: StatusCode) -> RpcError {
    match status {
        StatusCode::TOO_MANY_REQUESTS
        | StatusCode::SERVICE_UNAVAILABLE
        | StatusCode::REQUEST_TIMEOUT
        | StatusCode::TOO_EARLY => {
            let wait = match error {
                EngineError::Refused { retry_after, .. } => *retry_after,
                _ => None,
            };
            RpcError::new(ErrorCode::Overloaded, "the AI model is overloaded; try again shortly")
                .retry_after(wait.unwrap_or(OVERLOAD_RETRY_DELAY))
        }
        StatusCode::BAD_REQUEST | StatusCode::UNPROCESSABLE_ENTITY => {
            RpcError::new(ErrorCode::InvalidInput, "the engine rejected the request's parameters")
        }
        // Includes 401: the engine rejects our own key.
        _ => engine_failure(error),
    }
}

fn engine_failure(error: &EngineError) -> RpcError {
    let message = "the AI model failed or rejected this server; try again";
    RpcError::new(ErrorCode::ModelUnreachable, message).with_cause(error)
}

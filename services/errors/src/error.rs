//! The errors of this service and their mapping to published error codes.

use hapa_core::rpc_error::{ErrorCode, INTERNAL_MESSAGE, RpcError, STORE_UNAVAILABLE_MESSAGE};
use hapa_core::violations::Violations;
use hapa_store::change_feed::FeedClosed;
use tonic::Status;

#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error(transparent)]
    Invalid(#[from] Violations),
    /// Also returned for the incidents of other owners, so that their ids cannot be probed.
    #[error("no incident has this id; check it, or list the incidents")]
    IncidentNotFound,
    #[error("the incident's status is {0}, not the expected one; read the incident and try again")]
    StatusConflict(String),
    #[error(transparent)]
    FeedClosed(#[from] FeedClosed),
    #[error("{STORE_UNAVAILABLE_MESSAGE}")]
    Store(#[from] sqlx::Error),
    #[error("{INTERNAL_MESSAGE}")]
    Internal(#[from] anyhow::Error),
}

impl From<Error> for Status {
    fn from(error: Error) -> Status {
        let message = error.to_string();
        let fault = match error {
            Error::Invalid(violations) => violations.into(),
            Error::IncidentNotFound => RpcError::new(ErrorCode::NotFound, message),
            Error::StatusConflict(_) => RpcError::new(ErrorCode::Conflict, message),
            Error::FeedClosed(closed) => closed.into(),
            Error::Store(cause) => (&cause).into(),
            Error::Internal(cause) => (&cause).into(),
        };
        fault.into()
    }
}

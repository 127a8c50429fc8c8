//! The errors of this service and their mapping to published error codes.

use std::sync::Arc;

use hapa_core::rpc_error::{ErrorCode, INTERNAL_MESSAGE, RpcError, STORE_UNAVAILABLE_MESSAGE};
use hapa_core::violations::Violations;
use tonic::Status;

#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error(transparent)]
    Invalid(#[from] Violations),
    #[error("the credential has expired or was revoked; use another one")]
    CredentialEnded,
    #[error("this replica is shutting down; send the request to another one")]
    ShuttingDown,
    #[error("{STORE_UNAVAILABLE_MESSAGE}")]
    Store(#[from] sqlx::Error),
    /// The error of a transaction that several calls shared.
    #[error("{0}")]
    SharedTransaction(Arc<Error>),
    #[error("{INTERNAL_MESSAGE}")]
    Internal(#[from] anyhow::Error),
}

impl From<Error> for Status {
    fn from(error: Error) -> Status {
        fault(&error).into()
    }
}

fn fault(error: &Error) -> RpcError {
    let message = error.to_string();
    match error {
        Error::Invalid(violations) => violations.clone().into(),
        Error::CredentialEnded => RpcError::new(ErrorCode::KeyEnded, message),
        Error::ShuttingDown => RpcError::new(ErrorCode::ShuttingDown, message),
        Error::Store(cause) => cause.into(),
        Error::SharedTransaction(error) => fault(error),
        Error::Internal(cause) => cause.into(),
    }
}

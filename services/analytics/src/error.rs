//! What can go wrong here, and the one table from that to a published status.

use std::sync::Arc;

use hapa_core::rpc_error::{ErrorCode, Fault, INTERNAL, STORE_AWAY};
use hapa_core::violations::Violations;
use tonic::Status;

#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error(transparent)]
    Invalid(#[from] Violations),
    #[error("the credential has ended")]
    Ended,
    #[error("this replica is going; ask another")]
    ShuttingDown,
    #[error("{STORE_AWAY}")]
    Store(#[from] sqlx::Error),
    /// Of a transaction that several calls shared.
    #[error("{0}")]
    Together(Arc<Error>),
    #[error("{INTERNAL}")]
    Internal(#[from] anyhow::Error),
}

impl From<Error> for Status {
    fn from(error: Error) -> Status {
        fault(&error).into()
    }
}

fn fault(error: &Error) -> Fault {
    let words = error.to_string();
    match error {
        Error::Invalid(violations) => violations.clone().into(),
        Error::Ended => Fault::new(ErrorCode::KeyEnded, words),
        Error::ShuttingDown => Fault::new(ErrorCode::ShuttingDown, words),
        Error::Store(cause) => cause.into(),
        Error::Together(error) => fault(error),
        Error::Internal(cause) => cause.into(),
    }
}

//! What can go wrong here, and the one table from that to a published status.

use hapa_chassis::status::{INTERNAL, STORE_AWAY};
use hapa_chassis::{ErrorCode, Fault, Violations};
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
    #[error("{INTERNAL}")]
    Internal(#[from] anyhow::Error),
}

impl From<Error> for Status {
    fn from(error: Error) -> Status {
        let words = error.to_string();
        let fault = match error {
            Error::Invalid(violations) => violations.into(),
            Error::Ended => Fault::new(ErrorCode::KeyEnded, words),
            Error::ShuttingDown => Fault::new(ErrorCode::ShuttingDown, words),
            Error::Store(cause) => cause.into(),
            Error::Internal(cause) => cause.into(),
        };
        fault.into()
    }
}

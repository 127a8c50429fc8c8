//! What can go wrong here, and the one table from that to a published status.

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
    #[error("the store can't be asked at the moment; try again")]
    Store(#[from] sqlx::Error),
    #[error("an internal error; report the incident id")]
    Internal(#[from] anyhow::Error),
}

impl From<Error> for Status {
    fn from(error: Error) -> Status {
        let words = error.to_string();
        let fault = match error {
            Error::Invalid(violations) => violations.into(),
            Error::Ended => Fault::new(ErrorCode::KeyEnded, words),
            Error::ShuttingDown => Fault::new(ErrorCode::ShuttingDown, words),
            Error::Store(cause) => Fault::new(ErrorCode::DatabaseError, words).because(&cause),
            Error::Internal(cause) => Fault::internal(format_args!("{cause:#}")),
        };
        fault.into()
    }
}

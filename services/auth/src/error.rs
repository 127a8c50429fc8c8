//! What can go wrong here, and the one table from that to a published status.

use hapa_chassis::{ErrorCode, Fault, Violations};
use tonic::Status;

#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error(transparent)]
    Invalid(#[from] Violations),
    #[error("there is no key {0}")]
    NoSuchKey(String),
    #[error("no key has this digest")]
    UnknownCredential,
    #[error("the key has expired or was revoked")]
    Ended,
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
            Error::NoSuchKey(_) | Error::UnknownCredential => {
                Fault::new(ErrorCode::NotFound, words)
            }
            Error::Ended => Fault::new(ErrorCode::KeyEnded, words),
            Error::Store(cause) => Fault::new(ErrorCode::DatabaseError, words).because(&cause),
            Error::Internal(cause) => Fault::internal(format_args!("{cause:#}")),
        };
        fault.into()
    }
}

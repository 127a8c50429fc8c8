//! What can go wrong here, and the one table from that to a published status.

use hapa_core::rpc_error::{ErrorCode, Fault, INTERNAL, STORE_AWAY};
use hapa_core::violations::Violations;
use hapa_store::change_feed::Over;
use tonic::Status;

#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error(transparent)]
    Invalid(#[from] Violations),
    /// Also what belongs to someone else.
    #[error("there is no such incident")]
    NoSuch,
    #[error("the incident is {0} by now: read it and decide again")]
    Changed(String),
    #[error(transparent)]
    Over(#[from] Over),
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
            Error::NoSuch => Fault::new(ErrorCode::NotFound, words),
            Error::Changed(_) => Fault::new(ErrorCode::Conflict, words),
            Error::Over(over) => over.into(),
            Error::Store(cause) => (&cause).into(),
            Error::Internal(cause) => (&cause).into(),
        };
        fault.into()
    }
}

//! What can go wrong here, and the one table from that to a published status.

use hapa_chassis::{ErrorCode, Fault};
use tonic::Status;

#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// Every field that is wrong, and how.
    #[error("{}", words(.0))]
    Invalid(Vec<Violation>),
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

/// One field that is wrong.
#[derive(Debug)]
pub(crate) struct Violation {
    pub(crate) field: &'static str,
    pub(crate) problem: String,
    /// It is not there at all.
    pub(crate) missing: bool,
}

fn words(violations: &[Violation]) -> String {
    let each = violations.iter().map(|wrong| format!("{} {}", wrong.field, wrong.problem));
    each.collect::<Vec<_>>().join("; ")
}

impl From<Error> for Status {
    fn from(error: Error) -> Status {
        let words = error.to_string();
        let fault = match error {
            Error::Invalid(violations) => {
                let missing = violations.iter().all(|violation| violation.missing);
                let code = if missing { ErrorCode::MissingField } else { ErrorCode::InvalidInput };
                violations.into_iter().fold(Fault::new(code, words), |fault, wrong| {
                    fault.field(wrong.field, wrong.problem)
                })
            }
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

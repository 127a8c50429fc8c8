//! What can go wrong here, and the one table from that to a published status.
//!
//! Invariant: no message repeats a value that a caller sent; it may be a secret in the wrong field.

use std::time::Duration;

use hapa_core::idempotency;
use hapa_core::rpc_error::{ErrorCode, Fault, INTERNAL, STORE_AWAY};
use hapa_core::timestamps::now;
use hapa_core::violations::Violations;
use hapa_store::change_feed::Over;
use tonic::Status;

use crate::store::Used;
use crate::times::until_next;

#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error(transparent)]
    Invalid(#[from] Violations),
    /// Also what belongs to someone else.
    #[error("there is no such {0}")]
    NoSuch(&'static str),
    #[error("no key or session has this credential")]
    UnknownCredential,
    #[error("the key or session has expired or was revoked")]
    Ended,
    #[error("{0} needs auth:admin")]
    NotAllowed(&'static str),
    #[error("scopes must have none that your credential lacks")]
    ScopeNotHeld,
    #[error("another user has this address")]
    EmailTaken,
    #[error("another reservation has this lease_id")]
    LeaseTaken,
    #[error("the token budget of {} for this {} is used up", .0.payer, if .0.is_month { "month" } else { "day" })]
    UsedUp(Used),
    /// Never says what was wrong with it.
    #[error("this login is not valid: check the address and the password, or get a new ID token")]
    BadProof,
    #[error("the current password is wrong")]
    BadPassword,
    #[error("no identity provider is set up here; set OIDC_ISSUER")]
    NoProvider,
    #[error("the identity provider can't be asked at the moment; try again")]
    Provider(#[source] anyhow::Error),
    #[error("too many are logging in at the moment; try again shortly")]
    Busy,
    #[error(transparent)]
    Over(#[from] Over),
    #[error(transparent)]
    Repetition(#[from] idempotency::Error),
    #[error("{}", .0.message())]
    Fault(Box<Fault>),
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
            Error::NoSuch(_) | Error::UnknownCredential => Fault::new(ErrorCode::NotFound, words),
            Error::Ended => Fault::new(ErrorCode::KeyEnded, words),
            Error::NotAllowed(_) | Error::ScopeNotHeld => {
                Fault::new(ErrorCode::NoPermission, words)
            }
            Error::EmailTaken | Error::LeaseTaken => Fault::new(ErrorCode::Conflict, words),
            Error::UsedUp(Used { payer, is_month }) => {
                let subject =
                    format!("{payer}/tokens_per_{}", if is_month { "month" } else { "day" });
                Fault::new(ErrorCode::BudgetUsedUp, words)
                    .retry_after(until_next(now(), is_month))
                    .quota(subject)
            }
            Error::BadProof | Error::BadPassword => Fault::new(ErrorCode::BadKey, words),
            Error::NoProvider => Fault::new(ErrorCode::Unsupported, words),
            Error::Provider(cause) => {
                Fault::new(ErrorCode::DatabaseError, words).because(cause.as_ref())
            }
            Error::Busy => {
                Fault::new(ErrorCode::Overloaded, words).retry_after(Duration::from_secs(1))
            }
            Error::Over(over) => over.into(),
            Error::Repetition(error) => error.into(),
            Error::Fault(fault) => *fault,
            Error::Store(cause) => (&cause).into(),
            Error::Internal(cause) => (&cause).into(),
        };
        fault.into()
    }
}

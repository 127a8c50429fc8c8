//! The errors of this service, and their mapping to published codes.
//!
//! Invariant: no message repeats a value that a caller sent; it may be a secret in the wrong field.

use std::time::Duration;

use hapa_core::idempotency;
use hapa_core::rpc_error::{ErrorCode, INTERNAL_MESSAGE, RpcError, STORE_UNAVAILABLE_MESSAGE};
use hapa_core::timestamps::now;
use hapa_core::violations::Violations;
use hapa_store::change_feed::FeedClosed;
use tonic::Status;

use crate::calendar::until_next_period;
use crate::store::ExhaustedBudget;

#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error(transparent)]
    Invalid(#[from] Violations),
    /// Also returned for what belongs to another owner.
    #[error("there is no such {0}")]
    NotFound(&'static str),
    #[error("this credential belongs to no key or session")]
    UnknownCredential,
    #[error("the key or session has expired or was revoked")]
    ExpiredOrRevoked,
    #[error("{0} requires the scope auth:admin")]
    AdminRequired(&'static str),
    #[error("scopes may hold only scopes that your credential has")]
    ScopeNotHeld,
    #[error("another user has this email address")]
    EmailTaken,
    #[error("another reservation uses this lease_id")]
    LeaseTaken,
    #[error("the token budget of {} for this {} is exhausted", .0.payer, if .0.is_monthly { "month" } else { "day" })]
    BudgetExhausted(ExhaustedBudget),
    /// Never says which part of the login was wrong.
    #[error(
        "the login is invalid: check the email address and the password, or request a new ID token"
    )]
    InvalidLogin,
    #[error("the current password is wrong")]
    WrongPassword,
    #[error("no identity provider is configured; set OIDC_ISSUER")]
    OidcNotConfigured,
    #[error("the identity provider is unreachable; try again")]
    OidcUnavailable(#[source] anyhow::Error),
    #[error("too many logins are in progress; try again in a second")]
    Overloaded,
    #[error(transparent)]
    FeedClosed(#[from] FeedClosed),
    #[error(transparent)]
    Idempotency(#[from] idempotency::Error),
    #[error("{}", .0.message())]
    Rpc(Box<RpcError>),
    #[error("{STORE_UNAVAILABLE_MESSAGE}")]
    Store(#[from] sqlx::Error),
    #[error("{INTERNAL_MESSAGE}")]
    Internal(#[from] anyhow::Error),
}

impl From<Error> for Status {
    fn from(error: Error) -> Status {
        let message = error.to_string();
        let rpc_error = match error {
            Error::Invalid(violations) => violations.into(),
            Error::NotFound(_) | Error::UnknownCredential => {
                RpcError::new(ErrorCode::NotFound, message)
            }
            Error::ExpiredOrRevoked => RpcError::new(ErrorCode::KeyEnded, message),
            Error::AdminRequired(_) | Error::ScopeNotHeld => {
                RpcError::new(ErrorCode::NoPermission, message)
            }
            Error::EmailTaken | Error::LeaseTaken => RpcError::new(ErrorCode::Conflict, message),
            Error::BudgetExhausted(ExhaustedBudget { payer, is_monthly }) => {
                let subject =
                    format!("{payer}/tokens_per_{}", if is_monthly { "month" } else { "day" });
                RpcError::new(ErrorCode::BudgetUsedUp, message)
                    .retry_after(until_next_period(now(), is_monthly))
                    .quota(subject)
            }
            Error::InvalidLogin | Error::WrongPassword => RpcError::new(ErrorCode::BadKey, message),
            Error::OidcNotConfigured => RpcError::new(ErrorCode::Unsupported, message),
            Error::OidcUnavailable(cause) => {
                RpcError::new(ErrorCode::DependencyUnavailable, message)
                    .dependency("identity provider")
                    .with_cause(cause.as_ref())
            }
            Error::Overloaded => {
                RpcError::new(ErrorCode::Overloaded, message).retry_after(Duration::from_secs(1))
            }
            Error::FeedClosed(closed) => closed.into(),
            Error::Idempotency(error) => error.into(),
            Error::Rpc(error) => *error,
            Error::Store(cause) => (&cause).into(),
            Error::Internal(cause) => (&cause).into(),
        };
        rpc_error.into()
    }
}

//! Token budgets: reserved before a generation starts, and settled with the tokens that it used. If the
//! replica that ran a generation is gone, its lease expires and is settled with the last reported usage.

use std::time::Duration;

use hapa_core::timestamps::now;
use hapa_core::violations::Violations;
use hapa_proto::auth::v1::{ReserveTokensRequest, SettleTokensRequest};
use tokio::time::sleep;

use crate::calendar::add_seconds;
use crate::error::Error;
use crate::store::{Store, TokenLease};

const RELEASE_INTERVAL: Duration = Duration::from_secs(2);
const MAX_RESERVED_TOKENS: i64 = 10_000_000;
const MAX_SETTLED_TOKENS: i64 = 100_000_000;
const MAX_LEASE_SECONDS: u32 = 86_400;
const MAX_LEASE_ID_BYTES: usize = 64;
const MAX_SETTLEMENTS: usize = 1_000;

pub(crate) async fn reserve(store: &Store, request: ReserveTokensRequest) -> Result<(), Error> {
    let mut violations = Violations::default();
    validate_lease_id(&request.lease_id, &mut violations);
    if request.key_id.is_empty() && request.user_id.is_empty() {
        violations.add_missing("key_id");
    }
    if !(1..=MAX_RESERVED_TOKENS).contains(&request.tokens) {
        violations.add_invalid("tokens", "must be from 1 to 10000000");
    }
    if !(1..=MAX_LEASE_SECONDS).contains(&request.lease_seconds) {
        violations.add_invalid("lease_seconds", "must be from 1 to 86400");
    }
    if !(0..=request.tokens.max(0)).contains(&request.used_tokens) {
        violations.add_invalid("used_tokens", "must be from 0 to tokens");
    }
    violations.check()?;
    let now = now();
    let lease = TokenLease {
        id: request.lease_id,
        key_id: request.key_id,
        user_id: request.user_id,
        tokens: request.tokens,
        reported_tokens: request.used_tokens,
        expire_time: add_seconds(now, request.lease_seconds),
    };
    store.reserve(lease, now).await?.map_err(Error::BudgetExhausted)
}

pub(crate) async fn settle(store: &Store, request: SettleTokensRequest) -> Result<(), Error> {
    let mut violations = Violations::default();
    for (field, list) in [("settlements", &request.settlements), ("running", &request.running)] {
        if list.len() > MAX_SETTLEMENTS {
            violations.add_invalid(field, "must hold at most 1000 entries");
        }
        for settlement in list.iter().take(MAX_SETTLEMENTS) {
            validate_lease_id(&settlement.lease_id, &mut violations);
            if !(0..=MAX_SETTLED_TOKENS).contains(&settlement.tokens) {
                violations.add_invalid("tokens", "must be from 0 to 100000000");
            }
        }
    }
    violations.check()?;
    store.settle(request.settlements, request.running, now()).await
}

fn validate_lease_id(lease_id: &str, violations: &mut Violations) {
    if !(1..=MAX_LEASE_ID_BYTES).contains(&lease_id.len()) {
        violations.add_invalid("lease_id", "must be 1 to 64 characters");
    }
}

/// Releases expired leases every [`RELEASE_INTERVAL`] until the server stops: books the last reported
/// usage and returns the rest of the reservation.
pub(crate) async fn release_expired_leases(store: Store) {
    loop {
        sleep(RELEASE_INTERVAL).await;
        loop {
            match store.release_expired_leases(now()).await {
                Ok(true) => {}
                Ok(false) => break,
                Err(error) => {
                    tracing::warn!(%error, "cannot release expired token leases; next attempt in 2 s");
                    break;
                }
            }
        }
    }
}

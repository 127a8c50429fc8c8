//! Token budgets: reserved before a model is asked, settled with what it really used, or with what was
//! reported last where the replica that ran the generation is gone.

use std::time::Duration;

use hapa_core::timestamps::now;
use hapa_core::violations::Violations;
use hapa_proto::auth::v1::{ReserveTokensRequest, SettleTokensRequest};
use tokio::time::sleep;

use crate::error::Error;
use crate::store::{Lease, Store};
use crate::times::in_seconds;

const PAUSE: Duration = Duration::from_secs(2);
const MOST_TOKENS: i64 = 10_000_000;
const MOST_USED: i64 = 100_000_000;
const LONGEST_LEASE: u32 = 86_400;
const LONGEST_ID: usize = 64;
const MOST_SETTLEMENTS: usize = 1_000;

pub(crate) async fn reserve(store: &Store, request: ReserveTokensRequest) -> Result<(), Error> {
    let mut found = Violations::default();
    check_lease(&request.lease_id, &mut found);
    if request.key_id.is_empty() && request.user_id.is_empty() {
        found.missing("key_id");
    }
    if !(1..=MOST_TOKENS).contains(&request.tokens) {
        found.wrong("tokens", "must be from 1 to 10000000");
    }
    if !(1..=LONGEST_LEASE).contains(&request.lease_seconds) {
        found.wrong("lease_seconds", "must be from 1 to 86400");
    }
    if !(0..=request.tokens.max(0)).contains(&request.used_tokens) {
        found.wrong("used_tokens", "must be from 0 to tokens");
    }
    found.check()?;
    let now = now();
    let lease = Lease {
        id: request.lease_id,
        key_id: request.key_id,
        user_id: request.user_id,
        tokens: request.tokens,
        used: request.used_tokens,
        expire_time: in_seconds(now, request.lease_seconds),
    };
    store.reserve(lease, now).await?.map_err(Error::UsedUp)
}

pub(crate) async fn settle(store: &Store, request: SettleTokensRequest) -> Result<(), Error> {
    let mut found = Violations::default();
    for (field, list) in [("settlements", &request.settlements), ("running", &request.running)] {
        if list.len() > MOST_SETTLEMENTS {
            found.wrong(field, "takes at most 1000");
        }
        for settlement in list.iter().take(MOST_SETTLEMENTS) {
            check_lease(&settlement.lease_id, &mut found);
            if !(0..=MOST_USED).contains(&settlement.tokens) {
                found.wrong("tokens", "must be from 0 to 100000000");
            }
        }
    }
    found.check()?;
    store.settle(request.settlements, request.running, now()).await
}

fn check_lease(lease_id: &str, found: &mut Violations) {
    if !(1..=LONGEST_ID).contains(&lease_id.len()) {
        found.wrong("lease_id", "must be 1 to 64 characters");
    }
}

/// Ends leases that were never settled, for as long as the server runs: books what was reported last
/// and gives back the rest.
pub(crate) async fn release(store: Store) {
    loop {
        sleep(PAUSE).await;
        loop {
            match store.end_expired(now()).await {
                Ok(true) => {}
                Ok(false) => break,
                Err(error) => {
                    tracing::warn!(%error, "expired reservations of tokens were not ended");
                    break;
                }
            }
        }
    }
}

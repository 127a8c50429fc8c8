//! Removes what is older than ERROR_RETENTION_DAYS: at the start and every hour, a little at a time.

use std::time::Duration;

use hapa_core::timestamps::{DAY, HOUR, now};
use tokio::time::sleep;

use crate::error::Error;
use crate::store::{Limits, Store};

const OFTEN: Duration = Duration::from_hours(1);
/// After a failure it is tried again sooner.
const SOON: Duration = Duration::from_mins(1);
/// Between two chunks, so that reports come through.
const BREATH: Duration = Duration::from_millis(5);
/// Patterns of an hour are compared with the hour before.
const MINUTES: i64 = 3 * HOUR;

/// Removes what is old for as long as the server runs.
pub(crate) async fn purge(store: Store, days: u32) {
    let mut owners_known = 0;
    loop {
        let done = async {
            copy_owners(&store, &mut owners_known).await?;
            once(&store, days).await
        };
        let pause = match done.await {
            Ok(()) => OFTEN,
            Err(error) => {
                tracing::warn!(%error, "old occurrences were not removed; tried again later");
                SOON
            }
        };
        sleep(pause).await;
    }
}

/// Completes what replicas of the version before have stored since the last time.
async fn copy_owners(store: &Store, known: &mut i64) -> Result<(), Error> {
    // Numbers grow in the order of commits: what is added later has a larger one.
    let head = store.head().await?.sequence;
    while let Some(last) = store.copy_owners(*known).await? {
        *known = last;
        sleep(BREATH).await;
    }
    *known = head.max(*known);
    Ok(())
}

async fn once(store: &Store, days: u32) -> Result<(), Error> {
    let (now, kept) = (now(), i64::from(days) * DAY);
    // Sums are kept twice as long, so that a period can be compared with the one before.
    let limits = Limits { occurrences: now - kept, minutes: now - MINUTES, sums: now - 2 * kept };
    let mut removed = 0;
    loop {
        match store.purge_occurrences(limits.occurrences).await? {
            0 => break,
            some => removed += some,
        }
        sleep(BREATH).await;
    }
    store.purge_others(limits).await?;
    store.purged(now).await?;
    if removed > 0 {
        tracing::info!(removed, "old occurrences were removed");
    }
    Ok(())
}

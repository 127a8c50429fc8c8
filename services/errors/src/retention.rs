//! Deletes data older than ERROR_RETENTION_DAYS, at start-up and every hour, in small transactions.

use std::time::Duration;

use hapa_core::timestamps::{DAY, HOUR, now};
use tokio::time::sleep;

use crate::error::Error;
use crate::store::{RetentionCutoffs, Store};

const PURGE_INTERVAL: Duration = Duration::from_hours(1);
/// Delay before the next attempt after a failure.
const RETRY_DELAY: Duration = Duration::from_mins(1);
/// Pause between two transactions, so that incoming reports get the write lock.
const CHUNK_DELAY: Duration = Duration::from_millis(5);
/// Retention of counts by minute: the trend of the last hour also reads the hour before.
const MINUTE_COUNTS_TTL: i64 = 3 * HOUR;

/// Purges until the server stops.
pub(crate) async fn run_purge(store: Store, days: u32) {
    let mut copied_until = 0;
    loop {
        let purged = async {
            copy_owners(&store, &mut copied_until).await?;
            purge_once(&store, days).await
        };
        let delay = match purged.await {
            Ok(()) => PURGE_INTERVAL,
            Err(error) => {
                tracing::warn!(%error, "purging old occurrences failed; the purge is retried in 1 minute");
                RETRY_DELAY
            }
        };
        sleep(delay).await;
    }
}

/// Fills in the owner of occurrences that replicas of the previous release stored since the last
/// purge.
async fn copy_owners(store: &Store, copied_until: &mut i64) -> Result<(), Error> {
    // Sequence numbers follow the commit order: occurrences stored later have larger ones.
    let head = store.head().await?.sequence;
    while let Some(last) = store.copy_owners(*copied_until).await? {
        *copied_until = last;
        sleep(CHUNK_DELAY).await;
    }
    *copied_until = head.max(*copied_until);
    Ok(())
}

async fn purge_once(store: &Store, days: u32) -> Result<(), Error> {
    let (now, retention) = (now(), i64::from(days) * DAY);
    let cutoffs = RetentionCutoffs {
        occurrences: now - retention,
        minute_counts: now - MINUTE_COUNTS_TTL,
        // Twice as long, so that a period can be compared with the one before.
        aggregates: now - 2 * retention,
    };
    let mut removed = 0;
    loop {
        match store.purge_occurrences(cutoffs.occurrences).await? {
            0 => break,
            count => removed += count,
        }
        sleep(CHUNK_DELAY).await;
    }
    store.purge_aggregates(cutoffs).await?;
    store.set_cleanup_time(now).await?;
    if removed > 0 {
        tracing::info!(removed, "old occurrences were deleted");
    }
    Ok(())
}

//! Deletes expired events and rollups in chunks, so that writers do not wait long.

use std::time::Duration;

use hapa_core::timestamps::{DAY, MINUTE, now};
use tokio::time::sleep;

use crate::error::Error;
use crate::rollup_period::RollupPeriod;
use crate::store::Store;

/// Delay between two purges.
const PURGE_INTERVAL: Duration = Duration::from_mins(1);
/// Pause between two chunks, so that other writers get the write lock.
const CHUNK_DELAY: Duration = Duration::from_millis(20);
const CHUNK_SIZE: i64 = 2_000;
/// Added to the retention, because replicas with slower clocks still update these rows.
const MAX_CLOCK_SKEW: i64 = 5 * MINUTE;

/// Purges until the server stops.
pub(crate) async fn run_purge(store: Store) {
    loop {
        match store.purge_chunk(now()).await {
            Ok(true) => sleep(CHUNK_DELAY).await,
            Ok(false) => sleep(PURGE_INTERVAL).await,
            Err(error) => {
                tracing::warn!(%error, "purging old events failed; the purge is retried in 1 minute");
                sleep(PURGE_INTERVAL).await;
            }
        }
    }
}

impl Store {
    /// Deletes a chunk of each kind. Returns whether expired rows may be left.
    pub(super) async fn purge_chunk(&self, now: i64) -> Result<bool, Error> {
        let retention = i64::from(self.retention_days) * DAY;
        let events = sqlx::query(
            "DELETE FROM usage_events WHERE event_id IN
             (SELECT event_id FROM usage_events WHERE time < $1 ORDER BY time LIMIT $2)",
        );
        let events = events
            .bind(now - retention - MAX_CLOCK_SKEW)
            .bind(CHUNK_SIZE)
            .execute(&self.db.writer)
            .await?;
        let mut has_more = events.rows_affected() >= CHUNK_SIZE.unsigned_abs();
        for period in RollupPeriod::ALL {
            let Some(retention) = period.retention() else { continue };
            let rollups = sqlx::query(
                "DELETE FROM performance_rollups WHERE (seconds, start_time, method, model) IN
                 (SELECT seconds, start_time, method, model FROM performance_rollups
                  WHERE seconds = $1 AND start_time < $2 ORDER BY start_time LIMIT $3)",
            );
            let rollups = rollups
                .bind(period.seconds())
                .bind(now - retention - MAX_CLOCK_SKEW)
                .bind(CHUNK_SIZE);
            let rollups = rollups.execute(&self.db.writer).await?;
            has_more |= rollups.rows_affected() >= CHUNK_SIZE.unsigned_abs();
        }
        Ok(has_more)
    }
}

//! Forgetting what is too old, by portions, so that nobody waits for long.

use std::time::Duration;

use hapa_core::timestamps::{DAY, MINUTE, now};
use tokio::time::sleep;

use crate::error::Error;
use crate::store::Store;
use crate::times::Span;

/// How often it is looked for.
const PAUSE: Duration = Duration::from_mins(1);
/// Between two portions, for those who wait to write.
const BREATH: Duration = Duration::from_millis(20);
const PORTION: i64 = 2_000;
/// What is added to must not go: clocks of replicas differ.
const SLACK: i64 = 5 * MINUTE;

/// Forgets for as long as the server runs.
pub(crate) async fn purge(store: Store) {
    loop {
        match store.purge_portion(now()).await {
            Ok(true) => sleep(BREATH).await,
            Ok(false) => sleep(PAUSE).await,
            Err(error) => {
                tracing::warn!(%error, "old events were not purged; tried again later");
                sleep(PAUSE).await;
            }
        }
    }
}

impl Store {
    /// Forgets a portion of each kind; whether there may be more.
    pub(super) async fn purge_portion(&self, now: i64) -> Result<bool, Error> {
        let kept = i64::from(self.retention_days) * DAY;
        let events = sqlx::query(
            "DELETE FROM usage_events WHERE event_id IN
             (SELECT event_id FROM usage_events WHERE time < $1 ORDER BY time LIMIT $2)",
        );
        let events = events.bind(now - kept - SLACK).bind(PORTION).execute(&self.db.writer).await?;
        let mut more = events.rows_affected() >= PORTION.unsigned_abs();
        for span in Span::ALL {
            let Some(kept) = span.kept() else { continue };
            let rollups = sqlx::query(
                "DELETE FROM performance_rollups WHERE (seconds, start_time, method, model) IN
                 (SELECT seconds, start_time, method, model FROM performance_rollups
                  WHERE seconds = $1 AND start_time < $2 ORDER BY start_time LIMIT $3)",
            );
            let rollups = rollups.bind(span.seconds()).bind(now - kept - SLACK).bind(PORTION);
            let rollups = rollups.execute(&self.db.writer).await?;
            more |= rollups.rows_affected() >= PORTION.unsigned_abs();
        }
        Ok(more)
    }
}

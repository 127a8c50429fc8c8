//! Inserts events and adds them to the aggregates.

use std::collections::HashSet;

use hapa_core::timestamps::DAY;
use hapa_store::sql::{Placeholder, SqlText};
use sqlx::{AnyConnection, Row as _};

use crate::error::Error;
use crate::event::CallEvent;
use crate::rollup::BatchTotals;
use crate::store::{Store, power_of_two_chunks, rollups, usage};

const COLUMN_COUNT: usize = 19;
/// 128 rows are 2,432 parameters. SQLite accepts 32,766, PostgreSQL 65,535.
const MAX_ROWS_PER_STATEMENT: usize = 128;

impl Store {
    /// Stores and aggregates the events that are not stored yet, and returns their number. `events`
    /// must be sorted by id.
    ///
    /// Events older than the retention are dropped: an earlier copy may have been purged, so that the
    /// store cannot detect a repetition.
    pub(crate) async fn record(&self, mut events: Vec<CallEvent>, now: i64) -> Result<u32, Error> {
        let oldest = now.saturating_sub(i64::from(self.retention_days) * DAY);
        events.retain(|event| event.time >= oldest);
        self.enqueue(events, now).await
    }

    /// Stores and aggregates the new events of several batches. Each event has the index of its
    /// batch. Returns the number of new events per batch. An event in several batches counts for
    /// the first one.
    pub(super) async fn insert_batches(
        &self,
        mut events: Vec<(CallEvent, usize)>,
        batches: usize,
        now: i64,
    ) -> Result<Vec<u32>, Error> {
        let recorded = self.db.transaction(move |connection| {
            Box::pin(async move {
                events.sort_unstable_by(|(one, a), (other, b)| {
                    (one.id.as_str(), a).cmp(&(other.id.as_str(), b))
                });
                events.dedup_by(|(next, _), (first, _)| next.id == first.id);
                let new = insert_events(connection, &events).await?;
                let new = || events.iter().filter(|(event, _)| new.contains(&event.id));
                let totals = BatchTotals::from_events(new().map(|(event, _)| event), now);
                usage::upsert_usage_days(connection, &totals.usage).await?;
                rollups::upsert_rollups(connection, &totals.rollups).await?;
                let mut counts = vec![0; batches];
                for (_, batch) in new() {
                    if let Some(count) = counts.get_mut(*batch) {
                        *count += 1;
                    }
                }
                Ok::<_, Error>(counts)
            })
        });
        recorded.await
    }
}

/// Inserts events and returns the ids of those that were new.
async fn insert_events(
    connection: &mut AnyConnection,
    events: &[(CallEvent, usize)],
) -> Result<HashSet<String>, Error> {
    let mut new = HashSet::with_capacity(events.len());
    let placeholder = Placeholder::for_backend(connection.backend_name());
    for chunk in power_of_two_chunks(events, MAX_ROWS_PER_STATEMENT) {
        let text = SqlText::new(
            "INSERT INTO usage_events (event_id, time, service, method, error_code, grpc_status, key_id, user_id, owner, model,
                    task, prompt_tokens, completion_tokens, duration_us, time_to_first_token_us, inter_token_us, cache,
                    time_to_first_answer_token_us, reasoning_tokens)
             VALUES ",
        )
        .rows(placeholder, chunk.len(), COLUMN_COUNT, "")
        .with(" ON CONFLICT DO NOTHING RETURNING event_id");
        let mut insert = sqlx::query(text);
        for (event, _) in chunk {
            insert = insert
                .bind(&event.id)
                .bind(event.time)
                .bind(&event.service)
                .bind(&event.method)
                .bind(&event.error_code)
                .bind(&event.grpc_status)
                .bind(&event.key_id)
                .bind(&event.user_id)
                .bind(&event.owner)
                .bind(&event.model)
                .bind(&event.task)
                .bind(event.prompt_tokens)
                .bind(event.completion_tokens)
                .bind(event.duration_us)
                .bind(event.time_to_first_token_us)
                .bind(event.inter_token_us)
                .bind(event.cache as i64)
                .bind(event.time_to_first_answer_token_us)
                .bind(event.reasoning_tokens);
        }
        for row in insert.fetch_all(&mut *connection).await? {
            new.insert(row.try_get(0)?);
        }
    }
    Ok(new)
}

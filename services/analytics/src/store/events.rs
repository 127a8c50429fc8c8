//! Taking events in.

use std::collections::HashSet;

use hapa_core::timestamps::DAY;
use hapa_store::sql::{Placeholder, SqlText};
use sqlx::{AnyConnection, Row as _};

use crate::error::Error;
use crate::event::Event;
use crate::rollup::Sums;
use crate::store::{Store, portions, rollups, usage};

const COLUMNS: usize = 17;
/// Rows of one statement: 2,176 places, where SQLite has 32,766 and PostgreSQL 65,535.
const MOST: usize = 128;

impl Store {
    /// Stores what is new of these events, which are sorted by id, and sums it up; how many were.
    ///
    /// What is older than events are kept is left out: whether it was counted before can't be told.
    pub(crate) async fn record(&self, mut events: Vec<Event>, now: i64) -> Result<u32, Error> {
        let oldest = now.saturating_sub(i64::from(self.retention_days) * DAY);
        events.retain(|event| event.time >= oldest);
        self.stand_in_line(events, now).await
    }

    /// Stores what is new of the events of so many batches, and sums it up; how many of each were.
    /// What several have counts for the first.
    pub(super) async fn take_in(
        &self,
        mut events: Vec<(Event, usize)>,
        batches: usize,
        now: i64,
    ) -> Result<Vec<u32>, Error> {
        let recorded = self.db.transaction(move |connection| {
            Box::pin(async move {
                events.sort_unstable_by(|(one, a), (other, b)| {
                    (one.id.as_str(), a).cmp(&(other.id.as_str(), b))
                });
                events.dedup_by(|(next, _), (first, _)| next.id == first.id);
                let new = insert(connection, &events).await?;
                let new = || events.iter().filter(|(event, _)| new.contains(&event.id));
                let sums = Sums::of(new().map(|(event, _)| event), now);
                usage::add(connection, &sums.uses).await?;
                rollups::add(connection, &sums.tallies).await?;
                let mut counts = vec![0; batches];
                for (_, whose) in new() {
                    if let Some(count) = counts.get_mut(*whose) {
                        *count += 1;
                    }
                }
                Ok::<_, Error>(counts)
            })
        });
        recorded.await
    }
}

/// The ids of those that were new.
async fn insert(
    connection: &mut AnyConnection,
    events: &[(Event, usize)],
) -> Result<HashSet<String>, Error> {
    let mut new = HashSet::with_capacity(events.len());
    let placeholder = Placeholder::of(connection.backend_name());
    for portion in portions(events, MOST) {
        let text = SqlText::new(
            "INSERT INTO usage_events (event_id, time, service, method, error_code, grpc_status, key_id, user_id, owner, model,
                    task, prompt_tokens, completion_tokens, duration_us, time_to_first_token_us, inter_token_us, cache)
             VALUES ",
        )
        .rows(placeholder, portion.len(), COLUMNS, "")
        .with(" ON CONFLICT DO NOTHING RETURNING event_id");
        let mut insert = sqlx::query(text);
        for (event, _) in portion {
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
                .bind(event.cache as i64);
        }
        for row in insert.fetch_all(&mut *connection).await? {
            new.insert(row.try_get(0)?);
        }
    }
    Ok(new)
}

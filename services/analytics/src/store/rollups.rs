//! Performance rollups by period, method and model.

use std::collections::{BTreeMap, HashMap};

use futures_util::TryStreamExt as _;
use hapa_store::sql::{Placeholder, SqlText};
use sqlx::any::AnyRow;
use sqlx::{AnyConnection, Row as _};

use crate::error::Error;
use crate::rollup::{EncodedLatencies, RollupKey, RollupLatencies, RollupTotals};
use crate::rollup_period::RollupPeriod;
use crate::store::{Store, power_of_two_chunks};

/// Most rows in one statement.
const MAX_ROWS_PER_STATEMENT: usize = 64;

/// Selects the rollups to read.
#[derive(Clone, Debug)]
pub(crate) struct RollupFilter {
    pub(crate) period: RollupPeriod,
    pub(crate) start: i64,
    /// Exclusive.
    pub(crate) end: i64,
    /// "": all models.
    pub(crate) model: String,
    /// The full path of a method, or its last part. "": all methods.
    pub(crate) method: String,
}

impl RollupFilter {
    /// The part of the window that coarser rollups cover, with its start and its exclusive end.
    fn coarse_range(&self) -> (RollupPeriod, i64, i64) {
        let none = (self.period, self.end, self.end);
        let Some(coarser) = self.period.coarser() else { return none };
        let (start, end) = (coarser.ceil(self.start), coarser.floor(self.end));
        if start < end { (coarser, start, end) } else { none }
    }
}

impl Store {
    /// The totals of a window by method and model. Full periods of the next coarser length are read
    /// from there, so that few rows are read: 7 days are 6 days and 24 hours.
    pub(crate) async fn rollup_totals(
        &self,
        filter: &RollupFilter,
    ) -> Result<BTreeMap<(String, String), RollupTotals>, Error> {
        let rows = sqlx::query(
            "SELECT method, model, requests, errors, tokens, reasoning_tokens, token_requests, cacheable, cached, duration_us,
                    sketches, answer_sketch
             FROM performance_rollups
             WHERE ((seconds = $1 AND start_time >= $2 AND start_time < $3)
                 OR (seconds = $4 AND start_time >= $5 AND start_time < $6)
                 OR (seconds = $1 AND start_time >= $7 AND start_time < $8))
               AND ($9 = '' OR model = $9)
               AND ($10 = '' OR method = $10 OR substr(method, length(method) - length($10)) = '/' || $10)",
        );
        let (coarser, start, end) = filter.coarse_range();
        let rows = rows.bind(filter.period.seconds()).bind(filter.start).bind(start);
        let rows = rows.bind(coarser.seconds()).bind(start).bind(end).bind(end).bind(filter.end);
        let rows = rows.bind(&filter.model).bind(&filter.method);
        let mut rows = rows.fetch(&self.db.reader);
        let mut groups: BTreeMap<(String, String), RollupTotals> = BTreeMap::new();
        while let Some(row) = rows.try_next().await? {
            let key = (row.try_get("method")?, row.try_get("model")?);
            let totals = groups.entry(key).or_default();
            totals.merge(&read_counters(&row)?);
            let (sketches, answer) = (row.try_get("sketches")?, row.try_get("answer_sketch")?);
            totals.latencies.add_encoded(sketches, answer)?;
        }
        Ok(groups)
    }
}

fn read_counters(row: &AnyRow) -> Result<RollupTotals, sqlx::Error> {
    Ok(RollupTotals {
        requests: row.try_get("requests")?,
        errors: row.try_get("errors")?,
        tokens: row.try_get("tokens")?,
        reasoning_tokens: row.try_get("reasoning_tokens")?,
        token_requests: row.try_get("token_requests")?,
        cacheable: row.try_get("cacheable")?,
        cached: row.try_get("cached")?,
        duration_us: row.try_get("duration_us")?,
        latencies: RollupLatencies::default(),
    })
}

/// Adds to the rollups. The counters go first: this locks each row and returns its stored
/// histograms. The merged histograms follow under that lock.
pub(super) async fn upsert_rollups(
    connection: &mut AnyConnection,
    rollups: &BTreeMap<RollupKey<'_>, RollupTotals>,
) -> Result<(), Error> {
    let placeholder = Placeholder::for_backend(connection.backend_name());
    let rollups: Vec<_> = rollups.iter().map(|(key, totals)| (*key, totals)).collect();
    for chunk in power_of_two_chunks(&rollups, MAX_ROWS_PER_STATEMENT) {
        let stored = upsert_counters(connection, chunk).await?;
        let text = SqlText::new(
            "INSERT INTO performance_rollups (seconds, start_time, method, model, sketches, answer_sketch,
                    requests, errors, tokens, token_requests, cacheable, cached, duration_us)
             VALUES ",
        )
        .rows(placeholder, chunk.len(), 6, ", 0, 0, 0, 0, 0, 0, 0")
        .with(
            " ON CONFLICT (seconds, start_time, method, model)
             DO UPDATE SET sketches = excluded.sketches, answer_sketch = excluded.answer_sketch",
        );
        let mut update = sqlx::query(text);
        for ((seconds, start, method, model), totals) in chunk {
            let mut latencies = totals.latencies.clone();
            let key = (*seconds, *start, (*method).to_owned(), (*model).to_owned());
            if let Some(EncodedLatencies { sketches, answer_sketch }) = stored.get(&key) {
                latencies.add_encoded(sketches, answer_sketch)?;
            }
            let EncodedLatencies { sketches, answer_sketch } = latencies.encode()?;
            update = update.bind(seconds).bind(start).bind(*method).bind(*model);
            update = update.bind(sketches).bind(answer_sketch);
        }
        update.execute(&mut *connection).await?;
    }
    Ok(())
}

/// The encoded histograms of rollups, by length, start, method and model.
type StoredLatencies = HashMap<(i64, i64, String, String), EncodedLatencies>;

/// Adds to the counters and returns the stored histograms.
async fn upsert_counters(
    connection: &mut AnyConnection,
    chunk: &[(RollupKey<'_>, &RollupTotals)],
) -> Result<StoredLatencies, Error> {
    let text = SqlText::new(
        "INSERT INTO performance_rollups (seconds, start_time, method, model,
                requests, errors, tokens, token_requests, cacheable, cached, duration_us, reasoning_tokens, sketches)
         VALUES ",
    )
    .rows(Placeholder::for_backend(connection.backend_name()), chunk.len(), 12, ", ''")
    .with(
        " ON CONFLICT (seconds, start_time, method, model) DO UPDATE
         SET requests = performance_rollups.requests + excluded.requests,
             errors = performance_rollups.errors + excluded.errors,
             tokens = performance_rollups.tokens + excluded.tokens,
             token_requests = performance_rollups.token_requests + excluded.token_requests,
             cacheable = performance_rollups.cacheable + excluded.cacheable,
             cached = performance_rollups.cached + excluded.cached,
             duration_us = performance_rollups.duration_us + excluded.duration_us,
             reasoning_tokens = performance_rollups.reasoning_tokens + excluded.reasoning_tokens
         RETURNING seconds, start_time, method, model, sketches, answer_sketch",
    );
    let mut update = sqlx::query(text);
    for ((seconds, start, method, model), totals) in chunk {
        update = update
            .bind(seconds)
            .bind(start)
            .bind(*method)
            .bind(*model)
            .bind(totals.requests)
            .bind(totals.errors)
            .bind(totals.tokens)
            .bind(totals.token_requests)
            .bind(totals.cacheable)
            .bind(totals.cached)
            .bind(totals.duration_us)
            .bind(totals.reasoning_tokens);
    }
    let rows = update.fetch_all(connection).await?;
    let stored = rows.iter().map(|row| {
        let key = (row.try_get(0)?, row.try_get(1)?, row.try_get(2)?, row.try_get(3)?);
        let latencies =
            EncodedLatencies { sketches: row.try_get(4)?, answer_sketch: row.try_get(5)? };
        Ok((key, latencies))
    });
    stored.collect()
}

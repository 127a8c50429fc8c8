//! Rollups: how calls went, by span, method and model.

use std::collections::{BTreeMap, HashMap};

use futures_util::TryStreamExt as _;
use hapa_store::sql::{Placeholder, SqlText};
use sqlx::any::AnyRow;
use sqlx::{AnyConnection, Row as _};

use crate::error::Error;
use crate::rollup::{Sketches, Tally, TallyKey};
use crate::store::{Store, portions};
use crate::times::Span;

/// Rows of one statement.
const MOST: usize = 64;

/// Which rollups to read.
#[derive(Clone, Debug)]
pub(crate) struct Which {
    pub(crate) span: Span,
    pub(crate) start: i64,
    /// Until before this.
    pub(crate) end: i64,
    /// "": all.
    pub(crate) model: String,
    /// Whole or its last part; "": all.
    pub(crate) method: String,
}

impl Which {
    /// The part of the window that coarser rollups have, from where until before where.
    fn coarser(&self) -> (Span, i64, i64) {
        let whole = self.span.coarser().map(|span| (span, span.ceil(self.start), self.end));
        let whole = whole.map(|(span, begin, end)| (span, begin, span.floor(end)));
        let none = (self.span, self.end, self.end);
        whole.filter(|(_, begin, end)| begin < end).unwrap_or(none)
    }
}

impl Store {
    /// The sums of a window, by method and model. What is whole in it of the next coarser span comes
    /// from there, so that few rollups are read: 7 days are 6 days and 24 hours.
    pub(crate) async fn tallies(
        &self,
        which: &Which,
    ) -> Result<BTreeMap<(String, String), Tally>, Error> {
        let rows = sqlx::query(
            "SELECT method, model, requests, errors, tokens, token_requests, cacheable, cached, duration_us, sketches
             FROM performance_rollups
             WHERE ((seconds = $1 AND start_time >= $2 AND start_time < $3)
                 OR (seconds = $4 AND start_time >= $5 AND start_time < $6)
                 OR (seconds = $1 AND start_time >= $7 AND start_time < $8))
               AND ($9 = '' OR model = $9)
               AND ($10 = '' OR method = $10 OR substr(method, length(method) - length($10)) = '/' || $10)",
        );
        let (coarser, begin, end) = which.coarser();
        let rows = rows.bind(which.span.seconds()).bind(which.start).bind(begin);
        let rows = rows.bind(coarser.seconds()).bind(begin).bind(end).bind(end).bind(which.end);
        let rows = rows.bind(&which.model).bind(&which.method);
        let mut rows = rows.fetch(&self.db.reader);
        let mut tallies: BTreeMap<(String, String), Tally> = BTreeMap::new();
        while let Some(row) = rows.try_next().await? {
            let key = (row.try_get("method")?, row.try_get("model")?);
            let tally = tallies.entry(key).or_default();
            tally.add(&counted(&row)?);
            tally.sketches.read(row.try_get("sketches")?)?;
        }
        Ok(tallies)
    }
}

fn counted(row: &AnyRow) -> Result<Tally, sqlx::Error> {
    Ok(Tally {
        requests: row.try_get("requests")?,
        errors: row.try_get("errors")?,
        tokens: row.try_get("tokens")?,
        token_requests: row.try_get("token_requests")?,
        cacheable: row.try_get("cacheable")?,
        cached: row.try_get("cached")?,
        duration_us: row.try_get("duration_us")?,
        sketches: Sketches::default(),
    })
}

/// Adds to the rollups: the counters first, which locks each row and tells its sketches, and then
/// the sketches, which only who holds the lock can add to.
pub(super) async fn add(
    connection: &mut AnyConnection,
    tallies: &BTreeMap<TallyKey<'_>, Tally>,
) -> Result<(), Error> {
    let placeholder = Placeholder::of(connection.backend_name());
    let tallies: Vec<_> = tallies.iter().map(|(key, tally)| (*key, tally)).collect();
    for portion in portions(&tallies, MOST) {
        let stored = count(connection, portion).await?;
        let text = SqlText::new(
            "INSERT INTO performance_rollups (seconds, start_time, method, model, sketches,
                    requests, errors, tokens, token_requests, cacheable, cached, duration_us)
             VALUES ",
        )
        .rows(placeholder, portion.len(), 5, ", 0, 0, 0, 0, 0, 0, 0")
        .with(
            " ON CONFLICT (seconds, start_time, method, model)
             DO UPDATE SET sketches = excluded.sketches",
        );
        let mut update = sqlx::query(text);
        for ((seconds, start, method, model), tally) in portion {
            let mut sketches = tally.sketches.clone();
            let key = (*seconds, *start, (*method).to_owned(), (*model).to_owned());
            sketches.read(stored.get(&key).map_or("", String::as_str))?;
            update = update.bind(seconds).bind(start).bind(*method).bind(*model);
            update = update.bind(sketches.text()?);
        }
        update.execute(&mut *connection).await?;
    }
    Ok(())
}

type Stored = HashMap<(i64, i64, String, String), String>;

/// Adds to the counters; the sketches as they were.
async fn count(
    connection: &mut AnyConnection,
    portion: &[(TallyKey<'_>, &Tally)],
) -> Result<Stored, Error> {
    let text = SqlText::new(
        "INSERT INTO performance_rollups (seconds, start_time, method, model,
                requests, errors, tokens, token_requests, cacheable, cached, duration_us, sketches)
         VALUES ",
    )
    .rows(Placeholder::of(connection.backend_name()), portion.len(), 11, ", ''")
    .with(
        " ON CONFLICT (seconds, start_time, method, model) DO UPDATE
         SET requests = performance_rollups.requests + excluded.requests,
             errors = performance_rollups.errors + excluded.errors,
             tokens = performance_rollups.tokens + excluded.tokens,
             token_requests = performance_rollups.token_requests + excluded.token_requests,
             cacheable = performance_rollups.cacheable + excluded.cacheable,
             cached = performance_rollups.cached + excluded.cached,
             duration_us = performance_rollups.duration_us + excluded.duration_us
         RETURNING seconds, start_time, method, model, sketches",
    );
    let mut update = sqlx::query(text);
    for ((seconds, start, method, model), tally) in portion {
        update = update
            .bind(seconds)
            .bind(start)
            .bind(*method)
            .bind(*model)
            .bind(tally.requests)
            .bind(tally.errors)
            .bind(tally.tokens)
            .bind(tally.token_requests)
            .bind(tally.cacheable)
            .bind(tally.cached)
            .bind(tally.duration_us);
    }
    let rows = update.fetch_all(connection).await?;
    let stored = rows.iter().map(|row| {
        let key = (row.try_get(0)?, row.try_get(1)?, row.try_get(2)?, row.try_get(3)?);
        Ok((key, row.try_get(4)?))
    });
    stored.collect()
}

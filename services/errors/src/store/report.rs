//! Takes a batch in: the occurrences, what is counted of them, and what becomes of their incidents,
//! all in one transaction.

use std::collections::{BTreeMap, HashMap, HashSet};

use hapa_core::timestamps::{DAY, HOUR, MINUTE, floor, micros_of};
use hapa_proto::errors::v1::Occurrence;
use sha2::{Digest as _, Sha256};
use sqlx::{AnyConnection, Row as _};

use crate::error::Error;
use crate::fingerprint::normalised;
use crate::store::rows::{Around, Cell, many};
use crate::store::{Head, Store, incidents, lock_head, set_head};

/// Occurrences of a cause in a minute whose details are kept though nobody was shown anything.
const SAMPLE: i64 = 50;

/// An occurrence to store.
#[derive(Debug)]
pub(crate) struct New {
    pub(crate) fingerprint: String,
    pub(crate) time: i64,
    pub(crate) occurrence: Occurrence,
}

/// What to store.
#[derive(Debug)]
pub(crate) struct Batch {
    pub(crate) now: i64,
    /// Whether incidents are made.
    pub(crate) tracked: bool,
    pub(crate) news: Vec<New>,
}

/// One that was new, and its number.
pub(super) type Numbered = (i64, New);

impl Store {
    /// Stores those that are new, and says how many were.
    pub(crate) async fn report(&self, batch: Batch) -> Result<u32, Error> {
        let done = self.db.transaction(move |connection| {
            Box::pin(async move {
                let head = lock_head(connection).await?;
                let Batch { now, tracked, news } = batch;
                let numbered = insert(connection, head, news).await?;
                if numbered.is_empty() {
                    return Ok(0);
                }
                let before = count(connection, &numbered).await?;
                count_by_owner(connection, &numbered).await?;
                keep_details(connection, &numbered, before).await?;
                let owners = meet(connection, &numbered).await?;
                incidents::grow(connection, &numbered, &owners, tracked.then_some(now)).await?;
                let sequence = numbered.last().map_or(head.sequence, |(number, _)| *number);
                let total = head.total + i64::try_from(numbered.len()).unwrap_or_default();
                set_head(connection, Head { sequence, total, ..head }).await?;
                Ok::<_, Error>(u32::try_from(numbered.len()).unwrap_or(u32::MAX))
            })
        });
        let done = done.await?;
        self.changed.notify_one();
        Ok(done)
    }
}

async fn insert(
    connection: &mut AnyConnection,
    head: Head,
    news: Vec<New>,
) -> Result<Vec<Numbered>, Error> {
    let mut seen = HashSet::new();
    let mut numbered: Vec<Numbered> = Vec::with_capacity(news.len());
    for new in news {
        if seen.insert(new.occurrence.event_id.clone()) {
            let number = head.sequence + 1 + i64::try_from(numbered.len()).unwrap_or_default();
            numbered.push((number, new));
        }
    }
    let mut cells = Vec::with_capacity(numbered.len() * 6);
    for (number, New { fingerprint, time, occurrence }) in &numbered {
        cells.extend([
            Cell::Number(*number),
            Cell::Text(&occurrence.event_id),
            Cell::Text(&occurrence.incident_id),
            Cell::Text(fingerprint),
            Cell::Number(*time),
            Cell::Text(&occurrence.owner),
        ]);
    }
    let around = (
        "INSERT INTO error_occurrences (sequence, event_id, incident_id, fingerprint, time, owner)
         VALUES",
        "ON CONFLICT (event_id) DO NOTHING RETURNING sequence",
    );
    let rows = many(connection, around, 6, &cells).await?;
    let stored: Result<HashSet<i64>, _> = rows.iter().map(|row| row.try_get(0)).collect();
    let stored = stored?;
    numbered.retain(|(number, _)| stored.contains(number));
    Ok(numbered)
}

/// A cause in a minute.
type Minute<'a> = (&'a str, i64);

/// Counts them, and says how many a cause already had in a minute.
async fn count<'a>(
    connection: &mut AnyConnection,
    numbered: &'a [Numbered],
) -> Result<HashMap<Minute<'a>, i64>, Error> {
    let mut counts = BTreeMap::new();
    for (_, new) in numbered {
        for width in [MINUTE, HOUR, DAY] {
            let place = (width, floor(new.time, width), new.fingerprint.as_str());
            *counts.entry(place).or_insert(0) += 1;
        }
    }
    let mut cells = Vec::with_capacity(counts.len() * 4);
    for (&(width, start, fingerprint), &total) in &counts {
        let numbers = (Cell::Number(width), Cell::Number(start), Cell::Number(total));
        cells.extend([numbers.0, numbers.1, Cell::Text(fingerprint), numbers.2]);
    }
    let around = (
        "INSERT INTO error_counts (width, start, fingerprint, total) VALUES",
        "ON CONFLICT (width, start, fingerprint)
         DO UPDATE SET total = error_counts.total + excluded.total
         RETURNING width, start, fingerprint, total",
    );
    let mut after = HashMap::new();
    for row in many(connection, around, 4, &cells).await? {
        let place: (i64, i64, String) =
            (row.try_get("width")?, row.try_get("start")?, row.try_get("fingerprint")?);
        after.insert(place, row.try_get::<i64, _>("total")?);
    }
    let minutes = counts.into_iter().filter(|((width, ..), _)| *width == MINUTE);
    let before = minutes.map(|((width, start, fingerprint), new)| {
        let total = after.get(&(width, start, fingerprint.to_owned())).copied();
        ((fingerprint, start), total.unwrap_or(new) - new)
    });
    Ok(before.collect())
}

/// Counts what has an owner for that owner.
async fn count_by_owner(
    connection: &mut AnyConnection,
    numbered: &[Numbered],
) -> Result<(), Error> {
    let mut counts = BTreeMap::new();
    for (_, New { fingerprint, time, occurrence }) in owned(numbered) {
        for width in [MINUTE, HOUR, DAY] {
            let start = floor(*time, width);
            let place = (occurrence.owner.as_str(), width, start, fingerprint.as_str());
            *counts.entry(place).or_insert(0) += 1;
        }
    }
    let mut cells = Vec::with_capacity(counts.len() * 5);
    for ((owner, width, start, fingerprint), total) in counts {
        cells.extend([
            Cell::Text(owner),
            Cell::Number(width),
            Cell::Number(start),
            Cell::Text(fingerprint),
            Cell::Number(total),
        ]);
    }
    let around = (
        "INSERT INTO error_owner_counts (owner, width, start, fingerprint, total) VALUES",
        "ON CONFLICT (owner, width, start, fingerprint)
         DO UPDATE SET total = error_owner_counts.total + excluded.total",
    );
    many(connection, around, 5, &cells).await?;
    Ok(())
}

fn owned(numbered: &[Numbered]) -> impl Iterator<Item = &Numbered> {
    numbered.iter().filter(|(_, new)| !new.occurrence.owner.is_empty())
}

/// Keeps all there is to know of what was shown, and of a sample of the others.
async fn keep_details(
    connection: &mut AnyConnection,
    numbered: &[Numbered],
    mut before: HashMap<Minute<'_>, i64>,
) -> Result<(), Error> {
    let mut kept = Vec::new();
    for (number, new) in numbered {
        let place = (new.fingerprint.as_str(), floor(new.time, MINUTE));
        let seen = before.entry(place).or_insert(0);
        *seen += 1;
        if !new.occurrence.incident_id.is_empty() || *seen <= SAMPLE {
            let causes = serde_json::to_string(&new.occurrence.causes);
            kept.push((*number, new, causes.map_err(anyhow::Error::from)?));
        }
    }
    let mut texts = BTreeMap::new();
    let hashes: Vec<_> = kept
        .iter()
        .map(|(_, new, causes)| {
            // Up to the end of its hour, so that a storm changes a text's row once an hour.
            let last_time = floor(new.time, HOUR) + HOUR;
            [new.occurrence.message.as_str(), causes].map(|text| {
                let mut hash = hex::encode(Sha256::digest(text));
                hash.truncate(32);
                let entry = texts.entry(hash.clone()).or_insert((text, last_time));
                entry.1 = last_time.max(entry.1);
                hash
            })
        })
        .collect();
    let mut cells = Vec::with_capacity(texts.len() * 3);
    for (hash, (text, last_time)) in &texts {
        cells.extend([Cell::Text(hash), Cell::Text(text), Cell::Number(*last_time)]);
    }
    let around = (
        "INSERT INTO error_texts (hash, words, last_time) VALUES",
        "ON CONFLICT (hash) DO UPDATE SET last_time = excluded.last_time
         WHERE error_texts.last_time < excluded.last_time",
    );
    many(connection, around, 3, &cells).await?;
    let mut cells = Vec::with_capacity(kept.len() * 11);
    for ((number, new, _), [message, causes]) in kept.iter().zip(&hashes) {
        cells.extend(detail(*number, &new.occurrence, message, causes));
    }
    let around = (
        "INSERT INTO error_details (sequence, message, causes, service, version, request_id,
                                    trace_id, actor, owner, duration, recovered) VALUES",
        "",
    );
    many(connection, around, 11, &cells).await?;
    Ok(())
}

fn detail<'a>(
    number: i64,
    occurrence: &'a Occurrence,
    message: &'a str,
    causes: &'a str,
) -> [Cell<'a>; 11] {
    [
        Cell::Number(number),
        Cell::Text(message),
        Cell::Text(causes),
        Cell::Text(&occurrence.service),
        Cell::Text(&occurrence.version),
        Cell::Text(&occurrence.request_id),
        Cell::Text(&occurrence.trace_id),
        Cell::Text(&occurrence.actor),
        Cell::Text(&occurrence.owner),
        Cell::Number(occurrence.duration.as_ref().map_or(-1, micros_of)),
        Cell::Number(occurrence.recovered.into()),
    ]
}

/// What a batch has of an owner and a cause.
struct Met<'a> {
    total: i64,
    recovered: i64,
    first_seen: i64,
    /// The one that was seen last.
    last: (i64, &'a Occurrence),
}

const MET: Around = (
    "INSERT INTO error_owners (fingerprint, start, owner, last_time, total, recovered_count,
                               first_seen, last_seen, last_version, message) VALUES",
    "ON CONFLICT (fingerprint, start, owner) DO UPDATE SET
         total = error_owners.total + excluded.total,
         recovered_count = error_owners.recovered_count + excluded.recovered_count,
         last_time = CASE WHEN error_owners.last_time < excluded.last_time
                          THEN excluded.last_time ELSE error_owners.last_time END,
         first_seen = CASE WHEN error_owners.first_seen > 0
                                AND error_owners.first_seen < excluded.first_seen
                           THEN error_owners.first_seen ELSE excluded.first_seen END,
         last_version = CASE WHEN error_owners.last_seen <= excluded.last_seen
                             THEN excluded.last_version ELSE error_owners.last_version END,
         last_seen = CASE WHEN error_owners.last_seen < excluded.last_seen
                          THEN excluded.last_seen ELSE error_owners.last_seen END,
         message = CASE WHEN error_owners.message = ''
                        THEN excluded.message ELSE error_owners.message END
     RETURNING fingerprint, owner, total",
);

/// Adds to what each owner met of each cause, and says how many met a cause for the first time.
async fn meet(
    connection: &mut AnyConnection,
    numbered: &[Numbered],
) -> Result<HashMap<String, i64>, Error> {
    let mut met: BTreeMap<(&str, &str), Met<'_>> = BTreeMap::new();
    for (_, New { fingerprint, time, occurrence }) in owned(numbered) {
        let first = Met { total: 0, recovered: 0, first_seen: *time, last: (*time, occurrence) };
        let met = met.entry((fingerprint, &occurrence.owner)).or_insert(first);
        met.total += 1;
        met.recovered += i64::from(occurrence.recovered);
        met.first_seen = met.first_seen.min(*time);
        if *time > met.last.0 {
            met.last = (*time, occurrence);
        }
    }
    let messages: Vec<_> = met.values().map(|met| normalised(&met.last.1.message)).collect();
    let mut cells = Vec::with_capacity(met.len() * 10);
    for ((&(fingerprint, owner), met), message) in met.iter().zip(&messages) {
        cells.extend([
            Cell::Text(fingerprint),
            Cell::Number(0),
            Cell::Text(owner),
            // Periods begin with a minute.
            Cell::Number(floor(met.last.0, MINUTE)),
            Cell::Number(met.total),
            Cell::Number(met.recovered),
            Cell::Number(met.first_seen),
            Cell::Number(met.last.0),
            Cell::Text(&met.last.1.version),
            Cell::Text(message),
        ]);
    }
    let mut first = HashMap::new();
    for row in many(connection, MET, 10, &cells).await? {
        let (fingerprint, owner): (String, String) =
            (row.try_get("fingerprint")?, row.try_get("owner")?);
        let total: i64 = row.try_get("total")?;
        // Who met it before has more than this batch.
        if met.get(&(&*fingerprint, &*owner)).is_some_and(|met| met.total == total) {
            *first.entry(fingerprint).or_insert(0) += 1;
        }
    }
    Ok(first)
}

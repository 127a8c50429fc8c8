//! Ingests a batch of occurrences: the rows, all counts and the incidents change in one
//! transaction.

use std::collections::{BTreeMap, HashMap, HashSet};

use hapa_core::timestamps::{DAY, HOUR, MINUTE, floor, micros_of};
use hapa_proto::errors::v1::Occurrence;
use sha2::{Digest as _, Sha256};
use sqlx::{AnyConnection, Row as _};

use crate::error::Error;
use crate::fingerprint::normalise;
use crate::store::bulk_sql::{SqlAffixes, SqlValue, execute_rows};
use crate::store::{Store, StoreHead, error_groups, lock_head, write_head};

/// Details are stored of this many occurrences without an incident id per group and minute.
const DETAIL_SAMPLE_SIZE: i64 = 50;

/// An occurrence to store, with its fingerprint and its time in microseconds.
#[derive(Debug)]
pub(crate) struct NewOccurrence {
    pub(crate) fingerprint: String,
    pub(crate) time: i64,
    pub(crate) occurrence: Occurrence,
}

/// The occurrences of one report.
#[derive(Debug)]
pub(crate) struct OccurrenceBatch {
    pub(crate) now: i64,
    /// Whether incidents are created and reopened.
    pub(crate) incident_tracking_enabled: bool,
    pub(crate) occurrences: Vec<NewOccurrence>,
}

/// A stored occurrence and its sequence number.
pub(super) type Sequenced = (i64, NewOccurrence);

impl Store {
    /// Stores the occurrences that are not stored yet, and returns their number.
    pub(crate) async fn ingest(&self, batch: OccurrenceBatch) -> Result<u32, Error> {
        let stored = self.db.transaction(move |connection| {
            Box::pin(async move {
                let head = lock_head(connection).await?;
                let OccurrenceBatch { now, incident_tracking_enabled, occurrences } = batch;
                let sequenced = insert_occurrences(connection, head, occurrences).await?;
                if sequenced.is_empty() {
                    return Ok(0);
                }
                let previous_counts = upsert_counts(connection, &sequenced).await?;
                upsert_owner_counts(connection, &sequenced).await?;
                insert_details(connection, &sequenced, previous_counts).await?;
                let new_owners = upsert_owner_totals(connection, &sequenced).await?;
                let incident_time = incident_tracking_enabled.then_some(now);
                error_groups::upsert_groups(connection, &sequenced, &new_owners, incident_time)
                    .await?;
                let sequence = sequenced.last().map_or(head.sequence, |(sequence, _)| *sequence);
                let total = head.total + i64::try_from(sequenced.len()).unwrap_or_default();
                write_head(connection, StoreHead { sequence, total, ..head }).await?;
                Ok::<_, Error>(u32::try_from(sequenced.len()).unwrap_or(u32::MAX))
            })
        });
        let stored = stored.await?;
        self.changed.notify_one();
        Ok(stored)
    }
}

/// Inserts the occurrences and returns those with new event ids.
async fn insert_occurrences(
    connection: &mut AnyConnection,
    head: StoreHead,
    occurrences: Vec<NewOccurrence>,
) -> Result<Vec<Sequenced>, Error> {
    let mut seen = HashSet::new();
    let mut sequenced: Vec<Sequenced> = Vec::with_capacity(occurrences.len());
    for new in occurrences {
        if seen.insert(new.occurrence.event_id.clone()) {
            let sequence = head.sequence + 1 + i64::try_from(sequenced.len()).unwrap_or_default();
            sequenced.push((sequence, new));
        }
    }
    let mut values = Vec::with_capacity(sequenced.len() * 6);
    for (sequence, NewOccurrence { fingerprint, time, occurrence }) in &sequenced {
        values.extend([
            SqlValue::Number(*sequence),
            SqlValue::Text(&occurrence.event_id),
            SqlValue::Text(&occurrence.incident_id),
            SqlValue::Text(fingerprint),
            SqlValue::Number(*time),
            SqlValue::Text(&occurrence.owner),
        ]);
    }
    let affixes = (
        "INSERT INTO error_occurrences (sequence, event_id, incident_id, fingerprint, time, owner)
         VALUES",
        "ON CONFLICT (event_id) DO NOTHING RETURNING sequence",
    );
    let bulk_sql = execute_rows(connection, affixes, 6, &values).await?;
    let stored: Result<HashSet<i64>, _> = bulk_sql.iter().map(|row| row.try_get(0)).collect();
    let stored = stored?;
    sequenced.retain(|(sequence, _)| stored.contains(sequence));
    Ok(sequenced)
}

/// A fingerprint and the start of a minute.
type GroupMinute<'a> = (&'a str, i64);

/// Adds to the counts by minute, hour and day. Returns the previous counts by minute.
async fn upsert_counts<'a>(
    connection: &mut AnyConnection,
    sequenced: &'a [Sequenced],
) -> Result<HashMap<GroupMinute<'a>, i64>, Error> {
    let mut counts = BTreeMap::new();
    for (_, new) in sequenced {
        for width in [MINUTE, HOUR, DAY] {
            let bucket = (width, floor(new.time, width), new.fingerprint.as_str());
            *counts.entry(bucket).or_insert(0) += 1;
        }
    }
    let mut values = Vec::with_capacity(counts.len() * 4);
    for (&(width, start, fingerprint), &total) in &counts {
        let numbers = (SqlValue::Number(width), SqlValue::Number(start), SqlValue::Number(total));
        values.extend([numbers.0, numbers.1, SqlValue::Text(fingerprint), numbers.2]);
    }
    let affixes = (
        "INSERT INTO error_counts (width, start, fingerprint, total) VALUES",
        "ON CONFLICT (width, start, fingerprint)
         DO UPDATE SET total = error_counts.total + excluded.total
         RETURNING width, start, fingerprint, total",
    );
    let mut totals = HashMap::new();
    for row in execute_rows(connection, affixes, 4, &values).await? {
        let bucket: (i64, i64, String) =
            (row.try_get("width")?, row.try_get("start")?, row.try_get("fingerprint")?);
        totals.insert(bucket, row.try_get::<i64, _>("total")?);
    }
    let minutes = counts.into_iter().filter(|((width, ..), _)| *width == MINUTE);
    let previous_counts = minutes.map(|((width, start, fingerprint), added)| {
        let total = totals.get(&(width, start, fingerprint.to_owned())).copied();
        ((fingerprint, start), total.unwrap_or(added) - added)
    });
    Ok(previous_counts.collect())
}

/// Adds to the owners' counts by minute, hour and day.
async fn upsert_owner_counts(
    connection: &mut AnyConnection,
    sequenced: &[Sequenced],
) -> Result<(), Error> {
    let mut counts = BTreeMap::new();
    for (_, NewOccurrence { fingerprint, time, occurrence }) in with_owner(sequenced) {
        for width in [MINUTE, HOUR, DAY] {
            let start = floor(*time, width);
            let bucket = (occurrence.owner.as_str(), width, start, fingerprint.as_str());
            *counts.entry(bucket).or_insert(0) += 1;
        }
    }
    let mut values = Vec::with_capacity(counts.len() * 5);
    for ((owner, width, start, fingerprint), total) in counts {
        values.extend([
            SqlValue::Text(owner),
            SqlValue::Number(width),
            SqlValue::Number(start),
            SqlValue::Text(fingerprint),
            SqlValue::Number(total),
        ]);
    }
    let affixes = (
        "INSERT INTO error_owner_counts (owner, width, start, fingerprint, total) VALUES",
        "ON CONFLICT (owner, width, start, fingerprint)
         DO UPDATE SET total = error_owner_counts.total + excluded.total",
    );
    execute_rows(connection, affixes, 5, &values).await?;
    Ok(())
}

fn with_owner(sequenced: &[Sequenced]) -> impl Iterator<Item = &Sequenced> {
    sequenced.iter().filter(|(_, new)| !new.occurrence.owner.is_empty())
}

/// Stores the details of occurrences that a user was shown, and of a sample of the others.
async fn insert_details(
    connection: &mut AnyConnection,
    sequenced: &[Sequenced],
    mut counts: HashMap<GroupMinute<'_>, i64>,
) -> Result<(), Error> {
    let mut detailed = Vec::new();
    for (sequence, new) in sequenced {
        let minute = (new.fingerprint.as_str(), floor(new.time, MINUTE));
        let count = counts.entry(minute).or_insert(0);
        *count += 1;
        if !new.occurrence.incident_id.is_empty() || *count <= DETAIL_SAMPLE_SIZE {
            let causes = serde_json::to_string(&new.occurrence.causes);
            detailed.push((*sequence, new, causes.map_err(anyhow::Error::from)?));
        }
    }
    let hashes = upsert_texts(connection, &detailed).await?;
    let mut values = Vec::with_capacity(detailed.len() * 11);
    for ((sequence, new, _), [message, causes]) in detailed.iter().zip(&hashes) {
        values.extend(detail_row(*sequence, &new.occurrence, message, causes));
    }
    let affixes = (
        "INSERT INTO error_details (sequence, message, causes, service, version, request_id,
                                    trace_id, actor, owner, duration, recovered) VALUES",
        "",
    );
    execute_rows(connection, affixes, 11, &values).await?;
    Ok(())
}

/// Stores the messages and causes, each text once, and returns their hashes.
async fn upsert_texts(
    connection: &mut AnyConnection,
    detailed: &[(i64, &NewOccurrence, String)],
) -> Result<Vec<[String; 2]>, Error> {
    let mut texts = BTreeMap::new();
    let hashes: Vec<_> = detailed
        .iter()
        .map(|(_, new, causes)| {
            // The end of the hour, so that a burst of occurrences updates a text's row once an
            // hour.
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
    let mut values = Vec::with_capacity(texts.len() * 3);
    for (hash, (text, last_time)) in &texts {
        values.extend([SqlValue::Text(hash), SqlValue::Text(text), SqlValue::Number(*last_time)]);
    }
    let affixes = (
        "INSERT INTO error_texts (hash, words, last_time) VALUES",
        "ON CONFLICT (hash) DO UPDATE SET last_time = excluded.last_time
         WHERE error_texts.last_time < excluded.last_time",
    );
    execute_rows(connection, affixes, 3, &values).await?;
    Ok(hashes)
}

fn detail_row<'a>(
    sequence: i64,
    occurrence: &'a Occurrence,
    message: &'a str,
    causes: &'a str,
) -> [SqlValue<'a>; 11] {
    [
        SqlValue::Number(sequence),
        SqlValue::Text(message),
        SqlValue::Text(causes),
        SqlValue::Text(&occurrence.service),
        SqlValue::Text(&occurrence.version),
        SqlValue::Text(&occurrence.request_id),
        SqlValue::Text(&occurrence.trace_id),
        SqlValue::Text(&occurrence.actor),
        SqlValue::Text(&occurrence.owner),
        SqlValue::Number(occurrence.duration.as_ref().map_or(-1, micros_of)),
        SqlValue::Number(occurrence.recovered.into()),
    ]
}

/// A batch's occurrences of one group and owner.
struct OwnerTotals<'a> {
    total: i64,
    recovered: i64,
    first_seen: i64,
    /// The latest occurrence and its time.
    latest: (i64, &'a Occurrence),
}

const UPSERT_OWNER_TOTALS: SqlAffixes = (
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

/// Adds to the totals of each group and owner. Returns, per fingerprint, the number of owners that
/// met it for the first time.
async fn upsert_owner_totals(
    connection: &mut AnyConnection,
    sequenced: &[Sequenced],
) -> Result<HashMap<String, i64>, Error> {
    let totals = owner_totals(sequenced);
    let messages: Vec<_> =
        totals.values().map(|totals| normalise(&totals.latest.1.message)).collect();
    let mut values = Vec::with_capacity(totals.len() * 10);
    for ((&(fingerprint, owner), totals), message) in totals.iter().zip(&messages) {
        values.extend([
            SqlValue::Text(fingerprint),
            SqlValue::Number(0),
            SqlValue::Text(owner),
            // Periods start at a full minute.
            SqlValue::Number(floor(totals.latest.0, MINUTE)),
            SqlValue::Number(totals.total),
            SqlValue::Number(totals.recovered),
            SqlValue::Number(totals.first_seen),
            SqlValue::Number(totals.latest.0),
            SqlValue::Text(&totals.latest.1.version),
            SqlValue::Text(message),
        ]);
    }
    let mut new_owners = HashMap::new();
    for row in execute_rows(connection, UPSERT_OWNER_TOTALS, 10, &values).await? {
        let (fingerprint, owner): (String, String) =
            (row.try_get("fingerprint")?, row.try_get("owner")?);
        let total: i64 = row.try_get("total")?;
        // The owner is new to the group if its stored total is this batch's total.
        let key = (&*fingerprint, &*owner);
        if totals.get(&key).is_some_and(|totals| totals.total == total) {
            *new_owners.entry(fingerprint).or_insert(0) += 1;
        }
    }
    Ok(new_owners)
}

/// The totals of a batch, by fingerprint and owner.
fn owner_totals(sequenced: &[Sequenced]) -> BTreeMap<(&str, &str), OwnerTotals<'_>> {
    let mut all: BTreeMap<(&str, &str), OwnerTotals<'_>> = BTreeMap::new();
    for (_, NewOccurrence { fingerprint, time, occurrence }) in with_owner(sequenced) {
        let empty =
            OwnerTotals { total: 0, recovered: 0, first_seen: *time, latest: (*time, occurrence) };
        let totals = all.entry((fingerprint, &occurrence.owner)).or_insert(empty);
        totals.total += 1;
        totals.recovered += i64::from(occurrence.recovered);
        totals.first_seen = totals.first_seen.min(*time);
        if *time > totals.latest.0 {
            totals.latest = (*time, occurrence);
        }
    }
    all
}

//! Deletes expired rows in small transactions, so that other writers do not wait long. Several
//! replicas may purge at once.

use sqlx::{AnyConnection, Row as _};

use crate::error::Error;
use crate::store::{Store, StoreHead, lock_head, write_head};

/// Rows deleted by one transaction.
const CHUNK_SIZE: i64 = 1_000;

/// Deletes everything but occurrences. `$1`: the cutoff time; `$2`: the maximum number of rows.
const AGGREGATE_DELETES: [&str; 10] = [
    // 0: counts by minute.
    "DELETE FROM error_counts WHERE (width, start, fingerprint) IN
         (SELECT width, start, fingerprint FROM error_counts
          WHERE width = 60000000 AND start < $1 LIMIT $2)",
    // 1: counts by hour.
    "DELETE FROM error_counts WHERE (width, start, fingerprint) IN
         (SELECT width, start, fingerprint FROM error_counts
          WHERE width = 3600000000 AND start < $1 LIMIT $2)",
    // 2: counts by day.
    "DELETE FROM error_counts WHERE (width, start, fingerprint) IN
         (SELECT width, start, fingerprint FROM error_counts
          WHERE width = 86400000000 AND start < $1 LIMIT $2)",
    // 3: owners of a group in an hour.
    "DELETE FROM error_owners WHERE (fingerprint, start, owner) IN
         (SELECT fingerprint, start, owner FROM error_owners
          WHERE start > 0 AND last_time < $1 LIMIT $2)",
    // 4: texts without occurrences.
    "DELETE FROM error_texts WHERE hash IN
         (SELECT hash FROM error_texts WHERE last_time < $1 LIMIT $2)",
    // 5: owners of expired groups.
    "DELETE FROM error_owners WHERE (fingerprint, start, owner) IN
         (SELECT o.fingerprint, o.start, o.owner FROM error_patterns p
          JOIN error_owners o ON o.fingerprint = p.fingerprint AND o.start = 0
          WHERE p.last_seen < $1 LIMIT $2)",
    // 6: expired groups.
    "DELETE FROM error_patterns WHERE fingerprint IN
         (SELECT fingerprint FROM error_patterns WHERE last_seen < $1 LIMIT $2)",
    // 7: an owner's counts by minute.
    "DELETE FROM error_owner_counts WHERE (owner, width, start, fingerprint) IN
         (SELECT owner, width, start, fingerprint FROM error_owner_counts
          WHERE width = 60000000 AND start < $1 LIMIT $2)",
    // 8: an owner's counts by hour.
    "DELETE FROM error_owner_counts WHERE (owner, width, start, fingerprint) IN
         (SELECT owner, width, start, fingerprint FROM error_owner_counts
          WHERE width = 3600000000 AND start < $1 LIMIT $2)",
    // 9: an owner's counts by day.
    "DELETE FROM error_owner_counts WHERE (owner, width, start, fingerprint) IN
         (SELECT owner, width, start, fingerprint FROM error_owner_counts
          WHERE width = 86400000000 AND start < $1 LIMIT $2)",
];

/// Cutoff times: older rows are deleted.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RetentionCutoffs {
    /// For occurrences, their texts and their owners by hour.
    pub(crate) occurrences: i64,
    /// For counts by minute.
    pub(crate) minute_counts: i64,
    /// For counts by hour and day, and for error groups.
    pub(crate) aggregates: i64,
}

impl Store {
    /// Deletes up to `CHUNK_SIZE` occurrences from before a time. Returns their number; 0: none is
    /// left.
    pub(crate) async fn purge_occurrences(&self, before: i64) -> Result<i64, Error> {
        let purged = self.db.transaction(move |connection| {
            Box::pin(async move {
                let head = lock_head(connection).await?;
                let removed = delete_oldest(connection, before).await?;
                write_head(connection, StoreHead { total: head.total - removed, ..head }).await?;
                Ok(removed)
            })
        });
        purged.await
    }

    /// Deletes all expired counts, owners, texts and error groups.
    pub(crate) async fn purge_aggregates(&self, cutoffs: RetentionCutoffs) -> Result<(), Error> {
        let RetentionCutoffs { occurrences, minute_counts, aggregates } = cutoffs;
        // In the order of AGGREGATE_DELETES.
        let times = [
            minute_counts,
            aggregates,
            aggregates,
            occurrences,
            occurrences,
            aggregates,
            aggregates,
            minute_counts,
            aggregates,
            aggregates,
        ];
        for (statement, time) in AGGREGATE_DELETES.into_iter().zip(times) {
            let delete_chunk = || {
                self.db.transaction(move |connection| {
                    Box::pin(async move {
                        lock_head(connection).await?;
                        let delete = sqlx::query(statement).bind(time).bind(CHUNK_SIZE);
                        Ok::<_, Error>(delete.execute(connection).await?.rows_affected())
                    })
                })
            };
            while delete_chunk().await? > 0 {}
        }
        Ok(())
    }

    /// Copies the owner from the details to up to `CHUNK_SIZE` occurrences that lack it. Replicas
    /// of the previous release store them so. Returns the last sequence number done; `None`: none
    /// is left.
    pub(crate) async fn copy_owners(&self, after: i64) -> Result<Option<i64>, Error> {
        let rows = sqlx::query(
            "SELECT o.sequence FROM error_occurrences o
             JOIN error_details d ON d.sequence = o.sequence
             WHERE o.sequence > $1 AND o.owner = '' AND d.owner <> ''
             ORDER BY o.sequence LIMIT $2",
        );
        let rows = rows.bind(after).bind(CHUNK_SIZE).fetch_all(&self.db.reader).await?;
        let Some(last) = rows.last() else { return Ok(None) };
        let last: i64 = last.try_get(0)?;
        let update = sqlx::query(
            "UPDATE error_occurrences SET owner = d.owner FROM error_details AS d
             WHERE d.sequence = error_occurrences.sequence AND d.owner <> ''
               AND error_occurrences.sequence > $1 AND error_occurrences.sequence <= $2
               AND error_occurrences.owner = ''",
        );
        update.bind(after).bind(last).execute(&self.db.writer).await?;
        Ok(Some(last))
    }

    /// Records the time of a completed purge.
    pub(crate) async fn set_cleanup_time(&self, time: i64) -> Result<(), Error> {
        let update = sqlx::query("UPDATE error_head SET cleanup_time = $1 WHERE id = 1");
        update.bind(time).execute(&self.db.writer).await?;
        Ok(())
    }
}

async fn delete_oldest(connection: &mut AnyConnection, before: i64) -> Result<i64, Error> {
    let details = sqlx::query(
        "DELETE FROM error_details WHERE sequence IN
             (SELECT sequence FROM error_occurrences WHERE time < $1
              ORDER BY time, sequence LIMIT $2)",
    );
    details.bind(before).bind(CHUNK_SIZE).execute(&mut *connection).await?;
    let occurrences = sqlx::query(
        "DELETE FROM error_occurrences WHERE sequence IN
             (SELECT sequence FROM error_occurrences WHERE time < $1
              ORDER BY time, sequence LIMIT $2)
         RETURNING sequence",
    );
    let deleted = occurrences.bind(before).bind(CHUNK_SIZE).fetch_all(connection).await?;
    let deleted: Result<Vec<i64>, _> = deleted.iter().map(|row| row.try_get(0)).collect();
    Ok(i64::try_from(deleted?.len()).unwrap_or_default())
}

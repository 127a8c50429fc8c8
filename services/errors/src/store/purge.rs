//! Removes what is old, a few rows a transaction, so that nobody waits long. Several replicas may do
//! so at once.

use sqlx::{AnyConnection, Row as _};

use crate::error::Error;
use crate::store::{Head, Store, lock_head, set_head};

/// Rows of one transaction.
const CHUNK: i64 = 1_000;

/// What is removed beside occurrences, by the one time that its statement names. Each takes at most
/// so many rows as the second parameter says.
const OTHERS: [&str; 10] = [
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
    // 3: who met what in an hour.
    "DELETE FROM error_owners WHERE (fingerprint, start, owner) IN
         (SELECT fingerprint, start, owner FROM error_owners
          WHERE start > 0 AND last_time < $1 LIMIT $2)",
    // 4: texts that nothing has any more.
    "DELETE FROM error_texts WHERE hash IN
         (SELECT hash FROM error_texts WHERE last_time < $1 LIMIT $2)",
    // 5: who ever met what is forgotten.
    "DELETE FROM error_owners WHERE (fingerprint, start, owner) IN
         (SELECT o.fingerprint, o.start, o.owner FROM error_patterns p
          JOIN error_owners o ON o.fingerprint = p.fingerprint AND o.start = 0
          WHERE p.last_seen < $1 LIMIT $2)",
    // 6: causes.
    "DELETE FROM error_patterns WHERE fingerprint IN
         (SELECT fingerprint FROM error_patterns WHERE last_seen < $1 LIMIT $2)",
    // 7: an owner's counts by minute.
    "DELETE FROM error_owner_counts WHERE (owner, width, start, fingerprint) IN
         (SELECT owner, width, start, fingerprint FROM error_owner_counts
          WHERE width = 60000000 AND start < $1 LIMIT $2)",
    // 8: by hour.
    "DELETE FROM error_owner_counts WHERE (owner, width, start, fingerprint) IN
         (SELECT owner, width, start, fingerprint FROM error_owner_counts
          WHERE width = 3600000000 AND start < $1 LIMIT $2)",
    // 9: by day.
    "DELETE FROM error_owner_counts WHERE (owner, width, start, fingerprint) IN
         (SELECT owner, width, start, fingerprint FROM error_owner_counts
          WHERE width = 86400000000 AND start < $1 LIMIT $2)",
];

/// What is beyond its time.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Occurrences, and what names their owners.
    pub(crate) occurrences: i64,
    /// Counts by minute.
    pub(crate) minutes: i64,
    /// Counts by hour and day, and causes.
    pub(crate) sums: i64,
}

impl Store {
    /// Removes some occurrences of before a time; says how many, 0 when there are no more.
    pub(crate) async fn purge_occurrences(&self, before: i64) -> Result<i64, Error> {
        let done = self.db.transaction(move |connection| {
            Box::pin(async move {
                let head = lock_head(connection).await?;
                let removed = remove_oldest(connection, before).await?;
                set_head(connection, Head { total: head.total - removed, ..head }).await?;
                Ok(removed)
            })
        });
        done.await
    }

    /// Removes everything else that is beyond its time.
    pub(crate) async fn purge_others(&self, limits: Limits) -> Result<(), Error> {
        let Limits { occurrences, minutes, sums } = limits;
        let times =
            [minutes, sums, sums, occurrences, occurrences, sums, sums, minutes, sums, sums];
        for (statement, time) in OTHERS.into_iter().zip(times) {
            let some = || {
                self.db.transaction(move |connection| {
                    Box::pin(async move {
                        lock_head(connection).await?;
                        let gone = sqlx::query(statement).bind(time).bind(CHUNK);
                        Ok::<_, Error>(gone.execute(connection).await?.rows_affected())
                    })
                })
            };
            while some().await? > 0 {}
        }
        Ok(())
    }

    /// Copies the owner of some occurrences after a number from their details, where the occurrences do
    /// not have it: they were stored by the version before. Says up to which number that was done; none
    /// where there are no more.
    pub(crate) async fn copy_owners(&self, after: i64) -> Result<Option<i64>, Error> {
        let found = sqlx::query(
            "SELECT o.sequence FROM error_occurrences o
             JOIN error_details d ON d.sequence = o.sequence
             WHERE o.sequence > $1 AND o.owner = '' AND d.owner <> ''
             ORDER BY o.sequence LIMIT $2",
        );
        let found = found.bind(after).bind(CHUNK).fetch_all(&self.db.reader).await?;
        let Some(last) = found.last() else { return Ok(None) };
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

    /// Writes down that all is removed.
    pub(crate) async fn purged(&self, time: i64) -> Result<(), Error> {
        let update = sqlx::query("UPDATE error_head SET cleanup_time = $1 WHERE id = 1");
        update.bind(time).execute(&self.db.writer).await?;
        Ok(())
    }
}

async fn remove_oldest(connection: &mut AnyConnection, before: i64) -> Result<i64, Error> {
    let details = sqlx::query(
        "DELETE FROM error_details WHERE sequence IN
             (SELECT sequence FROM error_occurrences WHERE time < $1
              ORDER BY time, sequence LIMIT $2)",
    );
    details.bind(before).bind(CHUNK).execute(&mut *connection).await?;
    let occurrences = sqlx::query(
        "DELETE FROM error_occurrences WHERE sequence IN
             (SELECT sequence FROM error_occurrences WHERE time < $1
              ORDER BY time, sequence LIMIT $2)
         RETURNING sequence",
    );
    let gone = occurrences.bind(before).bind(CHUNK).fetch_all(connection).await?;
    let gone: Result<Vec<i64>, _> = gone.iter().map(|row| row.try_get(0)).collect();
    Ok(i64::try_from(gone?.len()).unwrap_or_default())
}

//! Queries over the counts by minute, hour and day. They read no occurrences.

use hapa_core::timestamps::HOUR;
use sqlx::Row as _;

use crate::error::Error;
use crate::store::Store;
use crate::store::error_groups::{ErrorGroup, read_group};

/// The end of a range that has none. PostgreSQL's planner estimates an open range at a third of the
/// table and then reads all of it.
pub(super) const NO_END: i64 = i64::MAX;

/// A period that ends now and the previous one, in full minutes, hours or days.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ComparisonWindow {
    pub(crate) bucket_width: i64,
    pub(crate) start: i64,
    pub(crate) previous_start: i64,
}

/// An error group and its counts in a `ComparisonWindow`.
#[derive(Debug)]
pub(crate) struct GroupFrequency {
    pub(crate) group: ErrorGroup,
    pub(crate) count: i64,
    pub(crate) previous_count: i64,
    pub(crate) owner_count: i64,
}

impl Store {
    /// The most frequent groups in a window.
    pub(crate) async fn top_groups(
        &self,
        window: ComparisonWindow,
        limit: i64,
    ) -> Result<Vec<GroupFrequency>, Error> {
        let rows = sqlx::query(
            // Periods end now, so an owner met a group in the period if its last_time is after the
            // start.
            "SELECT r.*, (SELECT COUNT(*) FROM error_owners o
                          WHERE o.fingerprint = r.fingerprint AND o.start = 0
                            AND o.last_time >= $1) AS owners
             FROM (SELECT p.*, c.recent, c.earlier FROM
                       (SELECT fingerprint,
                               CAST(SUM(CASE WHEN start >= $1 THEN total ELSE 0 END) AS BIGINT) AS recent,
                               CAST(SUM(CASE WHEN start < $1 THEN total ELSE 0 END) AS BIGINT) AS earlier
                        FROM error_counts WHERE width = $2 AND start >= $3 AND start < $5
                        GROUP BY fingerprint) AS c
                   JOIN error_patterns p ON p.fingerprint = c.fingerprint
                   WHERE c.recent > 0
                   ORDER BY c.recent DESC, p.last_seen DESC, p.fingerprint LIMIT $4) AS r
             ORDER BY r.recent DESC, r.last_seen DESC, r.fingerprint",
        );
        let rows = rows.bind(window.start).bind(window.bucket_width).bind(window.previous_start);
        let rows = rows.bind(limit).bind(NO_END).fetch_all(&self.db.reader).await?;
        let frequencies = rows.iter().map(|row| {
            Ok(GroupFrequency {
                group: read_group(row)?,
                count: row.try_get("recent")?,
                previous_count: row.try_get("earlier")?,
                owner_count: row.try_get("owners")?,
            })
        });
        frequencies.collect()
    }

    /// The error codes since `start` (a full hour), most frequent first.
    pub(crate) async fn codes_since(&self, start: i64) -> Result<Vec<(String, i64)>, Error> {
        let rows = sqlx::query(
            "SELECT p.error_code, CAST(SUM(c.total) AS BIGINT) AS total FROM error_counts c
             JOIN error_patterns p ON p.fingerprint = c.fingerprint
             WHERE c.width = $1 AND c.start >= $2 AND c.start < $3
             GROUP BY p.error_code ORDER BY total DESC, p.error_code",
        );
        let rows = rows.bind(HOUR).bind(start).bind(NO_END).fetch_all(&self.db.reader).await?;
        let codes = rows.iter().map(|row| Ok((row.try_get(0)?, row.try_get(1)?)));
        codes.collect()
    }
}

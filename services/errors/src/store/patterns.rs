//! Sums over what is counted by minute, hour and day; no occurrence is read for them.

use hapa_core::timestamps::HOUR;
use sqlx::Row as _;

use crate::error::Error;
use crate::store::Store;
use crate::store::incidents::{Pattern, pattern};

/// Nothing is beyond it. But a range without an end is a third of all to PostgreSQL's planner, which
/// then reads all.
pub(super) const END: i64 = i64::MAX;

/// A period until now and the one before, in whole minutes, hours or days.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Window {
    pub(crate) width: i64,
    pub(crate) start: i64,
    pub(crate) before: i64,
}

/// A cause, and how often it was met.
#[derive(Debug)]
pub(crate) struct Ranked {
    pub(crate) pattern: Pattern,
    pub(crate) count: i64,
    pub(crate) count_before: i64,
    pub(crate) owners: i64,
}

impl Store {
    /// What was met most often in a window.
    pub(crate) async fn ranked(&self, window: Window, most: i64) -> Result<Vec<Ranked>, Error> {
        let rows = sqlx::query(
            // All periods end now: who met a cause in one is who met it last since it began.
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
        let rows = rows.bind(window.start).bind(window.width).bind(window.before).bind(most);
        let rows = rows.bind(END);
        let ranked = rows.fetch_all(&self.db.reader).await?;
        let ranked = ranked.iter().map(|row| {
            Ok(Ranked {
                pattern: pattern(row)?,
                count: row.try_get("recent")?,
                count_before: row.try_get("earlier")?,
                owners: row.try_get("owners")?,
            })
        });
        ranked.collect()
    }

    /// The most frequent codes since an hour began.
    pub(crate) async fn codes_since(&self, start: i64) -> Result<Vec<(String, i64)>, Error> {
        let rows = sqlx::query(
            "SELECT p.error_code, CAST(SUM(c.total) AS BIGINT) AS total FROM error_counts c
             JOIN error_patterns p ON p.fingerprint = c.fingerprint
             WHERE c.width = $1 AND c.start >= $2 AND c.start < $3
             GROUP BY p.error_code ORDER BY total DESC, p.error_code",
        );
        let rows = rows.bind(HOUR).bind(start).bind(END).fetch_all(&self.db.reader).await?;
        let codes = rows.iter().map(|row| Ok((row.try_get(0)?, row.try_get(1)?)));
        codes.collect()
    }
}

//! Sums over what is counted by minute, hour and day; no occurrence is read for them.

use std::collections::HashMap;

use hapa_chassis::times::{HOUR, floor};
use sqlx::Row as _;

use crate::error::Error;
use crate::store::Store;
use crate::store::incidents::{Pattern, pattern};

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
            "SELECT p.*, c.recent, c.earlier FROM
                 (SELECT fingerprint,
                         CAST(SUM(CASE WHEN start >= $1 THEN total ELSE 0 END) AS BIGINT) AS recent,
                         CAST(SUM(CASE WHEN start < $1 THEN total ELSE 0 END) AS BIGINT) AS earlier
                  FROM error_counts WHERE width = $2 AND start >= $3 GROUP BY fingerprint) AS c
             JOIN error_patterns p ON p.fingerprint = c.fingerprint
             WHERE c.recent > 0
             ORDER BY c.recent DESC, p.last_seen DESC, p.fingerprint LIMIT $4",
        );
        let rows = rows.bind(window.start).bind(window.width).bind(window.before).bind(most);
        let mut ranked = Vec::new();
        for row in rows.fetch_all(&self.db.reader).await? {
            ranked.push(Ranked {
                pattern: pattern(&row)?,
                count: row.try_get("recent")?,
                count_before: row.try_get("earlier")?,
                owners: 0,
            });
        }
        let owners = self.owners_since(&ranked, window.start).await?;
        for one in &mut ranked {
            one.owners = owners.get(&one.pattern.fingerprint).copied().unwrap_or_default();
        }
        Ok(ranked)
    }

    async fn owners_since(
        &self,
        ranked: &[Ranked],
        start: i64,
    ) -> Result<HashMap<String, i64>, Error> {
        // At most a hundred, each a look at an index.
        let mut owners = HashMap::new();
        let mut connection = self.db.reader.acquire().await?;
        for one in ranked {
            let row = sqlx::query(
                "SELECT COUNT(DISTINCT owner) FROM error_owners
                 WHERE fingerprint = $1 AND start >= $2 AND last_time >= $3",
            );
            let name = &one.pattern.fingerprint;
            let row = row.bind(name.as_str()).bind(floor(start, HOUR).max(1)).bind(start);
            let row = row.fetch_one(&mut *connection).await?;
            owners.insert(name.clone(), row.try_get(0)?);
        }
        Ok(owners)
    }

    /// The most frequent codes since an hour began.
    pub(crate) async fn codes_since(&self, start: i64) -> Result<Vec<(String, i64)>, Error> {
        let rows = sqlx::query(
            "SELECT p.error_code, CAST(SUM(c.total) AS BIGINT) AS total FROM error_counts c
             JOIN error_patterns p ON p.fingerprint = c.fingerprint
             WHERE c.width = $1 AND c.start >= $2
             GROUP BY p.error_code ORDER BY total DESC, p.error_code",
        );
        let rows = rows.bind(HOUR).bind(start).fetch_all(&self.db.reader).await?;
        let codes = rows.iter().map(|row| Ok((row.try_get(0)?, row.try_get(1)?)));
        codes.collect()
    }
}

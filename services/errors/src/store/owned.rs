//! What one owner sees: its own occurrences, and what is counted of those alone. No row of these answers
//! depends on what another owner met, but for the state of an incident that both have met.

use hapa_core::pagination::After;
use hapa_core::rpc_error::ErrorCode;
use hapa_core::timestamps::HOUR;
use sqlx::Row as _;
use sqlx::any::AnyRow;

use crate::error::Error;
use crate::fingerprint::normalised;
use crate::store::Store;
use crate::store::incidents::{Filter, Pattern, pattern};
use crate::store::patterns::{END, Ranked, Window};

/// A cause as the owner `$1` met it, and its incident.
macro_rules! own {
    ($more:literal, $rest:literal) => {
        concat!(
            "SELECT p.fingerprint, p.incident_id, p.error_code, p.method, w.message, p.status,
                    w.total, w.recovered_count, CAST(1 AS BIGINT) AS affected_users,
                    CASE WHEN w.first_seen > 0 THEN w.first_seen ELSE w.last_time END AS first_seen,
                    CASE WHEN w.last_seen > 0 THEN w.last_seen ELSE w.last_time END AS last_seen,
                    p.reopened, p.resolved_in_version, w.last_version AS last_seen_version,
                    p.status_time, CAST('' AS TEXT) AS status_actor, CAST('' AS TEXT) AS note ",
            $more,
            " FROM error_owners w JOIN error_patterns p ON p.fingerprint = w.fingerprint ",
            $rest
        )
    };
}

impl Store {
    /// By the incident's own id, or by that of any occurrence of this owner.
    pub(crate) async fn own_incident(
        &self,
        owner: &str,
        id: &str,
    ) -> Result<Option<Pattern>, Error> {
        let own = sqlx::query(own!(
            "",
            "WHERE w.owner = $1 AND w.owner <> '' AND w.start = 0
               AND p.incident_id = $2 AND p.incident_id <> ''"
        ));
        let found = own.bind(owner).bind(id).fetch_optional(&self.db.reader).await?;
        if let Some(row) = found {
            return Ok(Some(own_pattern(&row)?));
        }
        let of_one = sqlx::query(own!(
            "",
            "JOIN error_occurrences o ON o.fingerprint = w.fingerprint
             LEFT JOIN error_details d ON d.sequence = o.sequence
             WHERE w.owner = $1 AND w.owner <> '' AND w.start = 0 AND p.incident_id <> ''
               AND o.incident_id = $2 AND o.incident_id <> ''
               AND (o.owner = $1 OR d.owner = $1)
             ORDER BY o.sequence LIMIT 1"
        ));
        let found = of_one.bind(owner).bind(id).fetch_optional(&self.db.reader).await?;
        found.as_ref().map(own_pattern).transpose()
    }

    /// Last seen by this owner first.
    pub(crate) async fn own_incidents_page(
        &self,
        owner: &str,
        filter: &Filter,
        after: &After,
        size: i64,
    ) -> Result<Vec<Pattern>, Error> {
        let rows = sqlx::query(concat!(
            "SELECT * FROM (",
            own!(
                "",
                "WHERE w.owner = $1 AND w.owner <> '' AND w.start = 0 AND p.incident_id <> ''"
            ),
            ") AS i
             WHERE (i.last_seen < $2 OR (i.last_seen = $2 AND i.incident_id < $3))
               AND i.last_seen >= $4
               AND ($5 = '' OR i.status = $5)
               AND ($6 = '' OR i.error_code = $6)
             ORDER BY i.last_seen DESC, i.incident_id DESC
             LIMIT $7"
        ))
        .bind(owner)
        .bind(after.time)
        .bind(after.id.clone())
        .bind(filter.seen_after)
        .bind(filter.status.clone())
        .bind(filter.error_code.clone())
        .bind(size);
        rows.fetch_all(&self.db.reader).await?.iter().map(own_pattern).collect()
    }

    /// What this owner met most often in a window.
    pub(crate) async fn own_ranked(
        &self,
        owner: &str,
        window: Window,
        most: i64,
    ) -> Result<Vec<Ranked>, Error> {
        let rows = sqlx::query(own!(
            ", c.recent, c.earlier",
            "JOIN (SELECT fingerprint,
                          CAST(SUM(CASE WHEN start >= $2 THEN total ELSE 0 END) AS BIGINT) AS recent,
                          CAST(SUM(CASE WHEN start < $2 THEN total ELSE 0 END) AS BIGINT) AS earlier
                   FROM error_owner_counts
                   WHERE owner = $1 AND width = $3 AND start >= $4 AND start < $5
                   GROUP BY fingerprint) AS c ON c.fingerprint = w.fingerprint
             WHERE w.owner = $1 AND w.owner <> '' AND w.start = 0 AND c.recent > 0
             ORDER BY c.recent DESC, w.last_seen DESC, w.fingerprint LIMIT $6"
        ));
        let rows = rows.bind(owner).bind(window.start).bind(window.width).bind(window.before);
        let ranked = rows.bind(END).bind(most).fetch_all(&self.db.reader).await?;
        let ranked = ranked.iter().map(|row| {
            Ok(Ranked {
                pattern: own_pattern(row)?,
                count: row.try_get("recent")?,
                count_before: row.try_get("earlier")?,
                owners: 1,
            })
        });
        ranked.collect()
    }

    /// The most frequent codes that this owner met since an hour began.
    pub(crate) async fn own_codes_since(
        &self,
        owner: &str,
        start: i64,
    ) -> Result<Vec<(String, i64)>, Error> {
        let rows = sqlx::query(
            "SELECT p.error_code, CAST(SUM(c.total) AS BIGINT) AS total FROM error_owner_counts c
             JOIN error_patterns p ON p.fingerprint = c.fingerprint
             WHERE c.owner = $1 AND c.width = $2 AND c.start >= $3 AND c.start < $4
             GROUP BY p.error_code ORDER BY total DESC, p.error_code",
        );
        let rows = rows.bind(owner).bind(HOUR).bind(start).bind(END);
        let rows = rows.fetch_all(&self.db.reader).await?;
        let codes = rows.iter().map(|row| Ok((row.try_get(0)?, row.try_get(1)?)));
        codes.collect()
    }

    /// How many occurrences of this owner are kept.
    pub(crate) async fn own_total(&self, owner: &str) -> Result<i64, Error> {
        let row =
            sqlx::query("SELECT COUNT(*) FROM error_occurrences WHERE owner = $1 AND owner <> ''");
        Ok(row.bind(owner).fetch_one(&self.db.reader).await?.try_get(0)?)
    }
}

fn own_pattern(row: &AnyRow) -> Result<Pattern, Error> {
    let mut found = pattern(row)?;
    // Stored by the version before as it was told, or not at all.
    found.message = normalised(&found.message);
    if found.message.is_empty() {
        let code = ErrorCode::ALL.iter().map(|code| code.entry());
        let code = code.into_iter().find(|code| code.name == found.error_code);
        found.message = code.map(|code| code.meaning).unwrap_or_default().to_owned();
    }
    Ok(found)
}

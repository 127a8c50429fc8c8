//! Queries for one owner: error groups and counts of this owner's occurrences only. Results do not
//! depend on the occurrences of other owners, except for the status of an incident that both owners
//! met.

use hapa_core::pagination::PageCursor;
use hapa_core::timestamps::HOUR;
use sqlx::Row as _;
use sqlx::any::AnyRow;

use crate::error::Error;
use crate::fingerprint::normalise;
use crate::store::Store;
use crate::store::error_groups::{ErrorGroup, IncidentFilter, read_group};
use crate::store::group_counts::{ComparisonWindow, GroupFrequency, NO_END};
use crate::validation::published_meaning;

/// SELECT of error groups and their incidents, with the totals of the owner `$1`.
macro_rules! owner_groups {
    ($columns:literal, $rest:literal) => {
        concat!(
            "SELECT p.fingerprint, p.incident_id, p.error_code, p.method, w.message, p.status,
                    w.total, w.recovered_count, CAST(1 AS BIGINT) AS affected_users,
                    CASE WHEN w.first_seen > 0 THEN w.first_seen ELSE w.last_time END AS first_seen,
                    CASE WHEN w.last_seen > 0 THEN w.last_seen ELSE w.last_time END AS last_seen,
                    p.reopened, p.resolved_in_version, w.last_version AS last_seen_version,
                    p.status_time, CAST('' AS TEXT) AS status_actor, CAST('' AS TEXT) AS note ",
            $columns,
            " FROM error_owners w JOIN error_patterns p ON p.fingerprint = w.fingerprint ",
            $rest
        )
    };
}

impl Store {
    /// Finds an incident by its id, or by the id of any of this owner's occurrences.
    pub(crate) async fn owner_incident(
        &self,
        owner: &str,
        id: &str,
    ) -> Result<Option<ErrorGroup>, Error> {
        let owner_groups = sqlx::query(owner_groups!(
            "",
            "WHERE w.owner = $1 AND w.owner <> '' AND w.start = 0
               AND p.incident_id = $2 AND p.incident_id <> ''"
        ));
        let found = owner_groups.bind(owner).bind(id).fetch_optional(&self.db.reader).await?;
        if let Some(row) = found {
            return Ok(Some(read_owner_group(&row)?));
        }
        let by_occurrence = sqlx::query(owner_groups!(
            "",
            "JOIN error_occurrences o ON o.fingerprint = w.fingerprint
             LEFT JOIN error_details d ON d.sequence = o.sequence
             WHERE w.owner = $1 AND w.owner <> '' AND w.start = 0 AND p.incident_id <> ''
               AND o.incident_id = $2 AND o.incident_id <> ''
               AND (o.owner = $1 OR d.owner = $1)
             ORDER BY o.sequence LIMIT 1"
        ));
        let found = by_occurrence.bind(owner).bind(id).fetch_optional(&self.db.reader).await?;
        found.as_ref().map(read_owner_group).transpose()
    }

    /// A page of the incidents that this owner met, last seen by this owner first.
    pub(crate) async fn owner_incidents_page(
        &self,
        owner: &str,
        filter: &IncidentFilter,
        after: &PageCursor,
        size: i64,
    ) -> Result<Vec<ErrorGroup>, Error> {
        let rows = sqlx::query(concat!(
            "SELECT * FROM (",
            owner_groups!(
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
        rows.fetch_all(&self.db.reader).await?.iter().map(read_owner_group).collect()
    }

    /// The most frequent groups of this owner in a window.
    pub(crate) async fn owner_top_groups(
        &self,
        owner: &str,
        window: ComparisonWindow,
        limit: i64,
    ) -> Result<Vec<GroupFrequency>, Error> {
        let rows = sqlx::query(owner_groups!(
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
        let rows = rows.bind(owner).bind(window.start).bind(window.bucket_width);
        let rows = rows.bind(window.previous_start).bind(NO_END).bind(limit);
        let rows = rows.fetch_all(&self.db.reader).await?;
        let frequencies = rows.iter().map(|row| {
            Ok(GroupFrequency {
                group: read_owner_group(row)?,
                count: row.try_get("recent")?,
                previous_count: row.try_get("earlier")?,
                owner_count: 1,
            })
        });
        frequencies.collect()
    }

    /// This owner's error codes since `start` (a full hour), most frequent first.
    pub(crate) async fn owner_codes_since(
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
        let rows = rows.bind(owner).bind(HOUR).bind(start).bind(NO_END);
        let rows = rows.fetch_all(&self.db.reader).await?;
        let codes = rows.iter().map(|row| Ok((row.try_get(0)?, row.try_get(1)?)));
        codes.collect()
    }

    /// The number of this owner's stored occurrences.
    pub(crate) async fn owner_total(&self, owner: &str) -> Result<i64, Error> {
        let row =
            sqlx::query("SELECT COUNT(*) FROM error_occurrences WHERE owner = $1 AND owner <> ''");
        Ok(row.bind(owner).fetch_one(&self.db.reader).await?.try_get(0)?)
    }
}

fn read_owner_group(row: &AnyRow) -> Result<ErrorGroup, Error> {
    let mut group = read_group(row)?;
    // Rows of the previous release have the original message, or none.
    group.message = normalise(&group.message);
    if group.message.is_empty() {
        published_meaning(&group.error_code).clone_into(&mut group.message);
    }
    Ok(group)
}

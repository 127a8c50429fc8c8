//! Error groups, one per fingerprint, and their incidents: upsert, lookup, listing and changes of
//! status.

use std::collections::{BTreeMap, HashMap, HashSet};

use hapa_core::pagination::PageCursor;
use hapa_core::rpc_error::incident_id;
use sqlx::any::AnyRow;
use sqlx::{AnyConnection, Row as _};

use crate::error::Error;
use crate::fingerprint::normalise;
use crate::store::bulk_sql::{SqlValue, execute_in_list, execute_rows};
use crate::store::ingest::{NewOccurrence, Sequenced};
use crate::store::{Store, lock_head};
use crate::version::{is_at_least, later};

const COLUMN_COUNT: usize = 17;

const OPEN: &str = "open";
pub(crate) const RESOLVED: &str = "resolved";

/// All occurrences with one fingerprint, and their incident. Stored as a row of `error_patterns`.
#[derive(Clone, Debug, Default)]
pub(crate) struct ErrorGroup {
    pub(crate) fingerprint: String,
    /// "": the group has no incident.
    pub(crate) incident_id: String,
    pub(crate) error_code: String,
    pub(crate) method: String,
    pub(crate) message: String,
    pub(crate) status: String,
    pub(crate) total: i64,
    pub(crate) recovered_count: i64,
    pub(crate) affected_users: i64,
    pub(crate) first_seen: i64,
    pub(crate) last_seen: i64,
    pub(crate) reopened: bool,
    pub(crate) resolved_in_version: String,
    pub(crate) last_seen_version: String,
    pub(crate) status_time: i64,
    pub(crate) status_actor: String,
    pub(crate) note: String,
}

/// Selects the incidents to list. "" selects all.
#[derive(Debug)]
pub(crate) struct IncidentFilter {
    pub(crate) status: String,
    pub(crate) error_code: String,
    pub(crate) seen_after: i64,
}

/// A change of an incident's status.
#[derive(Debug)]
pub(crate) struct StatusChange {
    pub(crate) status: String,
    pub(crate) version: String,
    pub(crate) note: String,
    pub(crate) expected_status: String,
    pub(crate) actor: String,
    pub(crate) time: i64,
}

impl ErrorGroup {
    /// An empty group for the cause of `first`.
    fn new(first: &NewOccurrence) -> Self {
        ErrorGroup {
            fingerprint: first.fingerprint.clone(),
            error_code: first.occurrence.error_code.clone(),
            method: first.occurrence.method.clone(),
            message: normalise(&first.occurrence.message),
            first_seen: first.time,
            last_seen: first.time,
            ..ErrorGroup::default()
        }
    }

    /// Counts one occurrence.
    fn record(&mut self, new: &NewOccurrence) {
        let version = new.occurrence.version.as_str();
        self.total += 1;
        self.recovered_count += i64::from(new.occurrence.recovered);
        self.first_seen = self.first_seen.min(new.time);
        self.last_seen = self.last_seen.max(new.time);
        self.last_seen_version = later(&self.last_seen_version, version).to_owned();
    }

    /// Whether this occurrence shows that the resolved incident is back. Occurrences from before
    /// the resolution do not count, and neither do those of replicas older than the fixed version.
    fn is_regression(&self, new: &NewOccurrence) -> bool {
        let fixed_in = self.resolved_in_version.as_str();
        self.status == RESOLVED
            && new.time > self.status_time
            && (fixed_in.is_empty() || is_at_least(&new.occurrence.version, fixed_in))
    }

    fn reopen(&mut self, now: i64) {
        OPEN.clone_into(&mut self.status);
        "mesh".clone_into(&mut self.status_actor);
        self.status_time = now;
        self.reopened = true;
    }

    fn apply(&mut self, change: StatusChange) {
        let is_resolution = change.status == RESOLVED;
        self.reopened = self.reopened && !is_resolution && self.status != RESOLVED;
        self.status = change.status;
        self.resolved_in_version = change.version;
        self.note = change.note;
        self.status_time = change.time;
        self.status_actor = change.actor;
    }
}

/// Adds a batch to its groups. `incident_time`: also creates and reopens incidents, at this time.
///
/// `new_owners`: per fingerprint, the number of owners that met it for the first time.
pub(super) async fn upsert_groups(
    connection: &mut AnyConnection,
    sequenced: &[Sequenced],
    new_owners: &HashMap<String, i64>,
    incident_time: Option<i64>,
) -> Result<(), Error> {
    let mut batches: BTreeMap<&str, Vec<&NewOccurrence>> = BTreeMap::new();
    for (_, new) in sequenced {
        batches.entry(&new.fingerprint).or_default().push(new);
    }
    let mut stored = stored_groups(connection, &batches).await?;
    let mut used_ids = HashSet::new();
    if incident_time.is_some() {
        used_ids = used_incident_ids(connection, &batches).await?;
    }
    let mut groups = Vec::with_capacity(batches.len());
    for (fingerprint, occurrences) in batches {
        let Some(first) = occurrences.first() else { continue };
        let mut group = stored.remove(fingerprint).unwrap_or_else(|| ErrorGroup::new(first));
        group.affected_users += new_owners.get(fingerprint).copied().unwrap_or_default();
        for new in &occurrences {
            group.record(new);
            if let Some(now) = incident_time.filter(|_| group.is_regression(new)) {
                group.reopen(now);
            }
        }
        if incident_time.is_some() && group.incident_id.is_empty() {
            let mut shown = occurrences.iter().map(|new| &new.occurrence.incident_id);
            let unused = shown.find(|id| !id.is_empty() && !used_ids.contains(*id)).cloned();
            group.incident_id = unused.unwrap_or_else(incident_id);
            used_ids.insert(group.incident_id.clone());
            OPEN.clone_into(&mut group.status);
        }
        groups.push(group);
    }
    upsert(connection, &groups).await
}

/// The stored groups of a batch, by fingerprint.
async fn stored_groups(
    connection: &mut AnyConnection,
    batches: &BTreeMap<&str, Vec<&NewOccurrence>>,
) -> Result<HashMap<String, ErrorGroup>, Error> {
    let values: Vec<_> = batches.keys().map(|fingerprint| SqlValue::Text(fingerprint)).collect();
    let affixes = ("SELECT * FROM error_patterns WHERE fingerprint IN", "");
    let mut stored = HashMap::new();
    for row in execute_in_list(connection, affixes, &values).await? {
        let group = read_group(&row)?;
        stored.insert(group.fingerprint.clone(), group);
    }
    Ok(stored)
}

/// The batch's incident ids that already name an incident.
async fn used_incident_ids(
    connection: &mut AnyConnection,
    batches: &BTreeMap<&str, Vec<&NewOccurrence>>,
) -> Result<HashSet<String>, Error> {
    let ids = batches.values().flatten().map(|new| new.occurrence.incident_id.as_str());
    let ids: HashSet<_> = ids.filter(|id| !id.is_empty()).collect();
    let values: Vec<_> = ids.into_iter().map(SqlValue::Text).collect();
    let affixes =
        ("SELECT incident_id FROM error_patterns WHERE incident_id <> '' AND incident_id IN", "");
    let rows = execute_in_list(connection, affixes, &values).await?;
    Ok(rows.iter().map(|row| row.try_get(0)).collect::<Result<_, _>>()?)
}

async fn upsert(connection: &mut AnyConnection, groups: &[ErrorGroup]) -> Result<(), Error> {
    let mut values = Vec::with_capacity(groups.len() * COLUMN_COUNT);
    for group in groups {
        values.extend([
            SqlValue::Text(&group.fingerprint),
            SqlValue::Text(&group.incident_id),
            SqlValue::Text(&group.error_code),
            SqlValue::Text(&group.method),
            SqlValue::Text(&group.message),
            SqlValue::Text(&group.status),
            SqlValue::Number(group.total),
            SqlValue::Number(group.recovered_count),
            SqlValue::Number(group.affected_users),
            SqlValue::Number(group.first_seen),
            SqlValue::Number(group.last_seen),
            SqlValue::Number(group.reopened.into()),
            SqlValue::Text(&group.resolved_in_version),
            SqlValue::Text(&group.last_seen_version),
            SqlValue::Number(group.status_time),
            SqlValue::Text(&group.status_actor),
            SqlValue::Text(&group.note),
        ]);
    }
    let affixes = (
        "INSERT INTO error_patterns (fingerprint, incident_id, error_code, method, message, status,
             total, recovered_count, affected_users, first_seen, last_seen, reopened,
             resolved_in_version, last_seen_version, status_time, status_actor, note) VALUES",
        "ON CONFLICT (fingerprint) DO UPDATE SET
             incident_id = excluded.incident_id, status = excluded.status,
             total = excluded.total, recovered_count = excluded.recovered_count,
             affected_users = excluded.affected_users, first_seen = excluded.first_seen,
             last_seen = excluded.last_seen, reopened = excluded.reopened,
             resolved_in_version = excluded.resolved_in_version,
             last_seen_version = excluded.last_seen_version,
             status_time = excluded.status_time, status_actor = excluded.status_actor,
             note = excluded.note",
    );
    execute_rows(connection, affixes, COLUMN_COUNT, &values).await?;
    Ok(())
}

/// Finds a group by its incident id, or by the first occurrence that was shown with this id.
async fn find(connection: &mut AnyConnection, id: &str) -> Result<Option<ErrorGroup>, Error> {
    let by_incident =
        sqlx::query("SELECT * FROM error_patterns WHERE incident_id = $1 AND incident_id <> ''");
    if let Some(row) = by_incident.bind(id).fetch_optional(&mut *connection).await? {
        return Ok(Some(read_group(&row)?));
    }
    let by_occurrence = sqlx::query(
        "SELECT p.* FROM error_occurrences o
         JOIN error_patterns p ON p.fingerprint = o.fingerprint AND p.incident_id <> ''
         WHERE o.incident_id = $1 AND o.incident_id <> '' ORDER BY o.sequence LIMIT 1",
    );
    by_occurrence.bind(id).fetch_optional(connection).await?.as_ref().map(read_group).transpose()
}

impl Store {
    /// Finds an incident by its id, or by the id of any of its occurrences.
    pub(crate) async fn incident(&self, id: &str) -> Result<Option<ErrorGroup>, Error> {
        find(&mut *self.db.reader.acquire().await?, id).await
    }

    /// Changes an incident's status. `None`: no incident has this id.
    pub(crate) async fn change_incident(
        &self,
        id: String,
        change: StatusChange,
    ) -> Result<Option<ErrorGroup>, Error> {
        let changed = self.db.transaction(move |connection| {
            Box::pin(async move {
                lock_head(connection).await?;
                let Some(mut group) = find(connection, &id).await? else { return Ok(None) };
                let expected = &change.expected_status;
                if !expected.is_empty() && *expected != group.status {
                    return Err(Error::StatusConflict(group.status));
                }
                group.apply(change);
                upsert(connection, std::slice::from_ref(&group)).await?;
                Ok(Some(group))
            })
        });
        changed.await
    }

    /// A page of incidents, last seen first.
    pub(crate) async fn incidents_page(
        &self,
        filter: &IncidentFilter,
        after: &PageCursor,
        size: i64,
    ) -> Result<Vec<ErrorGroup>, Error> {
        let rows = sqlx::query(
            "SELECT * FROM error_patterns
             WHERE incident_id <> ''
               AND (last_seen < $1 OR (last_seen = $1 AND incident_id < $2))
               AND last_seen >= $3
               AND ($4 = '' OR status = $4)
               AND ($5 = '' OR error_code = $5)
             ORDER BY last_seen DESC, incident_id DESC
             LIMIT $6",
        )
        .bind(after.time)
        .bind(after.id.clone())
        .bind(filter.seen_after)
        .bind(filter.status.clone())
        .bind(filter.error_code.clone())
        .bind(size);
        rows.fetch_all(&self.db.reader).await?.iter().map(read_group).collect()
    }
}

pub(super) fn read_group(row: &AnyRow) -> Result<ErrorGroup, Error> {
    Ok(ErrorGroup {
        fingerprint: row.try_get("fingerprint")?,
        incident_id: row.try_get("incident_id")?,
        error_code: row.try_get("error_code")?,
        method: row.try_get("method")?,
        message: row.try_get("message")?,
        status: row.try_get("status")?,
        total: row.try_get("total")?,
        recovered_count: row.try_get("recovered_count")?,
        affected_users: row.try_get("affected_users")?,
        first_seen: row.try_get("first_seen")?,
        last_seen: row.try_get("last_seen")?,
        reopened: row.try_get::<i64, _>("reopened")? != 0,
        resolved_in_version: row.try_get("resolved_in_version")?,
        last_seen_version: row.try_get("last_seen_version")?,
        status_time: row.try_get("status_time")?,
        status_actor: row.try_get("status_actor")?,
        note: row.try_get("note")?,
    })
}

#[cfg(test)]
mod tests {
    use hapa_proto::errors::v1::Occurrence;

    use super::*;

    fn new(time: i64, version: &str) -> NewOccurrence {
        let version = version.to_owned();
        let occurrence = Occurrence { version, ..Occurrence::default() };
        NewOccurrence { fingerprint: String::new(), time, occurrence }
    }

    #[test]
    fn only_later_occurrences_of_fixed_versions_are_a_regression() {
        let resolved = |version: &str| ErrorGroup {
            status: RESOLVED.to_owned(),
            status_time: 10,
            resolved_in_version: version.to_owned(),
            ..ErrorGroup::default()
        };
        assert!(resolved("").is_regression(&new(11, "")));
        assert!(!resolved("").is_regression(&new(9, "")));
        assert!(resolved("1.10.0").is_regression(&new(11, "1.10.0")));
        assert!(!resolved("1.10.0").is_regression(&new(11, "1.9.0")));
        assert!(!resolved("1.10.0").is_regression(&new(9, "1.11.0")));
        let open = ErrorGroup { status: OPEN.to_owned(), ..resolved("") };
        assert!(!open.is_regression(&new(11, "")));
    }
}

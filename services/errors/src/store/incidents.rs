//! Causes and the incidents that are made of them: how they grow, how they are found and changed.

use std::collections::{BTreeMap, HashMap, HashSet};

use hapa_core::pagination::After;
use hapa_core::rpc_error::incident_id;
use sqlx::any::AnyRow;
use sqlx::{AnyConnection, Row as _};

use crate::error::Error;
use crate::fingerprint::normalised;
use crate::store::report::{New, Numbered};
use crate::store::rows::{Cell, among, many};
use crate::store::{Store, lock_head};
use crate::version::{is_since, later};

const OPEN: &str = "open";
pub(crate) const RESOLVED: &str = "resolved";

/// A cause, and the incident that was made of it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Pattern {
    pub(crate) fingerprint: String,
    /// "": none was made.
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

/// Which incidents to list.
#[derive(Debug)]
pub(crate) struct Filter {
    pub(crate) status: String,
    pub(crate) error_code: String,
    pub(crate) seen_after: i64,
}

/// What to change about an incident.
#[derive(Debug)]
pub(crate) struct Change {
    pub(crate) status: String,
    pub(crate) version: String,
    pub(crate) note: String,
    pub(crate) expected_status: String,
    pub(crate) actor: String,
    pub(crate) time: i64,
}

impl Pattern {
    fn new(new: &New) -> Self {
        Pattern {
            fingerprint: new.fingerprint.clone(),
            error_code: new.occurrence.error_code.clone(),
            method: new.occurrence.method.clone(),
            message: normalised(&new.occurrence.message),
            first_seen: new.time,
            last_seen: new.time,
            ..Pattern::default()
        }
    }

    /// One more of it.
    fn meet(&mut self, new: &New) {
        let version = new.occurrence.version.as_str();
        self.total += 1;
        self.recovered_count += i64::from(new.occurrence.recovered);
        self.first_seen = self.first_seen.min(new.time);
        self.last_seen = self.last_seen.max(new.time);
        self.last_seen_version = later(&self.last_seen_version, version).to_owned();
    }

    /// Whether this shows that it is not resolved. What happened before it was says nothing, and
    /// neither does a replica that is older than its repair.
    fn is_back(&self, new: &New) -> bool {
        let repaired = self.resolved_in_version.as_str();
        self.status == RESOLVED
            && new.time > self.status_time
            && (repaired.is_empty() || is_since(&new.occurrence.version, repaired))
    }

    fn reopen(&mut self, now: i64) {
        OPEN.clone_into(&mut self.status);
        "mesh".clone_into(&mut self.status_actor);
        self.status_time = now;
        self.reopened = true;
    }

    fn change(&mut self, change: Change) {
        let resolved = change.status == RESOLVED;
        self.reopened = self.reopened && !resolved && self.status != RESOLVED;
        self.status = change.status;
        self.resolved_in_version = change.version;
        self.note = change.note;
        self.status_time = change.time;
        self.status_actor = change.actor;
    }
}

/// Adds a batch to its causes, and makes or reopens their incidents where they are `tracked`.
pub(super) async fn grow(
    connection: &mut AnyConnection,
    numbered: &[Numbered],
    owners: &HashMap<String, i64>,
    tracked: Option<i64>,
) -> Result<(), Error> {
    let mut groups: BTreeMap<&str, Vec<&New>> = BTreeMap::new();
    for (_, new) in numbered {
        groups.entry(&new.fingerprint).or_default().push(new);
    }
    let names: Vec<_> = groups.keys().map(|name| Cell::Text(name)).collect();
    let around = ("SELECT * FROM error_patterns WHERE fingerprint IN", "");
    let mut known = HashMap::new();
    for row in among(connection, around, &names).await? {
        let pattern = pattern(&row)?;
        known.insert(pattern.fingerprint.clone(), pattern);
    }
    let mut taken = HashSet::new();
    if tracked.is_some() {
        taken = taken_ids(connection, &groups).await?;
    }
    let mut grown = Vec::with_capacity(groups.len());
    for (name, news) in groups {
        let Some(first) = news.first() else { continue };
        let mut pattern = known.remove(name).unwrap_or_else(|| Pattern::new(first));
        pattern.affected_users += owners.get(name).copied().unwrap_or_default();
        for new in &news {
            pattern.meet(new);
            if let Some(now) = tracked.filter(|_| pattern.is_back(new)) {
                pattern.reopen(now);
            }
        }
        if tracked.is_some() && pattern.incident_id.is_empty() {
            let mut shown = news.iter().map(|new| &new.occurrence.incident_id);
            let free = shown.find(|id| !id.is_empty() && !taken.contains(*id)).cloned();
            pattern.incident_id = free.unwrap_or_else(incident_id);
            taken.insert(pattern.incident_id.clone());
            OPEN.clone_into(&mut pattern.status);
        }
        grown.push(pattern);
    }
    put(connection, &grown).await
}

/// Of the ids that were shown, those that name an incident already.
async fn taken_ids(
    connection: &mut AnyConnection,
    groups: &BTreeMap<&str, Vec<&New>>,
) -> Result<HashSet<String>, Error> {
    let ids = groups.values().flatten().map(|new| new.occurrence.incident_id.as_str());
    let ids: HashSet<_> = ids.filter(|id| !id.is_empty()).collect();
    let cells: Vec<_> = ids.into_iter().map(Cell::Text).collect();
    let around =
        ("SELECT incident_id FROM error_patterns WHERE incident_id <> '' AND incident_id IN", "");
    let rows = among(connection, around, &cells).await?;
    Ok(rows.iter().map(|row| row.try_get(0)).collect::<Result<_, _>>()?)
}

async fn put(connection: &mut AnyConnection, patterns: &[Pattern]) -> Result<(), Error> {
    let mut cells = Vec::with_capacity(patterns.len() * 17);
    for pattern in patterns {
        cells.extend([
            Cell::Text(&pattern.fingerprint),
            Cell::Text(&pattern.incident_id),
            Cell::Text(&pattern.error_code),
            Cell::Text(&pattern.method),
            Cell::Text(&pattern.message),
            Cell::Text(&pattern.status),
            Cell::Number(pattern.total),
            Cell::Number(pattern.recovered_count),
            Cell::Number(pattern.affected_users),
            Cell::Number(pattern.first_seen),
            Cell::Number(pattern.last_seen),
            Cell::Number(pattern.reopened.into()),
            Cell::Text(&pattern.resolved_in_version),
            Cell::Text(&pattern.last_seen_version),
            Cell::Number(pattern.status_time),
            Cell::Text(&pattern.status_actor),
            Cell::Text(&pattern.note),
        ]);
    }
    let around = (
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
    many(connection, around, 17, &cells).await?;
    Ok(())
}

/// By its own id, or by the first occurrence that was shown with this one.
async fn find(connection: &mut AnyConnection, id: &str) -> Result<Option<Pattern>, Error> {
    let own =
        sqlx::query("SELECT * FROM error_patterns WHERE incident_id = $1 AND incident_id <> ''");
    if let Some(row) = own.bind(id).fetch_optional(&mut *connection).await? {
        return Ok(Some(pattern(&row)?));
    }
    let of_one = sqlx::query(
        "SELECT p.* FROM error_occurrences o
         JOIN error_patterns p ON p.fingerprint = o.fingerprint AND p.incident_id <> ''
         WHERE o.incident_id = $1 AND o.incident_id <> '' ORDER BY o.sequence LIMIT 1",
    );
    of_one.bind(id).fetch_optional(connection).await?.as_ref().map(pattern).transpose()
}

impl Store {
    /// By its own id, or by that of any of its occurrences.
    pub(crate) async fn incident(&self, id: &str) -> Result<Option<Pattern>, Error> {
        find(&mut *self.db.reader.acquire().await?, id).await
    }

    /// Changes an incident; none where there is none.
    pub(crate) async fn change_incident(
        &self,
        id: String,
        change: Change,
    ) -> Result<Option<Pattern>, Error> {
        let done = self.db.transaction(move |connection| {
            Box::pin(async move {
                lock_head(connection).await?;
                let Some(mut pattern) = find(connection, &id).await? else { return Ok(None) };
                let expected = &change.expected_status;
                if !expected.is_empty() && *expected != pattern.status {
                    return Err(Error::Changed(pattern.status));
                }
                pattern.change(change);
                put(connection, std::slice::from_ref(&pattern)).await?;
                Ok(Some(pattern))
            })
        });
        done.await
    }

    /// Last seen first.
    pub(crate) async fn incidents_page(
        &self,
        filter: &Filter,
        after: &After,
        size: i64,
    ) -> Result<Vec<Pattern>, Error> {
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
        rows.fetch_all(&self.db.reader).await?.iter().map(pattern).collect()
    }
}

pub(super) fn pattern(row: &AnyRow) -> Result<Pattern, Error> {
    Ok(Pattern {
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

    fn new(time: i64, version: &str) -> New {
        let version = version.to_owned();
        let occurrence = Occurrence { version, ..Occurrence::default() };
        New { fingerprint: String::new(), time, occurrence }
    }

    #[test]
    fn only_what_the_repair_should_have_ended_is_a_regression() {
        let resolved = |version: &str| Pattern {
            status: RESOLVED.to_owned(),
            status_time: 10,
            resolved_in_version: version.to_owned(),
            ..Pattern::default()
        };
        assert!(resolved("").is_back(&new(11, "")));
        assert!(!resolved("").is_back(&new(9, "")));
        assert!(resolved("1.10.0").is_back(&new(11, "1.10.0")));
        assert!(!resolved("1.10.0").is_back(&new(11, "1.9.0")));
        assert!(!resolved("1.10.0").is_back(&new(9, "1.11.0")));
        let open = Pattern { status: OPEN.to_owned(), ..resolved("") };
        assert!(!open.is_back(&new(11, "")));
    }
}

//! Reads occurrences, by group and by range of sequence numbers.

use hapa_core::timestamps::{duration, timestamp};
use hapa_proto::errors::v1::Occurrence;
use sqlx::Row as _;
use sqlx::any::AnyRow;

use crate::error::Error;
use crate::store::Store;

/// SELECT of occurrences with their stored details. Without details the message is that of the
/// group.
macro_rules! occurrences {
    ($rest:literal) => {
        occurrences!(
            "p.message",
            "COALESCE(d.owner, '')",
            "COALESCE(c.words, '[]')",
            "LEFT JOIN error_texts c ON c.hash = d.causes ",
            $rest
        )
    };
    ($message:literal, $owner:literal, $causes:literal, $join:literal, $rest:literal) => {
        concat!(
            "SELECT o.sequence, o.event_id, o.incident_id, o.time, p.error_code, p.method,
                    COALESCE(m.words, ",
            $message,
            ") AS message, ",
            $causes,
            " AS causes, COALESCE(d.service, '') AS service, COALESCE(d.version, '') AS version,
                    COALESCE(d.request_id, '') AS request_id, COALESCE(d.trace_id, '') AS trace_id,
                    COALESCE(d.actor, '') AS actor, ",
            $owner,
            " AS owner, COALESCE(d.duration, -1) AS duration, COALESCE(d.recovered, 0) AS recovered
             FROM error_occurrences o
             JOIN error_patterns p ON p.fingerprint = o.fingerprint
             LEFT JOIN error_details d ON d.sequence = o.sequence
             LEFT JOIN error_texts m ON m.hash = d.message ",
            $join,
            $rest
        )
    };
}

/// SELECT of the occurrences of the owner `$1`, without causes. Without details the message is the
/// one stored for this owner and group.
macro_rules! owner_occurrences {
    ($rest:literal) => {
        occurrences!(
            "COALESCE(w.message, '')",
            "COALESCE(w.owner, '')",
            "CAST('[]' AS TEXT)",
            // Joined from the occurrence, because an owner may have rows for many groups.
            "LEFT JOIN error_owners w ON w.fingerprint = o.fingerprint AND w.owner = $1 AND w.start = 0 ",
            $rest
        )
    };
}

impl Store {
    /// The group's occurrence that was shown with this id, then its newest; at most `limit` in
    /// total.
    pub(crate) async fn occurrences_of(
        &self,
        fingerprint: &str,
        shown_id: &str,
        limit: usize,
    ) -> Result<Vec<Occurrence>, Error> {
        let shown = sqlx::query(occurrences!(
            "WHERE o.incident_id = $1 AND o.incident_id <> '' AND o.fingerprint = $2
             ORDER BY o.sequence LIMIT 1"
        ));
        let shown = shown.bind(shown_id).bind(fingerprint).fetch_optional(&self.db.reader).await?;
        let newest = sqlx::query(occurrences!(
            "WHERE o.fingerprint = $1 ORDER BY o.time DESC, o.sequence DESC LIMIT $2"
        ));
        let newest = newest.bind(fingerprint).bind(i64::try_from(limit).unwrap_or(i64::MAX));
        let newest = newest.fetch_all(&self.db.reader).await?;
        merge_shown_and_newest(shown.as_ref(), &newest, limit)
    }

    /// The occurrences with sequence numbers in (`after`, `end`], oldest first, with these numbers.
    pub(crate) async fn occurrences_between(
        &self,
        (after, end): (i64, i64),
        error_code: &str,
        limit: i64,
    ) -> Result<Vec<(i64, Occurrence)>, Error> {
        let rows = sqlx::query(occurrences!(
            "WHERE o.sequence > $1 AND o.sequence <= $2 AND ($3 = '' OR p.error_code = $3)
             ORDER BY o.sequence LIMIT $4"
        ));
        let rows = rows.bind(after).bind(end).bind(error_code).bind(limit);
        rows.fetch_all(&self.db.reader).await?.iter().map(read_occurrence).collect()
    }

    /// The number of occurrences with sequence numbers in (`after`, `end`].
    pub(crate) async fn count_between(
        &self,
        (after, end): (i64, i64),
        error_code: &str,
    ) -> Result<u32, Error> {
        let row = sqlx::query(
            "SELECT COUNT(*) FROM error_occurrences o
             JOIN error_patterns p ON p.fingerprint = o.fingerprint
             WHERE o.sequence > $1 AND o.sequence <= $2 AND ($3 = '' OR p.error_code = $3)",
        );
        let row = row.bind(after).bind(end).bind(error_code).fetch_one(&self.db.reader).await?;
        Ok(u32::try_from(row.try_get::<i64, _>(0)?).unwrap_or(u32::MAX))
    }

    /// The group's occurrence that this owner was shown with this id, then the owner's newest; at
    /// most `limit` in total.
    pub(crate) async fn owner_occurrences_of(
        &self,
        owner: &str,
        fingerprint: &str,
        shown_id: &str,
        limit: usize,
    ) -> Result<Vec<Occurrence>, Error> {
        let shown = sqlx::query(owner_occurrences!(
            "WHERE o.incident_id = $2 AND o.incident_id <> '' AND o.fingerprint = $3
               AND $1 <> '' AND (o.owner = $1 OR d.owner = $1)
             ORDER BY o.sequence LIMIT 1"
        ));
        let shown = shown.bind(owner).bind(shown_id).bind(fingerprint);
        let shown = shown.fetch_optional(&self.db.reader).await?;
        let newest = sqlx::query(owner_occurrences!(
            "WHERE o.owner = $1 AND o.owner <> '' AND o.fingerprint = $2
             ORDER BY o.time DESC, o.sequence DESC LIMIT $3"
        ));
        let row_limit = i64::try_from(limit).unwrap_or(i64::MAX);
        let newest = newest.bind(owner).bind(fingerprint).bind(row_limit);
        let newest = newest.fetch_all(&self.db.reader).await?;
        merge_shown_and_newest(shown.as_ref(), &newest, limit)
    }

    /// The owner's occurrences with sequence numbers in (`after`, `end`], oldest first, with these
    /// numbers.
    pub(crate) async fn owner_occurrences_between(
        &self,
        owner: &str,
        (after, end): (i64, i64),
        error_code: &str,
        limit: i64,
    ) -> Result<Vec<(i64, Occurrence)>, Error> {
        let rows = sqlx::query(owner_occurrences!(
            // COALESCE keeps the planner from the owner index: the range of sequence numbers is
            // smaller.
            "WHERE COALESCE(o.owner, '') = $1 AND $1 <> '' AND o.sequence > $2 AND o.sequence <= $3
               AND ($4 = '' OR p.error_code = $4)
             ORDER BY o.sequence LIMIT $5"
        ));
        let rows = rows.bind(owner).bind(after).bind(end).bind(error_code).bind(limit);
        rows.fetch_all(&self.db.reader).await?.iter().map(read_occurrence).collect()
    }

    /// The number of the owner's occurrences with sequence numbers in (`after`, `end`].
    pub(crate) async fn owner_count_between(
        &self,
        owner: &str,
        (after, end): (i64, i64),
        error_code: &str,
    ) -> Result<u32, Error> {
        let row = sqlx::query(
            "SELECT COUNT(*) FROM error_occurrences o
             JOIN error_patterns p ON p.fingerprint = o.fingerprint
             WHERE COALESCE(o.owner, '') = $1 AND $1 <> '' AND o.sequence > $2 AND o.sequence <= $3
               AND ($4 = '' OR p.error_code = $4)",
        );
        let row = row.bind(owner).bind(after).bind(end).bind(error_code);
        let row = row.fetch_one(&self.db.reader).await?;
        Ok(u32::try_from(row.try_get::<i64, _>(0)?).unwrap_or(u32::MAX))
    }
}

/// Puts the occurrence with the requested id first, without repeating it.
fn merge_shown_and_newest(
    shown: Option<&AnyRow>,
    newest: &[AnyRow],
    limit: usize,
) -> Result<Vec<Occurrence>, Error> {
    let mut merged: Vec<_> = shown.map(read_occurrence).transpose()?.into_iter().collect();
    for row in newest {
        let (sequence, occurrence) = read_occurrence(row)?;
        if merged.first().is_none_or(|(shown, _)| *shown != sequence) {
            merged.push((sequence, occurrence));
        }
    }
    merged.truncate(limit);
    Ok(merged.into_iter().map(|(_, occurrence)| occurrence).collect())
}

fn read_occurrence(row: &AnyRow) -> Result<(i64, Occurrence), Error> {
    let causes: String = row.try_get("causes")?;
    let micros: i64 = row.try_get("duration")?;
    let occurrence = Occurrence {
        event_id: row.try_get("event_id")?,
        incident_id: row.try_get("incident_id")?,
        time: Some(timestamp(row.try_get("time")?)),
        error_code: row.try_get("error_code")?,
        method: row.try_get("method")?,
        message: row.try_get("message")?,
        causes: serde_json::from_str(&causes).map_err(anyhow::Error::from)?,
        service: row.try_get("service")?,
        version: row.try_get("version")?,
        request_id: row.try_get("request_id")?,
        trace_id: row.try_get("trace_id")?,
        actor: row.try_get("actor")?,
        owner: row.try_get("owner")?,
        duration: Some(micros).filter(|micros| *micros >= 0).map(duration),
        recovered: row.try_get::<i64, _>("recovered")? != 0,
    };
    Ok((row.try_get("sequence")?, occurrence))
}

//! The audit log: append-only, each entry's hash over the entry and the hash before it.

use hapa_core::timestamps::timestamp;
use hapa_proto::auth::v1::{AuditEntry, Revocation};
use hapa_store::change_feed::ChangeSource;
use sha2::{Digest as _, Sha256};
use sqlx::any::AnyRow;
use sqlx::{AnyConnection, Row as _};

use crate::error::Error;
use crate::store::{AuditContext, AuditEvent, Store};

/// Entries that one query reads while the log is verified.
const VERIFY_BATCH_SIZE: i64 = 1_000;

/// Sequence number and hash of the last entry.
pub(super) struct LogHead {
    sequence: i64,
    hash: String,
}

/// Selects the entries of one page. Empty strings match every value; times are epoch microseconds.
pub(crate) struct AuditFilter {
    /// Only entries with a lower sequence number.
    pub(crate) before: i64,
    pub(crate) actor: String,
    pub(crate) subject: String,
    pub(crate) action: String,
    pub(crate) start: i64,
    pub(crate) end: i64,
}

/// Result of the verification of the whole log.
#[derive(Debug, Default)]
pub(crate) struct AuditVerification {
    pub(crate) entry_count: i64,
    pub(crate) head_hash: String,
    /// Sequence number of the first invalid entry, and what is wrong with it.
    pub(crate) first_broken: Option<(i64, String)>,
}

/// Locks the head of the log: every other audited transaction waits until this one ends.
pub(super) async fn lock_head(connection: &mut AnyConnection) -> Result<LogHead, Error> {
    let row = sqlx::query(
        "UPDATE audit_head SET sequence = sequence WHERE id = 1 RETURNING sequence, hash",
    );
    let row = row.fetch_one(connection).await?;
    Ok(LogHead { sequence: row.try_get("sequence")?, hash: row.try_get("hash")? })
}

pub(super) async fn append_events(
    connection: &mut AnyConnection,
    mut head: LogHead,
    context: &AuditContext,
    events: &[AuditEvent],
) -> Result<(), Error> {
    for event in events {
        let detail = event.detail.to_string();
        let entry = HashedEntry {
            sequence: head.sequence + 1,
            time: context.time,
            text_columns: [
                &context.actor,
                &context.owner,
                &context.address,
                event.action,
                &event.subject,
                &context.request_id,
                &detail,
            ],
            effect: event.effect as i64,
        };
        head = LogHead { sequence: entry.sequence, hash: entry.hash(&head.hash)? };
        let mut insert = sqlx::query(
            "INSERT INTO audit (sequence, time, effect, hash, actor, owner, address, action, subject,
                                request_id, detail)
             VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11)",
        )
        .bind(entry.sequence)
        .bind(entry.time)
        .bind(entry.effect)
        .bind(head.hash.clone());
        for text in entry.text_columns {
            insert = insert.bind(text.to_owned());
        }
        insert.execute(&mut *connection).await?;
    }
    if !events.is_empty() {
        let update = sqlx::query("UPDATE audit_head SET sequence = $1, hash = $2 WHERE id = 1");
        update.bind(head.sequence).bind(head.hash).execute(connection).await?;
    }
    Ok(())
}

/// The fields that the hash of an entry covers.
struct HashedEntry<'a> {
    sequence: i64,
    time: i64,
    text_columns: [&'a str; 7],
    effect: i64,
}

impl HashedEntry<'_> {
    /// Hashes the fields as a JSON array, so that text cannot move from one field to the next.
    fn hash(&self, previous_hash: &str) -> Result<String, Error> {
        let fields = (previous_hash, self.sequence, self.time, self.text_columns, self.effect);
        let json = serde_json::to_vec(&fields).map_err(anyhow::Error::from)?;
        Ok(hex::encode(Sha256::digest(json)))
    }
}

/// The audit log is the change feed that credential caches follow.
impl ChangeSource for Store {
    type Error = Error;

    async fn last(&self) -> Result<i64, Error> {
        self.generation().await
    }

    async fn added(&self) {
        self.change_notify.notified().await;
    }
}

impl Store {
    /// Sequence number of the last entry.
    pub(crate) async fn generation(&self) -> Result<i64, Error> {
        let row = sqlx::query("SELECT sequence FROM audit_head WHERE id = 1");
        Ok(row.fetch_one(&self.db.reader).await?.try_get("sequence")?)
    }

    /// Up to `limit` revocations after `generation`, oldest first, and the generation up to which
    /// they are complete.
    pub(crate) async fn revocations_after(
        &self,
        generation: i64,
        limit: i64,
    ) -> Result<(i64, Vec<Revocation>), Error> {
        let head = self.generation().await?;
        let rows = sqlx::query(
            "SELECT sequence, subject, effect FROM audit
             WHERE sequence > $1 AND sequence <= $2 AND effect > 0 ORDER BY sequence LIMIT $3",
        );
        let rows = rows.bind(generation).bind(head).bind(limit).fetch_all(&self.db.reader).await?;
        let changes: Vec<_> = rows.iter().map(revocation_from_row).collect::<Result<_, _>>()?;
        let is_full = i64::try_from(changes.len()).is_ok_and(|found| found == limit);
        let last = changes.last().map(|change| change.generation).filter(|_| is_full);
        Ok((last.unwrap_or(head), changes))
    }

    /// One page of entries, newest first.
    pub(crate) async fn audit_page(
        &self,
        filter: &AuditFilter,
        size: i64,
    ) -> Result<Vec<AuditEntry>, Error> {
        let rows = sqlx::query(
            "SELECT * FROM audit
             WHERE sequence < $1
               AND ($2 = '' OR actor = $2)
               AND ($3 = '' OR subject = $3)
               AND ($4 = '' OR action = $4 OR action LIKE $5)
               AND time >= $6 AND time < $7
             ORDER BY sequence DESC
             LIMIT $8",
        )
        .bind(filter.before)
        .bind(filter.actor.clone())
        .bind(filter.subject.clone())
        .bind(filter.action.clone())
        .bind(format!("{}.%", filter.action))
        .bind(filter.start)
        .bind(filter.end)
        .bind(size);
        rows.fetch_all(&self.db.reader).await?.iter().map(entry_from_row).collect()
    }

    /// Reads the whole log and checks each entry against the one before, and the last entry against
    /// the head, so that changed and missing entries are found.
    pub(crate) async fn verify_audit(&self) -> Result<AuditVerification, Error> {
        let head = sqlx::query("SELECT sequence, hash FROM audit_head WHERE id = 1");
        let head = head.fetch_one(&self.db.reader).await?;
        let head = LogHead { sequence: head.try_get("sequence")?, hash: head.try_get("hash")? };
        let mut verification = AuditVerification::default();
        while verification.entry_count < head.sequence {
            let rows = sqlx::query(
                "SELECT * FROM audit WHERE sequence > $1 AND sequence <= $2 ORDER BY sequence LIMIT $3",
            );
            let rows =
                rows.bind(verification.entry_count).bind(head.sequence).bind(VERIFY_BATCH_SIZE);
            let rows = rows.fetch_all(&self.db.reader).await?;
            for row in &rows {
                if let Some(problem) = verify_entry(row, &mut verification)? {
                    verification.first_broken = Some((verification.entry_count + 1, problem));
                    return Ok(verification);
                }
            }
            if rows.is_empty() {
                let problem = "it is missing, and so are all later entries".to_owned();
                verification.first_broken = Some((verification.entry_count + 1, problem));
                return Ok(verification);
            }
        }
        if verification.head_hash != head.hash {
            let problem = "the hash of the log's head does not match the last entry".to_owned();
            verification.first_broken = Some((verification.entry_count, problem));
        }
        Ok(verification)
    }
}

/// Checks one more entry. Returns what is wrong with it, or adds it to `verification`.
fn verify_entry(
    row: &AnyRow,
    verification: &mut AuditVerification,
) -> Result<Option<String>, Error> {
    let (entry, effect) = (entry_from_row(row)?, row.try_get("effect")?);
    if entry.sequence != verification.entry_count + 1 {
        return Ok(Some("it is missing".to_owned()));
    }
    let hashed = HashedEntry {
        sequence: entry.sequence,
        time: row.try_get("time")?,
        text_columns: [
            &entry.actor,
            &entry.owner,
            &entry.address,
            &entry.action,
            &entry.subject,
            &entry.request_id,
            &entry.detail,
        ],
        effect,
    };
    if hashed.hash(&verification.head_hash)? != entry.hash {
        return Ok(Some("its hash does not match its content or the entry before it".to_owned()));
    }
    verification.entry_count = entry.sequence;
    verification.head_hash = entry.hash;
    Ok(None)
}

fn entry_from_row(row: &AnyRow) -> Result<AuditEntry, Error> {
    Ok(AuditEntry {
        sequence: row.try_get("sequence")?,
        time: Some(timestamp(row.try_get("time")?)),
        actor: row.try_get("actor")?,
        owner: row.try_get("owner")?,
        address: row.try_get("address")?,
        action: row.try_get("action")?,
        subject: row.try_get("subject")?,
        request_id: row.try_get("request_id")?,
        detail: row.try_get("detail")?,
        hash: row.try_get("hash")?,
    })
}

fn revocation_from_row(row: &AnyRow) -> Result<Revocation, Error> {
    let subject: &str = row.try_get("subject")?;
    let (kind, id) = subject.split_once(':').unwrap_or((subject, ""));
    let mut change = Revocation {
        generation: row.try_get("sequence")?,
        ends_calls: row.try_get::<i64, _>("effect")? == 2,
        ..Revocation::default()
    };
    match kind {
        "key" => id.clone_into(&mut change.key_id),
        "session" => id.clone_into(&mut change.session_id),
        _ => id.clone_into(&mut change.owner),
    }
    Ok(change)
}

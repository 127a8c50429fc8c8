//! The audit log: append-only, each entry's hash over the entry and the hash before it.

use hapa_core::timestamps::timestamp;
use hapa_proto::auth::v1::{AuditEntry, Revocation};
use hapa_store::change_feed::Log;
use sha2::{Digest as _, Sha256};
use sqlx::any::AnyRow;
use sqlx::{AnyConnection, Row as _};

use crate::error::Error;
use crate::store::{By, Note, Store};

/// Entries read at once while the log is checked.
const CHUNK: i64 = 1_000;

/// The end of the log.
pub(super) struct Head {
    sequence: i64,
    hash: String,
}

/// Which entries to list.
pub(crate) struct Entries {
    pub(crate) before: i64,
    pub(crate) actor: String,
    pub(crate) subject: String,
    pub(crate) action: String,
    pub(crate) start: i64,
    pub(crate) end: i64,
}

/// What a check of the whole log found.
#[derive(Debug, Default)]
pub(crate) struct Verdict {
    pub(crate) entries: i64,
    pub(crate) head_hash: String,
    /// The first entry that is wrong, and what is wrong with it.
    pub(crate) broken: Option<(i64, String)>,
}

/// From here on nobody else changes anything until this transaction ends.
pub(super) async fn lock_head(connection: &mut AnyConnection) -> Result<Head, Error> {
    let row = sqlx::query(
        "UPDATE audit_head SET sequence = sequence WHERE id = 1 RETURNING sequence, hash",
    );
    let row = row.fetch_one(connection).await?;
    Ok(Head { sequence: row.try_get("sequence")?, hash: row.try_get("hash")? })
}

pub(super) async fn append(
    connection: &mut AnyConnection,
    mut head: Head,
    by: &By,
    notes: &[Note],
) -> Result<(), Error> {
    for note in notes {
        let detail = note.detail.to_string();
        let entry = Line {
            sequence: head.sequence + 1,
            time: by.time,
            texts: [
                &by.actor,
                &by.owner,
                &by.address,
                note.action,
                &note.subject,
                &by.request_id,
                &detail,
            ],
            effect: note.effect as i64,
        };
        head = Head { sequence: entry.sequence, hash: entry.hash(&head.hash)? };
        let mut insert = sqlx::query(
            "INSERT INTO audit (sequence, time, effect, hash, actor, owner, address, action, subject, request_id, detail)
             VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11)",
        )
        .bind(entry.sequence)
        .bind(entry.time)
        .bind(entry.effect)
        .bind(head.hash.clone());
        for text in entry.texts {
            insert = insert.bind(text.to_owned());
        }
        insert.execute(&mut *connection).await?;
    }
    if !notes.is_empty() {
        let update = sqlx::query("UPDATE audit_head SET sequence = $1, hash = $2 WHERE id = 1");
        update.bind(head.sequence).bind(head.hash).execute(connection).await?;
    }
    Ok(())
}

/// What an entry's hash covers.
struct Line<'a> {
    sequence: i64,
    time: i64,
    texts: [&'a str; 7],
    effect: i64,
}

impl Line<'_> {
    /// Over a JSON array, in which no text can pass for another.
    fn hash(&self, before: &str) -> Result<String, Error> {
        let line = (before, self.sequence, self.time, self.texts, self.effect);
        let line = serde_json::to_vec(&line).map_err(anyhow::Error::from)?;
        Ok(hex::encode(Sha256::digest(line)))
    }
}

/// What has changed, for caches.
impl Log for Store {
    type Error = Error;

    async fn last(&self) -> Result<i64, Error> {
        self.generation().await
    }

    async fn added(&self) {
        self.changed.notified().await;
    }
}

impl Store {
    /// The number of the last entry.
    pub(crate) async fn generation(&self) -> Result<i64, Error> {
        let row = sqlx::query("SELECT sequence FROM audit_head WHERE id = 1");
        Ok(row.fetch_one(&self.db.reader).await?.try_get("sequence")?)
    }

    /// What caches must know, oldest first, and up to which entry that is all.
    pub(crate) async fn changes_after(
        &self,
        generation: i64,
        most: i64,
    ) -> Result<(i64, Vec<Revocation>), Error> {
        let head = self.generation().await?;
        let rows = sqlx::query(
            "SELECT sequence, subject, effect FROM audit
             WHERE sequence > $1 AND sequence <= $2 AND effect > 0 ORDER BY sequence LIMIT $3",
        );
        let rows = rows.bind(generation).bind(head).bind(most).fetch_all(&self.db.reader).await?;
        let changes: Vec<_> = rows.iter().map(revocation).collect::<Result<_, _>>()?;
        let full = i64::try_from(changes.len()).is_ok_and(|found| found == most);
        let last = changes.last().map(|change| change.generation).filter(|_| full);
        Ok((last.unwrap_or(head), changes))
    }

    /// Newest first.
    pub(crate) async fn audit_page(
        &self,
        entries: &Entries,
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
        .bind(entries.before)
        .bind(entries.actor.clone())
        .bind(entries.subject.clone())
        .bind(entries.action.clone())
        .bind(format!("{}.%", entries.action))
        .bind(entries.start)
        .bind(entries.end)
        .bind(size);
        rows.fetch_all(&self.db.reader).await?.iter().map(entry).collect()
    }

    /// Reads all of the log and checks each entry against the one before and the last against the
    /// head, so that neither a changed nor a missing line goes unseen.
    pub(crate) async fn verify_audit(&self) -> Result<Verdict, Error> {
        let head = sqlx::query("SELECT sequence, hash FROM audit_head WHERE id = 1");
        let head = head.fetch_one(&self.db.reader).await?;
        let head = Head { sequence: head.try_get("sequence")?, hash: head.try_get("hash")? };
        let mut verdict = Verdict::default();
        while verdict.entries < head.sequence {
            let rows = sqlx::query(
                "SELECT * FROM audit WHERE sequence > $1 AND sequence <= $2 ORDER BY sequence LIMIT $3",
            );
            let rows = rows.bind(verdict.entries).bind(head.sequence).bind(CHUNK);
            let rows = rows.fetch_all(&self.db.reader).await?;
            for row in &rows {
                if let Some(problem) = check(row, &mut verdict)? {
                    verdict.broken = Some((verdict.entries + 1, problem));
                    return Ok(verdict);
                }
            }
            if rows.is_empty() {
                let problem = "it is missing, with all that follow".to_owned();
                verdict.broken = Some((verdict.entries + 1, problem));
                return Ok(verdict);
            }
        }
        if verdict.head_hash != head.hash {
            let problem = "the log's head has another hash".to_owned();
            verdict.broken = Some((verdict.entries, problem));
        }
        Ok(verdict)
    }
}

/// Takes one more entry in, or says what is wrong with it.
fn check(row: &AnyRow, verdict: &mut Verdict) -> Result<Option<String>, Error> {
    let (entry, effect) = (entry(row)?, row.try_get("effect")?);
    if entry.sequence != verdict.entries + 1 {
        return Ok(Some("it is missing".to_owned()));
    }
    let line = Line {
        sequence: entry.sequence,
        time: row.try_get("time")?,
        texts: [
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
    if line.hash(&verdict.head_hash)? != entry.hash {
        return Ok(Some("its hash does not fit what it says, or the entry before it".to_owned()));
    }
    verdict.entries = entry.sequence;
    verdict.head_hash = entry.hash;
    Ok(None)
}

fn entry(row: &AnyRow) -> Result<AuditEntry, Error> {
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

fn revocation(row: &AnyRow) -> Result<Revocation, Error> {
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

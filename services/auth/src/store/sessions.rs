//! Sessions and their refresh tokens. A refresh token works once; a second use revokes its session.

use hapa_core::timestamps::timestamp;
use hapa_proto::auth::v1::Session;
use serde_json::json;
use sqlx::any::AnyRow;
use sqlx::{AnyConnection, Row as _};

use crate::error::Error;
use crate::pepper::CredentialHashes;
use crate::store::users::{self, UserRef};
use crate::store::{AuditContext, AuditEvent, CacheEffect, Store};

/// Maximum number of sessions that a list holds.
const MAX_LISTED_SESSIONS: i64 = 1_000;

/// A session to insert.
pub(crate) struct NewSession {
    pub(crate) session_id: String,
    pub(crate) user_id: String,
    pub(crate) method: &'static str,
    pub(crate) expire_time: i64,
    pub(crate) refresh_hash: String,
}

/// When a refreshed session expires: at the earlier of the two times.
#[derive(Clone, Copy)]
pub(crate) struct RefreshExpiry {
    /// Expiry without another refresh, in epoch microseconds.
    pub(crate) idle_expire_time: i64,
    /// Maximum time since the session was created, in microseconds.
    pub(crate) max_age_micros: i64,
}

/// A session found by the id in an access token, with its user. It may have expired.
pub(crate) struct ActiveSession {
    pub(crate) user: UserRef,
    pub(crate) create_time: i64,
    pub(crate) expire_time: i64,
    pub(crate) is_revoked: bool,
    pub(crate) generation: i64,
}

/// Outcome of a refresh.
pub(crate) enum RefreshOutcome {
    Session(Session),
    UnknownToken,
    /// The token was used before, or the session has expired or was revoked.
    SessionEnded,
}

impl Store {
    pub(crate) async fn insert_session(
        &self,
        context: AuditContext,
        new: NewSession,
    ) -> Result<Session, Error> {
        let session = Session {
            session_id: new.session_id.clone(),
            user_id: new.user_id.clone(),
            create_time: Some(timestamp(context.time)),
            expire_time: Some(timestamp(new.expire_time)),
            refresh_time: Some(timestamp(context.time)),
            address: context.address().to_owned(),
            method: new.method.to_owned(),
        };
        let (now, address) = (context.time, context.address().to_owned());
        self.audited_transaction(context, move |connection| {
            Box::pin(async move {
                if !users::user_exists(connection, &new.user_id).await? {
                    return Err(Error::InvalidLogin);
                }
                let insert = sqlx::query(
                    "INSERT INTO sessions
                       (session_id, user_id, method, address, create_time, refresh_time,
                        expire_time)
                     VALUES ($1, $2, $3, $4, $5, $5, $6)",
                )
                .bind(new.session_id.clone())
                .bind(new.user_id.clone())
                .bind(new.method)
                .bind(address)
                .bind(now)
                .bind(new.expire_time);
                insert.execute(&mut *connection).await?;
                insert_refresh_token(connection, &new.session_id, new.refresh_hash, now).await?;
                let subject = format!("session:{}", new.session_id);
                let detail = json!({ "user": new.user_id, "method": new.method });
                Ok((
                    (),
                    vec![AuditEvent::new("session.create", subject, detail, CacheEffect::None)],
                ))
            })
        })
        .await?;
        Ok(session)
    }

    /// The session of an access token, with its user and the generation at which they were read.
    pub(crate) async fn active_session(
        &self,
        session_id: &str,
    ) -> Result<Option<ActiveSession>, Error> {
        let row = sqlx::query(
            "SELECT sessions.create_time, sessions.expire_time, sessions.revoke_time,
                    users.user_id, users.scopes AS user_scopes, users.profile,
                    users.day_budget AS user_day_budget, users.month_budget AS user_month_budget,
                    (SELECT sequence FROM audit_head WHERE id = 1) AS generation
             FROM sessions JOIN users ON users.user_id = sessions.user_id
             WHERE sessions.session_id = $1",
        );
        let row = row.bind(session_id.to_owned()).fetch_optional(&self.db.reader).await?;
        let Some(row) = row else { return Ok(None) };
        let Some(user) = users::user_ref_from_row(&row)? else { return Ok(None) };
        Ok(Some(ActiveSession {
            user,
            create_time: row.try_get("create_time")?,
            expire_time: row.try_get("expire_time")?,
            is_revoked: row.try_get::<Option<i64>, _>("revoke_time")?.is_some(),
            generation: row.try_get("generation")?,
        }))
    }

    /// Exchanges a refresh token for the next one. A token that was used before revokes its session.
    pub(crate) async fn refresh_session(
        &self,
        context: AuditContext,
        hashes: CredentialHashes,
        next_hash: String,
        expiry: RefreshExpiry,
    ) -> Result<RefreshOutcome, Error> {
        let now = context.time;
        self.audited_transaction(context, move |connection| {
            Box::pin(async move {
                let row = sqlx::query(
                    "SELECT sessions.*, refresh_tokens.use_time
                     FROM refresh_tokens
                     JOIN sessions ON sessions.session_id = refresh_tokens.session_id
                     WHERE refresh_tokens.hash IN ($1, $2)",
                );
                let row = row.bind(hashes.current.clone()).bind(hashes.previous.clone());
                let row = row.fetch_optional(&mut *connection).await?;
                let Some(row) = row else { return Ok((RefreshOutcome::UnknownToken, Vec::new())) };
                let mut session = session_from_row(&row)?;
                let subject = format!("session:{}", session.session_id);
                let is_revoked = row.try_get::<Option<i64>, _>("revoke_time")?.is_some();
                let (created, expires): (i64, i64) =
                    (row.try_get("create_time")?, row.try_get("expire_time")?);
                let last_expire_time = created.saturating_add(expiry.max_age_micros);
                if is_revoked || expires.min(last_expire_time) <= now {
                    return Ok((RefreshOutcome::SessionEnded, Vec::new()));
                }
                let expire_time = expiry.idle_expire_time.min(last_expire_time);
                if row.try_get::<Option<i64>, _>("use_time")?.is_some() {
                    revoke_one(connection, &session.session_id, now).await?;
                    let effect = CacheEffect::EndCalls;
                    let event = AuditEvent::new("session.reuse", subject, json!({}), effect);
                    return Ok((RefreshOutcome::SessionEnded, vec![event]));
                }
                // Stored under the current pepper, so that a second use is recognised after the
                // previous pepper is removed.
                let mark_used = sqlx::query(
                    "UPDATE refresh_tokens SET hash = $1, use_time = $3 WHERE hash IN ($1, $2)",
                );
                let mark_used = mark_used.bind(hashes.current).bind(hashes.previous).bind(now);
                mark_used.execute(&mut *connection).await?;
                insert_refresh_token(connection, &session.session_id, next_hash, now).await?;
                let update = sqlx::query(
                    "UPDATE sessions SET refresh_time = $2, expire_time = $3 WHERE session_id = $1",
                );
                let update = update.bind(session.session_id.clone()).bind(now).bind(expire_time);
                update.execute(connection).await?;
                session.refresh_time = Some(timestamp(now));
                session.expire_time = Some(timestamp(expire_time));
                let event =
                    AuditEvent::new("session.refresh", subject, json!({}), CacheEffect::None);
                Ok((RefreshOutcome::Session(session), vec![event]))
            })
        })
        .await
    }

    pub(crate) async fn session_by_id(&self, session_id: &str) -> Result<Option<Session>, Error> {
        let row = sqlx::query("SELECT * FROM sessions WHERE session_id = $1");
        let row = row.bind(session_id.to_owned()).fetch_optional(&self.db.reader).await?;
        row.map(|row| session_from_row(&row)).transpose()
    }

    /// The active sessions of a user, newest first.
    pub(crate) async fn sessions_of(&self, user_id: &str, now: i64) -> Result<Vec<Session>, Error> {
        let rows = sqlx::query(
            "SELECT * FROM sessions
             WHERE user_id = $1 AND revoke_time IS NULL AND expire_time > $2
             ORDER BY create_time DESC, session_id DESC LIMIT $3",
        );
        let rows = rows.bind(user_id.to_owned()).bind(now).bind(MAX_LISTED_SESSIONS);
        rows.fetch_all(&self.db.reader).await?.iter().map(session_from_row).collect()
    }

    /// Revokes one session. Returns the number of sessions that were active: 0 or 1.
    pub(crate) async fn revoke_session(
        &self,
        context: AuditContext,
        session_id: String,
    ) -> Result<u64, Error> {
        let now = context.time;
        self.audited_transaction(context, move |connection| {
            Box::pin(async move {
                if !revoke_one(connection, &session_id, now).await? {
                    return Ok((0, Vec::new()));
                }
                let subject = format!("session:{session_id}");
                Ok((
                    1,
                    vec![AuditEvent::new(
                        "session.revoke",
                        subject,
                        json!({}),
                        CacheEffect::EndCalls,
                    )],
                ))
            })
        })
        .await
    }

    /// Revokes all sessions of a user. Returns how many were active.
    pub(crate) async fn revoke_sessions(
        &self,
        context: AuditContext,
        user_id: String,
    ) -> Result<u64, Error> {
        let now = context.time;
        self.audited_transaction(context, move |connection| {
            Box::pin(async move {
                let events = revoke_all_of_user(connection, &user_id, now).await?;
                Ok((events.len() as u64, events))
            })
        })
        .await
    }

    /// Shortens sessions that would expire more than `max_age_micros` after their creation.
    pub(crate) async fn cap_session_age(&self, max_age_micros: i64) -> Result<(), Error> {
        let update = sqlx::query(
            "UPDATE sessions SET expire_time = create_time + $1
             WHERE revoke_time IS NULL AND expire_time > create_time + $1",
        );
        update.bind(max_age_micros).execute(&self.db.writer).await?;
        Ok(())
    }

    /// Deletes sessions that expired before a time, with their refresh tokens.
    pub(crate) async fn delete_sessions_ended_before(&self, before: i64) -> Result<(), Error> {
        self.db
            .transaction(move |connection| {
                Box::pin(async move {
                    for delete in [
                        "DELETE FROM refresh_tokens WHERE session_id IN
                           (SELECT session_id FROM sessions WHERE expire_time < $1)",
                        "DELETE FROM sessions WHERE expire_time < $1",
                    ] {
                        sqlx::query(delete).bind(before).execute(&mut *connection).await?;
                    }
                    Ok(())
                })
            })
            .await
    }
}

/// Revokes the active sessions of a user, with one audit event each.
pub(super) async fn revoke_all_of_user(
    connection: &mut AnyConnection,
    user_id: &str,
    now: i64,
) -> Result<Vec<AuditEvent>, Error> {
    let rows = sqlx::query(
        "UPDATE sessions SET revoke_time = $2
         WHERE user_id = $1 AND revoke_time IS NULL AND expire_time > $2 RETURNING session_id",
    );
    let rows = rows.bind(user_id.to_owned()).bind(now).fetch_all(connection).await?;
    let event = |row: &AnyRow| {
        let subject = format!("session:{}", row.try_get::<String, _>("session_id")?);
        Ok(AuditEvent::new(
            "session.revoke",
            subject,
            json!({ "user": user_id }),
            CacheEffect::EndCalls,
        ))
    };
    rows.iter().map(event).collect()
}

async fn revoke_one(
    connection: &mut AnyConnection,
    session_id: &str,
    now: i64,
) -> Result<bool, Error> {
    let update = sqlx::query(
        "UPDATE sessions SET revoke_time = $2
         WHERE session_id = $1 AND revoke_time IS NULL AND expire_time > $2",
    );
    let update = update.bind(session_id.to_owned()).bind(now).execute(connection).await?;
    Ok(update.rows_affected() > 0)
}

async fn insert_refresh_token(
    connection: &mut AnyConnection,
    session_id: &str,
    hash: String,
    now: i64,
) -> Result<(), Error> {
    let insert = sqlx::query(
        "INSERT INTO refresh_tokens (hash, session_id, create_time) VALUES ($1, $2, $3)",
    );
    insert.bind(hash).bind(session_id.to_owned()).bind(now).execute(connection).await?;
    Ok(())
}

fn session_from_row(row: &AnyRow) -> Result<Session, Error> {
    let time = |column| Ok::<_, sqlx::Error>(Some(timestamp(row.try_get(column)?)));
    Ok(Session {
        session_id: row.try_get("session_id")?,
        user_id: row.try_get("user_id")?,
        create_time: time("create_time")?,
        expire_time: time("expire_time")?,
        refresh_time: time("refresh_time")?,
        address: row.try_get("address")?,
        method: row.try_get("method")?,
    })
}

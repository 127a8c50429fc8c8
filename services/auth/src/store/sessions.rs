//! Sessions and their refresh tokens: each works once, and a second use ends its session.

use hapa_core::timestamps::timestamp;
use hapa_proto::auth::v1::Session;
use serde_json::json;
use sqlx::any::AnyRow;
use sqlx::{AnyConnection, Row as _};

use crate::error::Error;
use crate::pepper::Hashes;
use crate::store::users::{self, Who};
use crate::store::{By, Effect, Note, Store};

/// Most sessions that are listed or ended at once.
const MOST: i64 = 1_000;

/// A session to be.
pub(crate) struct NewSession {
    pub(crate) session_id: String,
    pub(crate) user_id: String,
    pub(crate) method: &'static str,
    pub(crate) expire_time: i64,
    pub(crate) refresh_hash: String,
}

/// When a session that is refreshed ends, in microseconds: at the earlier of the two.
#[derive(Clone, Copy)]
pub(crate) struct Ends {
    /// Unless it is refreshed again.
    pub(crate) idle: i64,
    /// So long after it was made, in any case.
    pub(crate) max_life: i64,
}

/// A session as an access token finds it.
pub(crate) struct Live {
    pub(crate) who: Who,
    pub(crate) create_time: i64,
    pub(crate) expire_time: i64,
    pub(crate) revoked: bool,
    pub(crate) generation: i64,
}

/// What became of a refresh token.
pub(crate) enum Refreshed {
    Session(Session),
    Unknown,
    /// Used before, expired or revoked: the session is over.
    Ended,
}

impl Store {
    pub(crate) async fn insert_session(&self, by: By, new: NewSession) -> Result<Session, Error> {
        let session = Session {
            session_id: new.session_id.clone(),
            user_id: new.user_id.clone(),
            create_time: Some(timestamp(by.time)),
            expire_time: Some(timestamp(new.expire_time)),
            refresh_time: Some(timestamp(by.time)),
            address: by.address().to_owned(),
            method: new.method.to_owned(),
        };
        let (now, address) = (by.time, by.address().to_owned());
        self.change(by, move |connection| {
            Box::pin(async move {
                if !users::exists(connection, &new.user_id).await? {
                    return Err(Error::BadProof);
                }
                let insert = sqlx::query(
                    "INSERT INTO sessions (session_id, user_id, method, address, create_time, refresh_time, expire_time)
                     VALUES ($1, $2, $3, $4, $5, $5, $6)",
                )
                .bind(new.session_id.clone())
                .bind(new.user_id.clone())
                .bind(new.method)
                .bind(address)
                .bind(now)
                .bind(new.expire_time);
                insert.execute(&mut *connection).await?;
                insert_token(connection, &new.session_id, new.refresh_hash, now).await?;
                let subject = format!("session:{}", new.session_id);
                let detail = json!({ "user": new.user_id, "method": new.method });
                Ok(((), vec![Note::new("session.create", subject, detail, Effect::None)]))
            })
        })
        .await?;
        Ok(session)
    }

    /// The session behind an access token, with the generation at which it was like that.
    pub(crate) async fn live_session(&self, session_id: &str) -> Result<Option<Live>, Error> {
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
        let Some(who) = users::joined(&row)? else { return Ok(None) };
        Ok(Some(Live {
            who,
            create_time: row.try_get("create_time")?,
            expire_time: row.try_get("expire_time")?,
            revoked: row.try_get::<Option<i64>, _>("revoke_time")?.is_some(),
            generation: row.try_get("generation")?,
        }))
    }

    /// Trades a refresh token for the next; one that was used before ends its session.
    pub(crate) async fn refresh_session(
        &self,
        by: By,
        hashes: Hashes,
        next_hash: String,
        ends: Ends,
    ) -> Result<Refreshed, Error> {
        let now = by.time;
        self.change(by, move |connection| {
            Box::pin(async move {
                let row = sqlx::query(
                    "SELECT sessions.*, refresh_tokens.use_time
                     FROM refresh_tokens JOIN sessions ON sessions.session_id = refresh_tokens.session_id
                     WHERE refresh_tokens.hash IN ($1, $2)",
                );
                let row = row.bind(hashes.own.clone()).bind(hashes.also.clone());
                let row = row.fetch_optional(&mut *connection).await?;
                let Some(row) = row else { return Ok((Refreshed::Unknown, Vec::new())) };
                let mut session = session(&row)?;
                let subject = format!("session:{}", session.session_id);
                let revoked = row.try_get::<Option<i64>, _>("revoke_time")?.is_some();
                let last = row.try_get::<i64, _>("create_time")?.saturating_add(ends.max_life);
                if revoked || row.try_get::<i64, _>("expire_time")?.min(last) <= now {
                    return Ok((Refreshed::Ended, Vec::new()));
                }
                let expire_time = ends.idle.min(last);
                if row.try_get::<Option<i64>, _>("use_time")?.is_some() {
                    revoke(connection, &session.session_id, now).await?;
                    let note = Note::new("session.reuse", subject, json!({}), Effect::Ended);
                    return Ok((Refreshed::Ended, vec![note]));
                }
                // Kept under the own pepper, so that a second use is still known when the other is gone.
                let used = "UPDATE refresh_tokens SET hash = $1, use_time = $3 WHERE hash IN ($1, $2)";
                let used = sqlx::query(used);
                let used = used.bind(hashes.own).bind(hashes.also).bind(now);
                used.execute(&mut *connection).await?;
                insert_token(connection, &session.session_id, next_hash, now).await?;
                let update = sqlx::query(
                    "UPDATE sessions SET refresh_time = $2, expire_time = $3 WHERE session_id = $1",
                );
                let update = update.bind(session.session_id.clone()).bind(now).bind(expire_time);
                update.execute(connection).await?;
                session.refresh_time = Some(timestamp(now));
                session.expire_time = Some(timestamp(expire_time));
                let note = Note::new("session.refresh", subject, json!({}), Effect::None);
                Ok((Refreshed::Session(session), vec![note]))
            })
        })
        .await
    }

    pub(crate) async fn session_by_id(&self, session_id: &str) -> Result<Option<Session>, Error> {
        let row = sqlx::query("SELECT * FROM sessions WHERE session_id = $1");
        let row = row.bind(session_id.to_owned()).fetch_optional(&self.db.reader).await?;
        row.map(|row| session(&row)).transpose()
    }

    /// Those that are alive, newest first.
    pub(crate) async fn sessions_of(&self, user_id: &str, now: i64) -> Result<Vec<Session>, Error> {
        let rows = sqlx::query(
            "SELECT * FROM sessions
             WHERE user_id = $1 AND revoke_time IS NULL AND expire_time > $2
             ORDER BY create_time DESC, session_id DESC LIMIT $3",
        );
        let rows = rows.bind(user_id.to_owned()).bind(now).bind(MOST);
        rows.fetch_all(&self.db.reader).await?.iter().map(session).collect()
    }

    /// Ends one session; whether it was alive.
    pub(crate) async fn revoke_session(&self, by: By, session_id: String) -> Result<u64, Error> {
        let now = by.time;
        self.change(by, move |connection| {
            Box::pin(async move {
                if !revoke(connection, &session_id, now).await? {
                    return Ok((0, Vec::new()));
                }
                let subject = format!("session:{session_id}");
                Ok((1, vec![Note::new("session.revoke", subject, json!({}), Effect::Ended)]))
            })
        })
        .await
    }

    /// Ends all sessions of a user; how many were alive.
    pub(crate) async fn revoke_sessions(&self, by: By, user_id: String) -> Result<u64, Error> {
        let now = by.time;
        self.change(by, move |connection| {
            Box::pin(async move {
                let notes = revoke_all(connection, &user_id, now).await?;
                Ok((notes.len() as u64, notes))
            })
        })
        .await
    }

    /// Gives no session more than so many microseconds of life.
    pub(crate) async fn end_sessions_after(&self, max_life: i64) -> Result<(), Error> {
        let update = sqlx::query(
            "UPDATE sessions SET expire_time = create_time + $1
             WHERE revoke_time IS NULL AND expire_time > create_time + $1",
        );
        update.bind(max_life).execute(&self.db.writer).await?;
        Ok(())
    }

    /// Forgets sessions that ended before a time, with their tokens.
    pub(crate) async fn forget_sessions(&self, before: i64) -> Result<(), Error> {
        self.db
            .transaction(move |connection| {
                Box::pin(async move {
                    for delete in [
                        "DELETE FROM refresh_tokens WHERE session_id IN (SELECT session_id FROM sessions WHERE expire_time < $1)",
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

/// Ends what is alive of a user.
pub(super) async fn revoke_all(
    connection: &mut AnyConnection,
    user_id: &str,
    now: i64,
) -> Result<Vec<Note>, Error> {
    let rows = sqlx::query(
        "UPDATE sessions SET revoke_time = $2
         WHERE user_id = $1 AND revoke_time IS NULL AND expire_time > $2 RETURNING session_id",
    );
    let rows = rows.bind(user_id.to_owned()).bind(now).fetch_all(connection).await?;
    let note = |row: &AnyRow| {
        let subject = format!("session:{}", row.try_get::<String, _>("session_id")?);
        Ok(Note::new("session.revoke", subject, json!({ "user": user_id }), Effect::Ended))
    };
    rows.iter().map(note).collect()
}

async fn revoke(connection: &mut AnyConnection, session_id: &str, now: i64) -> Result<bool, Error> {
    let update = sqlx::query(
        "UPDATE sessions SET revoke_time = $2
         WHERE session_id = $1 AND revoke_time IS NULL AND expire_time > $2",
    );
    let update = update.bind(session_id.to_owned()).bind(now).execute(connection).await?;
    Ok(update.rows_affected() > 0)
}

async fn insert_token(
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

fn session(row: &AnyRow) -> Result<Session, Error> {
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

//! The secrets of keys: the table `key_texts` holds one row for each.

use hapa_core::timestamps::{micros, timestamp};
use hapa_proto::auth::v1::{Key, KeyText};
use prost::Message;
use serde_json::json;
use sqlx::any::AnyRow;
use sqlx::{AnyConnection, Row as _};
use tonic::Response;

use crate::error::Error;
use crate::pepper::CredentialHashes;
use crate::store::keys::{lock_key, required_key};
use crate::store::{AuditEvent, CacheEffect, ChangeRequest, Store};

/// A secret that replaces the current secret of a key.
#[derive(Debug)]
pub(crate) struct NewSecret {
    pub(crate) key_id: String,
    pub(crate) hash: String,
    /// When the replaced secret expires, in epoch microseconds.
    pub(crate) old_expire_time: i64,
}

impl Store {
    /// Adds a secret. The current secret expires at `old_expire_time`, older secrets expire at once.
    pub(crate) async fn rotate_key<R: Message + Default + 'static>(
        &self,
        change: ChangeRequest,
        NewSecret { key_id, hash, old_expire_time }: NewSecret,
        reply: impl FnOnce(Key) -> R + Send + 'static,
    ) -> Result<Response<R>, Error> {
        let now = change.context.time;
        self.change_once(change, move |connection| {
            Box::pin(async move {
                let key = lock_key(connection, &key_id).await?;
                if key.revoke_time.is_some()
                    || key.expire_time.as_ref().is_some_and(|end| micros(end) <= now)
                {
                    return Err(Error::ExpiredOrRevoked);
                }
                // The newest secret stays valid until the overlap ends or it expires itself.
                let older_secrets = sqlx::query(
                    "UPDATE key_texts SET expire_time = $2
                     WHERE key_id = $1 AND (expire_time IS NULL OR expire_time > $2)
                       AND hash <> (SELECT hash FROM key_texts WHERE key_id = $1
                                    ORDER BY create_time DESC, hash LIMIT 1)",
                );
                older_secrets.bind(key_id.clone()).bind(now).execute(&mut *connection).await?;
                let old_secrets = sqlx::query(
                    "UPDATE key_texts SET expire_time = $2
                     WHERE key_id = $1 AND (expire_time IS NULL OR expire_time > $2)",
                );
                old_secrets
                    .bind(key_id.clone())
                    .bind(old_expire_time)
                    .execute(&mut *connection)
                    .await?;
                // The key keeps the latest use: apart from it, rows of expired secrets are not needed.
                let keep_last_use = sqlx::query(
                    "UPDATE keys SET last_use_time =
                         (SELECT MAX(last_use_time) FROM key_texts WHERE key_id = $1)
                     WHERE key_id = $1",
                );
                keep_last_use.bind(key_id.clone()).execute(&mut *connection).await?;
                insert_secret(connection, &key_id, hash, now).await?;
                let detail = json!({ "old_text_ends": timestamp(old_expire_time).to_string() });
                // Not `EndCalls`: calls made with a secret that is still valid must continue.
                let subject = format!("key:{key_id}");
                let event = AuditEvent::new("key.rotate", subject, detail, CacheEffect::Invalidate);
                Ok((reply(required_key(connection, &key_id, now).await?), vec![event]))
            })
        })
        .await
    }

    /// Records when secrets were last used; an earlier time changes nothing. A secret stored under
    /// the previous pepper is stored under the current one from then on.
    pub(crate) async fn record_last_used(
        &self,
        uses: Vec<(CredentialHashes, i64)>,
    ) -> Result<(), Error> {
        self.db
            .transaction(move |connection| {
                Box::pin(async move {
                    for (hashes, time) in uses {
                        let update = sqlx::query(
                            "UPDATE key_texts SET hash = $1,
                                    last_use_time = CASE WHEN last_use_time > $3
                                                         THEN last_use_time ELSE $3 END
                             WHERE hash IN ($1, $2)
                               AND (last_use_time IS NULL OR last_use_time < $3 OR hash <> $1)",
                        );
                        let update = update.bind(hashes.current).bind(hashes.previous).bind(time);
                        update.execute(&mut *connection).await?;
                    }
                    Ok(())
                })
            })
            .await
    }
}

pub(super) async fn insert_secret(
    connection: &mut AnyConnection,
    key_id: &str,
    hash: String,
    now: i64,
) -> Result<(), Error> {
    let insert =
        sqlx::query("INSERT INTO key_texts (hash, key_id, create_time) VALUES ($1, $2, $3)");
    insert.bind(hash).bind(key_id.to_owned()).bind(now).execute(connection).await?;
    Ok(())
}

pub(super) fn secret_from_row(row: &AnyRow) -> Result<KeyText, Error> {
    let time = |column| Ok::<_, sqlx::Error>(row.try_get::<Option<i64>, _>(column)?.map(timestamp));
    Ok(KeyText {
        create_time: time("create_time")?,
        expire_time: time("expire_time")?,
        last_use_time: time("last_use_time")?,
    })
}

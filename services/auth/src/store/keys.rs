//! Keys and their texts.

use hapa_core::pagination::After;
use hapa_core::timestamps::{micros, timestamp};
use hapa_proto::auth::v1::{Key, KeyText, RateLimit, TokenBudget};
use hapa_store::sql::SqlText;
use prost::Message;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sqlx::any::AnyRow;
use sqlx::{AnyConnection, Row as _};
use tonic::Response;

use crate::error::Error;
use crate::pepper::Hashes;
use crate::store::budgets::usage_of;
use crate::store::users::{self, Who};
use crate::store::{Attempt, By, Effect, Note, Store, budget, from_json, json as to_json};

/// A key, as one of its texts finds it.
pub(crate) struct Known {
    pub(crate) key: Key,
    /// When the text ends.
    pub(crate) expire_time: Option<i64>,
    /// The owner, where it is a user.
    pub(crate) user: Option<Who>,
    pub(crate) generation: i64,
}

/// Which keys to list.
pub(crate) struct Filter {
    pub(crate) owner: String,
    pub(crate) state: String,
    pub(crate) scope: String,
    pub(crate) now: i64,
}

/// What to set; none: it stays.
#[derive(Clone, Debug, Default)]
pub(crate) struct Changes {
    pub(crate) name: Option<String>,
    pub(crate) scopes: Option<Vec<String>>,
    pub(crate) end: End,
    pub(crate) rate_limits: Option<Vec<RateLimit>>,
    pub(crate) allowed_models: Option<Vec<String>>,
    pub(crate) token_budget: Option<TokenBudget>,
}

/// A text that takes the place of a key's text.
#[derive(Debug)]
pub(crate) struct NewText {
    pub(crate) key_id: String,
    pub(crate) hash: String,
    /// When the text before it ends.
    pub(crate) old_end: i64,
}

/// A key's new end.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) enum End {
    #[default]
    Unchanged,
    Never,
    At(i64),
}

#[derive(Deserialize, Serialize)]
struct StoredLimit {
    method: String,
    limit: u32,
    window_seconds: u32,
}

/// With what is known of the last use of its texts.
const SHOWN: &str = "SELECT keys.*,
        (SELECT MAX(last_use_time) FROM key_texts WHERE key_texts.key_id = keys.key_id) AS text_use_time
     FROM keys";

impl Store {
    /// The new key goes into the reply as `key_by_id` shows it.
    pub(crate) async fn insert_key<R: Message + Default + 'static>(
        &self,
        attempt: Attempt,
        key: Key,
        hash: String,
        reply: impl FnOnce(Key) -> R + Send + 'static,
    ) -> Result<Response<R>, Error> {
        let (detail, key_id, now) = (detail(&key), key.key_id.clone(), attempt.by.time);
        self.change_once(attempt, move |connection| {
            Box::pin(async move {
                if key.owner.starts_with("usr_") && !users::exists(connection, &key.owner).await? {
                    return Err(Error::NoSuch("user"));
                }
                let (budget, created) = (
                    key.token_budget.unwrap_or_default(),
                    key.create_time.as_ref().map(micros).unwrap_or_default(),
                );
                sqlx::query(
                    "INSERT INTO keys (key_id, name, owner, scopes, rate_limits, allowed_models, day_budget, month_budget, create_time, expire_time)
                     VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)",
                )
                .bind(key.key_id.clone())
                .bind(key.name)
                .bind(key.owner)
                .bind(to_json(&key.scopes)?)
                .bind(limits_json(&key.rate_limits)?)
                .bind(to_json(&key.allowed_models)?)
                .bind(budget.per_day)
                .bind(budget.per_month)
                .bind(created)
                .bind(key.expire_time.as_ref().map(micros))
                .execute(&mut *connection)
                .await?;
                insert_text(connection, &key_id, hash, created).await?;
                let reply = reply(existing(connection, &key_id, now).await?);
                let subject = format!("key:{key_id}");
                Ok((reply, vec![Note::new("key.create", subject, detail, Effect::None)]))
            })
        })
        .await
    }

    /// The key behind a text, with the generation at which it was like that.
    pub(crate) async fn key_by_hash(&self, hashes: &Hashes) -> Result<Option<Known>, Error> {
        let row = sqlx::query(
            "SELECT keys.*, key_texts.expire_time AS text_expire_time,
                    users.user_id, users.scopes AS user_scopes, users.profile,
                    users.day_budget AS user_day_budget, users.month_budget AS user_month_budget,
                    (SELECT sequence FROM audit_head WHERE id = 1) AS generation
             FROM key_texts
             JOIN keys ON keys.key_id = key_texts.key_id
             LEFT JOIN users ON users.user_id = keys.owner
             WHERE key_texts.hash IN ($1, $2)",
        );
        let row = row.bind(hashes.own.clone()).bind(hashes.also.clone());
        let row = row.fetch_optional(&self.db.reader).await?;
        let Some(row) = row else { return Ok(None) };
        let key = key(&row)?;
        let ends = [row.try_get("text_expire_time")?, key.expire_time.as_ref().map(micros)];
        Ok(Some(Known {
            expire_time: ends.into_iter().flatten().min(),
            user: users::joined(&row)?,
            generation: row.try_get("generation")?,
            key,
        }))
    }

    /// With its texts and what it has used.
    pub(crate) async fn key_by_id(&self, key_id: &str, now: i64) -> Result<Option<Key>, Error> {
        key_by_id(&mut *self.db.reader.acquire().await?, key_id, now).await
    }

    /// Newest first, without their texts.
    pub(crate) async fn keys_page(
        &self,
        filter: &Filter,
        after: &After,
        size: i64,
    ) -> Result<Vec<Key>, Error> {
        let rows = sqlx::query(SqlText::new(SHOWN).with(
            " WHERE ($1 = '' OR owner = $1)
               AND ($2 = '' OR scopes LIKE $3)
               AND ($4 = ''
                 OR ($4 = 'revoked' AND revoke_time IS NOT NULL)
                 OR ($4 = 'expired' AND revoke_time IS NULL AND expire_time <= $5)
                 OR ($4 = 'active' AND revoke_time IS NULL AND (expire_time IS NULL OR expire_time > $5)))
               AND (create_time < $6 OR (create_time = $6 AND key_id < $7))
             ORDER BY create_time DESC, key_id DESC
             LIMIT $8",
        ))
        .bind(filter.owner.clone())
        .bind(filter.scope.clone())
        .bind(format!("%\"{}\"%", filter.scope))
        .bind(filter.state.clone())
        .bind(filter.now)
        .bind(after.time)
        .bind(after.id.clone())
        .bind(size);
        rows.fetch_all(&self.db.reader).await?.iter().map(shown).collect()
    }

    /// A new text; the one before ends at `old_end`, older ones now.
    pub(crate) async fn rotate_key<R: Message + Default + 'static>(
        &self,
        attempt: Attempt,
        NewText { key_id, hash, old_end }: NewText,
        reply: impl FnOnce(Key) -> R + Send + 'static,
    ) -> Result<Response<R>, Error> {
        let now = attempt.by.time;
        self.change_once(attempt, move |connection| {
            Box::pin(async move {
                let key = lock(connection, &key_id).await?;
                if key.revoke_time.is_some()
                    || key.expire_time.as_ref().is_some_and(|end| micros(end) <= now)
                {
                    return Err(Error::Ended);
                }
                // The youngest lives on until the overlap ends, or its own end where that is sooner.
                let older = sqlx::query(
                    "UPDATE key_texts SET expire_time = $2
                     WHERE key_id = $1 AND (expire_time IS NULL OR expire_time > $2)
                       AND hash <> (SELECT hash FROM key_texts WHERE key_id = $1 ORDER BY create_time DESC, hash LIMIT 1)",
                );
                older.bind(key_id.clone()).bind(now).execute(&mut *connection).await?;
                let old = sqlx::query(
                    "UPDATE key_texts SET expire_time = $2
                     WHERE key_id = $1 AND (expire_time IS NULL OR expire_time > $2)",
                );
                old.bind(key_id.clone()).bind(old_end).execute(&mut *connection).await?;
                // What ended long ago is of no use but for the time of its last use.
                let keep = "UPDATE keys SET last_use_time = (SELECT MAX(last_use_time) FROM key_texts WHERE key_id = $1) WHERE key_id = $1";
                sqlx::query(keep).bind(key_id.clone()).execute(&mut *connection).await?;
                insert_text(connection, &key_id, hash, now).await?;
                let detail = json!({ "old_text_ends": timestamp(old_end).to_string() });
                // Not `Ended`: of the texts that are alive none must lose its calls.
                let subject = format!("key:{key_id}");
                let note = Note::new("key.rotate", subject, detail, Effect::Changed);
                Ok((reply(existing(connection, &key_id, now).await?), vec![note]))
            })
        })
        .await
    }

    pub(crate) async fn update_key(
        &self,
        by: By,
        key_id: String,
        changes: Changes,
    ) -> Result<(), Error> {
        self.change(by, move |connection| {
            Box::pin(async move {
                let key = lock(connection, &key_id).await?;
                if key.revoke_time.is_some() {
                    return Err(Error::Ended);
                }
                let (detail, effect) = (changes.detail(), changes.effect(&key));
                let end = match changes.end {
                    End::Unchanged => key.expire_time.as_ref().map(micros),
                    End::Never => None,
                    End::At(time) => Some(time),
                };
                let budget = changes.token_budget.or(key.token_budget).unwrap_or_default();
                let update = sqlx::query(
                    "UPDATE keys SET name = $2, scopes = $3, expire_time = $4, rate_limits = $5,
                            allowed_models = $6, day_budget = $7, month_budget = $8
                     WHERE key_id = $1",
                )
                .bind(key_id.clone())
                .bind(changes.name.unwrap_or(key.name))
                .bind(to_json(&changes.scopes.unwrap_or(key.scopes))?)
                .bind(end)
                .bind(limits_json(&changes.rate_limits.unwrap_or(key.rate_limits))?)
                .bind(to_json(&changes.allowed_models.unwrap_or(key.allowed_models))?)
                .bind(budget.per_day)
                .bind(budget.per_month);
                update.execute(connection).await?;
                Ok(((), vec![Note::new("key.update", format!("key:{key_id}"), detail, effect)]))
            })
        })
        .await
    }

    /// Ends a key, unless it has ended before.
    pub(crate) async fn revoke_key(&self, by: By, key_id: String) -> Result<(), Error> {
        let now = by.time;
        self.change(by, move |connection| {
            Box::pin(async move {
                if lock(connection, &key_id).await?.revoke_time.is_some() {
                    return Ok(((), Vec::new()));
                }
                let update = sqlx::query("UPDATE keys SET revoke_time = $2 WHERE key_id = $1");
                update.bind(key_id.clone()).bind(now).execute(connection).await?;
                let subject = format!("key:{key_id}");
                Ok(((), vec![Note::new("key.revoke", subject, json!({}), Effect::Ended)]))
            })
        })
        .await
    }

    /// When texts were last used, which never goes back. Each is kept under its own hash then.
    pub(crate) async fn touch(&self, uses: Vec<(Hashes, i64)>) -> Result<(), Error> {
        self.db
            .transaction(move |connection| {
                Box::pin(async move {
                    for (hashes, time) in uses {
                        let update = sqlx::query(
                            "UPDATE key_texts SET hash = $1,
                                    last_use_time = CASE WHEN last_use_time > $3 THEN last_use_time ELSE $3 END
                             WHERE hash IN ($1, $2)
                               AND (last_use_time IS NULL OR last_use_time < $3 OR hash <> $1)",
                        );
                        let update = update.bind(hashes.own).bind(hashes.also).bind(time);
                        update.execute(&mut *connection).await?;
                    }
                    Ok(())
                })
            })
            .await
    }
}

impl Changes {
    /// Something is taken away: calls in progress must end.
    fn effect(&self, key: &Key) -> Effect {
        let lacks = |new: &Option<Vec<String>>, old: &[String]| {
            new.as_ref().is_some_and(|new| old.iter().any(|one| !new.contains(one)))
        };
        // No list of models is all of them.
        let models = self.allowed_models.as_ref().is_some_and(|new| {
            !new.is_empty()
                && (key.allowed_models.is_empty()
                    || lacks(&self.allowed_models, &key.allowed_models))
        });
        if models || lacks(&self.scopes, &key.scopes) { Effect::Ended } else { Effect::Changed }
    }

    fn detail(&self) -> Value {
        let mut set = serde_json::Map::new();
        let mut put = |name: &str, value: Option<Value>| {
            if let Some(value) = value {
                set.insert(name.to_owned(), value);
            }
        };
        put("name", self.name.as_ref().map(|name| json!(name)));
        put("scopes", self.scopes.as_ref().map(|scopes| json!(scopes)));
        match self.end {
            End::Unchanged => {}
            End::Never => put("expire_time", Some(Value::Null)),
            End::At(time) => put("expire_time", Some(json!(timestamp(time).to_string()))),
        }
        put("rate_limits", self.rate_limits.as_ref().map(|limits| limits_detail(limits)));
        put("allowed_models", self.allowed_models.as_ref().map(|models| json!(models)));
        put("token_budget", self.token_budget.as_ref().map(budget_detail));
        Value::Object(set)
    }
}

/// The key itself; who changes something holds the log's lock already.
async fn lock(connection: &mut AnyConnection, key_id: &str) -> Result<Key, Error> {
    let row = sqlx::query("SELECT * FROM keys WHERE key_id = $1").bind(key_id.to_owned());
    let row = row.fetch_optional(connection).await?;
    key(&row.ok_or(Error::NoSuch("key"))?)
}

async fn key_by_id(
    connection: &mut AnyConnection,
    key_id: &str,
    now: i64,
) -> Result<Option<Key>, Error> {
    let row = sqlx::query(SqlText::new(SHOWN).with(" WHERE key_id = $1"));
    let row = row.bind(key_id.to_owned()).fetch_optional(&mut *connection).await?;
    let Some(row) = row else { return Ok(None) };
    let texts = sqlx::query(
        "SELECT * FROM key_texts WHERE key_id = $1 AND (expire_time IS NULL OR expire_time > $2)
         ORDER BY create_time DESC",
    );
    let texts = texts.bind(key_id.to_owned()).bind(now).fetch_all(&mut *connection).await?;
    let mut key = shown(&row)?;
    if key.revoke_time.is_none() {
        key.texts = texts.iter().map(text).collect::<Result<_, _>>()?;
    }
    key.token_usage = Some(usage_of(connection, format!("key:{key_id}"), now).await?);
    Ok(Some(key))
}

async fn existing(connection: &mut AnyConnection, key_id: &str, now: i64) -> Result<Key, Error> {
    let key = key_by_id(connection, key_id, now).await?;
    key.ok_or(Error::NoSuch("key"))
}

async fn insert_text(
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

fn detail(key: &Key) -> Value {
    json!({
        "name": key.name,
        "owner": key.owner,
        "scopes": key.scopes,
        "rate_limits": limits_detail(&key.rate_limits),
        "allowed_models": key.allowed_models,
        "token_budget": key.token_budget.as_ref().map(budget_detail),
        "expire_time": key.expire_time.as_ref().map(ToString::to_string),
    })
}

pub(super) fn budget_detail(budget: &TokenBudget) -> Value {
    json!({ "per_day": budget.per_day, "per_month": budget.per_month })
}

fn limits_detail(limits: &[RateLimit]) -> Value {
    limits.iter().map(|limit| json!(stored(limit))).collect()
}

fn limits_json(limits: &[RateLimit]) -> Result<String, Error> {
    to_json(&limits.iter().map(stored).collect::<Vec<_>>())
}

fn shown(row: &AnyRow) -> Result<Key, Error> {
    let (own, texts): (Option<i64>, Option<i64>) =
        (row.try_get("last_use_time")?, row.try_get("text_use_time")?);
    Ok(Key { last_use_time: own.max(texts).map(timestamp), ..key(row)? })
}

fn key(row: &AnyRow) -> Result<Key, Error> {
    let limits: Vec<StoredLimit> = from_json(row.try_get("rate_limits")?)?;
    let time = |column| Ok::<_, sqlx::Error>(row.try_get::<Option<i64>, _>(column)?.map(timestamp));
    Ok(Key {
        key_id: row.try_get("key_id")?,
        name: row.try_get("name")?,
        owner: row.try_get("owner")?,
        scopes: from_json(row.try_get("scopes")?)?,
        rate_limits: limits.into_iter().map(limit).collect(),
        allowed_models: from_json(row.try_get("allowed_models")?)?,
        create_time: time("create_time")?,
        expire_time: time("expire_time")?,
        revoke_time: time("revoke_time")?,
        token_budget: budget(row)?,
        ..Key::default()
    })
}

fn text(row: &AnyRow) -> Result<KeyText, Error> {
    let time = |column| Ok::<_, sqlx::Error>(row.try_get::<Option<i64>, _>(column)?.map(timestamp));
    Ok(KeyText {
        create_time: time("create_time")?,
        expire_time: time("expire_time")?,
        last_use_time: time("last_use_time")?,
    })
}

fn stored(limit: &RateLimit) -> StoredLimit {
    let RateLimit { method, limit, window_seconds } = limit.clone();
    StoredLimit { method, limit, window_seconds }
}

fn limit(limit: StoredLimit) -> RateLimit {
    let StoredLimit { method, limit, window_seconds } = limit;
    RateLimit { method, limit, window_seconds }
}

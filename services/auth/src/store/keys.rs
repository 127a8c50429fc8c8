//! API keys without their secrets, which are in `key_secrets`.

use hapa_core::pagination::PageCursor;
use hapa_core::timestamps::{micros, timestamp};
use hapa_proto::auth::v1::{Key, RateLimit, TokenBudget};
use hapa_store::sql::SqlText;
use prost::Message;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sqlx::any::AnyRow;
use sqlx::{AnyConnection, Row as _};
use tonic::Response;

use crate::error::Error;
use crate::pepper::CredentialHashes;
use crate::store::budgets::token_usage_of;
use crate::store::key_secrets::{insert_secret, secret_from_row};
use crate::store::users::{self, UserRef};
use crate::store::{
    AuditContext, AuditEvent, CacheEffect, ChangeRequest, Store, detail_of_changes, from_json,
    to_json, token_budget_from_row,
};

/// A key found by the hash of one of its secrets, with its owner.
pub(crate) struct KeyWithOwner {
    pub(crate) key: Key,
    /// The earlier of the secret's and the key's expiry, in epoch microseconds.
    pub(crate) expire_time: Option<i64>,
    /// The owner, if it is a user.
    pub(crate) user: Option<UserRef>,
    /// The revocation generation at which all of this was read.
    pub(crate) generation: i64,
}

/// Selects the keys of one page. Empty strings match every key.
pub(crate) struct KeyFilter {
    pub(crate) owner: String,
    pub(crate) state: String,
    pub(crate) scope: String,
    pub(crate) now: i64,
}

/// The fields of a key to set; `None` leaves a field as it is.
#[derive(Clone, Debug, Default)]
pub(crate) struct KeyChanges {
    pub(crate) name: Option<String>,
    pub(crate) scopes: Option<Vec<String>>,
    pub(crate) expiry: ExpiryChange,
    pub(crate) rate_limits: Option<Vec<RateLimit>>,
    pub(crate) allowed_models: Option<Vec<String>>,
    pub(crate) token_budget: Option<TokenBudget>,
}

/// A change to the expiry of a key.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) enum ExpiryChange {
    #[default]
    Unchanged,
    Never,
    At(i64),
}

#[derive(Deserialize, Serialize)]
struct StoredRateLimit {
    method: String,
    limit: u32,
    window_seconds: u32,
}

/// Selects keys with the latest use of their secrets.
const SELECT_KEYS: &str = "SELECT keys.*,
        (SELECT MAX(last_use_time) FROM key_texts WHERE key_texts.key_id = keys.key_id) AS secrets_use_time
     FROM keys";

impl Store {
    /// Inserts a key. `reply` receives it as [`Self::key_by_id`] returns it.
    pub(crate) async fn insert_key<R: Message + Default + 'static>(
        &self,
        change: ChangeRequest,
        key: Key,
        hash: String,
        reply: impl FnOnce(Key) -> R + Send + 'static,
    ) -> Result<Response<R>, Error> {
        let (detail, key_id, now) = (audit_detail(&key), key.key_id.clone(), change.context.time);
        self.change_once(change, move |connection| {
            Box::pin(async move {
                if key.owner.starts_with("usr_")
                    && !users::user_exists(connection, &key.owner).await?
                {
                    return Err(Error::NotFound("user"));
                }
                let (budget, create_time) = (
                    key.token_budget.unwrap_or_default(),
                    key.create_time.as_ref().map(micros).unwrap_or_default(),
                );
                sqlx::query(
                    "INSERT INTO keys (key_id, name, owner, scopes, rate_limits, allowed_models,
                                       day_budget, month_budget, create_time, expire_time)
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
                .bind(create_time)
                .bind(key.expire_time.as_ref().map(micros))
                .execute(&mut *connection)
                .await?;
                insert_secret(connection, &key_id, hash, create_time).await?;
                let reply = reply(required_key(connection, &key_id, now).await?);
                let subject = format!("key:{key_id}");
                Ok((reply, vec![AuditEvent::new("key.create", subject, detail, CacheEffect::None)]))
            })
        })
        .await
    }

    /// The key of a secret, with its owner and the generation at which they were read.
    pub(crate) async fn key_by_hash(
        &self,
        hashes: &CredentialHashes,
    ) -> Result<Option<KeyWithOwner>, Error> {
        let row = sqlx::query(
            "SELECT keys.*, key_texts.expire_time AS secret_expire_time,
                    users.user_id, users.scopes AS user_scopes, users.profile,
                    users.day_budget AS user_day_budget, users.month_budget AS user_month_budget,
                    (SELECT sequence FROM audit_head WHERE id = 1) AS generation
             FROM key_texts
             JOIN keys ON keys.key_id = key_texts.key_id
             LEFT JOIN users ON users.user_id = keys.owner
             WHERE key_texts.hash IN ($1, $2)",
        );
        let row = row.bind(hashes.current.clone()).bind(hashes.previous.clone());
        let row = row.fetch_optional(&self.db.reader).await?;
        let Some(row) = row else { return Ok(None) };
        let key = key_from_row(&row)?;
        let ends = [row.try_get("secret_expire_time")?, key.expire_time.as_ref().map(micros)];
        Ok(Some(KeyWithOwner {
            expire_time: ends.into_iter().flatten().min(),
            user: users::user_ref_from_row(&row)?,
            generation: row.try_get("generation")?,
            key,
        }))
    }

    /// A key with its active secrets and its token usage.
    pub(crate) async fn key_by_id(&self, key_id: &str, now: i64) -> Result<Option<Key>, Error> {
        key_by_id(&mut *self.db.reader.acquire().await?, key_id, now).await
    }

    /// One page of keys without their secrets, newest first.
    pub(crate) async fn keys_page(
        &self,
        filter: &KeyFilter,
        after: &PageCursor,
        size: i64,
    ) -> Result<Vec<Key>, Error> {
        let rows = sqlx::query(SqlText::new(SELECT_KEYS).with(
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
        rows.fetch_all(&self.db.reader).await?.iter().map(key_with_last_use).collect()
    }

    pub(crate) async fn update_key(
        &self,
        context: AuditContext,
        key_id: String,
        changes: KeyChanges,
    ) -> Result<(), Error> {
        self.audited_transaction(context, move |connection| {
            Box::pin(async move {
                let key = lock_key(connection, &key_id).await?;
                if key.revoke_time.is_some() {
                    return Err(Error::ExpiredOrRevoked);
                }
                let (detail, effect) = (changes.audit_detail(), changes.cache_effect(&key));
                let expire_time = match changes.expiry {
                    ExpiryChange::Unchanged => key.expire_time.as_ref().map(micros),
                    ExpiryChange::Never => None,
                    ExpiryChange::At(time) => Some(time),
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
                .bind(expire_time)
                .bind(limits_json(&changes.rate_limits.unwrap_or(key.rate_limits))?)
                .bind(to_json(&changes.allowed_models.unwrap_or(key.allowed_models))?)
                .bind(budget.per_day)
                .bind(budget.per_month);
                update.execute(connection).await?;
                Ok((
                    (),
                    vec![AuditEvent::new("key.update", format!("key:{key_id}"), detail, effect)],
                ))
            })
        })
        .await
    }

    /// Revokes a key. A key that is revoked already stays as it is.
    pub(crate) async fn revoke_key(
        &self,
        context: AuditContext,
        key_id: String,
    ) -> Result<(), Error> {
        let now = context.time;
        self.audited_transaction(context, move |connection| {
            Box::pin(async move {
                if lock_key(connection, &key_id).await?.revoke_time.is_some() {
                    return Ok(((), Vec::new()));
                }
                let update = sqlx::query("UPDATE keys SET revoke_time = $2 WHERE key_id = $1");
                update.bind(key_id.clone()).bind(now).execute(connection).await?;
                let subject = format!("key:{key_id}");
                Ok((
                    (),
                    vec![AuditEvent::new("key.revoke", subject, json!({}), CacheEffect::EndCalls)],
                ))
            })
        })
        .await
    }
}

impl KeyChanges {
    /// A change that withdraws a scope or a model must end the calls in progress.
    fn cache_effect(&self, key: &Key) -> CacheEffect {
        let drops = |new: &Option<Vec<String>>, old: &[String]| {
            new.as_ref().is_some_and(|new| old.iter().any(|one| !new.contains(one)))
        };
        // An empty list allows every model.
        let narrows_models = self.allowed_models.as_ref().is_some_and(|new| {
            !new.is_empty()
                && (key.allowed_models.is_empty()
                    || drops(&self.allowed_models, &key.allowed_models))
        });
        if narrows_models || drops(&self.scopes, &key.scopes) {
            CacheEffect::EndCalls
        } else {
            CacheEffect::Invalidate
        }
    }

    fn audit_detail(&self) -> Value {
        let expire_time = match self.expiry {
            ExpiryChange::Unchanged => None,
            ExpiryChange::Never => Some(Value::Null),
            ExpiryChange::At(time) => Some(json!(timestamp(time).to_string())),
        };
        detail_of_changes([
            ("name", self.name.as_ref().map(|name| json!(name))),
            ("scopes", self.scopes.as_ref().map(|scopes| json!(scopes))),
            ("expire_time", expire_time),
            ("rate_limits", self.rate_limits.as_ref().map(|limits| limits_detail(limits))),
            ("allowed_models", self.allowed_models.as_ref().map(|models| json!(models))),
            ("token_budget", self.token_budget.as_ref().map(budget_detail)),
        ])
    }
}

/// Reads a key inside an audited transaction, which holds the lock of the audit log and thereby
/// excludes other changes.
pub(super) async fn lock_key(connection: &mut AnyConnection, key_id: &str) -> Result<Key, Error> {
    let row = sqlx::query("SELECT * FROM keys WHERE key_id = $1").bind(key_id.to_owned());
    let row = row.fetch_optional(connection).await?;
    key_from_row(&row.ok_or(Error::NotFound("key"))?)
}

async fn key_by_id(
    connection: &mut AnyConnection,
    key_id: &str,
    now: i64,
) -> Result<Option<Key>, Error> {
    let row = sqlx::query(SqlText::new(SELECT_KEYS).with(" WHERE key_id = $1"));
    let row = row.bind(key_id.to_owned()).fetch_optional(&mut *connection).await?;
    let Some(row) = row else { return Ok(None) };
    let secrets = sqlx::query(
        "SELECT * FROM key_texts WHERE key_id = $1 AND (expire_time IS NULL OR expire_time > $2)
         ORDER BY create_time DESC",
    );
    let secrets = secrets.bind(key_id.to_owned()).bind(now).fetch_all(&mut *connection).await?;
    let mut key = key_with_last_use(&row)?;
    if key.revoke_time.is_none() {
        key.texts = secrets.iter().map(secret_from_row).collect::<Result<_, _>>()?;
    }
    key.token_usage = Some(token_usage_of(connection, format!("key:{key_id}"), now).await?);
    Ok(Some(key))
}

pub(super) async fn required_key(
    connection: &mut AnyConnection,
    key_id: &str,
    now: i64,
) -> Result<Key, Error> {
    let key = key_by_id(connection, key_id, now).await?;
    key.ok_or(Error::NotFound("key"))
}

fn audit_detail(key: &Key) -> Value {
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
    limits.iter().map(|limit| json!(to_stored_limit(limit))).collect()
}

fn limits_json(limits: &[RateLimit]) -> Result<String, Error> {
    to_json(&limits.iter().map(to_stored_limit).collect::<Vec<_>>())
}

fn key_with_last_use(row: &AnyRow) -> Result<Key, Error> {
    let (key_use, secrets_use): (Option<i64>, Option<i64>) =
        (row.try_get("last_use_time")?, row.try_get("secrets_use_time")?);
    Ok(Key { last_use_time: key_use.max(secrets_use).map(timestamp), ..key_from_row(row)? })
}

fn key_from_row(row: &AnyRow) -> Result<Key, Error> {
    let limits: Vec<StoredRateLimit> = from_json(row.try_get("rate_limits")?)?;
    let time = |column| Ok::<_, sqlx::Error>(row.try_get::<Option<i64>, _>(column)?.map(timestamp));
    Ok(Key {
        key_id: row.try_get("key_id")?,
        name: row.try_get("name")?,
        owner: row.try_get("owner")?,
        scopes: from_json(row.try_get("scopes")?)?,
        rate_limits: limits.into_iter().map(from_stored_limit).collect(),
        allowed_models: from_json(row.try_get("allowed_models")?)?,
        create_time: time("create_time")?,
        expire_time: time("expire_time")?,
        revoke_time: time("revoke_time")?,
        token_budget: token_budget_from_row(row)?,
        ..Key::default()
    })
}

fn to_stored_limit(limit: &RateLimit) -> StoredRateLimit {
    let RateLimit { method, limit, window_seconds } = limit.clone();
    StoredRateLimit { method, limit, window_seconds }
}

fn from_stored_limit(limit: StoredRateLimit) -> RateLimit {
    let StoredRateLimit { method, limit, window_seconds } = limit;
    RateLimit { method, limit, window_seconds }
}

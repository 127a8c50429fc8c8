//! The only SQL of this service: one method is one statement.

use hapa_chassis::db::{Db, Step};
use hapa_proto::auth::v1::{Key, RateLimit};
use serde::{Deserialize, Serialize};
use sqlx::Row as _;
use sqlx::any::AnyRow;

use crate::error::Error;
use crate::key::{micros, timestamp};

pub(crate) const MIGRATIONS: &[Step] = &[(1, "keys", include_str!("../migrations/0001_keys.sql"))];

/// Where a page of the list begins: after this key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct After {
    pub(crate) create_time: i64,
    pub(crate) key_id: String,
}

#[derive(Clone)]
pub(crate) struct Store(Db);

#[derive(Deserialize, Serialize)]
struct StoredLimit {
    method: String,
    limit: u32,
    window_seconds: u32,
}

impl Store {
    pub(crate) fn new(db: Db) -> Self {
        Store(db)
    }

    pub(crate) async fn insert(&self, key: &Key, hash: &str) -> Result<(), Error> {
        let limits: Vec<_> = key.rate_limits.iter().map(stored).collect();
        sqlx::query(
            "INSERT INTO keys (key_id, hash, name, owner, scopes, rate_limits, allowed_models, create_time, expire_time)
             VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)",
        )
        .bind(&key.key_id)
        .bind(hash)
        .bind(&key.name)
        .bind(&key.owner)
        .bind(json(&key.scopes)?)
        .bind(json(&limits)?)
        .bind(json(&key.allowed_models)?)
        .bind(key.create_time.as_ref().map(micros))
        .bind(key.expire_time.as_ref().map(micros))
        .execute(&self.0.writer)
        .await?;
        Ok(())
    }

    pub(crate) async fn by_hash(&self, hash: &str) -> Result<Option<Key>, Error> {
        let row = sqlx::query("SELECT * FROM keys WHERE hash = $1").bind(hash);
        row.fetch_optional(&self.0.reader).await?.map(|row| key(&row)).transpose()
    }

    pub(crate) async fn by_id(&self, key_id: &str) -> Result<Option<Key>, Error> {
        let row = sqlx::query("SELECT * FROM keys WHERE key_id = $1").bind(key_id);
        row.fetch_optional(&self.0.reader).await?.map(|row| key(&row)).transpose()
    }

    /// Newest first; an empty owner means every one.
    pub(crate) async fn page(
        &self,
        owner: &str,
        after: &After,
        size: i64,
    ) -> Result<Vec<Key>, Error> {
        let rows = sqlx::query(
            "SELECT * FROM keys
             WHERE ($1 = '' OR owner = $1)
               AND (create_time < $2 OR (create_time = $2 AND key_id < $3))
             ORDER BY create_time DESC, key_id DESC
             LIMIT $4",
        )
        .bind(owner)
        .bind(after.create_time)
        .bind(&after.key_id)
        .bind(size);
        rows.fetch_all(&self.0.reader).await?.iter().map(key).collect()
    }

    /// Ends a key, unless it has ended before; none where there is no such key.
    pub(crate) async fn revoke(&self, key_id: &str, now: i64) -> Result<Option<Key>, Error> {
        let row = sqlx::query(
            "UPDATE keys SET revoke_time = COALESCE(revoke_time, $2) WHERE key_id = $1 RETURNING *",
        )
        .bind(key_id)
        .bind(now);
        row.fetch_optional(&self.0.writer).await?.map(|row| key(&row)).transpose()
    }
}

fn key(row: &AnyRow) -> Result<Key, Error> {
    let limits: Vec<StoredLimit> = from_json(row.try_get("rate_limits")?)?;
    let time = |column| Ok::<_, sqlx::Error>(row.try_get::<Option<i64>, _>(column)?.map(timestamp));
    Ok(Key {
        key_id: row.try_get("key_id")?,
        name: row.try_get("name")?,
        owner: row.try_get("owner")?,
        scopes: from_json(row.try_get("scopes")?)?,
        rate_limits: limits.into_iter().map(shown).collect(),
        allowed_models: from_json(row.try_get("allowed_models")?)?,
        create_time: time("create_time")?,
        expire_time: time("expire_time")?,
        revoke_time: time("revoke_time")?,
    })
}

fn stored(limit: &RateLimit) -> StoredLimit {
    let RateLimit { method, limit, window_seconds } = limit.clone();
    StoredLimit { method, limit, window_seconds }
}

fn shown(limit: StoredLimit) -> RateLimit {
    let StoredLimit { method, limit, window_seconds } = limit;
    RateLimit { method, limit, window_seconds }
}

fn json(value: &impl Serialize) -> Result<String, Error> {
    Ok(serde_json::to_string(value).map_err(anyhow::Error::from)?)
}

fn from_json<T: for<'a> Deserialize<'a>>(text: &str) -> Result<T, Error> {
    Ok(serde_json::from_str(text).map_err(anyhow::Error::from)?)
}

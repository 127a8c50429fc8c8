//! Replies that are remembered under idempotency keys.
//!
//! Invariant: a record is written in the transaction of the change whose reply it holds, so neither
//! exists without the other.

use std::sync::Arc;

use futures_util::future::BoxFuture;
use hapa_core::idempotency::LIFETIME;
use prost::Message;
use sqlx::{AnyConnection, Executor, Row as _};
use tonic::Response;

use crate::error::Error;
use crate::idempotency::Repeatable;
use crate::store::{By, Done, Store, audit};

/// Expired records that one statement deletes.
const BATCH_SIZE: i64 = 1_000;

/// A change that is asked for, perhaps again.
#[derive(Debug)]
pub(crate) struct Attempt {
    pub(crate) by: By,
    /// `None` without an idempotency key: every attempt makes the change.
    pub(crate) request: Option<Arc<Repeatable>>,
}

impl Store {
    /// The first reply to this request, where it was made before.
    pub(crate) async fn first_reply<R: Message + Default>(
        &self,
        Attempt { by, request }: &Attempt,
    ) -> Result<Option<Response<R>>, Error> {
        let Some(request) = request else { return Ok(None) };
        find(&self.db.reader, request, by.time).await
    }

    /// Makes a change, with its audit entries, unless the request is a repetition: then the first
    /// reply is returned. A repetition that arrives meanwhile waits for the lock of the audit log.
    pub(super) async fn change_once<R: Message + Default + 'static>(
        &self,
        Attempt { by, request }: Attempt,
        work: impl for<'t> FnOnce(&'t mut AnyConnection) -> BoxFuture<'t, Done<R>> + Send + 'static,
    ) -> Result<Response<R>, Error> {
        let Some(request) = request else {
            return self.change(by, work).await.map(Response::new);
        };
        let done = self.db.transaction(move |connection| {
            Box::pin(async move {
                let head = audit::lock_head(connection).await?;
                if let Some(reply) = find(&mut *connection, &request, by.time).await? {
                    return Ok(reply);
                }
                let (reply, notes) = work(connection).await?;
                audit::append(connection, head, &by, &notes).await?;
                insert(connection, &request, &reply, by.time).await?;
                Ok::<_, Error>(Response::new(reply))
            })
        });
        let reply = done.await?;
        self.changed.notify_one();
        Ok(reply)
    }

    /// Deletes records that have expired; says whether there may be more.
    pub(crate) async fn purge_idempotency_records(&self, now: i64) -> Result<bool, Error> {
        let delete = sqlx::query(
            "DELETE FROM idempotency_records WHERE record_id IN
               (SELECT record_id FROM idempotency_records WHERE expire_time <= $1
                ORDER BY expire_time LIMIT $2)",
        );
        let deleted = delete.bind(now).bind(BATCH_SIZE).execute(&self.db.writer).await?;
        Ok(i64::try_from(deleted.rows_affected()).is_ok_and(|deleted| deleted == BATCH_SIZE))
    }
}

async fn find<R: Message + Default>(
    executor: impl Executor<'_, Database = sqlx::Any>,
    request: &Repeatable,
    now: i64,
) -> Result<Option<Response<R>>, Error> {
    let row = sqlx::query(
        "SELECT record_id, reply FROM idempotency_records
         WHERE record_id IN ($1, $2) AND expire_time > $3",
    )
    .bind(request.own.record_id().to_owned())
    .bind(request.also().record_id().to_owned())
    .bind(now)
    .fetch_optional(executor)
    .await?;
    let Some(row) = row else { return Ok(None) };
    let record_id: &str = row.try_get("record_id")?;
    let under = if record_id == request.own.record_id() { &request.own } else { request.also() };
    let record = hex::decode(row.try_get::<&str, _>("reply")?).map_err(anyhow::Error::from)?;
    Ok(Some(under.replay(&record)?))
}

async fn insert(
    connection: &mut AnyConnection,
    request: &Repeatable,
    reply: &impl Message,
    now: i64,
) -> Result<(), Error> {
    let record = request.own.seal(reply).map_err(|fault| Error::Fault(Box::new(fault)))?;
    let lifetime = i64::try_from(LIFETIME.as_micros()).unwrap_or(i64::MAX);
    let insert = sqlx::query(
        "INSERT INTO idempotency_records (record_id, reply, expire_time) VALUES ($1, $2, $3)
         ON CONFLICT (record_id) DO UPDATE SET reply = $2, expire_time = $3",
    )
    .bind(request.own.record_id().to_owned())
    .bind(hex::encode(record))
    .bind(now.saturating_add(lifetime));
    insert.execute(connection).await?;
    Ok(())
}

//! Replies stored under idempotency keys.
//!
//! Invariant: a record is written in the transaction of the change whose reply it holds, so neither
//! exists without the other.

use std::sync::Arc;

use futures_util::future::BoxFuture;
use hapa_core::idempotency::RECORD_TTL;
use prost::Message;
use sqlx::{AnyConnection, Executor, Row as _};
use tonic::Response;

use crate::error::Error;
use crate::idempotency::RequestIdempotency;
use crate::store::{AuditContext, Audited, Store, audit};

/// Expired records that one statement deletes.
const BATCH_SIZE: i64 = 1_000;

/// A requested change, which may be a repetition of an earlier request.
#[derive(Debug)]
pub(crate) struct ChangeRequest {
    pub(crate) context: AuditContext,
    /// `None` without an idempotency key: every request makes the change.
    pub(crate) idempotency: Option<Arc<RequestIdempotency>>,
}

impl Store {
    /// The stored reply of the first request with the same idempotency key, if there is one.
    pub(crate) async fn first_reply<R: Message + Default>(
        &self,
        ChangeRequest { context, idempotency }: &ChangeRequest,
    ) -> Result<Option<Response<R>>, Error> {
        let Some(idempotency) = idempotency else { return Ok(None) };
        find_reply(&self.db.reader, idempotency, context.time).await
    }

    /// Makes a change, with its audit entries. A repetition changes nothing and returns the first
    /// reply; one that arrives during the change waits for the lock of the audit log.
    pub(super) async fn change_once<R: Message + Default + 'static>(
        &self,
        ChangeRequest { context, idempotency }: ChangeRequest,
        work: impl for<'t> FnOnce(&'t mut AnyConnection) -> BoxFuture<'t, Audited<R>> + Send + 'static,
    ) -> Result<Response<R>, Error> {
        let Some(idempotency) = idempotency else {
            return self.audited_transaction(context, work).await.map(Response::new);
        };
        let transaction = self.db.transaction(move |connection| {
            Box::pin(async move {
                let head = audit::lock_head(connection).await?;
                if let Some(reply) =
                    find_reply(&mut *connection, &idempotency, context.time).await?
                {
                    return Ok(reply);
                }
                let (reply, events) = work(connection).await?;
                audit::append_events(connection, head, &context, &events).await?;
                insert_record(connection, &idempotency, &reply, context.time).await?;
                Ok::<_, Error>(Response::new(reply))
            })
        });
        let reply = transaction.await?;
        self.change_notify.notify_one();
        Ok(reply)
    }

    /// Deletes up to [`BATCH_SIZE`] expired records. Returns whether more may be left.
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

async fn find_reply<R: Message + Default>(
    executor: impl Executor<'_, Database = sqlx::Any>,
    idempotency: &RequestIdempotency,
    now: i64,
) -> Result<Option<Response<R>>, Error> {
    let row = sqlx::query(
        "SELECT record_id, reply FROM idempotency_records
         WHERE record_id IN ($1, $2) AND expire_time > $3",
    )
    .bind(idempotency.current.record_id().to_owned())
    .bind(idempotency.previous().record_id().to_owned())
    .bind(now)
    .fetch_optional(executor)
    .await?;
    let Some(row) = row else { return Ok(None) };
    let record_id: &str = row.try_get("record_id")?;
    let request = if record_id == idempotency.current.record_id() {
        &idempotency.current
    } else {
        idempotency.previous()
    };
    let record = hex::decode(row.try_get::<&str, _>("reply")?).map_err(anyhow::Error::from)?;
    Ok(Some(request.replay(&record)?))
}

async fn insert_record(
    connection: &mut AnyConnection,
    idempotency: &RequestIdempotency,
    reply: &impl Message,
    now: i64,
) -> Result<(), Error> {
    let record = idempotency.current.seal(reply).map_err(|error| Error::Rpc(Box::new(error)))?;
    let ttl_micros = i64::try_from(RECORD_TTL.as_micros()).unwrap_or(i64::MAX);
    let insert = sqlx::query(
        "INSERT INTO idempotency_records (record_id, reply, expire_time) VALUES ($1, $2, $3)
         ON CONFLICT (record_id) DO UPDATE SET reply = $2, expire_time = $3",
    )
    .bind(idempotency.current.record_id().to_owned())
    .bind(hex::encode(record))
    .bind(now.saturating_add(ttl_micros));
    insert.execute(connection).await?;
    Ok(())
}

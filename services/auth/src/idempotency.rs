//! Requests with an idempotency key, as this service recognises them.

use std::sync::Arc;
use std::time::Duration;

use hapa_core::idempotency::IdempotentRequest;
use hapa_core::timestamps::now;
use prost::Message;
use secrecy::ExposeSecret as _;
use tokio::time::sleep;
use tonic::{Request, Status};

use crate::pepper::Pepper;
use crate::store::Store;

const PURGE_INTERVAL: Duration = Duration::from_mins(10);

/// A request that may be repeated. Its record may be under either pepper while one is replaced.
#[derive(Debug)]
pub(crate) struct Repeatable {
    pub(crate) own: IdempotentRequest,
    also: Option<IdempotentRequest>,
}

impl Repeatable {
    /// `None` if the request has no idempotency key.
    pub(crate) fn of<M: Message>(
        request: &Request<M>,
        pepper: &Pepper,
    ) -> Result<Option<Arc<Repeatable>>, Status> {
        let under = |secret: &secrecy::SecretString| {
            IdempotentRequest::of(request, secret.expose_secret().as_bytes())
        };
        let Some(own) = under(&pepper.own)? else { return Ok(None) };
        let also = pepper.also.as_ref().map(under).transpose()?.flatten();
        Ok(Some(Arc::new(Repeatable { own, also })))
    }

    /// Under the other pepper; the same as `own` if there is one pepper.
    pub(crate) fn also(&self) -> &IdempotentRequest {
        self.also.as_ref().unwrap_or(&self.own)
    }
}

/// Deletes expired records for as long as the server runs.
pub(crate) async fn purge(store: Store) {
    loop {
        loop {
            match store.purge_idempotency_records(now()).await {
                Ok(true) => {}
                Ok(false) => break,
                Err(error) => {
                    tracing::warn!(%error, "expired idempotency records were not deleted; the next attempt is in 10 minutes");
                    break;
                }
            }
        }
        sleep(PURGE_INTERVAL).await;
    }
}

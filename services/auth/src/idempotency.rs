//! Recognises repeated requests by their idempotency key, and deletes expired records.

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

/// A request with an idempotency key. While the pepper is being replaced, its record may be stored
/// under the current or the previous pepper.
#[derive(Debug)]
pub(crate) struct RequestIdempotency {
    pub(crate) current: IdempotentRequest,
    previous: Option<IdempotentRequest>,
}

impl RequestIdempotency {
    /// `None` if the request has no idempotency key.
    pub(crate) fn from_request<M: Message>(
        request: &Request<M>,
        pepper: &Pepper,
    ) -> Result<Option<Arc<RequestIdempotency>>, Status> {
        let request_under = |secret: &secrecy::SecretString| {
            IdempotentRequest::from_request(request, secret.expose_secret().as_bytes())
        };
        let Some(current) = request_under(&pepper.current)? else { return Ok(None) };
        let previous = pepper.previous.as_ref().map(request_under).transpose()?.flatten();
        Ok(Some(Arc::new(RequestIdempotency { current, previous })))
    }

    /// The request under the previous pepper, or under the current one if there is no previous one.
    pub(crate) fn previous(&self) -> &IdempotentRequest {
        self.previous.as_ref().unwrap_or(&self.current)
    }
}

/// Deletes expired records every [`PURGE_INTERVAL`] until the server stops.
pub(crate) async fn purge_expired_records(store: Store) {
    loop {
        loop {
            match store.purge_idempotency_records(now()).await {
                Ok(true) => {}
                Ok(false) => break,
                Err(error) => {
                    tracing::warn!(%error, "cannot delete expired idempotency records; next attempt in 10 minutes");
                    break;
                }
            }
        }
        sleep(PURGE_INTERVAL).await;
    }
}

//! A lease in Redis: the right of one replica to run the request of an idempotency key. It is released on
//! drop, and expires if its process dies.

use std::sync::Arc;

use tokio::sync::mpsc;
use uuid::Uuid;

/// A write to Redis, which runs in the background.
#[derive(Debug)]
pub(super) enum LeaseWrite {
    /// Extends the lease.
    Renew { record_id: Arc<str>, token: Arc<str> },
    /// Ends the lease without a reply.
    Release { record_id: Arc<str>, token: Arc<str> },
    /// Ends the lease with a reply.
    StoreReply { record_id: Arc<str>, token: Arc<str>, caller: String, record: Arc<[u8]> },
}

/// A claimed idempotency key. Dropping it releases the lease.
#[derive(Debug)]
pub(super) struct Claim {
    record_id: Arc<str>,
    token: Arc<str>,
    writes: mpsc::Sender<LeaseWrite>,
    is_stored: bool,
}

impl Claim {
    pub(super) fn new(record_id: &str, writes: mpsc::Sender<LeaseWrite>) -> Self {
        let token = Uuid::now_v7().to_string().into();
        Claim { record_id: record_id.into(), token, writes, is_stored: false }
    }

    pub(super) fn token(&self) -> &str {
        &self.token
    }

    pub(super) fn renew(&self) {
        let (record_id, token) = (Arc::clone(&self.record_id), Arc::clone(&self.token));
        self.write(LeaseWrite::Renew { record_id, token });
    }

    pub(super) fn store_reply(mut self, caller: &str, record: Arc<[u8]>) {
        self.is_stored = true;
        let (record_id, token) = (Arc::clone(&self.record_id), Arc::clone(&self.token));
        self.write(LeaseWrite::StoreReply { record_id, token, caller: caller.to_owned(), record });
    }

    /// Dropped if the queue is full; the lease then expires.
    fn write(&self, write: LeaseWrite) {
        if self.writes.try_send(write).is_err() {
            metrics::counter!("hapa_cache_errors_total").increment(1);
        }
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if !self.is_stored {
            let (record_id, token) = (Arc::clone(&self.record_id), Arc::clone(&self.token));
            self.write(LeaseWrite::Release { record_id, token });
        }
    }
}

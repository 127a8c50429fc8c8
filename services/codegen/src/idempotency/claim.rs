//! The right of one replica to run the request of an idempotency key: a lease in Redis. It ends when
//! it is dropped, and by itself if its process dies.

use std::sync::Arc;

use tokio::sync::mpsc;
use uuid::Uuid;

/// What Redis is to be told. Nobody waits for it.
#[derive(Debug)]
pub(super) enum Write {
    /// The lease goes on.
    Renew { record_id: Arc<str>, token: Arc<str> },
    /// The lease ends without a reply.
    Release { record_id: Arc<str>, token: Arc<str> },
    /// The lease ends with a reply.
    Keep { record_id: Arc<str>, token: Arc<str>, caller: String, record: Arc<[u8]> },
}

/// See the module.
#[derive(Debug)]
pub(super) struct Claim {
    record_id: Arc<str>,
    token: Arc<str>,
    writes: mpsc::Sender<Write>,
    is_kept: bool,
}

impl Claim {
    pub(super) fn new(record_id: &str, writes: mpsc::Sender<Write>) -> Self {
        let token = Uuid::now_v7().to_string().into();
        Claim { record_id: record_id.into(), token, writes, is_kept: false }
    }

    pub(super) fn token(&self) -> &str {
        &self.token
    }

    pub(super) fn renew(&self) {
        let (record_id, token) = (Arc::clone(&self.record_id), Arc::clone(&self.token));
        self.write(Write::Renew { record_id, token });
    }

    pub(super) fn keep(mut self, caller: &str, record: Arc<[u8]>) {
        self.is_kept = true;
        let (record_id, token) = (Arc::clone(&self.record_id), Arc::clone(&self.token));
        self.write(Write::Keep { record_id, token, caller: caller.to_owned(), record });
    }

    /// What does not fit into the queue is not written: the lease then ends by itself.
    fn write(&self, write: Write) {
        if self.writes.try_send(write).is_err() {
            metrics::counter!("hapa_cache_errors_total").increment(1);
        }
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if !self.is_kept {
            let (record_id, token) = (Arc::clone(&self.record_id), Arc::clone(&self.token));
            self.write(Write::Release { record_id, token });
        }
    }
}

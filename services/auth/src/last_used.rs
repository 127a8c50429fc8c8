//! Tracks when key secrets were last used: in memory, written to the store in batches, so that no call
//! waits for the write.
//!
//! The write also moves a secret that is stored under the previous pepper to the current one.
//!
//! Services authenticate a cached key again every 45 s at the latest, and this tracker writes every
//! 10 s. The published time is therefore accurate to 60 s.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use hapa_core::timestamps::now;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use crate::pepper::CredentialHashes;
use crate::store::Store;

const FLUSH_INTERVAL: Duration = Duration::from_secs(10);
/// Uses that one transaction writes.
const FLUSH_BATCH_SIZE: usize = 1_000;
/// Maximum number of secrets between two writes. Uses beyond it are dropped; a later use is recorded.
const MAX_PENDING: usize = 100_000;

/// The time of the last unwritten use, by the hashes of the secret. Clones share it.
#[derive(Clone, Default)]
pub(crate) struct LastUsedTracker(Arc<Mutex<HashMap<CredentialHashes, i64>>>);

impl LastUsedTracker {
    pub(crate) fn record(&self, hashes: CredentialHashes) {
        let mut pending = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if pending.len() < MAX_PENDING || pending.contains_key(&hashes) {
            pending.insert(hashes, now());
        }
    }

    /// Writes every [`FLUSH_INTERVAL`] until shutdown, and then once more.
    pub(crate) async fn run(self, store: Store, shutdown: CancellationToken) {
        while shutdown.run_until_cancelled(sleep(FLUSH_INTERVAL)).await.is_some() {
            self.flush(&store).await;
        }
        self.flush(&store).await;
    }

    /// Writes the pending uses. Uses that cannot be written stay pending.
    async fn flush(&self, store: &Store) {
        let mut pending: Vec<_> = {
            let mut pending = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            pending.drain().collect()
        };
        // Rows are always locked in one order, so that transactions cannot deadlock.
        pending.sort();
        for uses in pending.chunks(FLUSH_BATCH_SIZE) {
            if let Err(error) = store.record_last_used(uses.to_vec()).await {
                tracing::warn!(%error, "cannot record the last use of keys; next attempt in 10 s");
                let mut pending = self.0.lock().unwrap_or_else(PoisonError::into_inner);
                for (hashes, time) in uses {
                    pending.entry(hashes.clone()).or_insert(*time);
                }
            }
        }
    }
}

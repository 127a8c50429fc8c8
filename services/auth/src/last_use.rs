//! When keys were last used: noted in memory, written in batches, so that no call pays for a write.
//!
//! A text that is kept under another pepper is kept under the own one from then on.
//!
//! Replicas ask again for a key every 45 s at the latest, and notes are written every 10 s: what is
//! shown is true to 60 s.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use hapa_core::timestamps::now;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use crate::pepper::Hashes;
use crate::store::Store;

const PAUSE: Duration = Duration::from_secs(10);
/// Texts in use between two writes; what is above is noted the next time.
const MOST: usize = 100_000;

/// By a text's hashes: its last use.
#[derive(Clone, Default)]
pub(crate) struct Uses(Arc<Mutex<HashMap<Hashes, i64>>>);

impl Uses {
    pub(crate) fn note(&self, hashes: Hashes) {
        let mut noted = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if noted.len() < MOST || noted.contains_key(&hashes) {
            noted.insert(hashes, now());
        }
    }

    /// Writes until the end, and then what is left.
    pub(crate) async fn write(self, store: Store, end: CancellationToken) {
        while end.run_until_cancelled(sleep(PAUSE)).await.is_some() {
            self.flush(&store).await;
        }
        self.flush(&store).await;
    }

    /// Writes what is noted; what can't be written is noted again.
    async fn flush(&self, store: &Store) {
        let mut noted: Vec<_> = {
            let mut noted = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            noted.drain().collect()
        };
        // Rows are always locked in one order.
        noted.sort();
        for uses in noted.chunks(1_000) {
            if let Err(error) = store.touch(uses.to_vec()).await {
                tracing::warn!(%error, "last uses of keys were not written; tried again later");
                let mut again = self.0.lock().unwrap_or_else(PoisonError::into_inner);
                for (hashes, time) in uses {
                    again.entry(hashes.clone()).or_insert(*time);
                }
            }
        }
    }
}

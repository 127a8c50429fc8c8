//! The answers in progress, by request, so that an identical request can join one: single flight.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use super::cache::{CacheGeneration, CacheKey};
use super::shared::{SharedStream, Subscription};

/// The caller, the cache generation if the response cache is used, and the request.
pub(super) type InFlightKey = (Arc<str>, Option<CacheGeneration>, CacheKey);

/// At most one stream for each key. An entry lives as long as its stream.
#[derive(Clone, Default)]
pub(super) struct InFlightRequests(Arc<Mutex<HashMap<InFlightKey, Weak<SharedStream>>>>);

/// The entry of a stream. Dropping it removes the entry.
pub(super) struct InFlightEntry {
    requests: InFlightRequests,
    key: InFlightKey,
}

impl InFlightRequests {
    /// Subscribes to the stream of an identical request if there is one that can be joined, or else to a new one.
    /// `start` runs under the lock, so that two identical requests never start two streams.
    pub(super) fn get_or_start(
        &self,
        key: InFlightKey,
        subscribe: impl FnOnce(&Arc<SharedStream>) -> Option<Subscription>,
        start: impl FnOnce(InFlightEntry) -> Subscription,
    ) -> Subscription {
        // Declared before the lock and dropped after it, because dropping the last reference takes the lock too.
        let existing;
        let mut streams = self.lock();
        existing = streams.get(&key).and_then(Weak::upgrade);
        if let Some(subscription) = existing.as_ref().and_then(subscribe) {
            return subscription;
        }
        let entry = InFlightEntry { requests: self.clone(), key: key.clone() };
        let subscription = start(entry);
        streams.insert(key, Arc::downgrade(subscription.stream()));
        subscription
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<InFlightKey, Weak<SharedStream>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for InFlightEntry {
    fn drop(&mut self) {
        let mut streams = self.requests.lock();
        // A newer stream may have replaced the entry.
        if streams.get(&self.key).is_some_and(|other| other.strong_count() == 0) {
            streams.remove(&self.key);
        }
    }
}

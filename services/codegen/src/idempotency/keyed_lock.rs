//! Mutexes by name: one holder at a time, in order of arrival. An unused name takes no memory.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::{Mutex as AsyncMutex, OwnedMutexGuard};

type LockMap = Arc<Mutex<HashMap<Arc<str>, Arc<AsyncMutex<()>>>>>;

/// The named locks of this process.
#[derive(Debug, Default)]
pub(super) struct KeyedLocks(LockMap);

/// Holds a lock until dropped. The order of the fields matters: the guard is dropped before its entry.
#[derive(Debug)]
pub(super) struct KeyedLockGuard {
    _guard: OwnedMutexGuard<()>,
    _entry: LockEntry,
}

/// A holder of a lock, or a waiter for it.
#[derive(Debug)]
struct LockEntry {
    map: LockMap,
    name: Arc<str>,
    mutex: Arc<AsyncMutex<()>>,
}

impl KeyedLocks {
    pub(super) async fn lock(&self, name: &str) -> KeyedLockGuard {
        let entry = self.entry(name);
        let guard = Arc::clone(&entry.mutex).lock_owned().await;
        KeyedLockGuard { _guard: guard, _entry: entry }
    }

    fn entry(&self, name: &str) -> LockEntry {
        let name: Arc<str> = name.into();
        let mut map = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mutex = Arc::clone(map.entry(Arc::clone(&name)).or_default());
        LockEntry { map: Arc::clone(&self.0), name, mutex }
    }
}

impl Drop for LockEntry {
    fn drop(&mut self) {
        let mut map = self.map.lock().unwrap_or_else(PoisonError::into_inner);
        // Only the map's reference and this one are left: no other holder or waiter exists.
        if Arc::strong_count(&self.mutex) == 2 {
            map.remove(&self.name);
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;

    #[tokio::test]
    async fn a_name_has_one_holder_at_a_time_and_unused_names_are_removed() {
        let locks = KeyedLocks::default();
        let first = locks.lock("a").await;
        assert!(locks.lock("b").now_or_never().is_some(), "another name");
        let mut second = Box::pin(locks.lock("a"));
        assert!(second.as_mut().now_or_never().is_none());
        let third = Box::pin(locks.lock("a"));
        drop(third);
        drop(first);
        let second = second.await;
        let mut fourth = Box::pin(locks.lock("a"));
        assert!(fourth.as_mut().now_or_never().is_none());
        drop(second);
        drop(fourth.await);
        assert!(locks.0.lock().unwrap().is_empty());
    }

    #[tokio::test]
    async fn a_lock_granted_to_a_cancelled_waiter_goes_to_the_next() {
        let locks = KeyedLocks::default();
        let first = locks.lock("a").await;
        let mut second = Box::pin(locks.lock("a"));
        assert!(second.as_mut().now_or_never().is_none());
        drop(first);
        drop(second);
        assert!(locks.lock("a").now_or_never().is_some());
        assert!(locks.0.lock().unwrap().is_empty());
    }
}

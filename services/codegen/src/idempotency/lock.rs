//! Locks by name: one holder at a time, first come first served. A name without holders takes no room.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::{Mutex as AsyncMutex, OwnedMutexGuard};

type Map = Arc<Mutex<HashMap<Arc<str>, Arc<AsyncMutex<()>>>>>;

/// The locks of this process.
#[derive(Debug, Default)]
pub(super) struct Locks(Map);

/// Held until dropped. The order of the fields matters: the guard is dropped before its entry.
#[derive(Debug)]
pub(super) struct Lock {
    _guard: OwnedMutexGuard<()>,
    _entry: Entry,
}

/// One who holds a lock or waits for it.
#[derive(Debug)]
struct Entry {
    map: Map,
    name: Arc<str>,
    mutex: Arc<AsyncMutex<()>>,
}

impl Locks {
    pub(super) async fn lock(&self, name: &str) -> Lock {
        let entry = self.entry(name);
        let guard = Arc::clone(&entry.mutex).lock_owned().await;
        Lock { _guard: guard, _entry: entry }
    }

    fn entry(&self, name: &str) -> Entry {
        let name: Arc<str> = name.into();
        let mut map = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mutex = Arc::clone(map.entry(Arc::clone(&name)).or_default());
        Entry { map: Arc::clone(&self.0), name, mutex }
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        let mut map = self.map.lock().unwrap_or_else(PoisonError::into_inner);
        // The map's own and this one: nobody else holds it or waits for it.
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
    async fn one_holds_a_name_at_a_time_and_those_who_leave_make_room() {
        let locks = Locks::default();
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
    async fn a_lock_that_was_given_to_one_who_left_goes_to_the_next() {
        let locks = Locks::default();
        let first = locks.lock("a").await;
        let mut second = Box::pin(locks.lock("a"));
        assert!(second.as_mut().now_or_never().is_none());
        drop(first);
        drop(second);
        assert!(locks.lock("a").now_or_never().is_some());
        assert!(locks.0.lock().unwrap().is_empty());
    }
}

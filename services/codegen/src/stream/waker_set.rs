//! Wakes all tasks that wait for the same stream. The stream is polled with the waker of the set.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Wake, Waker};

/// The wakers of waiting readers, by reader.
#[derive(Default)]
pub(super) struct WakerSet(Mutex<Vec<(u64, Waker)>>);

impl WakerSet {
    /// Registers the waker of a reader, instead of its previous one.
    pub(super) fn insert(&self, reader: u64, waker: &Waker) {
        let mut wakers = self.lock();
        match wakers.iter_mut().find(|(other, _)| *other == reader) {
            Some((_, known)) => known.clone_from(waker),
            None => wakers.push((reader, waker.clone())),
        }
    }

    pub(super) fn remove(&self, reader: u64) {
        self.lock().retain(|(other, _)| *other != reader);
    }

    pub(super) fn wake_all(&self) {
        let waiting = std::mem::take(&mut *self.lock());
        for (_, waker) in waiting {
            waker.wake();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<(u64, Waker)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Wake for WakerSet {
    fn wake(self: Arc<Self>) {
        self.wake_all();
    }
}

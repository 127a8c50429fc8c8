//! One answer for all who ask the same at the same time: a [`List`] of what is on its way, and
//! [`Shared`], which any of its readers moves on for all of them.
//!
//! Whoever is asked for news reads the source inside of its own poll, and wakes the others. So there is
//! no task and no channel: an answer moves only while someone reads, and the source goes with the last
//! reader. No lock is held while anyone waits, so a reader who stands still holds up nobody else.

use std::collections::{BTreeMap, HashMap};
use std::hash::Hash;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll, Wake, Waker};

use futures_util::Stream;

/// What is read, piece by piece.
pub(crate) type Source<T> = Pin<Box<dyn Stream<Item = T> + Send>>;

/// What readers know of a source together.
pub(crate) trait Gathered {
    type Piece;

    /// None where nothing more will be read.
    fn source(&mut self) -> Option<&mut Source<Self::Piece>>;

    /// Takes a piece; none is the end.
    fn take(&mut self, piece: Option<Self::Piece>);
}

/// See the module.
pub(crate) struct Shared<S> {
    state: Mutex<S>,
    bell: Arc<Bell>,
    /// Rings the bell.
    waker: Waker,
}

impl<S: Gathered> Shared<S> {
    pub(crate) fn new(state: S) -> Self {
        let bell = Arc::new(Bell::default());
        Shared { state: Mutex::new(state), waker: Waker::from(Arc::clone(&bell)), bell }
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, S> {
        lock(&self.state)
    }

    /// What `look` finds for a reader of this number, once it finds something; the source is read until
    /// it does. None where there is nothing more to find.
    pub(crate) fn poll<T>(
        &self,
        reader: u64,
        cx: &mut Context<'_>,
        mut look: impl FnMut(&mut S) -> Option<T>,
    ) -> Poll<Option<T>> {
        let mut state = self.state();
        loop {
            if let Some(found) = look(&mut state) {
                return Poll::Ready(Some(found));
            }
            let Some(source) = state.source() else { return Poll::Ready(None) };
            // Before the source is read, so that what it says in between rings for this one too.
            self.bell.add(reader, cx.waker());
            let read = source.as_mut().poll_next(&mut Context::from_waker(&self.waker));
            let Poll::Ready(piece) = read else { return Poll::Pending };
            state.take(piece);
            self.bell.remove(reader);
            self.bell.ring();
        }
    }

    /// A reader who has left is not woken.
    pub(crate) fn leave(&self, reader: u64) {
        self.bell.remove(reader);
    }
}

/// Wakes everyone who waits for the same source.
#[derive(Default)]
struct Bell(Mutex<BTreeMap<u64, Waker>>);

impl Bell {
    fn add(&self, reader: u64, waker: &Waker) {
        lock(&self.0).entry(reader).or_insert_with(|| waker.clone()).clone_from(waker);
    }

    fn remove(&self, reader: u64) {
        lock(&self.0).remove(&reader);
    }

    fn ring(&self) {
        let waiting = std::mem::take(&mut *lock(&self.0));
        waiting.into_values().for_each(Waker::wake);
    }
}

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        self.ring();
    }
}

/// What is on its way now, by what was asked: one of each name, and none for longer than it lives.
pub(crate) struct List<K, F>(Arc<Mutex<HashMap<K, Weak<F>>>>);

/// A place in a list, given back when it is dropped.
pub(crate) struct Listing<K: Eq + Hash, F> {
    list: List<K, F>,
    name: K,
}

impl<K: Eq + Hash + Clone, F> List<K, F> {
    /// A seat in what is on its way under this name, where there is any and it has one.
    pub(crate) fn join<T>(
        &self,
        name: &K,
        sit_down: impl FnOnce(&Arc<F>) -> Option<T>,
    ) -> Option<T> {
        let found = lock(&self.0).get(name).and_then(Weak::upgrade);
        sit_down(&found?)
    }

    /// The same; where there is none, what begins now. `begin` runs while nobody else can join.
    pub(crate) fn join_or<T>(
        &self,
        name: K,
        sit_down: impl FnOnce(&Arc<F>) -> Option<T>,
        begin: impl FnOnce(Listing<K, F>) -> (Arc<F>, T),
    ) -> T {
        // Declared before the lock, and so dropped after it: the last of it takes the lock too.
        let found;
        let mut list = lock(&self.0);
        found = list.get(&name).and_then(Weak::upgrade);
        if let Some(seat) = found.as_ref().and_then(sit_down) {
            return seat;
        }
        let (flight, seat) = begin(Listing { list: self.clone(), name: name.clone() });
        list.insert(name, Arc::downgrade(&flight));
        seat
    }
}

impl<K, F> Clone for List<K, F> {
    fn clone(&self) -> Self {
        List(Arc::clone(&self.0))
    }
}

impl<K, F> Default for List<K, F> {
    fn default() -> Self {
        List(Arc::default())
    }
}

impl<K: Eq + Hash, F> Drop for Listing<K, F> {
    fn drop(&mut self) {
        let mut list = lock(&self.list.0);
        // Another may have its name by now.
        if list.get(&self.name).is_some_and(|other| other.strong_count() == 0) {
            list.remove(&self.name);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

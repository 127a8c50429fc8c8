//! Counters by subject and method, behind several locks, bounded in number.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// So many locks, so that cores don't queue for one.
const SHARDS: usize = 16;
/// From this many subjects on a shard drops those that have nothing to say any more.
pub(super) const CROWDED: usize = 4096;
/// At this many that all have something to say a shard begins anew: a limit that starts over is
/// better than a process without memory.
pub(super) const MOST: usize = 65_536;

/// What is kept per subject and method.
pub(super) trait Entry {
    /// Whether it can be dropped without a difference to any decision.
    fn is_over(&self, now: Instant) -> bool;
}

/// As many entries as there are subjects in use times their methods.
#[derive(Debug)]
pub(super) struct Shards<T>(Box<[Mutex<Shard<T>>; SHARDS]>);

impl<T> Default for Shards<T> {
    fn default() -> Self {
        Shards(Box::new(std::array::from_fn(|_| Mutex::default())))
    }
}

impl<T: Entry> Shards<T> {
    /// Works on an entry, which is made first where there is none.
    pub(super) fn with<R>(
        &self,
        (subject, method): (&str, &'static str),
        now: Instant,
        make: impl FnOnce() -> T,
        work: impl FnOnce(&mut T) -> R,
    ) -> R {
        let mut shard = self.shard(subject);
        if let Some(entry) = shard.entry(subject, method) {
            return work(entry);
        }
        let mut entry = make();
        let done = work(&mut entry);
        shard.keep(subject, method, entry, now);
        done
    }

    /// Reads or changes an entry where there is one.
    pub(super) fn find<R>(
        &self,
        subject: &str,
        method: &str,
        work: impl FnOnce(&mut T) -> R,
    ) -> Option<R> {
        self.shard(subject).entry(subject, method).map(work)
    }

    /// Subject and method of the entries that are wanted.
    pub(super) fn select(&self, is_wanted: impl Fn(&T) -> bool) -> Vec<(Box<str>, &'static str)> {
        let mut selected = Vec::new();
        for shard in &*self.0 {
            let shard = shard.lock().unwrap_or_else(PoisonError::into_inner);
            for (subject, methods) in &shard.subjects {
                let wanted = methods.iter().filter(|(_, entry)| is_wanted(entry));
                selected.extend(wanted.map(|(method, _)| (subject.clone(), *method)));
            }
        }
        selected
    }

    fn shard(&self, subject: &str) -> MutexGuard<'_, Shard<T>> {
        let sum =
            subject.bytes().fold(0usize, |sum, byte| sum.wrapping_mul(31) + usize::from(byte));
        self.0[sum % SHARDS].lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[derive(Debug)]
struct Shard<T> {
    /// A subject calls few methods: looking through them is faster than a second hash.
    subjects: HashMap<Box<str>, Vec<(&'static str, T)>>,
    /// Grows with what a sweep leaves, so that sweeps stay rare.
    sweep_at: usize,
}

impl<T> Default for Shard<T> {
    fn default() -> Self {
        Shard { subjects: HashMap::new(), sweep_at: 0 }
    }
}

impl<T: Entry> Shard<T> {
    fn entry(&mut self, subject: &str, method: &str) -> Option<&mut T> {
        let methods = self.subjects.get_mut(subject)?;
        methods.iter_mut().find(|(name, _)| *name == method).map(|(_, entry)| entry)
    }

    fn keep(&mut self, subject: &str, method: &'static str, entry: T, now: Instant) {
        if self.subjects.len() >= self.sweep_at.max(CROWDED) {
            self.sweep(now);
        }
        self.subjects.entry(subject.into()).or_default().push((method, entry));
    }

    fn sweep(&mut self, now: Instant) {
        self.subjects.retain(|_, methods| methods.iter().any(|(_, entry)| !entry.is_over(now)));
        if self.subjects.len() >= MOST {
            self.subjects.clear();
        }
        self.sweep_at = (self.subjects.len() * 2).min(MOST);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[derive(Clone, Copy)]
    struct Until(Instant);

    impl Entry for Until {
        fn is_over(&self, now: Instant) -> bool {
            now >= self.0
        }
    }

    #[test]
    fn what_has_nothing_to_say_any_more_is_dropped_and_the_rest_is_bounded() {
        let (mut shard, now) = (Shard::default(), Instant::now());
        let later = now + Duration::from_mins(2);
        for subject in 0..CROWDED {
            shard.keep(&subject.to_string(), "/x", Until(later), now);
        }
        shard.keep("late", "/x", Until(later), later);
        assert_eq!(shard.subjects.len(), 1);
        for subject in 0..MOST {
            shard.keep(&subject.to_string(), "/x", Until(later), now);
        }
        assert!(shard.subjects.len() <= MOST);
    }
}

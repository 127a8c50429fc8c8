//! A bounded map of counters by subject and method, divided among several locks.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// Number of locks, so that processor cores do not contend for one.
const SHARD_COUNT: usize = 16;
/// Minimum number of subjects at which a shard removes expired entries.
const SWEEP_THRESHOLD: usize = 4096;
/// Maximum number of subjects in a shard. If none of them has expired, the shard is cleared: limits that start over are
/// better than a process without memory.
const MAX_SUBJECTS: usize = 65_536;

/// An entry of the map.
pub(super) trait Expiring {
    /// Whether the removal of the entry would change no decision.
    fn is_expired(&self, now: Instant) -> bool;
}

/// One entry per active subject and method.
#[derive(Debug)]
pub(super) struct Shards<T>(Box<[Mutex<Shard<T>>; SHARD_COUNT]>);

impl<T> Default for Shards<T> {
    fn default() -> Self {
        Shards(Box::new(std::array::from_fn(|_| Mutex::default())))
    }
}

impl<T: Expiring> Shards<T> {
    /// Calls `work` with an entry, which is created if it does not exist.
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
        let result = work(&mut entry);
        shard.insert(subject, method, entry, now);
        result
    }

    /// Calls `work` with an entry, if it exists.
    pub(super) fn find<R>(
        &self,
        subject: &str,
        method: &str,
        work: impl FnOnce(&mut T) -> R,
    ) -> Option<R> {
        self.shard(subject).entry(subject, method).map(work)
    }

    /// Subject and method of the entries that match.
    pub(super) fn select(&self, is_match: impl Fn(&T) -> bool) -> Vec<(Box<str>, &'static str)> {
        let mut selected = Vec::new();
        for shard in &*self.0 {
            let shard = shard.lock().unwrap_or_else(PoisonError::into_inner);
            for (subject, methods) in &shard.subjects {
                let matches = methods.iter().filter(|(_, entry)| is_match(entry));
                selected.extend(matches.map(|(method, _)| (subject.clone(), *method)));
            }
        }
        selected
    }

    fn shard(&self, subject: &str) -> MutexGuard<'_, Shard<T>> {
        let sum =
            subject.bytes().fold(0usize, |sum, byte| sum.wrapping_mul(31) + usize::from(byte));
        self.0[sum % SHARD_COUNT].lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[derive(Debug)]
struct Shard<T> {
    /// A subject calls few methods, so a linear search is faster than a second hash.
    subjects: HashMap<Box<str>, Vec<(&'static str, T)>>,
    /// Number of subjects at which the next sweep runs. It grows with the rest after a sweep, so that sweeps are rare.
    sweep_at: usize,
}

impl<T> Default for Shard<T> {
    fn default() -> Self {
        Shard { subjects: HashMap::new(), sweep_at: 0 }
    }
}

impl<T: Expiring> Shard<T> {
    fn entry(&mut self, subject: &str, method: &str) -> Option<&mut T> {
        let methods = self.subjects.get_mut(subject)?;
        methods.iter_mut().find(|(name, _)| *name == method).map(|(_, entry)| entry)
    }

    fn insert(&mut self, subject: &str, method: &'static str, entry: T, now: Instant) {
        if self.subjects.len() >= self.sweep_at.max(SWEEP_THRESHOLD) {
            self.sweep(now);
        }
        self.subjects.entry(subject.into()).or_default().push((method, entry));
    }

    fn sweep(&mut self, now: Instant) {
        self.subjects.retain(|_, methods| methods.iter().any(|(_, entry)| !entry.is_expired(now)));
        if self.subjects.len() >= MAX_SUBJECTS {
            self.subjects.clear();
        }
        self.sweep_at = (self.subjects.len() * 2).min(MAX_SUBJECTS);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[derive(Clone, Copy)]
    struct ExpiresAt(Instant);

    impl Expiring for ExpiresAt {
        fn is_expired(&self, now: Instant) -> bool {
            now >= self.0
        }
    }

    #[test]
    fn expired_entries_are_removed_and_the_rest_is_bounded() {
        let (mut shard, now) = (Shard::default(), Instant::now());
        let later = now + Duration::from_mins(2);
        for subject in 0..SWEEP_THRESHOLD {
            shard.insert(&subject.to_string(), "/x", ExpiresAt(later), now);
        }
        shard.insert("late", "/x", ExpiresAt(later), later);
        assert_eq!(shard.subjects.len(), 1);
        for subject in 0..MAX_SUBJECTS {
            shard.insert(&subject.to_string(), "/x", ExpiresAt(later), now);
        }
        assert!(shard.subjects.len() <= MAX_SUBJECTS);
    }
}

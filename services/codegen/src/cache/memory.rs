//! Answers kept in this process: at most so many, and at most so many bytes; the one that was read
//! longest ago goes first.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use moka::notification::RemovalCause;
use moka::policy::EvictionPolicy;
use moka::sync::Cache;
use prost::Message as _;

use super::entry::Entry;
use super::key::Key;
use super::store::{Era, Held, Looked};

/// The most that all answers are together.
const MOST_BYTES: u64 = 64 * 1024 * 1024;

pub(super) struct Memory {
    entries: Cache<(Era, Key), Arc<Entry>>,
    /// Part of every key, so that clearing is one step that nothing slips through.
    era: RwLock<Era>,
    counts: Arc<Counts>,
}

#[derive(Default)]
struct Counts {
    bytes: AtomicU64,
    evictions: AtomicU64,
}

impl Memory {
    pub(super) fn new(capacity: u32, ttl: Duration) -> Self {
        let counts = Arc::new(Counts::default());
        let counting = Arc::clone(&counts);
        // Each weighs as if there were as many as there may be: so neither bound is passed.
        let least = u32::try_from(MOST_BYTES / u64::from(capacity)).unwrap_or(u32::MAX).max(1);
        let entries = Cache::builder()
            .max_capacity(u64::from(least) * u64::from(capacity))
            .weigher(move |_, entry: &Arc<Entry>| size(entry).max(least))
            .eviction_policy(EvictionPolicy::lru())
            .time_to_live(ttl)
            .eviction_listener(move |_, entry, cause| {
                counting.bytes.fetch_sub(size(&entry).into(), Ordering::Relaxed);
                if cause == RemovalCause::Size {
                    counting.evictions.fetch_add(1, Ordering::Relaxed);
                }
            })
            .build();
        Memory { entries, era: RwLock::new(Era::new()), counts }
    }

    fn era(&self) -> Era {
        self.era.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn look(&self, key: Key, reads: bool) -> Looked {
        let era = self.era();
        let answer = if reads { self.entries.get(&(era.clone(), key)) } else { None };
        Looked { answer, era: Some(era), failed: None }
    }

    /// Keeps an answer that was asked for in this era; one from before a clearing is never found.
    pub(super) fn keep(&self, key: Key, era: Era, entry: Entry) {
        if era != self.era() {
            return;
        }
        let entry = Arc::new(entry);
        self.counts.bytes.fetch_add(size(&entry).into(), Ordering::Relaxed);
        self.entries.insert((era, key), entry);
    }

    pub(super) fn clear(&self) -> u64 {
        self.entries.run_pending_tasks();
        let entries = self.entries.entry_count();
        *self.era.write().unwrap_or_else(PoisonError::into_inner) = Era::new();
        self.entries.invalidate_all();
        entries
    }

    pub(super) fn held(&self) -> Held {
        self.entries.run_pending_tasks();
        Held {
            entries: Some(self.entries.entry_count()),
            bytes: Some(self.counts.bytes.load(Ordering::Relaxed)),
            evictions: self.counts.evictions.load(Ordering::Relaxed),
        }
    }
}

fn size(entry: &Entry) -> u32 {
    u32::try_from(entry.encoded_len()).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use hapa_proto::codegen::v1::stream_generate_code_response::{Delta, Finished};

    use super::super::key::Question;
    use super::*;

    fn key(number: u32) -> Key {
        let body = number.to_be_bytes();
        Key::of(Question { tenant: None, model: "m", revision: "", body: &body })
    }

    fn answer(bytes: usize) -> Entry {
        let parts = vec![Delta { text: "x".repeat(bytes), kind: 1 }];
        Entry { parts, finished: Some(Finished::default()) }
    }

    fn keep(memory: &Memory, number: u32, entry: Entry) {
        let era = memory.look(key(number), false).era.unwrap();
        memory.keep(key(number), era, entry);
    }

    const TTL: Duration = Duration::from_hours(1);

    #[test]
    fn there_are_never_more_than_so_many_nor_so_many_bytes() {
        let memory = Memory::new(10, TTL);
        for number in 0..30 {
            keep(&memory, number, answer(100));
        }
        let held = memory.held();
        assert_eq!((held.entries, held.evictions), (Some(10), 20));
        assert!(memory.look(key(29), true).answer.is_some(), "the newest is there");
        assert!(memory.look(key(0), true).answer.is_none());
        let memory = Memory::new(1_000, TTL);
        for number in 0..200 {
            keep(&memory, number, answer(1_000_000));
        }
        let bytes = memory.held().bytes.unwrap();
        assert!((MOST_BYTES / 2..=MOST_BYTES).contains(&bytes), "{bytes}");
    }

    #[test]
    fn what_was_asked_for_before_a_clearing_is_not_kept_after_it() {
        let memory = Memory::new(10, TTL);
        keep(&memory, 1, answer(1));
        let before = memory.look(key(2), true).era.unwrap();
        assert_eq!(memory.clear(), 1);
        memory.keep(key(2), before, answer(1));
        assert!(memory.look(key(1), true).answer.is_none());
        assert!(memory.look(key(2), true).answer.is_none());
        keep(&memory, 2, answer(1));
        assert!(memory.look(key(2), true).answer.is_some());
        let held = memory.held();
        assert_eq!(held.entries, Some(1));
        assert_eq!(held.bytes, Some(size(&answer(1)).into()));
    }
}

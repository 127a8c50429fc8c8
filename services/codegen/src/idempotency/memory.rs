//! In-memory store of replies, limited in number, in bytes and in number per caller. The oldest replies
//! are evicted first.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex, PoisonError};

use hapa_core::idempotency::{IdempotentRequest, RECORD_TTL};
use tokio::time::Instant;

use super::{MAX_BYTES, MAX_RECORDS, MAX_RECORDS_PER_CALLER};

/// The stored replies of this process.
#[derive(Debug, Default)]
pub(super) struct ReplyMemory(Mutex<ReplyRecords>);

#[derive(Debug, Default)]
struct ReplyRecords {
    by_id: HashMap<Arc<str>, StoredReply>,
    /// Ids in the order of insertion, which is also the order of expiry.
    by_age: BTreeMap<u64, Arc<str>>,
    by_caller: HashMap<Arc<str>, BTreeSet<u64>>,
    bytes: usize,
    next: u64,
}

#[derive(Debug)]
struct StoredReply {
    sealed: Arc<[u8]>,
    caller: Arc<str>,
    number: u64,
    expires: Instant,
}

impl ReplyMemory {
    pub(super) fn get(&self, record_id: &str) -> Option<Arc<[u8]>> {
        let mut records = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        records.remove_expired(Instant::now());
        records.by_id.get(record_id).map(|record| Arc::clone(&record.sealed))
    }

    pub(super) fn insert(&self, request: &IdempotentRequest, sealed: Arc<[u8]>) {
        let mut records = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        records.remove_expired(Instant::now());
        records.insert(request.record_id(), request.caller(), sealed);
    }
}

impl ReplyRecords {
    fn insert(&mut self, record_id: &str, caller: &str, sealed: Arc<[u8]>) {
        self.remove(record_id);
        let (record_id, caller, number): (Arc<str>, Arc<str>, _) =
            (record_id.into(), caller.into(), self.next);
        self.next += 1;
        self.bytes += sealed.len();
        self.by_age.insert(number, Arc::clone(&record_id));
        let own = self.by_caller.entry(Arc::clone(&caller)).or_default();
        own.insert(number);
        let oldest_own = own.first().copied().filter(|_| own.len() > MAX_RECORDS_PER_CALLER);
        let expires = Instant::now() + RECORD_TTL;
        self.by_id.insert(record_id, StoredReply { sealed, caller, number, expires });
        if let Some(number) = oldest_own {
            self.remove_number(number);
        }
        while self.by_id.len() > MAX_RECORDS || self.bytes > MAX_BYTES {
            let Some((&oldest, _)) = self.by_age.first_key_value() else { break };
            self.remove_number(oldest);
        }
    }

    fn remove_expired(&mut self, now: Instant) {
        while let Some((&oldest, record_id)) = self.by_age.first_key_value() {
            if self.by_id.get(record_id).is_some_and(|record| record.expires > now) {
                break;
            }
            self.remove_number(oldest);
        }
    }

    fn remove_number(&mut self, number: u64) {
        if let Some(record_id) = self.by_age.get(&number).cloned() {
            self.remove(&record_id);
        }
    }

    fn remove(&mut self, record_id: &str) {
        let Some(StoredReply { sealed, caller, number, .. }) = self.by_id.remove(record_id) else {
            return;
        };
        self.bytes -= sealed.len();
        self.by_age.remove(&number);
        if let Some(own) = self.by_caller.get_mut(&caller) {
            own.remove(&number);
            if own.is_empty() {
                self.by_caller.remove(&caller);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn insert(records: &mut ReplyRecords, id: usize, caller: &str, bytes: usize) {
        records.insert(&id.to_string(), caller, vec![0; bytes].into());
    }

    fn has(records: &ReplyRecords, id: usize) -> bool {
        records.by_id.contains_key(id.to_string().as_str())
    }

    fn check(records: &ReplyRecords) {
        let bytes: usize = records.by_id.values().map(|record| record.sealed.len()).sum();
        assert_eq!(records.bytes, bytes);
        assert_eq!(records.by_age.len(), records.by_id.len());
        let own: usize = records.by_caller.values().map(BTreeSet::len).sum();
        assert_eq!(own, records.by_id.len());
        assert!(records.by_caller.values().all(|own| !own.is_empty()));
    }

    #[tokio::test]
    async fn one_caller_cannot_exceed_its_share() {
        let mut records = ReplyRecords::default();
        insert(&mut records, 1_000_000, "quiet", 10);
        for id in 0..=MAX_RECORDS_PER_CALLER {
            insert(&mut records, id, "busy", 10);
        }
        assert!(has(&records, 1_000_000) && !has(&records, 0) && has(&records, 1));
        assert_eq!(records.by_id.len(), MAX_RECORDS_PER_CALLER + 1);
        check(&records);
    }

    #[tokio::test]
    async fn number_and_bytes_are_limited_and_the_oldest_are_evicted_first() {
        let mut records = ReplyRecords::default();
        for id in 0..=MAX_RECORDS {
            insert(&mut records, id, &(id % 100).to_string(), 10);
        }
        assert!(!has(&records, 0) && has(&records, 1) && has(&records, MAX_RECORDS));
        insert(&mut records, 1_000_000, "large", MAX_BYTES - 15);
        assert_eq!(records.by_id.len(), 2);
        check(&records);
        // Inserting the same id again replaces the reply.
        insert(&mut records, 1_000_000, "large", 10);
        assert_eq!((records.by_id.len(), records.bytes), (2, 20));
        check(&records);
    }

    #[tokio::test(start_paused = true)]
    async fn a_reply_expires_after_a_day() {
        let mut records = ReplyRecords::default();
        insert(&mut records, 1, "a", 10);
        tokio::time::advance(RECORD_TTL / 2).await;
        insert(&mut records, 2, "a", 10);
        tokio::time::advance((RECORD_TTL / 2).saturating_sub(Duration::from_secs(1))).await;
        records.remove_expired(Instant::now());
        assert!(has(&records, 1));
        tokio::time::advance(Duration::from_secs(1)).await;
        records.remove_expired(Instant::now());
        assert!(!has(&records, 1) && has(&records, 2));
        check(&records);
    }
}

//! The changes that auth has reported, and the principals that they concern.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use hapa_proto::auth::v1::{Revocation, WatchRevocationsResponse};
use tokio::time::Instant;

use super::cached_principal::{CACHE_TTL, CachedPrincipal, UNVERIFIED_TTL};

/// How long changes are kept for answers that are still on their way.
const RECENT_CHANGE_TTL: Duration = Duration::from_secs(30);
/// Maximum number of changes that are kept.
const MAX_RECENT_CHANGES: usize = 10_000;
/// The list of principals is cleaned up when it has doubled, but not below this size.
const MIN_CLEANUP_SIZE: usize = 1_024;

/// The state of revocations: decides whether a cached principal is still valid.
pub(super) struct RevocationState {
    start: Instant,
    /// The last message of auth, in microseconds since `start`; 0: none yet.
    last_message: AtomicU64,
    changes: Mutex<Changes>,
}

#[derive(Default)]
struct Changes {
    /// The generation of the last change.
    generation: i64,
    /// Answers of an earlier generation are invalid.
    min_generation: i64,
    recent: VecDeque<(Instant, Revocation)>,
    /// Every principal that a change may concern.
    principals: Vec<Weak<CachedPrincipal>>,
    cleanup_size: usize,
    /// Principals with calls in progress that must be rechecked.
    pending_recheck: Vec<Weak<CachedPrincipal>>,
}

impl Changes {
    fn live_principals(&self) -> Vec<Arc<CachedPrincipal>> {
        self.principals.iter().filter_map(Weak::upgrade).collect()
    }

    /// Forgets changes that are too old or too many.
    fn trim(&mut self, now: Instant) {
        while let Some((at, change)) = self.recent.front() {
            let is_expired = now.saturating_duration_since(*at) > RECENT_CHANGE_TTL;
            if !is_expired && self.recent.len() <= MAX_RECENT_CHANGES {
                break;
            }
            // A late answer must not miss a change that is forgotten early.
            if !is_expired {
                self.min_generation = self.min_generation.max(change.generation);
            }
            self.recent.pop_front();
        }
    }
}

impl RevocationState {
    pub(super) fn new() -> Self {
        let last_message = AtomicU64::new(0);
        RevocationState { start: Instant::now(), last_message, changes: Mutex::default() }
    }

    fn changes(&self) -> MutexGuard<'_, Changes> {
        self.changes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn generation(&self) -> i64 {
        self.changes().generation
    }

    /// Whether auth would give the same answer.
    pub(super) fn is_valid(&self, principal: &CachedPrincipal) -> bool {
        let now = Instant::now();
        let verified = match self.last_message.load(Ordering::Acquire) {
            0 => principal.asked,
            micros => (self.start + Duration::from_micros(micros)).max(principal.asked),
        };
        !principal.is_stale()
            && !principal.has_expired()
            && now.saturating_duration_since(verified) < UNVERIFIED_TTL
            && now.saturating_duration_since(principal.asked) < CACHE_TTL
    }

    /// Every principal that the cache or a call in progress still holds.
    pub(super) fn live_principals(&self) -> Vec<Arc<CachedPrincipal>> {
        self.changes().live_principals()
    }

    /// Takes the principals with calls in progress that must be rechecked. A principal without calls stays in the
    /// list, because a call that was just admitted may not have started yet.
    pub(super) fn take_pending_rechecks(&self) -> Vec<Arc<CachedPrincipal>> {
        let mut changes = self.changes();
        let pending = std::mem::take(&mut changes.pending_recheck);
        let (active, idle): (Vec<_>, Vec<_>) = pending
            .iter()
            .filter_map(Weak::upgrade)
            .filter(|principal| !principal.ended.is_cancelled())
            .partition(|principal| principal.has_active_calls());
        changes.pending_recheck = idle.iter().map(Arc::downgrade).collect();
        active
    }

    /// Marks a principal for the next recheck.
    pub(super) fn mark_for_recheck(&self, principal: &Arc<CachedPrincipal>) {
        self.changes().pending_recheck.push(Arc::downgrade(principal));
    }

    /// Inserts a new answer and applies the changes since it left auth.
    pub(super) fn insert(&self, principal: CachedPrincipal) -> Arc<CachedPrincipal> {
        let (principal, mut changes) = (Arc::new(principal), self.changes());
        if principal.generation < changes.min_generation {
            principal.mark_stale();
        }
        for (_, change) in changes.recent.iter().filter(|(_, change)| principal.matches(change)) {
            principal.apply(change);
        }
        changes.principals.push(Arc::downgrade(&principal));
        if changes.principals.len() > changes.cleanup_size {
            changes.principals.retain(|principal| principal.strong_count() > 0);
            changes.cleanup_size = (changes.principals.len() * 2).max(MIN_CLEANUP_SIZE);
        }
        principal
    }

    /// Applies a message of auth's revocation stream.
    pub(super) fn apply(&self, message: WatchRevocationsResponse) {
        let now = Instant::now();
        let mut changes = self.changes();
        let principals = if message.reset || !message.revocations.is_empty() {
            changes.live_principals()
        } else {
            Vec::new()
        };
        if message.reset {
            changes.min_generation = message.generation;
            let is_older =
                |principal: &&Arc<CachedPrincipal>| principal.generation < message.generation;
            for principal in principals.iter().filter(is_older) {
                principal.mark_stale();
                changes.pending_recheck.push(Arc::downgrade(principal));
            }
        }
        for change in message.revocations {
            for principal in principals.iter().filter(|principal| principal.matches(&change)) {
                principal.apply(&change);
                changes.pending_recheck.push(Arc::downgrade(principal));
            }
            changes.recent.push_back((now, change));
        }
        changes.generation = message.generation;
        changes.trim(now);
        let micros = u64::try_from((now - self.start).as_micros()).unwrap_or(u64::MAX);
        self.last_message.store(micros.max(1), Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use hapa_proto::auth::v1::Principal;

    use super::super::cached_principal::ActiveCallGuard;
    use super::super::credential::Credential;
    use super::*;

    fn answer(key_id: &str, generation: i64) -> CachedPrincipal {
        let owner = "tenant".to_owned();
        let principal = Principal { key_id: key_id.to_owned(), owner, ..Principal::default() };
        CachedPrincipal::new(Credential::Key([0; 32]), principal, generation, Instant::now())
    }

    fn message(generation: i64, revocations: Vec<Revocation>) -> WatchRevocationsResponse {
        WatchRevocationsResponse { generation, revocations, reset: false }
    }

    fn revocation(key_id: &str, generation: i64) -> Revocation {
        let key_id = key_id.to_owned();
        Revocation { generation, key_id, ends_calls: true, ..Revocation::default() }
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_is_valid_for_5_s_and_longer_while_auth_sends_heartbeats() {
        let state = RevocationState::new();
        let principal = state.insert(answer("a", 1));
        tokio::time::advance(Duration::from_millis(4_900)).await;
        assert!(state.is_valid(&principal));
        tokio::time::advance(Duration::from_millis(200)).await;
        assert!(!state.is_valid(&principal));
        state.apply(message(1, Vec::new()));
        assert!(state.is_valid(&principal));
        for _ in 0..40 {
            tokio::time::advance(Duration::from_secs(1)).await;
            state.apply(message(1, Vec::new()));
        }
        assert!(!state.is_valid(&principal), "an answer is valid for 45 s at most");
    }

    #[tokio::test]
    async fn a_revocation_ends_its_key_and_no_other() {
        let state = RevocationState::new();
        let (a, b) = (state.insert(answer("a", 1)), state.insert(answer("b", 1)));
        state.apply(message(2, vec![revocation("a", 2)]));
        assert!(!state.is_valid(&a) && a.ended.is_cancelled());
        assert!(state.is_valid(&b) && !b.ended.is_cancelled());
        let owners = Revocation { generation: 3, owner: "tenant".to_owned(), ..revocation("", 3) };
        state.apply(message(3, vec![owners]));
        assert!(!state.is_valid(&b) && b.ended.is_cancelled());
    }

    #[tokio::test]
    async fn a_late_answer_does_not_revive_a_revoked_key() {
        let state = RevocationState::new();
        state.apply(message(7, vec![revocation("a", 7)]));
        let late = state.insert(answer("a", 6));
        assert!(!state.is_valid(&late) && late.ended.is_cancelled());
        let fresh = state.insert(answer("a", 7));
        assert!(state.is_valid(&fresh) && !fresh.ended.is_cancelled());
    }

    #[tokio::test]
    async fn changes_that_are_forgotten_in_a_flood_still_invalidate_late_answers() {
        let state = RevocationState::new();
        let many = i64::try_from(MAX_RECENT_CHANGES).unwrap() + 5;
        let flood = (1..=many).map(|number| revocation(&format!("k{number}"), number)).collect();
        state.apply(message(many, flood));
        let late = state.insert(answer("k1", 0));
        assert!(!state.is_valid(&late));
        assert!(state.is_valid(&state.insert(answer("k1", many))));
    }

    #[tokio::test]
    async fn after_a_reset_every_earlier_answer_is_stale() {
        let state = RevocationState::new();
        let principal = state.insert(answer("a", 3));
        state.apply(WatchRevocationsResponse { reset: true, ..message(9, Vec::new()) });
        assert!(!state.is_valid(&principal) && !principal.ended.is_cancelled());
        assert!(!state.is_valid(&state.insert(answer("a", 8))));
        assert!(state.is_valid(&state.insert(answer("a", 9))));
    }

    #[tokio::test]
    async fn a_call_in_progress_ends_also_if_the_cache_has_evicted_its_principal() {
        let state = RevocationState::new();
        let call = ActiveCallGuard::start(state.insert(answer("a", 1)));
        state.apply(message(2, vec![revocation("a", 2)]));
        assert!(call.ended.is_cancelled());
    }

    #[tokio::test]
    async fn calls_in_progress_are_rechecked_after_a_change_and_after_a_reset() {
        let state = RevocationState::new();
        let (a, b) = (state.insert(answer("a", 1)), state.insert(answer("b", 1)));
        let call = ActiveCallGuard::start(Arc::clone(&a));
        state.apply(message(2, vec![Revocation { ends_calls: false, ..revocation("a", 2) }]));
        assert!(!call.ended.is_cancelled());
        let subjects = |principals: Vec<Arc<CachedPrincipal>>| {
            principals.iter().map(|principal| principal.subject.to_string()).collect::<Vec<_>>()
        };
        assert_eq!(subjects(state.take_pending_rechecks()), ["key:a"]);
        assert!(state.take_pending_rechecks().is_empty(), "once");
        state.apply(WatchRevocationsResponse { reset: true, ..message(9, Vec::new()) });
        assert_eq!(subjects(state.take_pending_rechecks()), ["key:a"]);
        // It was admitted before the reset, and starts after it.
        let _late = ActiveCallGuard::start(b);
        assert_eq!(subjects(state.take_pending_rechecks()), ["key:b"]);
    }
}

//! What is known of changes, and whom they concern.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use hapa_proto::auth::v1::{Revocation, WatchRevocationsResponse};
use tokio::time::Instant;

use super::{Caller, REMEMBERED, TRUSTED};

/// For as long changes are kept in mind, for answers that are still on their way.
const LATE: Duration = Duration::from_secs(30);
const MOST_RECENT: usize = 10_000;

/// What is known of changes, and every caller that one may concern.
pub(super) struct Truth {
    begin: Instant,
    /// When auth was last heard, in microseconds from the begin; 0: not yet.
    heard: AtomicU64,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    generation: i64,
    /// Answers of an earlier generation are worthless.
    floor: i64,
    recent: VecDeque<(Instant, Revocation)>,
    callers: Vec<Weak<Caller>>,
    crowded: usize,
    /// Whose calls in progress must be asked about.
    doubtful: Vec<Weak<Caller>>,
}

impl State {
    fn alive(&self) -> Vec<Arc<Caller>> {
        self.callers.iter().filter_map(Weak::upgrade).collect()
    }
}

impl Truth {
    pub(super) fn new() -> Self {
        Truth { begin: Instant::now(), heard: AtomicU64::new(0), state: Mutex::default() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn generation(&self) -> i64 {
        self.state().generation
    }

    /// Whether auth would say the same now.
    pub(super) fn holds(&self, caller: &Caller) -> bool {
        let now = Instant::now();
        let heard = match self.heard.load(Ordering::Acquire) {
            0 => caller.asked,
            micros => (self.begin + Duration::from_micros(micros)).max(caller.asked),
        };
        !caller.stale.load(Ordering::Acquire)
            && !caller.has_expired()
            && now.saturating_duration_since(heard) < TRUSTED
            && now.saturating_duration_since(caller.asked) < REMEMBERED
    }

    /// Every caller that a cache or a call in progress still has.
    pub(super) fn alive(&self) -> Vec<Arc<Caller>> {
        self.state().alive()
    }

    /// Those with calls in progress that something has changed about since the last time. One without
    /// stays: a call that was just let in may not have begun yet.
    pub(super) fn doubtful(&self) -> Vec<Arc<Caller>> {
        let mut state = self.state();
        let doubtful = std::mem::take(&mut state.doubtful);
        let alive = doubtful.iter().filter_map(Weak::upgrade);
        let (ongoing, others): (Vec<_>, Vec<_>) = alive
            .filter(|caller| !caller.ended.is_cancelled())
            .partition(|caller| caller.calls.load(Ordering::Acquire) > 0);
        state.doubtful = others.iter().map(Arc::downgrade).collect();
        ongoing
    }

    /// Lets `doubtful` tell it again.
    pub(super) fn doubt(&self, caller: &Arc<Caller>) {
        self.state().doubtful.push(Arc::downgrade(caller));
    }

    /// Notes an answer, together with all that has changed since it left auth.
    pub(super) fn admit(&self, caller: Caller) -> Arc<Caller> {
        let (caller, mut state) = (Arc::new(caller), self.state());
        if caller.generation < state.floor {
            caller.stale.store(true, Ordering::Release);
        }
        for (_, change) in state.recent.iter().filter(|(_, change)| caller.concerns(change)) {
            caller.suffer(change);
        }
        state.callers.push(Arc::downgrade(&caller));
        if state.callers.len() > state.crowded {
            state.callers.retain(|caller| caller.strong_count() > 0);
            state.crowded = (state.callers.len() * 2).max(1_024);
        }
        caller
    }

    pub(super) fn apply(&self, message: WatchRevocationsResponse) {
        let now = Instant::now();
        let mut state = self.state();
        let callers = if message.reset || !message.revocations.is_empty() {
            state.alive()
        } else {
            Vec::new()
        };
        if message.reset {
            state.floor = message.generation;
            for caller in callers.iter().filter(|caller| caller.generation < message.generation) {
                caller.stale.store(true, Ordering::Release);
                state.doubtful.push(Arc::downgrade(caller));
            }
        }
        for change in message.revocations {
            for caller in callers.iter().filter(|caller| caller.concerns(&change)) {
                caller.suffer(&change);
                state.doubtful.push(Arc::downgrade(caller));
            }
            state.recent.push_back((now, change));
        }
        state.generation = message.generation;
        while let Some((at, change)) = state.recent.front() {
            let late = now.saturating_duration_since(*at) > LATE;
            if !late && state.recent.len() <= MOST_RECENT {
                break;
            }
            // What is forgotten early must not be forgotten by a late answer.
            if !late {
                state.floor = state.floor.max(change.generation);
            }
            state.recent.pop_front();
        }
        let heard = u64::try_from((now - self.begin).as_micros()).unwrap_or(u64::MAX);
        self.heard.store(heard.max(1), Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use hapa_proto::auth::v1::Principal;

    use super::super::{Ongoing, Presented};
    use super::*;

    fn asked(key_id: &str, generation: i64) -> Caller {
        let owner = "tenant".to_owned();
        let principal = Principal { key_id: key_id.to_owned(), owner, ..Principal::default() };
        Caller::new(Presented::Key([0; 32]), principal, generation, Instant::now())
    }

    fn told(generation: i64, revocations: Vec<Revocation>) -> WatchRevocationsResponse {
        WatchRevocationsResponse { generation, revocations, reset: false }
    }

    fn end_of(key_id: &str, generation: i64) -> Revocation {
        let key_id = key_id.to_owned();
        Revocation { generation, key_id, ends_calls: true, ..Revocation::default() }
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_is_worth_5_s_alone_and_longer_while_auth_is_heard() {
        let truth = Truth::new();
        let caller = truth.admit(asked("a", 1));
        tokio::time::advance(Duration::from_millis(4_900)).await;
        assert!(truth.holds(&caller));
        tokio::time::advance(Duration::from_millis(200)).await;
        assert!(!truth.holds(&caller));
        truth.apply(told(1, Vec::new()));
        assert!(truth.holds(&caller));
        for _ in 0..40 {
            tokio::time::advance(Duration::from_secs(1)).await;
            truth.apply(told(1, Vec::new()));
        }
        assert!(!truth.holds(&caller), "it is remembered for 45 s at most");
    }

    #[tokio::test]
    async fn a_revocation_ends_its_key_and_no_other() {
        let truth = Truth::new();
        let (a, b) = (truth.admit(asked("a", 1)), truth.admit(asked("b", 1)));
        truth.apply(told(2, vec![end_of("a", 2)]));
        assert!(!truth.holds(&a) && a.ended.is_cancelled());
        assert!(truth.holds(&b) && !b.ended.is_cancelled());
        let owners = Revocation { generation: 3, owner: "tenant".to_owned(), ..end_of("", 3) };
        truth.apply(told(3, vec![owners]));
        assert!(!truth.holds(&b) && b.ended.is_cancelled());
    }

    #[tokio::test]
    async fn a_late_answer_cannot_bring_a_dead_key_back() {
        let truth = Truth::new();
        truth.apply(told(7, vec![end_of("a", 7)]));
        let late = truth.admit(asked("a", 6));
        assert!(!truth.holds(&late) && late.ended.is_cancelled());
        let fresh = truth.admit(asked("a", 7));
        assert!(truth.holds(&fresh) && !fresh.ended.is_cancelled());
    }

    #[tokio::test]
    async fn what_is_forgotten_in_a_flood_still_counts() {
        let truth = Truth::new();
        let many = i64::try_from(MOST_RECENT).unwrap() + 5;
        let flood = (1..=many).map(|number| end_of(&format!("k{number}"), number)).collect();
        truth.apply(told(many, flood));
        let late = truth.admit(asked("k1", 0));
        assert!(!truth.holds(&late));
        assert!(truth.holds(&truth.admit(asked("k1", many))));
    }

    #[tokio::test]
    async fn after_a_reset_every_earlier_answer_is_asked_for_again() {
        let truth = Truth::new();
        let caller = truth.admit(asked("a", 3));
        truth.apply(WatchRevocationsResponse { reset: true, ..told(9, Vec::new()) });
        assert!(!truth.holds(&caller) && !caller.ended.is_cancelled());
        assert!(!truth.holds(&truth.admit(asked("a", 8))));
        assert!(truth.holds(&truth.admit(asked("a", 9))));
    }

    #[tokio::test]
    async fn a_call_in_progress_ends_also_when_the_cache_has_forgotten_its_caller() {
        let truth = Truth::new();
        let call = Ongoing::begin(truth.admit(asked("a", 1)));
        truth.apply(told(2, vec![end_of("a", 2)]));
        assert!(call.ended.is_cancelled());
    }

    #[tokio::test]
    async fn calls_in_progress_are_asked_about_after_a_change_and_after_a_reset() {
        let truth = Truth::new();
        let (a, b) = (truth.admit(asked("a", 1)), truth.admit(asked("b", 1)));
        let call = Ongoing::begin(Arc::clone(&a));
        truth.apply(told(2, vec![Revocation { ends_calls: false, ..end_of("a", 2) }]));
        assert!(!call.ended.is_cancelled());
        let names = |callers: Vec<Arc<Caller>>| {
            callers.iter().map(|caller| caller.subject.to_string()).collect::<Vec<_>>()
        };
        assert_eq!(names(truth.doubtful()), ["key:a"]);
        assert!(truth.doubtful().is_empty(), "once");
        truth.apply(WatchRevocationsResponse { reset: true, ..told(9, Vec::new()) });
        assert_eq!(names(truth.doubtful()), ["key:a"]);
        // It was let in before the reset, and begins after it.
        let _late = Ongoing::begin(b);
        assert_eq!(names(truth.doubtful()), ["key:b"]);
    }
}

//! The state of one replica for one subject and method: the number of its own grants, and the latest reply of Redis.
//!
//! The number of own grants is authoritative. Each request reports it, and it replaces the number in Redis, so grants
//! are neither lost nor counted twice. While Redis is unavailable, two bounds hold: the replica's share of the limit,
//! which includes its earlier grants, and its share of the remaining calls in the latest reply.
//!
//! Invariant: the shares of all replicas together never exceed the limit.

use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use super::memory::{Window, WindowShift};
use super::replicas::ReplicaGroup;
use super::shards::Expiring;
use super::{Decision, Rate};

/// Retry delay of a call that exceeds only this replica's share: Redis may be available again by then.
const RECHECK_DELAY: Duration = Duration::from_secs(1);

/// A call that waits for a decision.
#[derive(Debug)]
pub(super) struct Waiter {
    pub(super) rate: Rate,
    /// Whether the call is counted; false for a peek.
    pub(super) is_counted: bool,
    pub(super) reply_to: oneshot::Sender<Decision>,
}

/// The calls of one subject to one method, as this replica has counted them.
#[derive(Debug)]
pub(super) struct Counter {
    rate: Rate,
    /// Own grants.
    own: Window,
    /// Start of the window in Redis, in milliseconds; 0: unknown.
    opened_in_redis: u64,
    /// Incremented with each new window.
    window_number: u64,
    /// Whether there are grants that Redis has not confirmed.
    has_unconfirmed: bool,
    /// Remaining calls of this window in the latest reply, minus what all replicas may have granted locally since.
    remaining_in_redis: Option<u32>,
    /// Whether a request is in progress. There is one at a time.
    is_requesting: bool,
    waiters: Vec<Waiter>,
}

/// A request to Redis for several calls of one rate.
#[derive(Debug)]
pub(super) struct DecisionRequest {
    /// Rises with each request, so that Redis can ignore outdated requests.
    pub(super) sequence: u64,
    pub(super) rate: Rate,
    pub(super) report: GrantReport,
    /// Number of calls to decide.
    pub(super) wanted: u32,
    window_number: u64,
    waiters: Vec<Waiter>,
}

/// The grants of this replica in its window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct GrantReport {
    pub(super) opened_in_redis: u64,
    pub(super) granted: u32,
    pub(super) has_unconfirmed: bool,
    pub(super) age: Duration,
}

/// The decision of Redis.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct RedisDecision {
    pub(super) passed: u32,
    pub(super) remaining: u32,
    pub(super) reset: Duration,
    pub(super) wait: Duration,
    pub(super) opened_in_redis: u64,
    /// Own grants in that window.
    pub(super) granted: u32,
}

impl Expiring for Counter {
    fn is_expired(&self, now: Instant) -> bool {
        self.own.is_expired(now) && !self.is_requesting
    }
}

impl Counter {
    pub(super) fn new(rate: Rate, now: Instant) -> Self {
        Counter {
            rate,
            own: Window::new(now, rate.window),
            opened_in_redis: 0,
            window_number: 0,
            has_unconfirmed: false,
            remaining_in_redis: None,
            is_requesting: false,
            waiters: Vec::new(),
        }
    }

    /// Adds a waiting call. Returns whether the caller must start a request.
    pub(super) fn enqueue(&mut self, waiter: Waiter) -> bool {
        self.waiters.push(waiter);
        !std::mem::replace(&mut self.is_requesting, true)
    }

    /// Whether there are grants that Redis has not confirmed.
    pub(super) fn has_unconfirmed(&self) -> bool {
        self.has_unconfirmed
    }

    /// Whether there are unconfirmed grants and no request that reports them.
    pub(super) fn is_unreported(&self) -> bool {
        self.has_unconfirmed && !self.is_requesting
    }

    /// Starts a request that only reports; `None` if there is nothing to report.
    pub(super) fn start_report(&mut self, sequence: u64, now: Instant) -> Option<DecisionRequest> {
        if !self.is_unreported() {
            return None;
        }
        self.advance(self.rate, now);
        self.is_requesting = true;
        Some(self.request(sequence, Vec::new(), now))
    }

    /// A report of the current grants that is sent in addition to the request in progress.
    pub(super) fn extra_report(&self, sequence: u64, now: Instant) -> DecisionRequest {
        self.request(sequence, Vec::new(), now)
    }

    /// The next request, for calls of one rate; `None` if no call waits. With a `share`, at most this replica's share
    /// is requested.
    pub(super) fn next_request(
        &mut self,
        share: Option<ReplicaGroup>,
        sequence: u64,
        now: Instant,
    ) -> Option<DecisionRequest> {
        let Some(rate) = self.waiters.first().map(|waiter| waiter.rate) else {
            self.is_requesting = false;
            return None;
        };
        self.advance(rate, now);
        let (mut waiters, others): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.waiters).into_iter().partition(|it| it.rate == rate);
        self.waiters = others;
        if let Some(group) = share {
            waiters = self.reject_beyond_share(group, waiters, now);
        }
        Some(self.request(sequence, waiters, now))
    }

    fn request(&self, sequence: u64, waiters: Vec<Waiter>, now: Instant) -> DecisionRequest {
        let wanted = waiters.iter().filter(|waiter| waiter.is_counted).count();
        DecisionRequest {
            sequence,
            rate: self.rate,
            report: GrantReport {
                opened_in_redis: self.opened_in_redis,
                granted: self.own.calls,
                has_unconfirmed: self.has_unconfirmed,
                age: now.duration_since(self.own.opened_at),
            },
            wanted: u32::try_from(wanted).unwrap_or(u32::MAX),
            window_number: self.window_number,
            waiters,
        }
    }

    /// Rejects the calls beyond this replica's share, and returns the others.
    fn reject_beyond_share(
        &mut self,
        group: ReplicaGroup,
        waiters: Vec<Waiter>,
        now: Instant,
    ) -> Vec<Waiter> {
        let share = Rate { limit: group.share(self.rate.limit), ..self.rate };
        let decision = self.own.peek(share, now);
        let mut free = decision.remaining;
        let (within, beyond): (Vec<_>, Vec<_>) = waiters.into_iter().partition(|waiter| {
            let fits = !waiter.is_counted || free > 0;
            free -= u32::from(waiter.is_counted && fits);
            fits
        });
        let wait = decision.retry_after.unwrap_or(RECHECK_DELAY).min(RECHECK_DELAY);
        let rejection =
            Decision { limit: self.rate.limit, remaining: 0, retry_after: Some(wait), ..decision };
        for waiter in beyond {
            // Fails if the caller has been cancelled; the same holds for all sends in this file.
            let _ = waiter.reply_to.send(rejection);
        }
        within
    }

    /// Applies the decision of Redis and passes it to the waiting calls. With a `share`, at most this replica's share
    /// is admitted; the next report returns the rest.
    pub(super) fn apply_reply(
        &mut self,
        request: DecisionRequest,
        mut reply: RedisDecision,
        share: Option<ReplicaGroup>,
        now: Instant,
    ) {
        let DecisionRequest { rate, report, window_number, waiters, .. } = request;
        if self.window_number == window_number {
            self.synchronize(report, reply, now);
            if let Some(group) = share {
                let before = self.own.calls.saturating_sub(reply.passed);
                let allowed = group.share(rate.limit).saturating_sub(before);
                let surplus = reply.passed.saturating_sub(allowed);
                self.own.calls -= surplus;
                self.has_unconfirmed |= surplus > 0;
                reply.passed -= surplus;
            }
        } else {
            // A new window has begun here since the request.
            self.own.calls = self.own.calls.saturating_add(reply.passed);
            self.has_unconfirmed = self.own.calls > 0;
        }
        answer(waiters, rate, reply);
    }

    fn synchronize(&mut self, report: GrantReport, reply: RedisDecision, now: Instant) {
        // Local grants while the request was in progress.
        let since = self.own.calls.saturating_sub(report.granted);
        let length = u64::try_from(self.own.length.as_millis()).unwrap_or(u64::MAX);
        if report.opened_in_redis > 0 && reply.opened_in_redis != report.opened_in_redis {
            let is_next = reply.opened_in_redis == report.opened_in_redis.saturating_add(length);
            self.own.previous_calls = if is_next { report.granted } else { 0 };
        }
        let elapsed = self.own.length.saturating_sub(reply.reset);
        self.own.opened_at = now.checked_sub(elapsed).unwrap_or(now);
        self.own.calls = reply.granted.saturating_add(since);
        self.opened_in_redis = reply.opened_in_redis;
        self.has_unconfirmed = since > 0;
        self.remaining_in_redis = Some(reply.remaining);
    }

    /// Ends a request without a reply, and decides locally for all waiting calls. Returns their number.
    pub(super) fn decide_all_locally(
        &mut self,
        request: Option<DecisionRequest>,
        group: ReplicaGroup,
        now: Instant,
    ) -> u64 {
        self.is_requesting = false;
        let mut waiters = request.map(|request| request.waiters).unwrap_or_default();
        waiters.append(&mut self.waiters);
        let count = waiters.len() as u64;
        for Waiter { rate, is_counted, reply_to } in waiters {
            let _ = reply_to.send(self.decide_locally(rate, is_counted, group, now));
        }
        count
    }

    /// Decides without Redis.
    pub(super) fn decide_locally(
        &mut self,
        rate: Rate,
        is_counted: bool,
        group: ReplicaGroup,
        now: Instant,
    ) -> Decision {
        self.advance(rate, now);
        let share = Rate { limit: group.share(rate.limit), ..rate };
        let decision = Decision { limit: rate.limit, ..self.own.peek(share, now) };
        let remaining_share =
            self.remaining_in_redis.map_or(u32::MAX, |remaining| group.share(remaining));
        let remaining = decision.remaining.min(remaining_share);
        if remaining == 0 {
            let wait = decision.retry_after.unwrap_or(decision.reset);
            // With several replicas, Redis may admit a call earlier than this replica's own count would.
            let wait = if group.replicas > 1 { wait.min(RECHECK_DELAY) } else { wait };
            return Decision { remaining, retry_after: Some(wait), ..decision };
        }
        if !is_counted {
            return Decision { remaining, ..decision };
        }
        self.own.calls += 1;
        self.has_unconfirmed = true;
        if let Some(remaining) = &mut self.remaining_in_redis {
            // Other replicas may each grant one of the remaining calls at the same time.
            *remaining = remaining.saturating_sub(group.replicas);
        }
        Decision { remaining: remaining - 1, ..decision }
    }

    fn advance(&mut self, rate: Rate, now: Instant) {
        self.rate = rate;
        match self.own.advance(rate.window, now) {
            WindowShift::Unchanged => return,
            WindowShift::Next if self.opened_in_redis > 0 => {
                let length = u64::try_from(rate.window.as_millis()).unwrap_or(u64::MAX);
                self.opened_in_redis = self.opened_in_redis.saturating_add(length);
            }
            WindowShift::Next => {}
            WindowShift::Reset => (self.opened_in_redis, self.has_unconfirmed) = (0, false),
        }
        self.remaining_in_redis = None;
        self.window_number += 1;
    }
}

/// Passes the decision of Redis to the waiting calls.
fn answer(waiters: Vec<Waiter>, rate: Rate, reply: RedisDecision) {
    let mut passed = reply.passed;
    for waiter in waiters {
        let decision = Decision {
            limit: rate.limit,
            remaining: reply.remaining,
            reset: reply.reset,
            retry_after: None,
        };
        let is_rejected = if waiter.is_counted { passed == 0 } else { reply.remaining == 0 };
        let decision = if is_rejected {
            let wait = if reply.wait.is_zero() { RECHECK_DELAY } else { reply.wait };
            Decision { retry_after: Some(wait), remaining: 0, ..decision }
        } else if waiter.is_counted {
            passed -= 1;
            Decision { remaining: reply.remaining.saturating_add(passed), ..decision }
        } else {
            decision
        };
        let _ = waiter.reply_to.send(decision);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const HOUR: Duration = Duration::from_hours(1);

    fn passes(decision: Decision) -> bool {
        decision.retry_after.is_none()
    }

    /// The number of calls that pass without Redis.
    fn grant_locally(
        counter: &mut Counter,
        rate: Rate,
        group: ReplicaGroup,
        calls: u32,
        now: Instant,
    ) -> u32 {
        let decide = |_| u32::from(passes(counter.decide_locally(rate, true, group, now)));
        (0..calls).map(decide).sum()
    }

    fn reply(passed: u32, remaining: u32, granted: u32) -> RedisDecision {
        let wait = if remaining == 0 { HOUR } else { Duration::ZERO };
        RedisDecision { passed, remaining, reset: HOUR, wait, opened_in_redis: 1_000, granted }
    }

    /// Decides a number of waiting calls with one request.
    fn request(
        counter: &mut Counter,
        (rate, calls): (Rate, u32),
        share: Option<ReplicaGroup>,
        reply: impl FnOnce(&DecisionRequest) -> RedisDecision,
    ) -> (GrantReport, Vec<Decision>) {
        let now = Instant::now();
        let mut receivers = Vec::new();
        for _ in 0..calls {
            let (reply_to, receiver) = oneshot::channel();
            counter.enqueue(Waiter { rate, is_counted: true, reply_to });
            receivers.push(receiver);
        }
        let request = counter.next_request(share, 1, now).unwrap();
        let report = request.report;
        let reply = reply(&request);
        counter.apply_reply(request, reply, share, now);
        assert!(counter.next_request(share, 2, now).is_none());
        (report, receivers.iter_mut().map(|receiver| receiver.try_recv().unwrap()).collect())
    }

    #[test]
    fn concurrent_calls_are_decided_together_and_each_receives_the_remaining_number() {
        let rate = Rate::new(5, HOUR);
        let mut counter = Counter::new(rate, Instant::now());
        let (report, decisions) = request(&mut counter, (rate, 7), None, |request| {
            assert_eq!(request.wanted, 7);
            reply(5, 0, 5)
        });
        assert_eq!((report.granted, report.has_unconfirmed), (0, false));
        let remaining: Vec<_> = decisions[..5].iter().map(|decision| decision.remaining).collect();
        assert_eq!(remaining, [4, 3, 2, 1, 0]);
        assert!(decisions[..5].iter().all(|decision| passes(*decision)));
        assert!(decisions[5..].iter().all(|decision| decision.retry_after == Some(HOUR)));
    }

    #[test]
    fn local_grants_are_within_the_share_and_are_reported() {
        let (rate, group) = (Rate::new(100, HOUR), ReplicaGroup { replicas: 2, position: 0 });
        let mut counter = Counter::new(rate, Instant::now());
        request(&mut counter, (rate, 20), None, |_| reply(20, 80, 20));
        assert!(!counter.is_unreported());
        let now = Instant::now();
        assert_eq!(
            grant_locally(&mut counter, rate, group, 100, now),
            30,
            "including the earlier 20"
        );
        let report = counter.start_report(3, now).unwrap().report;
        assert_eq!(
            (report.opened_in_redis, report.granted, report.has_unconfirmed),
            (1_000, 50, true)
        );
        assert!(counter.start_report(4, now).is_none(), "the report is in progress");
    }

    #[test]
    fn a_lost_reply_grants_nothing() {
        let (rate, group) = (Rate::new(10, HOUR), ReplicaGroup::SINGLE);
        let (mut counter, now) = (Counter::new(rate, Instant::now()), Instant::now());
        let (reply_to, mut receiver) = oneshot::channel();
        assert!(counter.enqueue(Waiter { rate, is_counted: true, reply_to }));
        let request = counter.next_request(None, 1, now).unwrap();
        assert_eq!(counter.decide_all_locally(Some(request), group, now), 1);
        assert!(passes(receiver.try_recv().unwrap()));
        // Redis may have granted the call too; the report states that it is one grant.
        assert_eq!(counter.start_report(2, now).unwrap().report.granted, 1);
    }

    #[test]
    fn after_an_outage_only_the_share_passes_and_the_rest_is_returned() {
        let (rate, group) = (Rate::new(10, HOUR), ReplicaGroup { replicas: 2, position: 0 });
        let mut counter = Counter::new(rate, Instant::now());
        // Sent before the outage was detected, answered after it.
        let now = Instant::now();
        let (reply_to, _receiver) = oneshot::channel();
        counter.enqueue(Waiter { rate, is_counted: true, reply_to });
        let mut request = counter.next_request(None, 1, now).unwrap();
        request.wanted = 8;
        counter.apply_reply(request, reply(8, 2, 8), Some(group), now);
        assert!(counter.next_request(None, 2, now).is_none());
        assert_eq!(counter.start_report(3, now).unwrap().report.granted, 5);
    }

    #[test]
    fn an_expired_window_neither_reports_nor_limits() {
        let (rate, group) = (Rate::new(10, HOUR), ReplicaGroup { replicas: 2, position: 0 });
        let start = Instant::now();
        let mut counter = Counter::new(rate, start);
        assert_eq!(grant_locally(&mut counter, rate, group, 10, start), 5);
        assert!(!counter.is_expired(start + HOUR) && counter.is_expired(start + 2 * HOUR));
        assert_eq!(grant_locally(&mut counter, rate, group, 10, start + 2 * HOUR), 5);
        let report = counter.start_report(1, start + 2 * HOUR).unwrap().report;
        assert_eq!((report.opened_in_redis, report.granted), (0, 5));
    }

    proptest! {
        #[test]
        fn replicas_without_redis_never_grant_more_than_the_limit_together(
            limit in 1u32..200, replicas in 1u32..6, before in prop::collection::vec(0u32..60, 6)
        ) {
            let (rate, now) = (Rate::new(limit, HOUR), Instant::now());
            let group = |position| ReplicaGroup { replicas, position };
            let mut counters: Vec<_> = (0..replicas).map(|_| Counter::new(rate, now)).collect();
            // Before the outage each replica is granted a part, and all receive the final number of remaining calls.
            let mut remaining = limit;
            let mut granted = Vec::new();
            for (counter, wanted) in counters.iter_mut().zip(&before) {
                let passed = remaining.min(*wanted);
                remaining -= passed;
                granted.push(passed);
                if passed > 0 {
                    request(counter, (rate, passed), None, |_| reply(passed, remaining, passed));
                }
            }
            for (counter, granted) in counters.iter_mut().zip(&granted) {
                request(counter, (rate, 1), None, |_| reply(0, remaining, *granted));
            }
            let local: u32 = counters.iter_mut().zip(0..)
                .map(|(counter, position)| grant_locally(counter, rate, group(position), 300, now))
                .sum();
            prop_assert!(local <= remaining, "{local} of {remaining}");
            // Without earlier calls they grant exactly the limit.
            let fresh: u32 = (0..replicas)
                .map(|at| grant_locally(&mut Counter::new(rate, now), rate, group(at), 300, now))
                .sum();
            prop_assert_eq!(fresh, limit);
        }
    }
}

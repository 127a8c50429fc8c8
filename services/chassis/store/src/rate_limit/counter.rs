//! What one replica knows of one subject's calls to one method: how many it has granted itself, and what
//! Redis said last.
//!
//! The number of own grants is the truth of this replica: it is reported with every request and replaces
//! what Redis has stored, so nothing is lost or counted twice. While Redis is away, at most the replica's
//! share of the limit is granted, own grants of before included, and at most its share of what Redis said
//! was left. So the shares of all replicas never exceed the limit together.

use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use super::memory::{Moved, Window};
use super::replicas::Group;
use super::shards::Entry;
use super::{Decision, Rate};

/// When a call that was refused for this replica's share alone may try again: Redis may be back by then.
const RECHECK: Duration = Duration::from_secs(1);

/// A call that waits for a decision.
#[derive(Debug)]
pub(super) struct Waiter {
    pub(super) rate: Rate,
    /// False: only what would be decided is asked.
    pub(super) counts: bool,
    pub(super) tell: oneshot::Sender<Decision>,
}

/// One subject's calls to one method, as this replica knows them.
#[derive(Debug)]
pub(super) struct Counter {
    rate: Rate,
    /// Own grants.
    own: Window,
    /// Redis's name for the window; 0: unknown.
    opened: u64,
    /// Changes with the window.
    turn: u64,
    /// Whether there are grants that Redis has not confirmed.
    is_apart: bool,
    /// What Redis said was left in this window, less what all may have granted apart since.
    left: Option<u32>,
    /// Whether a request is on its way: there is one at a time.
    is_asking: bool,
    waiting: Vec<Waiter>,
}

/// A request for several calls of one rate.
#[derive(Debug)]
pub(super) struct Request {
    /// Of two requests about one counter, the later one has the higher number.
    pub(super) sequence: u64,
    pub(super) rate: Rate,
    pub(super) report: Report,
    /// Calls to decide.
    pub(super) wanted: u32,
    turn: u64,
    waiters: Vec<Waiter>,
}

/// What this replica has granted in its window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Report {
    pub(super) opened: u64,
    pub(super) granted: u32,
    pub(super) is_apart: bool,
    pub(super) age: Duration,
}

/// What Redis decided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Reply {
    pub(super) passed: u32,
    pub(super) remaining: u32,
    pub(super) reset: Duration,
    pub(super) wait: Duration,
    pub(super) opened: u64,
    /// Own grants in that window.
    pub(super) granted: u32,
}

impl Entry for Counter {
    fn is_over(&self, now: Instant) -> bool {
        self.own.is_over(now) && !self.is_asking
    }
}

impl Counter {
    pub(super) fn new(rate: Rate, now: Instant) -> Self {
        Counter {
            rate,
            own: Window::opening(now, rate.window),
            opened: 0,
            turn: 0,
            is_apart: false,
            left: None,
            is_asking: false,
            waiting: Vec::new(),
        }
    }

    /// Lets a call wait; whether a request has to be begun for it.
    pub(super) fn join(&mut self, waiter: Waiter) -> bool {
        self.waiting.push(waiter);
        !std::mem::replace(&mut self.is_asking, true)
    }

    /// Whether there are grants that Redis has not confirmed.
    pub(super) fn is_apart(&self) -> bool {
        self.is_apart
    }

    /// Whether there is something to report and nothing that reports it.
    pub(super) fn is_unreported(&self) -> bool {
        self.is_apart && !self.is_asking
    }

    /// Begins a request that only reports; none where there is nothing to report any more.
    pub(super) fn report(&mut self, sequence: u64, now: Instant) -> Option<Request> {
        if !self.is_unreported() {
            return None;
        }
        self.roll(self.rate, now);
        self.is_asking = true;
        Some(self.request(sequence, Vec::new(), now))
    }

    /// A request that reports what was granted so far, beside those that are waited for.
    pub(super) fn note(&self, sequence: u64, now: Instant) -> Request {
        self.request(sequence, Vec::new(), now)
    }

    /// The next request, for calls of one rate; none where no call waits. A limit on what may be granted
    /// now, where there is one, is this replica's share.
    pub(super) fn next(
        &mut self,
        share: Option<Group>,
        sequence: u64,
        now: Instant,
    ) -> Option<Request> {
        let Some(rate) = self.waiting.first().map(|waiter| waiter.rate) else {
            self.is_asking = false;
            return None;
        };
        self.roll(rate, now);
        let (mut waiters, others): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.waiting).into_iter().partition(|it| it.rate == rate);
        self.waiting = others;
        if let Some(group) = share {
            waiters = self.cap(group, waiters, now);
        }
        Some(self.request(sequence, waiters, now))
    }

    fn request(&self, sequence: u64, waiters: Vec<Waiter>, now: Instant) -> Request {
        let wanted = waiters.iter().filter(|waiter| waiter.counts).count();
        Request {
            sequence,
            rate: self.rate,
            report: Report {
                opened: self.opened,
                granted: self.own.calls,
                is_apart: self.is_apart,
                age: now.duration_since(self.own.opened),
            },
            wanted: u32::try_from(wanted).unwrap_or(u32::MAX),
            turn: self.turn,
            waiters,
        }
    }

    /// Refuses what is beyond this replica's share, and gives back the others.
    fn cap(&mut self, group: Group, waiters: Vec<Waiter>, now: Instant) -> Vec<Waiter> {
        let share = Rate { limit: group.share(self.rate.limit), ..self.rate };
        let decision = self.own.look(share, now);
        let mut free = decision.remaining;
        let (within, beyond): (Vec<_>, Vec<_>) = waiters.into_iter().partition(|waiter| {
            let fits = !waiter.counts || free > 0;
            free -= u32::from(waiter.counts && fits);
            fits
        });
        let wait = decision.retry_after.unwrap_or(RECHECK).min(RECHECK);
        let refused =
            Decision { limit: self.rate.limit, remaining: 0, retry_after: Some(wait), ..decision };
        for waiter in beyond {
            // A caller that left needs no answer; so in all places here.
            let _ = waiter.tell.send(refused);
        }
        within
    }

    /// Takes over what Redis decided, and tells it to those who wait. Where there is a share, no more
    /// than that passes: the rest is given back with the next report.
    pub(super) fn hear(
        &mut self,
        request: Request,
        mut reply: Reply,
        share: Option<Group>,
        now: Instant,
    ) {
        let Request { rate, report, turn, waiters, .. } = request;
        if self.turn == turn {
            self.take_over(report, reply, now);
            if let Some(group) = share {
                let before = self.own.calls.saturating_sub(reply.passed);
                let allowed = group.share(rate.limit).saturating_sub(before);
                let surplus = reply.passed.saturating_sub(allowed);
                self.own.calls -= surplus;
                self.is_apart |= surplus > 0;
                reply.passed -= surplus;
            }
        } else {
            // Another window has begun here meanwhile.
            self.own.calls = self.own.calls.saturating_add(reply.passed);
            self.is_apart = self.own.calls > 0;
        }
        let mut passed = reply.passed;
        for waiter in waiters {
            let decision = Decision {
                limit: rate.limit,
                remaining: reply.remaining,
                reset: reply.reset,
                retry_after: None,
            };
            let is_refused = if waiter.counts { passed == 0 } else { reply.remaining == 0 };
            let decision = if is_refused {
                let wait = if reply.wait.is_zero() { RECHECK } else { reply.wait };
                Decision { retry_after: Some(wait), remaining: 0, ..decision }
            } else if waiter.counts {
                passed -= 1;
                Decision { remaining: reply.remaining.saturating_add(passed), ..decision }
            } else {
                decision
            };
            let _ = waiter.tell.send(decision);
        }
    }

    fn take_over(&mut self, report: Report, reply: Reply, now: Instant) {
        // Granted here while the request was on its way.
        let since = self.own.calls.saturating_sub(report.granted);
        let length = u64::try_from(self.own.length.as_millis()).unwrap_or(u64::MAX);
        if report.opened > 0 && reply.opened != report.opened {
            let is_next = reply.opened == report.opened.saturating_add(length);
            self.own.calls_before = if is_next { report.granted } else { 0 };
        }
        let elapsed = self.own.length.saturating_sub(reply.reset);
        self.own.opened = now.checked_sub(elapsed).unwrap_or(now);
        self.own.calls = reply.granted.saturating_add(since);
        self.opened = reply.opened;
        self.is_apart = since > 0;
        self.left = Some(reply.remaining);
    }

    /// Ends a request without an answer, and decides for all who wait; how many those were.
    pub(super) fn give_up(&mut self, request: Option<Request>, group: Group, now: Instant) -> u64 {
        self.is_asking = false;
        let mut waiters = request.map(|request| request.waiters).unwrap_or_default();
        waiters.append(&mut self.waiting);
        let count = waiters.len() as u64;
        for Waiter { rate, counts, tell } in waiters {
            let _ = tell.send(self.decide_alone(rate, counts, group, now));
        }
        count
    }

    /// Decides without Redis.
    pub(super) fn decide_alone(
        &mut self,
        rate: Rate,
        counts: bool,
        group: Group,
        now: Instant,
    ) -> Decision {
        self.roll(rate, now);
        let share = Rate { limit: group.share(rate.limit), ..rate };
        let decision = Decision { limit: rate.limit, ..self.own.look(share, now) };
        let left = self.left.map_or(u32::MAX, |left| group.share(left));
        let remaining = decision.remaining.min(left);
        if remaining == 0 {
            let wait = decision.retry_after.unwrap_or(decision.reset);
            // Only what this replica alone has counted says when a call will pass.
            let wait = if group.replicas > 1 { wait.min(RECHECK) } else { wait };
            return Decision { remaining, retry_after: Some(wait), ..decision };
        }
        if !counts {
            return Decision { remaining, ..decision };
        }
        self.own.calls += 1;
        self.is_apart = true;
        if let Some(left) = &mut self.left {
            // What the others may grant of it at the same time is spoken for too.
            *left = left.saturating_sub(group.replicas);
        }
        Decision { remaining: remaining - 1, ..decision }
    }

    fn roll(&mut self, rate: Rate, now: Instant) {
        self.rate = rate;
        match self.own.roll(rate.window, now) {
            Moved::Not => return,
            Moved::On if self.opened > 0 => {
                let length = u64::try_from(rate.window.as_millis()).unwrap_or(u64::MAX);
                self.opened = self.opened.saturating_add(length);
            }
            Moved::On => {}
            Moved::Away => (self.opened, self.is_apart) = (0, false),
        }
        self.left = None;
        self.turn += 1;
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

    /// How many of so many calls pass without Redis.
    fn alone(counter: &mut Counter, rate: Rate, group: Group, calls: u32, now: Instant) -> u32 {
        let decide = |_| u32::from(passes(counter.decide_alone(rate, true, group, now)));
        (0..calls).map(decide).sum()
    }

    fn reply(passed: u32, remaining: u32, granted: u32) -> Reply {
        let wait = if remaining == 0 { HOUR } else { Duration::ZERO };
        Reply { passed, remaining, reset: HOUR, wait, opened: 1_000, granted }
    }

    /// Lets so many calls wait for one request, and answers it.
    fn asked(
        counter: &mut Counter,
        (rate, calls): (Rate, u32),
        share: Option<Group>,
        answer: impl FnOnce(&Request) -> Reply,
    ) -> (Report, Vec<Decision>) {
        let now = Instant::now();
        let mut told = Vec::new();
        for _ in 0..calls {
            let (tell, answer) = oneshot::channel();
            counter.join(Waiter { rate, counts: true, tell });
            told.push(answer);
        }
        let request = counter.next(share, 1, now).unwrap();
        let report = request.report;
        let reply = answer(&request);
        counter.hear(request, reply, share, now);
        assert!(counter.next(share, 2, now).is_none());
        (report, told.iter_mut().map(|answer| answer.try_recv().unwrap()).collect())
    }

    #[test]
    fn calls_that_wait_together_are_decided_together_and_each_is_told_what_is_left() {
        let rate = Rate::new(5, HOUR);
        let mut counter = Counter::new(rate, Instant::now());
        let (report, told) = asked(&mut counter, (rate, 7), None, |request| {
            assert_eq!(request.wanted, 7);
            reply(5, 0, 5)
        });
        assert_eq!((report.granted, report.is_apart), (0, false));
        let remaining: Vec<_> = told[..5].iter().map(|decision| decision.remaining).collect();
        assert_eq!(remaining, [4, 3, 2, 1, 0]);
        assert!(told[..5].iter().all(|decision| passes(*decision)));
        assert!(told[5..].iter().all(|decision| decision.retry_after == Some(HOUR)));
    }

    #[test]
    fn what_is_granted_alone_is_within_the_share_and_is_reported() {
        let (rate, group) = (Rate::new(100, HOUR), Group { replicas: 2, position: 0 });
        let mut counter = Counter::new(rate, Instant::now());
        asked(&mut counter, (rate, 20), None, |_| reply(20, 80, 20));
        assert!(!counter.is_unreported());
        let now = Instant::now();
        assert_eq!(alone(&mut counter, rate, group, 100, now), 30, "with the 20 of before");
        let report = counter.report(3, now).unwrap().report;
        assert_eq!((report.opened, report.granted, report.is_apart), (1_000, 50, true));
        assert!(counter.report(4, now).is_none(), "it is on its way");
    }

    #[test]
    fn a_reply_that_is_lost_grants_nothing() {
        let (rate, group) = (Rate::new(10, HOUR), Group::ALONE);
        let (mut counter, now) = (Counter::new(rate, Instant::now()), Instant::now());
        let (tell, mut told) = oneshot::channel();
        assert!(counter.join(Waiter { rate, counts: true, tell }));
        let request = counter.next(None, 1, now).unwrap();
        assert_eq!(counter.give_up(Some(request), group, now), 1);
        assert!(passes(told.try_recv().unwrap()));
        // Redis may have granted one too: the report says that it is one.
        assert_eq!(counter.report(2, now).unwrap().report.granted, 1);
    }

    #[test]
    fn after_an_outage_no_more_than_the_share_passes_and_the_rest_is_given_back() {
        let (rate, group) = (Rate::new(10, HOUR), Group { replicas: 2, position: 0 });
        let mut counter = Counter::new(rate, Instant::now());
        // Asked before the outage was known, answered after it.
        let now = Instant::now();
        let (tell, _told) = oneshot::channel();
        counter.join(Waiter { rate, counts: true, tell });
        let mut request = counter.next(None, 1, now).unwrap();
        request.wanted = 8;
        counter.hear(request, reply(8, 2, 8), Some(group), now);
        assert!(counter.next(None, 2, now).is_none());
        assert_eq!(counter.report(3, now).unwrap().report.granted, 5);
    }

    #[test]
    fn a_window_that_is_over_reports_and_caps_nothing_any_more() {
        let (rate, group) = (Rate::new(10, HOUR), Group { replicas: 2, position: 0 });
        let start = Instant::now();
        let mut counter = Counter::new(rate, start);
        assert_eq!(alone(&mut counter, rate, group, 10, start), 5);
        assert!(!counter.is_over(start + HOUR) && counter.is_over(start + 2 * HOUR));
        assert_eq!(alone(&mut counter, rate, group, 10, start + 2 * HOUR), 5);
        let report = counter.report(1, start + 2 * HOUR).unwrap().report;
        assert_eq!((report.opened, report.granted), (0, 5));
    }

    proptest! {
        #[test]
        fn replicas_that_are_apart_never_grant_more_than_the_limit_together(
            limit in 1u32..200, replicas in 1u32..6, before in prop::collection::vec(0u32..60, 6)
        ) {
            let (rate, now) = (Rate::new(limit, HOUR), Instant::now());
            let group = |position| Group { replicas, position };
            let mut counters: Vec<_> = (0..replicas).map(|_| Counter::new(rate, now)).collect();
            // Before the outage each is granted its part of what is left, and all hear of the end of it.
            let mut left = limit;
            let mut granted = Vec::new();
            for (counter, wanted) in counters.iter_mut().zip(&before) {
                let passed = left.min(*wanted);
                left -= passed;
                granted.push(passed);
                if passed > 0 {
                    asked(counter, (rate, passed), None, |_| reply(passed, left, passed));
                }
            }
            for (counter, granted) in counters.iter_mut().zip(&granted) {
                asked(counter, (rate, 1), None, |_| reply(0, left, *granted));
            }
            let apart: u32 = counters.iter_mut().zip(0..)
                .map(|(counter, position)| alone(counter, rate, group(position), 300, now))
                .sum();
            prop_assert!(apart <= left, "{apart} of {left}");
            // And where nobody has asked before, exactly the limit.
            let fresh: u32 = (0..replicas)
                .map(|at| alone(&mut Counter::new(rate, now), rate, group(at), 300, now))
                .sum();
            prop_assert_eq!(fresh, limit);
        }
    }
}

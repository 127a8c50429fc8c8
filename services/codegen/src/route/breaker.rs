//! The circuit breaker of one engine: a pure state machine.
//!
//! Closed: all requests pass. Open: none pass, for a pause that grows to [`MAX_PAUSE`] while trials
//! fail. Half-open: one trial at a time; a cancelled trial is returned. Outcomes of requests from
//! before a state change are ignored.

use std::time::Duration;

use tokio::time::Instant;

/// This many consecutive failures open the breaker.
const FAILURE_THRESHOLD: u32 = 5;
/// The breaker also opens if half of this many latest requests failed.
const WINDOW_SIZE: u32 = 20;
const MIN_PAUSE: Duration = Duration::from_secs(1);
/// Short enough that a recovered engine is used again within 5 s.
const MAX_PAUSE: Duration = Duration::from_secs(4);
/// A trial without an outcome blocks other trials only this long.
const TRIAL_TIMEOUT: Duration = Duration::from_secs(4);

/// The outcome of an attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    Success,
    Failure,
    /// No statement about the engine's health: it was full, or the caller cancelled.
    Neutral,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum BreakerState {
    Closed,
    Open {
        until: Instant,
    },
    HalfOpen {
        /// Start of the current trial.
        trial: Option<Instant>,
    },
}

/// Admits one attempt. Must be given back with its outcome.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct BreakerPermit {
    epoch: u64,
}

#[derive(Debug)]
pub(super) struct Breaker {
    state: BreakerState,
    /// Number of state changes and trials so far.
    epoch: u64,
    consecutive_failures: u32,
    /// The latest outcomes as bits, newest lowest; 1 is a failure.
    window: u32,
    window_len: u32,
    pause: Duration,
}

impl Breaker {
    pub(super) fn new() -> Self {
        Breaker {
            state: BreakerState::Closed,
            epoch: 0,
            consecutive_failures: 0,
            window: 0,
            window_len: 0,
            pause: MIN_PAUSE,
        }
    }

    /// Whether an attempt would be admitted; if not, when to try again.
    pub(super) fn admits(&self, now: Instant) -> Result<(), Instant> {
        match self.state {
            BreakerState::Open { until } if now < until => Err(until),
            BreakerState::HalfOpen { trial: Some(since) } if now < since + TRIAL_TIMEOUT => {
                Err((now + MIN_PAUSE).min(since + TRIAL_TIMEOUT))
            }
            BreakerState::Closed | BreakerState::Open { .. } | BreakerState::HalfOpen { .. } => {
                Ok(())
            }
        }
    }

    pub(super) fn try_acquire(&mut self, now: Instant) -> Result<BreakerPermit, Instant> {
        self.admits(now)?;
        if self.state != BreakerState::Closed {
            self.transition_to(BreakerState::HalfOpen { trial: Some(now) });
        }
        Ok(BreakerPermit { epoch: self.epoch })
    }

    pub(super) fn record(&mut self, permit: BreakerPermit, outcome: Outcome, now: Instant) {
        if permit.epoch != self.epoch {
            return;
        }
        match (self.state, outcome) {
            (BreakerState::Closed, Outcome::Success) => self.push_to_window(false),
            (BreakerState::Closed, Outcome::Failure) => {
                self.push_to_window(true);
                let half =
                    self.window_len >= WINDOW_SIZE && self.window.count_ones() * 2 >= WINDOW_SIZE;
                if self.consecutive_failures >= FAILURE_THRESHOLD || half {
                    self.open(now);
                }
            }
            (BreakerState::HalfOpen { .. }, Outcome::Success) => {
                (self.consecutive_failures, self.window, self.window_len, self.pause) =
                    (0, 0, 0, MIN_PAUSE);
                self.transition_to(BreakerState::Closed);
            }
            (BreakerState::HalfOpen { .. }, Outcome::Failure) => {
                self.pause = (self.pause * 2).min(MAX_PAUSE);
                self.open(now);
            }
            (BreakerState::HalfOpen { .. }, Outcome::Neutral) => {
                self.transition_to(BreakerState::HalfOpen { trial: None });
            }
            (BreakerState::Closed, Outcome::Neutral) | (BreakerState::Open { .. }, _) => {}
        }
    }

    /// Allows a trial at once, because the engine is reachable again.
    pub(super) fn allow_trial(&mut self) {
        if self.is_open() {
            self.transition_to(BreakerState::HalfOpen { trial: None });
        }
    }

    pub(super) fn is_open(&self) -> bool {
        matches!(self.state, BreakerState::Open { .. })
    }

    /// Value of the metric: 0 closed, 1 half-open, 2 open.
    pub(super) fn gauge_value(&self) -> u8 {
        match self.state {
            BreakerState::Closed => 0,
            BreakerState::HalfOpen { .. } => 1,
            BreakerState::Open { .. } => 2,
        }
    }

    fn open(&mut self, now: Instant) {
        self.transition_to(BreakerState::Open { until: now + self.pause });
    }

    fn transition_to(&mut self, state: BreakerState) {
        self.state = state;
        self.epoch += 1;
    }

    fn push_to_window(&mut self, failure: bool) {
        self.consecutive_failures = if failure { self.consecutive_failures + 1 } else { 0 };
        self.window = ((self.window << 1) | u32::from(failure)) & ((1 << WINDOW_SIZE) - 1);
        self.window_len = (self.window_len + 1).min(WINDOW_SIZE);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn attempt(breaker: &mut Breaker, outcome: Outcome, now: Instant) -> bool {
        let permit = breaker.try_acquire(now);
        if let Ok(permit) = permit {
            breaker.record(permit, outcome, now);
        }
        permit.is_ok()
    }

    fn open_breaker(now: Instant) -> Breaker {
        let mut breaker = Breaker::new();
        assert!((0..5).all(|_| attempt(&mut breaker, Outcome::Failure, now)));
        assert_eq!(breaker.gauge_value(), 2);
        breaker
    }

    #[test]
    fn consecutive_failures_open_it_unless_a_success_comes_between_them() {
        let (now, mut breaker) = (Instant::now(), Breaker::new());
        for _ in 0..4 {
            attempt(&mut breaker, Outcome::Failure, now);
        }
        attempt(&mut breaker, Outcome::Neutral, now);
        attempt(&mut breaker, Outcome::Success, now);
        for _ in 0..4 {
            attempt(&mut breaker, Outcome::Failure, now);
        }
        assert_eq!(breaker.gauge_value(), 0);
        attempt(&mut breaker, Outcome::Failure, now);
        assert_eq!(breaker.try_acquire(now), Err(now + MIN_PAUSE));
    }

    #[test]
    fn failures_of_every_second_request_open_it_too() {
        let (now, mut breaker) = (Instant::now(), Breaker::new());
        for _ in 0..10 {
            attempt(&mut breaker, Outcome::Success, now);
            attempt(&mut breaker, Outcome::Failure, now);
        }
        assert_eq!(breaker.gauge_value(), 2);
    }

    #[test]
    fn trials_run_one_at_a_time_and_success_closes_it() {
        let begin = Instant::now();
        let (mut breaker, now) = (open_breaker(begin), begin + MIN_PAUSE);
        let trial = breaker.try_acquire(now).unwrap();
        assert!(breaker.try_acquire(now).is_err());
        breaker.record(trial, Outcome::Neutral, now);
        assert_eq!(breaker.gauge_value(), 1, "a cancelled trial is returned");
        let trial = breaker.try_acquire(now).unwrap();
        breaker.record(trial, Outcome::Success, now);
        assert_eq!(breaker.gauge_value(), 0);
        assert!(breaker.try_acquire(now).is_ok() && breaker.try_acquire(now).is_ok());
    }

    #[test]
    fn a_trial_without_an_outcome_does_not_block_others_for_ever() {
        let begin = Instant::now();
        let (mut breaker, now) = (open_breaker(begin), begin + MIN_PAUSE);
        let silent = breaker.try_acquire(now).unwrap();
        let second = breaker.try_acquire(now + TRIAL_TIMEOUT).unwrap();
        breaker.record(silent, Outcome::Failure, now + TRIAL_TIMEOUT);
        breaker.record(second, Outcome::Success, now + TRIAL_TIMEOUT);
        assert_eq!(breaker.gauge_value(), 0, "the late outcome of the first trial is ignored");
    }

    #[test]
    fn pauses_grow_to_a_bound_and_an_engine_that_is_reachable_again_is_tried_at_once() {
        let mut now = Instant::now();
        let mut breaker = open_breaker(now);
        let mut pauses = Vec::new();
        for _ in 0..5 {
            let until = breaker.admits(now).unwrap_err();
            pauses.push((until - now).as_secs());
            now = until;
            assert!(attempt(&mut breaker, Outcome::Failure, now));
        }
        assert_eq!(pauses, [1, 2, 4, 4, 4]);
        breaker.allow_trial();
        assert!(attempt(&mut breaker, Outcome::Success, now));
        assert_eq!(breaker.gauge_value(), 0);
    }

    #[test]
    fn outcomes_from_before_it_opened_do_not_affect_a_trial() {
        let begin = Instant::now();
        let mut breaker = Breaker::new();
        let old = breaker.try_acquire(begin).unwrap();
        for _ in 0..5 {
            attempt(&mut breaker, Outcome::Failure, begin);
        }
        let trial = breaker.try_acquire(begin + MIN_PAUSE).unwrap();
        breaker.record(old, Outcome::Failure, begin + MIN_PAUSE);
        breaker.record(trial, Outcome::Success, begin + MIN_PAUSE);
        assert_eq!(breaker.gauge_value(), 0);
    }

    proptest! {
        #[test]
        fn it_always_admits_a_request_within_its_maximum_pause(
            steps in prop::collection::vec((0u64..3_000, 0u8..4), 0..200),
        ) {
            let (mut now, mut breaker) = (Instant::now(), Breaker::new());
            let mut permits = Vec::new();
            for (millis, step) in steps {
                now += Duration::from_millis(millis);
                match (step, breaker.try_acquire(now)) {
                    (0, Ok(permit)) => permits.push(permit),
                    (1, Ok(permit)) => breaker.record(permit, Outcome::Success, now),
                    (2, Ok(permit)) => breaker.record(permit, Outcome::Failure, now),
                    (_, Ok(permit)) => breaker.record(permit, Outcome::Neutral, now),
                    (_, Err(until)) => prop_assert!(until > now && until <= now + MAX_PAUSE),
                }
            }
            prop_assert!(breaker.admits(now + MAX_PAUSE).is_ok());
        }
    }
}

//! A circuit breaker: stops calls to a dependency that fails, and detects its recovery with single trial calls.
//!
//! Closed: every call is admitted. Open: no call is admitted for a period that doubles with each failed trial, up to a
//! maximum. Half-open: one trial at a time is admitted. A trial without an outcome expires, so a dropped trial never
//! blocks the breaker.
//!
//! Invariant: an outcome counts only in the state in which its call was admitted. The breaker is a pure state machine:
//! callers supply the time and share it behind a lock.

use std::time::Duration;

use tokio::time::Instant;

/// When a breaker opens, and for how long.
#[derive(Clone, Copy, Debug)]
pub struct CircuitBreakerConfig {
    /// Number of consecutive failures that opens the breaker.
    pub consecutive_failures: u32,
    /// Failure rate that opens the breaker too; `None`: only consecutive failures count.
    pub failure_rate: Option<FailureRate>,
    /// Length of the first open period.
    pub min_open_period: Duration,
    /// Maximum length of an open period. Periods double with each failed trial.
    pub max_open_period: Duration,
    /// Random part of an open period, from 0 to 1: each period is shortened by up to this fraction.
    pub jitter: f64,
    /// Time after which a trial without an outcome no longer blocks the next one.
    pub trial_timeout: Duration,
}

/// A failure rate over the latest outcomes. It applies once the window is full.
#[derive(Clone, Copy, Debug)]
pub struct FailureRate {
    /// Number of outcomes in the window, at most 64.
    pub window: u32,
    /// Number of failures in the window that opens the breaker.
    pub threshold: u32,
}

/// The outcome of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The dependency works.
    Success,
    /// The dependency failed.
    Failure,
    /// The outcome does not indicate the dependency's health, such as a cancelled call.
    Neutral,
}

/// The state of a breaker, with its value in metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BreakerState {
    /// Calls are admitted.
    Closed = 0,
    /// One trial at a time is admitted.
    HalfOpen = 1,
    /// No call is admitted.
    Open = 2,
}

/// How an outcome has changed the state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transition {
    /// The state is the same, or another trial is admitted.
    Unchanged,
    /// A closed breaker has opened.
    Opened,
    /// A trial has failed, and the breaker is open again.
    Reopened,
    /// A trial has succeeded, and the breaker is closed.
    Closed,
}

/// The admission of one call. Pass it to [`CircuitBreaker::record`] with the outcome.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CallPermit {
    epoch: u64,
}

/// A circuit breaker for one dependency.
#[derive(Debug)]
pub struct CircuitBreaker {
    config: CircuitBreakerConfig,
    state: State,
    /// Incremented by each state change and each trial, so that outcomes of older permits are ignored.
    epoch: u64,
    consecutive_failures: u32,
    /// The latest outcomes as bits, the newest lowest; failures are ones.
    outcomes: u64,
    outcome_count: u32,
    open_period: Duration,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Closed,
    Open {
        until: Instant,
    },
    /// With the start of the trial in progress, if any.
    HalfOpen {
        trial_since: Option<Instant>,
    },
}

impl CircuitBreaker {
    /// A closed breaker.
    pub fn new(config: CircuitBreakerConfig) -> Self {
        CircuitBreaker {
            config,
            state: State::Closed,
            epoch: 0,
            consecutive_failures: 0,
            outcomes: 0,
            outcome_count: 0,
            open_period: config.min_open_period,
        }
    }

    /// The current state.
    pub fn state(&self) -> BreakerState {
        match self.state {
            State::Closed => BreakerState::Closed,
            State::HalfOpen { .. } => BreakerState::HalfOpen,
            State::Open { .. } => BreakerState::Open,
        }
    }

    /// Whether a call would be admitted. The error is the time of the next attempt.
    pub fn check(&self, now: Instant) -> Result<(), Instant> {
        match self.state {
            State::Open { until } if now < until => Err(until),
            State::HalfOpen { trial_since: Some(since) }
                if now < since + self.config.trial_timeout =>
            {
                Err((now + self.config.min_open_period).min(since + self.config.trial_timeout))
            }
            State::Closed | State::Open { .. } | State::HalfOpen { .. } => Ok(()),
        }
    }

    /// Admits a call, as a trial unless the breaker is closed. The error is the time of the next attempt.
    pub fn acquire(&mut self, now: Instant) -> Result<CallPermit, Instant> {
        self.check(now)?;
        if self.state != State::Closed {
            self.set(State::HalfOpen { trial_since: Some(now) });
        }
        Ok(CallPermit { epoch: self.epoch })
    }

    /// Records the outcome of a call.
    pub fn record(&mut self, permit: CallPermit, outcome: Outcome, now: Instant) -> Transition {
        if permit.epoch != self.epoch {
            return Transition::Unchanged;
        }
        match (self.state, outcome) {
            (State::Closed, Outcome::Success) => self.count(false),
            (State::Closed, Outcome::Failure) => {
                self.count(true);
                if self.must_open() {
                    self.open(now);
                    return Transition::Opened;
                }
            }
            (State::HalfOpen { .. }, Outcome::Success) => {
                *self =
                    CircuitBreaker { epoch: self.epoch + 1, ..CircuitBreaker::new(self.config) };
                return Transition::Closed;
            }
            (State::HalfOpen { .. }, Outcome::Failure) => {
                self.open_period = (self.open_period * 2).min(self.config.max_open_period);
                self.open(now);
                return Transition::Reopened;
            }
            (State::HalfOpen { .. }, Outcome::Neutral) => {
                self.set(State::HalfOpen { trial_since: None });
            }
            (State::Closed, Outcome::Neutral) | (State::Open { .. }, _) => {}
        }
        Transition::Unchanged
    }

    /// Ends an open period early, so that the next call is a trial. For a dependency that is known to be back.
    pub fn allow_trial(&mut self) {
        if matches!(self.state, State::Open { .. }) {
            self.set(State::HalfOpen { trial_since: None });
        }
    }

    fn open(&mut self, now: Instant) {
        let factor = 1.0 - self.config.jitter.clamp(0.0, 1.0) * rand::random::<f64>();
        self.set(State::Open { until: now + self.open_period.mul_f64(factor) });
    }

    fn set(&mut self, state: State) {
        self.state = state;
        self.epoch += 1;
    }

    fn count(&mut self, is_failure: bool) {
        self.consecutive_failures = if is_failure { self.consecutive_failures + 1 } else { 0 };
        self.outcomes = (self.outcomes << 1) | u64::from(is_failure);
        self.outcome_count = self.outcome_count.saturating_add(1);
    }

    fn must_open(&self) -> bool {
        let is_rate_exceeded = |rate: FailureRate| {
            let window = u64::MAX >> (64 - rate.window.clamp(1, 64));
            let failures = (self.outcomes & window).count_ones();
            self.outcome_count >= rate.window && failures >= rate.threshold
        };
        self.consecutive_failures >= self.config.consecutive_failures
            || self.config.failure_rate.is_some_and(is_rate_exceeded)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MIN: Duration = Duration::from_secs(1);
    const MAX: Duration = Duration::from_secs(4);
    const TRIAL: Duration = Duration::from_secs(4);

    fn breaker() -> CircuitBreaker {
        CircuitBreaker::new(CircuitBreakerConfig {
            consecutive_failures: 5,
            failure_rate: Some(FailureRate { window: 20, threshold: 10 }),
            min_open_period: MIN,
            max_open_period: MAX,
            jitter: 0.0,
            trial_timeout: TRIAL,
        })
    }

    fn call(breaker: &mut CircuitBreaker, outcome: Outcome, now: Instant) -> Option<Transition> {
        let permit = breaker.acquire(now).ok()?;
        Some(breaker.record(permit, outcome, now))
    }

    fn opened(now: Instant) -> CircuitBreaker {
        let mut breaker = breaker();
        let transitions = [(); 5].map(|()| call(&mut breaker, Outcome::Failure, now).unwrap());
        assert_eq!(transitions[3..], [Transition::Unchanged, Transition::Opened]);
        breaker
    }

    #[test]
    fn consecutive_failures_open_it_and_a_success_in_between_resets_the_count() {
        let (now, mut breaker) = (Instant::now(), breaker());
        for outcome in [Outcome::Failure; 4].into_iter().chain([Outcome::Neutral, Outcome::Success])
        {
            call(&mut breaker, outcome, now);
        }
        for _ in 0..4 {
            call(&mut breaker, Outcome::Failure, now);
        }
        assert_eq!(breaker.state(), BreakerState::Closed);
        assert_eq!(call(&mut breaker, Outcome::Failure, now), Some(Transition::Opened));
        assert_eq!(breaker.acquire(now), Err(now + MIN));
    }

    #[test]
    fn a_failure_rate_of_one_half_opens_it_once_the_window_is_full() {
        let (now, mut breaker) = (Instant::now(), breaker());
        for _ in 0..9 {
            call(&mut breaker, Outcome::Success, now);
            call(&mut breaker, Outcome::Failure, now);
        }
        call(&mut breaker, Outcome::Success, now);
        assert_eq!(breaker.state(), BreakerState::Closed);
        assert_eq!(call(&mut breaker, Outcome::Failure, now), Some(Transition::Opened));
    }

    #[test]
    fn one_trial_at_a_time_is_admitted_and_a_success_closes_it() {
        let begin = Instant::now();
        let (mut breaker, now) = (opened(begin), begin + MIN);
        let trial = breaker.acquire(now).unwrap();
        assert!(breaker.acquire(now).is_err());
        breaker.record(trial, Outcome::Neutral, now);
        assert_eq!(breaker.state(), BreakerState::HalfOpen, "a neutral trial frees its place");
        let trial = breaker.acquire(now).unwrap();
        assert_eq!(breaker.record(trial, Outcome::Success, now), Transition::Closed);
        assert!(breaker.acquire(now).is_ok() && breaker.acquire(now).is_ok());
    }

    #[test]
    fn a_trial_without_an_outcome_expires() {
        let begin = Instant::now();
        let (mut breaker, now) = (opened(begin), begin + MIN);
        let silent = breaker.acquire(now).unwrap();
        let second = breaker.acquire(now + TRIAL).unwrap();
        breaker.record(silent, Outcome::Failure, now + TRIAL);
        breaker.record(second, Outcome::Success, now + TRIAL);
        assert_eq!(breaker.state(), BreakerState::Closed, "the expired trial does not count");
    }

    #[test]
    fn open_periods_double_up_to_a_maximum_and_can_end_early() {
        let mut now = Instant::now();
        let mut breaker = opened(now);
        let mut periods = Vec::new();
        for _ in 0..5 {
            let until = breaker.check(now).unwrap_err();
            periods.push((until - now).as_secs());
            now = until;
            assert_eq!(call(&mut breaker, Outcome::Failure, now), Some(Transition::Reopened));
        }
        assert_eq!(periods, [1, 2, 4, 4, 4]);
        breaker.allow_trial();
        assert_eq!(call(&mut breaker, Outcome::Success, now), Some(Transition::Closed));
    }

    #[test]
    fn an_outcome_from_before_it_opened_does_not_count_as_a_trial() {
        let begin = Instant::now();
        let mut breaker = breaker();
        let old = breaker.acquire(begin).unwrap();
        for _ in 0..5 {
            call(&mut breaker, Outcome::Failure, begin);
        }
        let trial = breaker.acquire(begin + MIN).unwrap();
        breaker.record(old, Outcome::Failure, begin + MIN);
        breaker.record(trial, Outcome::Success, begin + MIN);
        assert_eq!(breaker.state(), BreakerState::Closed);
    }

    proptest! {
        #[test]
        fn a_call_is_admitted_after_the_longest_open_period_whatever_happens(
            steps in prop::collection::vec((0u64..3_000, 0u8..4), 0..200), jitter in 0.0..=1.0,
        ) {
            let (mut now, mut breaker) = (Instant::now(), breaker());
            breaker.config.jitter = jitter;
            let mut pending = Vec::new();
            for (millis, step) in steps {
                now += Duration::from_millis(millis);
                match (step, breaker.acquire(now)) {
                    (0, Ok(permit)) => pending.push(permit),
                    (1, Ok(permit)) => drop(breaker.record(permit, Outcome::Success, now)),
                    (2, Ok(permit)) => drop(breaker.record(permit, Outcome::Failure, now)),
                    (_, Ok(permit)) => drop(breaker.record(permit, Outcome::Neutral, now)),
                    (_, Err(until)) => prop_assert!(until > now && until <= now + MAX),
                }
            }
            prop_assert!(breaker.check(now + MAX).is_ok());
        }
    }
}

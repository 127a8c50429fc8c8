//! When an engine is left alone: a pure state machine, one an engine.
//!
//! Closed: all may ask. Open: none, for a pause that grows to [`LONGEST`] while trials fail. Half-open:
//! one at a time tries; who tries and vanishes gives the trial back. What was asked before a state
//! began says nothing in it.

use std::time::Duration;

use tokio::time::Instant;

/// As many failures in a row open it.
const IN_A_ROW: u32 = 5;
/// Or half of as many, the latest.
const RECENT: u32 = 20;
const SHORTEST: Duration = Duration::from_secs(1);
/// So that an engine which is back is known to be within 5 s.
const LONGEST: Duration = Duration::from_secs(4);
/// A trial that says nothing for so long does not keep others from trying.
const TRIAL: Duration = Duration::from_secs(4);

/// How an attempt went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    Success,
    Failure,
    /// It says nothing of the engine's health: it was full, or the caller left.
    Neutral,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Closed,
    Open {
        until: Instant,
    },
    /// Since when someone tries.
    HalfOpen {
        trial: Option<Instant>,
    },
}

/// What lets one attempt in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Ticket {
    era: u64,
}

#[derive(Debug)]
pub(super) struct Breaker {
    state: State,
    /// Counts the states and the trials.
    era: u64,
    in_a_row: u32,
    /// The latest first, failures as ones.
    recent: u32,
    seen: u32,
    pause: Duration,
}

impl Breaker {
    pub(super) fn new() -> Self {
        Breaker { state: State::Closed, era: 0, in_a_row: 0, recent: 0, seen: 0, pause: SHORTEST }
    }

    /// Whether an attempt would be let in; else when to ask again.
    pub(super) fn admits(&self, now: Instant) -> Result<(), Instant> {
        match self.state {
            State::Open { until } if now < until => Err(until),
            State::HalfOpen { trial: Some(since) } if now < since + TRIAL => {
                Err((now + SHORTEST).min(since + TRIAL))
            }
            State::Closed | State::Open { .. } | State::HalfOpen { .. } => Ok(()),
        }
    }

    pub(super) fn enter(&mut self, now: Instant) -> Result<Ticket, Instant> {
        self.admits(now)?;
        if self.state != State::Closed {
            self.go(State::HalfOpen { trial: Some(now) });
        }
        Ok(Ticket { era: self.era })
    }

    pub(super) fn leave(&mut self, ticket: Ticket, verdict: Verdict, now: Instant) {
        if ticket.era != self.era {
            return;
        }
        match (self.state, verdict) {
            (State::Closed, Verdict::Success) => self.note(false),
            (State::Closed, Verdict::Failure) => {
                self.note(true);
                let half = self.seen >= RECENT && self.recent.count_ones() * 2 >= RECENT;
                if self.in_a_row >= IN_A_ROW || half {
                    self.open(now);
                }
            }
            (State::HalfOpen { .. }, Verdict::Success) => {
                (self.in_a_row, self.recent, self.seen, self.pause) = (0, 0, 0, SHORTEST);
                self.go(State::Closed);
            }
            (State::HalfOpen { .. }, Verdict::Failure) => {
                self.pause = (self.pause * 2).min(LONGEST);
                self.open(now);
            }
            (State::HalfOpen { .. }, Verdict::Neutral) => {
                self.go(State::HalfOpen { trial: None });
            }
            (State::Closed, Verdict::Neutral) | (State::Open { .. }, _) => {}
        }
    }

    /// The engine was away and is seen again: it may be tried at once.
    pub(super) fn is_back(&mut self) {
        if matches!(self.state, State::Open { .. }) {
            self.go(State::HalfOpen { trial: None });
        }
    }

    /// As the gauge shows it: 0 closed, 1 half-open, 2 open.
    pub(super) fn level(&self) -> u8 {
        match self.state {
            State::Closed => 0,
            State::HalfOpen { .. } => 1,
            State::Open { .. } => 2,
        }
    }

    fn open(&mut self, now: Instant) {
        self.go(State::Open { until: now + self.pause });
    }

    fn go(&mut self, state: State) {
        self.state = state;
        self.era += 1;
    }

    fn note(&mut self, failure: bool) {
        self.in_a_row = if failure { self.in_a_row + 1 } else { 0 };
        self.recent = ((self.recent << 1) | u32::from(failure)) & ((1 << RECENT) - 1);
        self.seen = (self.seen + 1).min(RECENT);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn ask(breaker: &mut Breaker, verdict: Verdict, now: Instant) -> bool {
        let ticket = breaker.enter(now);
        if let Ok(ticket) = ticket {
            breaker.leave(ticket, verdict, now);
        }
        ticket.is_ok()
    }

    fn opened(now: Instant) -> Breaker {
        let mut breaker = Breaker::new();
        assert!((0..5).all(|_| ask(&mut breaker, Verdict::Failure, now)));
        assert_eq!(breaker.level(), 2);
        breaker
    }

    #[test]
    fn failures_in_a_row_open_it_and_one_success_in_between_does_not_let_them() {
        let (now, mut breaker) = (Instant::now(), Breaker::new());
        for _ in 0..4 {
            ask(&mut breaker, Verdict::Failure, now);
        }
        ask(&mut breaker, Verdict::Neutral, now);
        ask(&mut breaker, Verdict::Success, now);
        for _ in 0..4 {
            ask(&mut breaker, Verdict::Failure, now);
        }
        assert_eq!(breaker.level(), 0);
        ask(&mut breaker, Verdict::Failure, now);
        assert_eq!(breaker.enter(now), Err(now + SHORTEST));
    }

    #[test]
    fn an_engine_that_fails_every_second_time_is_left_alone_too() {
        let (now, mut breaker) = (Instant::now(), Breaker::new());
        for _ in 0..10 {
            ask(&mut breaker, Verdict::Success, now);
            ask(&mut breaker, Verdict::Failure, now);
        }
        assert_eq!(breaker.level(), 2);
    }

    #[test]
    fn one_tries_at_a_time_and_success_closes_it() {
        let begin = Instant::now();
        let (mut breaker, now) = (opened(begin), begin + SHORTEST);
        let trial = breaker.enter(now).unwrap();
        assert!(breaker.enter(now).is_err());
        breaker.leave(trial, Verdict::Neutral, now);
        assert_eq!(breaker.level(), 1, "who left gave the trial back");
        let trial = breaker.enter(now).unwrap();
        breaker.leave(trial, Verdict::Success, now);
        assert_eq!(breaker.level(), 0);
        assert!(breaker.enter(now).is_ok() && breaker.enter(now).is_ok());
    }

    #[test]
    fn a_silent_trial_does_not_keep_others_away_for_ever() {
        let begin = Instant::now();
        let (mut breaker, now) = (opened(begin), begin + SHORTEST);
        let silent = breaker.enter(now).unwrap();
        let second = breaker.enter(now + TRIAL).unwrap();
        breaker.leave(silent, Verdict::Failure, now + TRIAL);
        breaker.leave(second, Verdict::Success, now + TRIAL);
        assert_eq!(breaker.level(), 0, "what the first says later counts for nothing");
    }

    #[test]
    fn pauses_grow_to_a_bound_and_an_engine_that_is_seen_again_is_tried_at_once() {
        let mut now = Instant::now();
        let mut breaker = opened(now);
        let mut pauses = Vec::new();
        for _ in 0..5 {
            let until = breaker.admits(now).unwrap_err();
            pauses.push((until - now).as_secs());
            now = until;
            assert!(ask(&mut breaker, Verdict::Failure, now));
        }
        assert_eq!(pauses, [1, 2, 4, 4, 4]);
        breaker.is_back();
        assert!(ask(&mut breaker, Verdict::Success, now));
        assert_eq!(breaker.level(), 0);
    }

    #[test]
    fn what_was_asked_before_it_opened_says_nothing_of_a_trial() {
        let begin = Instant::now();
        let mut breaker = Breaker::new();
        let old = breaker.enter(begin).unwrap();
        for _ in 0..5 {
            ask(&mut breaker, Verdict::Failure, begin);
        }
        let trial = breaker.enter(begin + SHORTEST).unwrap();
        breaker.leave(old, Verdict::Failure, begin + SHORTEST);
        breaker.leave(trial, Verdict::Success, begin + SHORTEST);
        assert_eq!(breaker.level(), 0);
    }

    proptest! {
        #[test]
        fn whatever_happens_it_lets_someone_in_within_its_longest_pause(
            steps in prop::collection::vec((0u64..3_000, 0u8..4), 0..200),
        ) {
            let (mut now, mut breaker) = (Instant::now(), Breaker::new());
            let mut held = Vec::new();
            for (millis, step) in steps {
                now += Duration::from_millis(millis);
                match (step, breaker.enter(now)) {
                    (0, Ok(ticket)) => held.push(ticket),
                    (1, Ok(ticket)) => breaker.leave(ticket, Verdict::Success, now),
                    (2, Ok(ticket)) => breaker.leave(ticket, Verdict::Failure, now),
                    (_, Ok(ticket)) => breaker.leave(ticket, Verdict::Neutral, now),
                    (_, Err(until)) => prop_assert!(until > now && until <= now + LONGEST),
                }
            }
            prop_assert!(breaker.admits(now + LONGEST).is_ok());
        }
    }
}

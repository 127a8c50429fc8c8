//! Whether to ask Redis at all: after a few failures in a row calls stop waiting for it, and one call
//! in a while tries whether it is back.
//!
//! A try is guarded by time alone, so one that is dropped half way holds nothing up.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// So many failures in a row open the breaker.
const ENOUGH: u32 = 3;
/// Between two tries while it is open.
const PAUSE: Duration = Duration::from_millis(500);

/// What a result changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Change {
    None,
    Opened,
    Closed,
}

#[derive(Debug, Default)]
pub(super) struct Breaker(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    failures: u32,
    /// While the breaker is open.
    next_try: Option<Instant>,
}

impl Breaker {
    pub(super) fn is_open(&self) -> bool {
        self.state().next_try.is_some()
    }

    /// Whether this call may ask.
    pub(super) fn admits(&self, now: Instant) -> bool {
        match &mut self.state().next_try {
            None => true,
            Some(next) if *next <= now => {
                *next = now + PAUSE;
                true
            }
            Some(_) => false,
        }
    }

    pub(super) fn succeeded(&self) -> Change {
        let was = std::mem::take(&mut *self.state());
        if was.next_try.is_some() { Change::Closed } else { Change::None }
    }

    pub(super) fn failed(&self, now: Instant) -> Change {
        let mut state = self.state();
        state.failures = state.failures.saturating_add(1);
        if state.failures < ENOUGH || state.next_try.is_some() {
            return Change::None;
        }
        state.next_try = Some(now + PAUSE);
        Change::Opened
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_failures_in_a_row_open_it_and_one_success_closes_it() {
        let (breaker, now) = (Breaker::default(), Instant::now());
        let fails = || breaker.failed(now);
        assert_eq!([fails(), fails()], [Change::None; 2]);
        assert_eq!(breaker.succeeded(), Change::None);
        assert_eq!([fails(), fails(), fails()], [Change::None, Change::None, Change::Opened]);
        assert_eq!(fails(), Change::None);
        assert!(breaker.is_open());
        assert_eq!(breaker.succeeded(), Change::Closed);
        assert!(!breaker.is_open() && breaker.admits(now));
    }

    #[test]
    fn while_open_one_call_in_a_pause_tries_and_may_be_dropped() {
        let (breaker, opened) = (Breaker::default(), Instant::now());
        for _ in 0..ENOUGH {
            breaker.failed(opened);
        }
        assert!(!breaker.admits(opened));
        for pause in 1..=3 {
            let now = opened + PAUSE * pause;
            assert!(breaker.admits(now));
            assert!(!breaker.admits(now));
        }
    }
}

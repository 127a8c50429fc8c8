//! Calls counted in this process.

use std::time::{Duration, Instant};

use super::shards::{Entry, Shards};
use super::{Decision, Rate};

/// Counters of this process, as many as there are subjects in use times their methods.
#[derive(Debug, Default)]
pub struct Memory(Shards<Window>);

impl Memory {
    /// Counts one call at this moment.
    pub fn decide(
        &self,
        subject: &str,
        method: &'static str,
        rate: Rate,
        now: Instant,
    ) -> Decision {
        let opening = || Window::opening(now, rate.window);
        self.0.with((subject, method), now, opening, |window| window.count(rate, now))
    }

    /// What `decide` would say, without a call being counted.
    pub fn peek(&self, subject: &str, method: &'static str, rate: Rate, now: Instant) -> Decision {
        let window = self.0.find(subject, method, |window| *window);
        window.unwrap_or_else(|| Window::opening(now, rate.window)).look(rate, now)
    }
}

/// A sliding window: the calls of the current one, and those of the one before, which count in
/// proportion to how much of it still lies within the last window.
#[derive(Clone, Copy, Debug)]
pub(super) struct Window {
    pub(super) opened: Instant,
    pub(super) length: Duration,
    pub(super) calls: u32,
    pub(super) calls_before: u32,
}

/// What moving a window up to now did to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Moved {
    /// It is the same one.
    Not,
    /// It is the next one.
    On,
    /// It begins anew.
    Away,
}

impl Entry for Window {
    fn is_over(&self, now: Instant) -> bool {
        now.duration_since(self.opened) >= self.length * 2
    }
}

impl Window {
    pub(super) fn opening(now: Instant, length: Duration) -> Self {
        Window { opened: now, length, calls: 0, calls_before: 0 }
    }

    fn count(&mut self, rate: Rate, now: Instant) -> Decision {
        let mut decision = self.look(rate, now);
        if decision.retry_after.is_none() {
            self.calls += 1;
            decision.remaining -= 1;
        }
        decision
    }

    /// Moves the window up to now.
    pub(super) fn roll(&mut self, length: Duration, now: Instant) -> Moved {
        if self.length != length || self.is_over(now) {
            *self = Window::opening(now, length);
            return Moved::Away;
        }
        if now.duration_since(self.opened) < self.length {
            return Moved::Not;
        }
        self.opened += self.length;
        self.calls_before = std::mem::take(&mut self.calls);
        Moved::On
    }

    /// Moves the window up to now, and decides without counting.
    pub(super) fn look(&mut self, rate: Rate, now: Instant) -> Decision {
        self.roll(rate.window, now);
        let gone = now.duration_since(self.opened).as_secs_f64() / self.length.as_secs_f64();
        let before = (f64::from(self.calls_before) * (1.0 - gone)).floor();
        let free = f64::from(rate.limit) - f64::from(self.calls) - before;
        let reset = self.length.saturating_sub(now.duration_since(self.opened));
        let decision = Decision { limit: rate.limit, remaining: 0, reset, retry_after: None };
        if free < 1.0 {
            return Decision { retry_after: Some(self.wait(rate.limit, gone)), ..decision };
        }
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "1 <= free <= limit"
        )]
        let remaining = free as u32;
        Decision { remaining, ..decision }
    }

    /// Until enough of the calls before have left the sliding window.
    fn wait(&self, limit: u32, gone: f64) -> Duration {
        let windows = if self.calls == 0 && limit == 0 {
            // A share of nothing: it may be another one in the next window.
            1.0 - gone
        } else if self.calls < limit {
            1.0 - f64::from(limit - self.calls) / f64::from(self.calls_before.max(1)) - gone
        } else {
            2.0 - f64::from(limit) / f64::from(self.calls) - gone
        };
        self.length.mul_f64(windows.max(0.0)) + Duration::from_millis(1)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MINUTE: Duration = Duration::from_mins(1);

    fn rate(limit: u32) -> Rate {
        Rate::new(limit, MINUTE)
    }

    #[test]
    fn call_51_of_50_a_minute_is_refused_however_slowly_they_come() {
        let start = Instant::now();
        let mut window = Window::opening(start, MINUTE);
        for second in 0..50 {
            let decision = window.count(rate(50), start + Duration::from_secs(second));
            assert_eq!(decision.retry_after, None);
            assert_eq!(u64::from(decision.remaining), 49 - second);
        }
        let refused = window.count(rate(50), start + Duration::from_secs(59));
        assert!(refused.retry_after.is_some());
        assert_eq!(refused.reset, Duration::from_secs(1));
    }

    #[test]
    fn keys_and_methods_count_apart() {
        let (memory, now) = (Memory::default(), Instant::now());
        assert_eq!(memory.decide("a", "/x", rate(1), now).retry_after, None);
        assert_eq!(memory.decide("a", "/y", rate(1), now).retry_after, None);
        assert_eq!(memory.decide("b", "/x", rate(1), now).retry_after, None);
        assert!(memory.decide("a", "/x", rate(1), now).retry_after.is_some());
    }

    #[test]
    fn a_peek_returns_the_remaining_calls_and_counts_nothing() {
        let (memory, now) = (Memory::default(), Instant::now());
        for _ in 0..3 {
            assert_eq!(memory.peek("a", "/x", rate(2), now).remaining, 2);
        }
        memory.decide("a", "/x", rate(2), now);
        memory.decide("a", "/x", rate(2), now);
        let refused = memory.decide("a", "/x", rate(2), now);
        assert!(refused.retry_after.is_some());
        assert_eq!(memory.peek("a", "/x", rate(2), now), refused);
        assert_eq!(memory.peek("a", "/x", rate(2), now + MINUTE * 2).remaining, 2);
    }

    proptest! {
        #[test]
        fn who_waits_as_told_passes_and_no_window_holds_much_more_than_the_limit(
            limit in 1u32..40, gaps in prop::collection::vec(0u64..5_000, 1..400)
        ) {
            let mut now = Instant::now();
            let mut window = Window::opening(now, MINUTE);
            let mut passed: Vec<Instant> = Vec::new();
            for gap in gaps {
                now += Duration::from_millis(gap);
                match window.count(rate(limit), now).retry_after {
                    None => passed.push(now),
                    Some(wait) => {
                        prop_assert!(wait <= MINUTE + Duration::from_millis(1));
                        now += wait;
                        prop_assert_eq!(window.count(rate(limit), now).retry_after, None);
                        passed.push(now);
                    }
                }
                let recent = passed.iter().filter(|at| now.duration_since(**at) < MINUTE).count();
                prop_assert!(recent <= 2 * limit as usize);
            }
        }
    }
}

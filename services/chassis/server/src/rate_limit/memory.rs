//! Rate limits in the memory of one process.

use std::time::{Duration, Instant};

use super::shards::{Expiring, Shards};
use super::{Decision, Rate};

/// Sliding windows of this process, one per active subject and method.
#[derive(Debug, Default)]
pub struct MemoryLimiter(Shards<Window>);

impl MemoryLimiter {
    /// Counts one call at the time `now`.
    pub fn decide(
        &self,
        subject: &str,
        method: &'static str,
        rate: Rate,
        now: Instant,
    ) -> Decision {
        let new = || Window::new(now, rate.window);
        self.0.with((subject, method), now, new, |window| window.count(rate, now))
    }

    /// The decision that `decide` would return, without counting a call.
    pub fn peek(&self, subject: &str, method: &'static str, rate: Rate, now: Instant) -> Decision {
        let window = self.0.find(subject, method, |window| *window);
        window.unwrap_or_else(|| Window::new(now, rate.window)).peek(rate, now)
    }
}

/// A sliding window: the calls of the current fixed window, and those of the previous one. The latter count in
/// proportion to the part of the previous window that lies within the sliding one.
#[derive(Clone, Copy, Debug)]
pub(super) struct Window {
    pub(super) opened_at: Instant,
    pub(super) length: Duration,
    pub(super) calls: u32,
    pub(super) previous_calls: u32,
}

/// How advancing a window to the current time has changed it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum WindowShift {
    /// The window is the same.
    Unchanged,
    /// The next window has begun.
    Next,
    /// A new window begins now.
    Reset,
}

impl Expiring for Window {
    fn is_expired(&self, now: Instant) -> bool {
        now.duration_since(self.opened_at) >= self.length * 2
    }
}

impl Window {
    pub(super) fn new(now: Instant, length: Duration) -> Self {
        Window { opened_at: now, length, calls: 0, previous_calls: 0 }
    }

    fn count(&mut self, rate: Rate, now: Instant) -> Decision {
        let mut decision = self.peek(rate, now);
        if decision.retry_after.is_none() {
            self.calls += 1;
            decision.remaining -= 1;
        }
        decision
    }

    /// Advances the window to the current time.
    pub(super) fn advance(&mut self, length: Duration, now: Instant) -> WindowShift {
        if self.length != length || self.is_expired(now) {
            *self = Window::new(now, length);
            return WindowShift::Reset;
        }
        if now.duration_since(self.opened_at) < self.length {
            return WindowShift::Unchanged;
        }
        self.opened_at += self.length;
        self.previous_calls = std::mem::take(&mut self.calls);
        WindowShift::Next
    }

    /// Advances the window to the current time, and decides without counting.
    pub(super) fn peek(&mut self, rate: Rate, now: Instant) -> Decision {
        self.advance(rate.window, now);
        let elapsed = now.duration_since(self.opened_at).as_secs_f64() / self.length.as_secs_f64();
        let previous = (f64::from(self.previous_calls) * (1.0 - elapsed)).floor();
        let free = f64::from(rate.limit) - f64::from(self.calls) - previous;
        let reset = self.length.saturating_sub(now.duration_since(self.opened_at));
        let decision = Decision { limit: rate.limit, remaining: 0, reset, retry_after: None };
        if free < 1.0 {
            return Decision { retry_after: Some(self.wait(rate.limit, elapsed)), ..decision };
        }
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "1 <= free <= limit"
        )]
        let remaining = free as u32;
        Decision { remaining, ..decision }
    }

    /// Time until enough previous calls have left the sliding window. `elapsed` is the elapsed part of the window.
    fn wait(&self, limit: u32, elapsed: f64) -> Duration {
        let windows = if self.calls == 0 && limit == 0 {
            // This replica's share is 0; it may differ in the next window.
            1.0 - elapsed
        } else if self.calls < limit {
            1.0 - f64::from(limit - self.calls) / f64::from(self.previous_calls.max(1)) - elapsed
        } else {
            2.0 - f64::from(limit) / f64::from(self.calls) - elapsed
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
    fn call_51_of_50_a_minute_is_rejected_however_slowly_they_arrive() {
        let start = Instant::now();
        let mut window = Window::new(start, MINUTE);
        for second in 0..50 {
            let decision = window.count(rate(50), start + Duration::from_secs(second));
            assert_eq!(decision.retry_after, None);
            assert_eq!(u64::from(decision.remaining), 49 - second);
        }
        let rejected = window.count(rate(50), start + Duration::from_secs(59));
        assert!(rejected.retry_after.is_some());
        assert_eq!(rejected.reset, Duration::from_secs(1));
    }

    #[test]
    fn keys_and_methods_are_counted_separately() {
        let (memory, now) = (MemoryLimiter::default(), Instant::now());
        assert_eq!(memory.decide("a", "/x", rate(1), now).retry_after, None);
        assert_eq!(memory.decide("a", "/y", rate(1), now).retry_after, None);
        assert_eq!(memory.decide("b", "/x", rate(1), now).retry_after, None);
        assert!(memory.decide("a", "/x", rate(1), now).retry_after.is_some());
    }

    #[test]
    fn a_peek_returns_the_remaining_calls_and_counts_none() {
        let (memory, now) = (MemoryLimiter::default(), Instant::now());
        for _ in 0..3 {
            assert_eq!(memory.peek("a", "/x", rate(2), now).remaining, 2);
        }
        memory.decide("a", "/x", rate(2), now);
        memory.decide("a", "/x", rate(2), now);
        let rejected = memory.decide("a", "/x", rate(2), now);
        assert!(rejected.retry_after.is_some());
        assert_eq!(memory.peek("a", "/x", rate(2), now), rejected);
        assert_eq!(memory.peek("a", "/x", rate(2), now + MINUTE * 2).remaining, 2);
    }

    proptest! {
        #[test]
        fn a_call_after_the_stated_wait_passes_and_no_window_admits_more_than_twice_the_limit(
            limit in 1u32..40, gaps in prop::collection::vec(0u64..5_000, 1..400)
        ) {
            let mut now = Instant::now();
            let mut window = Window::new(now, MINUTE);
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

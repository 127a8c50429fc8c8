//! Calls counted in this process.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::{Decision, Rate};

/// So many locks, so that cores don't queue for one.
const SHARDS: usize = 16;
/// From this many subjects on a shard drops those that have nothing to say any more.
const CROWDED: usize = 4096;
/// At this many that all have something to say a shard begins anew: a limit that starts over is
/// better than a process without memory.
const MOST: usize = 65_536;

/// Counters of this process, as many as there are subjects in use times their methods.
#[derive(Debug, Default)]
pub struct Memory(Box<[Mutex<Shard>; SHARDS]>);

impl Memory {
    /// Counts one call at this moment.
    pub fn decide(
        &self,
        subject: &str,
        method: &'static str,
        rate: Rate,
        now: Instant,
    ) -> Decision {
        let mut shard = self.shard(subject);
        if let Some(window) = shard.window(subject, method) {
            return window.count(rate, now);
        }
        let mut window = Window::opening(now, rate.window);
        let decision = window.count(rate, now);
        shard.keep(subject, method, window, now);
        decision
    }

    /// What `decide` would say, without a call being counted.
    pub fn peek(&self, subject: &str, method: &'static str, rate: Rate, now: Instant) -> Decision {
        let window = self.shard(subject).window(subject, method).copied();
        window.unwrap_or_else(|| Window::opening(now, rate.window)).look(rate, now)
    }

    fn shard(&self, subject: &str) -> MutexGuard<'_, Shard> {
        let sum =
            subject.bytes().fold(0usize, |sum, byte| sum.wrapping_mul(31) + usize::from(byte));
        self.0[sum % SHARDS].lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[derive(Debug, Default)]
struct Shard {
    /// A subject calls few methods: looking through them is faster than a second hash.
    subjects: HashMap<Box<str>, Vec<(&'static str, Window)>>,
    /// Grows with what a sweep leaves, so that sweeps stay rare.
    sweep_at: usize,
}

impl Shard {
    fn window(&mut self, subject: &str, method: &str) -> Option<&mut Window> {
        let methods = self.subjects.get_mut(subject)?;
        methods.iter_mut().find(|(name, _)| *name == method).map(|(_, window)| window)
    }

    fn keep(&mut self, subject: &str, method: &'static str, window: Window, now: Instant) {
        if self.subjects.len() >= self.sweep_at.max(CROWDED) {
            self.sweep(now);
        }
        self.subjects.entry(subject.into()).or_default().push((method, window));
    }

    fn sweep(&mut self, now: Instant) {
        self.subjects.retain(|_, methods| methods.iter().any(|(_, window)| !window.is_over(now)));
        if self.subjects.len() >= MOST {
            self.subjects.clear();
        }
        self.sweep_at = (self.subjects.len() * 2).min(MOST);
    }
}

#[derive(Clone, Copy, Debug)]
struct Window {
    opened: Instant,
    length: Duration,
    calls: u32,
    calls_before: u32,
}

impl Window {
    fn opening(now: Instant, length: Duration) -> Self {
        Window { opened: now, length, calls: 0, calls_before: 0 }
    }

    fn is_over(&self, now: Instant) -> bool {
        now.duration_since(self.opened) >= self.length * 2
    }

    fn count(&mut self, rate: Rate, now: Instant) -> Decision {
        let mut decision = self.look(rate, now);
        if decision.retry_after.is_none() {
            self.calls += 1;
            decision.remaining -= 1;
        }
        decision
    }

    /// Moves the window up to now, and decides without counting.
    fn look(&mut self, rate: Rate, now: Instant) -> Decision {
        if self.length != rate.window || self.is_over(now) {
            *self = Window::opening(now, rate.window);
        } else if now.duration_since(self.opened) >= self.length {
            self.opened += self.length;
            self.calls_before = std::mem::take(&mut self.calls);
        }
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
        let windows = if self.calls < limit {
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
    fn a_peek_tells_what_is_left_and_counts_nothing() {
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

    #[test]
    fn what_has_nothing_to_say_any_more_is_dropped_and_the_rest_is_bounded() {
        let (mut shard, now) = (Shard::default(), Instant::now());
        let window = Window::opening(now, MINUTE);
        for subject in 0..CROWDED {
            shard.keep(&subject.to_string(), "/x", window, now);
        }
        shard.keep("late", "/x", window, now + MINUTE * 2);
        assert_eq!(shard.subjects.len(), 1);
        for subject in 0..MOST {
            shard.keep(&subject.to_string(), "/x", window, now);
        }
        assert!(shard.subjects.len() <= MOST);
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

//! How often a key may call a method: at most `limit` calls in any window.
//!
//! A sliding window of two counters, the first of which opens with the first call. Where a token
//! bucket lets `limit` and what trickles in meanwhile through, this refuses call 51 of "50 a minute"
//! however slowly the first fifty came; its state is as small.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use hapa_proto::auth::v1::Principal;

use crate::config::LimitConfig;
use crate::rpc::Rpc;

/// So many locks, so that cores don't queue for one.
const SHARDS: usize = 16;
/// At this many entries a shard drops those that have nothing to say any more.
const CROWDED: usize = 4096;

/// What was decided, as the `ratelimit-*` headers say it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Decision {
    pub(crate) limit: u32,
    pub(crate) remaining: u32,
    /// Until the window ends.
    pub(crate) reset: Duration,
    /// None: the call may pass. Else: when one will.
    pub(crate) retry_after: Option<Duration>,
}

/// A number of calls in a window.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rate {
    limit: u32,
    window: Duration,
}

/// Where calls are counted.
#[derive(Debug)]
pub(crate) enum Limiter {
    /// RATE_LIMIT_ENABLED=false.
    Off,
    /// In this process.
    Memory(Memory),
}

impl Limiter {
    pub(crate) fn new(config: &LimitConfig) -> Self {
        if config.rate_limit_enabled { Limiter::Memory(Memory::default()) } else { Limiter::Off }
    }

    /// Counts one call, none where no limit applies.
    pub(crate) fn decide(
        &self,
        key_id: &Arc<str>,
        rpc: &'static Rpc,
        rate: Rate,
    ) -> Option<Decision> {
        match self {
            Limiter::Memory(memory) if rate.limit > 0 => {
                Some(memory.decide(key_id, rpc.path, rate, Instant::now()))
            }
            _ => None,
        }
    }
}

/// The limit that applies: the key's for the method, the key's for all, the method's, the default.
pub(crate) fn rate(principal: &Principal, rpc: &Rpc, config: &LimitConfig) -> Rate {
    let of_key = |method: &str| principal.rate_limits.iter().find(|limit| limit.method == method);
    let (limit, seconds) = match (of_key(rpc.method()).or_else(|| of_key("*")), rpc.limit) {
        (Some(own), _) => (own.limit, own.window_seconds),
        (None, Some(default)) => default,
        (None, None) => (config.default_rate_limit, config.rate_limit_window_minutes * 60),
    };
    Rate { limit, window: Duration::from_secs(seconds.max(1).into()) }
}

type Entries = HashMap<(Arc<str>, &'static str), Window>;

/// Counters of this process, as many as there are keys in use times their methods.
#[derive(Debug, Default)]
pub(crate) struct Memory(Box<[Mutex<Entries>; SHARDS]>);

impl Memory {
    fn decide(&self, key_id: &Arc<str>, path: &'static str, rate: Rate, now: Instant) -> Decision {
        let shard =
            key_id.bytes().fold(0usize, |sum, byte| sum.wrapping_mul(31) + usize::from(byte));
        let mut entries = self.0[shard % SHARDS].lock().unwrap_or_else(PoisonError::into_inner);
        if entries.len() >= CROWDED {
            entries.retain(|_, window| !window.is_over(now));
        }
        let entry = entries.entry((Arc::clone(key_id), path));
        entry.or_insert_with(|| Window::opening(now, rate.window)).count(rate, now)
    }
}

#[derive(Debug)]
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
        self.calls += 1;
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "1 <= free <= limit"
        )]
        let remaining = (free - 1.0) as u32;
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
        Rate { limit, window: MINUTE }
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
        let (a, b) = (Arc::from("a"), Arc::from("b"));
        assert_eq!(memory.decide(&a, "/x", rate(1), now).retry_after, None);
        assert_eq!(memory.decide(&a, "/y", rate(1), now).retry_after, None);
        assert_eq!(memory.decide(&b, "/x", rate(1), now).retry_after, None);
        assert!(memory.decide(&a, "/x", rate(1), now).retry_after.is_some());
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

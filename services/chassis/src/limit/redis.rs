//! Calls counted in a Redis that replicas share: one script a decision, and never more than a moment's
//! wait. What Redis does not answer in time is decided by the counters of this process.
//!
//! A call that timed out here may still be counted there: that errs on the strict side.

use std::time::{Duration, Instant};

use secrecy::SecretString;

use super::{Decision, Memory, Rate};
use crate::config::Wrong;
use crate::redis::{self, Away, Manner, Script, Value};

/// Decisions that may wait for a connection or its socket; more are made here at once.
const MOST_QUEUED: usize = 8192;

/// See the module.
#[derive(Debug)]
pub struct Redis {
    shared: redis::Redis,
    script: Script,
    memory: Memory,
}

impl Redis {
    /// Starts to connect, and goes on for as long as this lives.
    pub(super) fn new(url: &SecretString, patience: Duration) -> Result<Self, Wrong> {
        let meanwhile = "this replica limits calls on its own";
        let manner = Manner { patience, most_queued: MOST_QUEUED, meanwhile };
        let script = Script::new(include_str!("window.lua"));
        Ok(Redis { shared: redis::Redis::new(url, manner)?, script, memory: Memory::default() })
    }

    pub(super) async fn decide(&self, subject: &str, method: &'static str, rate: Rate) -> Decision {
        let shared = self.ask(subject, method, rate, true).await;
        shared.unwrap_or_else(|| self.memory.decide(subject, method, rate, Instant::now()))
    }

    pub(super) async fn peek(&self, subject: &str, method: &'static str, rate: Rate) -> Decision {
        let shared = self.ask(subject, method, rate, false).await;
        shared.unwrap_or_else(|| self.memory.peek(subject, method, rate, Instant::now()))
    }

    pub(super) fn is_up(&self) -> bool {
        self.shared.is_up()
    }

    /// Whether it answers now. Asks where the breaker lets it, so that an outage ends without a call.
    pub(super) async fn probe(&self) -> bool {
        let rate = Rate::new(1, Duration::from_secs(1));
        let _ = self.run("health", "probe", rate, false).await;
        self.is_up()
    }

    /// None where Redis has no answer and this process must do.
    async fn ask(&self, subject: &str, method: &str, rate: Rate, counts: bool) -> Option<Decision> {
        let decision = self.run(subject, method, rate, counts).await.ok();
        if decision.is_none() {
            metrics::counter!("hapa_limiter_fallbacks_total").increment(1);
        }
        decision
    }

    async fn run(
        &self,
        subject: &str,
        method: &str,
        rate: Rate,
        counts: bool,
    ) -> Result<Decision, Away> {
        // The braces keep a subject's keys on one node of a cluster.
        let key = format!("hapa:limit:{{{subject}}}:{method}");
        let length = i64::try_from(rate.window.as_millis()).unwrap_or(i64::MAX);
        let arguments = [i64::from(rate.limit), length, i64::from(counts)];
        let arguments = arguments.into_iter().map(Value::from).collect();
        let (remaining, reset, wait): (u32, u64, u64) =
            self.shared.ask(&self.script, vec![key], arguments).await?;
        Ok(Decision {
            limit: rate.limit,
            remaining,
            reset: Duration::from_millis(reset),
            retry_after: (wait > 0).then(|| Duration::from_millis(wait)),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn without_redis_calls_are_limited_here() {
        let patience = Duration::from_millis(50);
        let redis = Redis::new(&"redis://127.0.0.1:1".into(), patience).unwrap();
        let rate = Rate::new(2, Duration::from_mins(1));
        for remaining in [1, 0] {
            assert_eq!(redis.peek("a", "/x", rate).await.retry_after, None);
            assert_eq!(redis.decide("a", "/x", rate).await.remaining, remaining);
        }
        assert!(redis.peek("a", "/x", rate).await.retry_after.is_some());
        assert!(redis.decide("a", "/x", rate).await.retry_after.is_some());
        assert!(!redis.is_up());
    }
}

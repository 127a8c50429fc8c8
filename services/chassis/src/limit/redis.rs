//! Calls counted in a Redis that replicas share: one script a decision, and never more than a moment's
//! wait. What Redis does not answer in time is decided by the counters of this process.
//!
//! A call that timed out here may still be counted there: that errs on the strict side.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use fred::clients::Client;
use fred::error::{Error, ErrorKind};
use fred::interfaces::{ClientLike as _, LuaInterface as _};
use fred::types::ConnectHandle;
use fred::types::config::{
    Config, ConnectionConfig, PerformanceConfig, ReconnectPolicy, TcpConfig, UnresponsiveConfig,
};
use fred::types::scripts::Script;
use secrecy::{ExposeSecret as _, SecretString};
use tokio::time::timeout;

use super::breaker::{Breaker, Change};
use super::{Decision, Memory, Rate};
use crate::config::{Wrong, check_redis_url};

/// Commands that may wait for a connection or its socket; more are refused at once.
const MOST_QUEUED: usize = 8192;

/// See the module.
pub struct Redis {
    client: Client,
    script: Script,
    connection: Mutex<ConnectHandle>,
    breaker: Breaker,
    memory: Memory,
    /// A decision takes well under a millisecond; past this Redis is as good as away.
    patience: Duration,
}

impl Redis {
    /// Starts to connect, and goes on for as long as this lives.
    pub(super) fn new(url: &SecretString, patience: Duration) -> Result<Self, Wrong> {
        check_redis_url(url)?;
        // Its errors name parts of the address at most, never the password.
        let config = Config::from_url_centralized(url.expose_secret());
        let config = config.map_err(|error| Wrong::new("REDIS_URL", error.to_string()))?;
        let client = Client::new(
            // Without `fail_fast` the first connection is retried like any other.
            Config { fail_fast: false, ..config },
            Some(PerformanceConfig {
                default_command_timeout: patience,
                ..PerformanceConfig::default()
            }),
            Some(connection(patience)),
            Some(reconnects()),
        );
        let connection = Mutex::new(client.connect());
        let script = Script::from_lua(include_str!("window.lua"));
        let (breaker, memory) = (Breaker::default(), Memory::default());
        Ok(Redis { client, script, connection, breaker, memory, patience })
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
        self.client.is_connected() && !self.breaker.is_open()
    }

    /// Whether it answers now. Asks where the breaker lets it, so that an outage ends without a call.
    pub(super) async fn probe(&self) -> bool {
        let rate = Rate::new(1, Duration::from_secs(1));
        self.try_asking("health", "probe", rate, false).await;
        self.is_up()
    }

    /// None where Redis has no answer and this process must do.
    async fn ask(&self, subject: &str, method: &str, rate: Rate, counts: bool) -> Option<Decision> {
        let decision = self.try_asking(subject, method, rate, counts).await;
        if decision.is_none() {
            metrics::counter!("hapa_limiter_fallbacks_total").increment(1);
        }
        decision
    }

    async fn try_asking(
        &self,
        subject: &str,
        method: &str,
        rate: Rate,
        counts: bool,
    ) -> Option<Decision> {
        if self.breaker.admits(Instant::now()) {
            match self.run(subject, method, rate, counts).await {
                Ok(decision) => {
                    if self.breaker.succeeded() == Change::Closed {
                        tracing::info!("Redis answers again: replicas limit calls together");
                    }
                    return Some(decision);
                }
                Err(error) => {
                    if self.breaker.failed(Instant::now()) == Change::Opened {
                        tracing::warn!(%error, "Redis does not answer: this replica limits calls on its own");
                    }
                }
            }
        }
        None
    }

    async fn run(
        &self,
        subject: &str,
        method: &str,
        rate: Rate,
        counts: bool,
    ) -> Result<Decision, Error> {
        if !self.connected() {
            return Err(Error::new(ErrorKind::IO, "there is no connection"));
        }
        // The braces keep a subject's keys on one node of a cluster.
        let key = format!("hapa:limit:{{{subject}}}:{method}");
        let length = i64::try_from(rate.window.as_millis()).unwrap_or(i64::MAX);
        let arguments = vec![i64::from(rate.limit), length, i64::from(counts)];
        // fred bounds each command, this bounds them all.
        let reply = timeout(self.patience, self.evaluate(key, arguments)).await;
        let (remaining, reset, wait) =
            reply.unwrap_or_else(|_| Err(Error::new(ErrorKind::Timeout, "no answer in time")))?;
        Ok(Decision {
            limit: rate.limit,
            remaining,
            reset: Duration::from_millis(reset),
            retry_after: (wait > 0).then(|| Duration::from_millis(wait)),
        })
    }

    async fn evaluate(&self, key: String, arguments: Vec<i64>) -> Result<(u32, u64, u64), Error> {
        let known = self.script.evalsha(&self.client, key.as_str(), arguments.clone()).await;
        match (known, self.script.lua()) {
            // EVAL also makes it known to a Redis that started meanwhile.
            (Err(error), Some(lua)) if error.details().starts_with("NOSCRIPT") => {
                self.client.eval(lua.clone(), key, arguments).await
            }
            (known, _) => known,
        }
    }

    /// Whether there is a connection; one that gave up is begun again.
    fn connected(&self) -> bool {
        let mut connection = self.connection.lock().unwrap_or_else(PoisonError::into_inner);
        if connection.is_finished() {
            *connection = self.client.connect();
        }
        drop(connection);
        self.client.is_connected()
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        // The task owns the socket.
        self.connection.get_mut().unwrap_or_else(PoisonError::into_inner).abort();
    }
}

impl std::fmt::Debug for Redis {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Redis").field("is_up", &self.is_up()).finish_non_exhaustive()
    }
}

fn connection(patience: Duration) -> ConnectionConfig {
    ConnectionConfig {
        connection_timeout: Duration::from_secs(1),
        internal_command_timeout: Duration::from_secs(1),
        // A second attempt would count a call twice.
        max_command_attempts: 1,
        max_command_buffer_len: MOST_QUEUED,
        // Each write puts it off, so with the usual patience it is shorter than the breaker's pause.
        unresponsive: UnresponsiveConfig {
            max_timeout: Some(patience * 6),
            interval: Duration::from_millis(100),
        },
        tcp: TcpConfig { nodelay: Some(true), ..TcpConfig::default() },
        ..ConnectionConfig::default()
    }
}

/// For ever, 20 ms to 2 s apart; the first connection waits too.
fn reconnects() -> ReconnectPolicy {
    let mut policy = ReconnectPolicy::new_exponential(0, 20, 2_000, 2);
    policy.set_jitter(20);
    policy
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: Duration = Duration::from_millis(50);

    #[tokio::test]
    async fn a_wrong_url_is_refused_by_name_and_without_its_password() {
        for url in ["memcached://x", "redis://", "redis://:hunter2@host/many", "redis-cluster://x"]
        {
            let wrong = Redis::new(&url.into(), PATIENCE).unwrap_err();
            assert_eq!(wrong.name, "REDIS_URL");
            assert!(!wrong.problem.contains("hunter2"), "{wrong}");
        }
    }

    #[tokio::test]
    async fn a_url_with_tls_finds_the_one_crypto_provider() {
        assert!(
            Redis::new(&"rediss://user:password@redis.example:6380/1".into(), PATIENCE).is_ok()
        );
    }

    #[tokio::test]
    async fn without_redis_calls_are_limited_here() {
        let redis = Redis::new(&"redis://127.0.0.1:1".into(), PATIENCE).unwrap();
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

//! The client of the Redis that replicas share. Each operation is one Lua script with a short timeout. Callers have a
//! fallback, so an unavailable Redis never fails a call.
//!
//! A script that has timed out here may still run in Redis.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use fred::clients::Client;
use fred::error::{Error, ErrorKind};
use fred::interfaces::{ClientLike as _, LuaInterface as _};
use fred::types::ConnectHandle;
use fred::types::config::{
    Config, ConnectionConfig, PerformanceConfig, ReconnectPolicy, TcpConfig, UnresponsiveConfig,
};
use hapa_core::circuit_breaker::{
    BreakerState, CallPermit, CircuitBreaker, CircuitBreakerConfig, Outcome, Transition,
};
use hapa_core::config::ConfigError;
use secrecy::{ExposeSecret as _, SecretString};
use tokio::time::{Instant, sleep, timeout};

/// Arguments and results of scripts.
pub use fred::types::{FromValue, Value};

/// Number of steps in which the timeout of [`Redis::run_until_silent`] is measured. A process without processor time is
/// late with its own steps too, so it does not mistake its own pause for a pause of Redis.
const SILENCE_STEP_COUNT: u32 = 5;
/// Time without data after which a connection is replaced, unless the reply timeout requires more.
const UNRESPONSIVE_TIMEOUT: Duration = Duration::from_millis(1_500);
/// Maximum duration of a script, as a multiple of the reply timeout, while other replies arrive.
const MAX_TIMEOUT_FACTOR: u32 = 4;
/// Three consecutive failures open the breaker. While it is open, one call in half a second is a trial.
const BREAKER: CircuitBreakerConfig = CircuitBreakerConfig {
    consecutive_failures: 3,
    failure_rate: None,
    min_open_period: Duration::from_millis(500),
    max_open_period: Duration::from_millis(500),
    jitter: 0.0,
    trial_timeout: Duration::from_millis(500),
};

/// Validates a Redis URL: one server, with or without TLS. Clusters and sentinels are not supported.
pub fn check_redis_url(url: &SecretString) -> Result<(), ConfigError> {
    let url = url.expose_secret();
    if url.starts_with("redis://") || url.starts_with("rediss://") {
        return Ok(());
    }
    Err(ConfigError::new("REDIS_URL", "must begin with redis:// or rediss://"))
}

/// Options of a Redis client.
#[derive(Clone, Copy, Debug)]
pub struct RedisOptions {
    /// Timeout of a reply. A script takes well under a millisecond.
    pub reply_timeout: Duration,
    /// Maximum number of scripts that wait for a connection or its socket. Further scripts fail at once.
    pub max_queued: usize,
    /// What happens while Redis is unavailable, for the log.
    pub fallback: &'static str,
}

/// A client with its own connection.
pub struct Redis {
    client: Client,
    connection: Mutex<ConnectHandle>,
    breaker: Mutex<CircuitBreaker>,
    options: RedisOptions,
    /// Number of replies, which shows whether the connection is alive.
    reply_count: AtomicU64,
}

/// A Lua script.
#[derive(Clone, Debug)]
pub struct Script(fred::types::scripts::Script);

impl Script {
    /// A script from its source code.
    pub fn new(lua: &str) -> Self {
        Script(fred::types::scripts::Script::from_lua(lua))
    }
}

/// Redis has not replied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RedisUnavailable {
    /// Whether the script was sent. False if the circuit is open.
    pub was_sent: bool,
}

/// A reply to [`Redis::run_until_silent`].
#[derive(Debug)]
pub struct TimedReply<R> {
    /// The reply.
    pub reply: R,
    /// Whether the reply arrived so late that another replica may have timed out.
    pub is_nearly_timed_out: bool,
}

/// No reply of any script has arrived within the reply timeout.
#[derive(Debug)]
pub struct NoReply {
    /// The latest failure, for the log.
    pub cause: String,
}

impl Redis {
    /// A client that connects in the background until it is dropped. Requires a runtime.
    pub fn new(url: &SecretString, options: RedisOptions) -> Result<Self, ConfigError> {
        Redis::with_command_timeout(url, options, options.reply_timeout)
    }

    /// A client for [`Redis::run_until_silent`], whose commands may take longer than the reply timeout.
    pub fn tolerating_slow_replies(
        url: &SecretString,
        options: RedisOptions,
    ) -> Result<Self, ConfigError> {
        Redis::with_command_timeout(url, options, options.reply_timeout * MAX_TIMEOUT_FACTOR)
    }

    fn with_command_timeout(
        url: &SecretString,
        options: RedisOptions,
        command_timeout: Duration,
    ) -> Result<Self, ConfigError> {
        check_redis_url(url)?;
        // Its errors contain at most parts of the address, never the password.
        let config = Config::from_url_centralized(url.expose_secret());
        let config = config.map_err(|error| ConfigError::new("REDIS_URL", error.to_string()))?;
        let client = Client::new(
            // Without `fail_fast` the client retries the first connection like any other.
            Config { fail_fast: false, ..config },
            Some(PerformanceConfig {
                default_command_timeout: command_timeout,
                ..PerformanceConfig::default()
            }),
            Some(connection_config(options)),
            Some(reconnect_policy()),
        );
        let connection = Mutex::new(client.connect());
        let breaker = Mutex::new(CircuitBreaker::new(BREAKER));
        Ok(Redis { client, connection, breaker, options, reply_count: AtomicU64::new(0) })
    }

    /// Whether Redis is connected and the circuit is closed.
    pub fn is_up(&self) -> bool {
        self.client.is_connected() && self.breaker().state() == BreakerState::Closed
    }

    /// Runs a script within the reply timeout. Fails at once if the circuit is open.
    pub async fn run<R: FromValue>(
        &self,
        script: &Script,
        keys: Vec<String>,
        arguments: Vec<Value>,
    ) -> Result<R, RedisUnavailable> {
        let Ok(permit) = self.breaker().acquire(Instant::now()) else {
            return Err(RedisUnavailable { was_sent: false });
        };
        match self.run_within_timeout(script, keys, arguments).await {
            Ok(reply) => {
                self.record(permit, Outcome::Success, None);
                Ok(reply)
            }
            Err(error) => {
                self.record(permit, Outcome::Failure, Some(&error));
                Err(RedisUnavailable { was_sent: true })
            }
        }
    }

    fn record(&self, permit: CallPermit, outcome: Outcome, error: Option<&Error>) {
        let fallback = self.options.fallback;
        let transition = self.breaker().record(permit, outcome, Instant::now());
        match transition {
            Transition::Opened => {
                let error = error.map(describe);
                tracing::warn!(error, "Redis is unavailable: {fallback}");
            }
            Transition::Closed => {
                tracing::info!("Redis is available again; while it was not: {fallback}");
            }
            Transition::Unchanged | Transition::Reopened => {}
        }
    }

    fn breaker(&self) -> MutexGuard<'_, CircuitBreaker> {
        self.breaker.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether there is a connection.
    pub fn is_connected(&self) -> bool {
        self.client.is_connected()
    }

    /// Runs an idempotent script, without the circuit breaker. It waits for a lost connection and retries failed
    /// attempts. It fails if no reply of any script has arrived within the reply timeout: while replies arrive, even
    /// late ones, Redis is alive.
    pub async fn run_until_silent<R: FromValue>(
        &self,
        script: &Script,
        keys: Vec<String>,
        arguments: Vec<Value>,
    ) -> Result<TimedReply<R>, NoReply> {
        let step = self.options.reply_timeout / SILENCE_STEP_COUNT;
        let (mut last_count, mut silent_steps) = (self.reply_count.load(Ordering::Relaxed), 0);
        let mut cause = "there is no connection".to_owned();
        let mut attempt = None;
        for _ in 0..SILENCE_STEP_COUNT * MAX_TIMEOUT_FACTOR {
            if attempt.is_none() && self.ensure_connecting() {
                "no reply in time".clone_into(&mut cause);
                attempt = Some(Box::pin(self.attempt(script, keys.clone(), arguments.clone())));
            }
            match &mut attempt {
                None => sleep(step).await,
                Some(pending) => match timeout(step, pending).await {
                    Ok(Ok(reply)) => {
                        let is_nearly_timed_out = silent_steps + 1 >= SILENCE_STEP_COUNT;
                        return Ok(TimedReply { reply, is_nearly_timed_out });
                    }
                    Ok(Err(error)) => {
                        cause = error.to_string();
                        attempt = None;
                        sleep(step).await;
                    }
                    Err(_) => {}
                },
            }
            let count = self.reply_count.load(Ordering::Relaxed);
            silent_steps = if count == last_count { silent_steps + 1 } else { 0 };
            last_count = count;
            if silent_steps >= SILENCE_STEP_COUNT {
                break;
            }
        }
        Err(NoReply { cause })
    }

    /// Runs a script once, limited only by the command timeout.
    pub async fn attempt<R: FromValue>(
        &self,
        script: &Script,
        keys: Vec<String>,
        arguments: Vec<Value>,
    ) -> Result<R, Error> {
        if !self.ensure_connecting() {
            return Err(Error::new(ErrorKind::IO, "there is no connection"));
        }
        let reply = self.evaluate(script, keys, arguments).await?.convert()?;
        self.reply_count.fetch_add(1, Ordering::Relaxed);
        Ok(reply)
    }

    async fn run_within_timeout<R: FromValue>(
        &self,
        script: &Script,
        keys: Vec<String>,
        arguments: Vec<Value>,
    ) -> Result<R, Error> {
        if !self.ensure_connecting() {
            return Err(Error::new(ErrorKind::IO, "there is no connection"));
        }
        // fred limits each command; this limits both commands together.
        let reply =
            timeout(self.options.reply_timeout, self.evaluate(script, keys, arguments)).await;
        let timed_out = |_| Err(Error::new(ErrorKind::Timeout, "no reply in time"));
        reply.unwrap_or_else(timed_out)?.convert()
    }

    async fn evaluate(
        &self,
        Script(script): &Script,
        keys: Vec<String>,
        arguments: Vec<Value>,
    ) -> Result<Value, Error> {
        let reply = script.evalsha(&self.client, keys.clone(), arguments.clone()).await;
        match (reply, script.lua()) {
            // EVAL also loads the script into a Redis that has restarted.
            (Err(error), Some(lua)) if error.details().starts_with("NOSCRIPT") => {
                self.client.eval(lua.clone(), keys, arguments).await
            }
            (reply, _) => reply,
        }
    }

    /// Whether there is a connection. Restarts a connection task that has ended.
    fn ensure_connecting(&self) -> bool {
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

/// The class of an error, and the first word of Redis's message, such as NOAUTH. The rest may quote a command.
fn describe(error: &Error) -> String {
    let word = error.details().split(' ').next().unwrap_or_default();
    let is_word = (3..=20).contains(&word.len()) && word.bytes().all(|b| b.is_ascii_uppercase());
    let kind = format!("{:?}", error.kind());
    if is_word { format!("{kind} {word}") } else { kind }
}

fn connection_config(options: RedisOptions) -> ConnectionConfig {
    ConnectionConfig {
        connection_timeout: Duration::from_secs(1),
        internal_command_timeout: Duration::from_secs(1),
        // A second attempt would run the script twice.
        max_command_attempts: 1,
        max_command_buffer_len: options.max_queued,
        // Each write restarts this timeout, so with the usual reply timeout it is shorter than the open period of the
        // circuit breaker.
        unresponsive: UnresponsiveConfig {
            max_timeout: Some(
                (options.reply_timeout * 6)
                    .min(UNRESPONSIVE_TIMEOUT.max(options.reply_timeout * 2)),
            ),
            interval: Duration::from_millis(100),
        },
        tcp: TcpConfig { nodelay: Some(true), ..TcpConfig::default() },
        ..ConnectionConfig::default()
    }
}

/// Unlimited attempts, 20 ms to 2 s apart. The first connection is delayed too.
fn reconnect_policy() -> ReconnectPolicy {
    let mut policy = ReconnectPolicy::new_exponential(0, 20, 2_000, 2);
    policy.set_jitter(20);
    policy
}

#[cfg(test)]
mod tests {
    use super::*;

    const OPTIONS: RedisOptions = RedisOptions {
        reply_timeout: Duration::from_millis(50),
        max_queued: 8,
        fallback: "the test has no Redis",
    };

    #[tokio::test]
    async fn the_error_of_an_invalid_url_names_the_setting_without_the_password() {
        for url in ["memcached://x", "redis://", "redis://:hunter2@host/many", "redis-cluster://x"]
        {
            let error = Redis::new(&url.into(), OPTIONS).unwrap_err();
            assert_eq!(error.name, "REDIS_URL");
            assert!(!error.problem.contains("hunter2"), "{error}");
        }
    }

    #[tokio::test]
    async fn a_url_with_tls_uses_the_only_crypto_provider() {
        assert!(Redis::new(&"rediss://user:password@redis.example:6380/1".into(), OPTIONS).is_ok());
    }

    #[tokio::test]
    async fn an_unavailable_redis_is_tried_three_times_before_the_circuit_opens() {
        let redis = Redis::new(&"redis://127.0.0.1:1".into(), OPTIONS).unwrap();
        let script = Script::new("return 1");
        let mut attempts = Vec::new();
        for _ in 0..4 {
            let reply = redis.run::<i64>(&script, Vec::new(), Vec::new()).await;
            attempts.push(reply.unwrap_err().was_sent);
        }
        assert_eq!(attempts, [true, true, true, false]);
        assert!(!redis.is_up());
    }
}

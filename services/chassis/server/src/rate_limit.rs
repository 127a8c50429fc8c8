//! The rate limiter: at most `limit` calls of a caller to a method in any window.
//!
//! The algorithm is a sliding window of two counters; the first window opens with the first call. A token bucket would
//! admit more than `limit` calls, because it refills during the window. This one rejects call 51 of "50 a minute",
//! however slowly the first fifty arrived, with state of the same size.
//!
//! Replicas with a shared Redis count together. While Redis is unavailable, each replica grants its share: the limit
//! divided by the number of replicas.

mod counter;
pub mod failed_attempts;
mod memory;
mod redis;
mod replicas;
mod shards;

use std::time::{Duration, Instant};

use clap::{ArgAction, Args};
use hapa_core::config::seconds;
use hapa_proto::auth::v1::Principal;
use secrecy::SecretString;

pub use self::memory::MemoryLimiter;
pub use self::redis::Redis;
use hapa_core::access::Rpc;

const DEGRADED_MESSAGE: &str = "Redis does not answer: each replica grants its share of each limit";
/// Maximum duration of a probe. Longer than a reconnect and the open period of the circuit breaker.
const PROBE_TIMEOUT: Duration = Duration::from_millis(1_500);
const PROBE_INTERVAL: Duration = Duration::from_millis(50);

/// Settings of the rate limiter.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Rate limits")]
pub struct LimitConfig {
    /// Whether rate limits apply.
    #[arg(long, env = "RATE_LIMIT_ENABLED", action = ArgAction::Set, value_parser = hapa_core::config::boolean, default_value_t = true)]
    pub rate_limit_enabled: bool,
    /// Calls per key, method and window if neither the key nor the method has its own limit; 0: no limit.
    #[arg(long, env = "DEFAULT_RATE_LIMIT", default_value_t = 100)]
    pub default_rate_limit: u32,
    /// Window of DEFAULT_RATE_LIMIT, in minutes.
    #[arg(long, env = "RATE_LIMIT_WINDOW_MINUTES", default_value_t = 60, value_parser = clap::value_parser!(u32).range(1..=1440))]
    pub rate_limit_window_minutes: u32,
    /// Time without any reply of Redis after which a replica decides on its own, in seconds. Slow replies count as
    /// replies.
    #[arg(long, env = "REDIS_TIMEOUT_SECONDS", default_value = "0.5", value_parser = seconds)]
    pub redis_timeout_seconds: Duration,
    /// Number of replicas that share each limit while Redis is unavailable, 1 or more. Default: the replicas that
    /// have registered in Redis for the same role.
    #[arg(long, env = "RATE_LIMIT_REPLICAS", value_parser = clap::value_parser!(u32).range(1..))]
    pub rate_limit_replicas: Option<u32>,
    /// Failed authentications per address (IPv6: per /64) and minute. Beyond it invalid credentials from that address
    /// are rejected with E4004; valid ones are always accepted. 0: no limit, also for the passwords of an account.
    #[arg(long, env = "AUTH_FAILURE_LIMIT", default_value_t = 60)]
    pub auth_failure_limit: u32,
}

/// A decision, with the values of the `ratelimit-*` headers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Decision {
    /// Maximum number of calls in a window.
    pub limit: u32,
    /// Number of further calls that would be admitted now.
    pub remaining: u32,
    /// Time until the window ends.
    pub reset: Duration,
    /// `None`: the call is admitted. Otherwise the time until a call will be.
    pub retry_after: Option<Duration>,
}

/// A number of calls in a window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    limit: u32,
    window: Duration,
}

impl Rate {
    /// `limit` calls in a window of at least 1 ms; 0 calls: no limit.
    pub const fn new(limit: u32, window: Duration) -> Self {
        let min_window = Duration::from_millis(1);
        let window = if window.as_millis() == 0 { min_window } else { window };
        Rate { limit, window }
    }

    /// Whether the rate is limited.
    pub(crate) const fn is_limited(self) -> bool {
        self.limit > 0
    }
}

/// A rate limiter, by where it counts calls.
#[derive(Debug)]
pub enum Limiter {
    /// No limits: RATE_LIMIT_ENABLED=false.
    Off,
    /// In this process.
    Memory(MemoryLimiter),
    /// In a Redis that replicas share, and in this process while Redis is unavailable.
    Redis(Redis),
}

impl Limiter {
    /// A limiter without roles. With a Redis it requires a runtime, but does not wait for the connection.
    pub fn new(config: &LimitConfig, redis_url: Option<&SecretString>) -> anyhow::Result<Self> {
        Limiter::for_roles(config, redis_url, &[])
    }

    /// A limiter for a process with these roles, such as "codegen". Only replicas with a method's role share its limit.
    pub fn for_roles(
        config: &LimitConfig,
        redis_url: Option<&SecretString>,
        roles: &[&str],
    ) -> anyhow::Result<Self> {
        Ok(match redis_url {
            _ if !config.rate_limit_enabled => Limiter::Off,
            None => Limiter::Memory(MemoryLimiter::default()),
            Some(url) => Limiter::Redis(Redis::new(url, config, roles)?),
        })
    }

    /// Counts one call of a subject, such as `key:key_ab12`. `None` if no limit applies.
    pub async fn decide(
        &self,
        subject: &str,
        method: &'static str,
        rate: Rate,
    ) -> Option<Decision> {
        match self {
            Limiter::Memory(memory) if rate.limit > 0 => {
                Some(memory.decide(subject, method, rate, Instant::now()))
            }
            Limiter::Redis(redis) if rate.limit > 0 => {
                Some(redis.decide(subject, method, rate).await)
            }
            _ => None,
        }
    }

    /// The decision that `decide` would return, without counting a call.
    pub async fn peek(&self, subject: &str, method: &'static str, rate: Rate) -> Option<Decision> {
        match self {
            Limiter::Memory(memory) if rate.limit > 0 => {
                Some(memory.peek(subject, method, rate, Instant::now()))
            }
            Limiter::Redis(redis) if rate.limit > 0 => {
                Some(redis.peek(subject, method, rate).await)
            }
            _ => None,
        }
    }

    /// Checks that replicas count together, according to the latest heartbeat in Redis. Waits up to 1.5 s for a new
    /// connection. `None` without a Redis.
    pub async fn probe(&self) -> Option<Result<(), String>> {
        let Limiter::Redis(redis) = self else { return None };
        let begin = Instant::now();
        while !redis.is_up() {
            if begin.elapsed() > PROBE_TIMEOUT {
                return Some(Err(DEGRADED_MESSAGE.to_owned()));
            }
            tokio::time::sleep(PROBE_INTERVAL).await;
        }
        Some(Ok(()))
    }

    /// Number of replicas that share a limit on this method while Redis is unavailable; `None` without a Redis.
    pub fn replicas(&self, method: &str) -> Option<u32> {
        match self {
            Limiter::Redis(redis) => Some(redis.replicas(method)),
            _ => None,
        }
    }

    /// A message for operators while Redis is configured but unavailable.
    pub fn degraded(&self) -> Option<&'static str> {
        match self {
            Limiter::Redis(redis) if !redis.is_up() => Some(DEGRADED_MESSAGE),
            _ => None,
        }
    }

    /// Updates the gauge `hapa_redis_up`.
    pub fn gauge(&self) {
        if let Limiter::Redis(redis) = self {
            metrics::gauge!("hapa_redis_up").set(f64::from(u8::from(redis.is_up())));
        }
    }
}

/// The first of these limits that exists: the key's for the method, the key's for all methods, the method's, the default.
pub fn rate(principal: &Principal, rpc: &Rpc, config: &LimitConfig) -> Rate {
    let of_key = |method: &str| principal.rate_limits.iter().find(|limit| limit.method == method);
    let (limit, seconds) = match (of_key(rpc.method()).or_else(|| of_key("*")), rpc.limit) {
        (Some(own), _) => (own.limit, own.window_seconds),
        (None, Some(default)) => default,
        (None, None) => (config.default_rate_limit, config.rate_limit_window_minutes * 60),
    };
    Rate::new(limit, Duration::from_secs(seconds.max(1).into()))
}

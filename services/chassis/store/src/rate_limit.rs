//! How often a caller may call a method: at most `limit` calls in any window.
//!
//! A sliding window of two counters, the first of which opens with the first call. Where a token
//! bucket lets `limit` and what trickles in meanwhile through, this refuses call 51 of "50 a minute"
//! however slowly the first fifty came; its state is as small.
//!
//! Replicas count together where they share a Redis. While it does not answer, each grants its share: the
//! limit divided by the number of replicas.

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

pub use self::memory::Memory;
pub use self::redis::Redis;
use hapa_core::access::Rpc;

const AWAY: &str = "Redis does not answer: each replica grants its share of each limit";
/// Longer than a broken connection takes to be made again and the breaker to let a try through.
const PROBING: Duration = Duration::from_millis(1_500);
const BETWEEN_PROBES: Duration = Duration::from_millis(50);

/// Settings of the rate limiter.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Rate limits")]
pub struct LimitConfig {
    /// Whether calls are limited at all.
    #[arg(long, env = "RATE_LIMIT_ENABLED", action = ArgAction::Set, default_value_t = true)]
    pub rate_limit_enabled: bool,
    /// Calls per key, method and window where neither the key nor the method says otherwise; 0: no limit.
    #[arg(long, env = "DEFAULT_RATE_LIMIT", default_value_t = 100)]
    pub default_rate_limit: u32,
    /// That window, in minutes.
    #[arg(long, env = "RATE_LIMIT_WINDOW_MINUTES", default_value_t = 60, value_parser = clap::value_parser!(u32).range(1..=1440))]
    pub rate_limit_window_minutes: u32,
    /// Silence of Redis after which a replica decides alone, in seconds. Slow replies are no silence.
    #[arg(long, env = "REDIS_TIMEOUT_SECONDS", default_value = "0.5", value_parser = seconds)]
    pub redis_timeout_seconds: Duration,
    /// Replicas that share each limit while Redis is away, 1 or more; default: as many as have
    /// registered in Redis for the same role.
    #[arg(long, env = "RATE_LIMIT_REPLICAS", value_parser = clap::value_parser!(u32).range(1..))]
    pub rate_limit_replicas: Option<u32>,
    /// Failed authentications per address (IPv6: per /64) and minute; beyond it wrong credentials from
    /// there are refused with E4004, valid ones never; 0: no limit, also for the passwords of an account.
    #[arg(long, env = "AUTH_FAILURE_LIMIT", default_value_t = 60)]
    pub auth_failure_limit: u32,
}

/// What was decided, as the `ratelimit-*` headers say it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Decision {
    /// Calls that a window holds.
    pub limit: u32,
    /// Calls that may follow now.
    pub remaining: u32,
    /// Until the window ends.
    pub reset: Duration,
    /// None: the call may pass. Else: when one will.
    pub retry_after: Option<Duration>,
}

/// A number of calls in a window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    limit: u32,
    window: Duration,
}

impl Rate {
    /// So many calls in a window of a millisecond or more; 0 calls: no limit.
    pub const fn new(limit: u32, window: Duration) -> Self {
        let shortest = Duration::from_millis(1);
        let window = if window.as_millis() == 0 { shortest } else { window };
        Rate { limit, window }
    }

    /// Whether it bounds anything.
    pub const fn is_limited(self) -> bool {
        self.limit > 0
    }
}

/// Where calls are counted.
#[derive(Debug)]
pub enum Limiter {
    /// RATE_LIMIT_ENABLED=false.
    Off,
    /// In this process.
    Memory(Memory),
    /// In a Redis that replicas share, and in this process while that does not answer.
    Redis(Redis),
}

impl Limiter {
    /// Needs a runtime where there is a Redis, but does not wait for it.
    pub fn new(config: &LimitConfig, redis_url: Option<&SecretString>) -> anyhow::Result<Self> {
        Limiter::for_roles(config, redis_url, &[])
    }

    /// The same for a process of these roles, such as "codegen": a limit on a method of one is shared
    /// with the other replicas of that role alone.
    pub fn for_roles(
        config: &LimitConfig,
        redis_url: Option<&SecretString>,
        roles: &[&str],
    ) -> anyhow::Result<Self> {
        Ok(match redis_url {
            _ if !config.rate_limit_enabled => Limiter::Off,
            None => Limiter::Memory(Memory::default()),
            Some(url) => Limiter::Redis(Redis::new(url, config, roles)?),
        })
    }

    /// Counts one call of a subject such as `key:key_ab12`, none where no limit applies.
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

    /// What `decide` would say, without a call being counted.
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

    /// Whether replicas count together where they share a Redis, as its heartbeat knows. A connection
    /// that is being made gets a moment; none where there is no Redis to ask.
    pub async fn probe(&self) -> Option<Result<(), String>> {
        let Limiter::Redis(redis) = self else { return None };
        let asked = Instant::now();
        while !redis.is_up() {
            if asked.elapsed() > PROBING {
                return Some(Err(AWAY.to_owned()));
            }
            tokio::time::sleep(BETWEEN_PROBES).await;
        }
        Some(Ok(()))
    }

    /// How many replicas share a limit on this method while Redis is away; none where there is no Redis.
    pub fn replicas(&self, method: &str) -> Option<u32> {
        match self {
            Limiter::Redis(redis) => Some(redis.replicas(method)),
            _ => None,
        }
    }

    /// Words for an operator while Redis is configured and does not answer.
    pub fn degraded(&self) -> Option<&'static str> {
        match self {
            Limiter::Redis(redis) if !redis.is_up() => Some(AWAY),
            _ => None,
        }
    }

    /// Sets the gauge that says whether Redis answers.
    pub fn gauge(&self) {
        if let Limiter::Redis(redis) = self {
            metrics::gauge!("hapa_redis_up").set(f64::from(u8::from(redis.is_up())));
        }
    }
}

/// The limit that applies: the key's for the method, the key's for all, the method's, the default.
pub fn rate(principal: &Principal, rpc: &Rpc, config: &LimitConfig) -> Rate {
    let of_key = |method: &str| principal.rate_limits.iter().find(|limit| limit.method == method);
    let (limit, seconds) = match (of_key(rpc.method()).or_else(|| of_key("*")), rpc.limit) {
        (Some(own), _) => (own.limit, own.window_seconds),
        (None, Some(default)) => default,
        (None, None) => (config.default_rate_limit, config.rate_limit_window_minutes * 60),
    };
    Rate::new(limit, Duration::from_secs(seconds.max(1).into()))
}

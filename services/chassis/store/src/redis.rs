//! A Redis that replicas share: one script a question, and never more than a moment's wait. Who asks
//! has an answer of its own for when there is none, so nothing here is an error to a caller.
//!
//! A script that timed out here may still run there.

mod breaker;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use fred::clients::Client;
use fred::error::{Error, ErrorKind};
use fred::interfaces::{ClientLike as _, LuaInterface as _};
use fred::types::ConnectHandle;
use fred::types::config::{
    Config, ConnectionConfig, PerformanceConfig, ReconnectPolicy, TcpConfig, UnresponsiveConfig,
};
use hapa_core::config::Wrong;
use secrecy::{ExposeSecret as _, SecretString};
use tokio::time::{sleep, timeout};

use self::breaker::{Breaker, Change};

/// What scripts take and give back.
pub use fred::types::{FromValue, Value};

/// A silence is measured in so many steps. A process that gets no time on a processor takes its steps
/// late, and so does not take its own pause for one of Redis.
const SILENCE_STEPS: u32 = 5;
/// A connection on which nothing is heard for as long is made anew.
const LONGEST_HANG: Duration = Duration::from_millis(1_500);
/// How many times the patience a script may take while other replies arrive.
const MAX_PATIENCE_FACTOR: u32 = 4;

/// One server, plain or over TLS: what else a Redis can be is not built in.
pub fn check_redis_url(url: &SecretString) -> Result<(), Wrong> {
    let url = url.expose_secret();
    if url.starts_with("redis://") || url.starts_with("rediss://") {
        return Ok(());
    }
    Err(Wrong::new("REDIS_URL", "must begin with redis:// or rediss://"))
}

/// How a Redis is asked.
#[derive(Clone, Copy, Debug)]
pub struct Manner {
    /// A script takes well under a millisecond; past this Redis is as good as away.
    pub patience: Duration,
    /// Scripts that may wait for a connection or its socket; more are refused at once.
    pub most_queued: usize,
    /// What happens while it is away, for the log.
    pub meanwhile: &'static str,
}

/// A connection of its own. See the module.
pub struct Redis {
    client: Client,
    connection: Mutex<ConnectHandle>,
    breaker: Breaker,
    manner: Manner,
    /// Replies so far, to see whether the connection is alive.
    replies: AtomicU64,
}

/// A Lua script.
#[derive(Clone, Debug)]
pub struct Script(fred::types::scripts::Script);

impl Script {
    /// From its text.
    pub fn new(lua: &str) -> Self {
        Script(fred::types::scripts::Script::from_lua(lua))
    }
}

/// Redis has no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Away {
    /// Whether it was asked, or known to be away.
    pub asked: bool,
}

/// A reply, and whether it came so late that another process may have given up.
#[derive(Debug)]
pub struct Heard<R> {
    pub reply: R,
    pub was_almost_silent: bool,
}

/// No reply arrived for as long as the patience allows.
#[derive(Debug)]
pub struct Silent {
    /// The last failure, for the log.
    pub cause: String,
}

impl Redis {
    /// Starts to connect, and goes on for as long as this lives. Needs a runtime.
    pub fn new(url: &SecretString, manner: Manner) -> Result<Self, Wrong> {
        Redis::with_command_timeout(url, manner, manner.patience)
    }

    /// The same for [`Redis::ask_until_silent`], where a single command may take longer than the
    /// patience.
    pub fn patient(url: &SecretString, manner: Manner) -> Result<Self, Wrong> {
        Redis::with_command_timeout(url, manner, manner.patience * MAX_PATIENCE_FACTOR)
    }

    fn with_command_timeout(
        url: &SecretString,
        manner: Manner,
        command_timeout: Duration,
    ) -> Result<Self, Wrong> {
        check_redis_url(url)?;
        // Its errors name parts of the address at most, never the password.
        let config = Config::from_url_centralized(url.expose_secret());
        let config = config.map_err(|error| Wrong::new("REDIS_URL", error.to_string()))?;
        let client = Client::new(
            // Without `fail_fast` the first connection is retried like any other.
            Config { fail_fast: false, ..config },
            Some(PerformanceConfig {
                default_command_timeout: command_timeout,
                ..PerformanceConfig::default()
            }),
            Some(connection(manner)),
            Some(reconnects()),
        );
        let connection = Mutex::new(client.connect());
        let (breaker, replies) = (Breaker::default(), AtomicU64::new(0));
        Ok(Redis { client, connection, breaker, manner, replies })
    }

    /// Whether it answered last.
    pub fn is_up(&self) -> bool {
        self.client.is_connected() && !self.breaker.is_open()
    }

    /// Runs a script, unless Redis was away a moment ago.
    pub async fn ask<R: FromValue>(
        &self,
        script: &Script,
        keys: Vec<String>,
        arguments: Vec<Value>,
    ) -> Result<R, Away> {
        if !self.breaker.admits(Instant::now()) {
            return Err(Away { asked: false });
        }
        let meanwhile = self.manner.meanwhile;
        match self.run(script, keys, arguments).await {
            Ok(reply) => {
                if self.breaker.succeeded() == Change::Closed {
                    tracing::info!("Redis answers again; it was away: {meanwhile}");
                }
                Ok(reply)
            }
            Err(error) => {
                if self.breaker.failed(Instant::now()) == Change::Opened {
                    let error = describe(&error);
                    tracing::warn!(error, "Redis does not answer: {meanwhile}");
                }
                Err(Away { asked: true })
            }
        }
    }

    /// Whether there is a connection.
    pub fn is_connected(&self) -> bool {
        self.client.is_connected()
    }

    /// Runs a script for which it makes no difference how often it runs. A lost connection is waited
    /// for and a failed attempt repeated. It gives up when nothing has been heard for the patience: while
    /// replies arrive, even late ones, Redis is alive. The breaker has no part in it.
    pub async fn ask_until_silent<R: FromValue>(
        &self,
        script: &Script,
        keys: Vec<String>,
        arguments: Vec<Value>,
    ) -> Result<Heard<R>, Silent> {
        let step = self.manner.patience / SILENCE_STEPS;
        let (mut heard, mut silent_steps) = (self.replies.load(Ordering::Relaxed), 0);
        let mut cause = "there is no connection".to_owned();
        let mut attempt = None;
        for _ in 0..SILENCE_STEPS * MAX_PATIENCE_FACTOR {
            if attempt.is_none() && self.connected() {
                "no answer in time".clone_into(&mut cause);
                attempt = Some(Box::pin(self.attempt(script, keys.clone(), arguments.clone())));
            }
            match &mut attempt {
                None => sleep(step).await,
                Some(waiting) => match timeout(step, waiting).await {
                    Ok(Ok(reply)) => {
                        let was_almost_silent = silent_steps + 1 >= SILENCE_STEPS;
                        return Ok(Heard { reply, was_almost_silent });
                    }
                    Ok(Err(error)) => {
                        cause = error.to_string();
                        attempt = None;
                        sleep(step).await;
                    }
                    Err(_) => {}
                },
            }
            let replies = self.replies.load(Ordering::Relaxed);
            silent_steps = if replies == heard { silent_steps + 1 } else { 0 };
            heard = replies;
            if silent_steps >= SILENCE_STEPS {
                break;
            }
        }
        Err(Silent { cause })
    }

    /// Runs a script once; the timeout of a command alone bounds it.
    pub async fn attempt<R: FromValue>(
        &self,
        script: &Script,
        keys: Vec<String>,
        arguments: Vec<Value>,
    ) -> Result<R, Error> {
        if !self.connected() {
            return Err(Error::new(ErrorKind::IO, "there is no connection"));
        }
        let reply = self.evaluate(script, keys, arguments).await?.convert()?;
        self.replies.fetch_add(1, Ordering::Relaxed);
        Ok(reply)
    }

    async fn run<R: FromValue>(
        &self,
        script: &Script,
        keys: Vec<String>,
        arguments: Vec<Value>,
    ) -> Result<R, Error> {
        if !self.connected() {
            return Err(Error::new(ErrorKind::IO, "there is no connection"));
        }
        // fred bounds each command, this bounds them all.
        let reply = timeout(self.manner.patience, self.evaluate(script, keys, arguments)).await;
        let late = |_| Err(Error::new(ErrorKind::Timeout, "no answer in time"));
        reply.unwrap_or_else(late)?.convert()
    }

    async fn evaluate(
        &self,
        Script(script): &Script,
        keys: Vec<String>,
        arguments: Vec<Value>,
    ) -> Result<Value, Error> {
        let known = script.evalsha(&self.client, keys.clone(), arguments.clone()).await;
        match (known, script.lua()) {
            // EVAL also makes it known to a Redis that started meanwhile.
            (Err(error), Some(lua)) if error.details().starts_with("NOSCRIPT") => {
                self.client.eval(lua.clone(), keys, arguments).await
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

/// Its class, and the word that Redis begins an error with, such as NOAUTH. The rest may quote a command.
fn describe(error: &Error) -> String {
    let word = error.details().split(' ').next().unwrap_or_default();
    let is_word = (3..=20).contains(&word.len()) && word.bytes().all(|b| b.is_ascii_uppercase());
    let kind = format!("{:?}", error.kind());
    if is_word { format!("{kind} {word}") } else { kind }
}

fn connection(manner: Manner) -> ConnectionConfig {
    ConnectionConfig {
        connection_timeout: Duration::from_secs(1),
        internal_command_timeout: Duration::from_secs(1),
        // A second attempt would do what a script does twice.
        max_command_attempts: 1,
        max_command_buffer_len: manner.most_queued,
        // Each write puts it off, so with the usual patience it is shorter than the breaker's pause.
        unresponsive: UnresponsiveConfig {
            max_timeout: Some((manner.patience * 6).min(LONGEST_HANG.max(manner.patience * 2))),
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

    const MANNER: Manner = Manner {
        patience: Duration::from_millis(50),
        most_queued: 8,
        meanwhile: "a test goes without",
    };

    #[tokio::test]
    async fn a_wrong_url_is_refused_by_name_and_without_its_password() {
        for url in ["memcached://x", "redis://", "redis://:hunter2@host/many", "redis-cluster://x"]
        {
            let wrong = Redis::new(&url.into(), MANNER).unwrap_err();
            assert_eq!(wrong.name, "REDIS_URL");
            assert!(!wrong.problem.contains("hunter2"), "{wrong}");
        }
    }

    #[tokio::test]
    async fn a_url_with_tls_finds_the_one_crypto_provider() {
        assert!(Redis::new(&"rediss://user:password@redis.example:6380/1".into(), MANNER).is_ok());
    }

    #[tokio::test]
    async fn one_that_is_away_is_asked_a_few_times_and_then_left_alone() {
        let redis = Redis::new(&"redis://127.0.0.1:1".into(), MANNER).unwrap();
        let script = Script::new("return 1");
        let mut asked = Vec::new();
        for _ in 0..4 {
            let reply = redis.ask::<i64>(&script, Vec::new(), Vec::new()).await;
            asked.push(reply.unwrap_err().asked);
        }
        assert_eq!(asked, [true, true, true, false]);
        assert!(!redis.is_up());
    }
}

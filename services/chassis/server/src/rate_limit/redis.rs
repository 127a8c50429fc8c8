//! Rate limits in a Redis that replicas share. One script decides all concurrent calls of one subject to one method, so
//! the load on Redis does not grow with bursts.
//!
//! Redis is unavailable if no reply arrives for REDIS_TIMEOUT_SECONDS; slow replies count. One background task detects
//! the outage and its end. During an outage each replica grants its share without waiting. Afterwards each replica
//! reports its local grants, and for 3 s grants at most its share, because other replicas may not have reported yet.
//!
//! A script that has timed out may still run in Redis. The next report corrects its effect.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use futures_util::{StreamExt as _, stream};
use hapa_core::config::ConfigError;
use hapa_store::redis::{self, RedisOptions, Script, Value};
use secrecy::SecretString;
use tokio::sync::{Notify, Semaphore, oneshot, watch};
use tokio::time::{sleep, timeout};
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;

use super::counter::{Counter, DecisionRequest, RedisDecision, Waiter};
use super::replicas::{ReplicaGroup, Replicas};
use super::shards::Shards;
use super::{Decision, Rate};
use crate::rate_limit::LimitConfig;

/// Maximum number of scripts that wait for a connection or its socket. More than [`MAX_CONCURRENT_SCRIPTS`].
const MAX_QUEUED_SCRIPTS: usize = 8192;
/// Maximum number of concurrent scripts. Further ones wait, and this wait does not count towards the reply timeout.
const MAX_CONCURRENT_SCRIPTS: usize = 1024;
/// Maximum number of concurrent reports after an outage, in addition to calls.
const MAX_CONCURRENT_REPORTS: usize = 64;
/// Maximum number of extra reports that wait for a Redis that hangs.
const MAX_EXTRA_REPORTS: usize = 256;
const HEARTBEAT_INTERVAL: Duration = Duration::from_secs(1);
/// How long a replica stays registered after its last heartbeat.
const HEARTBEAT_TTL: Duration = Duration::from_secs(10);
/// Time between two attempts while Redis is unavailable.
const PROBE_INTERVAL: Duration = Duration::from_millis(100);
/// How long after an outage a replica grants at most its share. Longer than other replicas need to reconnect and to
/// report.
const RECOVERY_PERIOD: Duration = Duration::from_secs(3);
/// Maximum duration of the deregistration on shutdown.
const LEAVE_TIMEOUT: Duration = Duration::from_millis(250);

/// Whether Redis is available.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    /// Redis has not replied yet.
    Starting,
    Up,
    Down,
    /// Redis is available again, and until this time replicas may still report.
    Recovering(Instant),
}

impl Mode {
    fn is_down(self) -> bool {
        matches!(self, Mode::Starting | Mode::Down)
    }

    fn is_recovering(self, now: Instant) -> bool {
        matches!(self, Mode::Recovering(until) if now < until)
    }

    /// True after the end of a recovery too.
    fn is_up(self, now: Instant) -> bool {
        !self.is_down() && !self.is_recovering(now)
    }
}

/// A limiter that shares its counters with other replicas.
#[derive(Debug)]
pub struct Redis {
    inner: Arc<Inner>,
    tasks: TaskTracker,
    /// Ends the tasks, and thereby the connection.
    _shutdown: DropGuard,
}

#[derive(Debug)]
struct Inner {
    redis: redis::Redis,
    window_script: Script,
    registration_script: Script,
    replica_id: String,
    sequence: AtomicU64,
    replicas: Replicas,
    counters: Shards<Counter>,
    mode: watch::Sender<Mode>,
    went_down: Notify,
    script_permits: Semaphore,
    extra_report_permits: Semaphore,
    /// Whether a counter may have unreported grants.
    has_unreported: AtomicBool,
    shutdown: CancellationToken,
}

impl Redis {
    /// A limiter that connects in the background until it is dropped.
    pub(super) fn new(
        url: &SecretString,
        config: &LimitConfig,
        roles: &[&str],
    ) -> Result<Self, ConfigError> {
        let options = RedisOptions {
            reply_timeout: config.redis_timeout_seconds,
            max_queued: MAX_QUEUED_SCRIPTS,
            fallback: "this replica grants its share of each limit",
        };
        let shutdown = CancellationToken::new();
        let inner = Arc::new(Inner {
            redis: redis::Redis::tolerating_slow_replies(url, options)?,
            window_script: Script::new(include_str!("window.lua")),
            registration_script: Script::new(include_str!("replicas.lua")),
            replica_id: format!("{:016x}", rand::random::<u64>()),
            sequence: AtomicU64::new(0),
            replicas: Replicas::new(roles, config.rate_limit_replicas),
            counters: Shards::default(),
            mode: watch::Sender::new(Mode::Starting),
            went_down: Notify::new(),
            script_permits: Semaphore::new(MAX_CONCURRENT_SCRIPTS),
            extra_report_permits: Semaphore::new(MAX_EXTRA_REPORTS),
            has_unreported: AtomicBool::new(false),
            shutdown: shutdown.clone(),
        });
        let tasks = TaskTracker::new();
        tasks.spawn(Arc::clone(&inner).maintain_registration());
        Ok(Redis { inner, tasks, _shutdown: shutdown.drop_guard() })
    }

    pub(super) async fn decide(&self, subject: &str, method: &'static str, rate: Rate) -> Decision {
        self.request(subject, method, rate, true).await
    }

    pub(super) async fn peek(&self, subject: &str, method: &'static str, rate: Rate) -> Decision {
        self.request(subject, method, rate, false).await
    }

    pub(super) fn is_up(&self) -> bool {
        !self.inner.mode().is_down() && self.inner.redis.is_connected()
    }

    pub(super) fn replicas(&self, method: &str) -> u32 {
        self.inner.replicas.serving(method).replicas
    }

    async fn request(
        &self,
        subject: &str,
        method: &'static str,
        rate: Rate,
        is_counted: bool,
    ) -> Decision {
        if !self.inner.mode().is_down() {
            let (reply_to, decision) = oneshot::channel();
            let waiter = Waiter { rate, is_counted, reply_to };
            let is_first = self.inner.with(subject, method, rate, |it, _| it.enqueue(waiter));
            if is_first {
                // In its own task, so that a cancelled caller does not block the waiting calls behind it.
                let request = Arc::clone(&self.inner).decide_waiting(subject.into(), method, None);
                self.tasks.spawn(request);
            }
            if let Ok(decision) = decision.await {
                return decision;
            }
        }
        record_fallbacks(1);
        let group = self.inner.replicas.serving(method);
        let (decision, report) = self.inner.with(subject, method, rate, |counter, now| {
            let decision = counter.decide_locally(rate, is_counted, group, now);
            let is_grant = is_counted && decision.retry_after.is_none();
            (decision, is_grant.then(|| self.inner.extra_report(counter, now)).flatten())
        });
        if let Some(report) = report {
            let inner = Arc::clone(&self.inner);
            self.tasks.spawn(inner.send_extra_report(subject.into(), method, report));
        }
        decision
    }
}

impl Inner {
    fn mode(&self) -> Mode {
        *self.mode.borrow()
    }

    fn with<R>(
        &self,
        subject: &str,
        method: &'static str,
        rate: Rate,
        work: impl FnOnce(&mut Counter, Instant) -> R,
    ) -> R {
        let now = Instant::now();
        let new = || Counter::new(rate, now);
        self.counters.with((subject, method), now, new, |counter| work(counter, now))
    }

    /// Sends requests, one after the other, until no call of this subject and method waits.
    async fn decide_waiting(
        self: Arc<Self>,
        subject: Box<str>,
        method: &'static str,
        mut report: Option<DecisionRequest>,
    ) {
        let group = self.replicas.serving(method);
        loop {
            let is_report = report.is_some();
            let next = |counter: &mut Counter| self.next_request(counter, group);
            let request =
                report.take().or_else(|| self.counters.find(&subject, method, next).flatten());
            let Some(request) = request else { return };
            let reply = self.send(&subject, method, &request, is_report).await;
            let settle = |counter: &mut Counter| self.settle(counter, request, reply, group);
            if let Some(report) = self.counters.find(&subject, method, settle).flatten() {
                self.clone().send_extra_report(subject, method, report).await;
                return;
            }
            if reply.is_none() {
                return;
            }
        }
    }

    /// The next request for waiting calls.
    fn next_request(&self, counter: &mut Counter, group: ReplicaGroup) -> Option<DecisionRequest> {
        let (now, mode) = (Instant::now(), self.mode());
        if mode.is_down() {
            record_fallbacks(counter.decide_all_locally(None, group, now));
            self.mark_unreported(counter);
            return None;
        }
        let share = mode.is_recovering(now).then_some(group);
        counter.next_request(share, self.next_sequence(), now)
    }

    /// Passes the decisions to the waiting calls. Without a reply they are local, and the returned report, if any, must
    /// be sent.
    fn settle(
        &self,
        counter: &mut Counter,
        request: DecisionRequest,
        reply: Option<RedisDecision>,
        group: ReplicaGroup,
    ) -> Option<DecisionRequest> {
        let now = Instant::now();
        if let Some(reply) = reply {
            let share = self.mode().is_recovering(now).then_some(group);
            counter.apply_reply(request, reply, share, now);
            self.mark_unreported(counter);
            return None;
        }
        record_fallbacks(counter.decide_all_locally(Some(request), group, now));
        counter.has_unconfirmed().then(|| self.extra_report(counter, now)).flatten()
    }

    fn mark_unreported(&self, counter: &Counter) {
        if counter.has_unconfirmed() {
            self.has_unreported.store(true, Ordering::Relaxed);
        }
    }

    fn next_sequence(&self) -> u64 {
        self.sequence.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// A report of local grants; `None` without a connection.
    fn extra_report(&self, counter: &Counter, now: Instant) -> Option<DecisionRequest> {
        self.mark_unreported(counter);
        self.redis.is_connected().then(|| counter.extra_report(self.next_sequence(), now))
    }

    /// Sends a request; `None` if Redis is unavailable. A pure report is sent in any mode, because reports end an outage.
    async fn send(
        &self,
        subject: &str,
        method: &str,
        request: &DecisionRequest,
        is_report: bool,
    ) -> Option<RedisDecision> {
        let _permit = self.script_permits.acquire().await.ok()?;
        let (keys, arguments) = self.script_input(subject, method, request);
        let mut mode = self.mode.subscribe();
        let run = self.redis.run_until_silent::<Vec<u64>>(&self.window_script, keys, arguments);
        let result = tokio::select! {
            result = run => result,
            () = async { drop(mode.wait_for(|mode| mode.is_down()).await) }, if !is_report => return None,
        };
        match result {
            Ok(timed) => {
                if timed.is_nearly_timed_out {
                    self.handle_late_reply();
                }
                parse(&timed.reply)
            }
            Err(no_reply) => {
                self.handle_no_reply(&no_reply.cause);
                None
            }
        }
    }

    /// Sends a report without waiting for its effect. A Redis that hangs processes it before later requests of other
    /// replicas. The grants are reported again after the outage.
    async fn send_extra_report(
        self: Arc<Self>,
        subject: Box<str>,
        method: &'static str,
        report: DecisionRequest,
    ) {
        let Ok(_permit) = self.extra_report_permits.try_acquire() else { return };
        let (keys, arguments) = self.script_input(&subject, method, &report);
        let _ = self.redis.attempt::<Vec<u64>>(&self.window_script, keys, arguments).await;
    }

    fn script_input(
        &self,
        subject: &str,
        method: &str,
        request: &DecisionRequest,
    ) -> (Vec<String>, Vec<Value>) {
        // The braces keep a subject's keys on one node of a cluster.
        let window = format!("hapa:limit:{{{subject}}}:{method}");
        let replicas = format!("{window}:replicas");
        let length = millis(request.rate.window);
        let report = request.report;
        let mut arguments: Vec<Value> =
            [request.rate.limit.into(), length, request.wanted.into()].map(integer).into();
        arguments.push(self.replica_id.as_str().into());
        let numbers = [
            request.sequence,
            report.opened_in_redis,
            report.granted.into(),
            report.has_unconfirmed.into(),
            millis(report.age),
        ];
        arguments.extend(numbers.map(integer));
        (vec![window, replicas], arguments)
    }

    fn handle_no_reply(&self, cause: &str) {
        let was_up = self.mode.send_if_modified(|mode| {
            let was_up = !mode.is_down();
            if was_up {
                *mode = Mode::Down;
            }
            was_up
        });
        if was_up {
            tracing::warn!(
                cause,
                "Redis does not answer: this replica grants its share of each limit"
            );
            self.went_down.notify_one();
        }
    }

    /// Another replica may have timed out during the delay and have granted calls locally.
    fn handle_late_reply(&self) {
        self.mode.send_if_modified(|mode| {
            if mode.is_up(Instant::now()) {
                *mode = Mode::Recovering(Instant::now() + RECOVERY_PERIOD);
            }
            false // No task waits for this mode.
        });
    }

    /// Renews the registration, detects the start and the end of outages, and then reports local grants.
    async fn maintain_registration(self: Arc<Self>) {
        let shutdown = self.shutdown.clone();
        let _ = shutdown.run_until_cancelled(self.run_heartbeats()).await;
        // With this message other replicas take over the share at once, without it after a few seconds.
        let (keys, arguments) = self.heartbeat(true);
        let leave = self.redis.attempt::<Vec<u32>>(&self.registration_script, keys, arguments);
        if !self.mode().is_down() {
            let _ = timeout(LEAVE_TIMEOUT, leave).await;
        }
    }

    async fn run_heartbeats(self: &Arc<Self>) {
        loop {
            let (keys, arguments) = self.heartbeat(false);
            let script = &self.registration_script;
            if self.mode().is_down() {
                match self.redis.attempt::<Vec<u32>>(script, keys, arguments).await {
                    Ok(counts) => self.recover(&counts).await,
                    Err(_) => sleep(PROBE_INTERVAL).await,
                }
                continue;
            }
            match self.redis.run_until_silent::<Vec<u32>>(script, keys, arguments).await {
                Ok(timed) => self.update_replicas(&timed.reply),
                Err(no_reply) => {
                    self.handle_no_reply(&no_reply.cause);
                    continue;
                }
            }
            // Reports that failed during the recovery.
            self.report_all().await;
            tokio::select! {
                () = sleep(HEARTBEAT_INTERVAL) => {}
                () = self.went_down.notified() => {}
            }
        }
    }

    fn heartbeat(&self, is_leaving: bool) -> (Vec<String>, Vec<Value>) {
        let numbers = [millis(HEARTBEAT_TTL), is_leaving.into()];
        let mut arguments: Vec<Value> = vec![self.replica_id.as_str().into()];
        arguments.extend(numbers.map(integer));
        (self.replicas.keys(), arguments)
    }

    fn update_replicas(&self, counts: &[u32]) {
        self.replicas.update(counts, !self.mode().is_recovering(Instant::now()));
    }

    async fn recover(self: &Arc<Self>, counts: &[u32]) {
        let mode = match self.mode() {
            Mode::Starting => Mode::Up,
            _ => Mode::Recovering(Instant::now() + RECOVERY_PERIOD),
        };
        self.replicas.update(counts, mode == Mode::Up);
        // Before Redis decides the next call.
        self.report_all().await;
        self.mode.send_replace(mode);
        if mode != Mode::Up {
            tracing::info!("Redis answers again");
        }
        // Grants between the report and the change of the mode.
        self.report_all().await;
    }

    async fn report_all(self: &Arc<Self>) {
        if !self.has_unreported.swap(false, Ordering::Relaxed) {
            return;
        }
        let unreported = self.counters.select(Counter::is_unreported);
        let reports = unreported.into_iter().map(|(subject, method)| {
            let inner = Arc::clone(self);
            async move {
                let start = |counter: &mut Counter| {
                    counter.start_report(inner.next_sequence(), Instant::now())
                };
                if let Some(report) = inner.counters.find(&subject, method, start).flatten() {
                    inner.decide_waiting(subject, method, Some(report)).await;
                }
            }
        });
        stream::iter(reports).for_each_concurrent(MAX_CONCURRENT_REPORTS, |report| report).await;
    }
}

/// Parses the result of the script. `None` if Redis has ignored the request as outdated; then no call waits for it.
fn parse(values: &[u64]) -> Option<RedisDecision> {
    let &[passed, remaining, reset, wait, opened_in_redis, granted] = values else { return None };
    let number = |value| u32::try_from(value).unwrap_or(u32::MAX);
    Some(RedisDecision {
        passed: number(passed),
        remaining: number(remaining),
        reset: Duration::from_millis(reset),
        wait: Duration::from_millis(wait),
        opened_in_redis,
        granted: number(granted),
    })
}

fn record_fallbacks(calls: u64) {
    metrics::counter!("hapa_limiter_fallbacks_total").increment(calls);
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

fn integer(number: u64) -> Value {
    i64::try_from(number).unwrap_or(i64::MAX).into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Settings {
        #[command(flatten)]
        limits: LimitConfig,
    }

    #[tokio::test]
    async fn without_redis_calls_are_limited_in_this_process() {
        let config = Settings::parse_from(["test"]).limits;
        let redis = Redis::new(&"redis://127.0.0.1:1".into(), &config, &[]).unwrap();
        let rate = Rate::new(2, Duration::from_mins(1));
        for remaining in [1, 0] {
            assert_eq!(redis.peek("a", "/x", rate).await.retry_after, None);
            assert_eq!(redis.decide("a", "/x", rate).await.remaining, remaining);
        }
        assert!(redis.peek("a", "/x", rate).await.retry_after.is_some());
        assert!(redis.decide("a", "/x", rate).await.retry_after.is_some());
        assert!(!redis.is_up());
    }

    #[tokio::test]
    async fn the_configured_number_of_replicas_applies_if_redis_has_never_replied() {
        let config = Settings::parse_from(["test", "--rate-limit-replicas=4"]).limits;
        let redis = Redis::new(&"redis://127.0.0.1:1".into(), &config, &["codegen"]).unwrap();
        let (rate, mut passed) = (Rate::new(100, Duration::from_hours(1)), 0);
        for _ in 0..200 {
            passed += u32::from(redis.decide("a", "/x", rate).await.retry_after.is_none());
        }
        assert_eq!(passed, 25);
    }
}

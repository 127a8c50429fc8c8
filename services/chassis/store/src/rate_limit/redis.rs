//! Calls counted in a Redis that replicas share. Calls of one subject to one method that wait at the same
//! time are decided by one script, so Redis has no more to do when many come at once.
//!
//! Redis is away when nothing is heard from it for REDIS_TIMEOUT_SECONDS; slow replies are replies. One
//! task notices that and its end. Meanwhile each replica grants its share, without a wait. When Redis is
//! back each replica reports what it granted apart, and for a moment still grants its share at most,
//! because the reports of others may be on their way.
//!
//! A script that was given up may still run in Redis: the next report corrects what it counted.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use futures_util::{StreamExt as _, stream};
use hapa_core::config::Wrong;
use secrecy::SecretString;
use tokio::sync::{Notify, Semaphore, oneshot, watch};
use tokio::time::{sleep, timeout};
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;

use super::counter::{Counter, Reply, Request, Waiter};
use super::replicas::{Group, Replicas};
use super::shards::Shards;
use super::{Decision, Rate};
use crate::rate_limit::LimitConfig;
use crate::redis::{self, Manner, Script, Value};

/// Scripts that may wait for a connection or its socket: more than are asked at once.
const MAX_QUEUED: usize = 8192;
/// Scripts that are asked at once; further ones wait, and their wait does not count as Redis's.
const MAX_CONCURRENT: usize = 1024;
/// Reports at once after an outage, beside the calls.
const CONCURRENT_REPORTS: usize = 64;
/// Notes of what was granted apart that a Redis which hangs may find when it goes on.
const MAX_NOTES: usize = 256;
const HEARTBEAT_INTERVAL: Duration = Duration::from_secs(1);
/// How long a replica counts after its last heartbeat.
const HEARTBEAT_LIFETIME: Duration = Duration::from_secs(10);
/// Between two attempts while Redis is away.
const PROBE_INTERVAL: Duration = Duration::from_millis(100);
/// How long after an outage a replica grants its share at most: longer than other replicas take to
/// connect again and to report.
const RECOVERY: Duration = Duration::from_secs(3);
/// How long leaving the group may take.
const LEAVING: Duration = Duration::from_millis(250);

/// Whether Redis answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    /// It has never answered.
    Starting,
    Up,
    Away,
    /// It is back, and replicas may still have something to report.
    Recovering(Instant),
}

impl Mode {
    fn is_away(self) -> bool {
        matches!(self, Mode::Starting | Mode::Away)
    }

    fn is_recovering(self, now: Instant) -> bool {
        matches!(self, Mode::Recovering(until) if now < until)
    }

    /// Also when a recovery is over.
    fn is_up(self, now: Instant) -> bool {
        !self.is_away() && !self.is_recovering(now)
    }
}

/// A limiter that shares its counters with other replicas.
#[derive(Debug)]
pub struct Redis {
    inner: Arc<Inner>,
    tasks: TaskTracker,
    /// Ends the tasks, and with them the connection.
    _end: DropGuard,
}

#[derive(Debug)]
struct Inner {
    shared: redis::Redis,
    window: Script,
    registration: Script,
    replica: String,
    sequence: AtomicU64,
    replicas: Replicas,
    counters: Shards<Counter>,
    mode: watch::Sender<Mode>,
    went_away: Notify,
    permits: Semaphore,
    notes: Semaphore,
    /// Whether a counter may have something to report.
    has_unreported: AtomicBool,
    end: CancellationToken,
}

impl Redis {
    /// Starts to connect, and goes on for as long as this lives.
    pub(super) fn new(
        url: &SecretString,
        config: &LimitConfig,
        roles: &[&str],
    ) -> Result<Self, Wrong> {
        let meanwhile = "this replica grants its share of each limit";
        let patience = config.redis_timeout_seconds;
        let manner = Manner { patience, most_queued: MAX_QUEUED, meanwhile };
        let end = CancellationToken::new();
        let inner = Arc::new(Inner {
            shared: redis::Redis::patient(url, manner)?,
            window: Script::new(include_str!("window.lua")),
            registration: Script::new(include_str!("replicas.lua")),
            replica: format!("{:016x}", rand::random::<u64>()),
            sequence: AtomicU64::new(0),
            replicas: Replicas::new(roles, config.rate_limit_replicas),
            counters: Shards::default(),
            mode: watch::Sender::new(Mode::Starting),
            went_away: Notify::new(),
            permits: Semaphore::new(MAX_CONCURRENT),
            notes: Semaphore::new(MAX_NOTES),
            has_unreported: AtomicBool::new(false),
            end: end.clone(),
        });
        let tasks = TaskTracker::new();
        tasks.spawn(Arc::clone(&inner).keep_in_touch());
        Ok(Redis { inner, tasks, _end: end.drop_guard() })
    }

    pub(super) async fn decide(&self, subject: &str, method: &'static str, rate: Rate) -> Decision {
        self.ask(subject, method, rate, true).await
    }

    pub(super) async fn peek(&self, subject: &str, method: &'static str, rate: Rate) -> Decision {
        self.ask(subject, method, rate, false).await
    }

    pub(super) fn is_up(&self) -> bool {
        !self.inner.mode().is_away() && self.inner.shared.is_connected()
    }

    pub(super) fn replicas(&self, method: &str) -> u32 {
        self.inner.replicas.serving(method).replicas
    }

    async fn ask(&self, subject: &str, method: &'static str, rate: Rate, counts: bool) -> Decision {
        if !self.inner.mode().is_away() {
            let (tell, told) = oneshot::channel();
            let waiter = Waiter { rate, counts, tell };
            let is_first = self.inner.with(subject, method, rate, |it, _| it.join(waiter));
            if is_first {
                // A task of its own, so that a caller who leaves holds up none of those behind it.
                let request = Arc::clone(&self.inner).decide_waiting(subject.into(), method, None);
                self.tasks.spawn(request);
            }
            if let Ok(decision) = told.await {
                return decision;
            }
        }
        count_alone(1);
        let group = self.inner.replicas.serving(method);
        let (decision, note) = self.inner.with(subject, method, rate, |counter, now| {
            let decision = counter.decide_alone(rate, counts, group, now);
            let passed = counts && decision.retry_after.is_none();
            (decision, passed.then(|| self.inner.note(counter, now)).flatten())
        });
        if let Some(note) = note {
            self.tasks.spawn(Arc::clone(&self.inner).send_note(subject.into(), method, note));
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
        let make = || Counter::new(rate, now);
        self.counters.with((subject, method), now, make, |counter| work(counter, now))
    }

    /// Sends one request after the other until no call of this subject and method waits.
    async fn decide_waiting(
        self: Arc<Self>,
        subject: Box<str>,
        method: &'static str,
        mut report: Option<Request>,
    ) {
        let group = self.replicas.serving(method);
        loop {
            let is_report = report.is_some();
            let next = |counter: &mut Counter| self.next(counter, group);
            let request =
                report.take().or_else(|| self.counters.find(&subject, method, next).flatten());
            let Some(request) = request else { return };
            let reply = self.ask(&subject, method, &request, is_report).await;
            let settle = |counter: &mut Counter| self.settle(counter, request, reply, group);
            if let Some(note) = self.counters.find(&subject, method, settle).flatten() {
                self.clone().send_note(subject, method, note).await;
                return;
            }
            if reply.is_none() {
                return;
            }
        }
    }

    /// The next request for calls that wait.
    fn next(&self, counter: &mut Counter, group: Group) -> Option<Request> {
        let (now, mode) = (Instant::now(), self.mode());
        if mode.is_away() {
            count_alone(counter.give_up(None, group, now));
            self.mark_unreported(counter);
            return None;
        }
        counter.next(mode.is_recovering(now).then_some(group), self.next_sequence(), now)
    }

    /// Tells what was decided, here where there is no reply; then there may be something to note.
    fn settle(
        &self,
        counter: &mut Counter,
        request: Request,
        reply: Option<Reply>,
        group: Group,
    ) -> Option<Request> {
        let now = Instant::now();
        if let Some(reply) = reply {
            let share = self.mode().is_recovering(now).then_some(group);
            counter.hear(request, reply, share, now);
            self.mark_unreported(counter);
            return None;
        }
        count_alone(counter.give_up(Some(request), group, now));
        counter.is_apart().then(|| self.note(counter, now)).flatten()
    }

    fn mark_unreported(&self, counter: &Counter) {
        if counter.is_apart() {
            self.has_unreported.store(true, Ordering::Relaxed);
        }
    }

    fn next_sequence(&self) -> u64 {
        self.sequence.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// A note of what was granted apart; none where there is no connection that would take it.
    fn note(&self, counter: &Counter, now: Instant) -> Option<Request> {
        self.mark_unreported(counter);
        self.shared.is_connected().then(|| counter.note(self.next_sequence(), now))
    }

    /// None where Redis is away. A report is sent while it counts as away: it is what ends that.
    async fn ask(
        &self,
        subject: &str,
        method: &str,
        request: &Request,
        is_report: bool,
    ) -> Option<Reply> {
        let _permit = self.permits.acquire().await.ok()?;
        let (keys, arguments) = self.script(subject, method, request);
        let mut mode = self.mode.subscribe();
        let asked = self.shared.ask_until_silent::<Vec<u64>>(&self.window, keys, arguments);
        let reply = tokio::select! {
            reply = asked => reply,
            () = async { drop(mode.wait_for(|mode| mode.is_away()).await) }, if !is_report => return None,
        };
        match reply {
            Ok(heard) => {
                if heard.was_almost_silent {
                    self.note_delay();
                }
                read(&heard.reply)
            }
            Err(silent) => {
                self.note_silence(&silent.cause);
                None
            }
        }
    }

    /// Sends a note; nobody waits for its reply. A Redis that hangs finds it before what other replicas
    /// ask later. The same is reported again when Redis is back.
    async fn send_note(self: Arc<Self>, subject: Box<str>, method: &'static str, note: Request) {
        let Ok(_permit) = self.notes.try_acquire() else { return };
        let (keys, arguments) = self.script(&subject, method, &note);
        let _ = self.shared.attempt::<Vec<u64>>(&self.window, keys, arguments).await;
    }

    fn script(&self, subject: &str, method: &str, request: &Request) -> (Vec<String>, Vec<Value>) {
        // The braces keep a subject's keys on one node of a cluster.
        let window = format!("hapa:limit:{{{subject}}}:{method}");
        let replicas = format!("{window}:replicas");
        let length = millis(request.rate.window);
        let report = request.report;
        let mut arguments: Vec<Value> =
            [request.rate.limit.into(), length, request.wanted.into()].map(integer).into();
        arguments.push(self.replica.as_str().into());
        let numbers = [
            request.sequence,
            report.opened,
            report.granted.into(),
            report.is_apart.into(),
            millis(report.age),
        ];
        arguments.extend(numbers.map(integer));
        (vec![window, replicas], arguments)
    }

    fn note_silence(&self, cause: &str) {
        let was_up = self.mode.send_if_modified(|mode| {
            let was_up = !mode.is_away();
            if was_up {
                *mode = Mode::Away;
            }
            was_up
        });
        if was_up {
            tracing::warn!(
                cause,
                "Redis does not answer: this replica grants its share of each limit"
            );
            self.went_away.notify_one();
        }
    }

    /// Another replica may have taken the delay for silence, and have granted calls apart.
    fn note_delay(&self) {
        self.mode.send_if_modified(|mode| {
            if mode.is_up(Instant::now()) {
                *mode = Mode::Recovering(Instant::now() + RECOVERY);
            }
            false // nobody waits for this
        });
    }

    /// Registers again and again, notices when Redis goes away and when it is back, and then reports what
    /// was granted meanwhile.
    async fn keep_in_touch(self: Arc<Self>) {
        let end = self.end.clone();
        let _ = end.run_until_cancelled(self.beat()).await;
        // Others may use this replica's share at once. Who is not told learns it in a few seconds.
        let (keys, arguments) = self.heartbeat(true);
        let leaves = self.shared.attempt::<Vec<u32>>(&self.registration, keys, arguments);
        if !self.mode().is_away() {
            let _ = timeout(LEAVING, leaves).await;
        }
    }

    async fn beat(self: &Arc<Self>) {
        loop {
            let (keys, arguments) = self.heartbeat(false);
            if self.mode().is_away() {
                let found =
                    self.shared.attempt::<Vec<u32>>(&self.registration, keys, arguments).await;
                match found {
                    Ok(found) => self.come_back(&found).await,
                    Err(_) => sleep(PROBE_INTERVAL).await,
                }
                continue;
            }
            match self
                .shared
                .ask_until_silent::<Vec<u32>>(&self.registration, keys, arguments)
                .await
            {
                Ok(heard) => self.note_replicas(&heard.reply),
                Err(silent) => {
                    self.note_silence(&silent.cause);
                    continue;
                }
            }
            // What could not be reported when Redis came back.
            self.report_all().await;
            tokio::select! {
                () = sleep(HEARTBEAT_INTERVAL) => {}
                () = self.went_away.notified() => {}
            }
        }
    }

    fn heartbeat(&self, is_leaving: bool) -> (Vec<String>, Vec<Value>) {
        let numbers = [millis(HEARTBEAT_LIFETIME), is_leaving.into()];
        let mut arguments: Vec<Value> = vec![self.replica.as_str().into()];
        arguments.extend(numbers.map(integer));
        (self.replicas.keys(), arguments)
    }

    fn note_replicas(&self, found: &[u32]) {
        self.replicas.learn(found, !self.mode().is_recovering(Instant::now()));
    }

    async fn come_back(self: &Arc<Self>, found: &[u32]) {
        let mode = match self.mode() {
            Mode::Starting => Mode::Up,
            _ => Mode::Recovering(Instant::now() + RECOVERY),
        };
        self.replicas.learn(found, mode == Mode::Up);
        // Before the first call is decided in Redis again.
        self.report_all().await;
        self.mode.send_replace(mode);
        if mode != Mode::Up {
            tracing::info!("Redis answers again");
        }
        // What was granted between the report and the change of the mode.
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
                let begin =
                    |counter: &mut Counter| counter.report(inner.next_sequence(), Instant::now());
                if let Some(report) = inner.counters.find(&subject, method, begin).flatten() {
                    inner.decide_waiting(subject, method, Some(report)).await;
                }
            }
        });
        stream::iter(reports).for_each_concurrent(CONCURRENT_REPORTS, |report| report).await;
    }
}

/// None: Redis had a later request already, and nobody waits for this one.
fn read(values: &[u64]) -> Option<Reply> {
    let &[passed, remaining, reset, wait, opened, granted] = values else { return None };
    let number = |value| u32::try_from(value).unwrap_or(u32::MAX);
    Some(Reply {
        passed: number(passed),
        remaining: number(remaining),
        reset: Duration::from_millis(reset),
        wait: Duration::from_millis(wait),
        opened,
        granted: number(granted),
    })
}

fn count_alone(calls: u64) {
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
    async fn without_redis_calls_are_limited_here() {
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
    async fn the_setting_says_how_many_share_a_limit_where_redis_never_did() {
        let config = Settings::parse_from(["test", "--rate-limit-replicas=4"]).limits;
        let redis = Redis::new(&"redis://127.0.0.1:1".into(), &config, &["codegen"]).unwrap();
        let (rate, mut passed) = (Rate::new(100, Duration::from_hours(1)), 0);
        for _ in 0..200 {
            passed += u32::from(redis.decide("a", "/x", rate).await.retry_after.is_none());
        }
        assert_eq!(passed, 25);
    }
}

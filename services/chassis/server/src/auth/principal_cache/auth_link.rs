//! The health of the link to auth, and the timeout of requests to it.
//!
//! Auth sends a heartbeat every 0.25 s (`WatchRevocations`), and every answer counts as one. While heartbeats arrive,
//! an answer may take [`RESPONSE_TIMEOUT`]: auth or its store is busy. After a second without one, a request fails
//! after [`SILENT_RESPONSE_TIMEOUT`]. If it does, the others fail at once, as long as one request probes auth.
//!
//! Silence is counted in ticks of this process, so that a lack of processor time here does not count against auth.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use tokio::sync::Semaphore;
use tokio::time::{Instant, sleep, timeout};
use tonic::{Code, Status};

/// Maximum duration of a request. Auth usually answers within a millisecond.
pub(super) const RESPONSE_TIMEOUT: Duration = Duration::from_secs(2);
/// Maximum duration of a request while auth sends no heartbeat.
const SILENT_RESPONSE_TIMEOUT: Duration = Duration::from_millis(200);
/// Delay until a second, hedged request, in case one of several replicas hangs. The balancer picks the least busy
/// replica, and so another one.
const HEDGE_DELAY: Duration = Duration::from_millis(100);
/// Maximum number of concurrent hedged requests, so that a busy auth gets little extra load.
const MAX_HEDGES: usize = 4;
/// Interval of the ticks that count silence.
const TICK_INTERVAL: Duration = Duration::from_millis(250);
/// Ticks without a heartbeat after which auth counts as silent.
const SILENT_TICK_THRESHOLD: u32 = 4;
/// Interval at which a waiting request checks whether auth has become silent.
const CHECK_INTERVAL: Duration = Duration::from_millis(50);

/// The health of the link to auth.
#[derive(Debug)]
pub(super) struct AuthLink {
    silent_ticks: AtomicU32,
    /// A request was not answered while auth was silent.
    is_hung: AtomicBool,
    /// One request probes whether auth still hangs.
    is_probed: AtomicBool,
    hedges: Semaphore,
}

/// Held by the one request that probes a hung auth.
struct ProbeGuard<'a>(&'a AtomicBool);

impl Drop for ProbeGuard<'_> {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
    }
}

impl AuthLink {
    pub(super) fn new() -> AuthLink {
        AuthLink {
            silent_ticks: AtomicU32::new(0),
            is_hung: AtomicBool::new(false),
            is_probed: AtomicBool::new(false),
            hedges: Semaphore::new(MAX_HEDGES),
        }
    }

    /// Records a sign of life.
    pub(super) fn record_heartbeat(&self) {
        self.silent_ticks.store(0, Ordering::Release);
        self.is_hung.store(false, Ordering::Release);
    }

    /// Counts the ticks without a heartbeat, for as long as the server runs.
    pub(super) async fn count_silence(&self) {
        loop {
            sleep(TICK_INTERVAL).await;
            // An overflow would take 34 years.
            self.silent_ticks.fetch_add(1, Ordering::AcqRel);
        }
    }

    fn is_silent(&self) -> bool {
        self.silent_ticks.load(Ordering::Acquire) >= SILENT_TICK_THRESHOLD
    }

    /// Sends a request within its timeout. `request` sends it, at most twice.
    pub(super) async fn call<T, F>(&self, mut request: impl FnMut() -> F) -> Result<T, Status>
    where
        F: Future<Output = Result<T, Status>>,
    {
        let _probe =
            self.is_hung.load(Ordering::Acquire).then(|| self.start_probe()).transpose()?;
        let (mut calls, started) = (FuturesUnordered::from_iter([request()]), Instant::now());
        let mut hedge = None;
        loop {
            match timeout(CHECK_INTERVAL, calls.next()).await {
                Ok(Some(response)) => {
                    if response.as_ref().map_or_else(is_answer_of_auth, |_| true) {
                        self.record_heartbeat();
                    } else if !calls.is_empty() {
                        continue;
                    }
                    return response;
                }
                Ok(None) => return Err(no_answer()),
                Err(_) => {}
            }
            let waited = started.elapsed();
            let is_silent = self.is_silent();
            if waited >= RESPONSE_TIMEOUT || (is_silent && waited >= SILENT_RESPONSE_TIMEOUT) {
                self.is_hung.store(is_silent, Ordering::Release);
                return Err(no_answer());
            }
            if waited >= HEDGE_DELAY && hedge.is_none() {
                hedge = Some(self.hedges.try_acquire());
                if let Some(Ok(_)) = hedge {
                    calls.push(request());
                }
            }
        }
    }

    fn start_probe(&self) -> Result<ProbeGuard<'_>, Status> {
        if self.is_probed.swap(true, Ordering::AcqRel) {
            return Err(no_answer());
        }
        Ok(ProbeGuard(&self.is_probed))
    }
}

fn no_answer() -> Status {
    Status::deadline_exceeded("auth did not answer")
}

/// Whether a status comes from auth itself, and not from the connection.
fn is_answer_of_auth(status: &Status) -> bool {
    !matches!(
        status.code(),
        Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled | Code::Unknown
    )
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::future::{pending, ready};

    use super::*;

    async fn answer_after(time: Duration) -> Result<u32, Status> {
        sleep(time).await;
        Ok(7)
    }

    async fn hangs() -> Result<u32, Status> {
        pending().await
    }

    /// The duration of a request, and its answer.
    async fn timed<F: Future<Output = Result<u32, Status>>>(
        link: &AuthLink,
        request: impl FnMut() -> F,
    ) -> (Duration, Option<u32>) {
        let started = Instant::now();
        let response = link.call(request).await;
        (started.elapsed(), response.ok())
    }

    /// Runs a scenario while silence is counted.
    async fn while_counting<T>(link: &AuthLink, scenario: impl Future<Output = T>) -> T {
        tokio::select! {
            done = scenario => done,
            () = link.count_silence() => unreachable!("it never ends"),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_slow_auth_that_sends_heartbeats_gets_the_full_timeout() {
        let link = AuthLink::new();
        let heartbeats = async {
            loop {
                sleep(2 * TICK_INTERVAL).await;
                link.record_heartbeat();
            }
        };
        let slow = Duration::from_millis(1_800);
        let scenario = async {
            tokio::select! {
                done = timed(&link, || answer_after(slow)) => done,
                () = heartbeats => unreachable!(),
            }
        };
        let (took, answer) = while_counting(&link, scenario).await;
        assert_eq!(answer, Some(7));
        assert!(took >= slow && took < RESPONSE_TIMEOUT, "{took:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn of_a_hung_auth_one_request_waits_briefly_and_the_others_fail_at_once() {
        let link = AuthLink::new();
        while_counting(&link, async {
            let (first, answer) = timed(&link, hangs).await;
            assert_eq!(answer, None);
            assert!(
                first <= TICK_INTERVAL * (SILENT_TICK_THRESHOLD + 1),
                "{first:?}: until it counts as silent"
            );
            for _ in 0..5 {
                let probe = timed(&link, hangs);
                let others = async {
                    sleep(CHECK_INTERVAL).await;
                    timed(&link, hangs).await
                };
                let ((probe, _), (other, _)) = tokio::join!(probe, others);
                assert_eq!((probe, other), (SILENT_RESPONSE_TIMEOUT, Duration::ZERO));
            }
            // A probe that is dropped does not block the next one.
            assert!(timeout(CHECK_INTERVAL, link.call(hangs)).await.is_err());
            let (took, answer) = timed(&link, || answer_after(CHECK_INTERVAL)).await;
            assert_eq!((took, answer), (CHECK_INTERVAL, Some(7)));
            assert!(!link.is_silent() && !link.is_hung.load(Ordering::Acquire), "it has recovered");
        })
        .await;
    }

    #[tokio::test(start_paused = true)]
    async fn of_two_replicas_one_that_hangs_costs_a_tenth_of_a_second() {
        let (link, asked) = (AuthLink::new(), Cell::new(0));
        let one_hangs = || {
            asked.set(asked.get() + 1);
            let hangs = asked.get() % 2 == 1;
            async move { if hangs { pending().await } else { Ok(7) } }
        };
        while_counting(&link, async {
            for _ in 0..20 {
                let (took, answer) = timed(&link, one_hangs).await;
                assert_eq!(answer, Some(7));
                assert!(took <= HEDGE_DELAY + CHECK_INTERVAL, "{took:?}");
            }
        })
        .await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_refusal_is_an_answer_and_a_lost_connection_fails_at_once() {
        let link = AuthLink::new();
        for code in [Code::NotFound, Code::Unauthenticated, Code::Unavailable] {
            link.silent_ticks.store(9, Ordering::Release);
            let started = Instant::now();
            let status =
                link.call(|| ready(Err::<u32, _>(Status::new(code, "")))).await.unwrap_err();
            assert_eq!((status.code(), started.elapsed()), (code, Duration::ZERO));
            assert_eq!(link.is_silent(), code == Code::Unavailable, "{code:?}");
        }
    }
}

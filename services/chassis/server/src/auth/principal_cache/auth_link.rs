//! Whether auth gets on, and how long a question to it may wait.
//!
//! Auth gives a sign of life every 0.25 s (`WatchRevocations`), and every answer is one. While signs come, an
//! answer may take [`PATIENCE`]: auth or its store is busy. While none has come for a second, a question fails
//! after [`SILENT_PATIENCE`], and others fail at once as long as one tries.
//!
//! Silence is counted in ticks of this process, so that a process which lacks processor time blames itself.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use tokio::sync::Semaphore;
use tokio::time::{Instant, sleep, timeout};
use tonic::{Code, Status};

/// The longest that an answer may take. Auth answers in a millisecond; past this it is as good as down.
pub(super) const PATIENCE: Duration = Duration::from_secs(2);
/// The same while auth gives no sign of life.
const SILENT_PATIENCE: Duration = Duration::from_millis(200);
/// From when on the same is asked once more, in case one replica of several hangs: the call goes to the least
/// busy, so to another one.
const HEDGE_AFTER: Duration = Duration::from_millis(100);
/// Most questions that are asked twice at once, so that a busy auth gets little more to do.
const MAX_HEDGES: usize = 4;
/// Between two ticks.
const TICK: Duration = Duration::from_millis(250);
/// Ticks without a sign of life from which on auth is silent.
const SILENT_TICKS: u32 = 4;
/// Between two looks at whether auth has become silent.
const LOOK: Duration = Duration::from_millis(50);

/// What is known of how auth gets on.
#[derive(Debug)]
pub(super) struct Link {
    silent_ticks: AtomicU32,
    /// A question was not answered while auth was silent.
    is_hung: AtomicBool,
    /// One question tries whether it still is.
    is_tried: AtomicBool,
    hedges: Semaphore,
}

/// The one question that tries.
struct Trial<'a>(&'a AtomicBool);

impl Drop for Trial<'_> {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
    }
}

impl Link {
    pub(super) fn new() -> Link {
        Link {
            silent_ticks: AtomicU32::new(0),
            is_hung: AtomicBool::new(false),
            is_tried: AtomicBool::new(false),
            hedges: Semaphore::new(MAX_HEDGES),
        }
    }

    /// Notes a sign of life.
    pub(super) fn heard(&self) {
        self.silent_ticks.store(0, Ordering::Release);
        self.is_hung.store(false, Ordering::Release);
    }

    /// Counts silence, for as long as the server runs.
    pub(super) async fn count(&self) {
        loop {
            sleep(TICK).await;
            // It can't overflow: that takes 34 years.
            self.silent_ticks.fetch_add(1, Ordering::AcqRel);
        }
    }

    fn is_silent(&self) -> bool {
        self.silent_ticks.load(Ordering::Acquire) >= SILENT_TICKS
    }

    /// Asks; `ask` makes the call, which can be made twice.
    pub(super) async fn ask<T, F>(&self, mut ask: impl FnMut() -> F) -> Result<T, Status>
    where
        F: Future<Output = Result<T, Status>>,
    {
        let _trial = self.is_hung.load(Ordering::Acquire).then(|| self.try_it()).transpose()?;
        let (mut calls, begun) = (FuturesUnordered::from_iter([ask()]), Instant::now());
        let mut hedge = None;
        loop {
            match timeout(LOOK, calls.next()).await {
                Ok(Some(reply)) => {
                    if reply.as_ref().map_or_else(was_answered, |_| true) {
                        self.heard();
                    } else if !calls.is_empty() {
                        continue;
                    }
                    return reply;
                }
                Ok(None) => return Err(silent()),
                Err(_) => {}
            }
            let waited = begun.elapsed();
            let is_silent = self.is_silent();
            if waited >= PATIENCE || (is_silent && waited >= SILENT_PATIENCE) {
                self.is_hung.store(is_silent, Ordering::Release);
                return Err(silent());
            }
            if waited >= HEDGE_AFTER && hedge.is_none() {
                hedge = Some(self.hedges.try_acquire());
                if let Some(Ok(_)) = hedge {
                    calls.push(ask());
                }
            }
        }
    }

    fn try_it(&self) -> Result<Trial<'_>, Status> {
        if self.is_tried.swap(true, Ordering::AcqRel) {
            return Err(silent());
        }
        Ok(Trial(&self.is_tried))
    }
}

fn silent() -> Status {
    Status::deadline_exceeded("auth did not answer")
}

/// Whether auth itself said so, as far as a status can tell.
fn was_answered(status: &Status) -> bool {
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

    /// How long a question takes, and what comes of it.
    async fn timed<F: Future<Output = Result<u32, Status>>>(
        link: &Link,
        ask: impl FnMut() -> F,
    ) -> (Duration, Option<u32>) {
        let begun = Instant::now();
        let reply = link.ask(ask).await;
        (begun.elapsed(), reply.ok())
    }

    /// Runs a story beside the count of silence.
    async fn beside<T>(link: &Link, story: impl Future<Output = T>) -> T {
        tokio::select! {
            done = story => done,
            () = link.count() => unreachable!("it counts for ever"),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn an_auth_that_is_slow_and_gives_signs_of_life_is_waited_for() {
        let link = Link::new();
        let signs = async {
            loop {
                sleep(2 * TICK).await;
                link.heard();
            }
        };
        let slow = Duration::from_millis(1_800);
        let story = async {
            tokio::select! {
                done = timed(&link, || answer_after(slow)) => done,
                () = signs => unreachable!(),
            }
        };
        let (took, answer) = beside(&link, story).await;
        assert_eq!(answer, Some(7));
        assert!(took >= slow && took < PATIENCE, "{took:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_hung_auth_costs_one_question_a_moment_and_others_at_that_time_nothing() {
        let link = Link::new();
        beside(&link, async {
            let (first, answer) = timed(&link, hangs).await;
            assert_eq!(answer, None);
            assert!(
                first <= TICK * (SILENT_TICKS + 1),
                "{first:?}: until it is known to be silent"
            );
            for _ in 0..5 {
                let trial = timed(&link, hangs);
                let others = async {
                    sleep(LOOK).await;
                    timed(&link, hangs).await
                };
                let ((trial, _), (other, _)) = tokio::join!(trial, others);
                assert_eq!((trial, other), (SILENT_PATIENCE, Duration::ZERO));
            }
            // A caller who leaves does not keep others from trying.
            assert!(timeout(LOOK, link.ask(hangs)).await.is_err());
            let (took, answer) = timed(&link, || answer_after(LOOK)).await;
            assert_eq!((took, answer), (LOOK, Some(7)));
            assert!(!link.is_silent() && !link.is_hung.load(Ordering::Acquire), "it is back");
        })
        .await;
    }

    #[tokio::test(start_paused = true)]
    async fn of_two_replicas_one_that_hangs_costs_a_tenth_of_a_second() {
        let (link, asked) = (Link::new(), Cell::new(0));
        let one_hangs = || {
            asked.set(asked.get() + 1);
            let hangs = asked.get() % 2 == 1;
            async move { if hangs { pending().await } else { Ok(7) } }
        };
        beside(&link, async {
            for _ in 0..20 {
                let (took, answer) = timed(&link, one_hangs).await;
                assert_eq!(answer, Some(7));
                assert!(took <= HEDGE_AFTER + LOOK, "{took:?}");
            }
        })
        .await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_refusal_is_an_answer_and_a_lost_connection_is_told_at_once() {
        let link = Link::new();
        for code in [Code::NotFound, Code::Unauthenticated, Code::Unavailable] {
            link.silent_ticks.store(9, Ordering::Release);
            let begun = Instant::now();
            let status =
                link.ask(|| ready(Err::<u32, _>(Status::new(code, "")))).await.unwrap_err();
            assert_eq!((status.code(), begun.elapsed()), (code, Duration::ZERO));
            assert_eq!(link.is_silent(), code == Code::Unavailable, "{code:?}");
        }
    }
}

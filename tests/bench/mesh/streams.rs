//! Many open streams: their cost, and the evenness of their token intervals.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{bail, ensure};
use tokio::task::JoinSet;
use tokio::time::sleep;

use crate::caller::{Caller, Way};
use crate::engine::Play;
use crate::gauge;
use crate::samples::Samples;
use crate::stage::Stage;

/// Interval between two openings, so that the streams do not send in phase.
const START_INTERVAL: Duration = Duration::from_micros(1_500);
/// For all to be open.
const WAIT_TIMEOUT: Duration = Duration::from_secs(30);
/// From all open to the first reading.
const SETTLE_PERIOD: Duration = Duration::from_millis(700);

/// The streams to keep open.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Load {
    pub(crate) way: Way,
    pub(crate) streams: usize,
    /// Zero: as fast as they can.
    pub(crate) gap: Duration,
    pub(crate) lasts: Duration,
}

/// One value for each measured process.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Each<T> {
    pub(crate) hapa: T,
    pub(crate) gateway: T,
    pub(crate) plain: T,
}

/// Measurements of one load.
#[derive(Debug, Default)]
pub(crate) struct StreamReport {
    pub(crate) tokens: u64,
    pub(crate) cpu: Each<Duration>,
    /// Resident bytes more than before the first stream.
    pub(crate) grown: Each<u64>,
    /// How far each gap was from what the engine intended.
    pub(crate) deviations: Samples,
    /// Busy share of the machine's processors, including other processes.
    pub(crate) busy: f64,
}

#[derive(Debug, Default)]
struct StreamTotals {
    tokens: AtomicU64,
    begun: AtomicUsize,
    measuring: AtomicBool,
    deviations: Mutex<Samples>,
}

pub(crate) async fn hold(stage: &mut Stage, load: Load) -> anyhow::Result<StreamReport> {
    stage.engine.play(Play::endless(load.gap)).await?;
    let before = sample(stage, gauge::memory)?;
    let (mut tasks, tally) = (JoinSet::new(), Arc::new(StreamTotals::default()));
    for caller in Caller::many(stage, load.way, load.streams).await? {
        tasks.spawn(stream(caller, load.gap, Arc::clone(&tally)));
        sleep(START_INTERVAL).await;
    }
    all_begun(&tally, load.streams, &mut tasks).await?;
    sleep(SETTLE_PERIOD).await;

    let (cpu, machine) = (sample(stage, gauge::cpu)?, gauge::machine()?);
    let tokens = tally.tokens.load(Ordering::Relaxed);
    tally.measuring.store(true, Ordering::Relaxed);
    sleep(load.lasts).await;
    tally.measuring.store(false, Ordering::Relaxed);
    let tokens = tally.tokens.load(Ordering::Relaxed) - tokens;
    let cpu = minus(sample(stage, gauge::cpu)?, cpu, Duration::saturating_sub);
    let busy = gauge::busy(machine, gauge::machine()?);
    let grown = minus(sample(stage, gauge::memory)?, before, u64::saturating_sub);

    if let Some(ended) = tasks.try_join_next() {
        ended??;
    }
    ensure!(tokens > 0, "no token came");
    tasks.shutdown().await;
    stage.engine.idle().await?;
    let deviations =
        std::mem::take(&mut *tally.deviations.lock().unwrap_or_else(PoisonError::into_inner));
    Ok(StreamReport { tokens, cpu, grown, deviations, busy })
}

/// One stream after the other, until it is dropped.
async fn stream(mut caller: Caller, gap: Duration, tally: Arc<StreamTotals>) -> anyhow::Result<()> {
    let mut first = true;
    loop {
        caller.ask().await?;
        let mut last = None;
        while let Some(tokens) = caller.tokens().await? {
            tally.tokens.fetch_add(tokens.into(), Ordering::Relaxed);
            if std::mem::take(&mut first) {
                tally.begun.fetch_add(1, Ordering::Relaxed);
            }
            let now = Instant::now();
            if let Some(last) = last.replace(now)
                && gap > Duration::ZERO
                && tally.measuring.load(Ordering::Relaxed)
            {
                tally.note(now - last, gap, tokens);
            }
        }
    }
}

impl StreamTotals {
    /// Tokens that come together have no time between them.
    fn note(&self, since: Duration, gap: Duration, tokens: u32) {
        let mut deviations = self.deviations.lock().unwrap_or_else(PoisonError::into_inner);
        deviations.push(since.abs_diff(gap));
        for _ in 1..tokens {
            deviations.push(gap);
        }
    }
}

async fn all_begun(
    tally: &StreamTotals,
    streams: usize,
    tasks: &mut JoinSet<anyhow::Result<()>>,
) -> anyhow::Result<()> {
    let from = Instant::now();
    while tally.begun.load(Ordering::Relaxed) < streams {
        if let Some(ended) = tasks.try_join_next() {
            ended??;
        }
        if from.elapsed() > WAIT_TIMEOUT {
            bail!("not all of {streams} streams began in {WAIT_TIMEOUT:?}");
        }
        sleep(Duration::from_millis(10)).await;
    }
    Ok(())
}

fn sample<T>(stage: &Stage, gauge: impl Fn(u32) -> anyhow::Result<T>) -> anyhow::Result<Each<T>> {
    Ok(Each {
        hapa: gauge(stage.hapa.pid()?)?,
        gateway: gauge(stage.gateway.pid()?)?,
        plain: gauge(stage.plain.pid()?)?,
    })
}

fn minus<T>(to: Each<T>, from: Each<T>, minus: impl Fn(T, T) -> T) -> Each<T> {
    Each {
        hapa: minus(to.hapa, from.hapa),
        gateway: minus(to.gateway, from.gateway),
        plain: minus(to.plain, from.plain),
    }
}

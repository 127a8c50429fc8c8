//! Answers that need not be generated: known ones are replayed, and whoever asks what is just being
//! answered for the same caller reads along. Around a generation, which knows nothing of it.
//!
//! The cache never fails a call: what it can't say in time is asked of the engine, with a warning.

mod entry;
mod flight;
mod key;
mod memory;
mod redis;
mod seat;
mod service;
mod store;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures_util::{StreamExt as _, stream};
use hapa_core::call_stats::CallStats;
use hapa_core::health_check::HealthCheck;
use hapa_core::rpc_error::{ErrorCode, RpcError};
use hapa_core::service::ServiceSpec;
use hapa_store::redis::RedisUnavailable;
use secrecy::SecretString;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tonic::Status;

use self::entry::Entry;
pub(crate) use self::flight::Said;
use self::flight::{Flight, Flights, Place};
pub(crate) use self::key::{Key, Question};
use self::memory::Memory;
use self::redis::Shared;
pub(crate) use self::seat::{Guest, Seat};
pub(crate) use self::service::Caches;
use self::store::{Era, Store};
use crate::error::Error;
use crate::generation::Generation;
use crate::share::Source;

/// Its name in metrics and for operators.
const NAME: &str = "code_generation";
/// Answers that wait for Redis to keep them; more are not kept.
const WAITING: usize = 256;
const AWAY: &str = "the cache did not answer, so the model was asked";

/// The settings.
#[derive(clap::Args, Clone, Debug)]
#[group(id = "cache")]
pub struct Config {
    /// How long an answer is given again to the same question, in seconds; 0 turns the cache off.
    #[arg(long, env = "CACHE_TTL", default_value = "1800", value_parser = hapa_core::config::seconds_or_none)]
    pub cache_ttl: Duration,
    /// Most answers that are kept: in REDIS_URL by all replicas together, else by each.
    #[arg(long, env = "MAX_CACHE_SIZE", default_value_t = 1_000, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub max_cache_size: u32,
    /// Longest wait for a cache or an idempotency key in Redis before the model is asked, in seconds.
    #[arg(long, env = "CACHE_TIMEOUT_SECONDS", default_value = "0.1", value_parser = hapa_core::config::seconds)]
    pub cache_timeout_seconds: Duration,
}

/// See the module.
#[derive(Clone)]
pub(crate) struct Cache(Arc<Inner>);

struct Inner {
    store: Arc<Store>,
    flights: Flights,
    hits: AtomicU64,
    misses: AtomicU64,
    config: Config,
    late: mpsc::Sender<Late>,
}

/// An answer that Redis shall keep. Until then its flight is found in its place.
struct Late {
    key: Key,
    era: Era,
    entry: Entry,
    _flight: Arc<Flight>,
}

/// Keeps an answer when it is whole.
struct Keeper {
    store: Arc<Store>,
    late: mpsc::Sender<Late>,
    key: Key,
    era: Era,
}

/// What is asked for.
pub(crate) struct Asked {
    pub(crate) key: Key,
    /// The key or session that asks: answers on their way are shared within one.
    pub(crate) subject: Arc<str>,
    /// No known answer, and none that is on its way.
    pub(crate) fresh: bool,
}

impl Cache {
    pub(crate) fn new(
        config: &Config,
        redis_url: Option<&SecretString>,
        spec: &mut ServiceSpec,
    ) -> anyhow::Result<Self> {
        let Config { cache_ttl: ttl, max_cache_size: capacity, cache_timeout_seconds: patience } =
            *config;
        let store = Arc::new(match redis_url {
            _ if ttl.is_zero() => Store::Off,
            None => Store::Memory(Memory::new(capacity, ttl)),
            Some(url) => Store::Redis(Box::new(Shared::new(url, patience, capacity, ttl)?)),
        });
        let (late, waiting) = mpsc::channel(WAITING);
        if matches!(*store, Store::Redis(_)) {
            let keeping = Arc::clone(&store);
            spec.spawn_until(|end| keep(keeping, waiting, end));
            spec.check(redis_check(Arc::clone(&store)));
        }
        let inner = Inner {
            store,
            flights: Flights::default(),
            hits: AtomicU64::new(0),
            misses: AtomicU64::new(0),
            config: config.clone(),
            late,
        };
        Ok(Cache(Arc::new(inner)))
    }

    /// The answer: known, on its way, or begun now. It has begun when this returns, so what fails at
    /// once is a plain status.
    pub(crate) async fn answer(
        &self,
        asked: Asked,
        mut guest: Guest,
        begin: impl FnOnce() -> (Source<Said>, CallStats),
    ) -> Result<Seat, Status> {
        let Asked { key, subject, fresh } = asked;
        let looked = self.0.store.look(key, !fresh).await;
        if let Some(away) = looked.failed {
            went_without(away, &mut guest);
        }
        if let Some(entry) = looked.answer {
            self.count(true, &guest);
            return Ok(Seat::known(&entry, guest));
        }
        let keeper = looked.era.clone().map(|era| Keeper {
            store: Arc::clone(&self.0.store),
            late: self.0.late.clone(),
            key,
            era,
        });
        let alone = fresh || self.0.store.is_off();
        let begin = |listing| Flight::begin(begin(), guest.report(), keeper, listing);
        let place = if alone {
            begin(None).1
        } else {
            let name = (subject, looked.era, key);
            let beside = |flight: &_| Place::beside(flight, guest.report());
            self.0.flights.join_or(name, beside, |listing| begin(Some(listing)))
        };
        if !alone && (place.joined || looked.failed.is_none()) {
            self.count(place.joined, &guest);
        }
        Seat::begin(place, guest).await
    }

    fn count(&self, hit: bool, guest: &Guest) {
        guest.report().record_cache_lookup(hit);
        if hit {
            self.0.hits.fetch_add(1, Ordering::Relaxed);
            metrics::counter!("hapa_cache_hits_total", "cache" => NAME).increment(1);
        } else {
            self.0.misses.fetch_add(1, Ordering::Relaxed);
            metrics::counter!("hapa_cache_misses_total", "cache" => NAME).increment(1);
        }
    }
}

/// Every reply says so; the errors service is told of those that Redis was asked for, a few a
/// second, and not of each while it is known to be away.
fn went_without(away: RedisUnavailable, guest: &mut Guest) {
    metrics::counter!("hapa_cache_errors_total").increment(1);
    guest.warn(format!("{}: {AWAY}", ErrorCode::CacheError));
    if away.was_sent {
        guest.report().record_recovered_error(&RpcError::new(ErrorCode::CacheError, AWAY));
    }
}

/// What a generation says once it is begun, and the status of one that can't begin.
pub(crate) fn source(
    begin: impl Future<Output = Result<Generation, Error>> + Send + 'static,
) -> Source<Said> {
    let said = stream::once(begin).flat_map(|begun| match begun {
        // Boxed: the state moves with every event.
        Ok(generation) => stream::unfold(Box::new(generation), |mut generation| async {
            Some((generation.next().await?, generation))
        })
        .left_stream(),
        Err(error) => stream::once(std::future::ready(Err(error.into()))).right_stream(),
    });
    Box::pin(said)
}

impl Keeper {
    fn keep(self, entry: Entry, flight: &Arc<Flight>) {
        let Keeper { store, late, key, era } = self;
        match &*store {
            Store::Off => {}
            Store::Memory(memory) => memory.keep(key, era, entry),
            Store::Redis(_) => {
                let answer = Late { key, era, entry, _flight: Arc::clone(flight) };
                if late.try_send(answer).is_err() {
                    metrics::counter!("hapa_cache_errors_total").increment(1);
                }
            }
        }
    }
}

/// Keeps answers in Redis, one by one and on nobody's time; each is tried once.
async fn keep(store: Arc<Store>, mut waiting: mpsc::Receiver<Late>, end: CancellationToken) {
    let Store::Redis(redis) = &*store else { return };
    loop {
        let answer = tokio::select! {
            biased;
            () = end.cancelled() => return,
            answer = waiting.recv() => answer,
        };
        let Some(Late { key, era, entry, _flight }) = answer else { return };
        if redis.keep(key, &era, &entry).await.is_err() {
            metrics::counter!("hapa_cache_errors_total").increment(1);
        }
    }
}

/// Named like the limiter's, of which it is another connection.
fn redis_check(store: Arc<Store>) -> HealthCheck {
    let run = move || {
        let store = Arc::clone(&store);
        async move {
            match &*store {
                Store::Redis(redis) if !redis.probe().await => {
                    Err("Redis does not answer: this replica asks the model for every answer"
                        .to_owned())
                }
                _ => Ok(()),
            }
        }
    };
    HealthCheck::new("redis", "Redis does not answer", run)
}

//! Routing across all engines: a request goes to the best endpoint, and to another one if that fails
//! before its first token.
//!
//! Invariants: a request is never retried after its first token; requests never wait for a health
//! probe, except the first ones after start-up; dropping an `Attempt` releases what it holds.

pub mod balancer;
mod discovery;
mod dispatch;
mod endpoint;
mod engine_problems;
mod first_token;
mod health_poll;
mod retry_budget;
mod scrape;
mod snapshot;
#[cfg(test)]
mod tests;

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

use futures_util::future::join_all;
use tokio::sync::Notify;
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;

use self::endpoint::Endpoint;
use self::retry_budget::RetryBudget;
use crate::upstream::engine::{Engine, EngineOptions};

pub(crate) use self::discovery::EngineSource;
pub(crate) use self::dispatch::{DispatchError, EngineRequest, StartedStream};
pub(crate) use self::snapshot::{ModelSummary, PoolSnapshot};

/// How long the first requests of a process wait for the first probe.
const FIRST_PROBE_TIMEOUT: Duration = Duration::from_secs(3);
/// Maximum number of engines with a metric label of their own, over the life of a process.
const MAX_METRIC_LABELS: usize = 256;
/// Metric label of all further engines.
const OTHER_LABEL: &str = "other";

/// Timeouts of the pool.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PoolTimeouts {
    /// Maximum wait for the first token of one engine while another engine may be tried.
    pub(crate) attempt: Duration,
    /// An engine that runs requests but generates no token for this long counts as stalled.
    pub(crate) stall: Duration,
}

/// All engines. Clones share one pool.
#[derive(Clone)]
pub(crate) struct EnginePool(Arc<PoolInner>);

struct PoolInner {
    sources: Vec<EngineSource>,
    options: EngineOptions,
    timeouts: PoolTimeouts,
    snapshot: RwLock<Arc<PoolSnapshot>>,
    /// Held while the snapshot is rebuilt, so that the latest rebuild wins.
    rebuild_lock: Mutex<()>,
    metric_labels: Mutex<HashSet<Arc<str>>>,
    retry_budget: RetryBudget,
    /// Cancelled after the first DNS lookup of the names.
    names_resolved: CancellationToken,
    has_probed: AtomicBool,
    /// When the latest probe of all endpoints began.
    last_refresh: tokio::sync::Mutex<Option<Instant>>,
    endpoints_added: Notify,
    /// Probes have found changes that the snapshot does not contain yet.
    is_snapshot_stale: AtomicBool,
}

impl EnginePool {
    pub(crate) fn new(
        sources: Vec<EngineSource>,
        options: EngineOptions,
        timeouts: PoolTimeouts,
    ) -> anyhow::Result<EnginePool> {
        let pool = EnginePool(Arc::new(PoolInner {
            sources,
            options,
            timeouts,
            snapshot: RwLock::default(),
            rebuild_lock: Mutex::default(),
            metric_labels: Mutex::default(),
            retry_budget: RetryBudget::new(),
            names_resolved: CancellationToken::new(),
            has_probed: AtomicBool::new(false),
            last_refresh: tokio::sync::Mutex::default(),
            endpoints_added: Notify::new(),
            is_snapshot_stale: AtomicBool::new(false),
        }));
        let mut endpoints = Vec::new();
        for source in &pool.0.sources {
            // Built for DNS names too, so that unusable settings fail at start-up.
            let engine = source.build_engine(None, &pool.0.options)?;
            if !source.is_dns {
                endpoints.push(pool.new_endpoint(source.endpoint_name(None), engine));
            }
        }
        pool.replace_endpoints(endpoints);
        if pool.0.sources.iter().all(|source| !source.is_dns) {
            pool.0.names_resolved.cancel();
        }
        Ok(pool)
    }

    /// The current snapshot; right after start-up, waits for the first probe.
    pub(crate) async fn ready_snapshot(&self) -> Arc<PoolSnapshot> {
        if !self.0.has_probed.load(Ordering::Acquire) {
            let first = async {
                self.0.names_resolved.cancelled().await;
                self.refresh().await;
            };
            // After the timeout the request itself shows more about the engines than a longer wait.
            let _ = timeout(FIRST_PROBE_TIMEOUT, first).await;
        }
        self.snapshot()
    }

    /// Probes all endpoints concurrently, with a timeout. Concurrent callers share one probe.
    pub(crate) async fn refresh(&self) {
        let requested = Instant::now();
        let mut last_refresh = self.0.last_refresh.lock().await;
        if last_refresh.is_some_and(|began| began >= requested) {
            return;
        }
        let began = Instant::now();
        let endpoints = self.snapshot().endpoints.clone();
        let probes = endpoints.iter().map(|endpoint| endpoint.probe(self.0.timeouts.stall));
        join_all(probes).await;
        self.rebuild();
        *last_refresh = Some(began);
    }

    /// The current snapshot.
    pub(crate) fn snapshot(&self) -> Arc<PoolSnapshot> {
        Arc::clone(&self.0.snapshot.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn new_endpoint(&self, name: String, engine: Engine) -> Arc<Endpoint> {
        let mut labels = self.0.metric_labels.lock().unwrap_or_else(PoisonError::into_inner);
        let label: Arc<str> = match labels.get(name.as_str()) {
            Some(existing) => Arc::clone(existing),
            None if labels.len() < MAX_METRIC_LABELS => Arc::from(name.as_str()),
            None => Arc::from(OTHER_LABEL),
        };
        labels.insert(Arc::clone(&label));
        Arc::new(Endpoint::new(name, label, engine))
    }

    /// Replaces the set of endpoints. Requests in flight at removed endpoints continue.
    fn replace_endpoints(&self, endpoints: Vec<Arc<Endpoint>>) {
        let before = self.snapshot();
        let stays = |old: &Endpoint| endpoints.iter().any(|new| new.id == old.id);
        for removed in before.endpoints.iter().filter(|old| !stays(old)) {
            tracing::info!(engine = removed.name, "engine removed: its address left the DNS name");
            removed.retire();
        }
        self.rebuild_with(Some(endpoints));
        self.0.endpoints_added.notify_one();
    }

    /// Rebuilds the snapshot from the latest probe results.
    fn rebuild(&self) {
        self.rebuild_with(None);
    }

    fn rebuild_with(&self, endpoints: Option<Vec<Arc<Endpoint>>>) {
        let _rebuilding = self.0.rebuild_lock.lock().unwrap_or_else(PoisonError::into_inner);
        let endpoints = endpoints.unwrap_or_else(|| self.snapshot().endpoints.clone());
        let has_probed = endpoints.iter().any(|endpoint| endpoint.was_probed());
        let snapshot = Arc::new(PoolSnapshot::new(endpoints));
        *self.0.snapshot.write().unwrap_or_else(PoisonError::into_inner) = snapshot;
        if has_probed {
            self.0.has_probed.store(true, Ordering::Release);
        }
    }
}

//! The fair queue in front of the engines: limits the concurrent generations in total and per tenant,
//! and queues a few more. The tenant with the fewest active generations is granted the next permit, so a
//! heavy tenant delays only itself. A full queue evicts from the tenant with the most waiters.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use hapa_core::config::seconds_or_none;
use sha2::{Digest as _, Sha256};
use tokio::sync::oneshot;
use tokio::time::{Instant, timeout_at};

use crate::error::Error;
use crate::upstream::engine::EngineScheduling;

/// Settings of the queue.
#[derive(clap::Args, Clone, Debug)]
#[group(id = "fair_queue")]
pub struct QueueConfig {
    /// Maximum number of concurrent generations of this process; further ones wait.
    #[arg(long, env = "MAX_GENERATIONS", default_value_t = 1024, value_parser = clap::value_parser!(u32).range(1..))]
    pub max_generations: u32,
    /// Maximum number of concurrent generations of one tenant, which is the owner of a key or session;
    /// 0: no limit per tenant.
    #[arg(long, env = "MAX_GENERATIONS_PER_TENANT", default_value_t = 0)]
    pub max_generations_per_tenant: u32,
    /// Maximum number of waiting generations. Beyond it, one of the tenant with the most waiting
    /// generations is refused at once (E5005).
    #[arg(long, env = "MAX_WAITING", default_value_t = 256)]
    pub max_waiting: u32,
    /// Maximum wait of one generation before it is refused (E5005), in seconds.
    #[arg(long, env = "WAITING_TIMEOUT_SECONDS", default_value = "1", value_parser = seconds_or_none)]
    pub waiting_timeout_seconds: Duration,
    /// Whether completions take precedence over generations: in the queue, and at engines with vLLM's
    /// `--scheduling-policy priority`. --completion-first is an alias for one release.
    #[arg(long, alias = "completion-first", env = "PRIORITIZE_COMPLETIONS", action = clap::ArgAction::Set, value_parser = hapa_core::config::boolean, default_value_t = false)]
    pub prioritize_completions: bool,
    /// Whether engines keep a separate prefix cache per tenant (vLLM's `cache_salt`), so that response
    /// times reveal nothing about the prompts of other tenants.
    #[arg(long, env = "ISOLATE_PREFIX_CACHE", action = clap::ArgAction::Set, value_parser = hapa_core::config::boolean, default_value_t = true)]
    pub isolate_prefix_cache: bool,
}

/// Kind of work. Completions take precedence if PRIORITIZE_COMPLETIONS is set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum WorkKind {
    Completion,
    Generation,
}

/// Grants permits. Clones share one queue.
#[derive(Clone)]
pub(crate) struct FairQueue(Arc<QueueInner>);

struct QueueInner {
    config: QueueConfig,
    state: Mutex<QueueState>,
}

/// Permission for one generation; released on drop.
#[derive(Debug)]
pub(crate) struct ConcurrencyPermit {
    /// `None` if dropping it must not release it.
    queue: Option<FairQueue>,
    tenant: Arc<str>,
}

impl std::fmt::Debug for FairQueue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("FairQueue")
    }
}

#[derive(Default)]
struct QueueState {
    active: usize,
    waiting: usize,
    /// Tenants with active or waiting generations.
    tenants: HashMap<Arc<str>, TenantQueue>,
    next_sequence: u64,
    reported: ReportedGauges,
}

/// This queue's share of the gauges. A gauge is the sum over all queues of the process, so a queue adds
/// differences and removes its share on drop.
#[derive(Default)]
struct ReportedGauges {
    active: usize,
    waiting: usize,
}

#[derive(Default)]
struct TenantQueue {
    active: usize,
    waiting: VecDeque<Waiter>,
}

struct Waiter {
    sequence: u64,
    kind: WorkKind,
    grant_tx: oneshot::Sender<ConcurrencyPermit>,
}

impl FairQueue {
    pub(crate) fn new(config: QueueConfig) -> FairQueue {
        FairQueue(Arc::new(QueueInner { config, state: Mutex::default() }))
    }

    /// Acquires a permit, at once or after a short wait.
    pub(crate) async fn acquire(
        &self,
        tenant: &str,
        kind: WorkKind,
    ) -> Result<ConcurrencyPermit, Error> {
        let (sequence, permit) = match self.enqueue(tenant, kind) {
            Ok(queued) => queued,
            Err(error) => {
                count_refused("full");
                return Err(error);
            }
        };
        // Removes the waiter if this future is dropped.
        let _guard = WaitGuard { queue: self, tenant, sequence };
        let until = Instant::now() + self.0.config.waiting_timeout_seconds;
        match timeout_at(until, permit).await {
            Ok(Ok(permit)) => Ok(permit),
            // The sender was dropped: evicted in favour of another tenant.
            Ok(Err(_)) => {
                count_refused("full");
                Err(Error::QueueFull)
            }
            Err(_) => {
                count_refused("waited");
                Err(Error::QueueFull)
            }
        }
    }

    /// The scheduling fields of a tenant's request to an engine.
    pub(crate) fn scheduling(&self, tenant: &str, kind: WorkKind) -> EngineScheduling {
        let config = &self.0.config;
        // Clients cannot choose salts, so a salt need not be secret. It is a hash so that engines do
        // not see owner names.
        let salt = || hex::encode(&Sha256::digest(format!("cache_salt of {tenant}"))[..16]);
        EngineScheduling {
            cache_salt: config.isolate_prefix_cache.then(salt),
            priority: config.prioritize_completions.then_some(match kind {
                WorkKind::Completion => 0,
                WorkKind::Generation => 1,
            }),
        }
    }

    fn enqueue(
        &self,
        tenant: &str,
        kind: WorkKind,
    ) -> Result<(u64, oneshot::Receiver<ConcurrencyPermit>), Error> {
        let (grant_tx, permit) = oneshot::channel();
        let mut state = self.lock();
        if state.waiting >= self.0.config.max_waiting as usize && !self.has_capacity(&state, tenant)
        {
            state.evict_from_longest(tenant)?;
        }
        let sequence = state.next_sequence;
        state.next_sequence += 1;
        let waiter = Waiter { sequence, kind, grant_tx };
        let entry = state.tenants.entry(tenant.into()).or_default();
        entry.waiting.push_back(waiter);
        state.waiting += 1;
        self.grant_waiting(state);
        Ok((sequence, permit))
    }

    fn has_capacity(&self, state: &QueueState, tenant: &str) -> bool {
        let own = state.tenants.get(tenant).map_or(0, |tenant| tenant.active);
        state.active < self.0.config.max_generations as usize && self.is_below_tenant_limit(own)
    }

    fn is_below_tenant_limit(&self, active: usize) -> bool {
        let limit = self.0.config.max_generations_per_tenant as usize;
        limit == 0 || active < limit
    }

    /// Grants free permits to waiters. A permit whose waiter has gone goes to the next waiter.
    fn grant_waiting(&self, mut state: MutexGuard<'_, QueueState>) {
        while state.active < self.0.config.max_generations as usize {
            let Some(tenant) = self.next_tenant(&state) else { break };
            let Some(waiter) = state.dequeue(&tenant, self.0.config.prioritize_completions) else {
                break;
            };
            let permit =
                ConcurrencyPermit { queue: Some(self.clone()), tenant: Arc::clone(&tenant) };
            state.on_granted(&tenant);
            if let Err(mut unclaimed) = waiter.grant_tx.send(permit) {
                // Its drop would deadlock on the lock held here.
                unclaimed.queue = None;
                state.on_released(&tenant);
            }
        }
        state.update_gauges();
    }

    /// Of the tenants with waiters and below their limit: the one with the fewest active generations,
    /// then the one that has waited longest.
    fn next_tenant(&self, state: &QueueState) -> Option<Arc<str>> {
        let prioritize = self.0.config.prioritize_completions;
        let is_eligible = |(_, tenant): &(&Arc<str>, &TenantQueue)| {
            !tenant.waiting.is_empty() && self.is_below_tenant_limit(tenant.active)
        };
        let rank = |(_, tenant): &(&Arc<str>, &TenantQueue)| {
            let waiter = tenant.next_index(prioritize).and_then(|at| tenant.waiting.get(at));
            let yields =
                prioritize && waiter.is_some_and(|waiter| waiter.kind == WorkKind::Generation);
            (yields, tenant.active, waiter.map_or(u64::MAX, |waiter| waiter.sequence))
        };
        let tenants = state.tenants.iter().filter(is_eligible);
        tenants.min_by_key(rank).map(|(name, _)| Arc::clone(name))
    }

    fn lock(&self) -> MutexGuard<'_, QueueState> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl QueueState {
    /// Makes room in a full queue: evicts the newest waiter of the tenant with the most waiters. Fails
    /// unless that tenant has at least two more waiters than the requesting one.
    fn evict_from_longest(&mut self, requesting: &str) -> Result<(), Error> {
        let own = self.tenants.get(requesting).map_or(0, |tenant| tenant.waiting.len());
        let longest = self.tenants.iter_mut().max_by_key(|(_, tenant)| tenant.waiting.len());
        match longest {
            Some((name, tenant)) if tenant.waiting.len() > own + 1 => {
                tenant.waiting.pop_back();
                let name = Arc::clone(name);
                self.waiting -= 1;
                self.remove_if_idle(&name);
                Ok(())
            }
            _ => Err(Error::QueueFull),
        }
    }

    fn dequeue(&mut self, tenant: &Arc<str>, prioritize_completions: bool) -> Option<Waiter> {
        let tenant = self.tenants.get_mut(tenant)?;
        let waiter = tenant.waiting.remove(tenant.next_index(prioritize_completions)?)?;
        self.waiting -= 1;
        Some(waiter)
    }

    fn on_granted(&mut self, tenant: &Arc<str>) {
        self.active += 1;
        if let Some(tenant) = self.tenants.get_mut(tenant) {
            tenant.active += 1;
        }
    }

    fn on_released(&mut self, tenant: &Arc<str>) {
        self.active -= 1;
        if let Some(tenant) = self.tenants.get_mut(tenant) {
            tenant.active -= 1;
        }
        self.remove_if_idle(tenant);
    }

    fn remove_waiter(&mut self, tenant: &str, sequence: u64) {
        let Some((name, entry)) = self.tenants.get_key_value(tenant) else { return };
        let Some(at) = entry.waiting.iter().position(|waiter| waiter.sequence == sequence) else {
            return;
        };
        let name = Arc::clone(name);
        if let Some(entry) = self.tenants.get_mut(&name) {
            entry.waiting.remove(at);
            self.waiting -= 1;
        }
        self.remove_if_idle(&name);
        self.update_gauges();
    }

    fn remove_if_idle(&mut self, tenant: &Arc<str>) {
        if self.tenants.get(tenant).is_some_and(|one| one.active == 0 && one.waiting.is_empty()) {
            self.tenants.remove(tenant);
        }
    }

    fn update_gauges(&mut self) {
        self.reported.set(self.active, self.waiting);
    }
}

impl ReportedGauges {
    #[expect(clippy::cast_precision_loss, reason = "small counts")]
    fn set(&mut self, active: usize, waiting: usize) {
        let difference = |to: usize, from: usize| to as f64 - from as f64;
        metrics::gauge!("hapa_generations_active").increment(difference(active, self.active));
        metrics::gauge!("hapa_generations_waiting").increment(difference(waiting, self.waiting));
        *self = ReportedGauges { active, waiting };
    }
}

impl Drop for QueueState {
    fn drop(&mut self) {
        self.reported.set(0, 0);
    }
}

impl TenantQueue {
    /// Index of the waiter to grant next: the first one, or the first completion.
    fn next_index(&self, prioritize_completions: bool) -> Option<usize> {
        let completion = |waiter: &Waiter| waiter.kind == WorkKind::Completion;
        let first =
            prioritize_completions.then(|| self.waiting.iter().position(completion)).flatten();
        first.or((!self.waiting.is_empty()).then_some(0))
    }
}

/// Removes its waiter from the queue on drop.
struct WaitGuard<'a> {
    queue: &'a FairQueue,
    tenant: &'a str,
    sequence: u64,
}

impl Drop for WaitGuard<'_> {
    fn drop(&mut self) {
        self.queue.lock().remove_waiter(self.tenant, self.sequence);
    }
}

impl Drop for ConcurrencyPermit {
    fn drop(&mut self) {
        let Some(queue) = self.queue.take() else { return };
        let mut state = queue.lock();
        state.on_released(&self.tenant);
        queue.grant_waiting(state);
    }
}

fn count_refused(why: &'static str) {
    metrics::counter!("hapa_generations_refused_total", "why" => why).increment(1);
}

#[cfg(test)]
mod tests;

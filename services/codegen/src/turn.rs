//! Whose turn it is at the engines: so many generations at once, over all and for each tenant, and a
//! short queue for those beyond. Whoever has least gets the next free place, so a tenant who asks for
//! much waits for itself; and when the queue is full, its longest gives way.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use hapa_core::config::seconds_or_none;
use sha2::{Digest as _, Sha256};
use tokio::sync::oneshot;
use tokio::time::{Instant, timeout_at};

use crate::engine::Scheduling;
use crate::error::Error;

/// How much is asked of the engines at once.
#[derive(clap::Args, Clone, Debug)]
#[group(id = "turn")]
pub struct TurnConfig {
    /// Most generations at the engines at once, from this process; more wait for their turn.
    #[arg(long, env = "MAX_GENERATIONS", default_value_t = 1024, value_parser = clap::value_parser!(u32).range(1..))]
    pub max_generations: u32,
    /// The same for one tenant, which is the owner of a key or session; 0: no bound of its own.
    #[arg(long, env = "MAX_GENERATIONS_PER_TENANT", default_value_t = 0)]
    pub max_generations_per_tenant: u32,
    /// Most generations that wait; more are refused at once (E5005), first those of the tenant with
    /// most that wait.
    #[arg(long, env = "MAX_WAITING", default_value_t = 256)]
    pub max_waiting: u32,
    /// Longest that one waits before it is refused (E5005), in seconds.
    #[arg(long, env = "WAITING_TIMEOUT_SECONDS", default_value = "1", value_parser = seconds_or_none)]
    pub waiting_timeout_seconds: Duration,
    /// Completions go before questions: in the queue, and at engines that have vLLM's
    /// `--scheduling-policy priority`.
    #[arg(long, env = "COMPLETION_FIRST", action = clap::ArgAction::Set, default_value_t = false)]
    pub completion_first: bool,
    /// Whether engines keep the prompts that they remember apart by tenant (vLLM's `cache_salt`), so
    /// that nobody can tell from an answer's speed what others asked.
    #[arg(long, env = "ISOLATE_PREFIX_CACHE", action = clap::ArgAction::Set, default_value_t = true)]
    pub isolate_prefix_cache: bool,
}

/// What a generation is for; the first goes first where that is configured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Completion,
    Question,
}

/// Gives turns. A clone gives the same.
#[derive(Clone)]
pub(crate) struct Turns(Arc<Shared>);

struct Shared {
    config: TurnConfig,
    state: Mutex<State>,
}

/// A place at the engines, until it is dropped.
#[derive(Debug)]
pub(crate) struct Turn {
    turns: Option<Turns>,
    tenant: Arc<str>,
}

impl std::fmt::Debug for Turns {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Turns")
    }
}

#[derive(Default)]
struct State {
    active: usize,
    waiting: usize,
    /// Those with anything here.
    tenants: HashMap<Arc<str>, Tenant>,
    next: u64,
    shown: Shown,
}

/// What the gauges hold of one queue. A gauge is the sum over all queues of the process, so a queue
/// adds differences to it and takes back its share when it is dropped.
#[derive(Default)]
struct Shown {
    active: usize,
    waiting: usize,
}

#[derive(Default)]
struct Tenant {
    active: usize,
    waiting: VecDeque<Waiter>,
}

struct Waiter {
    number: u64,
    kind: Kind,
    give: oneshot::Sender<Turn>,
}

impl Turns {
    pub(crate) fn new(config: TurnConfig) -> Turns {
        Turns(Arc::new(Shared { config, state: Mutex::default() }))
    }

    /// A place, at once or after a short wait.
    pub(crate) async fn take(&self, tenant: &str, kind: Kind) -> Result<Turn, Error> {
        let (number, turn) = match self.ask(tenant, kind) {
            Ok(asked) => asked,
            Err(error) => {
                refused("full");
                return Err(error);
            }
        };
        // Whoever leaves while waiting leaves the queue too.
        let _place = Place { turns: self, tenant, number };
        let until = Instant::now() + self.0.config.waiting_timeout_seconds;
        match timeout_at(until, turn).await {
            Ok(Ok(turn)) => Ok(turn),
            // Its sender was dropped: it gave way to a tenant with less.
            Ok(Err(_)) => {
                refused("full");
                Err(Error::Busy)
            }
            Err(_) => {
                refused("waited");
                Err(Error::Busy)
            }
        }
    }

    /// What engines are told of a tenant's generation.
    pub(crate) fn scheduling(&self, tenant: &str, kind: Kind) -> Scheduling {
        let config = &self.0.config;
        // Nobody else can choose a salt, so it need not be secret; but owners' names are theirs.
        let salt = || hex::encode(&Sha256::digest(format!("cache_salt of {tenant}"))[..16]);
        Scheduling {
            cache_salt: config.isolate_prefix_cache.then(salt),
            priority: config.completion_first.then_some(match kind {
                Kind::Completion => 0,
                Kind::Question => 1,
            }),
        }
    }

    fn ask(&self, tenant: &str, kind: Kind) -> Result<(u64, oneshot::Receiver<Turn>), Error> {
        let (give, turn) = oneshot::channel();
        let mut state = self.lock();
        if state.waiting >= self.0.config.max_waiting as usize && !self.has_room(&state, tenant) {
            state.give_way(tenant)?;
        }
        let number = state.next;
        state.next += 1;
        let waiter = Waiter { number, kind, give };
        let entry = state.tenants.entry(tenant.into()).or_default();
        entry.waiting.push_back(waiter);
        state.waiting += 1;
        self.grant(state);
        Ok((number, turn))
    }

    fn has_room(&self, state: &State, tenant: &str) -> bool {
        let own = state.tenants.get(tenant).map_or(0, |tenant| tenant.active);
        state.active < self.0.config.max_generations as usize && self.may_have_more(own)
    }

    fn may_have_more(&self, active: usize) -> bool {
        let most = self.0.config.max_generations_per_tenant as usize;
        most == 0 || active < most
    }

    /// Gives free places to those who wait, and what nobody took any more to the next.
    fn grant(&self, mut state: MutexGuard<'_, State>) {
        while state.active < self.0.config.max_generations as usize {
            let Some(tenant) = self.next(&state) else { break };
            let Some(waiter) = state.take(&tenant, self.0.config.completion_first) else { break };
            let turn = Turn { turns: Some(self.clone()), tenant: Arc::clone(&tenant) };
            state.gave(&tenant);
            if let Err(mut left) = waiter.give.send(turn) {
                // Dropped here it would wait for the lock that is held.
                left.turns = None;
                state.ended(&tenant);
            }
        }
        state.show();
    }

    /// Among those who wait and may have more: who has least, then who asked first.
    fn next(&self, state: &State) -> Option<Arc<str>> {
        let first = self.0.config.completion_first;
        let may = |(_, tenant): &(&Arc<str>, &Tenant)| {
            !tenant.waiting.is_empty() && self.may_have_more(tenant.active)
        };
        let rank = |(_, tenant): &(&Arc<str>, &Tenant)| {
            let waiter = tenant.best(first).and_then(|at| tenant.waiting.get(at));
            let later = first && waiter.is_some_and(|waiter| waiter.kind == Kind::Question);
            (later, tenant.active, waiter.map_or(u64::MAX, |waiter| waiter.number))
        };
        let tenants = state.tenants.iter().filter(may);
        tenants.min_by_key(rank).map(|(name, _)| Arc::clone(name))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// The queue is full: the newest of the tenant with most that wait gives way, unless that is who
    /// asks.
    fn give_way(&mut self, asking: &str) -> Result<(), Error> {
        let own = self.tenants.get(asking).map_or(0, |tenant| tenant.waiting.len());
        let longest = self.tenants.iter_mut().max_by_key(|(_, tenant)| tenant.waiting.len());
        match longest {
            Some((name, tenant)) if tenant.waiting.len() > own + 1 => {
                tenant.waiting.pop_back();
                let name = Arc::clone(name);
                self.waiting -= 1;
                self.forget(&name);
                Ok(())
            }
            _ => Err(Error::Busy),
        }
    }

    fn take(&mut self, tenant: &Arc<str>, completion_first: bool) -> Option<Waiter> {
        let tenant = self.tenants.get_mut(tenant)?;
        let waiter = tenant.waiting.remove(tenant.best(completion_first)?)?;
        self.waiting -= 1;
        Some(waiter)
    }

    fn gave(&mut self, tenant: &Arc<str>) {
        self.active += 1;
        if let Some(tenant) = self.tenants.get_mut(tenant) {
            tenant.active += 1;
        }
    }

    fn ended(&mut self, tenant: &Arc<str>) {
        self.active -= 1;
        if let Some(tenant) = self.tenants.get_mut(tenant) {
            tenant.active -= 1;
        }
        self.forget(tenant);
    }

    fn leave(&mut self, tenant: &str, number: u64) {
        let Some((name, entry)) = self.tenants.get_key_value(tenant) else { return };
        let Some(at) = entry.waiting.iter().position(|waiter| waiter.number == number) else {
            return;
        };
        let name = Arc::clone(name);
        if let Some(entry) = self.tenants.get_mut(&name) {
            entry.waiting.remove(at);
            self.waiting -= 1;
        }
        self.forget(&name);
        self.show();
    }

    fn forget(&mut self, tenant: &Arc<str>) {
        if self.tenants.get(tenant).is_some_and(|one| one.active == 0 && one.waiting.is_empty()) {
            self.tenants.remove(tenant);
        }
    }

    fn show(&mut self) {
        self.shown.set(self.active, self.waiting);
    }
}

impl Shown {
    #[expect(clippy::cast_precision_loss, reason = "counts of things at hand")]
    fn set(&mut self, active: usize, waiting: usize) {
        let difference = |to: usize, from: usize| to as f64 - from as f64;
        metrics::gauge!("hapa_generations_active").increment(difference(active, self.active));
        metrics::gauge!("hapa_generations_waiting").increment(difference(waiting, self.waiting));
        *self = Shown { active, waiting };
    }
}

impl Drop for State {
    fn drop(&mut self) {
        self.shown.set(0, 0);
    }
}

impl Tenant {
    /// Where its next stands: the first, or the first completion.
    fn best(&self, completion_first: bool) -> Option<usize> {
        let completion = |waiter: &Waiter| waiter.kind == Kind::Completion;
        let first = completion_first.then(|| self.waiting.iter().position(completion)).flatten();
        first.or((!self.waiting.is_empty()).then_some(0))
    }
}

/// Someone's place in the queue.
struct Place<'a> {
    turns: &'a Turns,
    tenant: &'a str,
    number: u64,
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.turns.lock().leave(self.tenant, self.number);
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let Some(turns) = self.turns.take() else { return };
        let mut state = turns.lock();
        state.ended(&self.tenant);
        turns.grant(state);
    }
}

fn refused(why: &'static str) {
    metrics::counter!("hapa_generations_refused_total", "why" => why).increment(1);
}

#[cfg(test)]
mod tests;

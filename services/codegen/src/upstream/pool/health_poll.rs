//! Background tasks: DNS lookups of the engines' names, and health probes of all endpoints. Every
//! probe has a timeout and a future of its own, so one hanging engine does not delay the others.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use hapa_core::service::ServiceSpec;
use tokio::time::{MissedTickBehavior, interval, sleep, timeout};

use super::EnginePool;
use super::discovery::{EngineSource, MAX_ENDPOINTS, unique_addresses};
use super::endpoint::Endpoint;

/// Between two probes of one endpoint.
const PROBE_INTERVAL: Duration = Duration::from_secs(1);
/// Between two lookups of the DNS names.
const DNS_INTERVAL: Duration = Duration::from_secs(3);
const DNS_TIMEOUT: Duration = Duration::from_secs(2);
/// Minimum time between two rebuilds of the snapshot, which are expensive with many models.
const REBUILD_INTERVAL: Duration = Duration::from_millis(100);

impl EnginePool {
    /// Spawns the probes and the DNS lookups, which run until the server ends.
    pub(crate) fn spawn_background_tasks(&self, spec: &mut ServiceSpec) {
        spec.spawn(self.clone().poll_health());
        if self.0.sources.iter().any(|source| source.is_dns) {
            spec.spawn(self.clone().poll_dns());
        }
    }

    /// Probes every endpoint periodically, from when it is added until it is removed.
    pub(super) async fn poll_health(self) {
        let mut polls = FuturesUnordered::new();
        let mut polled: Vec<Arc<Endpoint>> = Vec::new();
        let mut rebuild = interval(REBUILD_INTERVAL);
        rebuild.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            polled.retain(|endpoint| !endpoint.removed.is_cancelled());
            for endpoint in &self.snapshot().endpoints {
                if !polled.iter().any(|other| Arc::ptr_eq(other, endpoint)) {
                    polled.push(Arc::clone(endpoint));
                    polls.push(self.poll_endpoint(Arc::clone(endpoint)));
                }
            }
            tokio::select! {
                () = self.0.endpoints_added.notified() => {}
                Some(()) = polls.next() => {}
                _ = rebuild.tick() => {
                    if self.0.is_snapshot_stale.swap(false, Ordering::Relaxed) {
                        self.rebuild();
                    }
                }
            }
        }
    }

    async fn poll_endpoint(&self, endpoint: Arc<Endpoint>) {
        let probes = async {
            loop {
                if endpoint.probe(self.0.timeouts.stall).await {
                    self.0.is_snapshot_stale.store(true, Ordering::Relaxed);
                }
                sleep(PROBE_INTERVAL).await;
            }
        };
        tokio::select! {
            () = probes => {}
            () = endpoint.removed.cancelled() => {}
        }
    }

    async fn poll_dns(self) {
        loop {
            self.resolve_names(|source| tokio::net::lookup_host((source.host, source.port))).await;
            sleep(DNS_INTERVAL).await;
        }
    }

    /// Looks up all names once. If one lookup fails, all endpoints stay as they are.
    pub(super) async fn resolve_names<L, A>(&self, look_up: impl Fn(EngineSource) -> L)
    where
        L: Future<Output = io::Result<A>>,
        A: Iterator<Item = SocketAddr>,
    {
        let mut wanted = Vec::new();
        for source in &self.0.sources {
            if source.is_dns {
                let found = timeout(DNS_TIMEOUT, look_up(source.clone())).await;
                let Ok(Ok(found)) = found else {
                    tracing::warn!(
                        name = source.host,
                        "DNS lookup of the engines failed; keeping the known addresses"
                    );
                    self.0.names_resolved.cancel();
                    return;
                };
                let addresses = unique_addresses(found).into_iter();
                wanted.extend(addresses.map(|address| (source, Some(address))));
            } else {
                wanted.push((source, None));
            }
        }
        wanted.truncate(MAX_ENDPOINTS);
        let before = self.snapshot();
        let mut endpoints = Vec::with_capacity(wanted.len());
        for (source, address) in wanted {
            match self.reuse_or_create(&before.endpoints, source, address) {
                Ok(endpoint) => endpoints.push(endpoint),
                Err(error) => tracing::warn!(%error, "engine skipped: its client cannot be built"),
            }
        }
        if endpoints.iter().map(|new| new.id).ne(before.endpoints.iter().map(|old| old.id)) {
            self.replace_endpoints(endpoints);
        }
        self.0.names_resolved.cancel();
    }

    fn reuse_or_create(
        &self,
        before: &[Arc<Endpoint>],
        source: &EngineSource,
        address: Option<SocketAddr>,
    ) -> anyhow::Result<Arc<Endpoint>> {
        let name = source.endpoint_name(address);
        if let Some(existing) = before.iter().find(|endpoint| endpoint.name == name) {
            return Ok(Arc::clone(existing));
        }
        let engine = source.build_engine(address, &self.0.options)?;
        Ok(self.new_endpoint(name, engine))
    }
}

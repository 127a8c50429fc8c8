//! What goes on in the background: names are looked up, engines looked at. Every look has a bound and
//! a future of its own, so that an engine which hangs keeps none of the others from being seen.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use hapa_core::service::ServiceSpec;
use tokio::time::{MissedTickBehavior, interval, sleep, timeout};

use super::Fleet;
use super::replica::Replica;
use super::source::{MOST, Source, distinct};

/// Between two looks at an engine.
const LOOK: Duration = Duration::from_secs(1);
/// Between two look-ups of the names.
const RESOLVE: Duration = Duration::from_secs(3);
const RESOLVE_PATIENCE: Duration = Duration::from_secs(2);
/// What looks find is put on the board as often, at most: that takes long where there is much.
const PUBLISH: Duration = Duration::from_millis(100);

impl Fleet {
    /// Begins to watch, until the server ends.
    pub(crate) fn watch(&self, spec: &mut ServiceSpec) {
        spec.spawn(self.clone().look());
        if self.0.sources.iter().any(|source| source.by_name) {
            spec.spawn(self.clone().resolve());
        }
    }

    /// Looks at every engine that there is, from when it joins until it goes.
    pub(super) async fn look(self) {
        let mut looking = FuturesUnordered::new();
        let mut looked_at: Vec<Arc<Replica>> = Vec::new();
        let mut publish = interval(PUBLISH);
        publish.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            looked_at.retain(|replica| !replica.gone.is_cancelled());
            for replica in &self.known().replicas {
                if !looked_at.iter().any(|other| Arc::ptr_eq(other, replica)) {
                    looked_at.push(Arc::clone(replica));
                    looking.push(self.keep_looking(Arc::clone(replica)));
                }
            }
            tokio::select! {
                () = self.0.joined.notified() => {}
                Some(()) = looking.next() => {}
                _ = publish.tick() => {
                    if self.0.stale.swap(false, Ordering::Relaxed) {
                        self.publish();
                    }
                }
            }
        }
    }

    async fn keep_looking(&self, replica: Arc<Replica>) {
        let looks = async {
            loop {
                if replica.look(self.0.bounds.stuck).await {
                    self.0.stale.store(true, Ordering::Relaxed);
                }
                sleep(LOOK).await;
            }
        };
        tokio::select! {
            () = looks => {}
            () = replica.gone.cancelled() => {}
        }
    }

    async fn resolve(self) {
        loop {
            self.resolve_with(|source| tokio::net::lookup_host((source.host, source.port))).await;
            sleep(RESOLVE).await;
        }
    }

    /// Looks all names up once. One that can't be looked up keeps the engines that it had.
    pub(super) async fn resolve_with<L, A>(&self, look_up: impl Fn(Source) -> L)
    where
        L: Future<Output = io::Result<A>>,
        A: Iterator<Item = SocketAddr>,
    {
        let mut wanted = Vec::new();
        for source in &self.0.sources {
            if source.by_name {
                let found = timeout(RESOLVE_PATIENCE, look_up(source.clone())).await;
                let Ok(Ok(found)) = found else {
                    tracing::warn!(
                        name = source.host,
                        "the name of the engines can't be looked up"
                    );
                    self.0.resolved.cancel();
                    return;
                };
                wanted.extend(distinct(found).into_iter().map(|address| (source, Some(address))));
            } else {
                wanted.push((source, None));
            }
        }
        wanted.truncate(MOST);
        let before = self.known();
        let mut replicas = Vec::with_capacity(wanted.len());
        for (source, address) in wanted {
            match self.kept_or_new(&before.replicas, source, address) {
                Ok(replica) => replicas.push(replica),
                Err(error) => tracing::warn!(%error, "an engine can't be used"),
            }
        }
        if replicas.iter().map(|new| new.id).ne(before.replicas.iter().map(|old| old.id)) {
            self.set(replicas);
        }
        self.0.resolved.cancel();
    }

    fn kept_or_new(
        &self,
        before: &[Arc<Replica>],
        source: &Source,
        address: Option<SocketAddr>,
    ) -> anyhow::Result<Arc<Replica>> {
        let name = source.name(address);
        if let Some(kept) = before.iter().find(|replica| replica.name == name) {
            return Ok(Arc::clone(kept));
        }
        let engine = source.engine(address, &self.0.access)?;
        Ok(self.replica(name, engine))
    }
}

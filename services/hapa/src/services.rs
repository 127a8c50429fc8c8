//! Builds each service with its dependencies: its store, its peers, and handles of the server.

use std::sync::Arc;

use futures_util::FutureExt as _;
use hapa_core::config::CommonConfig;
use hapa_core::principal_cache::{PrincipalCacheHandle, PrincipalCacheStats};
use hapa_core::service::ServiceSpec;
use hapa_errors::OccurrenceRecorder;
use hapa_server::{Server, outbox};
use hapa_store::open::Stores;

const ANALYTICS: &str = "hapa.analytics.v1.AnalyticsService";

pub(crate) async fn auth(
    config: &hapa_auth::Config,
    common: &CommonConfig,
    server: &Server,
    stores: &mut Stores,
) -> anyhow::Result<ServiceSpec> {
    let data_dir = common.data_dir.clone();
    let dependencies = hapa_auth::Dependencies {
        common: common.clone(),
        store: stores.open(hapa_auth::STORE, hapa_auth::SERVICES).await?,
        shutdown: server.shutdown(),
        find_undelivered_events: async move { outbox::find_of_callers(&data_dir).await }.boxed(),
    };
    hapa_auth::service(config, dependencies).await
}

pub(crate) fn codegen(
    config: &hapa_codegen::Config,
    common: &CommonConfig,
    server: &Server,
) -> anyhow::Result<ServiceSpec> {
    let dependencies = hapa_codegen::Dependencies {
        common: common.clone(),
        auth: server.auth()?,
        shutdown: server.shutdown(),
        principals: principals(server),
    };
    hapa_codegen::service(config, dependencies)
}

/// A handle of the server's principal cache. The cache is empty until the server serves.
fn principals(server: &Server) -> PrincipalCacheHandle {
    let (cache, cleared) = (server.callers(), server.callers());
    let stats = move || {
        let cache = Arc::clone(&cache);
        async move {
            match cache.get() {
                Some(cache) => cache.stats().await,
                None => PrincipalCacheStats::default(),
            }
        }
        .boxed()
    };
    let clear = move || {
        let cache = Arc::clone(&cleared);
        async move {
            match cache.get() {
                Some(cache) => cache.forget().await,
                None => 0,
            }
        }
        .boxed()
    };
    PrincipalCacheHandle::new(stats, clear)
}

pub(crate) async fn analytics(
    config: &hapa_analytics::Config,
    server: &Server,
    stores: &mut Stores,
) -> anyhow::Result<ServiceSpec> {
    let dependencies = hapa_analytics::Dependencies {
        store: stores.open(hapa_analytics::STORE, hapa_analytics::SERVICES).await?,
        shutdown: server.shutdown(),
    };
    Ok(hapa_analytics::service(config, dependencies))
}

pub(crate) async fn errors(
    config: &hapa_errors::Config,
    server: &Server,
    stores: &mut Stores,
) -> anyhow::Result<ServiceSpec> {
    let address = server.config().analytics_address.as_deref();
    let outbox = server.spool();
    let record =
        move |occurrence: &_| Some(outbox.append(None, Some(occurrence))?.map(drop).boxed());
    let dependencies = hapa_errors::Dependencies {
        store: stores.open(hapa_errors::STORE, hapa_errors::SERVICES).await?,
        shutdown: server.shutdown(),
        analytics: server.wire("ANALYTICS_ADDRESS", address, ANALYTICS)?,
        recorder: OccurrenceRecorder(Arc::new(record)),
    };
    Ok(hapa_errors::service(config, dependencies))
}

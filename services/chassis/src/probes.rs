//! The HTTP port for machines that watch: /metrics, /livez, /readyz. No credential, so never routed
//! from outside.

use std::sync::Arc;

use axum::Router;
use axum::http::StatusCode;
use axum::routing::get;
use metrics_exporter_prometheus::PrometheusHandle;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::limit::Limiter;

/// Serves until `end`; not ready from `draining` on.
pub(crate) async fn serve(
    listener: TcpListener,
    metrics: &'static PrometheusHandle,
    limiter: Arc<Limiter>,
    draining: CancellationToken,
    end: CancellationToken,
) {
    let counting = Arc::clone(&limiter);
    let ready = move || async move {
        if draining.is_cancelled() {
            return (StatusCode::SERVICE_UNAVAILABLE, "draining\n".to_owned());
        }
        let degraded = limiter.degraded().map(|words| format!("{words}\n"));
        (StatusCode::OK, format!("ready\n{}", degraded.unwrap_or_default()))
    };
    let metrics = move || async move {
        counting.gauge();
        metrics.render()
    };
    let router = Router::new()
        .route("/livez", get(|| async { "alive\n" }))
        .route("/readyz", get(ready))
        .route("/metrics", get(metrics));
    let served = axum::serve(listener, router).with_graceful_shutdown(end.cancelled_owned()).await;
    if let Err(error) = served {
        tracing::error!(%error, "the metrics port failed");
    }
}

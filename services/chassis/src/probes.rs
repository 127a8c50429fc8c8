//! The HTTP port for machines that watch: /metrics, /livez, /readyz. No credential, so never routed
//! from outside.

use axum::Router;
use axum::http::StatusCode;
use axum::routing::get;
use metrics_exporter_prometheus::PrometheusHandle;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

/// Serves until `end`; not ready from `draining` on.
pub(crate) async fn serve(
    listener: TcpListener,
    metrics: &'static PrometheusHandle,
    draining: CancellationToken,
    end: CancellationToken,
) {
    let ready = move || async move {
        if draining.is_cancelled() {
            (StatusCode::SERVICE_UNAVAILABLE, "draining\n")
        } else {
            (StatusCode::OK, "ready\n")
        }
    };
    let router = Router::new()
        .route("/livez", get(|| async { "alive\n" }))
        .route("/readyz", get(ready))
        .route("/metrics", get(move || async move { metrics.render() }));
    let served = axum::serve(listener, router).with_graceful_shutdown(end.cancelled_owned()).await;
    if let Err(error) = served {
        tracing::error!(%error, "the metrics port failed");
    }
}

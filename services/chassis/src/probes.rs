//! The HTTP port for machines that watch: /metrics, /livez, /readyz. No credential, so never routed
//! from outside.

use std::sync::Arc;

use axum::Router;
use axum::http::StatusCode;
use axum::routing::get;
use metrics_exporter_prometheus::PrometheusHandle;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::health::Health;
use crate::limit::Limiter;
use crate::server::REDIS;

/// Serves until `end`; not ready from `draining` on.
pub(crate) async fn serve(
    listener: TcpListener,
    metrics: &'static PrometheusHandle,
    (limiter, health): (Arc<Limiter>, Health),
    draining: CancellationToken,
    end: CancellationToken,
) {
    let counting = Arc::clone(&limiter);
    let ready = move || async move {
        if draining.is_cancelled() {
            return (StatusCode::SERVICE_UNAVAILABLE, "draining\n".to_owned());
        }
        let problems = problems(&limiter, &health);
        if health.is_ready() {
            (StatusCode::OK, format!("ready\n{problems}"))
        } else {
            (StatusCode::SERVICE_UNAVAILABLE, format!("not ready\n{problems}"))
        }
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

/// A line for each thing that is away. The limiter knows of Redis what its last call found.
fn problems(limiter: &Limiter, health: &Health) -> String {
    let mut lines: Vec<_> = limiter.degraded().map(str::to_owned).into_iter().collect();
    for part in health.parts().into_iter().filter(|part| part.name != REDIS) {
        if let Err(why) = part.outcome {
            lines.push(format!("{}: {why}", part.problem));
        }
    }
    lines.into_iter().map(|line| line + "\n").collect()
}

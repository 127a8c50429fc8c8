//! The metrics of the process.

use std::sync::OnceLock;

use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle};

use crate::metrics_list;

static METRICS: OnceLock<Result<PrometheusHandle, String>> = OnceLock::new();

/// The process's metrics, which start to be kept with the first call.
pub fn metrics() -> anyhow::Result<&'static PrometheusHandle> {
    let kept = METRICS.get_or_init(|| start_metrics().map_err(|error| error.to_string()));
    kept.as_ref().map_err(|error| anyhow::anyhow!("metrics can't be kept: {error}"))
}

fn start_metrics() -> anyhow::Result<PrometheusHandle> {
    let recorder = metrics_list::buckets(PrometheusBuilder::new())?.build_recorder();
    let handle = recorder.handle();
    metrics::set_global_recorder(recorder)
        .map_err(|_| anyhow::anyhow!("something else keeps them"))?;
    metrics_list::describe();
    Ok(handle)
}

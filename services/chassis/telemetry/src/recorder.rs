//! The recorder of the process's metrics.

use std::sync::OnceLock;

use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle};

use crate::metrics_list;

static METRICS: OnceLock<Result<MetricsHandle, String>> = OnceLock::new();

/// A handle on the metrics of the process.
#[derive(Debug)]
pub struct MetricsHandle(PrometheusHandle);

impl MetricsHandle {
    /// The metrics in the text format of Prometheus. Renamed metrics appear under their old names too.
    pub fn render(&self) -> String {
        metrics_list::with_aliases(&self.0.render())
    }
}

/// The metrics of the process. The first call installs the recorder.
pub fn metrics() -> anyhow::Result<&'static MetricsHandle> {
    let handle = METRICS.get_or_init(|| start_metrics().map_err(|error| error.to_string()));
    handle.as_ref().map_err(|error| anyhow::anyhow!("no recorder of metrics: {error}"))
}

fn start_metrics() -> anyhow::Result<MetricsHandle> {
    let recorder = metrics_list::buckets(PrometheusBuilder::new())?.build_recorder();
    let handle = MetricsHandle(recorder.handle());
    metrics::set_global_recorder(recorder)
        .map_err(|_| anyhow::anyhow!("another recorder is installed"))?;
    metrics_list::describe();
    Ok(handle)
}

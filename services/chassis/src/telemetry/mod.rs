//! What an operator sees: log lines and metrics. Neither ever holds a key, a prompt or an answer.

mod file;
mod known;

use std::io::IsTerminal as _;
use std::sync::{Mutex, OnceLock};

use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::fmt::format::FmtSpan;

use crate::config::{LogConfig, Wrong};
use file::LogFile;

pub use known::{KNOWN, Kind, Known};

static METRICS: OnceLock<Result<PrometheusHandle, String>> = OnceLock::new();

/// Starts logging, to LOG_FILE or to standard error. A second call in one process keeps the first's
/// settings.
pub fn start_logging(config: &LogConfig) -> Result<(), Wrong> {
    let path = config.log_file.as_deref().filter(|path| !path.as_os_str().is_empty());
    let Some(path) = path else {
        return start(config, std::io::stderr, std::io::stderr().is_terminal());
    };
    let file = LogFile::open(path, config.log_max_size, config.log_file_rotation);
    let problem = |error| format!("{} can't be written to: {error}", path.display());
    start(config, Mutex::new(file.map_err(|error| Wrong::new("LOG_FILE", problem(error)))?), false)
}

fn start<W>(config: &LogConfig, writer: W, is_terminal: bool) -> Result<(), Wrong>
where
    W: for<'w> MakeWriter<'w> + Send + Sync + 'static,
{
    // Libraries below warnings only on request: their names stand behind ours in the filter.
    let directives = format!(
        "fred=error,h2=warn,hyper=warn,reqwest=warn,sqlx=warn,tower=warn,{}",
        config.log_level
    );
    let filter = EnvFilter::builder().parse(directives);
    let filter = filter.map_err(|error| Wrong::new("LOG_LEVEL", error.to_string()))?;
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_span_events(FmtSpan::NONE)
        .with_ansi(is_terminal)
        .with_writer(writer);
    // Fails only where logging has started already, as in tests with many servers.
    let _ =
        if config.structured_logging { log.json().try_init() } else { log.compact().try_init() };
    Ok(())
}

/// The process's metrics, which start to be kept with the first call.
pub(crate) fn metrics() -> anyhow::Result<&'static PrometheusHandle> {
    let kept = METRICS.get_or_init(|| start_metrics().map_err(|error| error.to_string()));
    kept.as_ref().map_err(|error| anyhow::anyhow!("metrics can't be kept: {error}"))
}

fn start_metrics() -> anyhow::Result<PrometheusHandle> {
    let recorder = known::buckets(PrometheusBuilder::new())?.build_recorder();
    let handle = recorder.handle();
    metrics::set_global_recorder(recorder)
        .map_err(|_| anyhow::anyhow!("something else keeps them"))?;
    known::describe();
    Ok(handle)
}

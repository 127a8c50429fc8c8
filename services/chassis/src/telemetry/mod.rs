//! What an operator sees: log lines, metrics, and spans at a collector. None ever holds a key, a prompt
//! or an answer.

mod fields;
mod file;
mod known;
mod lag;
mod writer;

use std::io::IsTerminal as _;
use std::sync::OnceLock;

use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle};
use tracing::Dispatch;
use tracing_subscriber::filter::FilterExt as _;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, Layer, Registry, fmt};

use crate::config::{LogConfig, TraceConfig, Wrong};
use crate::panics;
use crate::trace::{self, Exporter};
use fields::{Compact, Json};
use file::LogFile;
pub(crate) use writer::LogWriter;
use writer::Place;

pub use known::{KNOWN, Kind, Known};
pub(crate) use lag::watch as watch_lag;
pub use writer::Log;

static METRICS: OnceLock<Result<PrometheusHandle, String>> = OnceLock::new();

/// Starts logging, to LOG_FILE or to standard error, panics included, and spans, where they are collected: a
/// server must send them. A second call in one process keeps the first's settings.
pub fn start(log: &LogConfig, trace: &TraceConfig) -> Result<(Log, Option<Exporter>), Wrong> {
    let (dispatch, exporter, log) = build(log, trace)?;
    // Fails only where it was started already.
    let _ = dispatch.try_init();
    panics::log_panics(log.writer.clone());
    Ok((log, exporter))
}

/// The same without panics, in force only where the caller puts it.
pub fn prepare(
    log: &LogConfig,
    trace: &TraceConfig,
) -> Result<(Dispatch, Option<Exporter>), Wrong> {
    build(log, trace).map(|(dispatch, exporter, _)| (dispatch, exporter))
}

fn build(log: &LogConfig, trace: &TraceConfig) -> Result<(Dispatch, Option<Exporter>, Log), Wrong> {
    let level = level(log)?;
    let output = open(log)?;
    let lines = lines(log, &output);
    let Some((tracer, exporter)) = trace::collect(trace)? else {
        let subscriber = tracing_subscriber::registry().with(lines).with(level);
        return Ok((subscriber.into(), None, output));
    };
    // A level is one of lines: it must not decide what is traced.
    let lines = lines.with_filter(level.and(trace::loggable()));
    let subscriber = tracing_subscriber::registry().with(lines).with(trace::layer(tracer));
    Ok((subscriber.into(), Some(exporter), output))
}

fn open(log: &LogConfig) -> Result<Log, Wrong> {
    let path = log.log_file.as_deref().filter(|path| !path.as_os_str().is_empty());
    let Some(path) = path else {
        let writer = LogWriter::start(std::io::stderr());
        let writer = writer.map_err(|error| Wrong::new("LOG_FILE", error.to_string()))?;
        let is_terminal = std::io::stderr().is_terminal();
        let place = if is_terminal { Place::Terminal } else { Place::Stderr };
        return Ok(Log { writer, place });
    };
    let file = LogFile::open(path, log.log_max_size, log.log_file_rotation);
    let writer = file.and_then(LogWriter::start).map_err(|error| {
        Wrong::new("LOG_FILE", format!("{} can't be written to: {error}", path.display()))
    })?;
    Ok(Log { writer, place: Place::File })
}

fn lines(log: &LogConfig, output: &Log) -> Box<dyn Layer<Registry> + Send + Sync> {
    let lines = fmt::layer()
        .with_ansi(output.is_terminal())
        // It would print to standard error, which may block.
        .log_internal_errors(false)
        .with_writer(output.writer.clone());
    if log.structured_logging {
        lines.json().fmt_fields(Json::default()).boxed()
    } else {
        lines.compact().fmt_fields(Compact).boxed()
    }
}

fn level(log: &LogConfig) -> Result<EnvFilter, Wrong> {
    // Libraries below warnings only on request: their names stand behind ours in the filter.
    let directives = format!(
        "fred=error,h2=warn,hyper=warn,reqwest=warn,sqlx=warn,tower=warn,{}",
        log.log_level
    );
    let filter = EnvFilter::builder().parse(directives);
    filter.map_err(|error| Wrong::new("LOG_LEVEL", error.to_string()))
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

//! Setup of logging and of the spans' layer. Log lines never contain a key, a prompt or an answer.

mod fields;
mod file;
mod writer;

use std::io::IsTerminal as _;

use fields::{JsonFormat, TextFormat};
use file::LogFile;
use hapa_core::config::ConfigError;
use opentelemetry_sdk::trace::SdkTracer;
use tracing::Dispatch;
use tracing_subscriber::filter::{FilterExt as _, Targets};
use tracing_subscriber::layer::{Filter, Layered, SubscriberExt as _};
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, Layer, Registry, fmt};

use crate::config::LogConfig;
use crate::{panics, trace};
use writer::Destination;

pub use writer::Log;
pub(crate) use writer::LogWriter;

/// Starts logging to LOG_FILE or standard error, including panics. `tracer` receives the spans. A second call in one
/// process keeps the settings of the first.
pub fn start(log: &LogConfig, tracer: Option<SdkTracer>) -> Result<Log, ConfigError> {
    let (dispatch, log) = build(log, tracer)?;
    // Fails only if logging has been started before.
    let _ = dispatch.try_init();
    panics::log_panics(log.writer.clone());
    Ok(log)
}

/// The dispatcher that [`start`] would install. Panics are not logged.
pub fn prepare(log: &LogConfig, tracer: Option<SdkTracer>) -> Result<Dispatch, ConfigError> {
    build(log, tracer).map(|(dispatch, _)| dispatch)
}

fn build(log: &LogConfig, tracer: Option<SdkTracer>) -> Result<(Dispatch, Log), ConfigError> {
    // Libraries log warnings only. LOG_LEVEL comes last, so it can override these levels.
    let directives = format!(
        "fred=error,h2=warn,hyper=warn,reqwest=warn,sqlx=warn,tower=warn,{}",
        log.log_level
    );
    let invalid = |problem: String| ConfigError::new("LOG_LEVEL", problem);
    let output = open(log)?;
    let lines = line_layer(log, &output);
    // Only this filter supports directives for spans. It costs more, because it examines every span.
    let dispatch = if directives.contains('[') {
        let level = EnvFilter::builder().parse(directives);
        subscriber(lines, level.map_err(|error| invalid(error.to_string()))?, tracer)
    } else {
        let level = directives.parse::<Targets>();
        subscriber(lines, level.map_err(|error| invalid(error.to_string()))?, tracer)
    };
    Ok((dispatch, output))
}

fn subscriber<F>(lines: LineLayer, level: F, tracer: Option<SdkTracer>) -> Dispatch
where
    F: Filter<Registry> + Layer<Layered<LineLayer, Registry>> + Send + Sync,
{
    let Some(tracer) = tracer else {
        return tracing_subscriber::registry().with(lines).with(level).into();
    };
    // The log level must not affect traces, so it filters only the layer of log lines.
    let lines = lines.with_filter(level.and(trace::log_filter()));
    tracing_subscriber::registry().with(lines).with(trace::layer(tracer)).into()
}

fn open(log: &LogConfig) -> Result<Log, ConfigError> {
    let path = log.log_file.as_deref().filter(|path| !path.as_os_str().is_empty());
    let Some(path) = path else {
        let writer = LogWriter::start(std::io::stderr());
        let writer = writer.map_err(|error| ConfigError::new("LOG_FILE", error.to_string()))?;
        let is_terminal = std::io::stderr().is_terminal();
        let destination = if is_terminal { Destination::Terminal } else { Destination::Stderr };
        return Ok(Log { writer, destination });
    };
    let file = LogFile::open(path, log.log_max_size, log.log_file_rotation);
    let writer = file.and_then(LogWriter::start).map_err(|error| {
        ConfigError::new("LOG_FILE", format!("{} can't be written to: {error}", path.display()))
    })?;
    Ok(Log { writer, destination: Destination::File })
}

type LineLayer = Box<dyn Layer<Registry> + Send + Sync>;

fn line_layer(log: &LogConfig, output: &Log) -> LineLayer {
    let lines = fmt::layer()
        .with_ansi(output.is_terminal())
        // Internal errors would go to standard error, which may block.
        .log_internal_errors(false)
        .with_writer(output.writer.clone());
    if log.structured_logging {
        lines.json().fmt_fields(JsonFormat::default()).boxed()
    } else {
        lines.compact().fmt_fields(TextFormat).boxed()
    }
}

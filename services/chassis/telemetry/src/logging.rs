//! What an operator sees: log lines, metrics, and spans at a collector. None ever holds a key, a prompt
//! or an answer.

mod fields;
mod file;
mod writer;

use std::io::IsTerminal as _;

use fields::{Compact, Json};
use file::LogFile;
use hapa_core::config::Wrong;
use opentelemetry_sdk::trace::SdkTracer;
use tracing::Dispatch;
use tracing_subscriber::filter::FilterExt as _;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, Layer, Registry, fmt};

use crate::config::LogConfig;
use crate::{panics, trace};
pub use writer::LogWriter;
use writer::Place;

pub use writer::Log;

/// Starts logging, to LOG_FILE or to standard error, panics included; `tracer` receives the spans. A second call
/// in one process keeps the settings of the first.
pub fn start(log: &LogConfig, tracer: Option<SdkTracer>) -> Result<Log, Wrong> {
    let (dispatch, log) = build(log, tracer)?;
    // Fails only where it was started already.
    let _ = dispatch.try_init();
    panics::log_panics(log.writer.clone());
    Ok(log)
}

/// The same without panics, in force only where the caller installs it.
pub fn prepare(log: &LogConfig, tracer: Option<SdkTracer>) -> Result<Dispatch, Wrong> {
    build(log, tracer).map(|(dispatch, _)| dispatch)
}

fn build(log: &LogConfig, tracer: Option<SdkTracer>) -> Result<(Dispatch, Log), Wrong> {
    let level = level(log)?;
    let output = open(log)?;
    let lines = lines(log, &output);
    let Some(tracer) = tracer else {
        let subscriber = tracing_subscriber::registry().with(lines).with(level);
        return Ok((subscriber.into(), output));
    };
    // A level is one of lines: it must not decide what is traced.
    let lines = lines.with_filter(level.and(trace::loggable()));
    let subscriber = tracing_subscriber::registry().with(lines).with(trace::layer(tracer));
    Ok((subscriber.into(), output))
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

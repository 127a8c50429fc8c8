//! What an operator sees: log lines and metrics. Neither ever holds a key, a prompt or an answer.

use std::io::IsTerminal as _;
use std::sync::OnceLock;

use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::FmtSpan;

use crate::config::{LogConfig, Wrong};

static METRICS: OnceLock<Result<PrometheusHandle, String>> = OnceLock::new();

/// Seconds; from a cached answer to a long generation.
const DURATIONS: &[f64] = &[
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0,
];

/// Starts logging to standard error. A second call in one process keeps the first's settings.
pub fn start_logging(config: &LogConfig) -> Result<(), Wrong> {
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
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr);
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
    let recorder = PrometheusBuilder::new()
        .set_buckets_for_metric(Matcher::Suffix("seconds".to_owned()), DURATIONS)?
        .build_recorder();
    let handle = recorder.handle();
    metrics::set_global_recorder(recorder)
        .map_err(|_| anyhow::anyhow!("something else keeps them"))?;
    describe();
    Ok(handle)
}

fn describe() {
    metrics::describe_counter!("hapa_requests_total", "Calls that ended, by RPC and gRPC code");
    metrics::describe_histogram!("hapa_request_duration_seconds", "From arrival to the last byte");
    metrics::describe_gauge!("hapa_requests_in_flight", "Calls in progress");
    metrics::describe_counter!("hapa_errors_total", "Calls that failed, by RPC and published code");
    metrics::describe_counter!("hapa_ai_tokens_used_total", "Tokens as the engine counted them");
    metrics::describe_counter!(
        "hapa_limiter_fallbacks_total",
        "Limits decided by this process because Redis did not answer"
    );
    metrics::describe_gauge!("hapa_engine_up", "1 while an engine answers and gets on");
    metrics::describe_gauge!("hapa_engine_requests_in_flight", "Calls that an engine answers");
    metrics::describe_gauge!(
        "hapa_engine_breaker_state",
        "0 closed, 1 half-open: one call tries it, 2 open: none is sent"
    );
    metrics::describe_counter!(
        "hapa_engine_attempts_total",
        "Requests to engines until their first token, by how that went"
    );
    metrics::describe_counter!(
        "hapa_engine_retries_total",
        "Attempts that failed before the first token, by what came of asking again"
    );
    metrics::describe_gauge!("hapa_redis_up", "1 while Redis answers, 0 while it does not");
    metrics::describe_counter!(
        "hapa_spool_dropped_total",
        "Events that were given up before they were delivered, by kind and reason"
    );
    metrics::describe_counter!("hapa_spool_shipped_total", "Events that were delivered, by kind");
    metrics::describe_gauge!("hapa_spool_depth", "Events that wait to be delivered, by kind");
    metrics::describe_gauge!("hapa_spool_age_seconds", "Age of the oldest event that waits");
    metrics::describe_histogram!(
        "gen_ai_server_time_to_first_token_seconds",
        "From a generation's arrival to its first token"
    );
}

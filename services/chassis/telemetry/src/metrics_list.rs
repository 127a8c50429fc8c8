//! All metrics: their types, units, labels and descriptions. A policy test compares this list with docs/metrics.md and
//! with the metrics that the source code records.

use metrics::Unit;
use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder};

/// The type of a metric.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum MetricKind {
    /// A value that only rises.
    Counter,
    /// A value that rises and falls.
    Gauge,
    /// A distribution over these bucket bounds.
    Histogram(&'static [f64]),
}

/// The description of a metric.
#[derive(Clone, Copy, Debug)]
pub struct MetricSpec {
    /// The name at /metrics.
    pub name: &'static str,
    /// The type.
    pub kind: MetricKind,
    /// The unit of its values; `None` for a state.
    pub unit: Option<Unit>,
    /// Names of the labels, whose values come from short lists.
    pub labels: &'static [&'static str],
    /// The help text.
    pub help: &'static str,
    /// Old names, under which /metrics serves the metric too for one release.
    pub aliases: &'static [&'static str],
}

/// Durations in seconds, from a cached answer to a long generation.
const DURATION_BUCKETS: &[f64] = &[
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0,
];
/// Delays in seconds that the mesh adds.
const OVERHEAD_BUCKETS: &[f64] =
    &[0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0];
/// Seconds between tokens, as the semantic conventions recommend.
const TOKEN_INTERVAL_BUCKETS: &[f64] =
    &[0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5];
/// Token counts, as the semantic conventions recommend, up to the context length of large models.
const TOKEN_COUNT_BUCKETS: &[f64] =
    &[1.0, 4.0, 16.0, 64.0, 256.0, 1_024.0, 4_096.0, 16_384.0, 65_536.0, 262_144.0, 1_048_576.0];

const fn metric(
    name: &'static str,
    kind: MetricKind,
    unit: Option<Unit>,
    labels: &'static [&'static str],
    help: &'static str,
) -> MetricSpec {
    MetricSpec { name, kind, unit, labels, help, aliases: &[] }
}

impl MetricSpec {
    const fn renamed_from(self, aliases: &'static [&'static str]) -> MetricSpec {
        MetricSpec { aliases, ..self }
    }
}

const COUNT: Option<Unit> = Some(Unit::Count);
const SECONDS: Option<Unit> = Some(Unit::Seconds);

/// All metrics, sorted by name.
#[rustfmt::skip]
pub const METRICS: &[MetricSpec] = &[
    metric("gen_ai_client_token_usage", MetricKind::Histogram(TOKEN_COUNT_BUCKETS), COUNT, &["gen_ai_token_type", "gen_ai_operation_name"],
        "Tokens of a prompt (input) and of its answer (output), as reported by the engine"),
    metric("gen_ai_server_time_per_output_token_seconds", MetricKind::Histogram(TOKEN_INTERVAL_BUCKETS), SECONDS, &[],
        "Mean time between two tokens of an answer, after the first"),
    metric("gen_ai_server_time_to_first_token_seconds", MetricKind::Histogram(DURATION_BUCKETS), SECONDS, &[],
        "Time from the arrival of a generation to its first token, of reasoning or of the answer"),
    metric("hapa_ai_tokens_used_total", MetricKind::Counter, COUNT, &["type"],
        "Tokens as reported by the engine, by type: input, output, reasoning (a part of output)"),
    metric("hapa_cache_errors_total", MetricKind::Counter, COUNT, &[],
        "Failed reads and writes of the shared cache"),
    metric("hapa_cache_hits_total", MetricKind::Counter, COUNT, &["cache"],
        "Cache hits, by cache: code_generation, completion, user_profiles"),
    metric("hapa_cache_misses_total", MetricKind::Counter, COUNT, &["cache"],
        "Cache misses, by cache"),
    metric("hapa_certificate_expiry_seconds", MetricKind::Gauge, SECONDS, &[],
        "Time until this process's certificate expires"),
    metric("hapa_completions_superseded_total", MetricKind::Counter, COUNT, &[],
        "Completions that ended because of a newer request of their session"),
    metric("hapa_connections_refused_total", MetricKind::Counter, COUNT, &[],
        "Connections closed at once because their address has the maximum number of connections"),
    metric("hapa_engine_attempts_total", MetricKind::Counter, COUNT, &["engine", "outcome"],
        "Requests to engines until the first token, by outcome"),
    metric("hapa_engine_breaker_state", MetricKind::Gauge, None, &["engine"],
        "State of the circuit breaker: 0 closed, 1 half-open (one trial call), 2 open (no calls)"),
    metric("hapa_engine_oddities_total", MetricKind::Counter, COUNT, &["kind"],
        "Parts of engines' response streams that were skipped or repaired, by kind"),
    metric("hapa_engine_requests_in_flight", MetricKind::Gauge, COUNT, &["engine"],
        "Requests in progress at an engine"),
    metric("hapa_engine_retries_total", MetricKind::Counter, COUNT, &["outcome"],
        "Attempts that failed before the first token, by outcome of the retry"),
    metric("hapa_engine_up", MetricKind::Gauge, None, &["engine"],
        "1 while an engine answers and makes progress, otherwise 0"),
    metric("hapa_errors_total", MetricKind::Counter, COUNT, &["rpc", "error_code"],
        "Failed calls, by RPC and published code"),
    metric("hapa_generations_active", MetricKind::Gauge, COUNT, &[],
        "Generations with an engine slot"),
    metric("hapa_generations_refused_total", MetricKind::Counter, COUNT, &["why"],
        "Generations rejected without an engine slot: the queue was full, or the wait too long"),
    metric("hapa_generations_waiting", MetricKind::Gauge, COUNT, &[],
        "Generations that wait for an engine slot"),
    metric("hapa_handshakes_refused_total", MetricKind::Counter, COUNT, &[],
        "Connections without a valid certificate"),
    metric("hapa_idempotent_requests_total", MetricKind::Counter, COUNT, &["rpc", "outcome"],
        "Requests with an idempotency key that was used before, by outcome: replayed, conflict, unreadable"),
    metric("hapa_inter_token_added_seconds", MetricKind::Histogram(OVERHEAD_BUCKETS), SECONDS, &["rpc"],
        "Per call, the maximum delay added between receiving a token from the engine and writing it to the client connection"),
    metric("hapa_ledger_gap_tokens", MetricKind::Gauge, COUNT, &[],
        "Tokens that were used, or reported by an engine, and are not booked: briefly while in transit, permanently if lost or in excess"),
    metric("hapa_ledger_tokens_total", MetricKind::Counter, COUNT, &["outcome"],
        "Tokens of generations: booked by auth, lost because auth was unavailable for too long, or reported by an engine in excess of the reservation"),
    metric("hapa_limiter_fallbacks_total", MetricKind::Counter, COUNT, &[],
        "Rate limit decisions of this process alone because Redis did not answer"),
    metric("hapa_log_lines_dropped_total", MetricKind::Counter, COUNT, &[],
        "Dropped log lines: the queue was full, or the write failed"),
    metric("hapa_outbox_age_seconds", MetricKind::Gauge, SECONDS, &[],
        "Age of the oldest event in the outbox")
        .renamed_from(&["hapa_spool_age_seconds"]),
    metric("hapa_outbox_depth", MetricKind::Gauge, COUNT, &["kind"],
        "Events in the outbox, by kind")
        .renamed_from(&["hapa_spool_depth"]),
    metric("hapa_outbox_dropped_total", MetricKind::Counter, COUNT, &["kind", "reason"],
        "Events dropped from the outbox before delivery, by kind and reason")
        .renamed_from(&["hapa_spool_dropped_total"]),
    metric("hapa_outbox_relayed_total", MetricKind::Counter, COUNT, &["kind"],
        "Delivered events, by kind")
        .renamed_from(&["hapa_spool_shipped_total"]),
    metric("hapa_overhead_seconds", MetricKind::Histogram(OVERHEAD_BUCKETS), SECONDS, &["rpc"],
        "Duration of a call without its wait for an engine slot and without the engine's time"),
    metric("hapa_redis_up", MetricKind::Gauge, None, &[],
        "1 while Redis answers, otherwise 0"),
    metric("hapa_request_duration_seconds", MetricKind::Histogram(DURATION_BUCKETS), SECONDS, &["rpc"],
        "Time from the arrival of a call to its last byte"),
    metric("hapa_requests_in_flight", MetricKind::Gauge, COUNT, &["rpc"],
        "Calls in progress"),
    metric("hapa_requests_total", MetricKind::Counter, COUNT, &["rpc", "code"],
        "Completed calls, by RPC and gRPC code"),
    metric("hapa_revocation_link_up", MetricKind::Gauge, None, &[],
        "1 while this process receives revocations of keys and sessions from auth, otherwise 0"),
    metric("hapa_runtime_lag_seconds", MetricKind::Histogram(OVERHEAD_BUCKETS), SECONDS, &[],
        "Delay of a timer that fires once per second: a sign of a lack of processor time"),
    metric("hapa_spans_dropped_total", MetricKind::Counter, COUNT, &["reason"],
        "Dropped spans: the queue was full, or the collector rejected them"),
    metric("hapa_time_to_first_answer_token_seconds", MetricKind::Histogram(DURATION_BUCKETS), SECONDS, &[],
        "Time from the arrival of a generation to the first token of its answer, after any reasoning"),
    metric("hapa_token_settlements_dropped_total", MetricKind::Counter, COUNT, &[],
        "Generations whose tokens were not booked"),
];

/// Sets the buckets of every histogram.
pub(crate) fn buckets(builder: PrometheusBuilder) -> Result<PrometheusBuilder, BuildError> {
    METRICS.iter().try_fold(builder, |builder, metric| match metric.kind {
        MetricKind::Histogram(buckets) => {
            builder.set_buckets_for_metric(Matcher::Full(metric.name.to_owned()), buckets)
        }
        MetricKind::Counter | MetricKind::Gauge => Ok(builder),
    })
}

/// Describes all metrics to the recorder, which serves the help texts.
pub(crate) fn describe() {
    for MetricSpec { name, kind, unit, labels, help, .. } in METRICS {
        let unit = unit.unwrap_or(Unit::Count);
        match kind {
            MetricKind::Counter => {
                metrics::describe_counter!(*name, unit, *help);
                // Registered at start-up, so that the first increment is visible as a change.
                if labels.is_empty() {
                    metrics::counter!(*name).increment(0);
                }
            }
            MetricKind::Gauge => metrics::describe_gauge!(*name, unit, *help),
            MetricKind::Histogram(_) => metrics::describe_histogram!(*name, unit, *help),
        }
    }
}

/// Appends the metrics with aliases under their old names to a page in the text format of Prometheus.
pub(crate) fn with_aliases(page: &str) -> String {
    let mut extended = page.to_owned();
    for metric in METRICS {
        for alias in metric.aliases {
            for line in page.lines().filter_map(|line| renamed_line(line, metric.name, alias)) {
                extended.push_str(&line);
                extended.push('\n');
            }
        }
    }
    extended
}

/// A line about the metric `name`, with its alias; `None` for other lines.
fn renamed_line(line: &str, name: &str, alias: &str) -> Option<String> {
    let sample = line.strip_prefix("# HELP ").or_else(|| line.strip_prefix("# TYPE "));
    let rest = sample.unwrap_or(line).strip_prefix(name)?;
    if line.starts_with("# HELP ") {
        return rest.starts_with(' ').then(|| format!("# HELP {alias} Deprecated: use {name}"));
    }
    rest.starts_with(['{', ' ']).then(|| line.replacen(name, alias, 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_renamed_metric_is_served_under_its_old_name_too() {
        let page = "# HELP hapa_outbox_depth Events\n# TYPE hapa_outbox_depth gauge\n\
                    hapa_outbox_depth{kind=\"usage\"} 3\n\nhapa_outbox_depths 1\nhapa_redis_up 1\n";
        let aliases = "# HELP hapa_spool_depth Deprecated: use hapa_outbox_depth\n\
                       # TYPE hapa_spool_depth gauge\nhapa_spool_depth{kind=\"usage\"} 3\n";
        assert_eq!(with_aliases(page), format!("{page}{aliases}"));
    }
}

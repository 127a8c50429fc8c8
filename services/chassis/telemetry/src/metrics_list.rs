//! Every metric of the mesh: its kind, its unit, its labels and what it counts. docs/metrics.md says the
//! same, and a house test sees to it that no source counts what is not listed here.

use metrics::Unit;
use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder};

/// What a metric does.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Kind {
    /// Grows.
    Counter,
    /// Goes up and down.
    Gauge,
    /// Sorts what it is told into these buckets.
    Histogram(&'static [f64]),
}

/// One metric.
#[derive(Clone, Copy, Debug)]
pub struct Known {
    /// As it is scraped.
    pub name: &'static str,
    /// What it does.
    pub kind: Kind,
    /// Of its values; none where they are states.
    pub unit: Option<Unit>,
    /// Whose texts are from short lists.
    pub labels: &'static [&'static str],
    /// What it counts.
    pub help: &'static str,
}

/// Seconds; from a cached answer to a long generation.
const DURATIONS: &[f64] = &[
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0,
];
/// Seconds; what we add ourselves.
const OVERHEADS: &[f64] =
    &[0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0];
/// Seconds between tokens, as the semantic conventions advise.
const BETWEEN: &[f64] = &[0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5];
/// Tokens, as the semantic conventions advise, up to what a model can take.
const TOKENS: &[f64] =
    &[1.0, 4.0, 16.0, 64.0, 256.0, 1_024.0, 4_096.0, 16_384.0, 65_536.0, 262_144.0, 1_048_576.0];

const fn known(
    name: &'static str,
    kind: Kind,
    unit: Option<Unit>,
    labels: &'static [&'static str],
    help: &'static str,
) -> Known {
    Known { name, kind, unit, labels, help }
}

const COUNT: Option<Unit> = Some(Unit::Count);
const SECONDS: Option<Unit> = Some(Unit::Seconds);

/// All of them, by name.
#[rustfmt::skip]
pub const KNOWN: &[Known] = &[
    known("gen_ai_client_token_usage", Kind::Histogram(TOKENS), COUNT, &["gen_ai_token_type", "gen_ai_operation_name"],
        "Tokens of a prompt (input) and of its answer (output), as the engine counted them"),
    known("gen_ai_server_time_per_output_token_seconds", Kind::Histogram(BETWEEN), SECONDS, &[],
        "Between two tokens of an answer, on average, after the first"),
    known("gen_ai_server_time_to_first_token_seconds", Kind::Histogram(DURATIONS), SECONDS, &[],
        "From a generation's arrival to its first token"),
    known("hapa_ai_tokens_used_total", Kind::Counter, COUNT, &["type"],
        "Tokens as the engine counted them"),
    known("hapa_cache_errors_total", Kind::Counter, COUNT, &[],
        "Answers that could not be read from or kept in the shared cache"),
    known("hapa_cache_hits_total", Kind::Counter, COUNT, &["cache"],
        "What a cache knew, by cache: code_generation, completion, user_profiles"),
    known("hapa_cache_misses_total", Kind::Counter, COUNT, &["cache"],
        "What a cache did not know, by cache"),
    known("hapa_certificate_expiry_seconds", Kind::Gauge, SECONDS, &[],
        "Until this process's certificate ends"),
    known("hapa_completions_superseded_total", Kind::Counter, COUNT, &[],
        "Completions that a newer request of their session ended"),
    known("hapa_connections_refused_total", Kind::Counter, COUNT, &[],
        "Connections closed at once because their address holds as many as it may"),
    known("hapa_engine_attempts_total", Kind::Counter, COUNT, &["engine", "outcome"],
        "Requests to engines until their first token, by how that went"),
    known("hapa_engine_breaker_state", Kind::Gauge, None, &["engine"],
        "0 closed, 1 half-open: one call tries it, 2 open: none is sent"),
    known("hapa_engine_requests_in_flight", Kind::Gauge, COUNT, &["engine"],
        "Calls that an engine answers"),
    known("hapa_engine_retries_total", Kind::Counter, COUNT, &["outcome"],
        "Attempts that failed before the first token, by what came of asking again"),
    known("hapa_engine_up", Kind::Gauge, None, &["engine"],
        "1 while an engine answers and gets on"),
    known("hapa_errors_total", Kind::Counter, COUNT, &["rpc", "error_code"],
        "Calls that failed, by RPC and published code"),
    known("hapa_generations_active", Kind::Gauge, COUNT, &[],
        "Generations that have a place at the engines"),
    known("hapa_generations_refused_total", Kind::Counter, COUNT, &["why"],
        "Generations that got no place at the engines: the queue was full, or they waited too long"),
    known("hapa_generations_waiting", Kind::Gauge, COUNT, &[],
        "Generations that wait for a place at the engines"),
    known("hapa_handshakes_refused_total", Kind::Counter, COUNT, &[],
        "Connections without a good certificate"),
    known("hapa_idempotent_requests_total", Kind::Counter, COUNT, &["rpc", "outcome"],
        "Requests under an idempotency key that was used before, by outcome: replayed, conflict, unreadable"),
    known("hapa_inter_token_added_seconds", Kind::Histogram(OVERHEADS), SECONDS, &["rpc"],
        "The longest, of each call, from an engine's words to the caller's connection"),
    known("hapa_ledger_gap_tokens", Kind::Gauge, COUNT, &[],
        "Tokens that were used, or claimed by an engine, and are not booked: for a moment on their way, for longer lost or in excess"),
    known("hapa_ledger_tokens_total", Kind::Counter, COUNT, &["outcome"],
        "Tokens of generations: booked by auth, lost because auth was away for too long, or in excess of the reservation by an engine's claim"),
    known("hapa_limiter_fallbacks_total", Kind::Counter, COUNT, &[],
        "Limits decided by this process because Redis did not answer"),
    known("hapa_log_lines_dropped_total", Kind::Counter, COUNT, &[],
        "Log lines that were dropped: their reader or their disk did not take them"),
    known("hapa_overhead_seconds", Kind::Histogram(OVERHEADS), SECONDS, &["rpc"],
        "Time of a call in the mesh, without its wait for a place at the engines and for what they said"),
    known("hapa_redis_up", Kind::Gauge, None, &[],
        "1 while Redis answers, 0 while it does not"),
    known("hapa_request_duration_seconds", Kind::Histogram(DURATIONS), SECONDS, &["rpc"],
        "From arrival to the last byte"),
    known("hapa_requests_in_flight", Kind::Gauge, COUNT, &["rpc"],
        "Calls in progress"),
    known("hapa_requests_total", Kind::Counter, COUNT, &["rpc", "code"],
        "Calls that ended, by RPC and gRPC code"),
    known("hapa_revocation_link_up", Kind::Gauge, None, &[],
        "1 while auth tells this process of keys and sessions that end"),
    known("hapa_runtime_lag_seconds", Kind::Histogram(OVERHEADS), SECONDS, &[],
        "How late the process is at what is due, measured once a second: it lacks processor time"),
    known("hapa_spans_dropped_total", Kind::Counter, COUNT, &["reason"],
        "Spans that were given up: the queue was full, or the collector did not take them"),
    known("hapa_spool_age_seconds", Kind::Gauge, SECONDS, &[],
        "Age of the oldest event that waits"),
    known("hapa_spool_depth", Kind::Gauge, COUNT, &["kind"],
        "Events that wait to be delivered, by kind"),
    known("hapa_spool_dropped_total", Kind::Counter, COUNT, &["kind", "reason"],
        "Events that were given up before they were delivered, by kind and reason"),
    known("hapa_spool_shipped_total", Kind::Counter, COUNT, &["kind"],
        "Events that were delivered, by kind"),
    known("hapa_token_settlements_dropped_total", Kind::Counter, COUNT, &[],
        "Generations whose tokens were not booked"),
];

/// Gives every histogram its buckets.
pub(super) fn buckets(builder: PrometheusBuilder) -> Result<PrometheusBuilder, BuildError> {
    KNOWN.iter().try_fold(builder, |builder, known| match known.kind {
        Kind::Histogram(buckets) => {
            builder.set_buckets_for_metric(Matcher::Full(known.name.to_owned()), buckets)
        }
        Kind::Counter | Kind::Gauge => Ok(builder),
    })
}

/// Tells the recorder what everything is. Its page shows the help; the units stand in the names.
pub(super) fn describe() {
    for Known { name, kind, unit, labels, help } in KNOWN {
        let unit = unit.unwrap_or(Unit::Count);
        match kind {
            Kind::Counter => {
                metrics::describe_counter!(*name, unit, *help);
                // There from the begin, so that the first that is counted is a change.
                if labels.is_empty() {
                    metrics::counter!(*name).increment(0);
                }
            }
            Kind::Gauge => metrics::describe_gauge!(*name, unit, *help),
            Kind::Histogram(_) => metrics::describe_histogram!(*name, unit, *help),
        }
    }
}

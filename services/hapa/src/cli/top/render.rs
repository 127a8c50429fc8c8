//! The content of a snapshot, as plain text.

use std::fmt::Write as _;

use hapa_proto::analytics::v1::GetPerformanceResponse;
use hapa_proto::analytics::v1::get_performance_response::{Group, Percentiles};

use super::Incidents;
use crate::cli::errors::{method_name, recent_incidents_table};
use crate::cli::format::{count, duration, percent};
use crate::cli::table::{sanitize, table, table_with_columns, to_second};

/// Maximum number of rows per table; the most important rows come first.
const MAX_ROWS: usize = 10;
/// The latency that is shown only with reasoning.
const ANSWER_ROW: &str = "first answer token";
/// The columns of a group, after its name.
const GROUP_COLUMNS: [&str; 10] = [
    "REQUESTS",
    "ERRORS",
    "TOKENS",
    "P50",
    "P95",
    "P99",
    "FIRST P50",
    "FIRST P95",
    "ANSWER P50",
    "ANSWER P95",
];
/// Number of last columns that are shown only with reasoning.
const ANSWER_COLUMN_COUNT: usize = 2;

pub(super) fn render(performance: &GetPerformanceResponse, incidents: &Incidents) -> String {
    let mut text = String::new();
    // Writing to a String cannot fail.
    let _ = write(&mut text, performance, incidents);
    text
}

fn write(
    text: &mut String,
    performance: &GetPerformanceResponse,
    incidents: &Incidents,
) -> std::fmt::Result {
    let usage = performance.ai_model_usage.unwrap_or_default();
    let has_reasoning = has_reasoning(performance);
    writeln!(
        text,
        "requests {} a minute   errors {}   tokens {} ({} a request{})   cache hits {}   until {}",
        count(performance.requests_per_minute),
        percent(performance.error_rate),
        count(usage.total_tokens),
        count(usage.avg_tokens_per_request),
        if has_reasoning {
            format!(", {} of reasoning", count(usage.reasoning_tokens))
        } else {
            String::new()
        },
        percent(performance.cache_hit_rate),
        to_second(performance.end_time.as_ref()),
    )?;
    if !performance.note.is_empty() {
        writeln!(text, "{}", sanitize(&performance.note))?;
    }
    let latencies = [
        ("call", performance.response_time),
        ("first token", performance.time_to_first_token),
        (ANSWER_ROW, performance.time_to_first_answer_token),
        ("between tokens", performance.inter_token_time),
    ];
    let latencies = latencies.into_iter().filter(|(name, _)| has_reasoning || *name != ANSWER_ROW);
    let row = |(name, latency): (&str, Option<Percentiles>)| {
        let [p50, p95, p99] = percentiles(latency);
        let measured = latency.unwrap_or_default().count;
        [name.to_owned(), p50, p95, p99, count(measured.into())]
    };
    writeln!(text, "\n{}", table(["LATENCY", "P50", "P95", "P99", "COUNT"], latencies.map(row)))?;
    for (name, groups) in [("MODEL", &performance.models), ("METHOD", &performance.methods)] {
        if !groups.is_empty() {
            let width =
                GROUP_COLUMNS.len() + 1 - if has_reasoning { 0 } else { ANSWER_COLUMN_COUNT };
            let header = std::iter::once(name).chain(GROUP_COLUMNS).take(width);
            let rows = groups.iter().take(MAX_ROWS);
            let rows = rows.map(|group| group_row(group).into_iter().take(width));
            writeln!(text, "\n{}", table_with_columns(header, rows))?;
        }
    }
    match incidents {
        Ok(incidents) if incidents.is_empty() => Ok(()),
        Ok(incidents) => writeln!(text, "\n{}", recent_incidents_table(incidents.clone())),
        Err(reason) => writeln!(text, "\nincidents are unavailable: {}", sanitize(reason)),
    }
}

/// Whether a model reasoned: without reasoning the first token is the first answer token. A service of the previous
/// version reports no answer token.
fn has_reasoning(performance: &GetPerformanceResponse) -> bool {
    let answer = performance.time_to_first_answer_token;
    performance.ai_model_usage.is_some_and(|usage| usage.reasoning_tokens > 0.0)
        || (answer.is_some() && answer != performance.time_to_first_token)
}

fn group_row(group: &Group) -> [String; 11] {
    let [p50, p95, p99] = percentiles(group.response_time);
    let [first50, first95, _] = percentiles(group.time_to_first_token);
    let [answer50, answer95, _] = percentiles(group.time_to_first_answer_token);
    [
        method_name(&group.name),
        count(group.requests.into()),
        percent(group.error_rate),
        count(group.total_tokens),
        p50,
        p95,
        p99,
        first50,
        first95,
        answer50,
        answer95,
    ]
}

fn percentiles(latency: Option<Percentiles>) -> [String; 3] {
    match latency.filter(|latency| latency.count > 0) {
        Some(Percentiles { p50, p95, p99, .. }) => [p50, p95, p99].map(duration),
        None => std::array::from_fn(|_| "–".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use hapa_proto::analytics::v1::get_performance_response::AiModelUsage;
    use hapa_proto::errors::v1::get_dashboard_response::RecentIncident;

    use super::*;

    #[test]
    fn a_snapshot_shows_measurements_and_marks_missing_ones() {
        let latency = Some(Percentiles { p50: 0.25, p95: 1.5, p99: 2.0, count: 12 });
        let group = Group {
            name: "/hapa.codegen.v1.CodegenService/GenerateCode".to_owned(),
            requests: 12,
            response_time: latency,
            ..Group::default()
        };
        let performance = GetPerformanceResponse {
            requests_per_minute: 12.0,
            ai_model_usage: Some(AiModelUsage { total_tokens: 12_345.0, ..Default::default() }),
            response_time: latency,
            methods: vec![group],
            ..GetPerformanceResponse::default()
        };
        let incident =
            RecentIncident { incident_id: "INC-1".to_owned(), ..RecentIncident::default() };
        let text = render(&performance, &Ok(vec![incident]));
        let row = |name: &str| text.lines().find(|line| line.trim().starts_with(name)).unwrap();
        assert!(row("requests").contains("12 a minute") && row("requests").contains("12,345"));
        assert!(row("call").contains("250 ms") && row("call").contains("2.00 s"));
        assert!(row("between tokens").contains('–'), "there is no measurement");
        assert!(row("GenerateCode").contains("1.50 s") && !text.contains("MODEL"));
        assert!(text.contains("INC-1"));
        assert!(!text.contains("first answer token") && !text.contains("ANSWER"), "{text}");
        let failed = render(&performance, &Err("timed\u{1b}[2J out".to_owned()));
        assert!(failed.contains("incidents are unavailable: timed\u{fffd}[2J out"));
    }

    #[test]
    fn a_snapshot_with_reasoning_shows_the_first_answer_token_beside_the_first_token() {
        let latency = |p50| Some(Percentiles { p50, count: 1, ..Percentiles::default() });
        let (time_to_first_token, time_to_first_answer_token) = (latency(0.25), latency(8.0));
        let group = Group {
            name: "m".to_owned(),
            time_to_first_token,
            time_to_first_answer_token,
            ..Group::default()
        };
        let usage = AiModelUsage { reasoning_tokens: 1_234.0, ..AiModelUsage::default() };
        let performance = GetPerformanceResponse {
            time_to_first_token,
            time_to_first_answer_token,
            ai_model_usage: Some(usage),
            models: vec![group],
            ..GetPerformanceResponse::default()
        };
        let text = render(&performance, &Ok(Vec::new()));
        let row = |name: &str| text.lines().find(|line| line.trim().starts_with(name)).unwrap();
        assert!(row("requests").contains("1,234 of reasoning"), "{text}");
        assert!(row("first token").contains("250 ms"), "{text}");
        assert!(row("first answer token").contains("8.00 s"), "{text}");
        assert!(text.contains("ANSWER P95") && row("m ").contains("8.00 s"), "{text}");
    }
}

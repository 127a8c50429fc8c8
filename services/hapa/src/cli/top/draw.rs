//! What the screen shows, as plain lines.

use std::fmt::Write as _;

use hapa_proto::analytics::v1::GetPerformanceResponse;
use hapa_proto::analytics::v1::get_performance_response::{Group, Percentiles};

use super::Incidents;
use crate::cli::errors::{last_part, recent};
use crate::cli::number::{count, percent, span};
use crate::cli::table::{plain, second, table};

/// Most rows of a table: what matters is at the top.
const MOST_ROWS: usize = 10;

pub(super) fn draw(performance: &GetPerformanceResponse, incidents: &Incidents) -> String {
    let mut text = String::new();
    // Writing to a String can't fail.
    let _ = write(&mut text, performance, incidents);
    text
}

fn write(
    text: &mut String,
    performance: &GetPerformanceResponse,
    incidents: &Incidents,
) -> std::fmt::Result {
    let usage = performance.ai_model_usage.unwrap_or_default();
    writeln!(
        text,
        "requests {} a minute   errors {}   tokens {} ({} a request)   cache {}   until {}",
        count(performance.requests_per_minute),
        percent(performance.error_rate),
        count(usage.total_tokens),
        count(usage.avg_tokens_per_request),
        percent(performance.cache_hit_rate),
        second(performance.end_time.as_ref()),
    )?;
    if !performance.note.is_empty() {
        writeln!(text, "{}", plain(&performance.note))?;
    }
    let times = [
        ("a call", performance.response_time),
        ("to the first token", performance.time_to_first_token),
        ("between tokens", performance.inter_token_time),
    ];
    let row = |(name, times): (&str, Option<Percentiles>)| {
        let [p50, p95, p99] = percentiles(times);
        let measured = times.unwrap_or_default().count;
        [name.to_owned(), p50, p95, p99, count(measured.into())]
    };
    writeln!(text, "\n{}", table(["TIME", "P50", "P95", "P99", "MEASURED"], times.map(row)))?;
    for (name, groups) in [("MODEL", &performance.models), ("METHOD", &performance.methods)] {
        let header =
            [name, "REQUESTS", "ERRORS", "TOKENS", "P50", "P95", "P99", "FIRST P50", "FIRST P95"];
        if !groups.is_empty() {
            writeln!(text, "\n{}", table(header, groups.iter().take(MOST_ROWS).map(group)))?;
        }
    }
    match incidents {
        Ok(incidents) if incidents.is_empty() => Ok(()),
        Ok(incidents) => writeln!(text, "\n{}", recent(incidents.clone())),
        Err(why) => writeln!(text, "\nno incidents: {}", plain(why)),
    }
}

fn group(group: &Group) -> [String; 9] {
    let [p50, p95, p99] = percentiles(group.response_time);
    let [first50, first95, _] = percentiles(group.time_to_first_token);
    [
        last_part(&group.name),
        count(group.requests.into()),
        percent(group.error_rate),
        count(group.total_tokens),
        p50,
        p95,
        p99,
        first50,
        first95,
    ]
}

fn percentiles(times: Option<Percentiles>) -> [String; 3] {
    match times.filter(|times| times.count > 0) {
        Some(Percentiles { p50, p95, p99, .. }) => [p50, p95, p99].map(span),
        None => std::array::from_fn(|_| "–".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use hapa_proto::analytics::v1::get_performance_response::AiModelUsage;
    use hapa_proto::errors::v1::get_dashboard_response::RecentIncident;

    use super::*;

    #[test]
    fn a_screen_has_what_was_measured_and_says_what_was_not() {
        let times = Some(Percentiles { p50: 0.25, p95: 1.5, p99: 2.0, count: 12 });
        let group = Group {
            name: "/hapa.codegen.v1.CodegenService/GenerateCode".to_owned(),
            requests: 12,
            response_time: times,
            ..Group::default()
        };
        let performance = GetPerformanceResponse {
            requests_per_minute: 12.0,
            ai_model_usage: Some(AiModelUsage { total_tokens: 12_345.0, ..Default::default() }),
            response_time: times,
            methods: vec![group],
            ..GetPerformanceResponse::default()
        };
        let incident =
            RecentIncident { incident_id: "INC-1".to_owned(), ..RecentIncident::default() };
        let text = draw(&performance, &Ok(vec![incident]));
        let row = |name: &str| text.lines().find(|line| line.trim().starts_with(name)).unwrap();
        assert!(row("requests").contains("12 a minute") && row("requests").contains("12,345"));
        assert!(row("a call").contains("250 ms") && row("a call").contains("2.00 s"));
        assert!(row("between tokens").contains('–'), "nothing was measured");
        assert!(row("GenerateCode").contains("1.50 s") && !text.contains("MODEL"));
        assert!(text.contains("INC-1"));
        let away = draw(&performance, &Err("it is\u{1b}[2J away".to_owned()));
        assert!(away.contains("no incidents: it is\u{fffd}[2J away"));
    }
}

//! `hapa errors dashboard`, `patterns` and `codes`.

use std::io::Write as _;

use hapa_proto::errors::v1::get_dashboard_response::{ErrorCodeCount, RecentIncident};
use hapa_proto::errors::v1::list_error_codes_response::ErrorCode;
use hapa_proto::errors::v1::list_patterns_response::Pattern;
use hapa_proto::errors::v1::{
    GetDashboardRequest, GetDashboardResponse, ListErrorCodesRequest, ListPatternsRequest,
};

use super::client;
use crate::cli::number::percent;
use crate::cli::table::{facts, second, table};
use crate::cli::{Failure, connection, json};

#[derive(clap::Args, Clone, Debug)]
#[group(id = "errors_dashboard_args")]
pub(in crate::cli) struct Dashboard {
    /// The sums as JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    connection: connection::Args,
}

#[derive(clap::Args, Clone, Debug)]
#[group(id = "errors_patterns_args")]
pub(in crate::cli) struct Patterns {
    /// The period that ends now; the trend compares it with the one before.
    #[arg(long, default_value = "24h", value_parser = ["1h", "24h", "7d", "30d"])]
    period: String,
    /// Each pattern as a line of JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    connection: connection::Args,
}

#[derive(clap::Args, Clone, Debug)]
#[group(id = "errors_codes_args")]
pub(in crate::cli) struct Codes {
    /// Each code as a line of JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    connection: connection::Args,
}

pub(super) async fn dashboard(args: Dashboard) -> Result<(), Failure> {
    let mut client = client(&args.connection).await?;
    let reply = client.get_dashboard(GetDashboardRequest {}).await?.into_inner();
    let mut out = std::io::stdout();
    if args.json {
        writeln!(out, "{}", json::json(&reply)?)?;
        return Ok(());
    }
    let GetDashboardResponse { total_errors, errors_last_24h, error_rate, last_cleanup, .. } =
        reply;
    let sums = facts([
        ("ERRORS KEPT", total_errors.to_string()),
        ("LAST 24 HOURS", errors_last_24h.to_string()),
        ("OF ALL CALLS", percent(error_rate)),
        ("CLEANED UP", second(last_cleanup.as_ref())),
    ]);
    writeln!(out, "{sums}")?;
    if !reply.top_error_codes.is_empty() {
        let row =
            |ErrorCodeCount { code, count, description }| [code, count.to_string(), description];
        let rows = reply.top_error_codes.into_iter().map(row);
        writeln!(out, "\n{}", table(["CODE", "LAST 24 HOURS", "MEANING"], rows))?;
    }
    if !reply.recent_incidents.is_empty() {
        writeln!(out, "\n{}", recent(reply.recent_incidents))?;
    }
    Ok(())
}

/// The incidents that were seen last.
pub(in crate::cli) fn recent(incidents: Vec<RecentIncident>) -> comfy_table::Table {
    let row = |incident: RecentIncident| {
        let RecentIncident { incident_id, error_code, timestamp, status, count, recovered_count } =
            incident;
        let (count, overcome) = (count.to_string(), recovered_count.to_string());
        [incident_id, error_code, status, count, overcome, second(timestamp.as_ref())]
    };
    let header = ["INCIDENT", "CODE", "STATUS", "COUNT", "OVERCOME", "LAST SEEN"];
    table(header, incidents.into_iter().map(row))
}

pub(super) async fn patterns(args: Patterns) -> Result<(), Failure> {
    let mut client = client(&args.connection).await?;
    let request = ListPatternsRequest { period: args.period };
    let reply = client.list_patterns(request).await?.into_inner();
    let mut out = std::io::stdout();
    if args.json {
        for pattern in &reply.patterns {
            writeln!(out, "{}", json::json(pattern)?)?;
        }
        return Ok(());
    }
    let header = ["CODE", "COUNT", "TREND", "USERS", "LAST SEEN", "INCIDENT", "METHOD", "MESSAGE"];
    writeln!(out, "{}", table(header, reply.patterns.into_iter().map(pattern)))?;
    Ok(())
}

fn pattern(pattern: Pattern) -> [String; 8] {
    let Pattern { error_code, count, last_seen, affected_users, trend, .. } = pattern;
    let (count, users) = (count.to_string(), affected_users.to_string());
    let method = last_part(&pattern.method);
    let seen = second(last_seen.as_ref());
    [error_code, count, trend, users, seen, pattern.incident_id, method, pattern.message]
}

/// A method without its service.
pub(in crate::cli) fn last_part(method: &str) -> String {
    method.rsplit('/').next().unwrap_or(method).to_owned()
}

pub(super) async fn codes(args: Codes) -> Result<(), Failure> {
    let mut client = client(&args.connection).await?;
    let reply = client.list_error_codes(ListErrorCodesRequest {}).await?.into_inner();
    let mut out = std::io::stdout();
    if args.json {
        for code in &reply.codes {
            writeln!(out, "{}", json::json(code)?)?;
        }
        return Ok(());
    }
    let row = |ErrorCode { code, description, reason, grpc_status, retry, advice }| {
        [code, reason, grpc_status, retry, description, advice]
    };
    let header = ["CODE", "REASON", "GRPC", "RETRY", "MEANING", "WHAT TO DO"];
    writeln!(out, "{}", table(header, reply.codes.into_iter().map(row)))?;
    Ok(())
}

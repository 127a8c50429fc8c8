//! `hapa errors dashboard`, `patterns` and `codes`.

use std::io::Write as _;

use hapa_proto::errors::v1::get_dashboard_response::{ErrorCodeCount, RecentIncident};
use hapa_proto::errors::v1::list_error_codes_response::ErrorCode;
use hapa_proto::errors::v1::list_patterns_response::Pattern;
use hapa_proto::errors::v1::{
    GetDashboardRequest, GetDashboardResponse, ListErrorCodesRequest, ListPatternsRequest,
};

use super::connect;
use crate::cli::connection::ConnectionArgs;
use crate::cli::format::percent;
use crate::cli::table::{field_table, table, to_second};
use crate::cli::{CliError, json};

#[derive(clap::Args, Clone, Debug)]
pub(in crate::cli) struct DashboardArgs {
    /// Print the summary as JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    connection: ConnectionArgs,
}

#[derive(clap::Args, Clone, Debug)]
pub(in crate::cli) struct PatternsArgs {
    /// Period up to the current time; the trend compares it with the preceding period.
    #[arg(long, default_value = "24h", value_parser = ["1h", "24h", "7d", "30d"])]
    period: String,
    /// Print one JSON object per pattern.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    connection: ConnectionArgs,
}

#[derive(clap::Args, Clone, Debug)]
pub(in crate::cli) struct ErrorCodesArgs {
    /// Print one JSON object per code.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    connection: ConnectionArgs,
}

pub(super) async fn dashboard(args: DashboardArgs) -> Result<(), CliError> {
    let mut client = connect(&args.connection).await?;
    let reply = client.get_dashboard(GetDashboardRequest {}).await?.into_inner();
    if args.json {
        return json::print(&reply);
    }
    let GetDashboardResponse { total_errors, errors_last_24h, error_rate, last_cleanup, .. } =
        reply;
    let mut out = std::io::stdout();
    let totals = field_table([
        ("ERRORS STORED", total_errors.to_string()),
        ("LAST 24 HOURS", errors_last_24h.to_string()),
        ("ERROR RATE", percent(error_rate)),
        ("LAST CLEAN-UP", to_second(last_cleanup.as_ref())),
    ]);
    writeln!(out, "{totals}")?;
    if !reply.top_error_codes.is_empty() {
        let row =
            |ErrorCodeCount { code, count, description }| [code, count.to_string(), description];
        let rows = reply.top_error_codes.into_iter().map(row);
        writeln!(out, "\n{}", table(["CODE", "LAST 24 HOURS", "MEANING"], rows))?;
    }
    if !reply.recent_incidents.is_empty() {
        writeln!(out, "\n{}", recent_incidents_table(reply.recent_incidents))?;
    }
    Ok(())
}

/// The most recently seen incidents.
pub(in crate::cli) fn recent_incidents_table(incidents: Vec<RecentIncident>) -> comfy_table::Table {
    let row = |incident: RecentIncident| {
        let RecentIncident { incident_id, error_code, timestamp, status, count, recovered_count } =
            incident;
        let (count, recovered) = (count.to_string(), recovered_count.to_string());
        [incident_id, error_code, status, count, recovered, to_second(timestamp.as_ref())]
    };
    let header = ["INCIDENT", "CODE", "STATUS", "COUNT", "RECOVERED", "LAST SEEN"];
    table(header, incidents.into_iter().map(row))
}

pub(super) async fn patterns(args: PatternsArgs) -> Result<(), CliError> {
    let mut client = connect(&args.connection).await?;
    let request = ListPatternsRequest { period: args.period };
    let reply = client.list_patterns(request).await?.into_inner();
    if args.json {
        return json::print_lines(&reply.patterns);
    }
    let header = ["CODE", "COUNT", "TREND", "USERS", "LAST SEEN", "INCIDENT", "METHOD", "MESSAGE"];
    let rows = reply.patterns.into_iter().map(pattern_row);
    writeln!(std::io::stdout(), "{}", table(header, rows))?;
    Ok(())
}

fn pattern_row(pattern: Pattern) -> [String; 8] {
    let Pattern { error_code, count, last_seen, affected_users, trend, .. } = pattern;
    let (count, users) = (count.to_string(), affected_users.to_string());
    let method = method_name(&pattern.method);
    let seen = to_second(last_seen.as_ref());
    [error_code, count, trend, users, seen, pattern.incident_id, method, pattern.message]
}

/// The name of a method without its service.
pub(in crate::cli) fn method_name(method: &str) -> String {
    method.rsplit('/').next().unwrap_or(method).to_owned()
}

pub(super) async fn codes(args: ErrorCodesArgs) -> Result<(), CliError> {
    let mut client = connect(&args.connection).await?;
    let reply = client.list_error_codes(ListErrorCodesRequest {}).await?.into_inner();
    if args.json {
        return json::print_lines(&reply.codes);
    }
    let row = |ErrorCode { code, description, reason, grpc_status, retry, advice }| {
        [code, reason, grpc_status, retry, description, advice]
    };
    let header = ["CODE", "REASON", "GRPC", "RETRY", "MEANING", "ADVICE"];
    writeln!(std::io::stdout(), "{}", table(header, reply.codes.into_iter().map(row)))?;
    Ok(())
}

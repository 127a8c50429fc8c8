//! `hapa errors incidents`.

use std::io::Write as _;

use hapa_proto::errors::v1::{Incident, ListIncidentsRequest};
use prost_types::Timestamp;

use super::connect;
use super::reports::method_name;
use crate::cli::connection::ConnectionArgs;
use crate::cli::paging::{Page, for_each_page};
use crate::cli::table::{table, to_second};
use crate::cli::{CliError, json, time_args};

#[derive(clap::Args, Clone, Debug)]
#[command(after_help = "Example:\n  hapa errors incidents --status open --since 24h")]
pub(in crate::cli) struct ListIncidentsArgs {
    /// Only incidents with this status.
    #[arg(long, value_parser = ["open", "acknowledged", "resolved"])]
    status: Option<String>,
    /// Only incidents with this error code, such as E5006.
    #[arg(long, default_value = "", hide_default_value = true)]
    code: String,
    /// Only incidents seen since this time: 2026-01-31T12:00:00Z, or a duration before the current time:
    /// 24h, 7d.
    #[arg(long, value_name = "TIME", value_parser = time_args::parse_time)]
    since: Option<Timestamp>,
    /// Maximum number of incidents; 0: all.
    #[arg(long, value_name = "N", default_value_t = 50)]
    limit: u32,
    /// Print one JSON object per incident.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    connection: ConnectionArgs,
}

pub(super) async fn list(args: ListIncidentsArgs) -> Result<(), CliError> {
    let mut client = connect(&args.connection).await?;
    let request = ListIncidentsRequest {
        status: args.status.unwrap_or_default(),
        error_code: args.code,
        seen_after: args.since,
        ..ListIncidentsRequest::default()
    };
    let fetch = async |page_size, page_token| {
        let request = ListIncidentsRequest { page_size, page_token, ..request.clone() };
        let reply = client.list_incidents(request).await?.into_inner();
        Ok(Page { rows: reply.incidents, next_page_token: reply.next_page_token })
    };
    let mut incidents = Vec::new();
    let on_page = |page: Vec<Incident>| {
        if args.json {
            return json::print_lines(&page);
        }
        incidents.extend(page);
        Ok(())
    };
    let has_more = for_each_page(args.limit, fetch, on_page).await?;
    if !args.json {
        let header =
            ["INCIDENT", "CODE", "STATUS", "COUNT", "USERS", "LAST SEEN", "METHOD", "MESSAGE"];
        writeln!(std::io::stdout(), "{}", table(header, incidents.into_iter().map(row)))?;
    }
    if has_more {
        writeln!(anstream::stderr(), "More incidents exist; --limit 0 lists all.")?;
    }
    Ok(())
}

fn row(incident: Incident) -> [String; 8] {
    let (count, users) = (incident.count.to_string(), incident.affected_users.to_string());
    let (seen, method) = (to_second(incident.last_seen.as_ref()), method_name(&incident.method));
    let status = describe_status(&incident);
    [
        incident.incident_id,
        incident.error_code,
        status,
        count,
        users,
        seen,
        method,
        incident.message,
    ]
}

/// The status, and whether a regression reopened the incident.
pub(super) fn describe_status(incident: &Incident) -> String {
    match (incident.reopened, incident.status.as_str()) {
        (true, status @ ("open" | "acknowledged")) => format!("{status}, regressed"),
        (_, status) => status.to_owned(),
    }
}

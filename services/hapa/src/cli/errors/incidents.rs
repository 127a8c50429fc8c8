//! `hapa errors incidents`.

use std::io::Write as _;

use hapa_proto::errors::v1::{Incident, ListIncidentsRequest};
use prost_types::Timestamp;

use super::client;
use super::sums::last_part;
use crate::cli::table::{second, table};
use crate::cli::{Failure, connection, json, moment};

const LARGEST_PAGE: u32 = 1_000;

#[derive(clap::Args, Clone, Debug)]
#[group(id = "errors_incidents_args")]
pub(in crate::cli) struct Args {
    /// Only those of this status.
    #[arg(long, value_parser = ["open", "acknowledged", "resolved"])]
    status: Option<String>,
    /// Only those of this code, such as E5006.
    #[arg(long, default_value = "", hide_default_value = true)]
    code: String,
    /// Only what was seen from this time on: 2026-01-31T12:00:00Z, or so long ago: 24h, 7d.
    #[arg(long, value_name = "TIME", value_parser = moment::moment)]
    since: Option<Timestamp>,
    /// Show so many incidents at most; 0: all.
    #[arg(long, value_name = "N", default_value_t = 50)]
    limit: u32,
    /// Each incident as a line of JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    connection: connection::Args,
}

pub(super) async fn list(args: Args) -> Result<(), Failure> {
    let mut client = client(&args.connection).await?;
    let mut request = ListIncidentsRequest {
        status: args.status.unwrap_or_default(),
        error_code: args.code,
        seen_after: args.since,
        ..ListIncidentsRequest::default()
    };
    let mut rest = if args.limit == 0 { u32::MAX } else { args.limit };
    let mut incidents = Vec::new();
    let mut out = std::io::stdout();
    let more = loop {
        request.page_size = i32::try_from(rest.min(LARGEST_PAGE))?;
        let page = client.list_incidents(request.clone()).await?.into_inner();
        rest = rest.saturating_sub(u32::try_from(page.incidents.len())?);
        if args.json {
            for incident in &page.incidents {
                writeln!(out, "{}", json::json(incident)?)?;
            }
        } else {
            incidents.extend(page.incidents);
        }
        if rest == 0 || page.next_page_token.is_empty() {
            break !page.next_page_token.is_empty();
        }
        request.page_token = page.next_page_token;
    };
    if !args.json {
        let header =
            ["INCIDENT", "CODE", "STATUS", "COUNT", "USERS", "LAST SEEN", "METHOD", "MESSAGE"];
        writeln!(out, "{}", table(header, incidents.into_iter().map(row)))?;
    }
    if more {
        writeln!(anstream::stderr(), "There are more incidents; --limit 0 lists all.")?;
    }
    Ok(())
}

fn row(incident: Incident) -> [String; 8] {
    let (count, users) = (incident.count.to_string(), incident.affected_users.to_string());
    let (seen, method) = (second(incident.last_seen.as_ref()), last_part(&incident.method));
    let status = status(&incident);
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

/// In words, with what one should know beside it.
pub(super) fn status(incident: &Incident) -> String {
    match (incident.reopened, incident.status.as_str()) {
        (true, status @ ("open" | "acknowledged")) => format!("{status}, came back"),
        (_, status) => status.to_owned(),
    }
}

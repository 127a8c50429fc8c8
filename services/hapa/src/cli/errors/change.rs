//! `hapa errors acknowledge`, `resolve` and `reopen`.

use std::io::Write as _;

use hapa_proto::errors::v1::UpdateIncidentRequest;

use super::client;
use super::show::about;
use crate::cli::{Failure, connection, json};

#[derive(clap::Args, Clone, Debug)]
#[group(id = "errors_change_args")]
pub(in crate::cli) struct Args {
    /// INC-YYYYMMDD-XXXXXXXX, or the id of any of its occurrences.
    #[arg(value_name = "INCIDENT")]
    incident_id: String,
    /// A word about it.
    #[arg(long, default_value = "", hide_default_value = true)]
    note: String,
    /// Only where this is its status still: two people do not change it at once.
    #[arg(long, value_name = "STATUS", value_parser = ["open", "acknowledged", "resolved"])]
    expect: Option<String>,
    /// The changed incident as JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    connection: connection::Args,
}

#[derive(clap::Args, Clone, Debug)]
#[group(id = "errors_resolve_args")]
#[command(disable_version_flag = true)] // --version is the one that resolves
pub(in crate::cli) struct Resolve {
    /// The version that resolves it; seen in this one or before it stays resolved.
    #[arg(long, default_value = "", hide_default_value = true)]
    pub(super) version: String,
    #[command(flatten)]
    pub(super) change: Args,
}

pub(super) async fn change(args: Args, status: &str, version: String) -> Result<(), Failure> {
    let mut client = client(&args.connection).await?;
    let request = UpdateIncidentRequest {
        incident_id: args.incident_id,
        status: status.to_owned(),
        version,
        note: args.note,
        expected_status: args.expect.unwrap_or_default(),
    };
    let reply = client.update_incident(request).await?.into_inner();
    let incident = reply.incident.unwrap_or_default();
    let mut out = std::io::stdout();
    if args.json {
        writeln!(out, "{}", json::json(&incident)?)?;
    } else {
        writeln!(out, "{}", about(incident))?;
    }
    Ok(())
}

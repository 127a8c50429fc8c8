//! `hapa errors acknowledge`, `resolve` and `reopen`.

use std::io::Write as _;

use hapa_proto::errors::v1::UpdateIncidentRequest;

use super::connect;
use super::show::incident_table;
use crate::cli::connection::ConnectionArgs;
use crate::cli::{CliError, json};

#[derive(clap::Args, Clone, Debug)]
pub(in crate::cli) struct UpdateIncidentArgs {
    /// Incident id (INC-YYYYMMDD-XXXXXXXX), or the id of one of its occurrences.
    #[arg(value_name = "INCIDENT")]
    incident_id: String,
    /// Note to store with the status.
    #[arg(long, default_value = "", hide_default_value = true)]
    note: String,
    /// Fail unless the incident has this status, so that two operators do not update it at once.
    #[arg(long, value_name = "STATUS", value_parser = ["open", "acknowledged", "resolved"])]
    expect: Option<String>,
    /// Print the updated incident as JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    connection: ConnectionArgs,
}

#[derive(clap::Args, Clone, Debug)]
#[command(
    disable_version_flag = true, // --version is the argument below
    after_help = "Example:\n  hapa errors resolve INC-20260101-0123ABCD --version 1.2.3"
)]
pub(in crate::cli) struct ResolveIncidentArgs {
    /// Version that resolves the incident; occurrences in this or an earlier version do not reopen it.
    #[arg(long, default_value = "", hide_default_value = true)]
    pub(super) version: String,
    #[command(flatten)]
    pub(super) update: UpdateIncidentArgs,
}

pub(super) async fn update(
    args: UpdateIncidentArgs,
    status: &str,
    version: String,
) -> Result<(), CliError> {
    let mut client = connect(&args.connection).await?;
    let request = UpdateIncidentRequest {
        incident_id: args.incident_id,
        status: status.to_owned(),
        version,
        note: args.note,
        expected_status: args.expect.unwrap_or_default(),
    };
    let reply = client.update_incident(request).await?.into_inner();
    let incident = reply.incident.unwrap_or_default();
    if args.json {
        return json::print(&incident);
    }
    writeln!(std::io::stdout(), "{}", incident_table(incident))?;
    Ok(())
}

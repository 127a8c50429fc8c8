//! `hapa errors show`.

use std::io::Write as _;

use hapa_proto::errors::v1::{GetIncidentRequest, Incident, Occurrence};

use super::connect;
use super::incidents::describe_status;
use crate::cli::connection::ConnectionArgs;
use crate::cli::format::duration;
use crate::cli::table::{field_table, sanitize, table, to_second};
use crate::cli::{CliError, json};

#[derive(clap::Args, Clone, Debug)]
pub(in crate::cli) struct ShowIncidentArgs {
    /// Incident id (INC-YYYYMMDD-XXXXXXXX), or the id of one of its occurrences.
    #[arg(value_name = "INCIDENT")]
    incident_id: String,
    /// Print the incident and its occurrences as JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    connection: ConnectionArgs,
}

pub(super) async fn show(args: ShowIncidentArgs) -> Result<(), CliError> {
    let mut client = connect(&args.connection).await?;
    let request = GetIncidentRequest { incident_id: args.incident_id };
    let reply = client.get_incident(request).await?.into_inner();
    if args.json {
        return json::print(&reply);
    }
    let mut out = std::io::stdout();
    writeln!(out, "{}", incident_table(reply.incident.unwrap_or_default()))?;
    // The first occurrence is the requested one, or else the newest.
    if let Some(first) = reply.occurrences.first().filter(|first| !first.causes.is_empty()) {
        writeln!(out, "\ncauses of {}:", sanitize(occurrence_id(first)))?;
        for cause in &first.causes {
            writeln!(out, "  {}", sanitize(cause))?;
        }
    }
    let header =
        ["OCCURRENCE", "TIME", "SERVICE", "VERSION", "ACTOR", "DURATION", "REQUEST", "TRACE"];
    writeln!(out, "\n{}", table(header, reply.occurrences.into_iter().map(row)))?;
    Ok(())
}

/// The properties of an incident.
pub(super) fn incident_table(incident: Incident) -> comfy_table::Table {
    let status = describe_status(&incident);
    let mut rows = vec![
        ("INCIDENT", incident.incident_id),
        ("CODE", incident.error_code),
        ("STATUS", status),
        ("MESSAGE", incident.message),
        ("METHOD", incident.method),
        ("COUNT", incident.count.to_string()),
        ("RECOVERED", incident.recovered_count.to_string()),
        ("USERS", incident.affected_users.to_string()),
        ("FIRST SEEN", to_second(incident.first_seen.as_ref())),
        ("LAST SEEN", to_second(incident.last_seen.as_ref())),
        ("LAST SEEN IN", incident.last_seen_version),
        ("FINGERPRINT", incident.fingerprint),
    ];
    if incident.status_time.is_some() {
        rows.push(("STATUS SINCE", to_second(incident.status_time.as_ref())));
        rows.push(("STATUS BY", incident.status_actor));
    }
    for (name, value) in [("RESOLVED IN", incident.resolved_in_version), ("NOTE", incident.note)] {
        if !value.is_empty() {
            rows.push((name, value));
        }
    }
    field_table(rows)
}

/// The incident id that a user saw, or else the event id.
fn occurrence_id(occurrence: &Occurrence) -> &str {
    let shown = occurrence.incident_id.as_str();
    if shown.is_empty() { &occurrence.event_id } else { shown }
}

fn row(occurrence: Occurrence) -> [String; 8] {
    let id = occurrence_id(&occurrence).to_owned();
    let time = to_second(occurrence.time.as_ref());
    let duration = occurrence.duration.map(seconds).map(duration).unwrap_or_default();
    let Occurrence { service, version, actor, request_id, trace_id, .. } = occurrence;
    [id, time, service, version, actor, duration, request_id, trace_id]
}

#[expect(clippy::cast_precision_loss, reason = "the value is shown with three digits")]
fn seconds(duration: prost_types::Duration) -> f64 {
    duration.seconds as f64 + f64::from(duration.nanos) / 1e9
}

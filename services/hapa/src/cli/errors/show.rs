//! `hapa errors show`.

use std::io::Write as _;

use hapa_proto::errors::v1::{GetIncidentRequest, Incident, Occurrence};

use super::client;
use super::incidents::status;
use crate::cli::number::span;
use crate::cli::table::{facts, plain, second, table};
use crate::cli::{Failure, connection, json};

#[derive(clap::Args, Clone, Debug)]
#[group(id = "errors_show_args")]
pub(in crate::cli) struct Args {
    /// INC-YYYYMMDD-XXXXXXXX.
    #[arg(value_name = "INCIDENT")]
    incident_id: String,
    /// The incident and its occurrences as JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    connection: connection::Args,
}

pub(super) async fn show(args: Args) -> Result<(), Failure> {
    let mut client = client(&args.connection).await?;
    let request = GetIncidentRequest { incident_id: args.incident_id };
    let reply = client.get_incident(request).await?.into_inner();
    let mut out = std::io::stdout();
    if args.json {
        writeln!(out, "{}", json::json(&reply)?)?;
        return Ok(());
    }
    writeln!(out, "{}", about(reply.incident.unwrap_or_default()))?;
    // What was asked for is first, else the newest.
    if let Some(first) = reply.occurrences.first().filter(|one| !one.causes.is_empty()) {
        writeln!(out, "\nwhat lies behind {}:", plain(named(first)))?;
        for cause in &first.causes {
            writeln!(out, "  {}", plain(cause))?;
        }
    }
    let header = ["OCCURRENCE", "TIME", "SERVICE", "VERSION", "ACTOR", "TOOK", "REQUEST", "TRACE"];
    writeln!(out, "\n{}", table(header, reply.occurrences.into_iter().map(row)))?;
    Ok(())
}

/// What is known of an incident.
pub(super) fn about(incident: Incident) -> comfy_table::Table {
    let status = status(&incident);
    let mut rows = vec![
        ("INCIDENT", incident.incident_id),
        ("CODE", incident.error_code),
        ("STATUS", status),
        ("MESSAGE", incident.message),
        ("METHOD", incident.method),
        ("COUNT", incident.count.to_string()),
        ("OVERCOME", incident.recovered_count.to_string()),
        ("USERS", incident.affected_users.to_string()),
        ("FIRST SEEN", second(incident.first_seen.as_ref())),
        ("LAST SEEN", second(incident.last_seen.as_ref())),
        ("LAST SEEN IN", incident.last_seen_version),
        ("FINGERPRINT", incident.fingerprint),
    ];
    if incident.status_time.is_some() {
        rows.push(("STATUS SINCE", second(incident.status_time.as_ref())));
        rows.push(("STATUS BY", incident.status_actor));
    }
    for (name, value) in [("RESOLVED IN", incident.resolved_in_version), ("NOTE", incident.note)] {
        if !value.is_empty() {
            rows.push((name, value));
        }
    }
    facts(rows)
}

fn named(occurrence: &Occurrence) -> &str {
    let shown = occurrence.incident_id.as_str();
    if shown.is_empty() { &occurrence.event_id } else { shown }
}

fn row(occurrence: Occurrence) -> [String; 8] {
    let name = named(&occurrence).to_owned();
    let time = second(occurrence.time.as_ref());
    let took = occurrence.duration.map(seconds).map(span).unwrap_or_default();
    let Occurrence { service, version, actor, request_id, trace_id, .. } = occurrence;
    [name, time, service, version, actor, took, request_id, trace_id]
}

#[expect(clippy::cast_precision_loss, reason = "for people")]
fn seconds(duration: prost_types::Duration) -> f64 {
    duration.seconds as f64 + f64::from(duration.nanos) / 1e9
}

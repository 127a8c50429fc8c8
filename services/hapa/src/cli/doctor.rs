//! `hapa doctor`: checks everything that the mesh depends on, from the machine of the caller, and advises on each
//! problem. It changes nothing, and every check has a timeout.

mod checks;
mod process_checks;

use std::io::Write as _;
use std::path::PathBuf;

use serde_json::json;

use crate::cli::{CliError, table};
use crate::{AllRolesArgs, Roles};

#[derive(clap::Args, Clone, Debug)]
#[command(after_help = "Example:\n  GATEWAY_ADDRESS=http://127.0.0.1:8000 hapa doctor")]
pub(super) struct DoctorArgs {
    #[command(flatten)]
    settings: AllRolesArgs,
    /// URL of the gateway, such as http://127.0.0.1:8000; default: the gateway is not checked.
    #[arg(long, env = "GATEWAY_ADDRESS")]
    gateway_address: Option<String>,
    /// PEM file of the certificate authorities for an https:// gateway; default: those of this machine.
    #[arg(long, env = "HAPA_CA_FILE", value_name = "FILE")]
    ca_file: Option<PathBuf>,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

/// The result of one check.
#[derive(Clone, Debug, PartialEq, Eq)]
enum CheckState {
    Ok,
    /// Nothing is broken, but the operator should know.
    Note,
    Wrong,
    /// The thing to check does not exist.
    Absent,
}

impl CheckState {
    fn as_str(&self) -> &'static str {
        match self {
            CheckState::Ok => "ok",
            CheckState::Note => "note",
            CheckState::Wrong => "WRONG",
            CheckState::Absent => "-",
        }
    }
}

/// One row of the report.
#[derive(Clone, Debug)]
struct Finding {
    what: String,
    state: CheckState,
    found: String,
    /// What the operator should do.
    advice: &'static str,
}

impl Finding {
    fn ok(what: impl Into<String>, found: impl Into<String>) -> Finding {
        Finding::new(CheckState::Ok, what, found, "")
    }

    fn absent(what: impl Into<String>, found: impl Into<String>) -> Finding {
        Finding::new(CheckState::Absent, what, found, "")
    }

    fn wrong(what: impl Into<String>, found: impl Into<String>, advice: &'static str) -> Finding {
        Finding::new(CheckState::Wrong, what, found, advice)
    }

    fn note(what: impl Into<String>, found: impl Into<String>, advice: &'static str) -> Finding {
        Finding::new(CheckState::Note, what, found, advice)
    }

    fn new(
        state: CheckState,
        what: impl Into<String>,
        found: impl Into<String>,
        advice: &'static str,
    ) -> Finding {
        Finding { what: what.into(), state, found: found.into(), advice }
    }
}

pub(super) async fn doctor(args: DoctorArgs) -> Result<(), CliError> {
    let roles = Roles::from(args.settings);
    let mut findings = checks::settings(&roles);
    findings.extend(process_checks::process(&roles));
    findings.extend(checks::stores(&roles).await);
    findings.extend(process_checks::pepper(&roles, &findings).await);
    findings.push(checks::redis(&roles).await);
    findings.extend(checks::engines(&roles).await);
    findings.push(checks::certificates(&roles));
    findings.extend(checks::gateway(args.gateway_address.as_deref(), args.ca_file.as_ref()).await);
    findings.extend(checks::outboxes(&roles).await);
    let wrong_count = findings.iter().filter(|finding| finding.state == CheckState::Wrong).count();
    let mut out = std::io::stdout();
    if args.json {
        let rows = findings.iter().map(|finding| {
            let Finding { what, state, found, advice } = finding;
            json!({"what": what, "state": state.as_str().to_lowercase(), "found": found, "advice": advice})
        });
        writeln!(out, "{}", json!({"wrong": wrong_count, "findings": rows.collect::<Vec<_>>()}))?;
    } else {
        let rows = findings.iter().map(|finding| {
            let state = finding.state.as_str().to_owned();
            [state, finding.what.clone(), finding.found.clone(), finding.advice.to_owned()]
        });
        writeln!(out, "{}", table::table(["STATE", "CHECK", "RESULT", "ADVICE"], rows))?;
    }
    match wrong_count {
        0 => Ok(()),
        1 => Err(anyhow::anyhow!("1 check failed").into()),
        count => Err(anyhow::anyhow!("{count} checks failed").into()),
    }
}

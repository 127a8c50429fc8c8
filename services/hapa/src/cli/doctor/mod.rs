//! `hapa doctor`: looks at all that the mesh stands on, from where it is called, and says what is wrong
//! and what to do. It changes nothing, and every look is bounded.

mod looks;
mod process;

use std::io::Write as _;
use std::path::PathBuf;

use serde_json::json;

use crate::cli::{Failure, table};
use crate::{All, Roles};

#[derive(clap::Args, Clone, Debug)]
#[group(id = "doctor_args")]
pub(super) struct Args {
    #[command(flatten)]
    settings: All,
    /// The gateway, such as http://127.0.0.1:8000; default: it is not looked at.
    #[arg(long, env = "GATEWAY_ADDRESS")]
    gateway_address: Option<String>,
    /// The authorities, as PEM, that vouch for an https:// gateway; default: those of this machine.
    #[arg(long, env = "HAPA_CA_FILE", value_name = "FILE")]
    ca_file: Option<PathBuf>,
    /// One JSON object.
    #[arg(long)]
    json: bool,
}

/// What was found of one thing.
#[derive(Clone, Debug, PartialEq, Eq)]
enum State {
    Well,
    /// Nothing is broken, but someone should know.
    Note,
    Ill,
    /// There is nothing to look at.
    Absent,
}

impl State {
    fn word(&self) -> &'static str {
        match self {
            State::Well => "ok",
            State::Note => "note",
            State::Ill => "WRONG",
            State::Absent => "-",
        }
    }
}

/// A line of the report.
#[derive(Clone, Debug)]
struct Finding {
    what: String,
    state: State,
    found: String,
    /// What to do about it.
    advice: &'static str,
}

impl Finding {
    fn well(what: impl Into<String>, found: impl Into<String>) -> Finding {
        Finding::new(State::Well, what, found, "")
    }

    fn absent(what: impl Into<String>, found: impl Into<String>) -> Finding {
        Finding::new(State::Absent, what, found, "")
    }

    fn ill(what: impl Into<String>, found: impl Into<String>, advice: &'static str) -> Finding {
        Finding::new(State::Ill, what, found, advice)
    }

    fn note(what: impl Into<String>, found: impl Into<String>, advice: &'static str) -> Finding {
        Finding::new(State::Note, what, found, advice)
    }

    fn new(
        state: State,
        what: impl Into<String>,
        found: impl Into<String>,
        advice: &'static str,
    ) -> Finding {
        Finding { what: what.into(), state, found: found.into(), advice }
    }
}

pub(super) async fn doctor(args: Args) -> Result<(), Failure> {
    let roles = Roles::from(args.settings);
    let mut findings = looks::settings(&roles);
    findings.extend(process::process(&roles));
    findings.extend(looks::stores(&roles).await);
    findings.extend(process::pepper(&roles, &findings).await);
    findings.push(looks::redis(&roles).await);
    findings.extend(looks::engines(&roles).await);
    findings.push(looks::certificates(&roles));
    findings.extend(looks::gateway(args.gateway_address.as_deref(), args.ca_file.as_ref()).await);
    findings.extend(looks::spools(&roles).await);
    let ill = findings.iter().filter(|finding| finding.state == State::Ill).count();
    let mut out = std::io::stdout();
    if args.json {
        let rows = findings.iter().map(|finding| {
            let Finding { what, state, found, advice } = finding;
            json!({"what": what, "state": state.word().to_lowercase(), "found": found, "advice": advice})
        });
        writeln!(out, "{}", json!({"wrong": ill, "findings": rows.collect::<Vec<_>>()}))?;
    } else {
        let rows = findings.iter().map(|finding| {
            let state = finding.state.word().to_owned();
            [state, finding.what.clone(), finding.found.clone(), finding.advice.to_owned()]
        });
        writeln!(out, "{}", table::table(["STATE", "WHAT", "FOUND", "WHAT TO DO"], rows))?;
    }
    match ill {
        0 => Ok(()),
        1 => Err(anyhow::anyhow!("one thing is wrong").into()),
        more => Err(anyhow::anyhow!("{more} things are wrong").into()),
    }
}

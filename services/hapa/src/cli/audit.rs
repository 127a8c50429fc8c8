//! `hapa audit`: who changed what, and whether the log of that is as it was written.

use std::io::Write as _;

use anyhow::anyhow;
use hapa_proto::auth::v1::audit_service_client::AuditServiceClient;
use hapa_proto::auth::v1::{
    AuditEntry, ListAuditEntriesRequest, VerifyAuditLogRequest, VerifyAuditLogResponse,
};
use prost_types::Timestamp;

use crate::cli::table::{plain, second, table};
use crate::cli::{Failure, connection, json, moment};

const LARGEST_PAGE: u32 = 1_000;

#[derive(Clone, Debug, clap::Subcommand)]
pub(super) enum Command {
    /// List changes to keys, users and sessions, newest first.
    List(List),
    /// Check that nothing in the log was changed, removed or put in; exit code 1 where something was.
    Verify(Verify),
}

#[derive(clap::Args, Clone, Debug)]
#[group(id = "audit_list_args")]
pub(super) struct List {
    /// Only what this actor did: key:key_…, session:ses_…, mesh or anonymous.
    #[arg(long, default_value = "", hide_default_value = true)]
    actor: String,
    /// Only what happened to this subject: key:key_…, user:usr_… or session:ses_….
    #[arg(long, default_value = "", hide_default_value = true)]
    subject: String,
    /// Only this action, such as key.revoke, or all of a kind, such as key.
    #[arg(long, default_value = "", hide_default_value = true)]
    action: String,
    /// Only from this time on: 2026-01-31T12:00:00Z, or so long ago: 24h, 7d.
    #[arg(long, value_name = "TIME", value_parser = moment::moment)]
    since: Option<Timestamp>,
    /// Only before this time: 2026-01-31T12:00:00Z, or so long ago: 24h, 7d.
    #[arg(long, value_name = "TIME", value_parser = moment::moment)]
    until: Option<Timestamp>,
    /// Show so many entries at most; 0: all.
    #[arg(long, value_name = "N", default_value_t = 100)]
    limit: u32,
    /// Each entry as a line of JSON, with its hash.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    connection: connection::Args,
}

#[derive(clap::Args, Clone, Debug)]
#[group(id = "audit_verify_args")]
pub(super) struct Verify {
    /// What was found, as JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    connection: connection::Args,
}

pub(super) async fn execute(command: Command) -> Result<(), Failure> {
    match command {
        Command::List(args) => list(args).await,
        Command::Verify(args) => verify(args).await,
    }
}

async fn list(args: List) -> Result<(), Failure> {
    let mut client = AuditServiceClient::new(args.connection.as_operator().await?);
    let mut request = ListAuditEntriesRequest {
        actor: args.actor,
        subject: args.subject,
        action: args.action,
        start_time: args.since,
        end_time: args.until,
        ..ListAuditEntriesRequest::default()
    };
    let mut rest = if args.limit == 0 { u32::MAX } else { args.limit };
    let mut entries = Vec::new();
    let mut out = std::io::stdout();
    let more = loop {
        request.page_size = i32::try_from(rest.min(LARGEST_PAGE))?;
        let page = client.list_audit_entries(request.clone()).await?.into_inner();
        rest = rest.saturating_sub(u32::try_from(page.entries.len())?);
        if args.json {
            for entry in &page.entries {
                writeln!(out, "{}", json::json(entry)?)?;
            }
        } else {
            entries.extend(page.entries);
        }
        if rest == 0 || page.next_page_token.is_empty() {
            break !page.next_page_token.is_empty();
        }
        request.page_token = page.next_page_token;
    };
    if !args.json {
        let header = ["ENTRY", "TIME", "ACTION", "SUBJECT", "ACTOR", "OWNER", "FROM", "DETAIL"];
        writeln!(out, "{}", table(header, entries.into_iter().map(row)))?;
    }
    if more {
        writeln!(anstream::stderr(), "There are older entries; --limit 0 lists all.")?;
    }
    Ok(())
}

fn row(entry: AuditEntry) -> [String; 8] {
    let AuditEntry { sequence, time, action, subject, actor, owner, address, detail, .. } = entry;
    let time = second(time.as_ref());
    [sequence.to_string(), time, action, subject, actor, owner, address, detail]
}

async fn verify(args: Verify) -> Result<(), Failure> {
    let mut client = AuditServiceClient::new(args.connection.as_operator().await?);
    let reply = client.verify_audit_log(VerifyAuditLogRequest {}).await?.into_inner();
    let VerifyAuditLogResponse { intact, entries, head_hash, broken_sequence, problem } = &reply;
    let mut out = std::io::stdout();
    if args.json {
        writeln!(out, "{}", json::json(&reply)?)?;
    } else if *intact {
        writeln!(out, "the audit log is as it was written: {entries} entries, head {head_hash}")?;
    }
    if *intact {
        return Ok(());
    }
    let problem = plain(problem);
    let words = format!("the audit log is broken at entry {broken_sequence}: {problem}");
    Err(anyhow!("{words} ({entries} entries were read)").into())
}

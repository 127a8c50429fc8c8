//! `hapa audit`: the log of changes to keys, users and sessions, and the check of its hash chain.

use std::io::Write as _;

use anyhow::anyhow;
use hapa_proto::auth::v1::audit_service_client::AuditServiceClient;
use hapa_proto::auth::v1::{
    AuditEntry, ListAuditEntriesRequest, VerifyAuditLogRequest, VerifyAuditLogResponse,
};
use prost_types::Timestamp;

use crate::cli::connection::ConnectionArgs;
use crate::cli::paging::{Page, for_each_page};
use crate::cli::table::{sanitize, table, to_second};
use crate::cli::{CliError, json, time_args};

#[derive(Clone, Debug, clap::Subcommand)]
pub(super) enum AuditCommand {
    /// List changes to keys, users and sessions, newest first.
    List(ListAuditArgs),
    /// Verify that no entry of the log was modified, removed or inserted; the exit code is 1 if one was.
    Verify(VerifyAuditArgs),
}

#[derive(clap::Args, Clone, Debug)]
#[command(after_help = "Example:\n  hapa audit list --action key --since 7d")]
pub(super) struct ListAuditArgs {
    /// Only changes by this actor: key:key_…, session:ses_…, mesh or anonymous.
    #[arg(long, default_value = "", hide_default_value = true)]
    actor: String,
    /// Only changes to this subject: key:key_…, user:usr_… or session:ses_….
    #[arg(long, default_value = "", hide_default_value = true)]
    subject: String,
    /// Only this action, such as key.revoke, or all actions of a kind, such as key.
    #[arg(long, default_value = "", hide_default_value = true)]
    action: String,
    /// Only from this time on: 2026-01-31T12:00:00Z, or a duration before the current time: 24h, 7d.
    #[arg(long, value_name = "TIME", value_parser = time_args::parse_time)]
    since: Option<Timestamp>,
    /// Only before this time: 2026-01-31T12:00:00Z, or a duration before the current time: 24h, 7d.
    #[arg(long, value_name = "TIME", value_parser = time_args::parse_time)]
    until: Option<Timestamp>,
    /// Maximum number of entries; 0: all.
    #[arg(long, value_name = "N", default_value_t = 100)]
    limit: u32,
    /// Print one JSON object per entry, with its hash.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    connection: ConnectionArgs,
}

#[derive(clap::Args, Clone, Debug)]
pub(super) struct VerifyAuditArgs {
    /// Print the result as JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    connection: ConnectionArgs,
}

pub(super) async fn execute(command: AuditCommand) -> Result<(), CliError> {
    match command {
        AuditCommand::List(args) => list(args).await,
        AuditCommand::Verify(args) => verify(args).await,
    }
}

async fn list(args: ListAuditArgs) -> Result<(), CliError> {
    let mut client = AuditServiceClient::new(args.connection.connect_as_operator().await?);
    let request = ListAuditEntriesRequest {
        actor: args.actor,
        subject: args.subject,
        action: args.action,
        start_time: args.since,
        end_time: args.until,
        ..ListAuditEntriesRequest::default()
    };
    let fetch = async |page_size, page_token| {
        let request = ListAuditEntriesRequest { page_size, page_token, ..request.clone() };
        let reply = client.list_audit_entries(request).await?.into_inner();
        Ok(Page { rows: reply.entries, next_page_token: reply.next_page_token })
    };
    let mut entries = Vec::new();
    let on_page = |page: Vec<AuditEntry>| {
        if args.json {
            return json::print_lines(&page);
        }
        entries.extend(page);
        Ok(())
    };
    let has_more = for_each_page(args.limit, fetch, on_page).await?;
    if !args.json {
        let header = ["ENTRY", "TIME", "ACTION", "SUBJECT", "ACTOR", "OWNER", "ADDRESS", "DETAIL"];
        writeln!(std::io::stdout(), "{}", table(header, entries.into_iter().map(row)))?;
    }
    if has_more {
        writeln!(anstream::stderr(), "Older entries exist; --limit 0 lists all.")?;
    }
    Ok(())
}

fn row(entry: AuditEntry) -> [String; 8] {
    let AuditEntry { sequence, time, action, subject, actor, owner, address, detail, .. } = entry;
    let time = to_second(time.as_ref());
    [sequence.to_string(), time, action, subject, actor, owner, address, detail]
}

async fn verify(args: VerifyAuditArgs) -> Result<(), CliError> {
    let mut client = AuditServiceClient::new(args.connection.connect_as_operator().await?);
    let reply = client.verify_audit_log(VerifyAuditLogRequest {}).await?.into_inner();
    if args.json {
        json::print(&reply)?;
    }
    let VerifyAuditLogResponse { intact, entries, head_hash, broken_sequence, problem } = reply;
    if !intact {
        let problem = sanitize(&problem);
        return Err(anyhow!(
            "the audit log is broken at entry {broken_sequence}: {problem} ({entries} entries were \
             verified); restore the auth store from a backup"
        )
        .into());
    }
    if !args.json {
        writeln!(
            std::io::stdout(),
            "the audit log is intact: {entries} entries, head hash {head_hash}"
        )?;
    }
    Ok(())
}

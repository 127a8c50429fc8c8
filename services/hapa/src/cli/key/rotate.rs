//! `hapa key rotate`: a new secret for a key, while the old secret works for an overlap.

use std::io::Write as _;
use std::path::PathBuf;

use hapa_proto::auth::v1::key_service_client::KeyServiceClient;
use hapa_proto::auth::v1::{Key, RotateKeyRequest};

use super::{key_table, move_to_file, print_key};
use crate::cli::connection::ConnectionArgs;
use crate::cli::idempotency_key::IdempotencyArgs;
use crate::cli::table::to_second;
use crate::cli::{CliError, json, time_args};

/// Replace a key's secret and print the new one, once; the old one works for an overlap.
///
/// Clients change to the new secret during the overlap; `hapa key show` shows when each was last used.
/// The key's id, scopes, limits and expiry stay the same.
#[derive(clap::Args, Clone, Debug)]
#[command(after_help = "Example:\n  hapa key rotate key_123 --overlap 7d --out data/new-key")]
pub(in crate::cli) struct RotateKeyArgs {
    /// Key id, as `hapa key list` shows it.
    key_id: String,
    /// How long the old secret stays valid: 0 (revoked at once), 90s, 30m, 24h, 7d; at most 30d.
    #[arg(long, value_name = "DURATION", value_parser = time_args::parse_duration, default_value = "24h")]
    overlap: u32,
    /// Write the key to this file, with mode 600, instead of printing it.
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Print the reply as JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    idempotency: IdempotencyArgs,
    #[command(flatten)]
    connection: ConnectionArgs,
}

pub(super) async fn rotate(args: RotateKeyArgs) -> Result<(), CliError> {
    let request =
        RotateKeyRequest { key_id: args.key_id.clone(), overlap_seconds: Some(args.overlap) };
    let mut client = KeyServiceClient::new(args.connection.connect_as_operator().await?);
    let mut reply = client.rotate_key(args.idempotency.request(request)?).await?.into_inner();
    move_to_file(&mut reply.key_text, args.out.as_deref(), &args.key_id)?;
    if args.json {
        return json::print(&reply);
    }
    if let Some(key) = &reply.key {
        let mut stderr = anstream::stderr();
        writeln!(stderr, "{}", key_table(std::slice::from_ref(key)))?;
        writeln!(stderr, "{}", old_secret_message(key, args.overlap))?;
    }
    print_key(&reply.key_text, args.out.as_deref())
}

fn old_secret_message(key: &Key, overlap: u32) -> String {
    match key.texts.get(1).map(|secret| secret.expire_time.as_ref()) {
        _ if overlap == 0 => "The old secret is revoked.".to_owned(),
        Some(Some(end)) => format!("The old secret works until {} UTC.", to_second(Some(end))),
        _ => format!("`hapa key show {}` shows until when the old secret works.", key.key_id),
    }
}

//! `hapa key rotate`: a new text for a key, and until when the old one works.

use std::io::Write as _;
use std::path::PathBuf;

use hapa_proto::auth::v1::key_service_client::KeyServiceClient;
use hapa_proto::auth::v1::{Key, RotateKeyRequest};

use super::{hand_out, keep, keys};
use crate::cli::table::second;
use crate::cli::{Failure, connection, json, moment, once};

/// Give a key a new text and show it, once; the old text works on for a while.
///
/// Holders change to the new text while both work; `hapa key show` tells when each was last used.
/// The key's id, scopes, limits and end stay as they are.
#[derive(clap::Args, Clone, Debug)]
#[group(id = "key_rotate_args")]
pub(in crate::cli) struct Args {
    /// The key's id, as `hapa key list` shows it.
    key_id: String,
    /// How long the old text works on: 0 (it ends now), 90s, 30m, 24h, 7d; at most 30d.
    #[arg(long, value_name = "SPAN", value_parser = moment::span, default_value = "24h")]
    overlap: u32,
    /// Write the text to this file, readable by its owner alone, in place of showing it.
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// The reply as JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    once: once::Args,
    #[command(flatten)]
    connection: connection::Args,
}

pub(super) async fn rotate(args: Args) -> Result<(), Failure> {
    let request =
        RotateKeyRequest { key_id: args.key_id.clone(), overlap_seconds: Some(args.overlap) };
    let mut client = KeyServiceClient::new(args.connection.as_operator().await?);
    let mut reply = client.rotate_key(args.once.request(request)?).await?.into_inner();
    keep(&mut reply.key_text, args.out.as_deref(), &args.key_id)?;
    if args.json {
        writeln!(std::io::stdout(), "{}", json::json(&reply)?)?;
        return Ok(());
    }
    if let Some(key) = &reply.key {
        let mut notes = anstream::stderr();
        writeln!(notes, "{}", keys(std::slice::from_ref(key)))?;
        writeln!(notes, "{}", old_text(key, args.overlap))?;
    }
    hand_out(&reply.key_text, args.out.as_deref())
}

fn old_text(key: &Key, overlap: u32) -> String {
    match key.texts.get(1).map(|text| text.expire_time.as_ref()) {
        _ if overlap == 0 => "The old text has ended.".to_owned(),
        Some(Some(end)) => format!("The old text works until {} UTC.", second(Some(end))),
        _ => format!("`hapa key show {}` says until when the old text works.", key.key_id),
    }
}

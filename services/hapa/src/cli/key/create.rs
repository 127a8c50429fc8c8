//! `hapa key create`.

use std::io::Write as _;
use std::path::PathBuf;

use hapa_proto::auth::v1::create_key_request::Expiry;
use hapa_proto::auth::v1::key_service_client::KeyServiceClient;
use hapa_proto::auth::v1::{CreateKeyRequest, RateLimit};

use super::{all_scopes, hand_out, keep, keys, limit, no_limits};
use crate::cli::{Failure, budget, connection, json, once};

/// Make a key and show its text, once.
#[derive(clap::Args, Clone, Debug)]
#[expect(clippy::struct_excessive_bools, reason = "they are flags")]
#[group(id = "key_create_args")]
pub(in crate::cli) struct Args {
    /// What the key is for.
    #[arg(long)]
    name: String,
    /// Whose key it is: a user's id, or any other name; only a session needs none: its own user.
    #[arg(long)]
    owner: Option<String>,
    /// What it may do, such as codegen:generate; can be repeated.
    #[arg(long = "scope", required_unless_present = "all_scopes")]
    scopes: Vec<String>,
    /// It may do everything.
    #[arg(long, conflicts_with = "scopes")]
    all_scopes: bool,
    /// Days until it ends; default: API_KEY_EXPIRY_DAYS of the auth service.
    #[arg(long, conflicts_with = "never_expires")]
    ttl_days: Option<u32>,
    /// It ends only when it is revoked.
    #[arg(long)]
    never_expires: bool,
    /// A limit, such as GenerateCode=50/60 (calls / seconds) or *=0 (none); can be repeated.
    #[arg(long = "limit", value_parser = limit)]
    limits: Vec<RateLimit>,
    /// No limits at all.
    #[arg(long, conflicts_with = "limits")]
    unlimited: bool,
    /// A model that it may use; can be repeated; default: all.
    #[arg(long = "model")]
    models: Vec<String>,
    #[command(flatten)]
    budget: budget::Args,
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

pub(super) async fn create(args: Args) -> Result<(), Failure> {
    let request = CreateKeyRequest {
        name: args.name,
        owner: args.owner.unwrap_or_default(),
        scopes: if args.all_scopes { all_scopes() } else { args.scopes },
        expiry: match (args.never_expires, args.ttl_days) {
            (true, _) => Some(Expiry::NeverExpires(true)),
            (false, days) => days.map(Expiry::TtlDays),
        },
        rate_limits: if args.unlimited { no_limits() } else { args.limits },
        allowed_models: args.models,
        token_budget: args.budget.budget(),
    };
    let mut client = KeyServiceClient::new(args.connection.as_operator().await?);
    let mut reply = client.create_key(args.once.request(request)?).await?.into_inner();
    let key_id = reply.key.as_ref().map(|key| key.key_id.as_str()).unwrap_or_default();
    keep(&mut reply.key_text, args.out.as_deref(), key_id)?;
    if args.json {
        writeln!(std::io::stdout(), "{}", json::json(&reply)?)?;
        return Ok(());
    }
    if let Some(key) = &reply.key {
        writeln!(anstream::stderr(), "{}", keys(std::slice::from_ref(key)))?;
    }
    hand_out(&reply.key_text, args.out.as_deref())
}

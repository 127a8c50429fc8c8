//! `hapa key create`.

use std::io::Write as _;
use std::path::PathBuf;

use hapa_proto::auth::v1::create_key_request::Expiry;
use hapa_proto::auth::v1::key_service_client::KeyServiceClient;
use hapa_proto::auth::v1::{CreateKeyRequest, RateLimit};

use super::{all_scopes, key_table, move_to_file, parse_rate_limit, print_key, unlimited};
use crate::cli::budget::BudgetArgs;
use crate::cli::connection::ConnectionArgs;
use crate::cli::idempotency_key::IdempotencyArgs;
use crate::cli::{CliError, json};

/// Create a key and print it, once.
///
/// The key goes to standard output, everything else to standard error.
#[derive(clap::Args, Clone, Debug)]
#[command(after_help = "Examples:\n  \
    hapa key create --name ci --owner team --scope codegen:generate --ttl-days 30\n  \
    hapa key create --name me --owner me --all-scopes --unlimited --out data/my-key")]
#[expect(clippy::struct_excessive_bools, reason = "they are flags")]
pub(in crate::cli) struct CreateKeyArgs {
    /// Purpose of the key.
    #[arg(long)]
    name: String,
    /// Owner of the key: a user id or any other name; with --as-me the default is the user of the session.
    #[arg(long)]
    owner: Option<String>,
    /// Scope to grant, such as codegen:generate; repeatable.
    #[arg(long = "scope", value_name = "SCOPE", required_unless_present = "all_scopes")]
    scopes: Vec<String>,
    /// Grant every scope.
    #[arg(long, conflicts_with = "scopes")]
    all_scopes: bool,
    /// Days until the key expires; default: API_KEY_EXPIRY_DAYS of the auth service.
    #[arg(long, value_name = "DAYS", conflicts_with = "never_expires")]
    ttl_days: Option<u32>,
    /// The key does not expire; it works until it is revoked.
    #[arg(long)]
    never_expires: bool,
    /// Rate limit as METHOD=CALLS/SECONDS, such as GenerateCode=50/60, or *=0 for none; repeatable.
    #[arg(long = "limit", value_name = "LIMIT", value_parser = parse_rate_limit)]
    limits: Vec<RateLimit>,
    /// No rate limits.
    #[arg(long, conflicts_with = "limits")]
    unlimited: bool,
    /// Model that the key may use; repeatable; default: all.
    #[arg(long = "model", value_name = "MODEL")]
    models: Vec<String>,
    #[command(flatten)]
    budget: BudgetArgs,
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

pub(super) async fn create(args: CreateKeyArgs) -> Result<(), CliError> {
    let request = CreateKeyRequest {
        name: args.name,
        owner: args.owner.unwrap_or_default(),
        scopes: if args.all_scopes { all_scopes() } else { args.scopes },
        expiry: match (args.never_expires, args.ttl_days) {
            (true, _) => Some(Expiry::NeverExpires(true)),
            (false, days) => days.map(Expiry::TtlDays),
        },
        rate_limits: if args.unlimited { unlimited() } else { args.limits },
        allowed_models: args.models,
        token_budget: args.budget.budget(),
    };
    let mut client = KeyServiceClient::new(args.connection.connect_as_operator().await?);
    let mut reply = client.create_key(args.idempotency.request(request)?).await?.into_inner();
    let key_id = reply.key.as_ref().map(|key| key.key_id.as_str()).unwrap_or_default();
    move_to_file(&mut reply.key_text, args.out.as_deref(), key_id)?;
    if args.json {
        return json::print(&reply);
    }
    if let Some(key) = &reply.key {
        writeln!(anstream::stderr(), "{}", key_table(std::slice::from_ref(key)))?;
    }
    print_key(&reply.key_text, args.out.as_deref())
}

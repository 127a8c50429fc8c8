//! `hapa key update`: the flags of the command determine the update mask.

use hapa_proto::auth::v1::key_service_client::KeyServiceClient;
use hapa_proto::auth::v1::{RateLimit, UpdateKeyRequest};
use prost_types::FieldMask;

use super::{all_scopes, get, parse_rate_limit, show, unlimited};
use crate::cli::connection::{Connection, ConnectionArgs};
use crate::cli::time_args::{self, KeyExpiry};
use crate::cli::{CliError, budget};

/// Change the name, scopes, limits, models, budget or expiry of a key.
///
/// Fields without a flag keep their value. A withdrawn permission ends within 1 s, also for open streams.
#[derive(clap::Args, Clone, Debug)]
#[command(after_help = "Example:\n  hapa key update key_123 --scope errors:read --ttl-days 90")]
pub(in crate::cli) struct UpdateKeyArgs {
    /// Key id, as `hapa key list` shows it.
    key_id: String,
    /// Print the updated key as JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    changes: KeyChanges,
    #[command(flatten)]
    connection: ConnectionArgs,
}

#[derive(clap::Args, Clone, Debug)]
#[expect(clippy::struct_excessive_bools, reason = "they are flags")]
#[command(next_help_heading = "Changes (at least one)")]
#[group(required = true, multiple = true)]
struct KeyChanges {
    /// Purpose of the key.
    #[arg(long)]
    name: Option<String>,
    /// Scope to grant, replacing all scopes of the key; repeatable.
    #[arg(long = "scope", value_name = "SCOPE")]
    scopes: Vec<String>,
    /// Grant every scope.
    #[arg(long, conflicts_with = "scopes")]
    all_scopes: bool,
    /// Rate limit as METHOD=CALLS/SECONDS, such as GenerateCode=50/60, replacing all limits of the key;
    /// repeatable.
    #[arg(long = "limit", value_name = "LIMIT", value_parser = parse_rate_limit)]
    limits: Vec<RateLimit>,
    /// No rate limits.
    #[arg(long, conflicts_with = "limits")]
    unlimited: bool,
    /// The default rate limits of the mesh, and none of the key's own.
    #[arg(long, conflicts_with_all = ["limits", "unlimited"])]
    default_limits: bool,
    /// Model that the key may use, replacing all models of the key; repeatable.
    #[arg(long = "model", value_name = "MODEL", alias = "models")]
    models: Vec<String>,
    /// The key may use every model.
    #[arg(long, conflicts_with = "models")]
    all_models: bool,
    /// Token budget per day (UTC); 0: no limit.
    #[arg(long, value_name = "N", value_parser = budget::token_count_parser())]
    tokens_per_day: Option<i64>,
    /// Token budget per month (UTC); 0: no limit.
    #[arg(long, value_name = "N", value_parser = budget::token_count_parser())]
    tokens_per_month: Option<i64>,
    /// Expiry: a time such as 2026-01-31T12:00:00Z, or never.
    #[arg(long, value_name = "TIME|never", value_parser = time_args::parse_expiry)]
    expires: Option<KeyExpiry>,
    /// Days from now until the key expires, 1 to 3650.
    #[arg(long, value_name = "DAYS", conflicts_with = "expires",
        value_parser = clap::value_parser!(u32).range(1..=3_650))]
    ttl_days: Option<u32>,
}

pub(super) async fn update(args: UpdateKeyArgs) -> Result<(), CliError> {
    let mut client = KeyServiceClient::new(args.connection.connect_as_operator().await?);
    let request = request(args.key_id, args.changes, &mut client).await?;
    let reply = client.update_key(request).await?.into_inner();
    let key = reply.key.ok_or_else(|| anyhow::anyhow!("the mesh returned no key"))?;
    show::print(&key, args.json)
}

/// The API replaces both budgets together, so a budget without a flag is read first.
async fn request(
    key_id: String,
    changes: KeyChanges,
    client: &mut KeyServiceClient<Connection>,
) -> Result<UpdateKeyRequest, CliError> {
    let (per_day, per_month) = (changes.tokens_per_day, changes.tokens_per_month);
    let old = if budget::is_partial(per_day, per_month) {
        get(client, key_id.clone()).await?.token_budget
    } else {
        None
    };
    let token_budget = budget::merge(old, per_day, per_month);
    Ok(UpdateKeyRequest { key_id, token_budget, ..changes.into() })
}

impl From<KeyChanges> for UpdateKeyRequest {
    fn from(changes: KeyChanges) -> UpdateKeyRequest {
        let fields = [
            ("name", changes.name.is_some()),
            ("scopes", changes.all_scopes || !changes.scopes.is_empty()),
            ("expire_time", changes.expires.is_some() || changes.ttl_days.is_some()),
            (
                "rate_limits",
                changes.unlimited || changes.default_limits || !changes.limits.is_empty(),
            ),
            ("allowed_models", changes.all_models || !changes.models.is_empty()),
            (
                "token_budget",
                changes.tokens_per_day.is_some() || changes.tokens_per_month.is_some(),
            ),
        ];
        let paths = fields.into_iter().filter(|(_, is_set)| *is_set);
        let paths = paths.map(|(path, _)| path.to_owned());
        let update_mask = Some(FieldMask { paths: paths.collect() });
        let end = match changes.expires {
            Some(KeyExpiry::At(time)) => Some(time),
            Some(KeyExpiry::Never) | None => None,
        };
        UpdateKeyRequest {
            update_mask,
            name: changes.name.unwrap_or_default(),
            scopes: if changes.all_scopes { all_scopes() } else { changes.scopes },
            expire_time: end.or_else(|| changes.ttl_days.map(time_args::days_from_now)),
            rate_limits: if changes.unlimited { unlimited() } else { changes.limits },
            allowed_models: changes.models,
            ..UpdateKeyRequest::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct TestCommand {
        #[command(flatten)]
        args: UpdateKeyArgs,
    }

    fn read(line: &str) -> Result<UpdateKeyRequest, clap::Error> {
        let words = ["update", "key_1"].into_iter().chain(line.split_whitespace());
        TestCommand::try_parse_from(words).map(|line| line.args.changes.into())
    }

    fn paths(line: &str) -> Vec<String> {
        read(line).unwrap().update_mask.unwrap().paths
    }

    #[test]
    fn the_update_mask_holds_exactly_the_fields_with_flags() {
        assert_eq!(paths("--name a"), ["name"]);
        assert_eq!(paths("--all-scopes --all-models"), ["scopes", "allowed_models"]);
        assert_eq!(paths("--default-limits --expires never"), ["expire_time", "rate_limits"]);
        assert_eq!(paths("--tokens-per-day 0"), ["token_budget"]);
        assert_eq!(read("--expires never").unwrap().expire_time, None);
        assert!(read("--ttl-days 7").unwrap().expire_time.is_some());
    }

    #[test]
    fn a_command_without_changes_or_with_contradictory_ones_is_refused() {
        for line in ["", "--json", "--scope a --all-scopes", "--expires never --ttl-days 1"] {
            assert!(read(line).is_err(), "{line}");
        }
    }
}

//! `hapa key update`: the flags that are given become the update mask.

use hapa_proto::auth::v1::key_service_client::KeyServiceClient;
use hapa_proto::auth::v1::{RateLimit, UpdateKeyRequest};
use prost_types::FieldMask;

use super::{all_scopes, get, limit, no_limits, show};
use crate::cli::connection::{self, Connection};
use crate::cli::moment::{self, End};
use crate::cli::{Failure, budget};

/// Change what a key may do, how much and for how long.
///
/// What no flag names stays as it was; what is taken away is gone within a second, for open streams
/// too.
#[derive(clap::Args, Clone, Debug)]
#[group(id = "key_update_args")]
pub(in crate::cli) struct Args {
    /// The key's id, as `hapa key list` shows it.
    key_id: String,
    /// The changed key as JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    changes: Changes,
    #[command(flatten)]
    connection: connection::Args,
}

#[derive(clap::Args, Clone, Debug)]
#[expect(clippy::struct_excessive_bools, reason = "they are flags")]
#[command(next_help_heading = "Changes (at least one)")]
#[group(id = "key_changes", required = true, multiple = true)]
struct Changes {
    /// What the key is for.
    #[arg(long)]
    name: Option<String>,
    /// What it may do, in place of all that it may now; can be repeated.
    #[arg(long = "scope")]
    scopes: Vec<String>,
    /// It may do everything.
    #[arg(long, conflicts_with = "scopes")]
    all_scopes: bool,
    /// A limit, such as GenerateCode=50/60 (calls / seconds), in place of all that it has; can be
    /// repeated.
    #[arg(long = "limit", value_parser = limit)]
    limits: Vec<RateLimit>,
    /// No limits at all.
    #[arg(long, conflicts_with = "limits")]
    unlimited: bool,
    /// The mesh's limits, and none of its own.
    #[arg(long, conflicts_with_all = ["limits", "unlimited"])]
    default_limits: bool,
    /// A model that it may use, in place of all that it may now; can be repeated.
    #[arg(long = "model", alias = "models")]
    models: Vec<String>,
    /// It may use every model.
    #[arg(long, conflicts_with = "models")]
    all_models: bool,
    /// Tokens that it may use in a day (UTC); 0: any number.
    #[arg(long, value_name = "N", value_parser = budget::tokens())]
    tokens_per_day: Option<i64>,
    /// Tokens that it may use in a month (UTC); 0: any number.
    #[arg(long, value_name = "N", value_parser = budget::tokens())]
    tokens_per_month: Option<i64>,
    /// When it ends: a time such as 2026-01-31T12:00:00Z, or never.
    #[arg(long, value_name = "TIME|never", value_parser = moment::end)]
    expires: Option<End>,
    /// Days from now until it ends.
    #[arg(long, value_name = "DAYS", conflicts_with = "expires",
        value_parser = clap::value_parser!(u32).range(1..=3_650))]
    ttl_days: Option<u32>,
}

pub(super) async fn update(args: Args) -> Result<(), Failure> {
    let mut client = KeyServiceClient::new(args.connection.as_operator().await?);
    let request = request(args.key_id, args.changes, &mut client).await?;
    let reply = client.update_key(request).await?.into_inner();
    let key = reply.key.ok_or_else(|| anyhow::anyhow!("the mesh answered without the key"))?;
    show::print(&key, args.json)
}

/// Budgets are set as one: the half that is not given is read first.
async fn request(
    key_id: String,
    changes: Changes,
    client: &mut KeyServiceClient<Connection>,
) -> Result<UpdateKeyRequest, Failure> {
    let (per_day, per_month) = (changes.tokens_per_day, changes.tokens_per_month);
    let old = if budget::is_half(per_day, per_month) {
        get(client, key_id.clone()).await?.token_budget
    } else {
        None
    };
    let token_budget = budget::changed(old, per_day, per_month);
    Ok(UpdateKeyRequest { key_id, token_budget, ..changes.into() })
}

impl From<Changes> for UpdateKeyRequest {
    fn from(changes: Changes) -> UpdateKeyRequest {
        let given = [
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
        let paths = given.into_iter().filter(|(_, given)| *given).map(|(path, _)| path.to_owned());
        let update_mask = Some(FieldMask { paths: paths.collect() });
        let end = match changes.expires {
            Some(End::At(time)) => Some(time),
            Some(End::Never) | None => None,
        };
        UpdateKeyRequest {
            update_mask,
            name: changes.name.unwrap_or_default(),
            scopes: if changes.all_scopes { all_scopes() } else { changes.scopes },
            expire_time: end.or_else(|| changes.ttl_days.map(moment::in_days)),
            rate_limits: if changes.unlimited { no_limits() } else { changes.limits },
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
    struct Line {
        #[command(flatten)]
        args: Args,
    }

    fn read(line: &str) -> Result<UpdateKeyRequest, clap::Error> {
        let words = ["update", "key_1"].into_iter().chain(line.split_whitespace());
        Line::try_parse_from(words).map(|line| line.args.changes.into())
    }

    fn paths(line: &str) -> Vec<String> {
        read(line).unwrap().update_mask.unwrap().paths
    }

    #[test]
    fn the_mask_names_what_was_given_and_nothing_else() {
        assert_eq!(paths("--name a"), ["name"]);
        assert_eq!(paths("--all-scopes --all-models"), ["scopes", "allowed_models"]);
        assert_eq!(paths("--default-limits --expires never"), ["expire_time", "rate_limits"]);
        assert_eq!(paths("--tokens-per-day 0"), ["token_budget"]);
        assert_eq!(read("--expires never").unwrap().expire_time, None);
        assert!(read("--ttl-days 7").unwrap().expire_time.is_some());
    }

    #[test]
    fn a_change_is_needed_and_two_that_fight_are_refused() {
        for line in ["", "--json", "--scope a --all-scopes", "--expires never --ttl-days 1"] {
            assert!(read(line).is_err(), "{line}");
        }
    }
}

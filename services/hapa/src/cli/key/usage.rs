//! `hapa key usage`: tokens used, held and left.

use std::io::Write as _;

use hapa_proto::auth::v1::key_service_client::KeyServiceClient;
use hapa_proto::auth::v1::{Key, ListKeysRequest};

use super::{get, list};
use crate::cli::table::table;
use crate::cli::{Failure, budget, connection, json};

/// Show how many tokens keys have used, and what is left of their budgets.
///
/// Days and months are those of UTC. Reserved tokens are held by generations that have not ended yet,
/// and count as used. A budget of the key's owner may leave less.
#[derive(clap::Args, Clone, Debug)]
#[group(id = "key_usage_args")]
pub(in crate::cli) struct Args {
    /// The key's id, as `hapa key list` shows it; default: all keys that you may see.
    key_id: Option<String>,
    /// Each key as a line of JSON, with its token_usage and its token_budget.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    connection: connection::Args,
}

pub(super) async fn usage(args: Args) -> Result<(), Failure> {
    let mut client = KeyServiceClient::new(args.connection.as_operator().await?);
    let mut keys = Vec::new();
    if let Some(key_id) = args.key_id {
        keys.push(get(&mut client, key_id).await?);
    } else {
        let collect = |page| {
            keys.extend(page);
            Ok(())
        };
        list::pages(&mut client, ListKeysRequest::default(), collect).await?;
    }
    let mut out = std::io::stdout();
    if args.json {
        for key in &keys {
            writeln!(out, "{}", json::json(key)?)?;
        }
        return Ok(());
    }
    let header =
        ["KEY ID", "NAME", "TODAY", "LEFT TODAY", "THIS MONTH", "LEFT THIS MONTH", "RESERVED"];
    writeln!(out, "{}", table(header, keys.into_iter().map(row)))?;
    Ok(())
}

fn row(key: Key) -> [String; 7] {
    let words = |left: Option<i64>| left.map_or_else(|| "any".to_owned(), |left| left.to_string());
    let (day, month) = budget::left(key.token_budget, key.token_usage);
    let usage = key.token_usage.unwrap_or_default();
    [
        key.key_id,
        key.name,
        usage.day_tokens.to_string(),
        words(day),
        usage.month_tokens.to_string(),
        words(month),
        usage.reserved_tokens.to_string(),
    ]
}

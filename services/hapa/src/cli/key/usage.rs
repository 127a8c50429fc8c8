//! `hapa key usage`: used, reserved and remaining tokens of keys.

use std::io::Write as _;

use hapa_proto::auth::v1::key_service_client::KeyServiceClient;
use hapa_proto::auth::v1::{Key, ListKeysRequest};

use super::{get, list};
use crate::cli::connection::ConnectionArgs;
use crate::cli::table::table;
use crate::cli::{CliError, budget, json};

/// Show the token usage of keys and the rest of their budgets.
///
/// Days and months are in UTC. Reserved tokens belong to generations in progress and count as used.
/// The budget of the key's owner may leave fewer tokens.
#[derive(clap::Args, Clone, Debug)]
pub(in crate::cli) struct KeyUsageArgs {
    /// Key id, as `hapa key list` shows it; default: all keys that you may list.
    key_id: Option<String>,
    /// Print one JSON object per key, with token_usage and token_budget.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    connection: ConnectionArgs,
}

pub(super) async fn usage(args: KeyUsageArgs) -> Result<(), CliError> {
    let mut client = KeyServiceClient::new(args.connection.connect_as_operator().await?);
    let mut keys = Vec::new();
    if let Some(key_id) = args.key_id {
        keys.push(get(&mut client, key_id).await?);
    } else {
        let collect = |page| {
            keys.extend(page);
            Ok(())
        };
        list::read_pages(&mut client, ListKeysRequest::default(), collect).await?;
    }
    if args.json {
        return json::print_lines(&keys);
    }
    let header =
        ["KEY ID", "NAME", "TODAY", "LEFT TODAY", "THIS MONTH", "LEFT THIS MONTH", "RESERVED"];
    writeln!(std::io::stdout(), "{}", table(header, keys.into_iter().map(row)))?;
    Ok(())
}

fn row(key: Key) -> [String; 7] {
    let describe = |tokens: Option<i64>| {
        tokens.map_or_else(|| "unlimited".to_owned(), |tokens| tokens.to_string())
    };
    let (day, month) = budget::remaining(key.token_budget, key.token_usage);
    let usage = key.token_usage.unwrap_or_default();
    [
        key.key_id,
        key.name,
        usage.day_tokens.to_string(),
        describe(day),
        usage.month_tokens.to_string(),
        describe(month),
        usage.reserved_tokens.to_string(),
    ]
}

//! `hapa key show`: the properties of one key, without its secret.

use std::io::Write as _;

use hapa_proto::auth::v1::key_service_client::KeyServiceClient;
use hapa_proto::auth::v1::{Key, KeyText, RateLimit};

use super::get;
use crate::cli::connection::ConnectionArgs;
use crate::cli::table::{field_table, table, to_minute};
use crate::cli::{CliError, budget, json};

/// Show the properties of a key; never its secret.
#[derive(clap::Args, Clone, Debug)]
pub(in crate::cli) struct ShowKeyArgs {
    /// Key id, as `hapa key list` shows it.
    key_id: String,
    /// Print the key as one JSON object.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    connection: ConnectionArgs,
}

pub(super) async fn show(args: ShowKeyArgs) -> Result<(), CliError> {
    let mut client = KeyServiceClient::new(args.connection.connect_as_operator().await?);
    let key = get(&mut client, args.key_id).await?;
    print(&key, args.json)
}

/// Prints a key to standard output.
pub(super) fn print(key: &Key, as_json: bool) -> Result<(), CliError> {
    if as_json {
        return json::print(key);
    }
    let models = match key.allowed_models.as_slice() {
        [] => "all".to_owned(),
        models => models.join(" "),
    };
    let rows = [
        ("KEY ID", key.key_id.clone()),
        ("NAME", key.name.clone()),
        ("OWNER", key.owner.clone()),
        ("SCOPES", key.scopes.join(" ")),
        ("LIMITS", describe_limits(&key.rate_limits)),
        ("MODELS", models),
        ("TOKEN BUDGET", budget::describe(key.token_budget)),
        ("TOKENS USED", budget::describe_usage(key.token_usage)),
        ("CREATED", to_minute(key.create_time.as_ref())),
        ("LAST USED", to_minute(key.last_use_time.as_ref())),
        ("EXPIRES", to_minute(key.expire_time.as_ref())),
        ("REVOKED", to_minute(key.revoke_time.as_ref())),
    ];
    let mut out = std::io::stdout();
    writeln!(out, "{}", field_table(rows))?;
    if !key.texts.is_empty() {
        let header = ["SECRET", "CREATED", "LAST USED", "EXPIRES"];
        writeln!(out, "\n{}", table(header, key.texts.iter().enumerate().map(secret_row)))?;
    }
    Ok(())
}

fn secret_row((index, secret): (usize, &KeyText)) -> [String; 4] {
    let name = if index == 0 { "newest" } else { "previous" }.to_owned();
    let expires = match &secret.expire_time {
        None => "with the key".to_owned(),
        time => to_minute(time.as_ref()),
    };
    let created = to_minute(secret.create_time.as_ref());
    [name, created, to_minute(secret.last_use_time.as_ref()), expires]
}

/// The limits in the syntax of `--limit`.
fn describe_limits(limits: &[RateLimit]) -> String {
    let describe = |RateLimit { method, limit, window_seconds }: &RateLimit| match limit {
        0 => format!("{method}=0"),
        limit => format!("{method}={limit}/{window_seconds}"),
    };
    match limits {
        [] => "the defaults".to_owned(),
        limits => limits.iter().map(describe).collect::<Vec<_>>().join(" "),
    }
}

#[cfg(test)]
mod tests {
    use super::super::parse_rate_limit;
    use super::*;

    #[test]
    fn limits_are_shown_in_the_syntax_of_the_flag() {
        let given = ["GenerateCode=50/60", "*=0"];
        let parsed = given.map(|text| parse_rate_limit(text).unwrap());
        assert_eq!(describe_limits(&parsed), given.join(" "));
        assert_eq!(describe_limits(&[]), "the defaults");
    }
}

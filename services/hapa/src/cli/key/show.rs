//! `hapa key show`: all about one key but its text.

use std::io::Write as _;

use hapa_proto::auth::v1::key_service_client::KeyServiceClient;
use hapa_proto::auth::v1::{Key, KeyText, RateLimit};

use super::get;
use crate::cli::table::{facts, table, time};
use crate::cli::{Failure, budget, connection, json};

/// Show all about a key but its text.
#[derive(clap::Args, Clone, Debug)]
#[group(id = "key_show_args")]
pub(in crate::cli) struct Args {
    /// The key's id, as `hapa key list` shows it.
    key_id: String,
    /// The key as one JSON object.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    connection: connection::Args,
}

pub(super) async fn show(args: Args) -> Result<(), Failure> {
    let mut client = KeyServiceClient::new(args.connection.as_operator().await?);
    let key = get(&mut client, args.key_id).await?;
    print(&key, args.json)
}

/// To standard output.
pub(super) fn print(key: &Key, as_json: bool) -> Result<(), Failure> {
    let mut out = std::io::stdout();
    if as_json {
        writeln!(out, "{}", json::json(key)?)?;
        return Ok(());
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
        ("LIMITS", limits(&key.rate_limits)),
        ("MODELS", models),
        ("TOKEN BUDGET", budget::words(key.token_budget)),
        ("TOKENS USED", budget::used(key.token_usage)),
        ("CREATED", time(key.create_time.as_ref())),
        ("LAST USED", time(key.last_use_time.as_ref())),
        ("EXPIRES", time(key.expire_time.as_ref())),
        ("REVOKED", time(key.revoke_time.as_ref())),
    ];
    writeln!(out, "{}", facts(rows))?;
    if !key.texts.is_empty() {
        let header = ["TEXT", "CREATED", "LAST USED", "ENDS"];
        writeln!(out, "\n{}", table(header, key.texts.iter().enumerate().map(text)))?;
    }
    Ok(())
}

fn text((number, text): (usize, &KeyText)) -> [String; 4] {
    let which = if number == 0 { "newest" } else { "before" }.to_owned();
    let ends = match &text.expire_time {
        None => "with the key".to_owned(),
        ends => time(ends.as_ref()),
    };
    [which, time(text.create_time.as_ref()), time(text.last_use_time.as_ref()), ends]
}

/// As `--limit` takes them.
fn limits(limits: &[RateLimit]) -> String {
    let words = |RateLimit { method, limit, window_seconds }: &RateLimit| match limit {
        0 => format!("{method}=0"),
        limit => format!("{method}={limit}/{window_seconds}"),
    };
    match limits {
        [] => "the defaults".to_owned(),
        limits => limits.iter().map(words).collect::<Vec<_>>().join(" "),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_shown_as_they_are_given() {
        let given = ["GenerateCode=50/60", "*=0"];
        let parsed = given.map(|text| super::super::limit(text).unwrap());
        assert_eq!(limits(&parsed), given.join(" "));
        assert_eq!(limits(&[]), "the defaults");
    }
}

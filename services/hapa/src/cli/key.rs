//! `hapa key`: API keys.

mod check;
mod create;
mod list;
mod revoke;
mod rotate;
mod show;
mod update;
mod usage;

use std::io::Write as _;
use std::path::Path;

use comfy_table::Table;
use hapa_core::access::SCOPES;
use hapa_proto::auth::v1::{GetKeyRequest, Key, RateLimit, key_service_client::KeyServiceClient};

use crate::cli::connection::Connection;
use crate::cli::table::{table, to_minute};
use crate::cli::{CliError, file_mode};

#[derive(Clone, Debug, clap::Subcommand)]
pub(super) enum KeyCommand {
    Create(create::CreateKeyArgs),
    List(list::ListKeysArgs),
    Show(show::ShowKeyArgs),
    Rotate(rotate::RotateKeyArgs),
    Update(Box<update::UpdateKeyArgs>),
    Usage(usage::KeyUsageArgs),
    Revoke(revoke::RevokeKeyArgs),
    Check(check::CheckKeyArgs),
}

pub(super) async fn execute(command: KeyCommand) -> Result<(), CliError> {
    match command {
        KeyCommand::Create(args) => create::create(args).await,
        KeyCommand::List(args) => list::list(args).await,
        KeyCommand::Show(args) => show::show(args).await,
        KeyCommand::Rotate(args) => rotate::rotate(args).await,
        KeyCommand::Update(args) => update::update(*args).await,
        KeyCommand::Usage(args) => usage::usage(args).await,
        KeyCommand::Revoke(args) => revoke::revoke(args).await,
        KeyCommand::Check(args) => check::check(args).await,
    }
}

async fn get(client: &mut KeyServiceClient<Connection>, key_id: String) -> Result<Key, CliError> {
    let reply = client.get_key(GetKeyRequest { key_id }).await?.into_inner();
    reply.key.ok_or_else(|| anyhow::anyhow!("the mesh returned no key").into())
}

fn key_table(keys: &[Key]) -> Table {
    let header =
        ["KEY ID", "NAME", "OWNER", "SCOPES", "CREATED", "LAST USED", "EXPIRES", "REVOKED"];
    let row = |key: &Key| {
        [
            key.key_id.clone(),
            key.name.clone(),
            key.owner.clone(),
            key.scopes.join(" "),
            to_minute(key.create_time.as_ref()),
            to_minute(key.last_use_time.as_ref()),
            to_minute(key.expire_time.as_ref()),
            to_minute(key.revoke_time.as_ref()),
        ]
    };
    table(header, keys.iter().map(row))
}

/// Prints the key to standard output, alone, or the name of the file that holds it.
fn print_key(secret: &str, file: Option<&Path>) -> Result<(), CliError> {
    let mut stderr = anstream::stderr();
    if let Some(file) = file {
        writeln!(stderr, "The key is in {}.", file.display())?;
    } else {
        writeln!(stderr, "The key, shown only this once:")?;
        writeln!(std::io::stdout(), "{secret}")?;
    }
    Ok(())
}

/// Moves a new secret from the reply to the file, if there is one. The mesh never returns a secret again: if the
/// file cannot be written, the error advises to rotate the key.
fn move_to_file(secret: &mut String, file: Option<&Path>, key_id: &str) -> Result<(), CliError> {
    if let Some(file) = file {
        let context =
            || format!("the new key is lost; create another with `hapa key rotate {key_id}`");
        anyhow::Context::with_context(file_mode::write_private(file, secret), context)?;
        secret.clear();
    }
    Ok(())
}

fn all_scopes() -> Vec<String> {
    SCOPES.iter().map(|scope| (*scope).to_owned()).collect()
}

/// A rate limit that lifts all limits.
fn unlimited() -> Vec<RateLimit> {
    vec![RateLimit { method: "*".to_owned(), limit: 0, window_seconds: 0 }]
}

fn parse_rate_limit(text: &str) -> Result<RateLimit, String> {
    let parse = || {
        let (method, rate) = text.split_once('=')?;
        let (limit, window) = rate.split_once('/').unwrap_or((rate, "0"));
        let (limit, window_seconds) = (limit.parse().ok()?, window.parse().ok()?);
        Some(RateLimit { method: method.to_owned(), limit, window_seconds })
    };
    parse().ok_or_else(|| "is not a rate limit such as GenerateCode=50/60".to_owned())
}

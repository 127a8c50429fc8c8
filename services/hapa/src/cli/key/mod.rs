//! `hapa key`: tables for people, `--json` for programs.

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
use hapa_proto::auth::v1::key_service_client::KeyServiceClient;
use hapa_proto::auth::v1::{GetKeyRequest, Key, RateLimit};

use crate::cli::connection::Connection;
use crate::cli::table::{table, time};
use crate::cli::{Failure, private};

#[derive(Clone, Debug, clap::Subcommand)]
pub(super) enum Command {
    Create(create::Args),
    List(list::Args),
    Show(show::Args),
    Rotate(rotate::Args),
    Update(Box<update::Args>),
    Usage(usage::Args),
    Revoke(revoke::Args),
    Check(check::Args),
}

pub(super) async fn execute(command: Command) -> Result<(), Failure> {
    match command {
        Command::Create(args) => create::create(args).await,
        Command::List(args) => list::list(args).await,
        Command::Show(args) => show::show(args).await,
        Command::Rotate(args) => rotate::rotate(args).await,
        Command::Update(args) => update::update(*args).await,
        Command::Usage(args) => usage::usage(args).await,
        Command::Revoke(args) => revoke::revoke(args).await,
        Command::Check(args) => check::check(args).await,
    }
}

async fn get(client: &mut KeyServiceClient<Connection>, key_id: String) -> Result<Key, Failure> {
    let reply = client.get_key(GetKeyRequest { key_id }).await?.into_inner();
    reply.key.ok_or_else(|| anyhow::anyhow!("the mesh answered without the key").into())
}

fn keys(keys: &[Key]) -> Table {
    let header =
        ["KEY ID", "NAME", "OWNER", "SCOPES", "CREATED", "LAST USED", "EXPIRES", "REVOKED"];
    let row = |key: &Key| {
        [
            key.key_id.clone(),
            key.name.clone(),
            key.owner.clone(),
            key.scopes.join(" "),
            time(key.create_time.as_ref()),
            time(key.last_use_time.as_ref()),
            time(key.expire_time.as_ref()),
            time(key.revoke_time.as_ref()),
        ]
    };
    table(header, keys.iter().map(row))
}

/// The one time that a text is seen: in the file, or on standard output, alone.
fn hand_out(text: &str, file: Option<&Path>) -> Result<(), Failure> {
    let mut notes = anstream::stderr();
    if let Some(file) = file {
        writeln!(notes, "The key's text is in {}.", file.display())?;
    } else {
        writeln!(notes, "The key's text, shown this once:")?;
        writeln!(std::io::stdout(), "{text}")?;
    }
    Ok(())
}

/// Keeps a new text in the file, if there is one, and out of the reply then. The text can't be had
/// again: where the file can't be written, the error says what to do.
fn keep(text: &mut String, file: Option<&Path>, key_id: &str) -> Result<(), Failure> {
    if let Some(file) = file {
        let lost = || format!("the new text is lost; `hapa key rotate {key_id}` makes another");
        anyhow::Context::with_context(private::write(file, text), lost)?;
        text.clear();
    }
    Ok(())
}

fn all_scopes() -> Vec<String> {
    SCOPES.iter().map(|scope| (*scope).to_owned()).collect()
}

fn no_limits() -> Vec<RateLimit> {
    vec![RateLimit { method: "*".to_owned(), limit: 0, window_seconds: 0 }]
}

fn limit(text: &str) -> Result<RateLimit, String> {
    let parse = || {
        let (method, rate) = text.split_once('=')?;
        let (limit, window) = rate.split_once('/').unwrap_or((rate, "0"));
        let (limit, window_seconds) = (limit.parse().ok()?, window.parse().ok()?);
        Some(RateLimit { method: method.to_owned(), limit, window_seconds })
    };
    parse().ok_or_else(|| "is not like GenerateCode=50/60".to_owned())
}

//! `hapa user show`: all about one user.

use std::io::Write as _;

use hapa_proto::auth::v1::User;

use super::{get, open};
use crate::cli::table::{facts, time};
use crate::cli::{Failure, budget, connection, json};

/// Show all about a user, and what its sessions and keys have used.
#[derive(clap::Args, Clone, Debug)]
#[group(id = "user_show_args")]
pub(in crate::cli) struct Args {
    /// The user: an id, an address, or me.
    user: String,
    /// The user as one JSON object.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    connection: connection::Args,
}

pub(super) async fn show(args: Args) -> Result<(), Failure> {
    let (mut client, user_id) = open(&args.user, &args.connection).await?;
    print(&get(&mut client, user_id).await?, args.json)
}

/// To standard output.
pub(super) fn print(user: &User, as_json: bool) -> Result<(), Failure> {
    let mut out = std::io::stdout();
    if as_json {
        writeln!(out, "{}", json::json(user)?)?;
        return Ok(());
    }
    let rows = [
        ("USER ID", user.user_id.clone()),
        ("EMAIL", user.email.clone()),
        ("NAME", user.name.clone()),
        ("SCOPES", user.scopes.join(" ")),
        ("PASSWORD", if user.has_password { "yes" } else { "no" }.to_owned()),
        ("TOKEN BUDGET", budget::words(user.token_budget)),
        ("TOKENS USED", budget::used(user.token_usage)),
        ("CREATED", time(user.create_time.as_ref())),
        ("CHANGED", time(user.update_time.as_ref())),
    ];
    writeln!(out, "{}", facts(rows))?;
    Ok(())
}

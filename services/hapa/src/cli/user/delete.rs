//! `hapa user delete`.

use std::io::{IsTerminal as _, Write as _};

use anyhow::anyhow;
use hapa_proto::auth::v1::{DeleteUserRequest, User};

use super::{get, open};
use crate::cli::table::plain;
use crate::cli::{Failure, connection, json};

/// Remove a user, and end its keys and sessions on every replica within a second.
///
/// Asks first on a terminal; from a pipe or a script it needs --yes.
#[derive(clap::Args, Clone, Debug)]
#[group(id = "user_delete_args")]
pub(in crate::cli) struct Args {
    /// The user: an id, an address, or me.
    user: String,
    /// Without asking.
    #[arg(long)]
    yes: bool,
    /// How many keys and sessions ended with it, as JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    connection: connection::Args,
}

pub(super) async fn delete(args: Args) -> Result<(), Failure> {
    if !args.yes && !std::io::stdin().is_terminal() {
        let words = "standard input is no terminal, so nobody can be asked: pass --yes";
        return Err(anyhow!(words).into());
    }
    let (mut client, user_id) = open(&args.user, &args.connection).await?;
    let user = get(&mut client, user_id).await?;
    if !args.yes && !agreed(&user)? {
        return Err(anyhow!("nothing was removed").into());
    }
    let request = DeleteUserRequest { user_id: user.user_id.clone() };
    let reply = client.delete_user(request).await?.into_inner();
    let mut out = std::io::stdout();
    if args.json {
        writeln!(out, "{}", json::json(&reply)?)?;
        return Ok(());
    }
    let (keys, sessions) = (reply.revoked_keys, reply.revoked_sessions);
    let (email, user_id) = (plain(&user.email), user.user_id);
    writeln!(out, "{email} ({user_id}) is gone; ended with it: keys {keys}, sessions {sessions}")?;
    Ok(())
}

fn agreed(user: &User) -> Result<bool, Failure> {
    let mut notes = anstream::stderr();
    let (email, user_id) = (plain(&user.email), &user.user_id);
    write!(notes, "Remove {email} ({user_id}), and end its keys and sessions? [y/N] ")?;
    notes.flush()?;
    let mut answer = String::new();
    std::io::stdin().read_line(&mut answer)?;
    Ok(matches!(answer.trim().to_lowercase().as_str(), "y" | "yes"))
}

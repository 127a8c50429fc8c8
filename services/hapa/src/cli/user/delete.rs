//! `hapa user delete`.

use std::io::Write as _;

use anyhow::anyhow;
use hapa_proto::auth::v1::DeleteUserRequest;

use super::{client_and_user_id, get};
use crate::cli::connection::ConnectionArgs;
use crate::cli::table::sanitize;
use crate::cli::{CliError, confirm, json};

/// Delete a user and revoke its keys and sessions; effective on every replica within 1 s.
///
/// Asks for confirmation on a terminal; scripts must pass --yes.
#[derive(clap::Args, Clone, Debug)]
pub(in crate::cli) struct DeleteUserArgs {
    /// User: an id, an email address, or `me`.
    user: String,
    /// Delete without confirmation.
    #[arg(long)]
    yes: bool,
    /// Print the numbers of revoked keys and sessions as JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    connection: ConnectionArgs,
}

pub(super) async fn delete(args: DeleteUserArgs) -> Result<(), CliError> {
    confirm::require_terminal_or_yes(args.yes)?;
    let (mut client, user_id) = client_and_user_id(&args.user, &args.connection).await?;
    let user = get(&mut client, user_id).await?;
    let (email, user_id) = (sanitize(&user.email), user.user_id);
    let question = format!("Delete {email} ({user_id}) and revoke its keys and sessions?");
    if !args.yes && !confirm::ask(&question)? {
        return Err(anyhow!("cancelled; nothing was deleted").into());
    }
    let request = DeleteUserRequest { user_id: user_id.clone() };
    let reply = client.delete_user(request).await?.into_inner();
    if args.json {
        return json::print(&reply);
    }
    let (keys, sessions) = (reply.revoked_keys, reply.revoked_sessions);
    writeln!(
        std::io::stdout(),
        "{email} ({user_id}) is deleted; revoked keys: {keys}, sessions: {sessions}"
    )?;
    Ok(())
}

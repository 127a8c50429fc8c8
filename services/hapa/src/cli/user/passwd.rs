//! `hapa user passwd`.

use std::io::Write as _;

use hapa_proto::auth::v1::{UpdateUserRequest, User};
use prost_types::FieldMask;

use super::{UserClient, client_and_user_id, get, require_user};
use crate::cli::connection::ConnectionArgs;
use crate::cli::{CliError, password};

/// Set a user's password and revoke all sessions of the user.
///
/// An admin sets the password of any user. Users that set their own (--as-me) must enter the current one.
#[derive(clap::Args, Clone, Debug)]
pub(in crate::cli) struct SetPasswordArgs {
    /// User: an id, an email address, or `me`.
    user: String,
    /// Read the new password from standard input, one line of 12 to 256 characters. For your own password,
    /// the current one is on the line before it.
    #[arg(long)]
    password_stdin: bool,
    #[command(flatten)]
    connection: ConnectionArgs,
}

pub(super) async fn set_password(args: SetPasswordArgs) -> Result<(), CliError> {
    let (mut client, user_id) = client_and_user_id(&args.user, &args.connection).await?;
    let current_password = if is_own(&mut client, &user_id, &args.connection).await {
        password::read_current("current password", args.password_stdin)?
    } else {
        String::new()
    };
    let password = password::read_new("new password", args.password_stdin, "--password-stdin")?;
    let update_mask = Some(FieldMask { paths: vec!["password".to_owned()] });
    let request = UpdateUserRequest {
        user_id,
        update_mask,
        password,
        current_password,
        ..UpdateUserRequest::default()
    };
    let reply = client.update_user(request).await?.into_inner();
    let User { user_id, email, .. } = require_user(reply.user)?;
    let mut out = std::io::stdout();
    writeln!(out, "{email} ({user_id}) has a new password; all its sessions are revoked")?;
    Ok(())
}

/// Whether the credential belongs to this user. A key without a user has no `me`.
async fn is_own(client: &mut UserClient, user_id: &str, connection: &ConnectionArgs) -> bool {
    let me = "me".to_owned();
    user_id == me
        || connection.has_identity() && get(client, me).await.is_ok_and(|me| me.user_id == user_id)
}

//! `hapa user passwd`.

use std::io::Write as _;

use hapa_proto::auth::v1::{UpdateUserRequest, User};
use prost_types::FieldMask;

use super::{Users, get, open, required};
use crate::cli::{Failure, connection, password};

/// Set a user's password; all its sessions end.
///
/// An admin sets anyone's. Who sets their own (--as-me) is asked for the one until now.
#[derive(clap::Args, Clone, Debug)]
#[group(id = "user_passwd_args")]
pub(in crate::cli) struct Args {
    /// The user: an id, an address, or me.
    user: String,
    /// Read the new password from standard input, one line of 12 to 256 characters; where users set
    /// their own, the one until now on a line before it.
    #[arg(long)]
    password_stdin: bool,
    #[command(flatten)]
    connection: connection::Args,
}

pub(super) async fn passwd(args: Args) -> Result<(), Failure> {
    let (mut client, user_id) = open(&args.user, &args.connection).await?;
    let current_password = if is_own(&mut client, &user_id, &args.connection).await {
        password::known("password until now", args.password_stdin)?
    } else {
        String::new()
    };
    let password = password::new("new password", args.password_stdin, "--password-stdin")?;
    let update_mask = Some(FieldMask { paths: vec!["password".to_owned()] });
    let request = UpdateUserRequest {
        user_id,
        update_mask,
        password,
        current_password,
        ..UpdateUserRequest::default()
    };
    let reply = client.update_user(request).await?.into_inner();
    let User { user_id, email, .. } = required(reply.user)?;
    let mut out = std::io::stdout();
    writeln!(out, "{email} ({user_id}) has a new password; all its sessions have ended")?;
    Ok(())
}

/// Whether the one who asks is the one who is open. Keys of no user have no "me".
async fn is_own(client: &mut Users, user_id: &str, connection: &connection::Args) -> bool {
    let me = "me".to_owned();
    user_id == me
        || connection.has_me() && get(client, me).await.is_ok_and(|me| me.user_id == user_id)
}

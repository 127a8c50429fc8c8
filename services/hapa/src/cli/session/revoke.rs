//! `hapa session revoke`.

use std::io::Write as _;

use hapa_proto::auth::v1::RevokeSessionRequest;
use hapa_proto::auth::v1::session_service_client::SessionServiceClient;

use crate::cli::{Failure, connection, json, user};

/// End a session, or all of a user, on every replica within a second.
#[derive(clap::Args, Clone, Debug)]
#[group(id = "session_revoke_args")]
pub(in crate::cli) struct Args {
    /// The session's id, as `hapa session list` shows it.
    #[arg(required_unless_present = "all", conflicts_with = "all")]
    session_id: Option<String>,
    /// All sessions of a user.
    #[arg(long)]
    all: bool,
    /// Whose, with --all: an id, an address, or me; default: me.
    #[arg(long, conflicts_with = "session_id")]
    user: Option<String>,
    /// How many ended, as JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    connection: connection::Args,
}

pub(super) async fn revoke(args: Args) -> Result<(), Failure> {
    let (connection, request) = if let Some(session_id) = args.session_id {
        let request = RevokeSessionRequest { session_id, ..Default::default() };
        (args.connection.as_operator().await?, request)
    } else {
        let whom = args.user.as_deref().unwrap_or("me");
        let (connection, all_of_user) = user::named(whom, &args.connection).await?;
        (connection, RevokeSessionRequest { all_of_user, ..Default::default() })
    };
    let mut client = SessionServiceClient::new(connection);
    let reply = client.revoke_session(request).await?.into_inner();
    let mut out = std::io::stdout();
    if args.json {
        writeln!(out, "{}", json::json(&reply)?)?;
    } else {
        writeln!(out, "sessions ended: {}", reply.revoked_sessions)?;
    }
    Ok(())
}

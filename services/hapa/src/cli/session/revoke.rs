//! `hapa session revoke`.

use std::io::Write as _;

use hapa_proto::auth::v1::RevokeSessionRequest;
use hapa_proto::auth::v1::session_service_client::SessionServiceClient;

use crate::cli::connection::ConnectionArgs;
use crate::cli::{CliError, json, user};

/// Revoke one session or all sessions of a user; effective on every replica within 1 s.
#[derive(clap::Args, Clone, Debug)]
#[command(after_help = "Example:\n  hapa session revoke --all --user mina@example.com")]
pub(in crate::cli) struct RevokeSessionArgs {
    /// Session id, as `hapa session list` shows it.
    #[arg(required_unless_present = "all", conflicts_with = "all")]
    session_id: Option<String>,
    /// Revoke all sessions of a user.
    #[arg(long)]
    all: bool,
    /// With --all, the user: an id, an email address, or `me`; default: me.
    #[arg(long, conflicts_with = "session_id")]
    user: Option<String>,
    /// Print the number of revoked sessions as JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    connection: ConnectionArgs,
}

pub(super) async fn revoke(args: RevokeSessionArgs) -> Result<(), CliError> {
    let (connection, request) = if let Some(session_id) = args.session_id {
        let request = RevokeSessionRequest { session_id, ..Default::default() };
        (args.connection.connect_as_operator().await?, request)
    } else {
        let user = args.user.as_deref().unwrap_or("me");
        let (connection, all_of_user) = user::resolve_user_id(user, &args.connection).await?;
        (connection, RevokeSessionRequest { all_of_user, ..Default::default() })
    };
    let mut client = SessionServiceClient::new(connection);
    let reply = client.revoke_session(request).await?.into_inner();
    if args.json {
        return json::print(&reply);
    }
    writeln!(std::io::stdout(), "sessions ended: {}", reply.revoked_sessions)?;
    Ok(())
}

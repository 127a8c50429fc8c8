//! `hapa session list`.

use std::io::Write as _;

use hapa_proto::auth::v1::session_service_client::SessionServiceClient;
use hapa_proto::auth::v1::{ListSessionsRequest, Session};

use crate::cli::connection::ConnectionArgs;
use crate::cli::table::{table, to_minute};
use crate::cli::{CliError, json, user};

/// List the active sessions of a user, newest first.
///
/// With --as-me your own; an operator names the user.
#[derive(clap::Args, Clone, Debug)]
#[command(after_help = "Example:\n  hapa session list --user mina@example.com")]
pub(in crate::cli) struct ListSessionsArgs {
    /// User: an id, an email address, or `me`.
    #[arg(long, default_value = "me")]
    user: String,
    /// Print one JSON object per session.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    connection: ConnectionArgs,
}

pub(super) async fn list(args: ListSessionsArgs) -> Result<(), CliError> {
    let (connection, user_id) = user::resolve_user_id(&args.user, &args.connection).await?;
    let mut client = SessionServiceClient::new(connection);
    let reply = client.list_sessions(ListSessionsRequest { user_id }).await?.into_inner();
    if args.json {
        return json::print_lines(&reply.sessions);
    }
    let header = ["SESSION ID", "USER ID", "METHOD", "ADDRESS", "CREATED", "REFRESHED", "EXPIRES"];
    writeln!(std::io::stdout(), "{}", table(header, reply.sessions.into_iter().map(row)))?;
    Ok(())
}

fn row(session: Session) -> [String; 7] {
    let created = to_minute(session.create_time.as_ref());
    let refreshed = to_minute(session.refresh_time.as_ref());
    let expires = to_minute(session.expire_time.as_ref());
    let Session { session_id, user_id, method, address, .. } = session;
    [session_id, user_id, method, address, created, refreshed, expires]
}

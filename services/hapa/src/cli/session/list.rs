//! `hapa session list`.

use std::io::Write as _;

use hapa_proto::auth::v1::session_service_client::SessionServiceClient;
use hapa_proto::auth::v1::{ListSessionsRequest, Session};

use crate::cli::table::{table, time};
use crate::cli::{Failure, connection, json, user};

/// List the sessions of a user that are alive, newest first.
///
/// Your own with --as-me; an operator names the user.
#[derive(clap::Args, Clone, Debug)]
#[group(id = "session_list_args")]
pub(in crate::cli) struct Args {
    /// Whose: an id, an address, or me.
    #[arg(long, default_value = "me")]
    user: String,
    /// Each session as a line of JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    connection: connection::Args,
}

pub(super) async fn list(args: Args) -> Result<(), Failure> {
    let (connection, user_id) = user::named(&args.user, &args.connection).await?;
    let mut client = SessionServiceClient::new(connection);
    let reply = client.list_sessions(ListSessionsRequest { user_id }).await?.into_inner();
    let mut out = std::io::stdout();
    if args.json {
        for session in &reply.sessions {
            writeln!(out, "{}", json::json(session)?)?;
        }
        return Ok(());
    }
    let header = ["SESSION ID", "USER ID", "HOW", "FROM", "CREATED", "REFRESHED", "EXPIRES"];
    writeln!(out, "{}", table(header, reply.sessions.into_iter().map(row)))?;
    Ok(())
}

fn row(session: Session) -> [String; 7] {
    let created = time(session.create_time.as_ref());
    let refreshed = time(session.refresh_time.as_ref());
    let expires = time(session.expire_time.as_ref());
    let Session { session_id, user_id, method, address, .. } = session;
    [session_id, user_id, method, address, created, refreshed, expires]
}

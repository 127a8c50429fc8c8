//! `hapa session login`.

use std::io::Write as _;

use anyhow::Context as _;
use hapa_proto::auth::v1::CreateSessionRequest;
use hapa_proto::auth::v1::create_session_request::{Password, Proof};
use hapa_proto::auth::v1::session_service_client::SessionServiceClient;

use crate::cli::connection::ServerAddress;
use crate::cli::session_file::{LockedSessionFile, TokenPair};
use crate::cli::table::to_minute;
use crate::cli::{CliError, json, password};

/// Log in and store the session in DATA_DIR/session, readable by its owner alone.
///
/// Commands with --as-me use the session and renew its access token. `hapa session logout` revokes it.
#[derive(clap::Args, Clone, Debug)]
#[command(after_help = "Example:\n  hapa session login --email mina@example.com")]
pub(in crate::cli) struct LoginArgs {
    /// Email address of the user; the password is prompted for without echo.
    #[arg(long, required_unless_present = "id_token_stdin")]
    email: Option<String>,
    /// Read the password from standard input, one line.
    #[arg(long, requires = "email")]
    password_stdin: bool,
    /// Log in with an ID token of the identity provider, one line on standard input.
    #[arg(long, conflicts_with_all = ["email", "password_stdin"])]
    id_token_stdin: bool,
    /// Print the session as JSON, without its tokens.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    server: ServerAddress,
}

pub(super) async fn login(args: LoginArgs) -> Result<(), CliError> {
    let proof = match args.email {
        Some(email) => {
            let password = password::read_current("password", args.password_stdin)?;
            Proof::Password(Password { email, password })
        }
        None => Proof::IdToken(password::read_line("ID token")?),
    };
    let mut client = SessionServiceClient::new(args.server.connect_unauthenticated().await?);
    let request = CreateSessionRequest { proof: Some(proof), http_body: None };
    // Locked before the login: a session that cannot be stored is not created.
    let file = LockedSessionFile::lock(args.server.session_file())?;
    let previous = file.read().ok().flatten();
    let reply = client.create_session(request).await?.into_inner();
    let session = reply.session.context("the mesh returned no session")?;
    file.write(TokenPair {
        session: Some(session.clone()),
        access_token: reply.access_token,
        refresh_token: reply.refresh_token,
        expires_in: reply.expires_in,
    })?;
    if let Some(previous) = previous {
        let id = previous.session_id;
        let advice = format!("revoke it with `hapa session revoke {id}`");
        writeln!(anstream::stderr(), "The previous session {id} stays active; {advice}.")?;
    }
    if args.json {
        return json::print(&session);
    }
    let (user_id, session_id) = (session.user_id, session.session_id);
    let (end, path) = (to_minute(session.expire_time.as_ref()), file.path().display());
    writeln!(
        std::io::stdout(),
        "logged in as {user_id} until {end} UTC: session {session_id}, stored in {path}"
    )?;
    Ok(())
}

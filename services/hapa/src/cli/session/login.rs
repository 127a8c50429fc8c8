//! `hapa session login`.

use std::io::Write as _;

use anyhow::Context as _;
use hapa_proto::auth::v1::CreateSessionRequest;
use hapa_proto::auth::v1::create_session_request::{Password, Proof};
use hapa_proto::auth::v1::session_service_client::SessionServiceClient;

use super::kept::{Locked, Pair};
use crate::cli::table::time;
use crate::cli::{Failure, connection, json, password};

/// Log in and keep the session in DATA_DIR/session, readable by its owner alone.
///
/// Commands with --as-me use it, and renew it as it ends; `hapa session logout` ends it.
#[derive(clap::Args, Clone, Debug)]
#[group(id = "session_login_args")]
pub(in crate::cli) struct Args {
    /// Your address; the password is asked for, without echo.
    #[arg(long, required_unless_present = "id_token_stdin")]
    email: Option<String>,
    /// Read the password from standard input, one line.
    #[arg(long, requires = "email")]
    password_stdin: bool,
    /// Log in with an ID token of the identity provider, one line on standard input.
    #[arg(long, conflicts_with_all = ["email", "password_stdin"])]
    id_token_stdin: bool,
    /// The session as JSON, without its tokens.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    place: connection::Place,
}

pub(super) async fn login(args: Args) -> Result<(), Failure> {
    let proof = match args.email {
        Some(email) => {
            let password = password::known("password", args.password_stdin)?;
            Proof::Password(Password { email, password })
        }
        None => Proof::IdToken(password::line("ID token")?),
    };
    let mut client = SessionServiceClient::new(args.place.as_nobody().await?);
    let request = CreateSessionRequest { proof: Some(proof), http_body: None };
    // Locked first: a session that can't be kept is not made.
    let locked = Locked::take(args.place.session_file())?;
    let before = locked.read().ok().flatten();
    let reply = client.create_session(request).await?.into_inner();
    let session = reply.session.context("the mesh answered without the session")?;
    locked.write(Pair {
        session: Some(session.clone()),
        access_token: reply.access_token,
        refresh_token: reply.refresh_token,
        expires_in: reply.expires_in,
    })?;
    if let Some(before) = before {
        let words = "that was kept before lives on until it expires or is revoked";
        writeln!(anstream::stderr(), "The session {} {words}.", before.session_id)?;
    }
    let mut out = std::io::stdout();
    if args.json {
        writeln!(out, "{}", json::json(&session)?)?;
        return Ok(());
    }
    let (user_id, session_id) = (session.user_id, session.session_id);
    let (end, file) = (time(session.expire_time.as_ref()), locked.file().display());
    writeln!(out, "logged in as {user_id} until {end} UTC: {session_id}, kept in {file}")?;
    Ok(())
}

//! `hapa session logout`.

use std::io::Write as _;

use hapa_proto::auth::v1::RevokeSessionRequest;
use hapa_proto::auth::v1::session_service_client::SessionServiceClient;
use tonic::Code;

use crate::cli::CliError;
use crate::cli::connection::ServerAddress;
use crate::cli::session_file::{LockedSessionFile, SavedSession};

/// Revoke the session of `hapa session login` and remove DATA_DIR/session.
#[derive(clap::Args, Clone, Debug)]
pub(in crate::cli) struct LogoutArgs {
    #[command(flatten)]
    server: ServerAddress,
}

pub(super) async fn logout(args: LogoutArgs) -> Result<(), CliError> {
    let path = args.server.session_file();
    let mut out = std::io::stdout();
    let no_session = format!("not logged in: {} is missing", path.display());
    if !path.exists() {
        writeln!(out, "{no_session}")?;
        return Ok(());
    }
    let file = LockedSessionFile::lock(path)?;
    let Some(session) = file.read()? else {
        writeln!(out, "{no_session}")?;
        return Ok(());
    };
    let session_id = session.session_id.clone();
    let was_active = match file.renew(session, &args.server).await? {
        Some(session) => revoke(session, &args.server).await?,
        None => false,
    };
    file.remove()?;
    let state = if was_active { "has ended" } else { "had ended already" };
    writeln!(out, "logged out: session {session_id} {state}")?;
    Ok(())
}

/// Returns whether the session was active.
async fn revoke(session: SavedSession, server: &ServerAddress) -> Result<bool, CliError> {
    let connection = server.connect_with_token(&session.access_token).await?;
    let request = RevokeSessionRequest { session_id: session.session_id, ..Default::default() };
    match SessionServiceClient::new(connection).revoke_session(request).await {
        Err(status) if matches!(status.code(), Code::Unauthenticated | Code::NotFound) => Ok(false),
        reply => Ok(reply?.into_inner().revoked_sessions > 0),
    }
}

//! `hapa session logout`.

use std::io::Write as _;

use hapa_proto::auth::v1::RevokeSessionRequest;
use hapa_proto::auth::v1::session_service_client::SessionServiceClient;
use tonic::Code;

use super::kept::{Kept, Locked};
use crate::cli::{Failure, connection};

/// End the session that `hapa session login` kept, and remove DATA_DIR/session.
#[derive(clap::Args, Clone, Debug)]
#[group(id = "session_logout_args")]
pub(in crate::cli) struct Args {
    #[command(flatten)]
    place: connection::Place,
}

pub(super) async fn logout(args: Args) -> Result<(), Failure> {
    let file = args.place.session_file();
    let mut out = std::io::stdout();
    let nobody = format!("nobody was logged in: there is no {}", file.display());
    if !file.exists() {
        writeln!(out, "{nobody}")?;
        return Ok(());
    }
    let locked = Locked::take(file)?;
    let Some(kept) = locked.read()? else {
        writeln!(out, "{nobody}")?;
        return Ok(());
    };
    let session_id = kept.session_id.clone();
    let alive = match locked.renewed(kept, &args.place).await? {
        Some(kept) => revoke(kept, &args.place).await?,
        None => false,
    };
    locked.remove()?;
    let had = if alive { "has ended" } else { "had ended already" };
    writeln!(out, "logged out: {session_id} {had}")?;
    Ok(())
}

/// Whether it was alive until now.
async fn revoke(kept: Kept, place: &connection::Place) -> Result<bool, Failure> {
    let mut client = SessionServiceClient::new(place.as_session(&kept.access_token).await?);
    let request = RevokeSessionRequest { session_id: kept.session_id, ..Default::default() };
    match client.revoke_session(request).await {
        Err(status) if matches!(status.code(), Code::Unauthenticated | Code::NotFound) => Ok(false),
        reply => Ok(reply?.into_inner().revoked_sessions > 0),
    }
}

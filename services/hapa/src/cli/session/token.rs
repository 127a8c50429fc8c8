//! `hapa session token`.

use std::io::Write as _;

use crate::cli::connection::ServerAddress;
use crate::cli::{CliError, session_file};

/// Print a valid access token of the session of `hapa session login`.
///
/// A token that expires within 60 s is renewed first.
#[derive(clap::Args, Clone, Debug)]
#[command(after_help = "Example:\n  \
    curl -H \"authorization: Bearer $(hapa session token)\" http://127.0.0.1:8000/api/v1/models")]
pub(in crate::cli) struct SessionTokenArgs {
    #[command(flatten)]
    server: ServerAddress,
}

pub(super) async fn token(args: SessionTokenArgs) -> Result<(), CliError> {
    let session = session_file::load_fresh(&args.server).await?;
    writeln!(std::io::stdout(), "{}", session.access_token)?;
    Ok(())
}

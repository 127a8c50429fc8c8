//! `hapa session token`.

use std::io::Write as _;

use super::kept;
use crate::cli::{Failure, connection};

/// Print a valid access token of the session that `hapa session login` kept.
///
/// One that ends within a minute is renewed first: curl -H "authorization: Bearer $(hapa session token)" …
#[derive(clap::Args, Clone, Debug)]
#[group(id = "session_token_args")]
pub(in crate::cli) struct Args {
    #[command(flatten)]
    place: connection::Place,
}

pub(super) async fn token(args: Args) -> Result<(), Failure> {
    let session = kept::fresh(&args.place).await?;
    writeln!(std::io::stdout(), "{}", session.access_token)?;
    Ok(())
}

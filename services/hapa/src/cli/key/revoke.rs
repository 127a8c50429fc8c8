//! `hapa key revoke`.

use std::io::Write as _;

use hapa_proto::auth::v1::RevokeKeyRequest;
use hapa_proto::auth::v1::key_service_client::KeyServiceClient;

use super::keys;
use crate::cli::{Failure, connection};

/// End a key for good.
#[derive(clap::Args, Clone, Debug)]
#[group(id = "key_revoke_args")]
pub(in crate::cli) struct Args {
    /// The key's id, as `hapa key list` shows it.
    key_id: String,
    #[command(flatten)]
    connection: connection::Args,
}

pub(super) async fn revoke(args: Args) -> Result<(), Failure> {
    let mut client = KeyServiceClient::new(args.connection.as_operator().await?);
    let reply = client.revoke_key(RevokeKeyRequest { key_id: args.key_id }).await?.into_inner();
    writeln!(std::io::stdout(), "{}", keys(&Vec::from_iter(reply.key)))?;
    Ok(())
}

//! `hapa key revoke`.

use std::io::Write as _;

use hapa_proto::auth::v1::RevokeKeyRequest;
use hapa_proto::auth::v1::key_service_client::KeyServiceClient;

use super::key_table;
use crate::cli::CliError;
use crate::cli::connection::ConnectionArgs;

/// Revoke a key permanently.
#[derive(clap::Args, Clone, Debug)]
pub(in crate::cli) struct RevokeKeyArgs {
    /// Key id, as `hapa key list` shows it.
    key_id: String,
    #[command(flatten)]
    connection: ConnectionArgs,
}

pub(super) async fn revoke(args: RevokeKeyArgs) -> Result<(), CliError> {
    let mut client = KeyServiceClient::new(args.connection.connect_as_operator().await?);
    let reply = client.revoke_key(RevokeKeyRequest { key_id: args.key_id }).await?.into_inner();
    writeln!(std::io::stdout(), "{}", key_table(&Vec::from_iter(reply.key)))?;
    Ok(())
}

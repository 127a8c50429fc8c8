//! `hapa key list`, and the pagination of keys.

use std::io::Write as _;

use clap::builder::PossibleValuesParser;
use hapa_core::access::SCOPES;
use hapa_proto::auth::v1::key_service_client::KeyServiceClient;
use hapa_proto::auth::v1::{Key, ListKeysRequest};

use super::key_table;
use crate::cli::connection::{Connection, ConnectionArgs};
use crate::cli::paging::{Page, for_each_page};
use crate::cli::{CliError, json};

/// List keys, newest first.
#[derive(clap::Args, Clone, Debug)]
#[command(after_help = "Example:\n  hapa key list --owner team --state active")]
pub(in crate::cli) struct ListKeysArgs {
    /// Only keys of this owner: a user id or any other name.
    #[arg(long, default_value = "", hide_default_value = true)]
    owner: String,
    /// Only keys in this state.
    #[arg(long, value_parser = ["active", "expired", "revoked"])]
    state: Option<String>,
    /// Only keys with this scope, such as codegen:generate.
    #[arg(long, value_parser = PossibleValuesParser::new(SCOPES), hide_possible_values = true)]
    scope: Option<String>,
    /// Print one JSON object per key.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    connection: ConnectionArgs,
}

pub(super) async fn list(args: ListKeysArgs) -> Result<(), CliError> {
    let request = ListKeysRequest {
        owner: args.owner,
        state: args.state.unwrap_or_default(),
        scope: args.scope.unwrap_or_default(),
        ..ListKeysRequest::default()
    };
    let mut client = KeyServiceClient::new(args.connection.connect_as_operator().await?);
    let mut keys = Vec::new();
    read_pages(&mut client, request, |page| {
        if args.json {
            return json::print_lines(&page);
        }
        keys.extend(page);
        Ok(())
    })
    .await?;
    if !args.json {
        writeln!(std::io::stdout(), "{}", key_table(&keys))?;
    }
    Ok(())
}

/// Reads all keys that match and passes each page to `on_page` as it arrives.
pub(super) async fn read_pages(
    client: &mut KeyServiceClient<Connection>,
    request: ListKeysRequest,
    on_page: impl FnMut(Vec<Key>) -> Result<(), CliError>,
) -> Result<(), CliError> {
    let fetch = async |page_size, page_token| {
        let request = ListKeysRequest { page_size, page_token, ..request.clone() };
        let reply = client.list_keys(request).await?.into_inner();
        Ok(Page { rows: reply.keys, next_page_token: reply.next_page_token })
    };
    for_each_page(0, fetch, on_page).await?;
    Ok(())
}

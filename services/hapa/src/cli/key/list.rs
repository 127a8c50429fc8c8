//! `hapa key list`, and reading all pages of keys.

use std::io::Write as _;

use clap::builder::PossibleValuesParser;
use hapa_core::access::SCOPES;
use hapa_proto::auth::v1::key_service_client::KeyServiceClient;
use hapa_proto::auth::v1::{Key, ListKeysRequest};

use super::keys;
use crate::cli::connection::{self, Connection};
use crate::cli::{Failure, json};

const LARGEST_PAGE: i32 = 1_000;

/// List keys, newest first.
#[derive(clap::Args, Clone, Debug)]
#[group(id = "key_list_args")]
pub(in crate::cli) struct Args {
    /// Only keys of this owner: a user's id, or any other name.
    #[arg(long, default_value = "", hide_default_value = true)]
    owner: String,
    /// Only keys in this state.
    #[arg(long, value_parser = ["active", "expired", "revoked"])]
    state: Option<String>,
    /// Only keys with this scope, such as codegen:generate.
    #[arg(long, value_parser = PossibleValuesParser::new(SCOPES), hide_possible_values = true)]
    scope: Option<String>,
    /// Each key as a line of JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    connection: connection::Args,
}

pub(super) async fn list(args: Args) -> Result<(), Failure> {
    let request = ListKeysRequest {
        owner: args.owner,
        state: args.state.unwrap_or_default(),
        scope: args.scope.unwrap_or_default(),
        ..ListKeysRequest::default()
    };
    let mut client = KeyServiceClient::new(args.connection.as_operator().await?);
    let mut found = Vec::new();
    let mut out = std::io::stdout();
    pages(&mut client, request, |page| {
        if args.json {
            for key in &page {
                writeln!(out, "{}", json::json(key)?)?;
            }
        } else {
            found.extend(page);
        }
        Ok(())
    })
    .await?;
    if !args.json {
        writeln!(out, "{}", keys(&found))?;
    }
    Ok(())
}

/// Reads all pages, and hands each on as it comes.
pub(super) async fn pages(
    client: &mut KeyServiceClient<Connection>,
    mut request: ListKeysRequest,
    mut page: impl FnMut(Vec<Key>) -> Result<(), Failure>,
) -> Result<(), Failure> {
    request.page_size = LARGEST_PAGE;
    loop {
        let reply = client.list_keys(request.clone()).await?.into_inner();
        page(reply.keys)?;
        if reply.next_page_token.is_empty() {
            return Ok(());
        }
        request.page_token = reply.next_page_token;
    }
}

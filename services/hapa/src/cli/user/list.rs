//! `hapa user list`.

use std::io::Write as _;

use hapa_proto::auth::v1::user_service_client::UserServiceClient;
use hapa_proto::auth::v1::{ListUsersRequest, User};

use crate::cli::connection::ConnectionArgs;
use crate::cli::paging::{Page, for_each_page};
use crate::cli::table::{table, to_minute};
use crate::cli::{CliError, json};

/// List users, newest first.
#[derive(clap::Args, Clone, Debug)]
pub(in crate::cli) struct ListUsersArgs {
    /// Print one JSON object per user.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    connection: ConnectionArgs,
}

pub(super) async fn list(args: ListUsersArgs) -> Result<(), CliError> {
    let mut client = UserServiceClient::new(args.connection.connect_as_operator().await?);
    let fetch = async |page_size, page_token| {
        let request = ListUsersRequest { page_size, page_token, ..ListUsersRequest::default() };
        let reply = client.list_users(request).await?.into_inner();
        Ok(Page { rows: reply.users, next_page_token: reply.next_page_token })
    };
    let mut users = Vec::new();
    let on_page = |page: Vec<User>| {
        if args.json {
            return json::print_lines(&page);
        }
        users.extend(page);
        Ok(())
    };
    for_each_page(0, fetch, on_page).await?;
    if !args.json {
        let header = ["USER ID", "EMAIL", "NAME", "SCOPES", "PASSWORD", "CREATED"];
        writeln!(std::io::stdout(), "{}", table(header, users.into_iter().map(row)))?;
    }
    Ok(())
}

fn row(user: User) -> [String; 6] {
    let password = if user.has_password { "yes" } else { "no" }.to_owned();
    let created = to_minute(user.create_time.as_ref());
    [user.user_id, user.email, user.name, user.scopes.join(" "), password, created]
}

//! `hapa user list`.

use std::io::Write as _;

use hapa_proto::auth::v1::user_service_client::UserServiceClient;
use hapa_proto::auth::v1::{ListUsersRequest, User};

use crate::cli::table::{table, time};
use crate::cli::{Failure, connection, json};

/// List users, newest first.
#[derive(clap::Args, Clone, Debug)]
#[group(id = "user_list_args")]
pub(in crate::cli) struct Args {
    /// Each user as a line of JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    connection: connection::Args,
}

pub(super) async fn list(args: Args) -> Result<(), Failure> {
    let mut client = UserServiceClient::new(args.connection.as_operator().await?);
    let mut request = ListUsersRequest { page_size: 1_000, ..ListUsersRequest::default() };
    let mut users = Vec::new();
    let mut out = std::io::stdout();
    loop {
        let page = client.list_users(request.clone()).await?.into_inner();
        if args.json {
            for user in &page.users {
                writeln!(out, "{}", json::json(user)?)?;
            }
        } else {
            users.extend(page.users);
        }
        if page.next_page_token.is_empty() {
            break;
        }
        request.page_token = page.next_page_token;
    }
    if !args.json {
        let header = ["USER ID", "EMAIL", "NAME", "SCOPES", "PASSWORD", "CREATED"];
        writeln!(out, "{}", table(header, users.into_iter().map(row)))?;
    }
    Ok(())
}

fn row(user: User) -> [String; 6] {
    let password = if user.has_password { "yes" } else { "no" }.to_owned();
    let created = time(user.create_time.as_ref());
    [user.user_id, user.email, user.name, user.scopes.join(" "), password, created]
}

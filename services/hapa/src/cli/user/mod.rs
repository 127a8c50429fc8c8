//! `hapa user`: people who log in, what they may do, and how they want to be answered.

mod create;
mod delete;
mod list;
mod passwd;
mod profile;
mod show;
mod update;

use anyhow::anyhow;
use hapa_proto::auth::v1::user_service_client::UserServiceClient;
use hapa_proto::auth::v1::{GetUserRequest, ListUsersRequest, User};

use crate::cli::connection::{self, Connection};
use crate::cli::{Failure, table};

/// A client of users.
type Users = UserServiceClient<Connection>;

#[derive(Clone, Debug, clap::Subcommand)]
pub(super) enum Command {
    Create(create::Args),
    List(list::Args),
    Show(show::Args),
    Update(update::Args),
    Passwd(passwd::Args),
    Delete(delete::Args),
    /// Show or set how a user wants to be answered.
    #[command(subcommand)]
    Profile(profile::Command),
}

pub(super) async fn execute(command: Command) -> Result<(), Failure> {
    match command {
        Command::Create(args) => create::create(args).await,
        Command::List(args) => list::list(args).await,
        Command::Show(args) => show::show(args).await,
        Command::Update(args) => update::update(args).await,
        Command::Passwd(args) => passwd::passwd(args).await,
        Command::Delete(args) => delete::delete(args).await,
        Command::Profile(command) => profile::execute(command).await,
    }
}

/// A client, and the id of the user whom a person named.
async fn open(user: &str, connection: &connection::Args) -> Result<(Users, String), Failure> {
    let (connection, user_id) = named(user, connection).await?;
    Ok((UserServiceClient::new(connection), user_id))
}

/// A connection, and the id of the user whom a person named by id, by address or as "me".
pub(super) async fn named(
    user: &str,
    connection: &connection::Args,
) -> Result<(Connection, String), Failure> {
    if user == "me" {
        check_me(connection)?;
    }
    let connection = connection.as_operator().await?;
    let user_id = if user.contains('@') {
        by_address(connection.clone(), user).await?.user_id
    } else {
        user.to_owned()
    };
    Ok((connection, user_id))
}

/// "me" needs someone who asks.
fn check_me(connection: &connection::Args) -> Result<(), Failure> {
    if connection.has_me() {
        return Ok(());
    }
    let words = "the mesh token is nobody's: name the user by id or address, \
                 or ask as yourself with --as-me or HAPA_API_KEY";
    Err(anyhow!(words).into())
}

async fn get(client: &mut Users, user_id: String) -> Result<User, Failure> {
    let reply = client.get_user(GetUserRequest { user_id }).await?.into_inner();
    required(reply.user)
}

async fn by_address(connection: Connection, email: &str) -> Result<User, Failure> {
    let mut client = UserServiceClient::new(connection);
    let request = ListUsersRequest { email: email.to_lowercase(), ..ListUsersRequest::default() };
    let found = client.list_users(request).await?.into_inner().users.into_iter().next();
    found.ok_or_else(|| anyhow!("no user has the address {}", table::plain(email)).into())
}

fn required(user: Option<User>) -> Result<User, Failure> {
    user.ok_or_else(|| anyhow!("the mesh answered without the user").into())
}

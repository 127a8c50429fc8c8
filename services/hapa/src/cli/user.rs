//! `hapa user`: users, their scopes, budgets and profiles.

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

use crate::cli::connection::{Connection, ConnectionArgs};
use crate::cli::{CliError, table};

type UserClient = UserServiceClient<Connection>;

#[derive(Clone, Debug, clap::Subcommand)]
pub(super) enum UserCommand {
    Create(create::CreateUserArgs),
    List(list::ListUsersArgs),
    Show(show::ShowUserArgs),
    Update(update::UpdateUserArgs),
    Passwd(passwd::SetPasswordArgs),
    Delete(delete::DeleteUserArgs),
    /// Show or set a user's defaults for the style of generated answers.
    #[command(subcommand)]
    Profile(profile::ProfileCommand),
}

pub(super) async fn execute(command: UserCommand) -> Result<(), CliError> {
    match command {
        UserCommand::Create(args) => create::create(args).await,
        UserCommand::List(args) => list::list(args).await,
        UserCommand::Show(args) => show::show(args).await,
        UserCommand::Update(args) => update::update(args).await,
        UserCommand::Passwd(args) => passwd::set_password(args).await,
        UserCommand::Delete(args) => delete::delete(args).await,
        UserCommand::Profile(command) => profile::execute(command).await,
    }
}

/// Returns a client, and the id of the user that an argument names.
async fn client_and_user_id(
    user: &str,
    connection: &ConnectionArgs,
) -> Result<(UserClient, String), CliError> {
    let (connection, user_id) = resolve_user_id(user, connection).await?;
    Ok((UserServiceClient::new(connection), user_id))
}

/// Returns a connection, and the id of the user that an argument names: by id, by email address, or as `me`.
pub(super) async fn resolve_user_id(
    user: &str,
    args: &ConnectionArgs,
) -> Result<(Connection, String), CliError> {
    if user == "me" {
        require_identity(args)?;
    }
    let connection = args.connect_as_operator().await?;
    let user_id = if user.contains('@') {
        find_by_email(connection.clone(), user).await?.user_id
    } else {
        user.to_owned()
    };
    Ok((connection, user_id))
}

/// The user `me` requires a credential of a user.
fn require_identity(connection: &ConnectionArgs) -> Result<(), CliError> {
    if connection.has_identity() {
        return Ok(());
    }
    let message = "the mesh token belongs to no user, so there is no `me`: name the user by id or email \
                   address, or pass --as-me or HAPA_API_KEY";
    Err(anyhow!(message).into())
}

async fn get(client: &mut UserClient, user_id: String) -> Result<User, CliError> {
    let reply = client.get_user(GetUserRequest { user_id }).await?.into_inner();
    require_user(reply.user)
}

async fn find_by_email(connection: Connection, email: &str) -> Result<User, CliError> {
    let mut client = UserServiceClient::new(connection);
    let request = ListUsersRequest { email: email.to_lowercase(), ..ListUsersRequest::default() };
    let found = client.list_users(request).await?.into_inner().users.into_iter().next();
    found.ok_or_else(|| {
        let email = table::sanitize(email);
        anyhow!("no user has the email address {email}; `hapa user list` shows all users").into()
    })
}

fn require_user(user: Option<User>) -> Result<User, CliError> {
    user.ok_or_else(|| anyhow!("the mesh returned no user").into())
}

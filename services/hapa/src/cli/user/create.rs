//! `hapa user create`.

use hapa_core::access::SCOPES;
use hapa_proto::auth::v1::CreateUserRequest;
use hapa_proto::auth::v1::user_service_client::UserServiceClient;

use super::{require_user, show};
use crate::cli::budget::BudgetArgs;
use crate::cli::connection::ConnectionArgs;
use crate::cli::idempotency_key::IdempotencyArgs;
use crate::cli::{CliError, password};

/// Create a user, with a password or for an identity provider.
///
/// A prompt asks for the password twice, without echo. The password is never an argument, because the
/// process list shows arguments to every user of the machine.
#[derive(clap::Args, Clone, Debug)]
#[command(after_help = "Example:\n  hapa user create --email mina@example.com --name Mina --admin")]
#[expect(clippy::struct_excessive_bools, reason = "they are flags")]
pub(in crate::cli) struct CreateUserArgs {
    /// Email address, used to log in.
    #[arg(long)]
    email: String,
    /// Display name; default: the email address.
    #[arg(long, default_value = "", hide_default_value = true)]
    name: String,
    /// Grant every scope.
    #[arg(long, conflicts_with = "scopes")]
    admin: bool,
    /// Scope to grant, such as codegen:generate; repeatable; default: generate, complete, read errors and
    /// read analytics.
    #[arg(long = "scope", value_name = "SCOPE")]
    scopes: Vec<String>,
    /// Read the password from standard input, one line of 12 to 256 characters.
    #[arg(long, conflicts_with = "no_password")]
    password_stdin: bool,
    /// Create the user without a password: only an identity provider can log it in.
    #[arg(long)]
    no_password: bool,
    #[command(flatten)]
    budget: BudgetArgs,
    /// Print the new user as JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    idempotency: IdempotencyArgs,
    #[command(flatten)]
    connection: ConnectionArgs,
}

pub(super) async fn create(args: CreateUserArgs) -> Result<(), CliError> {
    let password = if args.no_password {
        String::new()
    } else {
        let flags = "--password-stdin, or --no-password for a user of an identity provider";
        password::read_new("new password", args.password_stdin, flags)?
    };
    let all_scopes = || SCOPES.iter().map(|scope| (*scope).to_owned()).collect();
    let request = CreateUserRequest {
        token_budget: args.budget.budget(),
        email: args.email,
        name: args.name,
        password,
        scopes: if args.admin { all_scopes() } else { args.scopes },
        profile: None,
    };
    let mut client = UserServiceClient::new(args.connection.connect_as_operator().await?);
    let reply = client.create_user(args.idempotency.request(request)?).await?.into_inner();
    show::print(&require_user(reply.user)?, args.json)
}

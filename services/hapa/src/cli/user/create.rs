//! `hapa user create`.

use hapa_core::access::SCOPES;
use hapa_proto::auth::v1::CreateUserRequest;
use hapa_proto::auth::v1::user_service_client::UserServiceClient;

use super::{required, show};
use crate::cli::{Failure, budget, connection, once, password};

/// Make a user, who can log in from then on.
///
/// The password is asked for on a terminal, twice and without echo; it is no argument, because the
/// list of processes shows those to everyone.
#[derive(clap::Args, Clone, Debug)]
#[expect(clippy::struct_excessive_bools, reason = "they are flags")]
#[group(id = "user_create_args")]
pub(in crate::cli) struct Args {
    /// Its address, with which it logs in.
    #[arg(long)]
    email: String,
    /// What it is called; default: the address.
    #[arg(long, default_value = "", hide_default_value = true)]
    name: String,
    /// It may do everything.
    #[arg(long, conflicts_with = "scopes")]
    admin: bool,
    /// What it may do, such as codegen:generate; can be repeated; default: generate, complete, and
    /// read errors and analytics.
    #[arg(long = "scope")]
    scopes: Vec<String>,
    /// Read the password from standard input, one line of 12 to 256 characters.
    #[arg(long, conflicts_with = "no_password")]
    password_stdin: bool,
    /// Without a password: only an identity provider can log it in.
    #[arg(long)]
    no_password: bool,
    #[command(flatten)]
    budget: budget::Args,
    /// The new user as JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    once: once::Args,
    #[command(flatten)]
    connection: connection::Args,
}

pub(super) async fn create(args: Args) -> Result<(), Failure> {
    let password = if args.no_password {
        String::new()
    } else {
        let otherwise = "--password-stdin, or --no-password for a user of an identity provider";
        password::new("new password", args.password_stdin, otherwise)?
    };
    let all = || SCOPES.iter().map(|scope| (*scope).to_owned()).collect();
    let request = CreateUserRequest {
        token_budget: args.budget.budget(),
        email: args.email,
        name: args.name,
        password,
        scopes: if args.admin { all() } else { args.scopes },
        profile: None,
    };
    let mut client = UserServiceClient::new(args.connection.as_operator().await?);
    let reply = client.create_user(args.once.request(request)?).await?.into_inner();
    show::print(&required(reply.user)?, args.json)
}

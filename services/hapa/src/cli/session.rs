//! `hapa session`: log in, stay logged in, list and revoke sessions.

mod list;
mod login;
mod logout;
mod revoke;
mod token;

use crate::cli::CliError;

#[derive(Clone, Debug, clap::Subcommand)]
pub(super) enum SessionCommand {
    Login(login::LoginArgs),
    Token(token::SessionTokenArgs),
    List(list::ListSessionsArgs),
    Revoke(revoke::RevokeSessionArgs),
    Logout(logout::LogoutArgs),
}

pub(super) async fn execute(command: SessionCommand) -> Result<(), CliError> {
    match command {
        SessionCommand::Login(args) => login::login(args).await,
        SessionCommand::Token(args) => token::token(args).await,
        SessionCommand::List(args) => list::list(args).await,
        SessionCommand::Revoke(args) => revoke::revoke(args).await,
        SessionCommand::Logout(args) => logout::logout(args).await,
    }
}

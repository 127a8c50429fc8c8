//! `hapa session`: log in, stay logged in, see and end sessions.

pub(super) mod kept;
mod list;
mod login;
mod logout;
mod revoke;
mod token;

use crate::cli::Failure;

#[derive(Clone, Debug, clap::Subcommand)]
pub(super) enum Command {
    Login(login::Args),
    Token(token::Args),
    List(list::Args),
    Revoke(revoke::Args),
    Logout(logout::Args),
}

pub(super) async fn execute(command: Command) -> Result<(), Failure> {
    match command {
        Command::Login(args) => login::login(args).await,
        Command::Token(args) => token::token(args).await,
        Command::List(args) => list::list(args).await,
        Command::Revoke(args) => revoke::revoke(args).await,
        Command::Logout(args) => logout::logout(args).await,
    }
}

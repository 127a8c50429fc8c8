//! The command line: which commands there are, and how a failure is told.

mod audit;
mod budget;
mod config;
mod connection;
mod failure;
mod gateway;
mod generate;
mod json;
mod key;
mod moment;
mod password;
mod private;
mod serve;
mod session;
mod table;
mod user;

use clap::error::ErrorKind;
use clap::{CommandFactory as _, FromArgMatches as _, Parser, Subcommand};

pub use failure::Failure;

/// Typed code generation on your own GPUs.
#[derive(Debug, Parser)]
#[command(name = "hapa", version, propagate_version = true)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run every service in this process, on embedded stores.
    All(Box<serve::All>),
    /// Run the auth service.
    Auth(Box<serve::Auth>),
    /// Run the code generation service.
    Codegen(Box<serve::Codegen>),
    /// Ask for code and watch it come.
    Generate(Box<generate::Args>),
    /// Make, list, change, rotate and end API keys, and see what they use.
    #[command(subcommand)]
    Key(Box<key::Command>),
    /// Make, list, change and remove users, who log in and own keys.
    #[command(subcommand)]
    User(Box<user::Command>),
    /// Log in as a user; list and end sessions.
    #[command(subcommand)]
    Session(Box<session::Command>),
    /// Read and check the log of who changed what.
    #[command(subcommand)]
    Audit(Box<audit::Command>),
    /// Print the effective settings, secrets redacted.
    Config(Box<config::Args>),
    /// Write the gateway's configuration for Envoy.
    Gateway(Box<gateway::Args>),
}

/// Reads the command line and the environment. Prints help and ends the process where that is asked.
pub fn parse() -> Result<Cli, Failure> {
    let read = Cli::command().try_get_matches().and_then(|matches| Cli::from_arg_matches(&matches));
    read.map_err(|error| match error.kind() {
        ErrorKind::InvalidValue | ErrorKind::ValueValidation => {
            Failure::setting(&error, &Cli::command())
        }
        _ => error.exit(),
    })
}

/// Does what was asked.
pub async fn execute(cli: Cli) -> Result<(), Failure> {
    match cli.command {
        Command::All(args) => serve::serve(args.into()).await,
        Command::Auth(args) => serve::serve(args.into()).await,
        Command::Codegen(args) => serve::serve(args.into()).await,
        Command::Generate(args) => generate::generate(*args).await,
        Command::Key(command) => key::execute(*command).await,
        Command::User(command) => user::execute(*command).await,
        Command::Session(command) => session::execute(*command).await,
        Command::Audit(command) => audit::execute(*command).await,
        Command::Config(args) => config::print(&args, &Cli::command()),
        Command::Gateway(args) => gateway::write(&args),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_flag_is_its_environment_variable() {
        // A key of the caller's and a mesh's are told apart by a prefix.
        let unprefixed =
            |name: &str| name.trim_start_matches("HAPA_").to_lowercase().replace('_', "-");
        for command in Cli::command().get_subcommands() {
            for argument in command.get_arguments().filter(|argument| argument.get_env().is_some())
            {
                let name = argument.get_env().and_then(|name| name.to_str()).map(unprefixed);
                assert_eq!(argument.get_long(), name.as_deref());
            }
        }
    }
}

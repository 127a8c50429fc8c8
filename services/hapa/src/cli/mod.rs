//! The command line: which commands there are, and how a failure is told.

mod audit;
mod budget;
mod cache;
mod complete;
mod config;
mod connection;
mod doctor;
mod errors;
mod failure;
mod gateway;
mod generate;
mod json;
mod key;
mod migrate;
mod models;
mod moment;
mod number;
mod once;
mod password;
mod private;
mod probe;
mod serve;
mod session;
mod table;
mod top;
mod usage;
mod user;
mod validate;
mod version;

use clap::error::ErrorKind;
use clap::{ArgMatches, CommandFactory as _, FromArgMatches as _, Parser, Subcommand};

pub use failure::Failure;

use crate::Roles;
use crate::setting::{Setting, settings};

/// Typed code generation on your own GPUs.
#[derive(Debug, Parser)]
#[command(name = "hapa", version, propagate_version = true)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
    /// Those of the command, as they were read.
    #[arg(skip)]
    settings: Vec<Setting>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run every service in this process, on embedded stores.
    All(Box<crate::All>),
    /// Run the auth service.
    Auth(Box<serve::Auth>),
    /// Run the code generation service.
    Codegen(Box<serve::Codegen>),
    /// Run the errors service; with a subcommand: read and manage what went wrong.
    ///
    /// `hapa errors` with the options below is the service. `hapa errors dashboard` and the other
    /// commands ask the one that runs: each takes --address and a credential, see its own --help.
    Errors(Box<serve::Errors>),
    /// Run the analytics service.
    Analytics(Box<serve::Analytics>),
    /// Ask for code and watch it come.
    Generate(Box<generate::Args>),
    /// Ask what may stand at a cursor: the code before it from a file or standard input.
    Complete(Box<complete::Args>),
    /// List the models and adapters that the engines serve, and what each is for.
    Models(models::Args),
    /// Look for syntax errors and dangerous constructs in files; nothing is executed.
    Validate(Box<validate::Args>),
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
    /// See how full the caches are, and empty them.
    #[command(subcommand)]
    Cache(Box<cache::Command>),
    /// Show who used how much: calls and tokens, by owner, key, user, model and day.
    Usage(Box<usage::Args>),
    /// Watch how it goes: calls, tokens, times and errors of the last minute, each second.
    Top(Box<top::Args>),
    /// Print the effective settings, secrets redacted.
    Config(Box<config::Args>),
    /// Look at all that the mesh stands on, say what is wrong and what to do; exit code 1 says that
    /// something is. Takes the settings of `hapa all`, and changes nothing.
    Doctor(Box<doctor::Args>),
    /// Print what this binary is: its version, commit, profile and compiler.
    Version(version::Args),
    /// Write the gateway's configuration for Envoy.
    Gateway(Box<gateway::Args>),
    /// Bring stores up to this version, and end. Roles do it too when they start.
    Migrate(Box<migrate::Args>),
    /// Ask whether a service can work; exit code 0 says that it can. For container health checks.
    Probe(Box<probe::Args>),
}

/// Reads the command line and the environment. Prints help and ends the process where that is asked.
pub fn parse() -> Result<Cli, Failure> {
    let root = Cli::command();
    let read = root.clone().try_get_matches().and_then(|matches| {
        let cli = Cli::from_arg_matches(&matches)?;
        Ok(Cli { settings: of_command(&root, &matches), ..cli })
    });
    read.map_err(|error| match error.kind() {
        ErrorKind::InvalidValue | ErrorKind::ValueValidation => {
            Failure::setting(&error, &Cli::command())
        }
        _ => error.exit(),
    })
}

fn of_command(root: &clap::Command, matches: &ArgMatches) -> Vec<Setting> {
    let Some((name, matches)) = matches.subcommand() else { return Vec::new() };
    root.find_subcommand(name).map_or_else(Vec::new, |command| settings(command, matches))
}

/// Does what was asked.
pub async fn execute(cli: Cli) -> Result<(), Failure> {
    let Cli { command, settings } = cli;
    let serve = async |roles| serve::serve(Roles { settings: settings.clone(), ..roles }).await;
    match command {
        Command::All(args) => serve((*args).into()).await,
        Command::Auth(args) => serve((*args).into()).await,
        Command::Codegen(args) => serve((*args).into()).await,
        Command::Errors(args) => match args.client {
            Some(command) => errors::execute(command).await,
            None => serve((*args).into()).await,
        },
        Command::Analytics(args) => serve((*args).into()).await,
        Command::Generate(args) => generate::generate(*args).await,
        Command::Complete(args) => complete::complete(*args).await,
        Command::Models(args) => models::models(args).await,
        Command::Validate(args) => validate::validate(*args).await,
        Command::Key(command) => key::execute(*command).await,
        Command::User(command) => user::execute(*command).await,
        Command::Session(command) => session::execute(*command).await,
        Command::Audit(command) => audit::execute(*command).await,
        Command::Cache(command) => cache::execute(*command).await,
        Command::Usage(args) => usage::usage(*args).await,
        Command::Top(args) => top::top(*args).await,
        Command::Config(args) => config::print(&args, settings),
        Command::Doctor(args) => Box::pin(doctor::doctor(*args)).await,
        Command::Version(args) => version::version(&args),
        Command::Gateway(args) => gateway::write(&args),
        Command::Migrate(args) => migrate::migrate(&args).await,
        Command::Probe(args) => probe::probe(&args).await,
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
    fn the_word_errors_is_a_role_or_a_question_and_never_both() {
        let read = |line: &str| Cli::try_parse_from(line.split(' '));
        let client = |line: &str| match read(line).unwrap().command {
            Command::Errors(args) => args.client.is_some(),
            _ => false,
        };
        assert!(!client("hapa errors --port 0 --error-retention-days 3"));
        assert!(client("hapa errors dashboard --address http://mesh:1"));
        assert!(client("hapa errors resolve INC-20260101-0123ABCD --version 1.2 --note done"));
        assert!(read("hapa errors --port 0 dashboard").is_err());
        assert!(read("hapa errors dashboard --port 0").is_err());
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

//! The command line: all commands, and the way from arguments to an exit code.

mod audit;
mod budget;
mod cache;
mod cli_error;
mod complete;
mod config;
mod confirm;
mod connection;
mod dev;
mod doctor;
mod errors;
mod file_mode;
mod format;
mod gateway;
mod generate;
mod idempotency_key;
mod input;
mod json;
mod key;
mod migrate;
mod models;
mod paging;
mod password;
mod probe;
mod reconnect;
mod serve;
mod session;
mod session_file;
mod table;
mod time_args;
mod top;
mod usage;
mod user;
mod validate;
mod version;

use std::ffi::OsString;
use std::io::Write as _;

use clap::error::ErrorKind;
use clap::{ArgMatches, CommandFactory as _, FromArgMatches as _, Parser, Subcommand};

pub use cli_error::CliError;

use crate::cli::cli_error::InvalidValue;
use crate::renamed_settings::{FormerNames, warnings};
use crate::setting::{Setting, settings};
use crate::{Roles, env_file};

/// Typed code generation on your own GPUs: a gRPC mesh in front of vLLM, and its tools.
///
/// Roles (all, auth, codegen, errors, analytics) run until SIGTERM. All other commands call a running mesh or
/// prepare one. Each setting is a flag and an environment variable; the flag wins.
#[derive(Debug, Parser)]
#[command(name = "hapa", version, propagate_version = true)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
    /// The settings of the command and their sources.
    #[arg(skip)]
    settings: Vec<Setting>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run every service in this process, on embedded stores by default.
    All(Box<crate::AllRolesArgs>),
    /// Run the auth service: keys, users, sessions and the audit log.
    Auth(Box<serve::AuthArgs>),
    /// Run the code generation service.
    Codegen(Box<serve::CodegenArgs>),
    /// Run the errors service; with a subcommand: query and manage incidents.
    ///
    /// `hapa errors` with the options below runs the service. `hapa errors dashboard` and the other
    /// subcommands call a running one: each accepts --address and a credential, see its own --help.
    Errors(Box<serve::ErrorsArgs>),
    /// Run the analytics service.
    Analytics(Box<serve::AnalyticsArgs>),
    /// Generate code and print the answer as it streams.
    Generate(Box<generate::GenerateArgs>),
    /// Suggest code at a cursor; reads the code before it from a file or standard input.
    Complete(Box<complete::CompleteArgs>),
    /// List the models and adapters that the engines serve, their tasks and their health.
    Models(models::ModelsArgs),
    /// Check files for syntax errors and dangerous constructs; executes nothing.
    Validate(Box<validate::ValidateArgs>),
    /// Create, list, update, rotate and revoke API keys, and show their token usage.
    #[command(subcommand)]
    Key(Box<key::KeyCommand>),
    /// Create, list, update and delete users. Users log in and own keys.
    #[command(subcommand)]
    User(Box<user::UserCommand>),
    /// Log in as a user; list and revoke sessions.
    #[command(subcommand)]
    Session(Box<session::SessionCommand>),
    /// List and verify the audit log of changes to keys, users and sessions.
    #[command(subcommand)]
    Audit(Box<audit::AuditCommand>),
    /// Show the fill level of the caches, and clear them.
    #[command(subcommand)]
    Cache(Box<cache::CacheCommand>),
    /// Report calls and tokens by owner, key, user, model and day.
    Usage(Box<usage::UsageArgs>),
    /// Show calls, tokens, latencies and errors of the last minute, updated every second.
    Top(Box<top::TopArgs>),
    /// Print the effective settings and their sources; secrets are redacted.
    Config(Box<config::ConfigArgs>),
    /// Check settings, stores, Redis, engines, certificates, gateway and disk, and advise on each problem.
    ///
    /// Accepts the settings of `hapa all` and changes nothing. The exit code is 1 if a check fails.
    Doctor(Box<doctor::DoctorArgs>),
    /// Print the version, commit, build profile and compiler of this binary.
    Version(version::VersionArgs),
    /// Write the gateway's configuration for Envoy.
    Gateway(Box<gateway::GatewayArgs>),
    /// Run an engine, the mesh and the gateway in the foreground, for development; Ctrl-C stops all.
    ///
    /// Prints the address and the development key when ready. A component that exits stops the others.
    Dev(Box<dev::DevArgs>),
    /// Migrate the stores to this version and exit. Roles do the same at start-up.
    Migrate(Box<migrate::MigrateArgs>),
    /// Query the gRPC health of a service; the exit code is 0 if it serves. For container health checks.
    Probe(Box<probe::ProbeArgs>),
}

impl Command {
    /// The roles that the command runs, checks or shows the settings of.
    fn roles(self) -> Option<Roles> {
        match self {
            Command::All(args) => Some((*args).into()),
            Command::Auth(args) => Some((*args).into()),
            Command::Codegen(args) => Some((*args).into()),
            Command::Errors(args) if args.subcommand.is_none() => Some((*args).into()),
            Command::Analytics(args) => Some((*args).into()),
            Command::Config(args) => Some(args.roles()),
            _ => None,
        }
    }

    /// Whether the command runs a server, which writes warnings to its log.
    fn is_role(&self) -> bool {
        match self {
            Command::All(_) | Command::Auth(_) | Command::Codegen(_) | Command::Analytics(_) => {
                true
            }
            Command::Errors(args) => args.subcommand.is_none(),
            _ => false,
        }
    }
}

/// Reads the command line and the environment. Prints help and ends the process where an argument asks for it.
pub fn parse() -> Result<Cli, CliError> {
    env_file::load(std::env::args().nth(1).as_deref()).map_err(CliError::InvalidSetting)?;
    let former_names = FormerNames::read();
    let root = Cli::command();
    let matches = all_matches(&former_names.bind(root.clone()))?;
    let settings = settings_of_subcommand(&root, &matches, &former_names)?;
    let mut cli = Cli::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
    cli.settings = settings;
    if cli.command.is_role() || matches!(cli.command, Command::Config(_)) {
        cli.settings.extend(former_names.settings_without_effect());
    }
    Ok(cli)
}

/// Parses the command line and the environment. One error names all invalid variables and flags.
fn all_matches(root: &clap::Command) -> Result<ArgMatches, CliError> {
    let (mut command, mut arguments) = (root.clone(), std::env::args_os().collect::<Vec<_>>());
    let mut problems: Vec<InvalidValue> = Vec::new();
    loop {
        let error = match command.clone().try_get_matches_from(&arguments) {
            Ok(matches) if problems.is_empty() => return Ok(matches),
            Ok(matches) => {
                let cli = Cli::from_arg_matches(&matches).ok();
                let roles = cli.and_then(|cli| cli.command.roles());
                return Err(CliError::invalid_values(&problems, roles.as_ref()));
            }
            Err(error) => error,
        };
        match error.kind() {
            ErrorKind::InvalidValue | ErrorKind::ValueValidation => {}
            _ if problems.is_empty() => error.exit(),
            _ => return Err(CliError::invalid_values(&problems, None)),
        }
        let problem = InvalidValue::new(&error, root);
        // Without the flag or the variable, the others are parsed too.
        if !remove_flag(&mut arguments, &problem.flag) {
            command = without_variable(command, &problem.name);
        }
        if problems.contains(&problem) {
            return Err(CliError::invalid_values(&problems, None));
        }
        problems.push(problem);
    }
}

/// Removes a flag and its value. Returns whether it is there.
fn remove_flag(arguments: &mut Vec<OsString>, flag: &str) -> bool {
    let long = format!("--{flag}");
    let with_value = format!("{long}=");
    let is_flag = |argument: &OsString| {
        *argument == *long || argument.to_string_lossy().starts_with(&with_value)
    };
    let Some(index) = arguments.iter().position(is_flag) else { return false };
    let count = if arguments[index] == *long { 2 } else { 1 };
    arguments.drain(index..arguments.len().min(index + count));
    true
}

/// The command and its subcommands, which no longer read a variable.
fn without_variable(command: clap::Command, name: &str) -> clap::Command {
    let command = command.mut_args(|argument| match argument.get_env() {
        Some(variable) if variable == name => argument.env(None::<&str>),
        _ => argument,
    });
    command.mut_subcommands(|subcommand| without_variable(subcommand, name))
}

/// The settings of the command and of its subcommand.
fn settings_of_subcommand(
    root: &clap::Command,
    matches: &ArgMatches,
    former_names: &FormerNames,
) -> Result<Vec<Setting>, CliError> {
    let (mut command, mut matches) = (root, matches);
    let mut all = Vec::new();
    while let Some((name, inner)) = matches.subcommand()
        && let Some(subcommand) = command.find_subcommand(name)
    {
        (command, matches) = (subcommand, inner);
        former_names.check(command).map_err(CliError::InvalidSetting)?;
        let mut settings = settings(command, matches);
        former_names.mark(&mut settings);
        all.extend(settings);
    }
    Ok(all)
}

/// Runs the command.
pub async fn execute(cli: Cli) -> Result<(), CliError> {
    let Cli { command, settings } = cli;
    if !command.is_role() {
        for warning in warnings(&settings) {
            writeln!(anstream::stderr(), "warning: {warning}")?;
        }
    }
    let serve = async |roles| serve::serve(Roles { settings: settings.clone(), ..roles }).await;
    match command {
        Command::All(args) => serve((*args).into()).await,
        Command::Auth(args) => serve((*args).into()).await,
        Command::Codegen(args) => serve((*args).into()).await,
        Command::Errors(args) => match args.subcommand {
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
        Command::Dev(args) => dev::dev(*args).await,
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
    fn the_errors_command_is_a_role_or_a_client_but_never_both() {
        let read = |line: &str| Cli::try_parse_from(line.split(' '));
        let is_client = |line: &str| match read(line).unwrap().command {
            Command::Errors(args) => args.subcommand.is_some(),
            _ => false,
        };
        assert!(!is_client("hapa errors --port 0 --error-retention-days 3"));
        assert!(is_client("hapa errors dashboard --address http://mesh:1"));
        assert!(is_client("hapa errors resolve INC-20260101-0123ABCD --version 1.2 --note done"));
        assert!(read("hapa errors --port 0 dashboard").is_err());
        assert!(read("hapa errors dashboard --port 0").is_err());
    }

    #[test]
    fn a_flag_has_the_name_of_its_environment_variable() {
        // The prefix separates client settings such as HAPA_API_KEY from settings of the mesh.
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

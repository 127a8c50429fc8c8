//! The error of a command: one message with advice, and an exit code that scripts can distinguish.

use std::io::Write as _;
use std::num::ParseIntError;
use std::process::ExitCode;

use anstyle::{AnsiColor, Style};
use clap::Command;
use clap::error::{ContextKind, ContextValue};
use hapa_core::config::ConfigError;
use hapa_core::rpc_error::{ErrorCode, published_code};
use tonic::{Code, Status};

use crate::Roles;

/// EX_CONFIG of sysexits.h.
const EX_CONFIG: u8 = 78;

/// Why a command failed.
#[derive(Debug)]
pub enum CliError {
    /// A setting has an invalid value.
    InvalidSetting(String),
    /// The mesh answered with an error.
    Rpc(Box<Status>),
    /// Anything else.
    Other(anyhow::Error),
}

/// A value that clap refused.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct InvalidValue {
    /// The environment variable of the setting, or else the flag.
    pub(super) name: String,
    /// The flag of the setting, without dashes.
    pub(super) flag: String,
    problem: String,
}

impl InvalidValue {
    pub(super) fn new(error: &clap::Error, root: &Command) -> InvalidValue {
        let text = |kind| match error.get(kind) {
            Some(ContextValue::String(text)) => text.as_str(),
            _ => "",
        };
        let (argument, value) = (text(ContextKind::InvalidArg), text(ContextKind::InvalidValue));
        let flag = argument.split(' ').next().unwrap_or(argument).trim_start_matches('-');
        let mut arguments = root.get_subcommands().flat_map(Command::get_arguments);
        let name = arguments
            .find(|argument| argument.get_long() == Some(flag))
            .and_then(|argument| argument.get_env())
            .map_or_else(|| argument.to_owned(), |name| name.to_string_lossy().into_owned());
        let problem = match (std::error::Error::source(error), error.get(ContextKind::ValidValue)) {
            (Some(source), _) if source.is::<ParseIntError>() => {
                "must be a whole number of the allowed size".to_owned()
            }
            (Some(source), _) => source.to_string(),
            (None, Some(ContextValue::Strings(valid))) => {
                format!("must be one of {}", valid.join(", "))
            }
            _ => "cannot be parsed".to_owned(),
        };
        let flag = flag.to_owned();
        InvalidValue { name, flag, problem: format!("{value:?} {problem}") }
    }
}

impl<E: Into<anyhow::Error>> From<E> for CliError {
    fn from(error: E) -> CliError {
        let error = error.into();
        match error.downcast::<ConfigError>() {
            Ok(wrong) => CliError::InvalidSetting(wrong.to_string()),
            Err(error) => match error.downcast::<Status>() {
                Ok(status) => CliError::Rpc(Box::new(status)),
                Err(error) => CliError::Other(error),
            },
        }
    }
}

impl CliError {
    /// The values that clap refused, and the problems of the settings of `roles` besides.
    pub(super) fn invalid_values(invalid: &[InvalidValue], roles: Option<&Roles>) -> CliError {
        let lines = invalid.iter().map(|one| format!("{}: {}", one.name, one.problem));
        let checked = roles.and_then(|roles| roles.check().err()).map(|error| error.to_string());
        CliError::InvalidSetting(lines.chain(checked).collect::<Vec<_>>().join("\n"))
    }

    /// Prints the error to standard error. Nothing is printed if the reader of standard output, such as `head`,
    /// closed the pipe.
    pub fn print(&self) {
        if self.is_broken_pipe() {
            return;
        }
        let style = Style::new().bold().fg_color(Some(AnsiColor::Red.into()));
        let mut out = anstream::stderr();
        let _ = match self {
            CliError::InvalidSetting(message) => {
                let mut lines = message.lines();
                let first = lines.next().unwrap_or_default();
                let written = writeln!(out, "{style}invalid setting:{style:#} {first}");
                lines.fold(written, |written, line| {
                    written.and_then(|()| writeln!(out, "{style}invalid setting:{style:#} {line}"))
                })
            }
            CliError::Rpc(status) => writeln!(out, "{style}error:{style:#} {}", describe(status)),
            CliError::Other(error) => writeln!(out, "{style}error:{style:#} {error:#}"),
        };
    }

    fn is_broken_pipe(&self) -> bool {
        let CliError::Other(error) = self else { return false };
        let error = error.downcast_ref::<std::io::Error>();
        error.is_some_and(|error| error.kind() == std::io::ErrorKind::BrokenPipe)
    }

    /// 78 for invalid settings, 1 for all other errors.
    pub fn exit_code(&self) -> ExitCode {
        match self {
            CliError::InvalidSetting(_) => EX_CONFIG.into(),
            CliError::Rpc(_) | CliError::Other(_) => ExitCode::FAILURE,
        }
    }
}

/// The published code, the message, the advice for the code and the incident id.
fn describe(status: &Status) -> String {
    let message = status.message();
    let Some((code, incident)) = published_code(status) else {
        let advice = match status.code() {
            Code::Unavailable | Code::Unknown => {
                "; check that the mesh runs: `make run` or `hapa all` starts it"
            }
            _ => "",
        };
        return format!("{}: {message}{advice}", status.code().description());
    };
    let published = ErrorCode::ALL.iter().find(|published| published.entry().name == code);
    let advice = published.map_or("", |code| code.entry().advice);
    format!("{code}: {message}\n       {advice} Incident {incident}.")
}

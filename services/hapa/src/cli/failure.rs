//! How a command fails: one sentence, what to do, and an exit code that scripts can tell apart.

use std::io::Write as _;
use std::process::ExitCode;

use anstyle::{AnsiColor, Style};
use clap::Command;
use clap::error::{ContextKind, ContextValue};
use hapa_core::config::Wrong;
use hapa_core::rpc_error::{ErrorCode, read};
use tonic::{Code, Status};

/// EX_CONFIG of sysexits.h.
const EX_CONFIG: u8 = 78;

/// Why a command did not do what was asked.
#[derive(Debug)]
pub enum Failure {
    /// A setting can't work.
    Setting(String),
    /// The mesh said no.
    Refused(Box<Status>),
    /// Anything else.
    Other(anyhow::Error),
}

impl<E: Into<anyhow::Error>> From<E> for Failure {
    fn from(error: E) -> Failure {
        let error = error.into();
        match error.downcast::<Wrong>() {
            Ok(wrong) => Failure::Setting(wrong.to_string()),
            Err(error) => match error.downcast::<Status>() {
                Ok(status) => Failure::Refused(Box::new(status)),
                Err(error) => Failure::Other(error),
            },
        }
    }
}

impl Failure {
    /// A value that clap refused, under the name of its environment variable.
    pub(super) fn setting(error: &clap::Error, root: &Command) -> Failure {
        let text = |kind| match error.get(kind) {
            Some(ContextValue::String(text)) => text.as_str(),
            _ => "",
        };
        let (argument, value) = (text(ContextKind::InvalidArg), text(ContextKind::InvalidValue));
        let flag = argument.split(' ').next().unwrap_or(argument).trim_start_matches('-');
        let mut arguments = root.get_subcommands().flat_map(Command::get_arguments);
        let name = arguments
            .find(|one| one.get_long() == Some(flag))
            .and_then(|one| one.get_env())
            .map_or_else(|| argument.to_owned(), |name| name.to_string_lossy().into_owned());
        let problem = match (std::error::Error::source(error), error.get(ContextKind::ValidValue)) {
            (Some(source), _) => source.to_string(),
            (None, Some(ContextValue::Strings(known))) => {
                format!("must be one of {}", known.join(", "))
            }
            _ => "can't be read".to_owned(),
        };
        Failure::Setting(format!("{name}: {value:?} {problem}"))
    }

    /// Tells what went wrong, to standard error. A reader who has left, such as `head`, is told nothing.
    pub fn print(&self) {
        if self.reader_left() {
            return;
        }
        let style = Style::new().bold().fg_color(Some(AnsiColor::Red.into()));
        let mut out = anstream::stderr();
        let _ = match self {
            Failure::Setting(words) => writeln!(out, "{style}wrong setting:{style:#} {words}"),
            Failure::Refused(status) => writeln!(out, "{style}error:{style:#} {}", explain(status)),
            Failure::Other(error) => writeln!(out, "{style}error:{style:#} {error:#}"),
        };
    }

    fn reader_left(&self) -> bool {
        let Failure::Other(error) = self else { return false };
        let error = error.downcast_ref::<std::io::Error>();
        error.is_some_and(|error| error.kind() == std::io::ErrorKind::BrokenPipe)
    }

    /// 78 for settings, 1 for the rest.
    pub fn exit_code(&self) -> ExitCode {
        match self {
            Failure::Setting(_) => EX_CONFIG.into(),
            Failure::Refused(_) | Failure::Other(_) => ExitCode::FAILURE,
        }
    }
}

fn explain(status: &Status) -> String {
    let words = status.message();
    let Some((code, incident)) = read(status) else {
        let hint = match status.code() {
            Code::Unavailable | Code::Unknown => {
                "; is the mesh running? `make run` or `hapa all` starts it"
            }
            _ => "",
        };
        return format!("{}: {words}{hint}", status.code().description());
    };
    let known = ErrorCode::ALL.iter().find(|known| known.entry().name == code);
    let advice = known.map_or("", |code| code.entry().advice);
    format!("{code}: {words}\n       {advice} Incident {incident}.")
}

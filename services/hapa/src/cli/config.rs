//! `hapa config`: the value and the source of every setting; secrets are redacted.

use std::fmt::Write as _;
use std::io::Write as _;

use clap::{Arg, Args as _, Command};
use comfy_table::{Table, presets};

use crate::cli::CliError;
use crate::setting::Setting;
use crate::{AllRolesArgs, Roles};

const ROLES: [&str; 5] = ["all", "auth", "codegen", "errors", "analytics"];

/// The flags of `hapa all`: the command shows the settings that the same flags would give a role.
#[derive(clap::Args, Clone, Debug)]
#[command(after_help = "Example:\n  PORT=50052 hapa config --log-level debug")]
pub(super) struct ConfigArgs {
    #[command(flatten)]
    settings: AllRolesArgs,
    /// Print one JSON object of names and values.
    #[arg(long, conflicts_with = "example")]
    json: bool,
    /// Check the settings as this role does.
    #[arg(long, value_name = "ROLE", default_value = "all", value_parser = ROLES)]
    role: String,
    /// Print a commented .env file with every setting and its default.
    #[arg(long)]
    example: bool,
}

impl ConfigArgs {
    /// The roles that are checked, with these settings.
    pub(super) fn roles(&self) -> Roles {
        let mut roles = Roles::from(self.settings.clone());
        let is_checked = |role| self.role == "all" || self.role == role;
        roles.auth = roles.auth.filter(|_| is_checked("auth"));
        roles.codegen = roles.codegen.filter(|_| is_checked("codegen"));
        roles.errors = roles.errors.filter(|_| is_checked("errors"));
        roles.analytics = roles.analytics.filter(|_| is_checked("analytics"));
        roles
    }
}

pub(super) fn print(args: &ConfigArgs, settings: Vec<Setting>) -> Result<(), CliError> {
    let mut out = std::io::stdout();
    if args.example {
        return Ok(write!(out, "{}", example(&ConfigArgs::augment_args(Command::new("hapa"))))?);
    }
    args.roles().check()?;
    if args.json {
        let rows = settings.into_iter().map(|setting| (setting.name, setting.value.into()));
        let object: serde_json::Map<_, _> = rows.collect();
        writeln!(out, "{}", serde_json::Value::from(object))?;
        return Ok(());
    }
    let mut table = Table::new();
    table.load_preset(presets::NOTHING).set_header(["SETTING", "VALUE", "SOURCE"]);
    table.add_rows(settings.into_iter().map(|setting| {
        let source = setting.source_description();
        [setting.name, setting.value, source]
    }));
    writeln!(out, "{table}")?;
    Ok(())
}

/// A commented `.env` file: for each setting its help, its name and its default.
fn example(command: &Command) -> String {
    let mut text = "# Settings of HAPA. Remove the # in front of a name to set it.\n".to_owned();
    for argument in command.get_arguments() {
        let Some(name) = argument.get_env() else { continue };
        text.push('\n');
        for line in textwrap(&help(argument)) {
            let _ = writeln!(text, "# {line}");
        }
        let defaults = argument.get_default_values().iter().map(|value| value.to_string_lossy());
        let defaults = defaults.collect::<Vec<_>>().join(",");
        let _ = writeln!(text, "#{}={defaults}", name.to_string_lossy());
    }
    text
}

fn help(argument: &Arg) -> String {
    let help = argument.get_long_help().or_else(|| argument.get_help());
    help.map(ToString::to_string).unwrap_or_default()
}

/// Breaks a text into lines of at most 100 characters, if its words allow it.
fn textwrap(text: &str) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split_whitespace() {
        match lines.last_mut() {
            Some(line) if line.is_empty() => line.push_str(word),
            Some(line) if line.len() + word.len() < 100 => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.to_owned()),
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_example_has_each_setting_once_with_its_default_and_no_secret() {
        let text = example(&ConfigArgs::augment_args(Command::new("hapa")));
        for line in ["#PORT=50051", "#AI_MODEL_API_KEY=", "#LOG_LEVEL=info", "#DATABASE_URL="] {
            assert_eq!(text.lines().filter(|other| *other == line).count(), 1, "{line}");
        }
        assert!(text.lines().all(|line| line.is_empty() || line.starts_with('#')), "{text}");
        assert!(text.lines().filter(|line| line.starts_with("# ")).all(|line| line.len() <= 110));
    }
}

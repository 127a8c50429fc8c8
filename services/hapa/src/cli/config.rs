//! `hapa config`: what every setting is, where it comes from, and no secret.

use std::io::Write as _;

use clap::parser::ValueSource;
use clap::{Arg, ArgMatches, Command};
use comfy_table::{Table, presets};

use crate::cli::{Failure, serve};

/// Takes the flags of `hapa all`, so that it can be asked what they would do.
#[derive(clap::Args, Clone, Debug)]
#[group(id = "config_args")]
pub(super) struct Args {
    #[command(flatten)]
    settings: serve::All,
    /// One JSON object.
    #[arg(long)]
    json: bool,
}

struct Setting {
    name: String,
    value: String,
    source: &'static str,
}

pub(super) fn print(args: &Args, root: &Command) -> Result<(), Failure> {
    args.settings.check()?;
    let matches = root.clone().get_matches();
    let (Some(command), Some(matches)) =
        (root.find_subcommand("config"), matches.subcommand_matches("config"))
    else {
        return Err(anyhow::anyhow!("the command config is gone").into());
    };
    let settings = command.get_arguments().filter_map(|argument| setting(argument, matches));
    let mut out = std::io::stdout();
    if args.json {
        let object: serde_json::Map<_, _> =
            settings.map(|setting| (setting.name, setting.value.into())).collect();
        writeln!(out, "{}", serde_json::Value::from(object))?;
        return Ok(());
    }
    let mut table = Table::new();
    table.load_preset(presets::NOTHING).set_header(["SETTING", "VALUE", "FROM"]);
    table
        .add_rows(settings.map(|Setting { name, value, source }| [name, value, source.to_owned()]));
    writeln!(out, "{table}")?;
    Ok(())
}

fn setting(argument: &Arg, matches: &ArgMatches) -> Option<Setting> {
    let id = argument.get_id().as_str();
    let name = argument.get_env()?.to_string_lossy().into_owned();
    let values = matches.get_raw(id).into_iter().flatten();
    let value = values.map(|value| value.to_string_lossy()).collect::<Vec<_>>().join(",");
    let source = match matches.value_source(id) {
        Some(ValueSource::CommandLine) => "flag",
        Some(ValueSource::EnvVariable) => "environment",
        Some(_) => "default",
        None => "not set",
    };
    let hidden = argument.is_hide_env_values_set() && !value.is_empty();
    let value = if hidden { "(redacted)".to_owned() } else { value };
    Some(Setting { name, value, source })
}

//! `hapa config`: the value and the source of every setting; secrets are redacted.

use std::io::Write as _;

use comfy_table::{Table, presets};

use crate::AllRolesArgs;
use crate::cli::CliError;
use crate::setting::Setting;

/// The flags of `hapa all`: the command shows the settings that the same flags would give a role.
#[derive(clap::Args, Clone, Debug)]
#[command(after_help = "Example:\n  PORT=50052 hapa config --log-level debug")]
pub(super) struct ConfigArgs {
    #[command(flatten)]
    settings: AllRolesArgs,
    /// Print one JSON object of names and values.
    #[arg(long)]
    json: bool,
}

pub(super) fn print(args: &ConfigArgs, settings: Vec<Setting>) -> Result<(), CliError> {
    args.settings.server.check()?;
    let mut out = std::io::stdout();
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

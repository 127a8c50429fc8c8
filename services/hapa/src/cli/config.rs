//! `hapa config`: what every setting is, where it comes from, and no secret.

use std::io::Write as _;

use comfy_table::{Table, presets};

use crate::All;
use crate::cli::Failure;
use crate::setting::Setting;

/// Takes the flags of `hapa all`, so that it can be asked what they would do.
#[derive(clap::Args, Clone, Debug)]
#[group(id = "config_args")]
pub(super) struct Args {
    #[command(flatten)]
    settings: All,
    /// One JSON object.
    #[arg(long)]
    json: bool,
}

pub(super) fn print(args: &Args, settings: Vec<Setting>) -> Result<(), Failure> {
    args.settings.server.check()?;
    let mut out = std::io::stdout();
    if args.json {
        let rows = settings.into_iter().map(|setting| (setting.name, setting.value.into()));
        let object: serde_json::Map<_, _> = rows.collect();
        writeln!(out, "{}", serde_json::Value::from(object))?;
        return Ok(());
    }
    let mut table = Table::new();
    table.load_preset(presets::NOTHING).set_header(["SETTING", "VALUE", "FROM"]);
    let rows = settings.into_iter();
    table.add_rows(rows.map(|Setting { name, value, source }| [name, value, source.to_owned()]));
    writeln!(out, "{table}")?;
    Ok(())
}

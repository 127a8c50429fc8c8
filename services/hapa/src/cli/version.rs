//! `hapa version`: the version and build of this binary, for bug reports and scripts.

use std::io::Write as _;

use serde_json::json;

use crate::cli::{CliError, table};

#[derive(clap::Args, Clone, Debug)]
pub(super) struct VersionArgs {
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

const VERSION: &str = env!("CARGO_PKG_VERSION");
/// Set by build.rs in release builds from a git checkout.
const COMMIT: Option<&str> = option_env!("HAPA_COMMIT");
const PROFILE: &str = if cfg!(debug_assertions) { "debug" } else { "release" };
const RUSTC: &str = env!("HAPA_RUSTC");
/// The same in every build: stores and engines are chosen by settings.
const FEATURES: [&str; 4] = ["sqlite", "postgres", "redis", "tls"];

pub(super) fn version(args: &VersionArgs) -> Result<(), CliError> {
    let mut out = std::io::stdout();
    if args.json {
        let about = json!({
            "version": VERSION,
            "commit": COMMIT,
            "profile": PROFILE,
            "features": FEATURES,
            "rustc": RUSTC,
        });
        writeln!(out, "{about}")?;
        return Ok(());
    }
    let rows = [
        ("version", VERSION.to_owned()),
        ("commit", COMMIT.unwrap_or("unknown").to_owned()),
        ("profile", PROFILE.to_owned()),
        ("features", FEATURES.join(", ")),
        ("rustc", RUSTC.to_owned()),
    ];
    writeln!(out, "{}", table::field_table(rows))?;
    Ok(())
}

//! `hapa version`: what this binary is, for a report of a bug and for scripts.

use std::io::Write as _;

use serde_json::json;

use crate::cli::{Failure, table};

#[derive(clap::Args, Clone, Debug)]
#[group(id = "version_args")]
pub(super) struct Args {
    /// One JSON object.
    #[arg(long)]
    json: bool,
}

const VERSION: &str = env!("CARGO_PKG_VERSION");
/// See build.rs: a release build knows it, but not one from an archive.
const COMMIT: Option<&str> = option_env!("HAPA_COMMIT");
const PROFILE: &str = if cfg!(debug_assertions) { "debug" } else { "release" };
const RUSTC: &str = env!("HAPA_RUSTC");
/// Which stores and engines there are is a setting; what is built in is the same in every build.
const FEATURES: [&str; 4] = ["sqlite", "postgres", "redis", "tls"];

pub(super) fn version(args: &Args) -> Result<(), Failure> {
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
        ("commit", COMMIT.unwrap_or("not known").to_owned()),
        ("profile", PROFILE.to_owned()),
        ("features", FEATURES.join(", ")),
        ("rustc", RUSTC.to_owned()),
    ];
    writeln!(out, "{}", table::facts(rows))?;
    Ok(())
}

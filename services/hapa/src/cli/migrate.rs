//! `hapa migrate`: migrates stores before a release replaces running processes, so that a failing migration stops
//! the release. Concurrent migrations of one store wait for each other.

use std::io::Write as _;
use std::path::PathBuf;

use clap::ValueEnum as _;
use hapa_core::config::store_url;
use secrecy::SecretString;

use crate::cli::CliError;

#[derive(clap::Args, Clone, Debug)]
#[command(after_help = "Example:\n  DATABASE_URL=postgres://… hapa migrate auth errors")]
pub(super) struct MigrateArgs {
    /// Roles whose stores are migrated; default: all.
    #[arg(value_enum, value_name = "ROLE")]
    roles: Vec<StoreRole>,
    /// URL of the store, as the roles have it; default: the SQLite files in DATA_DIR.
    #[arg(long, env = "DATABASE_URL", hide_env_values = true)]
    database_url: Option<SecretString>,
    /// Directory of embedded stores and generated secrets.
    #[arg(long, env = "DATA_DIR", default_value = "data")]
    data_dir: PathBuf,
    /// Accept API_KEY_PEPPER, or the pepper in DATA_DIR, as the pepper of the auth store. Keys and sessions
    /// stored under another pepper stop working.
    #[arg(long)]
    accept_pepper: bool,
    /// Secret that stored keys are hashed with; read only with --accept-pepper.
    #[arg(long, env = "API_KEY_PEPPER", hide_env_values = true)]
    api_key_pepper: Option<SecretString>,
}

/// The roles that have a store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum StoreRole {
    Auth,
    Errors,
    Analytics,
}

pub(super) async fn migrate(args: &MigrateArgs) -> Result<(), CliError> {
    let all = StoreRole::value_variants().iter();
    for role in all.filter(|role| args.roles.is_empty() || args.roles.contains(role)) {
        let url = |service| store_url(args.database_url.as_ref(), &args.data_dir, service);
        let name = match role {
            StoreRole::Auth => hapa_auth::migrate(&url("auth")).await.map(|()| "auth"),
            StoreRole::Errors => hapa_errors::migrate(&url("errors")).await.map(|()| "errors"),
            StoreRole::Analytics => {
                hapa_analytics::migrate(&url("analytics")).await.map(|()| "analytics")
            }
        };
        writeln!(std::io::stdout(), "{}: up to date", name?)?;
    }
    if args.accept_pepper {
        let pepper = hapa_auth::PepperConfig {
            api_key_pepper: args.api_key_pepper.clone(),
            data_dir: args.data_dir.clone(),
        };
        let url = store_url(args.database_url.as_ref(), &args.data_dir, "auth");
        hapa_auth::accept_pepper(&url, &pepper).await?;
        writeln!(std::io::stdout(), "auth: the pepper is accepted")?;
    }
    Ok(())
}

//! `hapa migrate`: brings stores up to this version and ends, so that a release which can't migrate is
//! known before anything that runs is replaced. Replicas that migrate at once wait for each other.

use std::io::Write as _;
use std::path::PathBuf;

use clap::ValueEnum as _;
use hapa_core::config::store_url;
use secrecy::SecretString;

use crate::cli::Failure;

#[derive(clap::Args, Clone, Debug)]
#[group(id = "migrate_args")]
pub(super) struct Args {
    /// Whose stores; default: all.
    #[arg(value_enum, value_name = "ROLE")]
    roles: Vec<Role>,
    /// The store, as the roles have it; without one the SQLite files in DATA_DIR.
    #[arg(long, env = "DATABASE_URL", hide_env_values = true)]
    database_url: Option<SecretString>,
    /// Where embedded stores live.
    #[arg(long, env = "DATA_DIR", default_value = "data")]
    data_dir: PathBuf,
    /// Take API_KEY_PEPPER, or the one in DATA_DIR, for the store's of auth from now on: keys and sessions that were
    /// made with another one are given up.
    #[arg(long)]
    accept_pepper: bool,
    /// Secret that stored keys are hashed with; read with --accept-pepper alone.
    #[arg(long, env = "API_KEY_PEPPER", hide_env_values = true)]
    api_key_pepper: Option<SecretString>,
}

/// The roles that keep a store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Role {
    Auth,
    Errors,
    Analytics,
}

pub(super) async fn migrate(args: &Args) -> Result<(), Failure> {
    let all = Role::value_variants().iter();
    for role in all.filter(|role| args.roles.is_empty() || args.roles.contains(role)) {
        let url = |service| store_url(args.database_url.as_ref(), &args.data_dir, service);
        let name = match role {
            Role::Auth => hapa_auth::migrate(&url("auth")).await.map(|()| "auth"),
            Role::Errors => hapa_errors::migrate(&url("errors")).await.map(|()| "errors"),
            Role::Analytics => {
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

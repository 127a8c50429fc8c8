//! Keys and who holds them: the truth that every service's admission asks for.

mod credential;
mod error;
mod key;
mod store;

use hapa_chassis::db::Db;
use hapa_chassis::{Access, Rpc, Server, config, secret};
use hapa_proto::auth::v1::auth_service_server::AuthServiceServer;
use hapa_proto::auth::v1::key_service_server::KeyServiceServer;
use secrecy::{ExposeSecret as _, SecretString};

use crate::store::Store;

/// Settings of this service.
#[derive(clap::Args, Clone, Debug)]
#[command(next_help_heading = "Auth")]
#[group(id = "auth")]
pub struct Config {
    /// Life of a key that is made without an end of its own, in days.
    #[arg(long, env = "API_KEY_EXPIRY_DAYS", default_value_t = 90, value_parser = clap::value_parser!(u32).range(1..=3650))]
    pub api_key_expiry_days: u32,
    /// Secret that stored keys are hashed with, 32 characters or more; without one it is made and
    /// kept in DATA_DIR/key-pepper. Keys made with one pepper are unknown under another.
    #[arg(long, env = "API_KEY_PEPPER", hide_env_values = true)]
    pub api_key_pepper: Option<SecretString>,
}

const RPCS: &[Rpc] = &[
    Rpc::new("/hapa.auth.v1.AuthService/Authenticate", Access::Mesh),
    Rpc::new("/hapa.auth.v1.KeyService/CreateKey", Access::Scope("auth:admin")),
    Rpc::new("/hapa.auth.v1.KeyService/ListKeys", Access::Scope("auth:admin")),
    Rpc::new("/hapa.auth.v1.KeyService/GetKey", Access::Scope("auth:admin")),
    Rpc::new("/hapa.auth.v1.KeyService/RevokeKey", Access::Scope("auth:admin")),
];

/// Opens the store and adds the services.
pub async fn mount(config: &Config, server: &mut Server) -> anyhow::Result<()> {
    let pepper = pepper(config, server.config())?;
    let store = Store::new(Db::open(&server.config().store_url("auth"), store::MIGRATIONS).await?);
    let credentials = credential::Credentials { store: store.clone(), pepper: pepper.clone() };
    let keys = key::Keys { store, pepper, default_days: config.api_key_expiry_days };
    server.add(AuthServiceServer::new(credentials), RPCS).await;
    server.add(KeyServiceServer::new(keys), &[]).await;
    Ok(())
}

fn pepper(config: &Config, server: &config::Config) -> anyhow::Result<SecretString> {
    const NAME: &str = "API_KEY_PEPPER";
    let length = config.api_key_pepper.as_ref().map_or(0, |pepper| pepper.expose_secret().len());
    if length == 0 && server.environment == config::Environment::Production {
        return Err(config::Wrong::new(NAME, "must be set when ENVIRONMENT is production").into());
    }
    if (1..secret::SHORTEST).contains(&length) {
        return Err(config::Wrong::new(NAME, "needs 32 characters or more").into());
    }
    secret::set_or_kept(config.api_key_pepper.as_ref(), &server.data_dir.join("key-pepper"))
}

//! The auth service: API keys, users, sessions, token budgets and the audit log. Every service
//! authenticates its callers against it.

mod access_token;
mod audit;
mod authentication;
mod budget;
mod calendar;
mod error;
mod idempotency;
mod ids;
mod jws;
mod key;
mod last_used;
mod login;
mod oidc;
mod password;
mod pepper;
mod revocation_feed;
mod secrets;
mod session;
mod startup;
mod store;
mod user;
mod validation;

use std::path::PathBuf;
use std::sync::Arc;

use hapa_chassis::config::Wrong;
use hapa_chassis::db::{Db, Durability, Survey};
use hapa_chassis::health::Check;
use hapa_chassis::secret::{self, Strength};
use hapa_chassis::tail::Tail;
use hapa_chassis::{Access, Rpc, Server, StoreSpec, config, rpc};
use hapa_proto::auth::v1::audit_service_server::AuditServiceServer;
use hapa_proto::auth::v1::auth_service_server::AuthServiceServer;
use hapa_proto::auth::v1::key_service_server::KeyServiceServer;
use hapa_proto::auth::v1::session_service_server::SessionServiceServer;
use hapa_proto::auth::v1::user_service_server::UserServiceServer;
use secrecy::SecretString;

use crate::audit::AuditApi;
use crate::authentication::AuthApi;
use crate::key::KeyApi;
use crate::last_used::LastUsedTracker;
use crate::oidc::OidcVerifier;
use crate::password::PasswordHasher;
use crate::pepper::Pepper;
use crate::revocation_feed::RevocationFeed;
use crate::session::SessionApi;
use crate::store::Store;
use crate::user::UserApi;

pub use crate::oidc::OidcConfig;

/// Settings of the auth service.
#[derive(clap::Args, Clone, Debug)]
#[command(next_help_heading = "Auth")]
#[group(id = "auth")]
pub struct Config {
    /// Lifetime of a key that is created without an expiry, in days: 1 to 3650.
    #[arg(long, env = "API_KEY_EXPIRY_DAYS", default_value_t = 90, value_parser = clap::value_parser!(u32).range(1..=3650))]
    pub api_key_expiry_days: u32,
    /// Secret with which stored keys and sessions are hashed, 32 characters or more. If unset, one is
    /// generated and stored in DATA_DIR/key-pepper. Credentials stored under another pepper are invalid.
    #[arg(long, env = "API_KEY_PEPPER", hide_env_values = true)]
    pub api_key_pepper: Option<SecretString>,
    /// Second pepper that stays valid while API_KEY_PEPPER is being replaced. A credential stored under
    /// it is stored under API_KEY_PEPPER once it is used.
    #[arg(
        long,
        alias = "api-key-pepper-also",
        env = "API_KEY_PEPPER_PREVIOUS",
        hide_env_values = true
    )]
    pub api_key_pepper_previous: Option<SecretString>,
    /// Secret that signs the access tokens of sessions, 32 characters or more. If unset, one is
    /// generated and stored in DATA_DIR/secret-key. A change invalidates all access tokens.
    #[arg(long, env = "SECRET_KEY", hide_env_values = true)]
    pub secret_key: Option<SecretString>,
    /// Second secret whose access tokens are accepted while SECRET_KEY is being replaced; new tokens are
    /// never signed with it.
    #[arg(long, alias = "secret-key-also", env = "SECRET_KEY_PREVIOUS", hide_env_values = true)]
    pub secret_key_previous: Option<SecretString>,
    /// File with an Ed25519 private key (PKCS#8 PEM) that signs access tokens in place of SECRET_KEY.
    /// Reloaded at SIGHUP.
    #[arg(long, env = "SESSION_KEY_FILE")]
    pub session_key_file: Option<PathBuf>,
    /// Second key file whose access tokens are accepted while SESSION_KEY_FILE is being replaced; new
    /// tokens are never signed with it. Reloaded at SIGHUP.
    #[arg(long, alias = "session-key-file-also", env = "SESSION_KEY_FILE_PREVIOUS")]
    pub session_key_file_previous: Option<PathBuf>,
    /// Lifetime of an access token, in minutes: 1 to 1440.
    #[arg(long, env = "ACCESS_TOKEN_MINUTES", default_value_t = 15, value_parser = clap::value_parser!(u32).range(1..=1440))]
    pub access_token_minutes: u32,
    /// Lifetime of a session that is not refreshed, in days: 1 to 365.
    #[arg(long, env = "SESSION_DAYS", default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..=365))]
    pub session_days: u32,
    /// Maximum lifetime of a session, refreshed or not, in days: 1 to 3650. The user must then log in
    /// again.
    #[arg(long, env = "SESSION_MAX_DAYS", default_value_t = 90, value_parser = clap::value_parser!(u32).range(1..=3650))]
    pub session_max_days: u32,
    /// The OpenID Connect provider whose ID tokens log users in.
    #[command(flatten)]
    pub oidc: OidcConfig,
}

const ADMIN: &str = "auth:admin";

/// The services that authenticate callers: all of them, auth included; the gateway is not one.
const ALL_SERVICES: &[&str] = rpc::SERVICES;

const RPCS: &[Rpc] = &[
    Rpc::new("/hapa.auth.v1.AuthService/Authenticate", Access::Mesh).by(ALL_SERVICES),
    Rpc::new("/hapa.auth.v1.AuthService/WatchRevocations", Access::Mesh).by(ALL_SERVICES),
    Rpc::new("/hapa.auth.v1.AuthService/ReserveTokens", Access::Mesh).by(&["codegen"]),
    Rpc::new("/hapa.auth.v1.AuthService/SettleTokens", Access::Mesh).by(&["codegen"]),
    Rpc::new("/hapa.auth.v1.KeyService/CreateKey", Access::Own(ADMIN)),
    Rpc::new("/hapa.auth.v1.KeyService/ListKeys", Access::Caller),
    Rpc::new("/hapa.auth.v1.KeyService/GetKey", Access::Caller),
    Rpc::new("/hapa.auth.v1.KeyService/RotateKey", Access::Own(ADMIN)),
    Rpc::new("/hapa.auth.v1.KeyService/UpdateKey", Access::Own(ADMIN)),
    Rpc::new("/hapa.auth.v1.KeyService/RevokeKey", Access::Own(ADMIN)),
    Rpc::new("/hapa.auth.v1.UserService/CreateUser", Access::Scope(ADMIN)),
    Rpc::new("/hapa.auth.v1.UserService/GetUser", Access::Caller),
    Rpc::new("/hapa.auth.v1.UserService/ListUsers", Access::Scope(ADMIN)),
    Rpc::new("/hapa.auth.v1.UserService/UpdateUser", Access::Own(ADMIN)),
    Rpc::new("/hapa.auth.v1.UserService/DeleteUser", Access::Scope(ADMIN)),
    Rpc::new("/hapa.auth.v1.UserService/GetProfile", Access::Caller),
    Rpc::new("/hapa.auth.v1.UserService/UpdateProfile", Access::Caller),
    Rpc::new("/hapa.auth.v1.SessionService/CreateSession", Access::Open),
    Rpc::new("/hapa.auth.v1.SessionService/RefreshSession", Access::Open),
    Rpc::new("/hapa.auth.v1.SessionService/ListSessions", Access::Own(ADMIN)),
    Rpc::new("/hapa.auth.v1.SessionService/RevokeSession", Access::Own(ADMIN)),
    Rpc::new("/hapa.auth.v1.AuditService/ListAuditEntries", Access::Scope(ADMIN)),
    Rpc::new("/hapa.auth.v1.AuditService/VerifyAuditLog", Access::Scope(ADMIN)),
];

/// The gRPC services that report NOT_SERVING while the store is unavailable.
const GRPC_SERVICES: &[&str] = &[
    "hapa.auth.v1.AuthService",
    "hapa.auth.v1.KeyService",
    "hapa.auth.v1.UserService",
    "hapa.auth.v1.SessionService",
    "hapa.auth.v1.AuditService",
];

/// A damaged store is never set aside: without it every key is unknown.
const STORE: &StoreSpec = &StoreSpec {
    service: "auth",
    steps: store::MIGRATIONS,
    durability: Durability::PowerCut,
    may_be_set_aside: false,
};

/// Migrates the store at `url`.
pub async fn migrate(url: &str) -> anyhow::Result<()> {
    open_db(url).await.map(drop)
}

/// Rejects missing and weak secrets by the name of their setting.
pub fn check(config: &Config, server: &config::Config) -> Result<(), Wrong> {
    secrets::check(config, server)
}

/// Whether the pepper that is set or was generated matches the store's credentials. `None` if there is no
/// pepper, or if the store has no record of one. Call it only for a store that [`survey`] found up to date.
pub async fn pepper_is_known(
    config: &Config,
    server: &config::Config,
) -> anyhow::Result<Option<bool>> {
    let Some(pepper) = secrets::existing_pepper(config, server)? else { return Ok(None) };
    let store = Store::new(open_db(&server.store_url("auth")).await?);
    let (recorded, configured) = (store.pepper_fingerprints().await?, pepper.fingerprints()?);
    Ok((!recorded.is_empty())
        .then(|| configured.iter().any(|fingerprint| recorded.contains(fingerprint))))
}

/// Records the pepper that is set or was generated as the store's. Credentials stored under another pepper
/// stay invalid.
pub async fn accept_pepper(url: &str, pepper: &PepperConfig) -> anyhow::Result<()> {
    let set = secret::set("API_KEY_PEPPER", pepper.api_key_pepper.as_ref(), Strength::Long)?;
    let file = pepper.data_dir.join("key-pepper");
    if set.is_none() && !file.exists() {
        let problem = "is not set, and DATA_DIR holds no generated pepper";
        return Err(Wrong::new("API_KEY_PEPPER", problem).into());
    }
    let pepper = Pepper { current: secret::set_or_kept(set, &file)?, previous: None };
    let store = Store::new(open_db(url).await?);
    store.record_pepper_fingerprints(pepper.fingerprints()?).await?;
    Ok(())
}

/// Where [`accept_pepper`] finds the pepper.
#[derive(Debug)]
pub struct PepperConfig {
    /// The pepper that is set; wins over a generated one.
    pub api_key_pepper: Option<SecretString>,
    /// The folder that may hold a generated pepper (`key-pepper`).
    pub data_dir: PathBuf,
}

/// Reads the migration state of the store at `url`. Changes nothing.
pub async fn survey(url: &str) -> anyhow::Result<Option<Survey>> {
    Db::survey("auth", url, store::MIGRATIONS).await
}

async fn open_db(url: &str) -> anyhow::Result<Db> {
    Db::open("auth", url, store::MIGRATIONS).await
}

/// Opens the store, starts the background tasks, and registers the gRPC services.
pub async fn mount(config: &Config, server: &mut Server) -> anyhow::Result<()> {
    secrets::check(config, server.config())?;
    let pepper = secrets::pepper(config, server.config())?;
    let tokens = Arc::new(secrets::tokens(config, server.config())?);
    let settings = (config.clone(), server.config().clone());
    server.spawn(secrets::reload_on_sighup(settings, Arc::clone(&tokens)));
    let oidc = OidcVerifier::new(&config.oidc)?;
    let db = server.open_store(STORE).await?;
    server.check(Check::store("auth", &db, GRPC_SERVICES));
    server.check(Check::store_write("auth", &db));
    let store = Store::new(db);
    startup::check_store(&store, &pepper, server).await?;
    let (password_hasher, last_used) = (PasswordHasher::new(), LastUsedTracker::default());
    let (feed, poller) = Tail::of(store.clone(), server.closing());
    server.spawn(poller);
    let (tracker, tracker_store) = (last_used.clone(), store.clone());
    server.spawn_to_end(|shutdown| tracker.run(tracker_store, shutdown));
    server.spawn(budget::release_expired_leases(store.clone()));
    let max_session_age_micros = calendar::add_days(0, config.session_max_days);
    server.spawn(session::purge_ended_sessions(store.clone(), max_session_age_micros));
    server.spawn(idempotency::purge_expired_records(store.clone()));
    let credentials = AuthApi {
        store: store.clone(),
        pepper: pepper.clone(),
        tokens: Arc::clone(&tokens),
        max_session_age_micros,
        last_used,
        revocation_feed: RevocationFeed { store: store.clone(), feed },
    };
    let sessions = SessionApi {
        store: store.clone(),
        pepper: pepper.clone(),
        password_hasher: password_hasher.clone(),
        tokens,
        oidc,
        access_token_minutes: config.access_token_minutes,
        session_days: config.session_days,
        max_session_age_micros,
    };
    let users = UserApi { store: store.clone(), pepper: pepper.clone(), password_hasher };
    let keys =
        KeyApi { store: store.clone(), pepper, default_expiry_days: config.api_key_expiry_days };
    server.add(AuthServiceServer::new(credentials), RPCS).await;
    server.add(KeyServiceServer::new(keys), &[]).await;
    server.add(UserServiceServer::new(users), &[]).await;
    server.add(SessionServiceServer::new(sessions), &[]).await;
    server.add(AuditServiceServer::new(AuditApi { store }), &[]).await;
    Ok(())
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use secrecy::ExposeSecret as _;

    use super::*;

    #[derive(Parser)]
    struct AuthCli {
        #[command(flatten)]
        auth: Config,
    }

    #[test]
    fn flags_with_the_suffix_also_are_accepted_as_aliases() {
        let flags = ["test", "--api-key-pepper-also=a", "--secret-key-also=b"];
        let files = ["--session-key-file-also=c"];
        let config = AuthCli::try_parse_from(flags.into_iter().chain(files)).unwrap().auth;
        let secrets = [config.api_key_pepper_previous, config.secret_key_previous];
        let secrets = secrets.map(|secret| secret.unwrap().expose_secret().to_owned());
        assert_eq!(secrets, ["a", "b"]);
        assert_eq!(config.session_key_file_previous, Some(PathBuf::from("c")));
    }
}

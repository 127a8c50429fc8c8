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

use futures_util::future::BoxFuture;
use hapa_core::access::{self, Access, Rpc};
use hapa_core::config::{CommonConfig, ConfigError};
use hapa_core::secret::{self, Strength};
use hapa_core::service::{ServiceSpec, Shutdown};
use hapa_proto::auth::v1::audit_service_server::AuditServiceServer;
use hapa_proto::auth::v1::auth_service_server::AuthServiceServer;
use hapa_proto::auth::v1::key_service_server::KeyServiceServer;
use hapa_proto::auth::v1::session_service_server::SessionServiceServer;
use hapa_proto::auth::v1::user_service_server::UserServiceServer;
use hapa_store::change_feed::ChangeFeed;
use hapa_store::database::{DatabaseStatus, Db, Durability};
use hapa_store::open::{OpenStore, StoreSpec};
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
const ALL_SERVICES: &[&str] = access::SERVICE_ROLES;

const RPCS: &[Rpc] = &[
    Rpc::new("/hapa.auth.v1.AuthService/Authenticate", Access::Service).allowed_roles(ALL_SERVICES),
    Rpc::new("/hapa.auth.v1.AuthService/WatchRevocations", Access::Service)
        .allowed_roles(ALL_SERVICES),
    Rpc::new("/hapa.auth.v1.AuthService/ReserveTokens", Access::Service)
        .allowed_roles(&["codegen"]),
    Rpc::new("/hapa.auth.v1.AuthService/SettleTokens", Access::Service).allowed_roles(&["codegen"]),
    Rpc::new("/hapa.auth.v1.KeyService/CreateKey", Access::SelfOrScope(ADMIN)),
    Rpc::new("/hapa.auth.v1.KeyService/ListKeys", Access::Authenticated),
    Rpc::new("/hapa.auth.v1.KeyService/GetKey", Access::Authenticated),
    Rpc::new("/hapa.auth.v1.KeyService/RotateKey", Access::SelfOrScope(ADMIN)),
    Rpc::new("/hapa.auth.v1.KeyService/UpdateKey", Access::SelfOrScope(ADMIN)),
    Rpc::new("/hapa.auth.v1.KeyService/RevokeKey", Access::SelfOrScope(ADMIN)),
    Rpc::new("/hapa.auth.v1.UserService/CreateUser", Access::Scope(ADMIN)),
    Rpc::new("/hapa.auth.v1.UserService/GetUser", Access::Authenticated),
    Rpc::new("/hapa.auth.v1.UserService/ListUsers", Access::Scope(ADMIN)),
    Rpc::new("/hapa.auth.v1.UserService/UpdateUser", Access::SelfOrScope(ADMIN)),
    Rpc::new("/hapa.auth.v1.UserService/DeleteUser", Access::Scope(ADMIN)),
    Rpc::new("/hapa.auth.v1.UserService/GetProfile", Access::Authenticated),
    Rpc::new("/hapa.auth.v1.UserService/UpdateProfile", Access::Authenticated),
    Rpc::new("/hapa.auth.v1.SessionService/CreateSession", Access::Login),
    Rpc::new("/hapa.auth.v1.SessionService/RefreshSession", Access::Login),
    Rpc::new("/hapa.auth.v1.SessionService/ListSessions", Access::SelfOrScope(ADMIN)),
    Rpc::new("/hapa.auth.v1.SessionService/RevokeSession", Access::SelfOrScope(ADMIN)),
    Rpc::new("/hapa.auth.v1.AuditService/ListAuditEntries", Access::Scope(ADMIN)),
    Rpc::new("/hapa.auth.v1.AuditService/VerifyAuditLog", Access::Scope(ADMIN)),
];

/// The gRPC services that report NOT_SERVING while the store is unavailable.
pub const SERVICES: &[&str] = &[
    "hapa.auth.v1.AuthService",
    "hapa.auth.v1.KeyService",
    "hapa.auth.v1.UserService",
    "hapa.auth.v1.SessionService",
    "hapa.auth.v1.AuditService",
];

/// A damaged store is never set aside: without it every key is unknown.
pub const STORE: &StoreSpec = &StoreSpec {
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
pub fn check(config: &Config, common: &CommonConfig) -> Result<(), ConfigError> {
    secrets::check(config, common)
}

/// Whether the pepper that is set or was generated matches the store's credentials. `None` if there is no
/// pepper, or if the store has no record of one. Call it only for a store that [`survey`] found up to date.
pub async fn pepper_is_known(
    config: &Config,
    common: &CommonConfig,
) -> anyhow::Result<Option<bool>> {
    let Some(pepper) = secrets::existing_pepper(config, common)? else { return Ok(None) };
    let store = Store::new(open_db(&common.store_url("auth")).await?);
    let (recorded, configured) = (store.pepper_fingerprints().await?, pepper.fingerprints()?);
    Ok((!recorded.is_empty())
        .then(|| configured.iter().any(|fingerprint| recorded.contains(fingerprint))))
}

/// Records the pepper that is set or was generated as the store's. Credentials stored under another pepper
/// stay invalid.
pub async fn accept_pepper(url: &str, pepper: &PepperConfig) -> anyhow::Result<()> {
    let set = secret::validate_configured(
        "API_KEY_PEPPER",
        pepper.api_key_pepper.as_ref(),
        Strength::Long,
    )?;
    let file = pepper.data_dir.join("key-pepper");
    if set.is_none() && !file.exists() {
        let problem = "is not set, and DATA_DIR holds no generated pepper";
        return Err(ConfigError::new("API_KEY_PEPPER", problem).into());
    }
    let pepper = Pepper { current: secret::load_or_generate(set, &file)?, previous: None };
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
pub async fn survey(url: &str) -> anyhow::Result<Option<DatabaseStatus>> {
    Db::inspect("auth", url, store::MIGRATIONS).await
}

async fn open_db(url: &str) -> anyhow::Result<Db> {
    Db::open("auth", url, store::MIGRATIONS).await
}

/// What the service needs of its process.
pub struct Dependencies {
    /// Settings that services share.
    pub common: CommonConfig,
    /// The store, opened by [`STORE`].
    pub store: OpenStore,
    /// The shutdown of the server.
    pub shutdown: Shutdown,
    /// Finds an outbox in DATA_DIR with an event of an authenticated caller, which is the sign of a lost store.
    pub find_undelivered_events: BoxFuture<'static, Option<PathBuf>>,
}

/// Builds the gRPC services, their health checks and their background tasks.
pub async fn service(config: &Config, dependencies: Dependencies) -> anyhow::Result<ServiceSpec> {
    let Dependencies { common, store: OpenStore { db, checks }, shutdown, find_undelivered_events } =
        dependencies;
    secrets::check(config, &common)?;
    let pepper = secrets::pepper(config, &common)?;
    let tokens = Arc::new(secrets::tokens(config, &common)?);
    let oidc = OidcVerifier::new(&config.oidc)?;
    let mut spec = ServiceSpec { checks, ..ServiceSpec::default() };
    spec.spawn(secrets::reload_on_sighup((config.clone(), common), Arc::clone(&tokens)));
    let store = Store::new(db);
    spec.checks.extend(startup::check_store(&store, &pepper, find_undelivered_events).await?);
    let (password_hasher, last_used) = (PasswordHasher::new(), LastUsedTracker::default());
    let (feed, poller) = ChangeFeed::new(store.clone(), shutdown.stop_accepting);
    spec.spawn(poller);
    let (tracker, tracker_store) = (last_used.clone(), store.clone());
    spec.spawn_until(|end| tracker.run(tracker_store, end));
    spec.spawn(budget::release_expired_leases(store.clone()));
    let max_session_age_micros = calendar::add_days(0, config.session_max_days);
    spec.spawn(session::purge_ended_sessions(store.clone(), max_session_age_micros));
    spec.spawn(idempotency::purge_expired_records(store.clone()));
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
    spec.add(AuthServiceServer::new(credentials), RPCS);
    spec.add(KeyServiceServer::new(keys), &[]);
    spec.add(UserServiceServer::new(users), &[]);
    spec.add(SessionServiceServer::new(sessions), &[]);
    spec.add(AuditServiceServer::new(AuditApi { store }), &[]);
    Ok(spec)
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

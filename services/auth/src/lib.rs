//! Keys, users and sessions, what they may do and spend, and who changed it: the truth that every
//! service's admission asks for.

mod audit;
mod budget;
mod check;
mod credential;
mod error;
mod idempotency;
mod identity;
mod ids;
mod jws;
mod key;
mod last_use;
mod login;
mod password;
mod pepper;
mod revocation;
mod secrets;
mod session;
mod start;
mod store;
mod times;
mod token;
mod user;

use std::path::PathBuf;
use std::sync::Arc;

use futures_util::future::BoxFuture;
use hapa_core::access::{self, Access, Rpc};
use hapa_core::config::{CommonConfig, Wrong};
use hapa_core::secret::{self, Strength};
use hapa_core::service::{ServiceSpec, Shutdown};
use hapa_proto::auth::v1::audit_service_server::AuditServiceServer;
use hapa_proto::auth::v1::auth_service_server::AuthServiceServer;
use hapa_proto::auth::v1::key_service_server::KeyServiceServer;
use hapa_proto::auth::v1::session_service_server::SessionServiceServer;
use hapa_proto::auth::v1::user_service_server::UserServiceServer;
use hapa_store::change_feed::Tail;
use hapa_store::database::{Db, Durability, Survey};
use hapa_store::open::{OpenStore, StoreSpec};
use secrecy::SecretString;

use crate::audit::Audit;
use crate::credential::Credentials;
use crate::identity::Identity;
use crate::key::Keys;
use crate::last_use::Uses;
use crate::password::Passwords;
use crate::pepper::Pepper;
use crate::revocation::News;
use crate::session::Sessions;
use crate::store::Store;
use crate::user::Users;

pub use crate::identity::IdentityConfig;

/// Settings of this service.
#[derive(clap::Args, Clone, Debug)]
#[command(next_help_heading = "Auth")]
#[group(id = "auth")]
pub struct Config {
    /// Life of a key that is made without an end of its own, in days.
    #[arg(long, env = "API_KEY_EXPIRY_DAYS", default_value_t = 90, value_parser = clap::value_parser!(u32).range(1..=3650))]
    pub api_key_expiry_days: u32,
    /// Secret that stored keys are hashed with, 32 characters or more; without one it is made and
    /// kept in DATA_DIR/key-pepper. What is kept under one pepper is unknown under another.
    #[arg(long, env = "API_KEY_PEPPER", hide_env_values = true)]
    pub api_key_pepper: Option<SecretString>,
    /// Another such secret, under which credentials may be kept too, while API_KEY_PEPPER is being
    /// replaced. What is used is kept under API_KEY_PEPPER from then on.
    #[arg(long, env = "API_KEY_PEPPER_ALSO", hide_env_values = true)]
    pub api_key_pepper_also: Option<SecretString>,
    /// Secret that access tokens of sessions are signed with, 32 characters or more; without one it
    /// is made and kept in DATA_DIR/secret-key. Another secret ends all access tokens.
    #[arg(long, env = "SECRET_KEY", hide_env_values = true)]
    pub secret_key: Option<SecretString>,
    /// Another such secret, whose tokens are accepted and never issued, while SECRET_KEY is being
    /// replaced.
    #[arg(long, env = "SECRET_KEY_ALSO", hide_env_values = true)]
    pub secret_key_also: Option<SecretString>,
    /// A file with an Ed25519 key (PKCS#8 PEM) that signs access tokens in place of SECRET_KEY.
    #[arg(long, env = "SESSION_KEY_FILE")]
    pub session_key_file: Option<PathBuf>,
    /// Another such file, whose tokens are accepted and never issued.
    #[arg(long, env = "SESSION_KEY_FILE_ALSO")]
    pub session_key_file_also: Option<PathBuf>,
    /// Life of an access token, in minutes.
    #[arg(long, env = "ACCESS_TOKEN_MINUTES", default_value_t = 15, value_parser = clap::value_parser!(u32).range(1..=1440))]
    pub access_token_minutes: u32,
    /// Life of a session that is not refreshed, in days.
    #[arg(long, env = "SESSION_DAYS", default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..=365))]
    pub session_days: u32,
    /// Longest life of a session, however often it is refreshed, in days: 1 to 3650. Then its user
    /// must log in again.
    #[arg(long, env = "SESSION_MAX_DAYS", default_value_t = 90, value_parser = clap::value_parser!(u32).range(1..=3650))]
    pub session_max_days: u32,
    /// Who else may log users in.
    #[command(flatten)]
    pub identity: IdentityConfig,
}

const ADMIN: &str = "auth:admin";

/// Who has to know callers: every service, auth itself among them, and never the gateway.
const FRONT: &[&str] = access::SERVICES;

const RPCS: &[Rpc] = &[
    Rpc::new("/hapa.auth.v1.AuthService/Authenticate", Access::Mesh).by(FRONT),
    Rpc::new("/hapa.auth.v1.AuthService/WatchRevocations", Access::Mesh).by(FRONT),
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

/// None of them can work without the store.
pub const SERVICES: &[&str] = &[
    "hapa.auth.v1.AuthService",
    "hapa.auth.v1.KeyService",
    "hapa.auth.v1.UserService",
    "hapa.auth.v1.SessionService",
    "hapa.auth.v1.AuditService",
];

/// Never set aside: without it no key is known.
pub const STORE: &StoreSpec = &StoreSpec {
    service: "auth",
    steps: store::MIGRATIONS,
    durability: Durability::PowerCut,
    may_be_set_aside: false,
};

/// Migrates the store at `url`, and does no more.
pub async fn migrate(url: &str) -> anyhow::Result<()> {
    open(url).await.map(drop)
}

/// Refuses settings that can't work together, by name.
pub fn check(config: &Config, common: &CommonConfig) -> Result<(), Wrong> {
    secrets::check(config, common)
}

/// Whether the pepper that is set, or was made before, is one that the store's credentials were kept under; none
/// where either is not there. Of a store that [`survey`] has found to be up to date.
pub async fn pepper_is_known(
    config: &Config,
    common: &CommonConfig,
) -> anyhow::Result<Option<bool>> {
    let Some(pepper) = secrets::known_pepper(config, common)? else { return Ok(None) };
    let store = Store::new(open(&common.store_url("auth")).await?);
    let (known, own) = (store.pepper_fingerprints().await?, pepper.fingerprints()?);
    Ok((!known.is_empty()).then(|| own.iter().any(|one| known.contains(one))))
}

/// Takes the pepper that is set, or was made before, for the store's from now on: what was kept under another
/// one is given up.
pub async fn accept_pepper(url: &str, pepper: &PepperConfig) -> anyhow::Result<()> {
    let own = secret::set("API_KEY_PEPPER", pepper.api_key_pepper.as_ref(), Strength::Long)?;
    let file = pepper.data_dir.join("key-pepper");
    if own.is_none() && !file.exists() {
        let words = "none is set, and none was made before in DATA_DIR";
        return Err(Wrong::new("API_KEY_PEPPER", words).into());
    }
    let pepper = Pepper { own: secret::set_or_kept(own, &file)?, also: None };
    let store = Store::new(open(url).await?);
    store.record_pepper_fingerprints(pepper.fingerprints()?).await?;
    Ok(())
}

/// Where a pepper is to be found.
#[derive(Debug)]
pub struct PepperConfig {
    /// The one that is set.
    pub api_key_pepper: Option<SecretString>,
    /// The folder of one that was made.
    pub data_dir: PathBuf,
}

/// Looks at the store at `url`, and changes nothing.
pub async fn survey(url: &str) -> anyhow::Result<Option<Survey>> {
    Db::survey("auth", url, store::MIGRATIONS).await
}

async fn open(url: &str) -> anyhow::Result<Db> {
    Db::open("auth", url, store::MIGRATIONS).await
}

/// What the service needs of its process.
pub struct Dependencies {
    /// Settings that services share.
    pub common: CommonConfig,
    /// Its store, opened by [`STORE`].
    pub store: OpenStore,
    /// The shutdown of the server.
    pub shutdown: Shutdown,
    /// Finds an outbox in DATA_DIR that holds an event of an authenticated caller: the sign of a lost store.
    pub find_undelivered_events: BoxFuture<'static, Option<PathBuf>>,
}

/// The services.
pub async fn service(config: &Config, dependencies: Dependencies) -> anyhow::Result<ServiceSpec> {
    let Dependencies { common, store: OpenStore { db, checks }, shutdown, find_undelivered_events } =
        dependencies;
    secrets::check(config, &common)?;
    let pepper = secrets::pepper(config, &common)?;
    let tokens = Arc::new(secrets::tokens(config, &common)?);
    let identity = Identity::new(&config.identity)?;
    let mut spec = ServiceSpec { checks, ..ServiceSpec::default() };
    spec.spawn(secrets::follow((config.clone(), common), Arc::clone(&tokens)));
    let store = Store::new(db);
    spec.checks.extend(start::look(&store, &pepper, find_undelivered_events).await?);
    let (passwords, last_uses) = (Passwords::new(), Uses::default());
    let (tail, looking) = Tail::of(store.clone(), shutdown.stop_accepting);
    spec.spawn(looking);
    let (writing, kept) = (last_uses.clone(), store.clone());
    spec.spawn_until(|end| writing.write(kept, end));
    spec.spawn(budget::release(store.clone()));
    let max_session_life = times::in_days(0, config.session_max_days);
    spec.spawn(session::forget(store.clone(), max_session_life));
    spec.spawn(idempotency::purge(store.clone()));
    let credentials = Credentials {
        store: store.clone(),
        pepper: pepper.clone(),
        tokens: Arc::clone(&tokens),
        max_session_life,
        uses: last_uses,
        news: News { store: store.clone(), tail },
    };
    let sessions = Sessions {
        store: store.clone(),
        pepper: pepper.clone(),
        passwords: passwords.clone(),
        tokens,
        identity,
        access_minutes: config.access_token_minutes,
        session_days: config.session_days,
        max_session_life,
    };
    let users = Users { store: store.clone(), pepper: pepper.clone(), passwords };
    let keys = Keys { store: store.clone(), pepper, default_days: config.api_key_expiry_days };
    spec.add(AuthServiceServer::new(credentials), RPCS);
    spec.add(KeyServiceServer::new(keys), &[]);
    spec.add(UserServiceServer::new(users), &[]);
    spec.add(SessionServiceServer::new(sessions), &[]);
    spec.add(AuditServiceServer::new(Audit { store }), &[]);
    Ok(spec)
}

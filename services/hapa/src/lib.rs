//! The one binary: every role of the mesh, and the commands for its users and operators.

pub mod cli;
mod services;
pub mod setting;
mod system;
mod warnings;

use std::pin::pin;

use hapa_core::config::Wrong;
use hapa_server::{Listeners, Server};
use hapa_store::file_lock::{self, Lock, lock_folder};
use hapa_store::open::Stores;
use hapa_transport::otlp_exporter::Exporter;

/// Which services a process runs, and their settings.
#[derive(Clone, Debug)]
pub struct Roles {
    /// What all of them share.
    pub server: hapa_server::Config,
    /// Keys, users, sessions.
    pub auth: Option<hapa_auth::Config>,
    /// Code generation.
    pub codegen: Option<hapa_codegen::Config>,
    /// What went wrong.
    pub errors: Option<hapa_errors::Config>,
    /// What was used.
    pub analytics: Option<hapa_analytics::Config>,
    /// Their settings as they are shown; none where nobody read them from a command line.
    pub settings: Vec<setting::Setting>,
}

/// Every role's settings: the arguments of `hapa all`.
#[derive(clap::Args, Clone, Debug)]
pub struct All {
    /// What all of them share.
    #[command(flatten)]
    pub server: hapa_server::Config,
    #[command(flatten)]
    auth: hapa_auth::Config,
    #[command(flatten)]
    codegen: hapa_codegen::Config,
    #[command(flatten)]
    errors: hapa_errors::Config,
    #[command(flatten)]
    analytics: hapa_analytics::Config,
}

impl Roles {
    /// None yet.
    pub fn none(server: hapa_server::Config) -> Roles {
        let settings = Vec::new();
        Roles { server, auth: None, codegen: None, errors: None, analytics: None, settings }
    }

    /// Refuses settings that can't work together, by name.
    pub fn check(&self) -> Result<(), Wrong> {
        self.server.check()?;
        self.auth.as_ref().map_or(Ok(()), |auth| hapa_auth::check(auth, &self.server.common))
    }

    /// As others are told who uses a folder.
    fn name(&self) -> String {
        let has = [
            (self.auth.is_some(), "auth"),
            (self.codegen.is_some(), "codegen"),
            (self.errors.is_some(), "errors"),
            (self.analytics.is_some(), "analytics"),
        ];
        if self.has_all() {
            return "hapa all".to_owned();
        }
        let names = has.iter().filter(|(has, _)| *has).map(|(_, name)| *name);
        format!("hapa {}", names.collect::<Vec<_>>().join(" and "))
    }

    fn has_all(&self) -> bool {
        let others = self.errors.is_some() && self.analytics.is_some();
        self.auth.is_some() && self.codegen.is_some() && others
    }

    /// `hapa all` is a whole mesh, which has its folder alone. Roles are parts of one, and may share one: each
    /// file in it is still of one process.
    fn lock_kind(&self) -> file_lock::Kind {
        if self.has_all() { file_lock::Kind::Exclusive } else { file_lock::Kind::Shared }
    }
}

impl From<All> for Roles {
    fn from(All { server, auth, codegen, errors, analytics }: All) -> Roles {
        Roles {
            server,
            auth: Some(auth),
            codegen: Some(codegen),
            errors: Some(errors),
            analytics: Some(analytics),
            settings: Vec::new(),
        }
    }
}

/// Runs the roles on sockets that are bound already, until `shutdown`, and then until drained; spans
/// go where telemetry was started with.
///
/// A shutdown before it serves ends it at once: a store that does not answer holds up nobody who wants
/// to stop, and a migration that is broken off is as if it had not begun.
pub async fn run(
    roles: Roles,
    listeners: Listeners,
    exporter: Option<Exporter>,
    shutdown: impl Future<Output = ()>,
) -> anyhow::Result<()> {
    let mut shutdown = pin!(shutdown);
    // The locks are held until the server is gone.
    let (server, _stores, _lock) = tokio::select! {
        mounted = mounted(roles, listeners, exporter) => mounted?,
        () = &mut shutdown => return Ok(()),
    };
    server.serve(shutdown).await
}

/// A server with every service of these roles, and the stores that they hold open.
async fn mounted(
    roles: Roles,
    listeners: Listeners,
    exporter: Option<Exporter>,
) -> anyhow::Result<(Server, Stores, Option<Lock>)> {
    let setup = system::Setup::of(&roles);
    let common = roles.server.common.clone();
    // Before anything in the folder is read or made.
    let name = roles.name();
    let lock = lock_folder(&common.data_dir, &name, roles.lock_kind()).await?;
    let mut stores = Stores::new(common.clone(), &name);
    let mut server = Server::new(roles.server, listeners).await?;
    if let Some(exporter) = exporter {
        server.set_exporter(exporter);
    }
    if let Some(config) = &roles.auth {
        server.mount(services::auth(config, &common, &server, &mut stores).await?).await;
    }
    if let Some(config) = &roles.codegen {
        server.mount(services::codegen(config, &common, &server)?).await;
    }
    if let Some(config) = &roles.analytics {
        server.mount(services::analytics(config, &server, &mut stores).await?).await;
    }
    // After analytics, which it asks for the number of calls.
    if let Some(config) = &roles.errors {
        server.mount(services::errors(config, &server, &mut stores).await?).await;
    }
    system::mount(setup, &mut server).await?;
    Ok((server, stores, lock))
}

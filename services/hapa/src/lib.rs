//! The one binary: every role of the mesh, and the commands for its users and operators.

pub mod cli;
mod env_file;
mod renamed_settings;
mod services;
pub mod setting;
mod system;
mod warnings;

use std::pin::pin;

use hapa_core::config::ConfigError;
use hapa_server::{Listeners, Server};
use hapa_store::file_lock::{self, FileLock, lock_data_dir};
use hapa_store::open::Stores;
use hapa_transport::otlp_exporter::SpanExporter;

/// The roles that a process runs, and their settings.
#[derive(Clone, Debug)]
pub struct Roles {
    /// Settings that all roles share.
    pub server: hapa_server::Config,
    /// Keys, users, sessions and the audit log.
    pub auth: Option<hapa_auth::Config>,
    /// Code generation.
    pub codegen: Option<hapa_codegen::Config>,
    /// Errors and incidents.
    pub errors: Option<hapa_errors::Config>,
    /// Usage and performance.
    pub analytics: Option<hapa_analytics::Config>,
    /// The settings as SystemService shows them; empty if they were not read from a command line.
    pub settings: Vec<setting::Setting>,
}

/// The settings of every role: the arguments of `hapa all`.
#[derive(clap::Args, Clone, Debug)]
pub struct AllRolesArgs {
    /// Settings that all roles share.
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
    /// No role, with the shared settings.
    pub fn none(server: hapa_server::Config) -> Roles {
        let settings = Vec::new();
        Roles { server, auth: None, codegen: None, errors: None, analytics: None, settings }
    }

    /// Refuses settings that are invalid together; the error names each of them.
    pub fn check(&self) -> Result<(), ConfigError> {
        let auth = self.auth.as_ref();
        let auth = auth.map_or(Ok(()), |auth| hapa_auth::check(auth, &self.server.common));
        ConfigError::all(self.server.problems().into_iter().chain(auth.err()))
    }

    /// The name by which the lock of a data directory identifies its holder.
    fn name(&self) -> String {
        if self.has_all() {
            return "hapa all".to_owned();
        }
        format!("hapa {}", self.role_names().join(" and "))
    }

    /// The names of the roles that are present.
    fn role_names(&self) -> Vec<&'static str> {
        let roles = [
            (self.auth.is_some(), "auth"),
            (self.codegen.is_some(), "codegen"),
            (self.errors.is_some(), "errors"),
            (self.analytics.is_some(), "analytics"),
        ];
        roles.into_iter().filter(|(is_present, _)| *is_present).map(|(_, name)| name).collect()
    }

    fn has_all(&self) -> bool {
        self.role_names().len() == 4
    }

    /// `hapa all` is a complete mesh and locks its data directory exclusively. Single roles may share a directory:
    /// each file in it belongs to one process.
    fn lock_kind(&self) -> file_lock::LockMode {
        if self.has_all() { file_lock::LockMode::Exclusive } else { file_lock::LockMode::Shared }
    }
}

impl From<AllRolesArgs> for Roles {
    fn from(AllRolesArgs { server, auth, codegen, errors, analytics }: AllRolesArgs) -> Roles {
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

/// Serves the roles on bound sockets until `shutdown`, then drains; spans go to `exporter`.
///
/// A shutdown during start-up ends the function at once, even while a store does not answer. An interrupted
/// migration leaves the store unchanged.
pub async fn run(
    roles: Roles,
    listeners: Listeners,
    exporter: Option<SpanExporter>,
    shutdown: impl Future<Output = ()>,
) -> anyhow::Result<()> {
    let mut shutdown = pin!(shutdown);
    // The stores and the lock live as long as the server.
    let (server, _stores, _lock) = tokio::select! {
        mounted = mount_roles(roles, listeners, exporter) => mounted?,
        () = &mut shutdown => return Ok(()),
    };
    server.serve(shutdown).await
}

/// Returns a server with every service of these roles, the open stores and the lock of the data directory.
async fn mount_roles(
    roles: Roles,
    listeners: Listeners,
    exporter: Option<SpanExporter>,
) -> anyhow::Result<(Server, Stores, Option<FileLock>)> {
    let status = system::config_status(&roles);
    let common = roles.server.common.clone();
    // Locked before any file of the data directory is read or created.
    let name = roles.name();
    let lock = lock_data_dir(&common.data_dir, &name, roles.lock_kind()).await?;
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
    // After analytics: errors queries it for the number of calls.
    if let Some(config) = &roles.errors {
        server.mount(services::errors(config, &server, &mut stores).await?).await;
    }
    system::mount(status, &mut server).await?;
    Ok((server, stores, lock))
}

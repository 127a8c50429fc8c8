//! The one binary: every role of the mesh, and the commands for its users and operators.

pub mod cli;

use hapa_chassis::{Listeners, Server};

/// Which services a process runs, and their settings.
#[derive(Clone, Debug)]
pub struct Roles {
    /// What all of them share.
    pub server: hapa_chassis::Config,
    /// Keys.
    pub auth: Option<hapa_auth::Config>,
    /// Code generation.
    pub codegen: Option<hapa_codegen::Config>,
}

/// Runs the roles on sockets that are bound already, until `shutdown`, and then until drained.
pub async fn run(
    roles: Roles,
    listeners: Listeners,
    shutdown: impl Future<Output = ()>,
) -> anyhow::Result<()> {
    let mut server = Server::new(roles.server, listeners).await?;
    if let Some(config) = &roles.auth {
        hapa_auth::mount(config, &mut server).await?;
    }
    if let Some(config) = &roles.codegen {
        hapa_codegen::mount(config, &mut server).await?;
    }
    server.serve(shutdown).await
}

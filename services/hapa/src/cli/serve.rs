//! The roles: from arguments to a running server and its signals.

use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::cli::Failure;
use crate::{Roles, run};
use hapa_chassis::{Listeners, telemetry};

#[derive(clap::Args, Clone, Debug)]
pub(super) struct All {
    #[command(flatten)]
    server: hapa_chassis::Config,
    #[command(flatten)]
    auth: hapa_auth::Config,
    #[command(flatten)]
    codegen: hapa_codegen::Config,
}

#[derive(clap::Args, Clone, Debug)]
pub(super) struct Auth {
    #[command(flatten)]
    server: hapa_chassis::Config,
    #[command(flatten)]
    auth: hapa_auth::Config,
}

#[derive(clap::Args, Clone, Debug)]
pub(super) struct Codegen {
    #[command(flatten)]
    server: hapa_chassis::Config,
    #[command(flatten)]
    codegen: hapa_codegen::Config,
}

impl All {
    pub(super) fn check(&self) -> Result<(), Failure> {
        Ok(self.server.check()?)
    }
}

impl From<Box<All>> for Roles {
    fn from(args: Box<All>) -> Roles {
        Roles { server: args.server, auth: Some(args.auth), codegen: Some(args.codegen) }
    }
}

impl From<Box<Auth>> for Roles {
    fn from(args: Box<Auth>) -> Roles {
        Roles { server: args.server, auth: Some(args.auth), codegen: None }
    }
}

impl From<Box<Codegen>> for Roles {
    fn from(args: Box<Codegen>) -> Roles {
        Roles { server: args.server, auth: None, codegen: Some(args.codegen) }
    }
}

/// Serves until a signal, then drains; a second signal ends at once.
pub(super) async fn serve(roles: Roles) -> Result<(), Failure> {
    roles.server.check()?;
    telemetry::start_logging(&roles.server.log)?;
    let listeners = Listeners::bind(&roles.server).await?;
    let (mut first, mut second) = (Signals::new()?, Signals::new()?);
    let twice = async {
        second.next().await;
        second.next().await;
    };
    tokio::select! {
        done = run(roles, listeners, first.next()) => Ok(done?),
        () = twice => Err(anyhow::anyhow!("ended by a second signal, before open calls were done").into()),
    }
}

struct Signals {
    interrupt: Signal,
    terminate: Signal,
}

impl Signals {
    fn new() -> std::io::Result<Self> {
        Ok(Signals {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
        })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}

//! The roles: from arguments to a running server and its signals.

use std::future::pending;

use hapa_server::{Listeners, file_descriptors};
use hapa_telemetry::logging;
use hapa_transport::otlp_exporter;
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::cli::{Failure, errors};
use crate::{Roles, run};

#[derive(clap::Args, Clone, Debug)]
pub(super) struct Auth {
    #[command(flatten)]
    server: hapa_server::Config,
    #[command(flatten)]
    auth: hapa_auth::Config,
}

#[derive(clap::Args, Clone, Debug)]
pub(super) struct Codegen {
    #[command(flatten)]
    server: hapa_server::Config,
    #[command(flatten)]
    codegen: hapa_codegen::Config,
}

#[derive(clap::Args, Clone, Debug)]
#[group(id = "errors_role")]
#[command(args_conflicts_with_subcommands = true)]
pub(super) struct Errors {
    #[command(subcommand)]
    pub(super) client: Option<errors::Command>,
    #[command(flatten)]
    server: hapa_server::Config,
    #[command(flatten)]
    service: hapa_errors::Config,
}

#[derive(clap::Args, Clone, Debug)]
pub(super) struct Analytics {
    #[command(flatten)]
    server: hapa_server::Config,
    #[command(flatten)]
    analytics: hapa_analytics::Config,
}

impl From<Auth> for Roles {
    fn from(args: Auth) -> Roles {
        Roles { auth: Some(args.auth), ..Roles::none(args.server) }
    }
}

impl From<Codegen> for Roles {
    fn from(args: Codegen) -> Roles {
        Roles { codegen: Some(args.codegen), ..Roles::none(args.server) }
    }
}

impl From<Errors> for Roles {
    fn from(args: Errors) -> Roles {
        Roles { errors: Some(args.service), ..Roles::none(args.server) }
    }
}

impl From<Analytics> for Roles {
    fn from(args: Analytics) -> Roles {
        Roles { analytics: Some(args.analytics), ..Roles::none(args.server) }
    }
}

/// Serves until a signal, then drains; a second signal ends at once. SIGHUP opens LOG_FILE anew; where the log
/// goes to a terminal it says that the terminal was closed, and the process drains.
pub(super) async fn serve(roles: Roles) -> Result<(), Failure> {
    roles.check()?;
    let (tracer, exporter) = otlp_exporter::collect(&roles.server.trace)?.unzip();
    let log = logging::start(&roles.server.log, tracer)?;
    file_descriptors::raise_limit();
    let listeners = Listeners::bind(&roles.server).await?;
    let terminal = log.is_terminal();
    let (mut first, mut second) = (Signals::new(terminal)?, Signals::new(terminal)?);
    let mut hangup = signal(SignalKind::hangup())?;
    let twice = async {
        second.next().await;
        second.next().await;
    };
    let reopening = async {
        while hangup.recv().await.is_some() {
            if !terminal {
                log.reopen();
            }
        }
        pending::<()>().await;
    };
    tokio::select! {
        done = run(roles, listeners, exporter, first.next()) => Ok(done?),
        () = twice => Err(anyhow::anyhow!("ended by a second signal, before open calls were done").into()),
        () = reopening => Ok(()),
    }
}

struct Signals {
    interrupt: Signal,
    terminate: Signal,
    /// Of a terminal that is closed.
    hangup: Option<Signal>,
}

impl Signals {
    fn new(terminal: bool) -> std::io::Result<Self> {
        Ok(Signals {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
            hangup: terminal.then(|| signal(SignalKind::hangup())).transpose()?,
        })
    }

    async fn next(&mut self) {
        let closed = async {
            match &mut self.hangup {
                Some(hangup) => drop(hangup.recv().await),
                None => pending().await,
            }
        };
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
            () = closed => {}
        }
    }
}

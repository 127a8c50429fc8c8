//! The role commands: from arguments to a running server, and its signals.

use std::future::pending;

use hapa_server::{Listeners, file_descriptors};
use hapa_telemetry::logging;
use hapa_transport::otlp_exporter;
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::cli::{CliError, errors};
use crate::renamed_settings::warnings;
use crate::{Roles, run};

#[derive(clap::Args, Clone, Debug)]
pub(super) struct AuthArgs {
    #[command(flatten)]
    server: hapa_server::Config,
    #[command(flatten)]
    auth: hapa_auth::Config,
}

#[derive(clap::Args, Clone, Debug)]
pub(super) struct CodegenArgs {
    #[command(flatten)]
    server: hapa_server::Config,
    #[command(flatten)]
    codegen: hapa_codegen::Config,
}

#[derive(clap::Args, Clone, Debug)]
#[command(args_conflicts_with_subcommands = true)]
pub(super) struct ErrorsArgs {
    #[command(subcommand)]
    pub(super) subcommand: Option<errors::ErrorsCommand>,
    #[command(flatten)]
    server: hapa_server::Config,
    #[command(flatten)]
    errors: hapa_errors::Config,
}

#[derive(clap::Args, Clone, Debug)]
pub(super) struct AnalyticsArgs {
    #[command(flatten)]
    server: hapa_server::Config,
    #[command(flatten)]
    analytics: hapa_analytics::Config,
}

impl From<AuthArgs> for Roles {
    fn from(args: AuthArgs) -> Roles {
        Roles { auth: Some(args.auth), ..Roles::none(args.server) }
    }
}

impl From<CodegenArgs> for Roles {
    fn from(args: CodegenArgs) -> Roles {
        Roles { codegen: Some(args.codegen), ..Roles::none(args.server) }
    }
}

impl From<ErrorsArgs> for Roles {
    fn from(args: ErrorsArgs) -> Roles {
        Roles { errors: Some(args.errors), ..Roles::none(args.server) }
    }
}

impl From<AnalyticsArgs> for Roles {
    fn from(args: AnalyticsArgs) -> Roles {
        Roles { analytics: Some(args.analytics), ..Roles::none(args.server) }
    }
}

/// Serves until a signal, then drains; a second signal ends the process at once.
///
/// SIGHUP reopens LOG_FILE. If the log goes to a terminal, SIGHUP means that the terminal was closed, and the
/// process drains.
pub(super) async fn serve(roles: Roles) -> Result<(), CliError> {
    roles.check()?;
    let (tracer, exporter) = otlp_exporter::tracer_and_exporter(&roles.server.trace)?.unzip();
    let log = logging::start(&roles.server.log, tracer)?;
    for warning in warnings(&roles.settings) {
        tracing::warn!("{warning}");
    }
    file_descriptors::raise_limit();
    let listeners = Listeners::bind(&roles.server).await?;
    let is_terminal = log.is_terminal();
    let mut first = ShutdownSignals::new(is_terminal)?;
    let mut second = ShutdownSignals::new(is_terminal)?;
    let mut hangup = signal(SignalKind::hangup())?;
    let second_signal = async {
        second.next().await;
        second.next().await;
    };
    let reopen_log = async {
        while hangup.recv().await.is_some() {
            if !is_terminal {
                log.reopen();
            }
        }
        pending::<()>().await;
    };
    tokio::select! {
        done = run(roles, listeners, exporter, first.next()) => Ok(done?),
        () = second_signal => {
            Err(anyhow::anyhow!("ended by a second signal before open calls completed").into())
        }
        () = reopen_log => Ok(()),
    }
}

/// The signals that end a process. Each value sees every signal once.
pub(super) struct ShutdownSignals {
    interrupt: Signal,
    terminate: Signal,
    /// SIGHUP of a closed terminal.
    hangup: Option<Signal>,
}

impl ShutdownSignals {
    /// `has_terminal`: SIGHUP ends the process too.
    pub(super) fn new(has_terminal: bool) -> std::io::Result<Self> {
        Ok(ShutdownSignals {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
            hangup: has_terminal.then(|| signal(SignalKind::hangup())).transpose()?,
        })
    }

    /// Waits for the next signal.
    pub(super) async fn next(&mut self) {
        let hangup = async {
            match &mut self.hangup {
                Some(hangup) => drop(hangup.recv().await),
                None => pending().await,
            }
        };
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
            () = hangup => {}
        }
    }
}

//! `hapa errors …`: what went wrong, how often and for whom, and what was done about it. Without a
//! subcommand the same word runs the service: see serve.rs.

mod change;
mod incidents;
mod show;
mod sums;
mod watch;

use hapa_proto::errors::v1::error_tracking_service_client::ErrorTrackingServiceClient;

use crate::cli::Failure;
use crate::cli::connection::{self, Connection};

#[derive(Clone, Debug, clap::Subcommand)]
pub(super) enum Command {
    /// Sum up: how many errors, which codes, the latest incidents.
    Dashboard(sums::Dashboard),
    /// Show what fails most in a period, and whether it is rising.
    Patterns(sums::Patterns),
    /// List incidents, the last seen first.
    Incidents(incidents::Args),
    /// Show one incident, by its id or that of any of its occurrences: what a user was shown.
    Show(show::Args),
    /// Say that someone looks after an incident.
    Acknowledge(change::Args),
    /// Say that an incident is over; seen again in a later version it is opened again.
    Resolve(change::Resolve),
    /// Say that an incident is not over.
    Reopen(change::Args),
    /// List the published error codes and what to do about each.
    Codes(sums::Codes),
    /// Watch errors as they happen, until Ctrl-C.
    Watch(watch::Args),
}

pub(super) use sums::{last_part, recent};
pub(super) use watch::is_passing;

type Client = ErrorTrackingServiceClient<Connection>;

pub(super) async fn execute(command: Command) -> Result<(), Failure> {
    match command {
        Command::Dashboard(args) => sums::dashboard(args).await,
        Command::Patterns(args) => sums::patterns(args).await,
        Command::Incidents(args) => incidents::list(args).await,
        Command::Show(args) => show::show(args).await,
        Command::Acknowledge(args) => change::change(args, "acknowledged", String::new()).await,
        Command::Resolve(args) => change::change(args.change, "resolved", args.version).await,
        Command::Reopen(args) => change::change(args, "open", String::new()).await,
        Command::Codes(args) => sums::codes(args).await,
        Command::Watch(args) => watch::watch(args).await,
    }
}

async fn client(connection: &connection::Args) -> Result<Client, Failure> {
    Ok(ErrorTrackingServiceClient::new(connection.as_operator().await?))
}

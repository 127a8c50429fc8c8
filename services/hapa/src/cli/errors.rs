//! `hapa errors` with a subcommand: error statistics, incidents, and the status of incidents. Without a subcommand,
//! `hapa errors` runs the errors service (cli/serve.rs).

mod incidents;
mod reports;
mod show;
mod update_status;
mod watch;

use hapa_proto::errors::v1::error_tracking_service_client::ErrorTrackingServiceClient;

use crate::cli::CliError;
use crate::cli::connection::{Connection, ConnectionArgs};

#[derive(Clone, Debug, clap::Subcommand)]
pub(super) enum ErrorsCommand {
    /// Summarise errors: totals, codes, the latest incidents.
    Dashboard(reports::DashboardArgs),
    /// Show the most frequent errors of a period, and their trend.
    Patterns(reports::PatternsArgs),
    /// List incidents, the most recently seen first.
    Incidents(incidents::ListIncidentsArgs),
    /// Show one incident, by its own id or by the id of an occurrence, as users see it.
    Show(show::ShowIncidentArgs),
    /// Mark an incident as acknowledged: someone works on it.
    Acknowledge(update_status::UpdateIncidentArgs),
    /// Mark an incident as resolved; an occurrence in a later version reopens it.
    Resolve(update_status::ResolveIncidentArgs),
    /// Mark an incident as open again.
    Reopen(update_status::UpdateIncidentArgs),
    /// List the published error codes with advice for each.
    Codes(reports::ErrorCodesArgs),
    /// Print errors as they occur, until Ctrl-C.
    Watch(watch::WatchErrorsArgs),
}

pub(super) use reports::{method_name, recent_incidents_table};

type ErrorsClient = ErrorTrackingServiceClient<Connection>;

pub(super) async fn execute(command: ErrorsCommand) -> Result<(), CliError> {
    match command {
        ErrorsCommand::Dashboard(args) => reports::dashboard(args).await,
        ErrorsCommand::Patterns(args) => reports::patterns(args).await,
        ErrorsCommand::Incidents(args) => incidents::list(args).await,
        ErrorsCommand::Show(args) => show::show(args).await,
        ErrorsCommand::Acknowledge(args) => {
            update_status::update(args, "acknowledged", String::new()).await
        }
        ErrorsCommand::Resolve(args) => {
            update_status::update(args.update, "resolved", args.version).await
        }
        ErrorsCommand::Reopen(args) => update_status::update(args, "open", String::new()).await,
        ErrorsCommand::Codes(args) => reports::codes(args).await,
        ErrorsCommand::Watch(args) => watch::watch(args).await,
    }
}

async fn connect(connection: &ConnectionArgs) -> Result<ErrorsClient, CliError> {
    Ok(ErrorTrackingServiceClient::new(connection.connect_as_operator().await?))
}

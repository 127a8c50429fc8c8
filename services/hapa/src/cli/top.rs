//! `hapa top`: calls, tokens, latencies and errors of the last minute. On a terminal it redraws every second, in a
//! pipe it prints one snapshot, with --json one line per snapshot.

mod render;
mod screen;
mod stream;

use std::io::{IsTerminal as _, Write as _};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use hapa_proto::analytics::v1::WatchPerformanceRequest;
use hapa_proto::analytics::v1::analytics_service_client::AnalyticsServiceClient;
use hapa_proto::errors::v1::GetDashboardRequest;
use hapa_proto::errors::v1::error_tracking_service_client::ErrorTrackingServiceClient;
use hapa_proto::errors::v1::get_dashboard_response::RecentIncident;
use tokio::time::{sleep, timeout};

use self::render::render;
use self::screen::Screen;
use self::stream::PerformanceStream;
use crate::cli::connection::{Connection, ConnectionArgs};
use crate::cli::{CliError, json};

/// Interval between queries for incidents; no redraw waits for them.
const INCIDENTS_POLL_INTERVAL: Duration = Duration::from_secs(5);
const INCIDENTS_TIMEOUT: Duration = Duration::from_secs(2);

/// The latest incidents, or the reason why they are unavailable.
type Incidents = Result<Vec<RecentIncident>, String>;

#[derive(clap::Args, Clone, Debug)]
#[command(after_help = "Key: q or Ctrl-C ends it.\n\nExample:\n  hapa top --method GenerateCode")]
pub(super) struct TopArgs {
    /// Only calls to this model.
    #[arg(long, default_value = "", hide_default_value = true)]
    model: String,
    /// Only calls of this method, such as GenerateCode.
    #[arg(long, default_value = "", hide_default_value = true)]
    method: String,
    /// Print one JSON object per snapshot, one snapshot per second.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    connection: ConnectionArgs,
}

pub(super) async fn top(args: TopArgs) -> Result<(), CliError> {
    let connection = args.connection.connect_as_operator().await?;
    let request = WatchPerformanceRequest { model: args.model, method: args.method };
    let client = AnalyticsServiceClient::new(connection.clone());
    let mut stream = PerformanceStream::new(client, request);
    let out = std::io::stdout();
    if args.json {
        loop {
            json::print(&stream.next().await?)?;
        }
    }
    if out.is_terminal() && std::io::stdin().is_terminal() {
        return live(stream, connection).await;
    }
    let performance = stream.next().await?.performance.unwrap_or_default();
    let incidents = incidents(&mut ErrorTrackingServiceClient::new(connection)).await;
    write!(&out, "{}", render(&performance, &incidents))?;
    Ok(())
}

async fn live(mut stream: PerformanceStream, connection: Connection) -> Result<(), CliError> {
    // The first snapshot arrives before the terminal changes, so that a refusal is printed like any other error.
    let mut performance = stream.next().await?.performance.unwrap_or_default();
    let latest = Mutex::new(Ok(Vec::new()));
    let mut screen = Screen::enter()?;
    let redraw = async {
        loop {
            let text = render(&performance, &latest.lock().unwrap_or_else(PoisonError::into_inner));
            screen.draw(&text)?;
            tokio::select! {
                snapshot = stream.next() => performance = snapshot?.performance.unwrap_or_default(),
                () = screen.quit() => return Ok(()),
            }
        }
    };
    let poll_incidents = async {
        let mut client = ErrorTrackingServiceClient::new(connection);
        loop {
            let incidents = incidents(&mut client).await;
            *latest.lock().unwrap_or_else(PoisonError::into_inner) = incidents;
            sleep(INCIDENTS_POLL_INTERVAL).await;
        }
    };
    tokio::select! {
        done = redraw => done,
        () = poll_incidents => Ok(()),
    }
}

async fn incidents(client: &mut ErrorTrackingServiceClient<Connection>) -> Incidents {
    match timeout(INCIDENTS_TIMEOUT, client.get_dashboard(GetDashboardRequest {})).await {
        Ok(Ok(reply)) => Ok(reply.into_inner().recent_incidents),
        Ok(Err(status)) if status.message().is_empty() => Err(status.code().to_string()),
        Ok(Err(status)) => Err(status.message().to_owned()),
        Err(_) => Err("the errors service does not answer".to_owned()),
    }
}

//! `hapa top`: how the last minute went, each second: drawn in place on a terminal, once into a pipe,
//! frame by frame as JSON.

mod draw;
mod feed;
mod terminal;

use std::io::{IsTerminal as _, Write as _};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use hapa_proto::analytics::v1::WatchPerformanceRequest;
use hapa_proto::analytics::v1::analytics_service_client::AnalyticsServiceClient;
use hapa_proto::errors::v1::GetDashboardRequest;
use hapa_proto::errors::v1::error_tracking_service_client::ErrorTrackingServiceClient;
use hapa_proto::errors::v1::get_dashboard_response::RecentIncident;
use tokio::time::{sleep, timeout};

use self::draw::draw;
use self::feed::Feed;
use self::terminal::Terminal;
use crate::cli::connection::{self, Connection};
use crate::cli::{Failure, json};

/// Incidents are asked for less often than performance comes, and nothing waits for them.
const INCIDENTS_EVERY: Duration = Duration::from_secs(5);
const ASKING: Duration = Duration::from_secs(2);

/// The newest incidents, or why there are none to show.
type Incidents = Result<Vec<RecentIncident>, String>;

#[derive(clap::Args, Clone, Debug)]
#[group(id = "top_args")]
pub(super) struct Args {
    /// Only this model.
    #[arg(long, default_value = "", hide_default_value = true)]
    model: String,
    /// Only this method, such as GenerateCode.
    #[arg(long, default_value = "", hide_default_value = true)]
    method: String,
    /// Each frame as a line of JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    connection: connection::Args,
}

pub(super) async fn top(args: Args) -> Result<(), Failure> {
    let connection = args.connection.as_operator().await?;
    let request = WatchPerformanceRequest { model: args.model, method: args.method };
    let client = AnalyticsServiceClient::new(connection.clone());
    let mut feed = Feed::new(client, request);
    let out = std::io::stdout();
    if args.json {
        loop {
            writeln!(&out, "{}", json::json(&feed.next().await?)?)?;
        }
    }
    if out.is_terminal() && std::io::stdin().is_terminal() {
        return live(feed, connection).await;
    }
    let performance = feed.next().await?.performance.unwrap_or_default();
    let incidents = incidents(&mut ErrorTrackingServiceClient::new(connection)).await;
    write!(&out, "{}", draw(&performance, &incidents))?;
    Ok(())
}

async fn live(mut feed: Feed, connection: Connection) -> Result<(), Failure> {
    // The first frame before the screen is taken: a refusal is told like any other.
    let mut performance = feed.next().await?.performance.unwrap_or_default();
    let newest = Mutex::new(Ok(Vec::new()));
    let mut terminal = Terminal::take()?;
    let drawing = async {
        loop {
            let text = draw(&performance, &newest.lock().unwrap_or_else(PoisonError::into_inner));
            Terminal::show(&text)?;
            tokio::select! {
                frame = feed.next() => performance = frame?.performance.unwrap_or_default(),
                () = terminal.end() => return Ok(()),
            }
        }
    };
    let asking = async {
        let mut client = ErrorTrackingServiceClient::new(connection);
        loop {
            let incidents = incidents(&mut client).await;
            *newest.lock().unwrap_or_else(PoisonError::into_inner) = incidents;
            sleep(INCIDENTS_EVERY).await;
        }
    };
    tokio::select! {
        done = drawing => done,
        () = asking => Ok(()),
    }
}

async fn incidents(client: &mut ErrorTrackingServiceClient<Connection>) -> Incidents {
    match timeout(ASKING, client.get_dashboard(GetDashboardRequest {})).await {
        Ok(Ok(reply)) => Ok(reply.into_inner().recent_incidents),
        Ok(Err(status)) if status.message().is_empty() => Err(status.code().to_string()),
        Ok(Err(status)) => Err(status.message().to_owned()),
        Err(_) => Err("the errors service does not answer".to_owned()),
    }
}

//! How many calls there were, as analytics counts them. Nobody waits long for it: what it does not
//! say in time is unknown.

use std::sync::Arc;
use std::time::Duration;

use hapa_core::timestamps::timestamp;
use hapa_proto::analytics::v1::GetPerformanceRequest;
use hapa_proto::analytics::v1::analytics_service_client::AnalyticsServiceClient;
use hapa_transport::peer::Wire;
use tokio::sync::Mutex;
use tokio::time::{Instant, timeout};

/// How long a dashboard waits for it.
const PATIENCE: Duration = Duration::from_millis(200);
/// How long an answer holds.
const FRESH: Duration = Duration::from_secs(5);
/// How long analytics is left alone after it did not answer.
const PAUSE: Duration = Duration::from_secs(5);

/// An answer, and until when it holds.
type Known = (Instant, Option<u32>);

/// Calls of the last 24 hours.
#[derive(Clone)]
pub(crate) struct Calls {
    analytics: Option<AnalyticsServiceClient<Wire>>,
    known: Arc<Mutex<Option<Known>>>,
}

impl Calls {
    pub(crate) fn new(analytics: Option<Wire>) -> Self {
        Calls { analytics: analytics.map(AnalyticsServiceClient::new), known: Arc::default() }
    }

    /// How many there were since a time, as of 5 s ago at most; none where nobody knows.
    pub(crate) async fn since(&self, start: i64) -> Option<u32> {
        let client = self.analytics.clone()?;
        let mut known = timeout(PATIENCE, self.known.lock()).await.ok()?;
        match *known {
            Some((end, calls)) if Instant::now() < end => return calls,
            _ => {}
        }
        let calls = ask(client, start).await;
        let holds = if calls.is_some() { FRESH } else { PAUSE };
        *known = Some((Instant::now() + holds, calls));
        calls
    }
}

async fn ask(mut client: AnalyticsServiceClient<Wire>, start: i64) -> Option<u32> {
    let start_time = Some(timestamp(start));
    let request = GetPerformanceRequest { start_time, ..GetPerformanceRequest::default() };
    let reply = timeout(PATIENCE, client.get_performance(request)).await.ok()?;
    let reply = reply.inspect_err(|error| tracing::debug!(%error, "analytics does not answer"));
    Some(reply.ok()?.into_inner().requests)
}

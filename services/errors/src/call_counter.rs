//! The number of calls, read from AnalyticsService with a short timeout and cached. Without an
//! answer in time the number is unknown.

use std::sync::Arc;
use std::time::Duration;

use hapa_core::timestamps::timestamp;
use hapa_proto::analytics::v1::GetPerformanceRequest;
use hapa_proto::analytics::v1::analytics_service_client::AnalyticsServiceClient;
use hapa_transport::peer::PeerChannel;
use tokio::sync::Mutex;
use tokio::time::{Instant, timeout};

/// Longest time that a dashboard request waits for AnalyticsService.
const ANALYTICS_TIMEOUT: Duration = Duration::from_millis(200);
/// Lifetime of a cached answer.
const CACHE_TTL: Duration = Duration::from_secs(5);
/// Delay before the next request after AnalyticsService did not answer.
const RETRY_DELAY: Duration = Duration::from_secs(5);

/// The end of an answer's lifetime, and the answer.
type CachedCount = (Instant, Option<u32>);

/// Counts the calls since a time through AnalyticsService.
#[derive(Clone)]
pub(crate) struct CallCounter {
    analytics: Option<AnalyticsServiceClient<PeerChannel>>,
    cached: Arc<Mutex<Option<CachedCount>>>,
}

impl CallCounter {
    pub(crate) fn new(analytics: Option<PeerChannel>) -> Self {
        CallCounter {
            analytics: analytics.map(AnalyticsServiceClient::new),
            cached: Arc::default(),
        }
    }

    /// The number of calls since `start`, at most 5 s old. `None`: unknown.
    pub(crate) async fn since(&self, start: i64) -> Option<u32> {
        let client = self.analytics.clone()?;
        let mut cached = timeout(ANALYTICS_TIMEOUT, self.cached.lock()).await.ok()?;
        match *cached {
            Some((expires_at, calls)) if Instant::now() < expires_at => return calls,
            _ => {}
        }
        let calls = fetch(client, start).await;
        let ttl = if calls.is_some() { CACHE_TTL } else { RETRY_DELAY };
        *cached = Some((Instant::now() + ttl, calls));
        calls
    }
}

async fn fetch(mut client: AnalyticsServiceClient<PeerChannel>, start: i64) -> Option<u32> {
    let start_time = Some(timestamp(start));
    let request = GetPerformanceRequest { start_time, ..GetPerformanceRequest::default() };
    let reply = timeout(ANALYTICS_TIMEOUT, client.get_performance(request)).await.ok()?;
    let reply = reply.inspect_err(|error| tracing::debug!(%error, "AnalyticsService failed"));
    Some(reply.ok()?.into_inner().requests)
}

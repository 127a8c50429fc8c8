//! The stream of performance snapshots, one per second; reconnects after a loss.

use hapa_proto::analytics::v1::analytics_service_client::AnalyticsServiceClient;
use hapa_proto::analytics::v1::{WatchPerformanceRequest, WatchPerformanceResponse};
use tonic::{Status, Streaming};

use crate::cli::connection::Connection;
use crate::cli::reconnect::Reconnect;

pub(super) struct PerformanceStream {
    client: AnalyticsServiceClient<Connection>,
    request: WatchPerformanceRequest,
    stream: Option<Streaming<WatchPerformanceResponse>>,
    reconnect: Reconnect,
}

impl PerformanceStream {
    pub(super) fn new(
        client: AnalyticsServiceClient<Connection>,
        request: WatchPerformanceRequest,
    ) -> Self {
        PerformanceStream { client, request, stream: None, reconnect: Reconnect::default() }
    }

    /// Returns the next snapshot. Cancel-safe: the future may be dropped at any await and the method called again.
    pub(super) async fn next(&mut self) -> Result<WatchPerformanceResponse, Status> {
        loop {
            match self.try_next().await {
                Ok(snapshot) => {
                    self.reconnect.record_message();
                    return Ok(snapshot);
                }
                Err(error) => {
                    self.stream = None;
                    self.reconnect.wait_after(error).await?;
                }
            }
        }
    }

    async fn try_next(&mut self) -> Result<WatchPerformanceResponse, Status> {
        let stream = match &mut self.stream {
            Some(stream) => stream,
            empty => {
                let reply = self.client.watch_performance(self.request.clone()).await?;
                empty.insert(reply.into_inner())
            }
        };
        stream.message().await?.ok_or_else(|| Status::unavailable("the stream ended"))
    }
}

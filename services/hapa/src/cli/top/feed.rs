//! The frames, one a second, also after a stream was lost.

use std::time::Duration;

use hapa_proto::analytics::v1::analytics_service_client::AnalyticsServiceClient;
use hapa_proto::analytics::v1::{WatchPerformanceRequest, WatchPerformanceResponse};
use tonic::{Status, Streaming};

use crate::cli::connection::Connection;
use crate::cli::errors::is_passing;

/// Between two attempts to go on, and how many there are in a row.
const PAUSE: Duration = Duration::from_secs(1);
const ATTEMPTS: u32 = 30;

pub(super) struct Feed {
    client: AnalyticsServiceClient<Connection>,
    request: WatchPerformanceRequest,
    stream: Option<Streaming<WatchPerformanceResponse>>,
    heard: bool,
    lost: u32,
}

impl Feed {
    pub(super) fn new(
        client: AnalyticsServiceClient<Connection>,
        request: WatchPerformanceRequest,
    ) -> Self {
        Feed { client, request, stream: None, heard: false, lost: 0 }
    }

    /// May be dropped at any await, and asked again.
    pub(super) async fn next(&mut self) -> Result<WatchPerformanceResponse, Status> {
        loop {
            let end = match self.try_next().await {
                Ok(frame) => {
                    (self.heard, self.lost) = (true, 0);
                    return Ok(frame);
                }
                Err(end) => end,
            };
            self.stream = None;
            self.lost += 1;
            if !self.heard || self.lost > ATTEMPTS || !is_passing(&end) {
                return Err(end);
            }
            tokio::time::sleep(PAUSE).await;
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

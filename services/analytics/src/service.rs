//! The RPCs.

use std::pin::Pin;
use std::time::Duration;

use futures_util::Stream;
use futures_util::stream::unfold;
use hapa_core::call::Call;
use hapa_core::timestamps::now;
use hapa_proto::analytics::v1::analytics_service_server::AnalyticsService;
use hapa_proto::analytics::v1::{
    GetPerformanceRequest, GetPerformanceResponse, GetUsageRequest, GetUsageResponse,
    RecordEventsRequest, RecordEventsResponse, WatchPerformanceRequest, WatchPerformanceResponse,
};
use tokio::time::{Interval, MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};

use crate::error::Error;
use crate::store::Store;
use crate::{event, performance, usage};

/// Between two reports to one who watches.
const PACE: Duration = Duration::from_secs(1);

pub(crate) struct Analytics {
    pub(crate) store: Store,
    pub(crate) closing: CancellationToken,
}

#[tonic::async_trait]
impl AnalyticsService for Analytics {
    type WatchPerformanceStream =
        Pin<Box<dyn Stream<Item = Result<WatchPerformanceResponse, Status>> + Send>>;

    async fn record_events(
        &self,
        request: Request<RecordEventsRequest>,
    ) -> Result<Response<RecordEventsResponse>, Status> {
        let now = now();
        let events = event::events(request.into_inner().events, now)?;
        let accepted = self.store.record(events, now).await?;
        Ok(Response::new(RecordEventsResponse { accepted }))
    }

    async fn get_performance(
        &self,
        request: Request<GetPerformanceRequest>,
    ) -> Result<Response<GetPerformanceResponse>, Status> {
        Ok(Response::new(performance::report(&self.store, request.into_inner()).await?))
    }

    async fn get_usage(
        &self,
        request: Request<GetUsageRequest>,
    ) -> Result<Response<GetUsageResponse>, Status> {
        let call = Call::of(request.extensions())?;
        Ok(Response::new(usage::report(&self.store, &call, request.into_inner()).await?))
    }

    async fn watch_performance(
        &self,
        request: Request<WatchPerformanceRequest>,
    ) -> Result<Response<Self::WatchPerformanceStream>, Status> {
        let call = Call::of(request.extensions())?;
        let asked = request.into_inner();
        let filters = [("model", asked.model.as_str()), ("method", asked.method.as_str())];
        performance::check_filters(&filters)?;
        let mut pace = interval(PACE);
        pace.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let watcher = Watcher {
            store: self.store.clone(),
            closing: self.closing.clone(),
            // A service of the mesh has none that could end.
            ended: call.ended.unwrap_or_default(),
            pace,
            asked,
        };
        let reports = unfold(Some(watcher), |watcher| async {
            let mut watcher = watcher?;
            match watcher.next().await {
                Ok(report) => Some((Ok(report), Some(watcher))),
                Err(error) => Some((Err(error.into()), None)),
            }
        });
        Ok(Response::new(Box::pin(reports)))
    }
}

/// One who watches. It is pulled: nothing is asked of the store for who does not read.
struct Watcher {
    store: Store,
    closing: CancellationToken,
    ended: CancellationToken,
    pace: Interval,
    asked: WatchPerformanceRequest,
}

impl Watcher {
    async fn next(&mut self) -> Result<WatchPerformanceResponse, Error> {
        tokio::select! {
            biased;
            () = self.closing.cancelled() => return Err(Error::ShuttingDown),
            () = self.ended.cancelled() => return Err(Error::Ended),
            _ = self.pace.tick() => {}
        }
        let WatchPerformanceRequest { model, method } = &self.asked;
        let performance = performance::last_minute(&self.store, model, method).await?;
        Ok(WatchPerformanceResponse { performance: Some(performance) })
    }
}

//! AnalyticsService: decodes each RPC and calls the module of its resource.

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

/// Interval between two messages of WatchPerformance.
const REPORT_INTERVAL: Duration = Duration::from_secs(1);

pub(crate) struct AnalyticsHandler {
    pub(crate) store: Store,
    pub(crate) shutdown: CancellationToken,
}

#[tonic::async_trait]
impl AnalyticsService for AnalyticsHandler {
    type WatchPerformanceStream =
        Pin<Box<dyn Stream<Item = Result<WatchPerformanceResponse, Status>> + Send>>;

    async fn record_events(
        &self,
        request: Request<RecordEventsRequest>,
    ) -> Result<Response<RecordEventsResponse>, Status> {
        let now = now();
        let events = event::validate_batch(request.into_inner().events, now)?;
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
        let call = Call::from_extensions(request.extensions())?;
        Ok(Response::new(usage::report(&self.store, &call, request.into_inner()).await?))
    }

    async fn watch_performance(
        &self,
        request: Request<WatchPerformanceRequest>,
    ) -> Result<Response<Self::WatchPerformanceStream>, Status> {
        let call = Call::from_extensions(request.extensions())?;
        let filter = request.into_inner();
        let filters = [("model", filter.model.as_str()), ("method", filter.method.as_str())];
        performance::check_filters(&filters)?;
        let mut ticks = interval(REPORT_INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let watcher = PerformanceWatcher {
            store: self.store.clone(),
            shutdown: self.shutdown.clone(),
            // Services call without a credential that could be revoked.
            credential_ended: call.ended.unwrap_or_default(),
            ticks,
            filter,
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

/// The state of one WatchPerformance stream. It is pulled: without reads by the client there are no
/// queries.
struct PerformanceWatcher {
    store: Store,
    shutdown: CancellationToken,
    credential_ended: CancellationToken,
    ticks: Interval,
    filter: WatchPerformanceRequest,
}

impl PerformanceWatcher {
    async fn next(&mut self) -> Result<WatchPerformanceResponse, Error> {
        tokio::select! {
            biased;
            () = self.shutdown.cancelled() => return Err(Error::ShuttingDown),
            () = self.credential_ended.cancelled() => return Err(Error::CredentialEnded),
            _ = self.ticks.tick() => {}
        }
        let WatchPerformanceRequest { model, method } = &self.filter;
        let performance = performance::last_minute(&self.store, model, method).await?;
        Ok(WatchPerformanceResponse { performance: Some(performance) })
    }
}

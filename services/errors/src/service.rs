//! ErrorTrackingService: decodes each RPC and calls the module of its resource.

use std::pin::Pin;

use futures_util::Stream;
use hapa_core::call::Call;
use hapa_core::rpc_error::{ErrorCode, Retry, code_name};
use hapa_proto::errors::v1::error_tracking_service_server::ErrorTrackingService;
use hapa_proto::errors::v1::list_error_codes_response::ErrorCode as PublishedCode;
use hapa_proto::errors::v1::{
    GetDashboardRequest, GetDashboardResponse, GetIncidentRequest, GetIncidentResponse,
    ListErrorCodesRequest, ListErrorCodesResponse, ListIncidentsRequest, ListIncidentsResponse,
    ListPatternsRequest, ListPatternsResponse, ReportOccurrencesRequest, ReportOccurrencesResponse,
    UpdateIncidentRequest, UpdateIncidentResponse, WatchOccurrencesRequest,
    WatchOccurrencesResponse,
};
use tonic::{Request, Response, Status};

use crate::call_counter::CallCounter;
use crate::occurrence_feed::OccurrenceFeed;
use crate::store::Store;
use crate::visibility::Visibility;
use crate::{dashboard, incident, occurrence, pattern};

pub(crate) struct ErrorTracker {
    pub(crate) store: Store,
    pub(crate) feed: OccurrenceFeed,
    pub(crate) call_counter: CallCounter,
    pub(crate) incident_tracking_enabled: bool,
}

type OccurrenceResponses =
    Pin<Box<dyn Stream<Item = Result<WatchOccurrencesResponse, Status>> + Send + 'static>>;

#[tonic::async_trait]
impl ErrorTrackingService for ErrorTracker {
    type WatchOccurrencesStream = OccurrenceResponses;

    async fn report_occurrences(
        &self,
        request: Request<ReportOccurrencesRequest>,
    ) -> Result<Response<ReportOccurrencesResponse>, Status> {
        let call = Call::from_extensions(request.extensions())?;
        let occurrences = request.into_inner().occurrences;
        let batch = occurrence::prepare(&call, occurrences, self.incident_tracking_enabled)?;
        let accepted = self.store.ingest(batch).await?;
        Ok(Response::new(ReportOccurrencesResponse { accepted }))
    }

    async fn get_dashboard(
        &self,
        request: Request<GetDashboardRequest>,
    ) -> Result<Response<GetDashboardResponse>, Status> {
        let visibility = Visibility::from_call(&Call::from_extensions(request.extensions())?);
        Ok(Response::new(dashboard::get(&self.store, &visibility, &self.call_counter).await?))
    }

    async fn list_patterns(
        &self,
        request: Request<ListPatternsRequest>,
    ) -> Result<Response<ListPatternsResponse>, Status> {
        let visibility = Visibility::from_call(&Call::from_extensions(request.extensions())?);
        Ok(Response::new(pattern::list(&self.store, &visibility, &request.into_inner()).await?))
    }

    async fn list_incidents(
        &self,
        request: Request<ListIncidentsRequest>,
    ) -> Result<Response<ListIncidentsResponse>, Status> {
        let visibility = Visibility::from_call(&Call::from_extensions(request.extensions())?);
        Ok(Response::new(incident::list(&self.store, &visibility, request.into_inner()).await?))
    }

    async fn get_incident(
        &self,
        request: Request<GetIncidentRequest>,
    ) -> Result<Response<GetIncidentResponse>, Status> {
        let visibility = Visibility::from_call(&Call::from_extensions(request.extensions())?);
        Ok(Response::new(incident::get(&self.store, &visibility, request.into_inner()).await?))
    }

    async fn update_incident(
        &self,
        request: Request<UpdateIncidentRequest>,
    ) -> Result<Response<UpdateIncidentResponse>, Status> {
        let call = Call::from_extensions(request.extensions())?;
        Ok(Response::new(incident::update(&self.store, &call, request.into_inner()).await?))
    }

    async fn list_error_codes(
        &self,
        _: Request<ListErrorCodesRequest>,
    ) -> Result<Response<ListErrorCodesResponse>, Status> {
        let codes = ErrorCode::ALL.iter().map(|&code| published(code)).collect();
        Ok(Response::new(ListErrorCodesResponse { codes }))
    }

    async fn watch_occurrences(
        &self,
        request: Request<WatchOccurrencesRequest>,
    ) -> Result<Response<OccurrenceResponses>, Status> {
        let visibility = Visibility::from_call(&Call::from_extensions(request.extensions())?);
        let request = request.into_inner();
        Ok(Response::new(Box::pin(self.feed.clone().subscribe(visibility, request).await?)))
    }
}

fn published(code: ErrorCode) -> PublishedCode {
    let entry = code.entry();
    let retry = match entry.retry {
        Retry::No => "no",
        Retry::Yes => "yes",
        Retry::AfterDelay => "after_delay",
    };
    PublishedCode {
        code: entry.name.to_owned(),
        description: entry.meaning.to_owned(),
        reason: entry.reason.to_owned(),
        grpc_status: entry.grpc.map(code_name).unwrap_or_default().to_owned(),
        retry: retry.to_owned(),
        advice: entry.advice.to_owned(),
    }
}

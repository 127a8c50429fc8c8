//! Fakes of analytics and errors that store the events of a sender, and fail on demand.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::stream::Empty;
use hapa_proto::analytics::v1::analytics_service_server::{
    AnalyticsService, AnalyticsServiceServer,
};
use hapa_proto::analytics::v1::{
    GetPerformanceRequest, GetPerformanceResponse, GetUsageRequest, GetUsageResponse,
    RecordEventsRequest, RecordEventsResponse, UsageEvent, WatchPerformanceRequest,
    WatchPerformanceResponse,
};
use hapa_proto::errors::v1::error_tracking_service_server::{
    ErrorTrackingService, ErrorTrackingServiceServer,
};
use hapa_proto::errors::v1::{
    GetDashboardRequest, GetDashboardResponse, GetIncidentRequest, GetIncidentResponse,
    ListErrorCodesRequest, ListErrorCodesResponse, ListIncidentsRequest, ListIncidentsResponse,
    ListPatternsRequest, ListPatternsResponse, Occurrence, ReportOccurrencesRequest,
    ReportOccurrencesResponse, UpdateIncidentRequest, UpdateIncidentResponse,
    WatchOccurrencesRequest, WatchOccurrencesResponse,
};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Response, Status};

use crate::acking_sink::AckingSink;
use crate::tools::within;

/// The received events, and the treatment of the next ones.
#[derive(Debug)]
pub(crate) struct Inbox {
    usage: Mutex<Vec<UsageEvent>>,
    occurrences: Mutex<Vec<Occurrence>>,
    /// The number of requests that are stored and then answered with an error.
    unanswered: AtomicUsize,
    waiting: AtomicUsize,
    /// It has no permits while the fake hangs.
    gate: Semaphore,
}

/// Fake analytics and errors services on one port. Dropping it closes the port.
#[derive(Debug)]
pub struct FakeAnalytics {
    desk: Arc<Inbox>,
    /// The address, even before it listens.
    pub address: SocketAddr,
    serving: JoinSet<()>,
}

/// The destination of received events.
#[derive(Clone)]
pub(crate) enum Service {
    Story(Arc<Inbox>),
    Keeping(AckingSink),
}

/// Serves both services on one port.
pub(crate) async fn serve(listener: TcpListener, service: Service) {
    // Health reports SERVING as long as it listens.
    let (reporter, health) = tonic_health::server::health_reporter();
    reporter.set_serving::<AnalyticsServiceServer<Service>>().await;
    reporter.set_serving::<ErrorTrackingServiceServer<Service>>().await;
    let router = Server::builder()
        .add_service(health)
        .add_service(AnalyticsServiceServer::new(service.clone()))
        .add_service(ErrorTrackingServiceServer::new(service));
    router.serve_with_incoming(TcpIncoming::from(listener)).await.expect("it serves");
}

impl FakeAnalytics {
    /// Reserves a port without listening on it.
    pub async fn away() -> FakeAnalytics {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("a bound port");
        let desk = Inbox {
            usage: Mutex::default(),
            occurrences: Mutex::default(),
            unanswered: AtomicUsize::new(0),
            waiting: AtomicUsize::new(0),
            gate: Semaphore::new(Semaphore::MAX_PERMITS),
        };
        FakeAnalytics { desk: Arc::new(desk), address, serving: JoinSet::new() }
    }

    /// Starts it on a free port.
    pub async fn start() -> FakeAnalytics {
        let mut receiver = FakeAnalytics::away().await;
        receiver.come().await;
        receiver
    }

    /// Starts to listen.
    pub async fn come(&mut self) {
        let listener = TcpListener::bind(self.address).await.expect("the port that was free");
        self.serving.spawn(serve(listener, Service::Story(Arc::clone(&self.desk))));
    }

    /// The flags that send a mesh's events here.
    pub fn flags(&self) -> [String; 2] {
        ["analytics", "errors"].map(|name| format!("--{name}-address=http://{}", self.address))
    }

    /// Stores this number of requests and answers them with an error.
    pub fn fail(&self, requests: usize) {
        self.desk.unanswered.store(requests, Ordering::SeqCst);
    }

    /// Stops answering.
    pub fn hang(&self) {
        self.desk.gate.forget_permits(Semaphore::MAX_PERMITS);
    }

    /// The number of requests that wait for an answer.
    pub fn waiting(&self) -> usize {
        self.desk.waiting.load(Ordering::SeqCst)
    }

    /// The usage events of this service in the order of their arrival, including repetitions.
    pub fn usage(&self, service: &str) -> Vec<UsageEvent> {
        let usage = self.desk.usage.lock().expect("no panic");
        usage.iter().filter(|event| event.service == service).cloned().collect()
    }

    /// The occurrences of this service.
    pub fn occurrences(&self, service: &str) -> Vec<Occurrence> {
        let occurrences = self.desk.occurrences.lock().expect("no panic");
        occurrences.iter().filter(|event| event.service == service).cloned().collect()
    }

    /// Waits until this number of usage events of a service has arrived, each counted once.
    pub async fn wait_for_usage(&self, service: &str, count: usize) -> Vec<UsageEvent> {
        let arrived = async {
            loop {
                let events = self.usage(service);
                let ids: HashSet<_> = events.iter().map(|event| &event.event_id).collect();
                if ids.len() >= count {
                    assert_eq!(ids.len(), count, "{events:?}");
                    return events;
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        within("events to arrive", arrived).await
    }
}

impl Inbox {
    async fn answer<T: Default>(&self) -> Result<Response<T>, Status> {
        self.waiting.fetch_add(1, Ordering::SeqCst);
        drop(self.gate.acquire().await);
        self.waiting.fetch_sub(1, Ordering::SeqCst);
        let less = |left: usize| left.checked_sub(1);
        match self.unanswered.fetch_update(Ordering::SeqCst, Ordering::SeqCst, less) {
            Ok(_) => Err(Status::unavailable("it was stored, but you will not know")),
            Err(_) => Ok(Response::new(T::default())),
        }
    }
}

type Answer<T> = Result<Response<T>, Status>;

fn nobody_asks<T>() -> Answer<T> {
    Err(Status::unimplemented("no story asks for this"))
}

#[tonic::async_trait]
impl AnalyticsService for Service {
    type WatchPerformanceStream = Empty<Result<WatchPerformanceResponse, Status>>;

    async fn record_events(
        &self,
        request: Request<RecordEventsRequest>,
    ) -> Answer<RecordEventsResponse> {
        let events = request.into_inner().events;
        match self {
            Service::Story(desk) => {
                desk.usage.lock().expect("no panic").extend(events);
                desk.answer().await
            }
            Service::Keeping(keeper) => {
                keeper.keep(events).await?;
                Ok(Response::new(RecordEventsResponse::default()))
            }
        }
    }

    async fn get_performance(
        &self,
        _: Request<GetPerformanceRequest>,
    ) -> Answer<GetPerformanceResponse> {
        nobody_asks()
    }

    async fn get_usage(&self, _: Request<GetUsageRequest>) -> Answer<GetUsageResponse> {
        nobody_asks()
    }

    async fn watch_performance(
        &self,
        _: Request<WatchPerformanceRequest>,
    ) -> Answer<Self::WatchPerformanceStream> {
        nobody_asks()
    }
}

#[tonic::async_trait]
impl ErrorTrackingService for Service {
    type WatchOccurrencesStream = Empty<Result<WatchOccurrencesResponse, Status>>;

    async fn report_occurrences(
        &self,
        request: Request<ReportOccurrencesRequest>,
    ) -> Answer<ReportOccurrencesResponse> {
        let Service::Story(desk) = self else { return nobody_asks() };
        desk.occurrences.lock().expect("no panic").extend(request.into_inner().occurrences);
        desk.answer().await
    }

    async fn get_dashboard(&self, _: Request<GetDashboardRequest>) -> Answer<GetDashboardResponse> {
        nobody_asks()
    }

    async fn list_patterns(&self, _: Request<ListPatternsRequest>) -> Answer<ListPatternsResponse> {
        nobody_asks()
    }

    async fn list_incidents(
        &self,
        _: Request<ListIncidentsRequest>,
    ) -> Answer<ListIncidentsResponse> {
        nobody_asks()
    }

    async fn get_incident(&self, _: Request<GetIncidentRequest>) -> Answer<GetIncidentResponse> {
        nobody_asks()
    }

    async fn update_incident(
        &self,
        _: Request<UpdateIncidentRequest>,
    ) -> Answer<UpdateIncidentResponse> {
        nobody_asks()
    }

    async fn list_error_codes(
        &self,
        _: Request<ListErrorCodesRequest>,
    ) -> Answer<ListErrorCodesResponse> {
        nobody_asks()
    }

    async fn watch_occurrences(
        &self,
        _: Request<WatchOccurrencesRequest>,
    ) -> Answer<Self::WatchOccurrencesStream> {
        nobody_asks()
    }
}

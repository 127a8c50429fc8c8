//! Records the incident ids of all failures that clients receive, so that the end of a test can look each of
//! them up. An id of the gateway may be only in its access log if the gateway could not report it, because it
//! reached no service.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use hapa_proto::errors::v1::GetIncidentRequest;
use hapa_proto::errors::v1::error_tracking_service_client::ErrorTrackingServiceClient;
use http_body::Frame;
use http_body_util::BodyExt as _;
use serde_json::Value;
use tempfile::TempDir;
use tokio::time::sleep;
use tonic::body::Body;
use tonic::codegen::{Service, http};
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{self, Channel};
use tonic::{Code, Status};

use crate::identities::{Header, Identity};
use crate::tools::{POLL_INTERVAL, incident, refusal, within};

/// The incident ids that clients received; clones share them.
#[derive(Clone, Debug, Default)]
pub struct IncidentTracker(Arc<Mutex<TrackedIncidents>>);

#[derive(Debug, Default)]
struct TrackedIncidents {
    ids: BTreeSet<String>,
    gateways: Vec<AccessLog>,
}

impl IncidentTracker {
    fn read(&self, headers: &http::HeaderMap) {
        let failed = Status::from_header_map(headers).filter(|status| status.code() != Code::Ok);
        if let Some(status) = failed {
            self.add(&incident(&status).1);
        }
    }

    /// Adds an incident id.
    pub fn add(&self, incident_id: &str) {
        self.0.lock().expect("no panic").ids.insert(incident_id.to_owned());
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.lock().expect("no panic").ids.is_empty()
    }

    /// Adds an access log with the gateway's own refusals.
    pub(crate) fn look_into(&self, log: &AccessLog) {
        self.0.lock().expect("no panic").gateways.push(log.clone());
    }

    /// Records the failure of an HTTP reply, or those in its stream of events.
    pub(crate) async fn http(&self, reply: reqwest::Response) -> reqwest::Response {
        let (status, seen) = (reply.status(), self.clone());
        let kind = reply.headers().get("content-type");
        let streams = kind.is_some_and(|kind| kind.as_bytes().starts_with(b"text/event-stream"));
        let (head, body) = http::Response::from(reply).into_parts();
        let body = if !status.is_success() {
            let whole = within("a refusal", body.collect()).await.expect("a refusal is whole");
            let whole = whole.to_bytes();
            let told: Value = serde_json::from_slice(&whole).expect("a refusal is JSON");
            seen.add(&refusal(&told).1);
            reqwest::Body::from(whole)
        } else if streams {
            let mut lines = Vec::new();
            reqwest::Body::wrap(body.map_frame(move |frame| {
                lines.extend_from_slice(frame.data_ref().map_or(&[][..], |data| data));
                while let Some(end) = lines.iter().position(|&byte| byte == b'\n') {
                    seen.event(&lines.drain(..=end).collect::<Vec<_>>());
                }
                frame
            }))
        } else {
            body
        };
        http::Response::from_parts(head, body).into()
    }

    /// Records the failure in a line of a stream of events.
    fn event(&self, line: &[u8]) {
        let event = line.strip_prefix(b"data: ").map(serde_json::from_slice::<Value>);
        let Some(Ok(event)) = event else { return };
        if let Some(id) = event["failed"]["incident_id"].as_str() {
            self.add(id);
        }
    }

    /// Finds each id with `GetIncident` as soon as its occurrence has arrived, and returns their number. If
    /// the gateway reached no service, its access log suffices.
    pub(crate) async fn find(&self, channel: Channel) -> usize {
        let TrackedIncidents { ids, gateways } =
            std::mem::take(&mut *self.0.lock().expect("no panic"));
        let mut errors = ErrorTrackingServiceClient::new(Identity::Mesh.on(channel));
        for id in &ids {
            let found = async {
                loop {
                    let request = GetIncidentRequest { incident_id: id.clone() };
                    if errors.get_incident(request).await.is_ok()
                        || gateways.iter().any(|log| log.reached_no_service(id))
                    {
                        return;
                    }
                    sleep(POLL_INTERVAL).await;
                }
            };
            within(&format!("{id} to be found"), found).await;
        }
        ids.len()
    }
}

/// The access log of a gateway; clones share its folder.
#[derive(Clone, Debug)]
pub(crate) struct AccessLog(Arc<TempDir>);

impl AccessLog {
    pub(crate) fn new() -> AccessLog {
        AccessLog(Arc::new(tempfile::tempdir().expect("a folder for the test")))
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.0.path().join("access.log")
    }

    /// The lines of the log, one for each request.
    pub(crate) fn lines(&self) -> Vec<Value> {
        let log = std::fs::read_to_string(self.path()).expect("the gateway's log");
        log.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
    }

    /// Whether the gateway created this id because it reached no service.
    fn reached_no_service(&self, id: &str) -> bool {
        let unreached =
            ["upstream_reset_before_response_started", "no_healthy_upstream", "response_timeout"];
        self.lines().iter().any(|line| {
            let why = line["why"].as_str().unwrap_or_default();
            line["incident_id"] == id && unreached.iter().any(|begin| why.starts_with(begin))
        })
    }
}

/// A channel with an identity that records the incident ids of failed calls.
#[derive(Clone, Debug)]
pub struct TestChannel {
    inner: InterceptedService<Channel, Header>,
    /// `None` if failures are not recorded.
    seen: Option<IncidentTracker>,
}

impl TestChannel {
    pub(crate) fn new(inner: InterceptedService<Channel, Header>) -> TestChannel {
        TestChannel { inner, seen: None }
    }

    /// Records failures: each must have a published code and an incident id.
    pub(crate) fn seen_by(self, seen: &IncidentTracker) -> TestChannel {
        TestChannel { seen: Some(seen.clone()), ..self }
    }
}

impl Service<http::Request<Body>> for TestChannel {
    type Response = http::Response<Body>;
    type Error = transport::Error;
    type Future = BoxFuture<'static, Result<Self::Response, Self::Error>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let (answer, seen) = (self.inner.call(request), self.seen.clone());
        Box::pin(async move {
            let answer = answer.await?;
            let Some(seen) = seen else { return Ok(answer.map(Body::new)) };
            seen.read(answer.headers());
            let read = move |frame: Frame<Bytes>| {
                if let Some(trailers) = frame.trailers_ref() {
                    seen.read(trailers);
                }
                frame
            };
            Ok(answer.map(|body| Body::new(body.map_frame(read))))
        })
    }
}

//! What clients were shown: the incident ids of all failures, read off the wire, so that a story's
//! end can look each of them up.

use std::collections::BTreeSet;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use hapa_proto::errors::v1::GetIncidentRequest;
use hapa_proto::errors::v1::error_tracking_service_client::ErrorTrackingServiceClient;
use http_body::{Body as HttpBody, Frame, SizeHint};
use tokio::time::sleep;
use tonic::body::Body;
use tonic::codegen::{Service, http};
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{self, Channel};
use tonic::{Code, Status};

use crate::people::{Header, Who};
use crate::tools::{SHORTLY, incident, within};

/// The incident ids that clients were shown; clones share them.
#[derive(Clone, Debug, Default)]
pub struct Seen(Arc<Mutex<BTreeSet<String>>>);

impl Seen {
    fn read(&self, headers: &http::HeaderMap) {
        let failed = Status::from_header_map(headers).filter(|status| status.code() != Code::Ok);
        if let Some(status) = failed {
            self.add(&incident(&status).1);
        }
    }

    /// Another way to be shown one.
    pub fn add(&self, incident_id: &str) {
        self.0.lock().expect("no panic").insert(incident_id.to_owned());
    }

    /// Finds each through `GetIncident`, as soon as its occurrence has arrived; says how many.
    pub(crate) async fn find(&self, channel: Channel) -> usize {
        let ids = std::mem::take(&mut *self.0.lock().expect("no panic"));
        let mut errors = ErrorTrackingServiceClient::new(Who::Mesh.on(channel));
        for id in &ids {
            let found = async {
                loop {
                    let request = GetIncidentRequest { incident_id: id.clone() };
                    if errors.get_incident(request).await.is_ok() {
                        return;
                    }
                    sleep(SHORTLY).await;
                }
            };
            within(&format!("{id} to be found"), found).await;
        }
        ids.len()
    }
}

/// A channel on which someone calls, and what it is shown.
#[derive(Clone, Debug)]
pub struct Wire {
    inner: InterceptedService<Channel, Header>,
    /// None: nobody asks afterwards.
    seen: Option<Seen>,
}

impl Wire {
    pub(crate) fn new(inner: InterceptedService<Channel, Header>) -> Wire {
        Wire { inner, seen: None }
    }

    /// The same for a story that asks afterwards what was seen: each failure must have a published
    /// code and an incident id.
    pub(crate) fn seen_by(self, seen: &Seen) -> Wire {
        Wire { seen: Some(seen.clone()), ..self }
    }
}

impl Service<http::Request<Body>> for Wire {
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
            Ok(answer.map(|body| Body::new(Watched { body: Body::new(body), seen })))
        })
    }
}

/// An answer whose end is read.
struct Watched {
    body: Body,
    seen: Seen,
}

impl HttpBody for Watched {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
        if let Some(Ok(frame)) = &frame
            && let Some(trailers) = frame.trailers_ref()
        {
            self.seen.read(trailers);
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

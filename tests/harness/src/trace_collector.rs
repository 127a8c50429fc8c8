//! A fake OTLP collector that stores the received spans.

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::sync::Arc;

use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{
    TraceService, TraceServiceServer,
};
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::common::v1::{AnyValue, KeyValue};
use opentelemetry_proto::tonic::trace::v1::Span;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Response, Status};

use crate::tools::within;

/// One span with its sender.
#[derive(Clone, Debug)]
pub struct CollectedSpan {
    /// `service.name` of its sender.
    pub service: String,
    /// The span.
    pub span: Span,
    /// What its sender showed as `authorization`.
    pub credential: String,
}

/// A fake OTLP collector. Dropping it closes the port.
#[derive(Debug)]
pub struct TraceCollector {
    /// Where it listens.
    pub address: SocketAddr,
    spans: watch::Receiver<Vec<CollectedSpan>>,
    _serving: JoinSet<()>,
}

struct Inbox(Arc<watch::Sender<Vec<CollectedSpan>>>);

#[tonic::async_trait]
impl TraceService for Inbox {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        let credential = request.metadata().get("authorization");
        let credential =
            credential.and_then(|value| value.to_str().ok()).unwrap_or_default().to_owned();
        for group in request.into_inner().resource_spans {
            let attributes = group.resource.unwrap_or_default().attributes;
            let service = text(&attributes, "service.name").unwrap_or_default();
            let spans = group.scope_spans.into_iter().flat_map(|scope| scope.spans);
            let (service, credential) = (&service, &credential);
            let spans = spans.map(|span| CollectedSpan {
                service: service.clone(),
                span,
                credential: credential.clone(),
            });
            let spans: Vec<_> = spans.collect();
            self.0.send_modify(|kept| kept.extend(spans));
        }
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

impl TraceCollector {
    /// On a port of its own.
    pub async fn start() -> TraceCollector {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("a bound port");
        let (sender, spans) = watch::channel(Vec::new());
        let service = TraceServiceServer::new(Inbox(Arc::new(sender)));
        let mut serving = JoinSet::new();
        serving.spawn(async move {
            let incoming = TcpIncoming::from(listener);
            let done = Server::builder().add_service(service).serve_with_incoming(incoming).await;
            done.expect("the collector serves");
        });
        TraceCollector { address, spans, _serving: serving }
    }

    /// As a setting.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// What has arrived until now.
    pub fn spans(&self) -> Vec<CollectedSpan> {
        self.spans.borrow().clone()
    }

    /// All that has arrived, once one that is wanted has.
    pub async fn wait_for(
        &self,
        what: &str,
        wanted: impl Fn(&CollectedSpan) -> bool,
    ) -> CollectedSpan {
        let mut spans = self.spans.clone();
        let arrived = within(what, spans.wait_for(|spans| spans.iter().any(&wanted))).await;
        let arrived = arrived.expect("the collector serves");
        arrived.iter().find(|one| wanted(one)).expect("it arrived").clone()
    }
}

impl CollectedSpan {
    /// An attribute as text.
    pub fn text(&self, name: &str) -> Option<String> {
        text(&self.span.attributes, name)
    }

    /// The id of its trace, as it is written.
    pub fn trace_id(&self) -> String {
        hex(&self.span.trace_id)
    }

    /// The id of the span itself.
    pub fn span_id(&self) -> String {
        hex(&self.span.span_id)
    }

    /// Whether it was made under another.
    pub fn is_under(&self, parent: &CollectedSpan) -> bool {
        self.span.parent_span_id == parent.span.span_id
            && self.span.trace_id == parent.span.trace_id
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

fn text(attributes: &[KeyValue], name: &str) -> Option<String> {
    let found = attributes.iter().find(|one| one.key == name)?;
    Some(shown(found.value.as_ref()?))
}

fn shown(value: &AnyValue) -> String {
    match &value.value {
        Some(Value::StringValue(text)) => text.clone(),
        Some(Value::IntValue(number)) => number.to_string(),
        Some(Value::DoubleValue(number)) => number.to_string(),
        Some(Value::BoolValue(flag)) => flag.to_string(),
        Some(Value::ArrayValue(list)) => {
            list.values.iter().map(shown).collect::<Vec<_>>().join(",")
        }
        other => format!("{other:?}"),
    }
}

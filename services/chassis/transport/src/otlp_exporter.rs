//! From spans that have ended to a collector. A collector that is away costs spans and nothing else:
//! the queue is bounded, what does not fit is dropped and counted, and no call waits for it.
//! The SDK's batch processor would keep its count of what it dropped to itself until it ends, and block a
//! thread of its own on each batch, which a collector that hangs would have our end wait for.

use std::fmt::{self, Debug, Formatter};
use std::sync::Arc;
use std::time::Duration;

use hapa_core::config::Wrong;
use hapa_core::rpc_error::code_name;
use hapa_telemetry::config::TraceConfig;
use opentelemetry::trace::TracerProvider as _;
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_client::TraceServiceClient;
use opentelemetry_proto::transform::common::tonic::ResourceAttributesWithSchema;
use opentelemetry_proto::transform::trace::tonic::group_spans_by_resource_and_scope;
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::trace::{
    Sampler, SdkTracer, SdkTracerProvider, Span, SpanData, SpanProcessor,
};
use secrecy::{ExposeSecret as _, SecretString};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;
use tonic::Request;
use tonic::metadata::{Ascii, MetadataKey, MetadataMap, MetadataValue};

use crate::balancer::Balanced;
use crate::connect::Secure;
use crate::tls::believing;

/// Spans that wait, those of a few hundred calls.
const WAITING: usize = 4_096;
const TOGETHER: usize = 512;
/// Between two batches.
const GATHERING: Duration = Duration::from_secs(1);
/// How long one of its addresses may take to connect.
const CONNECTING: Duration = Duration::from_secs(1);
/// How long a collector may take for one.
const PATIENCE: Duration = Duration::from_secs(5);
/// The same when the process ends: for one that is on its way, and then for all that is left.
const LAST: Duration = Duration::from_millis(800);
const DROPPED: &str = "hapa_spans_dropped_total";

/// What takes spans to the collector, for a server to run.
pub struct Exporter {
    waiting: mpsc::Receiver<SpanData>,
    client: TraceServiceClient<Balanced>,
    headers: MetadataMap,
    service_name: Option<String>,
    /// Every tracer's; dropping it would end them.
    provider: SdkTracerProvider,
}

/// By the settings, what spans are made with and what takes them to the collector: none where nobody
/// collects.
pub fn collect(config: &TraceConfig) -> Result<Option<(SdkTracer, Exporter)>, Wrong> {
    let endpoint = config.otel_exporter_otlp_endpoint.as_deref();
    let Some(endpoint) = endpoint.filter(|endpoint| !endpoint.is_empty()) else {
        return Ok(None);
    };
    let client = TraceServiceClient::new(channel(endpoint, config)?);
    let headers = headers(config.otel_exporter_otlp_headers.as_ref())?;
    let (queue, waiting) = mpsc::channel(WAITING);
    let ratio = Sampler::TraceIdRatioBased(config.otel_traces_sampler_arg);
    let provider = SdkTracerProvider::builder()
        .with_span_processor(Queue(queue))
        .with_sampler(Sampler::ParentBased(Box::new(ratio)))
        .build();
    let tracer = provider.tracer("hapa");
    let service_name = config.otel_service_name.clone().filter(|name| !name.is_empty());
    Ok(Some((tracer, Exporter { waiting, client, headers, service_name, provider })))
}

impl Debug for Exporter {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.debug_struct("Exporter").finish_non_exhaustive()
    }
}

impl Exporter {
    /// Sends what has ended until the server ends, and then what is left, for a moment. Without a name
    /// of its own the process is called by its roles.
    pub async fn run(mut self, roles: Vec<&'static str>, end: CancellationToken) {
        let name = self.service_name.take().unwrap_or_else(|| service_name(&roles));
        // With what OTEL_RESOURCE_ATTRIBUTES says.
        let resource = Resource::builder()
            .with_service_name(name)
            .with_attribute(opentelemetry::KeyValue::new(
                "service.version",
                env!("CARGO_PKG_VERSION"),
            ))
            .build();
        let resource = ResourceAttributesWithSchema::from(&resource);
        let mut batch = Vec::with_capacity(TOGETHER);
        loop {
            tokio::select! {
                biased;
                () = end.cancelled() => break,
                _ = self.waiting.recv_many(&mut batch, TOGETHER) => {}
            }
            // When the server ends, a collector that hangs is not waited for much longer.
            let late = async {
                end.cancelled().await;
                sleep(LAST).await;
            };
            self.send(&mut batch, &resource, (PATIENCE, late)).await;
            if self.waiting.len() < TOGETHER {
                let _ = timeout(GATHERING, end.cancelled()).await;
            }
        }
        let until = Instant::now() + LAST;
        while let Ok(span) = self.waiting.try_recv() {
            batch.push(span);
            while batch.len() < TOGETHER
                && let Ok(span) = self.waiting.try_recv()
            {
                batch.push(span);
            }
            let left = until.saturating_duration_since(Instant::now());
            self.send(&mut batch, &resource, (left, std::future::pending())).await;
        }
        drop(self.provider);
    }

    /// Removes and returns the ended spans that wait to be sent.
    pub fn ended(&mut self) -> Vec<SpanData> {
        std::iter::from_fn(|| self.waiting.try_recv().ok()).collect()
    }

    async fn send(
        &mut self,
        batch: &mut Vec<SpanData>,
        resource: &ResourceAttributesWithSchema,
        (patience, late): (Duration, impl Future<Output = ()>),
    ) {
        let count = batch.len() as u64;
        let resource_spans = group_spans_by_resource_and_scope(std::mem::take(batch), resource);
        let mut request = Request::new(ExportTraceServiceRequest { resource_spans });
        *request.metadata_mut() = self.headers.clone();
        let reply = tokio::select! {
            reply = timeout(patience, self.client.export(request)) => reply.ok(),
            () = late => None,
        };
        let (lost, why) = match reply {
            Some(Ok(reply)) => {
                // A collector may quote what it refuses: its words are not kept.
                let refused = reply.into_inner().partial_success.unwrap_or_default();
                (refused.rejected_spans.unsigned_abs(), "it refused some")
            }
            Some(Err(status)) => (count, code_name(status.code())),
            None => (count, "no answer"),
        };
        if lost > 0 {
            metrics::counter!(DROPPED, "reason" => "collector").increment(lost);
            tracing::debug!(lost, why, "the collector did not take spans");
        }
    }
}

/// Where spans wait when they have ended.
#[derive(Debug)]
struct Queue(mpsc::Sender<SpanData>);

impl SpanProcessor for Queue {
    fn on_start(&self, _: &mut Span, _: &opentelemetry::Context) {}

    fn on_end(&self, mut span: SpanData) {
        // What is for log lines has names without a namespace, and is there under ours.
        span.attributes.retain(|attribute| attribute.key.as_str().contains('.'));
        if span.span_context.is_sampled() && self.0.try_send(span).is_err() {
            metrics::counter!(DROPPED, "reason" => "queue").increment(1);
        }
    }

    fn force_flush(&self) -> OTelSdkResult {
        Ok(())
    }

    fn shutdown_with_timeout(&self, _: Duration) -> OTelSdkResult {
        Ok(())
    }
}

fn service_name(roles: &[&str]) -> String {
    // Every process has this one beside its own.
    let mut roles = roles.iter().filter(|role| **role != "system");
    match (roles.next(), roles.next()) {
        (Some(role), None) => format!("hapa-{role}"),
        _ => "hapa".to_owned(),
    }
}

fn channel(address: &str, config: &TraceConfig) -> Result<Balanced, Wrong> {
    let wrong = |name| move |error: anyhow::Error| Wrong::new(name, format!("{error:#}"));
    let authority = config.otel_exporter_otlp_certificate.as_ref();
    let secure = if address.starts_with("https:") {
        let authority = authority.filter(|file| !file.as_os_str().is_empty());
        let believed = believing(authority).map_err(wrong("OTEL_EXPORTER_OTLP_CERTIFICATE"))?;
        Secure::Believing(Arc::new(believed))
    } else {
        Secure::No
    };
    let channel = Balanced::new(address, secure, CONNECTING);
    channel.map_err(wrong("OTEL_EXPORTER_OTLP_ENDPOINT"))
}

/// `name=value,name=value`, values percent-encoded where they must be:
/// <https://opentelemetry.io/docs/specs/otel/protocol/exporter/>
fn headers(set: Option<&SecretString>) -> Result<MetadataMap, Wrong> {
    let mut headers = MetadataMap::new();
    let text = set.map(SecretString::expose_secret).unwrap_or_default();
    for pair in text.split(',').filter(|pair| !pair.trim().is_empty()) {
        // The text is a secret: it is not in the words.
        let problem = || Wrong::new("OTEL_EXPORTER_OTLP_HEADERS", "must be name=value,name=value");
        let (name, value) = pair.split_once('=').ok_or_else(problem)?;
        let name = MetadataKey::<Ascii>::from_bytes(name.trim().to_lowercase().as_bytes());
        let mut value: MetadataValue<Ascii> =
            decoded(value.trim()).and_then(|value| value.parse().ok()).ok_or_else(problem)?;
        value.set_sensitive(true);
        headers.insert(name.map_err(|_| problem())?, value);
    }
    Ok(headers)
}

fn decoded(text: &str) -> Option<String> {
    let mut parts = text.split('%');
    let mut bytes = parts.next()?.as_bytes().to_vec();
    for part in parts {
        let (code, rest) = part.split_at_checked(2)?;
        bytes.push(u8::from_str_radix(code, 16).ok()?);
        bytes.extend_from_slice(rest.as_bytes());
    }
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    use opentelemetry::trace::Tracer as _;

    use super::*;

    #[test]
    fn headers_are_read_as_the_specification_has_them_and_never_shown() {
        let read = headers(Some(&"Authorization=Bearer%20abc, x-team = a=b ,".into())).unwrap();
        assert_eq!(read.get("authorization").unwrap().to_str().unwrap(), "Bearer abc");
        assert_eq!(read.get("x-team").unwrap().to_str().unwrap(), "a=b");
        assert!(!format!("{read:?}").contains("abc"));
        for wrong in ["secret-text", "a b=c", "a=%zz", "a=%4"] {
            let error = headers(Some(&wrong.into())).unwrap_err().to_string();
            assert!(error.contains("OTEL_EXPORTER_OTLP_HEADERS"), "{error}");
            assert!(!error.contains(wrong), "{error}");
        }
    }

    #[test]
    fn a_process_is_called_by_its_role_where_it_has_one() {
        assert_eq!(service_name(&["auth", "system"]), "hapa-auth");
        assert_eq!(service_name(&["auth", "codegen", "system"]), "hapa");
    }

    #[tokio::test]
    async fn a_queue_that_is_full_drops_and_a_call_does_not_wait() {
        let config = TraceConfig {
            otel_exporter_otlp_endpoint: Some("http://127.0.0.1:9".to_owned()),
            otel_exporter_otlp_certificate: None,
            otel_exporter_otlp_headers: None,
            otel_service_name: None,
            otel_traces_sampler_arg: 1.0,
        };
        let (tracer, exporter) = collect(&config).unwrap().unwrap();
        for _ in 0..WAITING + 10 {
            drop(tracer.start("one"));
        }
        assert_eq!(exporter.waiting.len(), WAITING);
    }
}

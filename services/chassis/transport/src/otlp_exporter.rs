//! Exports ended spans to a collector with OTLP. The queue is bounded. If the collector is unavailable, spans are dropped
//! and counted, and no call waits.
//!
//! The SDK's batch processor does not serve. It reports the number of dropped spans only at its end. It also blocks a
//! thread on each batch, so a collector that hangs would delay the end of the process.

use std::fmt::{self, Debug, Formatter};
use std::sync::Arc;
use std::time::Duration;

use hapa_core::config::ConfigError;
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

use crate::balancer::BalancedChannel;
use crate::connect::TransportSecurity;
use crate::tls::trust_roots;

/// Maximum number of queued spans: those of a few hundred calls.
const QUEUE_CAPACITY: usize = 4_096;
const BATCH_SIZE: usize = 512;
/// Time between two batches that are not full.
const BATCH_INTERVAL: Duration = Duration::from_secs(1);
/// Maximum duration of one attempt to connect to an address of the collector.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// Maximum duration of one export.
const EXPORT_TIMEOUT: Duration = Duration::from_secs(5);
/// Maximum duration, on shutdown, of the export in progress, and then of all remaining exports together.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_millis(800);
const DROPPED: &str = "hapa_spans_dropped_total";

/// Exports spans to the collector; a background task of the server.
pub struct SpanExporter {
    queue: mpsc::Receiver<SpanData>,
    client: TraceServiceClient<BalancedChannel>,
    headers: MetadataMap,
    service_name: Option<String>,
    /// Dropping the provider would end all tracers.
    provider: SdkTracerProvider,
}

/// The tracer and the exporter by the settings; `None` without a collector.
pub fn tracer_and_exporter(
    config: &TraceConfig,
) -> Result<Option<(SdkTracer, SpanExporter)>, ConfigError> {
    let endpoint = config.otel_exporter_otlp_endpoint.as_deref();
    let Some(endpoint) = endpoint.filter(|endpoint| !endpoint.is_empty()) else {
        return Ok(None);
    };
    let client = TraceServiceClient::new(channel(endpoint, config)?);
    let headers = headers(config.otel_exporter_otlp_headers.as_ref())?;
    let (sender, queue) = mpsc::channel(QUEUE_CAPACITY);
    let ratio = Sampler::TraceIdRatioBased(config.otel_traces_sampler_arg);
    let provider = SdkTracerProvider::builder()
        .with_span_processor(SpanQueue(sender))
        .with_sampler(Sampler::ParentBased(Box::new(ratio)))
        .build();
    let tracer = provider.tracer("hapa");
    let service_name = config.otel_service_name.clone().filter(|name| !name.is_empty());
    Ok(Some((tracer, SpanExporter { queue, client, headers, service_name, provider })))
}

impl Debug for SpanExporter {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.debug_struct("Exporter").finish_non_exhaustive()
    }
}

impl SpanExporter {
    /// Exports spans until `end` fires, and then the remaining ones for up to 800 ms. Without a configured service name
    /// the name is derived from the roles.
    pub async fn run(mut self, roles: Vec<&'static str>, end: CancellationToken) {
        let name = self.service_name.take().unwrap_or_else(|| service_name(&roles));
        // The builder adds the attributes in OTEL_RESOURCE_ATTRIBUTES.
        let resource = Resource::builder()
            .with_service_name(name)
            .with_attribute(opentelemetry::KeyValue::new(
                "service.version",
                env!("CARGO_PKG_VERSION"),
            ))
            .build();
        let resource = ResourceAttributesWithSchema::from(&resource);
        let mut batch = Vec::with_capacity(BATCH_SIZE);
        loop {
            tokio::select! {
                biased;
                () = end.cancelled() => break,
                _ = self.queue.recv_many(&mut batch, BATCH_SIZE) => {}
            }
            // On shutdown a collector that hangs must not delay the process much longer.
            let cancelled = async {
                end.cancelled().await;
                sleep(SHUTDOWN_TIMEOUT).await;
            };
            self.send(&mut batch, &resource, (EXPORT_TIMEOUT, cancelled)).await;
            if self.queue.len() < BATCH_SIZE {
                let _ = timeout(BATCH_INTERVAL, end.cancelled()).await;
            }
        }
        let until = Instant::now() + SHUTDOWN_TIMEOUT;
        while let Ok(span) = self.queue.try_recv() {
            batch.push(span);
            while batch.len() < BATCH_SIZE
                && let Ok(span) = self.queue.try_recv()
            {
                batch.push(span);
            }
            let left = until.saturating_duration_since(Instant::now());
            self.send(&mut batch, &resource, (left, std::future::pending())).await;
        }
        drop(self.provider);
    }

    /// Removes and returns the queued spans.
    pub fn ended(&mut self) -> Vec<SpanData> {
        std::iter::from_fn(|| self.queue.try_recv().ok()).collect()
    }

    async fn send(
        &mut self,
        batch: &mut Vec<SpanData>,
        resource: &ResourceAttributesWithSchema,
        (limit, cancelled): (Duration, impl Future<Output = ()>),
    ) {
        let count = batch.len() as u64;
        let resource_spans = group_spans_by_resource_and_scope(std::mem::take(batch), resource);
        let mut request = Request::new(ExportTraceServiceRequest { resource_spans });
        *request.metadata_mut() = self.headers.clone();
        let reply = tokio::select! {
            reply = timeout(limit, self.client.export(request)) => reply.ok(),
            () = cancelled => None,
        };
        let (dropped, reason) = match reply {
            Some(Ok(reply)) => {
                // The message is not logged: a collector may quote what it rejects.
                let rejected = reply.into_inner().partial_success.unwrap_or_default();
                (rejected.rejected_spans.unsigned_abs(), "rejected by the collector")
            }
            Some(Err(status)) => (count, code_name(status.code())),
            None => (count, "no reply"),
        };
        if dropped > 0 {
            metrics::counter!(DROPPED, "reason" => "collector").increment(dropped);
            tracing::debug!(dropped, reason, "spans were not exported");
        }
    }
}

/// The queue of ended spans.
#[derive(Debug)]
struct SpanQueue(mpsc::Sender<SpanData>);

impl SpanProcessor for SpanQueue {
    fn on_start(&self, _: &mut Span, _: &opentelemetry::Context) {}

    fn on_end(&self, mut span: SpanData) {
        // Fields of log lines have names without a namespace; the span has the same values under namespaced names.
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
    // Every process has the system role in addition to its own.
    let mut roles = roles.iter().filter(|role| **role != "system");
    match (roles.next(), roles.next()) {
        (Some(role), None) => format!("hapa-{role}"),
        _ => "hapa".to_owned(),
    }
}

fn channel(address: &str, config: &TraceConfig) -> Result<BalancedChannel, ConfigError> {
    let invalid = |name| move |error: anyhow::Error| ConfigError::new(name, format!("{error:#}"));
    let authority = config.otel_exporter_otlp_certificate.as_ref();
    let secure = if address.starts_with("https:") {
        let authority = authority.filter(|file| !file.as_os_str().is_empty());
        let config = trust_roots(authority).map_err(invalid("OTEL_EXPORTER_OTLP_CERTIFICATE"))?;
        TransportSecurity::ServerTls(Arc::new(config))
    } else {
        TransportSecurity::Plaintext
    };
    let channel = BalancedChannel::new(address, secure, CONNECT_TIMEOUT);
    channel.map_err(invalid("OTEL_EXPORTER_OTLP_ENDPOINT"))
}

/// Parses `name=value,name=value` with percent-encoded values:
/// <https://opentelemetry.io/docs/specs/otel/protocol/exporter/>
fn headers(set: Option<&SecretString>) -> Result<MetadataMap, ConfigError> {
    let mut headers = MetadataMap::new();
    let text = set.map(SecretString::expose_secret).unwrap_or_default();
    for pair in text.split(',').filter(|pair| !pair.trim().is_empty()) {
        // The text is a secret, so the problem does not quote it.
        let problem =
            || ConfigError::new("OTEL_EXPORTER_OTLP_HEADERS", "must be name=value,name=value");
        let (name, value) = pair.split_once('=').ok_or_else(problem)?;
        let name = MetadataKey::<Ascii>::from_bytes(name.trim().to_lowercase().as_bytes());
        let mut value: MetadataValue<Ascii> = percent_decode(value.trim())
            .and_then(|value| value.parse().ok())
            .ok_or_else(problem)?;
        value.set_sensitive(true);
        headers.insert(name.map_err(|_| problem())?, value);
    }
    Ok(headers)
}

fn percent_decode(text: &str) -> Option<String> {
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
    fn headers_are_parsed_by_the_specification_and_never_printed() {
        let read = headers(Some(&"Authorization=Bearer%20abc, x-team = a=b ,".into())).unwrap();
        assert_eq!(read.get("authorization").unwrap().to_str().unwrap(), "Bearer abc");
        assert_eq!(read.get("x-team").unwrap().to_str().unwrap(), "a=b");
        assert!(!format!("{read:?}").contains("abc"));
        for invalid in ["secret-text", "a b=c", "a=%zz", "a=%4"] {
            let error = headers(Some(&invalid.into())).unwrap_err().to_string();
            assert!(error.contains("OTEL_EXPORTER_OTLP_HEADERS"), "{error}");
            assert!(!error.contains(invalid), "{error}");
        }
    }

    #[test]
    fn the_service_name_of_a_process_with_one_role_contains_the_role() {
        assert_eq!(service_name(&["auth", "system"]), "hapa-auth");
        assert_eq!(service_name(&["auth", "codegen", "system"]), "hapa");
    }

    #[tokio::test]
    async fn a_full_queue_drops_spans_without_blocking() {
        let config = TraceConfig {
            otel_exporter_otlp_endpoint: Some("http://127.0.0.1:9".to_owned()),
            otel_exporter_otlp_certificate: None,
            otel_exporter_otlp_headers: None,
            otel_service_name: None,
            otel_traces_sampler_arg: 1.0,
        };
        let (tracer, exporter) = tracer_and_exporter(&config).unwrap().unwrap();
        for _ in 0..QUEUE_CAPACITY + 10 {
            drop(tracer.start("one"));
        }
        assert_eq!(exporter.queue.len(), QUEUE_CAPACITY);
    }
}

//! Connections between services: TLS, load balancing, authentication, and the exporter of spans.

pub mod balancer;
pub mod connect;
pub mod otlp_exporter;
pub mod peer;
pub mod tls;
pub mod tracing_channel;

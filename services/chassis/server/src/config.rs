//! The settings that all roles share. Each field is a flag and an environment variable. An invalid setting is refused by
//! its name before anything starts.

use std::net::{IpAddr, SocketAddr};
use std::num::NonZero;
use std::thread;
use std::time::Duration;

use clap::{ArgAction, Args};
use hapa_core::config::{
    CommonConfig, ConfigError, Environment, bytes, listen_address, seconds, seconds_or_none,
};
use hapa_core::secret;
use hapa_store::database::Engine;
use hapa_store::redis::check_redis_url;
use hapa_telemetry::config::{LogConfig, TraceConfig};
use hapa_transport::tls::{self, TlsConfig};
use ipnet::IpNet;
use secrecy::SecretString;
use tokio::sync::Semaphore;

use crate::outbox::OutboxConfig;
use crate::rate_limit::LimitConfig;

/// Settings of the server.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Server")]
#[group(id = "server")]
pub struct Config {
    /// Address to listen on.
    #[arg(long, env = "HOST", default_value = "127.0.0.1", value_parser = listen_address)]
    pub host: IpAddr,
    /// gRPC port of the mesh; 0 picks a free one.
    #[arg(long, env = "PORT", default_value_t = 50051)]
    pub port: u16,
    /// HTTP port of /metrics, /livez and /readyz; 0 picks a free one.
    #[arg(long, env = "METRICS_PORT", default_value_t = 9464)]
    pub metrics_port: u16,
    /// Settings that services use too.
    #[command(flatten)]
    pub common: CommonConfig,
    /// Secret that the services of one mesh share, at least 32 characters. If it is not set, the server generates one and
    /// keeps it in DATA_DIR/mesh-token.
    #[arg(long, env = "MESH_TOKEN", hide_env_values = true)]
    pub mesh_token: Option<SecretString>,
    /// The previous MESH_TOKEN during a rotation. It is accepted from callers but never sent.
    #[arg(long, alias = "mesh-token-also", env = "MESH_TOKEN_PREVIOUS", hide_env_values = true)]
    pub mesh_token_previous: Option<SecretString>,
    /// Certificates by which services authenticate to each other.
    #[command(flatten)]
    pub tls: TlsConfig,
    /// Addresses of the auth service, comma-separated, such as http://auth:50051. A process with the auth role uses itself
    /// by default.
    #[arg(long, env = "AUTH_ADDRESS")]
    pub auth_address: Option<String>,
    /// Addresses of the errors service, comma-separated, such as http://errors:50051. A process with the errors role uses
    /// itself by default. Without errors service failures are only logged.
    #[arg(long, env = "ERRORS_ADDRESS")]
    pub errors_address: Option<String>,
    /// Addresses of the analytics service, comma-separated, such as http://analytics:50051. A process with the analytics
    /// role uses itself by default. Without analytics service no usage is recorded.
    #[arg(long, env = "ANALYTICS_ADDRESS")]
    pub analytics_address: Option<String>,
    /// Whether the server supports gRPC reflection. Default: true, but false if ENVIRONMENT is production.
    #[arg(long, env = "REFLECTION", action = ArgAction::Set, value_parser = hapa_core::config::boolean)]
    pub reflection: Option<bool>,
    /// Number of threads that serve connections. Default: one for each processor.
    #[arg(long, env = "MAX_WORKERS", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub max_workers: Option<u16>,
    /// Maximum duration of a call, in seconds. A longer deadline of the client is shortened to it.
    #[arg(long, env = "REQUEST_TIMEOUT", default_value = "300", value_parser = seconds)]
    pub request_timeout: Duration,
    /// Maximum number of calls in progress; further calls are refused with E5005.
    #[arg(long, env = "MAX_IN_FLIGHT", default_value_t = 2048, value_parser = clap::value_parser!(u32).range(1..))]
    pub max_in_flight: u32,
    /// Maximum number of calls in progress that need no credential, in each of three pools: health checks, streams of
    /// health and reflection, logins. One network may hold a quarter of a pool. Further calls are refused with E5005.
    #[arg(long, env = "MAX_PUBLIC_CALLS", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..))]
    pub max_public_calls: u32,
    /// Maximum size of all request messages that are being received: 64MB, 500KB, 1GB, or a number of bytes; from 1MB to
    /// 1024GB. Further requests are refused with E5005.
    #[arg(long, env = "MAX_REQUEST_MEMORY", default_value = "64MB", value_parser = request_memory)]
    pub max_request_memory: u64,
    /// Maximum number of connections; further ones wait to be accepted. If RLIMIT_NOFILE is too low, the server accepts
    /// fewer and logs a warning.
    #[arg(long, env = "MAX_CONNECTIONS", default_value_t = 8192, value_parser = clap::value_parser!(u32).range(1..))]
    pub max_connections: u32,
    /// Maximum number of connections from one address (IPv6: one /64) that is not in TRUSTED_PROXIES. Further ones are
    /// closed at once. 0: no limit.
    #[arg(long, env = "MAX_CONNECTIONS_PER_ADDRESS", default_value_t = 512)]
    pub max_connections_per_address: u32,
    /// How long a client may leave a response or stream unread before it is closed with E4014, in seconds.
    #[arg(long, env = "READER_TIMEOUT_SECONDS", default_value = "30", value_parser = seconds)]
    pub reader_timeout_seconds: Duration,
    /// Maximum age of a connection, in seconds, varied by up to a tenth, so that clients reconnect to new replicas and
    /// with new certificates. The connection closes when its calls have ended, and at the latest after a further
    /// REQUEST_TIMEOUT. 0: no maximum.
    #[arg(long, env = "MAX_CONNECTION_AGE_SECONDS", default_value = "1800", value_parser = seconds_or_none)]
    pub max_connection_age_seconds: Duration,
    /// Delay between reporting NOT_SERVING and closing the listener, in seconds. It gives load balancers time to remove the
    /// instance.
    #[arg(long, env = "DRAIN_DELAY_SECONDS", default_value = "0", value_parser = seconds_or_none)]
    pub drain_delay_seconds: Duration,
    /// Maximum time that open calls may go on after the listener is closed, in seconds.
    #[arg(long, env = "DRAIN_TIMEOUT_SECONDS", default_value = "25", value_parser = seconds)]
    pub drain_timeout_seconds: Duration,
    /// Networks of proxies with a trusted x-forwarded-for header, comma-separated: those of the gateway.
    #[arg(
        long,
        env = "TRUSTED_PROXIES",
        value_delimiter = ',',
        default_value = "127.0.0.0/8,::1/128"
    )]
    pub trusted_proxies: Vec<IpNet>,
    /// Rate limits.
    #[command(flatten)]
    pub limits: LimitConfig,
    /// The outbox of events.
    #[command(flatten)]
    pub outbox: OutboxConfig,
    /// Logging.
    #[command(flatten)]
    pub log: LogConfig,
    /// Tracing.
    #[command(flatten)]
    pub trace: TraceConfig,
}

impl Config {
    /// The address of the gRPC port.
    pub fn address(&self) -> SocketAddr {
        (self.host, self.port).into()
    }

    /// The address of the port of probes and metrics.
    pub fn metrics_address(&self) -> SocketAddr {
        (self.host, self.metrics_port).into()
    }

    /// Checks settings that depend on each other. The error names each problem.
    pub fn check(&self) -> Result<(), ConfigError> {
        ConfigError::all(self.problems())
    }

    /// The problems of settings that depend on each other.
    pub fn problems(&self) -> Vec<ConfigError> {
        let strength = self.common.secret_strength();
        let previous = self.mesh_token_previous.as_ref();
        let previous = secret::validate_configured("MESH_TOKEN_PREVIOUS", previous, strength);
        let addresses = [
            ("AUTH_ADDRESS", &self.auth_address),
            ("ERRORS_ADDRESS", &self.errors_address),
            ("ANALYTICS_ADDRESS", &self.analytics_address),
        ];
        let store = Engine::from_url(&self.common.store_url(""));
        let checks = [
            self.check_credentials(),
            previous.map(drop),
            tls::check_schemes(&self.tls, &addresses),
            store.map(drop).map_err(|problem| ConfigError::new("DATABASE_URL", problem)),
            self.common.redis_url().map_or(Ok(()), check_redis_url),
        ];
        checks.into_iter().filter_map(Result::err).collect()
    }

    fn check_credentials(&self) -> Result<(), ConfigError> {
        let strength = self.common.secret_strength();
        let token = secret::validate_configured("MESH_TOKEN", self.mesh_token.as_ref(), strength)?;
        let certificates = self.tls.files()?.is_some();
        if !certificates && token.is_none() && self.common.environment == Environment::Production {
            let problem = "must be set when ENVIRONMENT is production";
            return Err(ConfigError::new("MESH_TOKEN", problem));
        }
        Ok(())
    }

    /// MAX_REQUEST_MEMORY as the size of a semaphore.
    pub(crate) fn max_request_memory(&self) -> usize {
        usize::try_from(self.max_request_memory).unwrap_or(Semaphore::MAX_PERMITS)
    }

    /// MAX_WORKERS, or the number of processors.
    pub(crate) fn worker_count(&self) -> usize {
        let processors = || thread::available_parallelism().map_or(1, NonZero::get);
        self.max_workers.map_or_else(processors, usize::from)
    }

    /// Whether the server supports reflection.
    pub fn reflects(&self) -> bool {
        self.reflection.unwrap_or(self.common.environment != Environment::Production)
    }
}

/// Parses a size of at least the largest message and at most what a semaphore can count.
fn request_memory(text: &str) -> Result<u64, String> {
    let is_allowed = |size: &u64| (1 << 20..=1 << 40).contains(size);
    bytes(text).ok().filter(is_allowed).ok_or_else(|| "must be from 1MB to 1024GB".to_owned())
}

//! The settings that every role shares. The struct is the flag is the environment variable; what is
//! wrong is refused before anything starts, by its name.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use clap::{ArgAction, Args};
use hapa_core::config::{CommonConfig, Environment, Wrong, bytes, seconds, seconds_or_none};
use hapa_core::secret;
use hapa_store::database::Engine;
use hapa_store::rate_limit::LimitConfig;
use hapa_store::redis::check_redis_url;
use hapa_telemetry::config::{LogConfig, TraceConfig};
use hapa_transport::tls::{self, TlsConfig};
use ipnet::IpNet;
use secrecy::SecretString;
use tokio::sync::Semaphore;

use crate::outbox::SpoolConfig;

/// Settings of the server.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Server")]
#[group(id = "server")]
pub struct Config {
    /// Address to listen on.
    #[arg(long, env = "HOST", default_value = "127.0.0.1")]
    pub host: IpAddr,
    /// gRPC port of the mesh; 0 picks a free one.
    #[arg(long, env = "PORT", default_value_t = 50051)]
    pub port: u16,
    /// HTTP port of /metrics, /livez and /readyz; 0 picks a free one.
    #[arg(long, env = "METRICS_PORT", default_value_t = 9464)]
    pub metrics_port: u16,
    /// Settings that services read too.
    #[command(flatten)]
    pub common: CommonConfig,
    /// Secret that services of one mesh share, 32 characters or more; without one it is made and
    /// kept in DATA_DIR/mesh-token.
    #[arg(long, env = "MESH_TOKEN", hide_env_values = true)]
    pub mesh_token: Option<SecretString>,
    /// Another such secret, which is accepted and never sent, while MESH_TOKEN is being replaced.
    #[arg(long, env = "MESH_TOKEN_ALSO", hide_env_values = true)]
    pub mesh_token_also: Option<SecretString>,
    /// Certificates that prove who is a service.
    #[command(flatten)]
    pub tls: TlsConfig,
    /// The auth service, such as http://auth:50051, several with commas between; a process that has the auth role asks itself.
    #[arg(long, env = "AUTH_ADDRESS")]
    pub auth_address: Option<String>,
    /// The errors service, such as http://errors:50051; a process that has the errors role tells
    /// itself, and without one failures are logged only.
    #[arg(long, env = "ERRORS_ADDRESS")]
    pub errors_address: Option<String>,
    /// The analytics service, such as http://analytics:50051; a process that has the analytics role
    /// tells itself, and without one nothing is recorded.
    #[arg(long, env = "ANALYTICS_ADDRESS")]
    pub analytics_address: Option<String>,
    /// Server reflection; on unless ENVIRONMENT is production.
    #[arg(long, env = "REFLECTION", action = ArgAction::Set)]
    pub reflection: Option<bool>,
    /// Longest that a call may take, in seconds, whatever its caller allows.
    #[arg(long, env = "REQUEST_TIMEOUT", default_value = "300", value_parser = seconds)]
    pub request_timeout: Duration,
    /// Most calls in progress at once; more are refused with E5005.
    #[arg(long, env = "MAX_IN_FLIGHT", default_value_t = 2048, value_parser = clap::value_parser!(u32).range(1..))]
    pub max_in_flight: u32,
    /// Maximum number of calls in progress that need no credential, in each of three pools: health checks,
    /// streams of health and reflection, logins. One network may hold a quarter of a pool; more are
    /// refused with E5005.
    #[arg(long, env = "MAX_PUBLIC_CALLS", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..))]
    pub max_public_calls: u32,
    /// Maximum size of all request messages that are arriving at once: 64MB, 500KB, 1GB, or a number of bytes;
    /// 1MB or more. Requests beyond are refused with E5005.
    #[arg(long, env = "MAX_REQUEST_MEMORY", default_value = "64MB", value_parser = request_memory)]
    pub max_request_memory: u64,
    /// Maximum number of connections; more wait to be accepted. Fewer where RLIMIT_NOFILE leaves no room for
    /// them, which is said at the start.
    #[arg(long, env = "MAX_CONNECTIONS", default_value_t = 8192, value_parser = clap::value_parser!(u32).range(1..))]
    pub max_connections: u32,
    /// Maximum number of connections from one address (IPv6: one /64) that is not in TRUSTED_PROXIES; more are
    /// closed at once. 0: no bound.
    #[arg(long, env = "MAX_CONNECTIONS_PER_ADDRESS", default_value_t = 512)]
    pub max_connections_per_address: u32,
    /// How long a client may leave a reply or stream unread before it loses it (E4011), in seconds.
    #[arg(long, env = "READER_TIMEOUT_SECONDS", default_value = "30", value_parser = seconds)]
    pub reader_timeout_seconds: Duration,
    /// When a connection is asked to go, in seconds, give or take a tenth, so that callers come anew: to
    /// new certificates, and to new replicas. It ends when its calls have, and REQUEST_TIMEOUT later
    /// at the latest; 0: never.
    #[arg(long, env = "MAX_CONNECTION_AGE_SECONDS", default_value = "1800", value_parser = seconds_or_none)]
    pub max_connection_age_seconds: Duration,
    /// Between "not serving" and the closed door, in seconds, so that load balancers notice.
    #[arg(long, env = "DRAIN_DELAY_SECONDS", default_value = "0", value_parser = seconds_or_none)]
    pub drain_delay_seconds: Duration,
    /// Longest that open calls may go on after the door closed, in seconds.
    #[arg(long, env = "DRAIN_TIMEOUT_SECONDS", default_value = "25", value_parser = seconds)]
    pub drain_timeout_seconds: Duration,
    /// Networks whose x-forwarded-for is believed: the gateway's. Comma-separated.
    #[arg(
        long,
        env = "TRUSTED_PROXIES",
        value_delimiter = ',',
        default_value = "127.0.0.0/8,::1/128"
    )]
    pub trusted_proxies: Vec<IpNet>,
    /// How often a key may call.
    #[command(flatten)]
    pub limits: LimitConfig,
    /// What is remembered of calls until it is delivered.
    #[command(flatten)]
    pub spool: SpoolConfig,
    /// What is logged, and how.
    #[command(flatten)]
    pub log: LogConfig,
    /// Where traces go.
    #[command(flatten)]
    pub trace: TraceConfig,
}

impl Config {
    /// Where the mesh port is.
    pub fn address(&self) -> SocketAddr {
        (self.host, self.port).into()
    }

    /// Where probes and metrics are.
    pub fn metrics_address(&self) -> SocketAddr {
        (self.host, self.metrics_port).into()
    }

    /// What only the settings together can say.
    pub fn check(&self) -> Result<(), Wrong> {
        let strength = self.common.secret_strength();
        let token = secret::set("MESH_TOKEN", self.mesh_token.as_ref(), strength)?;
        let certificates = self.tls.files()?.is_some();
        if !certificates && token.is_none() && self.common.environment == Environment::Production {
            return Err(Wrong::new("MESH_TOKEN", "must be set when ENVIRONMENT is production"));
        }
        secret::set("MESH_TOKEN_ALSO", self.mesh_token_also.as_ref(), strength)?;
        let addresses = [
            ("AUTH_ADDRESS", &self.auth_address),
            ("ERRORS_ADDRESS", &self.errors_address),
            ("ANALYTICS_ADDRESS", &self.analytics_address),
        ];
        tls::check_schemes(&self.tls, &addresses)?;
        let store = Engine::of(&self.common.store_url(""));
        store.map_err(|problem| Wrong::new("DATABASE_URL", problem))?;
        self.common.redis_url().map_or(Ok(()), check_redis_url)
    }

    /// Bytes of request messages that may be arriving at once.
    pub(crate) fn max_request_memory(&self) -> usize {
        usize::try_from(self.max_request_memory).unwrap_or(Semaphore::MAX_PERMITS)
    }

    /// Whether to serve reflection.
    pub fn reflects(&self) -> bool {
        self.reflection.unwrap_or(self.common.environment != Environment::Production)
    }
}

/// A size that the largest message fits into, and a semaphore can count.
fn request_memory(text: &str) -> Result<u64, String> {
    let fits = |size: &u64| (1 << 20..=1 << 40).contains(size);
    bytes(text).ok().filter(fits).ok_or_else(|| "must be from 1MB to 1024GB".to_owned())
}

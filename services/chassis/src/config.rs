//! The settings that every role shares. The struct is the flag is the environment variable; what is
//! wrong is refused before anything starts, by its name.

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{ArgAction, Args, ValueEnum};
use ipnet::IpNet;
use secrecy::{ExposeSecret as _, SecretString};
use tokio::sync::Semaphore;

use crate::db::Engine;
use crate::secret;
use crate::tls::{self, TlsConfig};

/// How careful to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Environment {
    /// Embedded defaults, secrets made on the spot.
    Development,
    /// Like production, for trying things.
    Staging,
    /// Secrets must be set and hard to guess; reflection is off unless asked for.
    Production,
}

/// A setting with a value that can't work.
#[derive(Debug, thiserror::Error)]
#[error("{name}: {problem}")]
pub struct Wrong {
    /// The environment variable's name.
    pub name: &'static str,
    /// What is wrong and what to do.
    pub problem: String,
}

impl Wrong {
    /// Names a setting and what is wrong with it.
    pub fn new(name: &'static str, problem: impl Into<String>) -> Self {
        Wrong { name, problem: problem.into() }
    }
}

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
    /// Where embedded stores and made secrets live. One `hapa all` has it alone; roles may share it.
    #[arg(long, env = "DATA_DIR", default_value = "data")]
    pub data_dir: PathBuf,
    /// How careful to be.
    #[arg(
        long,
        env = "ENVIRONMENT",
        value_enum,
        ignore_case = true,
        default_value = "development"
    )]
    pub environment: Environment,
    /// The store: postgres://user:password@host/database, needed for more than one replica, or
    /// sqlite:///var/lib/hapa/hapa.db, one process per file; without one each service keeps a SQLite
    /// file of its own in DATA_DIR.
    #[arg(long, env = "DATABASE_URL", hide_env_values = true)]
    pub database_url: Option<SecretString>,
    /// The Redis in which replicas count calls and keep answers together, such as redis://redis:6379
    /// or rediss://user:password@host; without one each does so on its own.
    #[arg(long, env = "REDIS_URL", hide_env_values = true)]
    pub redis_url: Option<SecretString>,
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

/// Settings of the rate limiter.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Rate limits")]
pub struct LimitConfig {
    /// Whether calls are limited at all.
    #[arg(long, env = "RATE_LIMIT_ENABLED", action = ArgAction::Set, default_value_t = true)]
    pub rate_limit_enabled: bool,
    /// Calls per key, method and window where neither the key nor the method says otherwise; 0: no limit.
    #[arg(long, env = "DEFAULT_RATE_LIMIT", default_value_t = 100)]
    pub default_rate_limit: u32,
    /// That window, in minutes.
    #[arg(long, env = "RATE_LIMIT_WINDOW_MINUTES", default_value_t = 60, value_parser = clap::value_parser!(u32).range(1..=1440))]
    pub rate_limit_window_minutes: u32,
    /// Silence of Redis after which a replica decides alone, in seconds. Slow replies are no silence.
    #[arg(long, env = "REDIS_TIMEOUT_SECONDS", default_value = "0.5", value_parser = seconds)]
    pub redis_timeout_seconds: Duration,
    /// Replicas that share each limit while Redis is away, 1 or more; default: as many as have
    /// registered in Redis for the same role.
    #[arg(long, env = "RATE_LIMIT_REPLICAS", value_parser = clap::value_parser!(u32).range(1..))]
    pub rate_limit_replicas: Option<u32>,
    /// Failed authentications per address (IPv6: per /64) and minute; beyond it wrong credentials from
    /// there are refused with E4004, valid ones never; 0: no limit, also for the passwords of an account.
    #[arg(long, env = "AUTH_FAILURE_LIMIT", default_value_t = 60)]
    pub auth_failure_limit: u32,
}

/// Settings of the event spool.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Event spool")]
pub struct SpoolConfig {
    /// Most events that wait in DATA_DIR for the services that keep them; beyond, the oldest go,
    /// those of calls that succeeded first.
    #[arg(long, env = "SPOOL_MAX_EVENTS", default_value_t = 1_000_000, value_parser = clap::value_parser!(u64).range(1..))]
    pub spool_max_events: u64,
    /// How long an event waits at most, in hours.
    #[arg(long, env = "SPOOL_MAX_AGE_HOURS", default_value_t = 168, value_parser = clap::value_parser!(u32).range(1..=8760))]
    pub spool_max_age_hours: u32,
    /// Whether failures are reported to the errors service.
    #[arg(long, env = "ERROR_MONITORING_ENABLED", action = ArgAction::Set, default_value_t = true)]
    pub error_monitoring_enabled: bool,
    /// Whether what calls use is recorded.
    #[arg(long, env = "USAGE_RECORDING_ENABLED", action = ArgAction::Set, default_value_t = true)]
    pub usage_recording_enabled: bool,
}

/// Settings of the log.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Log")]
pub struct LogConfig {
    /// error, warn, info, debug or trace; also by module: "info,hapa_codegen=debug".
    #[arg(long, env = "LOG_LEVEL", default_value = "info")]
    pub log_level: String,
    /// One JSON object a line instead of text.
    #[arg(long, env = "STRUCTURED_LOGGING", action = ArgAction::Set, default_value_t = false)]
    pub structured_logging: bool,
    /// A file that the log goes to, in place of standard error. SIGHUP opens it anew, for logrotate.
    #[arg(long, env = "LOG_FILE")]
    pub log_file: Option<PathBuf>,
    /// Size at which LOG_FILE is begun anew: 10MB, 500KB, 1GB, or a number of bytes.
    #[arg(long, env = "LOG_MAX_SIZE", default_value = "10MB", value_parser = bytes)]
    pub log_max_size: u64,
    /// How many older files are kept beside LOG_FILE, as LOG_FILE.1 and so on; 0: none.
    #[arg(long, env = "LOG_FILE_ROTATION", default_value_t = 5, value_parser = clap::value_parser!(u32).range(0..=100))]
    pub log_file_rotation: u32,
    /// Calls that take longer are logged as warnings, with the parts of their time, in seconds; 0:
    /// none are.
    #[arg(long, env = "SLOW_REQUEST_SECONDS", default_value = "30", value_parser = seconds_or_none)]
    pub slow_request_seconds: Duration,
}

/// Settings of traces, under the names that OpenTelemetry gives them.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Traces")]
pub struct TraceConfig {
    /// The collector that spans go to, as OTLP over gRPC: http://otel-collector:4317; default: there
    /// are none.
    #[arg(long, env = "OTEL_EXPORTER_OTLP_ENDPOINT")]
    pub otel_exporter_otlp_endpoint: Option<String>,
    /// The authorities that vouch for a collector at https://, as PEM; default: those of this machine.
    #[arg(long, env = "OTEL_EXPORTER_OTLP_CERTIFICATE", value_name = "FILE")]
    pub otel_exporter_otlp_certificate: Option<PathBuf>,
    /// What the collector wants to be shown: name=value,name=value.
    #[arg(long, env = "OTEL_EXPORTER_OTLP_HEADERS", hide_env_values = true)]
    pub otel_exporter_otlp_headers: Option<SecretString>,
    /// What this process is called there; default: hapa-auth and so on, hapa where it has several
    /// roles.
    #[arg(long, env = "OTEL_SERVICE_NAME")]
    pub otel_service_name: Option<String>,
    /// The part of the traces that is kept, from 0 to 1, of those whose begin is here: else whoever
    /// began one has decided.
    #[arg(long, env = "OTEL_TRACES_SAMPLER_ARG", default_value_t = 1.0, value_parser = ratio)]
    pub otel_traces_sampler_arg: f64,
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
        let strength = self.secret_strength();
        let token = secret::set("MESH_TOKEN", self.mesh_token.as_ref(), strength)?;
        let certificates = self.tls.files()?.is_some();
        if !certificates && token.is_none() && self.environment == Environment::Production {
            return Err(Wrong::new("MESH_TOKEN", "must be set when ENVIRONMENT is production"));
        }
        secret::set("MESH_TOKEN_ALSO", self.mesh_token_also.as_ref(), strength)?;
        let addresses = [
            ("AUTH_ADDRESS", &self.auth_address),
            ("ERRORS_ADDRESS", &self.errors_address),
            ("ANALYTICS_ADDRESS", &self.analytics_address),
        ];
        tls::check_schemes(&self.tls, &addresses)?;
        let store = Engine::of(&self.store_url(""));
        store.map_err(|problem| Wrong::new("DATABASE_URL", problem))?;
        self.redis_url().map_or(Ok(()), check_redis_url)
    }

    /// Bytes of request messages that may be arriving at once.
    pub(crate) fn max_request_memory(&self) -> usize {
        usize::try_from(self.max_request_memory).unwrap_or(Semaphore::MAX_PERMITS)
    }

    /// What is asked of secrets that are set.
    pub fn secret_strength(&self) -> secret::Strength {
        match self.environment {
            Environment::Production => secret::Strength::HardToGuess,
            Environment::Development | Environment::Staging => secret::Strength::Long,
        }
    }

    /// The Redis that replicas share, if there is one.
    pub fn redis_url(&self) -> Option<&SecretString> {
        self.redis_url.as_ref().filter(|url| !url.expose_secret().is_empty())
    }

    /// Where a service keeps its data.
    pub fn store_url(&self, service: &str) -> String {
        store_url(self.database_url.as_ref(), &self.data_dir, service)
    }

    /// Whether each service keeps a file of its own in DATA_DIR.
    pub fn has_embedded_stores(&self) -> bool {
        self.database_url.as_ref().is_none_or(|url| url.expose_secret().is_empty())
    }

    /// Whether to serve reflection.
    pub fn reflects(&self) -> bool {
        self.reflection.unwrap_or(self.environment != Environment::Production)
    }
}

/// Where a service keeps its data: at the URL that was set, else in a file of its own.
pub fn store_url(set: Option<&SecretString>, data_dir: &Path, service: &str) -> String {
    let embedded = || format!("sqlite://{}/{service}.db?mode=rwc", data_dir.display());
    let set = set.map(SecretString::expose_secret).filter(|url| !url.is_empty());
    set.map_or_else(embedded, str::to_owned)
}

/// One server, plain or over TLS: what else a Redis can be is not built in.
pub(crate) fn check_redis_url(url: &SecretString) -> Result<(), Wrong> {
    let url = url.expose_secret();
    if url.starts_with("redis://") || url.starts_with("rediss://") {
        return Ok(());
    }
    Err(Wrong::new("REDIS_URL", "must begin with redis:// or rediss://"))
}

fn ratio(text: &str) -> Result<f64, String> {
    let number = text.parse().ok().filter(|number| (0.0..=1.0).contains(number));
    number.ok_or_else(|| "must be a number from 0 to 1".to_owned())
}

/// A number of bytes, with KB, MB or GB (of 1024 each) behind it where it has one.
fn bytes(text: &str) -> Result<u64, String> {
    let upper = text.trim().to_ascii_uppercase();
    let units = [("KB", 1 << 10), ("MB", 1 << 20), ("GB", 1 << 30), ("", 1)];
    let parsed = units.iter().find_map(|(unit, size)| {
        let number: u64 = upper.strip_suffix(unit)?.trim().parse().ok()?;
        number.checked_mul(*size)
    });
    let problem = "must be 1KB or more, such as 10MB, 500KB or 1GB";
    parsed.filter(|size| *size >= 1024).ok_or_else(|| problem.to_owned())
}

/// A size that the largest message fits into, and a semaphore can count.
fn request_memory(text: &str) -> Result<u64, String> {
    let fits = |size: &u64| (1 << 20..=1 << 40).contains(size);
    bytes(text).ok().filter(fits).ok_or_else(|| "must be from 1MB to 1024GB".to_owned())
}

/// A positive number of seconds, fractions allowed.
pub fn seconds(text: &str) -> Result<Duration, String> {
    match seconds_or_none(text)? {
        Duration::ZERO => Err("must be more than 0 seconds".to_owned()),
        duration => Ok(duration),
    }
}

/// A number of seconds, fractions allowed, 0 too.
pub fn seconds_or_none(text: &str) -> Result<Duration, String> {
    let number: f64 = text.parse().map_err(|_| "must be a number of seconds".to_owned())?;
    if !(0.0..=86_400.0).contains(&number) {
        return Err("must be from 0 to 86400 seconds".to_owned());
    }
    Ok(Duration::from_secs_f64(number))
}

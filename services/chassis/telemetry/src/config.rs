//! Settings of the log and of traces.

use std::path::PathBuf;
use std::time::Duration;

use clap::{ArgAction, Args};
use hapa_core::config::{bytes, seconds_or_none};
use secrecy::SecretString;

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

fn ratio(text: &str) -> Result<f64, String> {
    let number = text.parse().ok().filter(|number| (0.0..=1.0).contains(number));
    number.ok_or_else(|| "must be a number from 0 to 1".to_owned())
}

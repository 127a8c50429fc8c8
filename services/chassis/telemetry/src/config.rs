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
    /// Log level: error, warn, info, debug or trace. Also per module, such as "info,hapa_codegen=debug".
    #[arg(long, env = "LOG_LEVEL", default_value = "info")]
    pub log_level: String,
    /// Writes one JSON object per line instead of text.
    #[arg(long, env = "STRUCTURED_LOGGING", action = ArgAction::Set, default_value_t = false)]
    pub structured_logging: bool,
    /// Log file, instead of standard error. SIGHUP reopens it, for logrotate.
    #[arg(long, env = "LOG_FILE")]
    pub log_file: Option<PathBuf>,
    /// Size at which LOG_FILE is rotated: 10MB, 500KB, 1GB, or a number of bytes.
    #[arg(long, env = "LOG_MAX_SIZE", default_value = "10MB", value_parser = bytes)]
    pub log_max_size: u64,
    /// Number of rotated files that are kept, named LOG_FILE.1 and so on. 0: none.
    #[arg(long, env = "LOG_FILE_ROTATION", default_value_t = 5, value_parser = clap::value_parser!(u32).range(0..=100))]
    pub log_file_rotation: u32,
    /// Duration in seconds above which a call is logged as a warning, with the parts of its duration. 0: no call.
    #[arg(long, env = "SLOW_REQUEST_SECONDS", default_value = "30", value_parser = seconds_or_none)]
    pub slow_request_seconds: Duration,
}

/// Settings of traces, with the names that OpenTelemetry defines.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Traces")]
pub struct TraceConfig {
    /// Collector of spans, as OTLP over gRPC, such as http://otel-collector:4317. Default: no traces.
    #[arg(long, env = "OTEL_EXPORTER_OTLP_ENDPOINT")]
    pub otel_exporter_otlp_endpoint: Option<String>,
    /// PEM file with the certificate authorities for a collector at https://. Default: the system's authorities.
    #[arg(long, env = "OTEL_EXPORTER_OTLP_CERTIFICATE", value_name = "FILE")]
    pub otel_exporter_otlp_certificate: Option<PathBuf>,
    /// Headers of requests to the collector: name=value,name=value.
    #[arg(long, env = "OTEL_EXPORTER_OTLP_HEADERS", hide_env_values = true)]
    pub otel_exporter_otlp_headers: Option<SecretString>,
    /// Service name of this process in traces. Default: hapa-auth and so on; hapa for a process with several roles.
    #[arg(long, env = "OTEL_SERVICE_NAME")]
    pub otel_service_name: Option<String>,
    /// Fraction of the traces that are sampled, from 0 to 1. It applies to traces that begin in this process; for
    /// others the decision of their first span applies.
    #[arg(long, env = "OTEL_TRACES_SAMPLER_ARG", default_value_t = 1.0, value_parser = ratio)]
    pub otel_traces_sampler_arg: f64,
}

fn ratio(text: &str) -> Result<f64, String> {
    let number = text.parse().ok().filter(|number| (0.0..=1.0).contains(number));
    number.ok_or_else(|| "must be a number from 0 to 1".to_owned())
}

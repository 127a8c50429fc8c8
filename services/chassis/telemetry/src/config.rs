//! Settings of the log and of traces.

use std::path::PathBuf;
use std::time::Duration;

use clap::{ArgAction, Args};
use hapa_core::config::{boolean, bytes, seconds_or_none};
use secrecy::SecretString;

/// Number of rotated log files if LOG_FILE_ROTATION is only turned on.
const DEFAULT_ROTATED_FILES: u32 = 5;

/// Settings of the log.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Log")]
pub struct LogConfig {
    /// Log level: error, warn, info, debug, trace or off; Python's names count too. Also per module, such as
    /// "info,hapa_codegen=debug".
    #[arg(long, env = "LOG_LEVEL", default_value = "info", value_parser = log_level)]
    pub log_level: String,
    /// Writes one JSON object per line instead of text.
    #[arg(long, env = "STRUCTURED_LOGGING", action = ArgAction::Set, value_parser = boolean, default_value_t = false)]
    pub structured_logging: bool,
    /// Log file, instead of standard error. SIGHUP reopens it, for logrotate.
    #[arg(long, env = "LOG_FILE")]
    pub log_file: Option<PathBuf>,
    /// Size at which LOG_FILE is rotated: 10MB, 500KB, 1GB, or a number of bytes.
    #[arg(long, env = "LOG_MAX_SIZE", default_value = "10MB", value_parser = bytes)]
    pub log_max_size: u64,
    /// Number of rotated files that are kept, named LOG_FILE.1 and so on. 0 or false: none; true: 5.
    #[arg(long, env = "LOG_FILE_ROTATION", default_value = "5", value_parser = rotated_file_count)]
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

/// Parses a level or directives, and returns directives with the names of `tracing`.
fn log_level(text: &str) -> Result<String, String> {
    // Directives for spans have a grammar of their own, with commas in it.
    if text.contains('[') {
        return Ok(text.to_owned());
    }
    let directive = |part: &str| match part.split_once('=') {
        Some((module, level)) => Ok(format!("{}={}", module.trim(), level_name(level)?)),
        None => level_name(part).map(str::to_owned),
    };
    let parts = text.split(',').map(str::trim).filter(|part| !part.is_empty());
    let directives = parts.map(directive).collect::<Result<Vec<_>, String>>()?;
    Ok(if directives.is_empty() { "info".to_owned() } else { directives.join(",") })
}

fn level_name(text: &str) -> Result<&'static str, String> {
    match text.trim().to_ascii_lowercase().as_str() {
        "error" | "critical" | "fatal" => Ok("error"),
        "warn" | "warning" => Ok("warn"),
        "info" => Ok("info"),
        "debug" => Ok("debug"),
        "trace" | "notset" => Ok("trace"),
        "off" => Ok("off"),
        _ => Err("must be error, warn, info, debug, trace or off, or a list such as info,hapa_codegen=debug".to_owned()),
    }
}

fn rotated_file_count(text: &str) -> Result<u32, String> {
    match (text.trim().parse::<u32>(), boolean(text)) {
        (Ok(count @ 0..=100), _) => Ok(count),
        (Err(_), Ok(true)) => Ok(DEFAULT_ROTATED_FILES),
        (Err(_), Ok(false)) => Ok(0),
        _ => Err("must be a number from 0 to 100, true or false".to_owned()),
    }
}

fn ratio(text: &str) -> Result<f64, String> {
    let number = text.parse().ok().filter(|number| (0.0..=1.0).contains(number));
    number.ok_or_else(|| "must be a number from 0 to 1".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_have_the_names_of_python_too_and_a_typo_is_refused() {
        for (text, directives) in [
            ("INFO", "info"),
            ("WARNING", "warn"),
            ("Critical", "error"),
            ("", "info"),
            ("info, hapa_codegen=DEBUG", "info,hapa_codegen=debug"),
            ("off", "off"),
            ("[call{rpc=x,y=z}]=debug", "[call{rpc=x,y=z}]=debug"),
        ] {
            assert_eq!(log_level(text).as_deref(), Ok(directives), "{text}");
        }
        for text in ["verbose", "inof", "hapa_codegen", "hapa_codegen=loud", "5"] {
            assert!(log_level(text).is_err(), "{text}");
        }
    }

    #[test]
    fn rotation_is_a_number_or_a_truth_value() {
        for (text, count) in [("7", 7), ("0", 0), ("1", 1), ("true", 5), ("False", 0)] {
            assert_eq!(rotated_file_count(text), Ok(count), "{text}");
        }
        assert!(rotated_file_count("101").is_err() && rotated_file_count("-1").is_err());
    }
}

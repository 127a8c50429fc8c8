//! `hapa gateway`: writes Envoy's configuration from the template and the settings, and beside it the protobuf
//! descriptor set of this binary.

use std::fs;
use std::io::Write as _;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use hapa_core::config::{ConfigError, listen_address};
use hapa_core::secret::{self, MESH_TOKEN_FILE, Strength};
use hapa_proto::FILE_DESCRIPTOR_SET;
use hapa_transport::peer::gateway_token;
use hapa_transport::tls::{self, TlsConfig};
use secrecy::{ExposeSecret as _, SecretString};
use tonic::transport::Uri;

use crate::cli::CliError;
use crate::cli::gateway::address_groups::AddressGroups;
use crate::cli::gateway::sds::{SdsFile, sds_files};

mod address_groups;
mod overloaded;
mod sds;

const TEMPLATE: &str = include_str!("../../../../gateway/envoy.yaml");
/// The Lua filter that gives the gateway's own refusals the published format and reports them.
const REFUSALS_FILTER: &str = include_str!("../../../../gateway/refusals.lua");
/// Report token of a gateway that authenticates with its certificate.
const TOKEN_BY_CERTIFICATE: &str = "";
/// Report token of a gateway without a credential, which reports nothing.
const TOKEN_NO_REPORTS: &str = "-";
/// Where Debian and Envoy's images keep the certificate authorities of the machine.
const DEFAULT_CA_FILE: &str = "/etc/ssl/certs/ca-certificates.crt";
/// A regular expression that matches nothing.
const MATCH_NOTHING: &str = "^$x";

#[derive(clap::Args, Clone, Debug)]
#[command(
    after_help = "Example:\n  hapa gateway --out data/gateway && envoy -c data/gateway/envoy.yaml"
)]
pub(super) struct GatewayArgs {
    /// Directory for envoy.yaml and the files that it refers to.
    #[arg(long, value_name = "DIR", default_value = "data/gateway")]
    out: PathBuf,
    /// Address to listen on.
    #[arg(long, env = "GATEWAY_HOST", default_value = "127.0.0.1", value_parser = listen_address)]
    gateway_host: IpAddr,
    /// Port for gRPC, gRPC-Web and JSON.
    #[arg(long, env = "GATEWAY_PORT", default_value_t = 8000)]
    gateway_port: u16,
    /// Port of Envoy's admin interface, on loopback only.
    #[arg(long, env = "ENVOY_ADMIN_PORT", default_value_t = 9901)]
    envoy_admin_port: u16,
    /// Port for /livez, /ready and /stats/prometheus; default: none.
    #[arg(long, env = "GATEWAY_METRICS_PORT")]
    gateway_metrics_port: Option<u16>,
    /// URL of the collector for the gateway's traces, OTLP over gRPC: http://otel-collector:4317; default: no
    /// traces.
    #[arg(long, env = "OTEL_EXPORTER_OTLP_ENDPOINT")]
    otel_exporter_otlp_endpoint: Option<String>,
    /// PEM file of the certificate authorities for a collector at https://; default: those of this machine.
    #[arg(long, env = "OTEL_EXPORTER_OTLP_CERTIFICATE", value_name = "FILE")]
    otel_exporter_otlp_certificate: Option<PathBuf>,
    /// Origins of web pages that may call the gateway, exact, comma-separated: https://editor.example.com.
    #[arg(long, env = "CORS_ORIGINS", value_delimiter = ',')]
    cors_origins: Vec<String>,
    /// URLs of the code generation service, comma-separated; default: PORT on this machine.
    #[arg(long, env = "CODEGEN_ADDRESS")]
    codegen_address: Option<String>,
    /// URLs of the auth service, comma-separated; default: PORT on this machine.
    #[arg(long, env = "AUTH_ADDRESS")]
    auth_address: Option<String>,
    /// URLs of the analytics service, comma-separated; default: PORT on this machine.
    #[arg(long, env = "ANALYTICS_ADDRESS")]
    analytics_address: Option<String>,
    /// URLs of the errors service, comma-separated; default: PORT on this machine.
    #[arg(long, env = "ERRORS_ADDRESS")]
    errors_address: Option<String>,
    /// PEM file of the public certificate and its chain; with it the port accepts only TLS.
    #[arg(long, env = "GATEWAY_TLS_CERT_FILE", requires = "gateway_tls_key_file")]
    gateway_tls_cert_file: Option<PathBuf>,
    /// PEM file of the public certificate's private key.
    #[arg(long, env = "GATEWAY_TLS_KEY_FILE", requires = "gateway_tls_cert_file")]
    gateway_tls_key_file: Option<PathBuf>,
    /// Maximum number of client connections, including those that have sent nothing yet; more are closed.
    #[arg(long, env = "GATEWAY_MAX_CONNECTIONS", default_value_t = 16_384, value_parser = clap::value_parser!(u32).range(1..))]
    gateway_max_connections: u32,
    /// Maximum number of connections of one of 16 groups of client addresses, and therefore of any one address.
    /// An eighth of it may be opened per second. 0: no limit, for a proxy in front that hides addresses.
    #[arg(long, env = "GATEWAY_CONNECTIONS_PER_ADDRESS", default_value_t = 128)]
    gateway_connections_per_address: u32,
    /// Envoy's heap limit in MiB, at most three quarters of its container's memory. At 90 % Envoy refuses requests,
    /// at 95 % connections.
    #[arg(long, env = "GATEWAY_MAX_HEAP_MB", default_value_t = 384, value_parser = clap::value_parser!(u32).range(64..))]
    gateway_max_heap_mb: u32,
    /// Mutual TLS towards services: the gateway's certificate and the trusted authorities.
    #[command(flatten)]
    tls: TlsConfig,
    /// Secret of the mesh, 32 characters or more. The token for the gateway's reports of its own refusals derives
    /// from it. Default: the mesh token in DATA_DIR; without one, the gateway reports nothing.
    #[arg(long, env = "MESH_TOKEN", hide_env_values = true)]
    mesh_token: Option<SecretString>,
    /// Directory with the generated mesh token.
    #[arg(long, env = "DATA_DIR", default_value = "data")]
    data_dir: PathBuf,
    /// Mesh port of a process with every role on this machine.
    #[arg(long, env = "PORT", default_value_t = 50051)]
    port: u16,
}

pub(super) fn write(args: &GatewayArgs) -> Result<(), CliError> {
    let descriptors = args.out.join("hapa.binpb");
    let config = render(args, &descriptors)?;
    let write = |path: &Path, bytes: &[u8]| {
        fs::write(path, bytes).with_context(|| format!("cannot write {}", path.display()))
    };
    fs::create_dir_all(&args.out)
        .with_context(|| format!("cannot create {}", args.out.display()))?;
    write(&descriptors, FILE_DESCRIPTOR_SET)?;
    for SdsFile { name, text } in sds_files(args)? {
        write(&args.out.join(name), text.as_bytes())?;
    }
    let filter = REFUSALS_FILTER.replace("${OVERLOADED_MESSAGE}", overloaded::MESSAGE);
    let filter = filter.replace("${REPORT_TOKEN}", report_token(args)?.expose_secret());
    write(&args.out.join("refusals.lua"), filter.as_bytes())?;
    write(&args.out.join("envoy.yaml"), config.as_bytes())?;
    writeln!(std::io::stdout(), "envoy -c {}", args.out.join("envoy.yaml").display())?;
    Ok(())
}

/// Refuses the port of the mesh on this machine.
fn check_ports(args: &GatewayArgs) -> Result<(), ConfigError> {
    let services =
        [&args.codegen_address, &args.auth_address, &args.analytics_address, &args.errors_address];
    let uses_port = services.iter().any(|address| address.as_deref().is_none_or(str::is_empty));
    if uses_port && args.gateway_port == args.port && args.port != 0 {
        let problem =
            format!("{} is PORT too, the port of the mesh; choose another one", args.port);
        return Err(ConfigError::new("GATEWAY_PORT", problem));
    }
    Ok(())
}

fn render(args: &GatewayArgs, descriptors: &Path) -> Result<String, CliError> {
    let endpoints_of = |setting, address: &Option<String>| {
        endpoints(setting, address.as_deref().unwrap_or_default(), args.port)
    };
    check_ports(args)?;
    check_schemes(args)?;
    let traces = args.otel_exporter_otlp_endpoint.as_deref().filter(|traces| !traces.is_empty());
    let (traces_host, traces_port) = match traces {
        Some(traces) => host_and_port("OTEL_EXPORTER_OTLP_ENDPOINT", traces)?,
        None => (String::new(), 0),
    };
    // TLS server names exclude IP addresses: RFC 6066, section 3.
    let has_traces_name = traces_host.parse::<IpAddr>().is_err();
    let metrics_port = args.gateway_metrics_port.filter(|port| *port != 0);
    let origins: Vec<_> = args.cors_origins.iter().filter(|origin| !origin.is_empty()).collect();
    if let Some(wrong) = origins.iter().find(|origin| !is_origin(origin)) {
        let problem = format!("{wrong:?} is not an origin like https://editor.example.com");
        return Err(ConfigError::new("CORS_ORIGINS", problem).into());
    }
    let matchers: Vec<_> =
        origins.iter().map(|origin| format!("{{exact: \"{origin}\"}}")).collect();
    let values = [
        ("GATEWAY_HOST", args.gateway_host.to_string()),
        ("GATEWAY_PORT", args.gateway_port.to_string()),
        ("ADMIN_PORT", args.envoy_admin_port.to_string()),
        ("METRICS_PORT", metrics_port.unwrap_or_default().to_string()),
        ("TRACES_NAME", if has_traces_name { traces_host.clone() } else { String::new() }),
        ("TRACES_SAN", if has_traces_name { "DNS" } else { "IP_ADDRESS" }.to_owned()),
        ("TRACES_CA", ca_file(args.otel_exporter_otlp_certificate.as_deref())),
        ("TRACES_HOST", traces_host),
        ("TRACES_PORT", traces_port.to_string()),
        ("DESCRIPTOR_SET", descriptors.display().to_string()),
        ("SECRETS_DIR", args.out.display().to_string()),
        ("SPIFFE_PREFIX", literal_pattern(&args.tls.tls_spiffe_prefix)),
        ("OVERLOADED_MESSAGE", overloaded::MESSAGE.to_owned()),
        ("OVERLOADED_STATUS", overloaded::status_details()),
        ("CORS_ORIGINS", format!("[{}]", matchers.join(", "))),
        ("CODEGEN_ENDPOINTS", endpoints_of("CODEGEN_ADDRESS", &args.codegen_address)?),
        ("AUTH_ENDPOINTS", endpoints_of("AUTH_ADDRESS", &args.auth_address)?),
        ("ANALYTICS_ENDPOINTS", endpoints_of("ANALYTICS_ADDRESS", &args.analytics_address)?),
        ("ERRORS_ENDPOINTS", endpoints_of("ERRORS_ADDRESS", &args.errors_address)?),
    ];
    let fill =
        |text: String, (name, value): &(&str, String)| text.replace(&format!("${{{name}}}"), value);
    let limits = connection_limits(args);
    let values = limits.iter().chain(&values);
    let config = values.fold(remove_sections(TEMPLATE, &sections(args)?), fill);
    if let Some((_, rest)) = config.split_once("${") {
        let name = rest.split('}').next().unwrap_or(rest);
        return Err(anyhow::anyhow!("gateway/envoy.yaml has the unknown placeholder {name}").into());
    }
    Ok(config)
}

/// Limits for connections and memory of unauthenticated clients.
fn connection_limits(args: &GatewayArgs) -> [(&'static str, String); 6] {
    let groups = AddressGroups {
        connections: args.gateway_connections_per_address,
        has_tls: args.gateway_tls_cert_file.is_some(),
        seed: rand::random(),
    };
    [
        ("MAX_CONNECTIONS", args.gateway_max_connections.to_string()),
        ("MAX_HEAP_BYTES", (u64::from(args.gateway_max_heap_mb) << 20).to_string()),
        ("CONNECTIONS_PER_ADDRESS", args.gateway_connections_per_address.to_string()),
        ("CONNECTION_RATE", groups.rate().to_string()),
        ("ADDRESS_MATCHERS", groups.matchers()),
        ("ADDRESS_CHAINS", groups.further_chains()),
    ]
}

/// The token with which the gateway authenticates its reports.
fn report_token(args: &GatewayArgs) -> Result<SecretString, CliError> {
    if args.tls.files()?.is_some() {
        return Ok(TOKEN_BY_CERTIFICATE.into());
    }
    let mesh_token = secret::load_if_exists(
        secret::validate_configured("MESH_TOKEN", args.mesh_token.as_ref(), Strength::Long)?,
        &args.data_dir.join(MESH_TOKEN_FILE),
    )?;
    Ok(mesh_token.map_or_else(|| TOKEN_NO_REPORTS.into(), |token| gateway_token(&token)))
}

fn check_schemes(args: &GatewayArgs) -> Result<(), ConfigError> {
    let addresses = [
        ("CODEGEN_ADDRESS", &args.codegen_address),
        ("AUTH_ADDRESS", &args.auth_address),
        ("ANALYTICS_ADDRESS", &args.analytics_address),
        ("ERRORS_ADDRESS", &args.errors_address),
    ];
    tls::check_schemes(&args.tls, &addresses)
}

/// The optional sections of the template, and whether the settings require them.
fn sections(args: &GatewayArgs) -> Result<[(&'static str, bool); 7], ConfigError> {
    let traces = args.otel_exporter_otlp_endpoint.as_deref().unwrap_or_default();
    Ok([
        ("METRICS", args.gateway_metrics_port.is_some_and(|port| port != 0)),
        ("TRACES", !traces.is_empty()),
        ("TRACES_TLS", traces.starts_with("https:")),
        ("PER_ADDRESS", args.gateway_connections_per_address > 0),
        ("PUBLIC_TLS", args.gateway_tls_cert_file.is_some()),
        ("PUBLIC_PLAIN", args.gateway_tls_cert_file.is_none()),
        ("MESH_TLS", args.tls.files()?.is_some()),
    ])
}

/// The template without its unused sections (`# begin NAME` to `# end NAME`).
fn remove_sections(template: &str, sections: &[(&str, bool)]) -> String {
    let is_marker = |line: &str, word: &str, name: &str| line.trim() == format!("# {word} {name}");
    let (mut text, mut removed) = (String::with_capacity(template.len()), None);
    for line in template.lines() {
        let starts = |(name, is_used): &&(&str, bool)| !is_used && is_marker(line, "begin", name);
        removed = removed.or_else(|| sections.iter().find(starts).map(|(name, _)| *name));
        if removed.is_none() {
            text.push_str(line);
            text.push('\n');
        }
        removed = removed.filter(|name| !is_marker(line, "end", name));
    }
    text
}

/// The file of trusted certificate authorities.
fn ca_file(setting: Option<&Path>) -> String {
    let setting = setting.filter(|file| !file.as_os_str().is_empty());
    setting.unwrap_or(Path::new(DEFAULT_CA_FILE)).display().to_string()
}

/// The endpoints of an Envoy cluster; each host name may resolve to several replicas.
fn endpoints(setting: &'static str, addresses: &str, port: u16) -> Result<String, ConfigError> {
    let hosts: Vec<_> = match addresses {
        "" => vec![("127.0.0.1".to_owned(), port)],
        urls => urls.split(',').map(|url| host_and_port(setting, url)).collect::<Result<_, _>>()?,
    };
    let endpoint = |(host, port)| {
        let address = format!("{{address: \"{host}\", port_value: {port}}}");
        format!("{{endpoint: {{address: {{socket_address: {address}}}}}}}")
    };
    Ok(format!("[{}]", hosts.into_iter().map(endpoint).collect::<Vec<_>>().join(", ")))
}

fn host_and_port(setting: &'static str, address: &str) -> Result<(String, u16), ConfigError> {
    let uri: Option<Uri> = address.parse().ok();
    let host = uri.as_ref().and_then(|uri| Some((uri.host()?.to_owned(), uri.port_u16()?)));
    host.ok_or_else(|| {
        ConfigError::new(setting, format!("{address:?} is not a URL such as http://host:port"))
    })
}

/// A regular expression for a quoted YAML string that matches exactly this text. No text: it matches nothing.
fn literal_pattern(text: &str) -> String {
    if text.is_empty() {
        return MATCH_NOTHING.to_owned();
    }
    let plain = |c: char| c.is_ascii_alphanumeric() || "/:-_".contains(c);
    text.chars().map(|c| if plain(c) { c.to_string() } else { format!("[{c}]") }).collect()
}

/// Whether a text has the form of a browser's Origin header: scheme, host and optional port.
fn is_origin(text: &str) -> bool {
    let rest = text.strip_prefix("https://").or_else(|| text.strip_prefix("http://"));
    let plain =
        |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b".-:[]".contains(&byte);
    rest.is_some_and(|rest| !rest.is_empty() && rest.bytes().all(plain))
}

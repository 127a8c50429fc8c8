//! `hapa gateway`: Envoy's configuration, from the template and the settings, with the descriptor set
//! of this very binary beside it.

use std::fs;
use std::io::Write as _;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use hapa_core::config::Wrong;
use hapa_core::secret::{self, MESH_TOKEN_FILE, Strength};
use hapa_proto::FILE_DESCRIPTOR_SET;
use hapa_transport::peer::gateway_token;
use hapa_transport::tls::{self, TlsConfig};
use secrecy::{ExposeSecret as _, SecretString};
use tonic::transport::Uri;

use crate::cli::Failure;
use crate::cli::gateway::address_groups::AddressGroups;
use crate::cli::gateway::secrets::{Secret, secrets};

mod address_groups;
mod overloaded;
mod secrets;

const TEMPLATE: &str = include_str!("../../../../gateway/envoy.yaml");
/// Envoy's filter that gives the gateway's own refusals their form and reports them.
const REFUSALS: &str = include_str!("../../../../gateway/refusals.lua");
/// In place of a report token: the gateway proves itself by its certificate, or has nothing to show and
/// reports nothing.
const BY_CERTIFICATE: &str = "";
const NO_REPORTS: &str = "-";

#[derive(clap::Args, Clone, Debug)]
#[group(id = "gateway_args")]
pub(super) struct Args {
    /// The folder to write envoy.yaml and what it needs to.
    #[arg(long, value_name = "DIR", default_value = "data/gateway")]
    out: PathBuf,
    /// Address to listen on.
    #[arg(long, env = "GATEWAY_HOST", default_value = "127.0.0.1")]
    gateway_host: IpAddr,
    /// Port for gRPC, gRPC-Web and JSON.
    #[arg(long, env = "GATEWAY_PORT", default_value_t = 8000)]
    gateway_port: u16,
    /// Envoy's own port, on loopback alone.
    #[arg(long, env = "ENVOY_ADMIN_PORT", default_value_t = 9901)]
    envoy_admin_port: u16,
    /// Port for /livez, /ready and /stats/prometheus, for machines that watch; default: none.
    #[arg(long, env = "GATEWAY_METRICS_PORT")]
    gateway_metrics_port: Option<u16>,
    /// Where the gateway's traces go, as OTLP over gRPC: http://otel-collector:4317; default: nowhere.
    #[arg(long, env = "OTEL_EXPORTER_OTLP_ENDPOINT")]
    otel_exporter_otlp_endpoint: Option<String>,
    /// The authorities that vouch for a collector at https://, as PEM; default: those of this machine.
    #[arg(long, env = "OTEL_EXPORTER_OTLP_CERTIFICATE", value_name = "FILE")]
    otel_exporter_otlp_certificate: Option<PathBuf>,
    /// Origins whose pages may call, exact, comma-separated: https://editor.example.com.
    #[arg(long, env = "CORS_ORIGINS", value_delimiter = ',')]
    cors_origins: Vec<String>,
    /// The code generation service, several with commas between; default: PORT on this machine.
    #[arg(long, env = "CODEGEN_ADDRESS")]
    codegen_address: Option<String>,
    /// The auth service; default: PORT on this machine.
    #[arg(long, env = "AUTH_ADDRESS")]
    auth_address: Option<String>,
    /// The analytics service; default: PORT on this machine.
    #[arg(long, env = "ANALYTICS_ADDRESS")]
    analytics_address: Option<String>,
    /// The errors service; default: PORT on this machine.
    #[arg(long, env = "ERRORS_ADDRESS")]
    errors_address: Option<String>,
    /// The public certificate and its chain, as PEM; with it the port speaks TLS alone.
    #[arg(long, env = "GATEWAY_TLS_CERT_FILE", requires = "gateway_tls_key_file")]
    gateway_tls_cert_file: Option<PathBuf>,
    /// The key of the public certificate, as PEM.
    #[arg(long, env = "GATEWAY_TLS_KEY_FILE", requires = "gateway_tls_cert_file")]
    gateway_tls_key_file: Option<PathBuf>,
    /// Maximum number of client connections, those that have not spoken yet included; more are closed.
    #[arg(long, env = "GATEWAY_MAX_CONNECTIONS", default_value_t = 16_384, value_parser = clap::value_parser!(u32).range(1..))]
    gateway_max_connections: u32,
    /// Maximum number of connections that one of 16 groups of client addresses may hold, and with it any one
    /// address; an eighth of it may be opened each second. 0: no bound, for a proxy in front that hides addresses.
    #[arg(long, env = "GATEWAY_CONNECTIONS_PER_ADDRESS", default_value_t = 128)]
    gateway_connections_per_address: u32,
    /// Envoy's heap in MiB, at most three quarters of its container's memory: requests are refused at 90 % of it,
    /// connections at 95 %.
    #[arg(long, env = "GATEWAY_MAX_HEAP_MB", default_value_t = 384, value_parser = clap::value_parser!(u32).range(64..))]
    gateway_max_heap_mb: u32,
    /// What it shows to services where certificates prove who is who, and whom it believes.
    #[command(flatten)]
    tls: TlsConfig,
    /// The secret of the mesh, 32 characters or more, from which the token is made that the gateway's
    /// reports of its own refusals show; default: what DATA_DIR holds, else nothing is reported.
    #[arg(long, env = "MESH_TOKEN", hide_env_values = true)]
    mesh_token: Option<SecretString>,
    /// Where a mesh token is kept that was made.
    #[arg(long, env = "DATA_DIR", default_value = "data")]
    data_dir: PathBuf,
    /// The mesh port of a process on this machine that has every role.
    #[arg(long, env = "PORT", default_value_t = 50051)]
    port: u16,
}

pub(super) fn write(args: &Args) -> Result<(), Failure> {
    let descriptors = args.out.join("hapa.binpb");
    let config = render(args, &descriptors)?;
    let put = |path: &Path, bytes: &[u8]| {
        fs::write(path, bytes).with_context(|| format!("writing {}", path.display()))
    };
    fs::create_dir_all(&args.out).with_context(|| format!("making {}", args.out.display()))?;
    put(&descriptors, FILE_DESCRIPTOR_SET)?;
    for Secret { file, text } in secrets(args)? {
        put(&args.out.join(file), text.as_bytes())?;
    }
    let refusals = REFUSALS.replace("${OVERLOADED_MESSAGE}", overloaded::MESSAGE);
    let refusals = refusals.replace("${REPORT_TOKEN}", report_token(args)?.expose_secret());
    put(&args.out.join("refusals.lua"), refusals.as_bytes())?;
    put(&args.out.join("envoy.yaml"), config.as_bytes())?;
    writeln!(std::io::stdout(), "envoy -c {}", args.out.join("envoy.yaml").display())?;
    Ok(())
}

fn render(args: &Args, descriptors: &Path) -> Result<String, Failure> {
    let replicas = |setting, address: &Option<String>| {
        endpoints(setting, address.as_deref().unwrap_or_default(), args.port)
    };
    check_schemes(args)?;
    let traces = args.otel_exporter_otlp_endpoint.as_deref().filter(|traces| !traces.is_empty());
    let (traces_host, traces_port) = match traces {
        Some(traces) => place("OTEL_EXPORTER_OTLP_ENDPOINT", traces)?,
        None => (String::new(), 0),
    };
    // An address is no name that TLS could ask for: RFC 6066, 3.
    let traces_is_named = traces_host.parse::<IpAddr>().is_err();
    let metrics_port = args.gateway_metrics_port.filter(|port| *port != 0);
    let origins: Vec<_> = args.cors_origins.iter().filter(|origin| !origin.is_empty()).collect();
    if let Some(wrong) = origins.iter().find(|origin| !is_origin(origin)) {
        let problem = format!("{wrong:?} is not an origin like https://editor.example.com");
        return Err(Wrong::new("CORS_ORIGINS", problem).into());
    }
    let matchers: Vec<_> =
        origins.iter().map(|origin| format!("{{exact: \"{origin}\"}}")).collect();
    let values = [
        ("GATEWAY_HOST", args.gateway_host.to_string()),
        ("GATEWAY_PORT", args.gateway_port.to_string()),
        ("ADMIN_PORT", args.envoy_admin_port.to_string()),
        ("METRICS_PORT", metrics_port.unwrap_or_default().to_string()),
        ("TRACES_NAME", if traces_is_named { traces_host.clone() } else { String::new() }),
        ("TRACES_SAN", if traces_is_named { "DNS" } else { "IP_ADDRESS" }.to_owned()),
        ("TRACES_CA", authority(args.otel_exporter_otlp_certificate.as_deref())),
        ("TRACES_HOST", traces_host),
        ("TRACES_PORT", traces_port.to_string()),
        ("DESCRIPTOR_SET", descriptors.display().to_string()),
        ("SECRETS_DIR", args.out.display().to_string()),
        ("SPIFFE_PREFIX", literal(&args.tls.tls_spiffe_prefix)),
        ("OVERLOADED_MESSAGE", overloaded::MESSAGE.to_owned()),
        ("OVERLOADED_STATUS", overloaded::status_details()),
        ("CORS_ORIGINS", format!("[{}]", matchers.join(", "))),
        ("CODEGEN_ENDPOINTS", replicas("CODEGEN_ADDRESS", &args.codegen_address)?),
        ("AUTH_ENDPOINTS", replicas("AUTH_ADDRESS", &args.auth_address)?),
        ("ANALYTICS_ENDPOINTS", replicas("ANALYTICS_ADDRESS", &args.analytics_address)?),
        ("ERRORS_ENDPOINTS", replicas("ERRORS_ADDRESS", &args.errors_address)?),
    ];
    let fill =
        |text: String, (name, value): &(&str, String)| text.replace(&format!("${{{name}}}"), value);
    let bounds = bounds(args);
    let values = bounds.iter().chain(&values);
    let config = values.fold(without(TEMPLATE, &sections(args)?), fill);
    if let Some((_, rest)) = config.split_once("${") {
        let name = rest.split('}').next().unwrap_or(rest);
        return Err(
            anyhow::anyhow!("gateway/envoy.yaml asks for {name}, which has no value").into()
        );
    }
    Ok(config)
}

/// What strangers may hold.
fn bounds(args: &Args) -> [(&'static str, String); 6] {
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

/// What the gateway's reports show.
fn report_token(args: &Args) -> Result<SecretString, Failure> {
    if args.tls.files()?.is_some() {
        return Ok(BY_CERTIFICATE.into());
    }
    let kept = secret::set_or_found(
        secret::set("MESH_TOKEN", args.mesh_token.as_ref(), Strength::Long)?,
        &args.data_dir.join(MESH_TOKEN_FILE),
    )?;
    Ok(kept.map_or_else(|| NO_REPORTS.into(), |token| gateway_token(&token)))
}

fn check_schemes(args: &Args) -> Result<(), Wrong> {
    let addresses = [
        ("CODEGEN_ADDRESS", &args.codegen_address),
        ("AUTH_ADDRESS", &args.auth_address),
        ("ANALYTICS_ADDRESS", &args.analytics_address),
        ("ERRORS_ADDRESS", &args.errors_address),
    ];
    tls::check_schemes(&args.tls, &addresses)
}

/// Which sections are asked for.
fn sections(args: &Args) -> Result<[(&'static str, bool); 7], Wrong> {
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

/// The template without the sections (`# begin NAME` to `# end NAME`) that are not asked for.
fn without(template: &str, sections: &[(&str, bool)]) -> String {
    let says = |line: &str, word: &str, name: &str| line.trim() == format!("# {word} {name}");
    let (mut text, mut left_out) = (String::with_capacity(template.len()), None);
    for line in template.lines() {
        let begins = |(name, asked): &&(&str, bool)| !asked && says(line, "begin", name);
        left_out = left_out.or_else(|| sections.iter().find(begins).map(|(name, _)| *name));
        if left_out.is_none() {
            text.push_str(line);
            text.push('\n');
        }
        left_out = left_out.filter(|name| !says(line, "end", name));
    }
    text
}

/// The file of authorities, where Debian and Envoy's images keep theirs if none is named.
fn authority(named: Option<&Path>) -> String {
    let named = named.filter(|file| !file.as_os_str().is_empty());
    named.unwrap_or(Path::new("/etc/ssl/certs/ca-certificates.crt")).display().to_string()
}

/// What a cluster calls, as Envoy writes it: each name may stand for several replicas.
fn endpoints(setting: &'static str, addresses: &str, port: u16) -> Result<String, Wrong> {
    let places: Vec<_> = match addresses {
        "" => vec![("127.0.0.1".to_owned(), port)],
        some => some.split(',').map(|one| place(setting, one)).collect::<Result<_, _>>()?,
    };
    let endpoint = |(host, port)| {
        let address = format!("{{address: \"{host}\", port_value: {port}}}");
        format!("{{endpoint: {{address: {{socket_address: {address}}}}}}}")
    };
    Ok(format!("[{}]", places.into_iter().map(endpoint).collect::<Vec<_>>().join(", ")))
}

fn place(setting: &'static str, address: &str) -> Result<(String, u16), Wrong> {
    let uri: Option<Uri> = address.parse().ok();
    let place = uri.as_ref().and_then(|uri| Some((uri.host()?.to_owned(), uri.port_u16()?)));
    place.ok_or_else(|| {
        Wrong::new(setting, format!("{address:?} is not an address like http://host:port"))
    })
}

/// A text as a regular expression in a quoted YAML string that matches nothing else.
fn literal(text: &str) -> String {
    if text.is_empty() {
        return "^$x".to_owned(); // no URI proves anything
    }
    let plain = |c: char| c.is_ascii_alphanumeric() || "/:-_".contains(c);
    text.chars().map(|c| if plain(c) { c.to_string() } else { format!("[{c}]") }).collect()
}

/// Scheme, host and maybe a port: what a browser sends, letter for letter.
fn is_origin(text: &str) -> bool {
    let rest = text.strip_prefix("https://").or_else(|| text.strip_prefix("http://"));
    let plain =
        |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b".-:[]".contains(&byte);
    rest.is_some_and(|rest| !rest.is_empty() && rest.bytes().all(plain))
}

//! TLS of the mesh port and of outgoing connections: one certificate for both, from files that may be replaced at any
//! time.
//!
//! The files are read every 2 s. New ones take effect for new connections. Files that do not belong together change
//! nothing and are reported. Connections have a maximum age, so that all of them use the new certificate eventually.

pub mod names;
mod verify;

use std::fmt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::Context as _;
use clap::Args;
use hapa_core::config::ConfigError;
use hapa_core::health_check::HealthCheck;
use rustls::client::WebPkiServerVerifier;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::version::TLS13;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use sha2::{Digest as _, Sha256};
use time::OffsetDateTime;
use tokio::time::sleep;

use self::verify::NameOrRoleVerifier;

pub use self::names::Validity;

/// ALPN identifier of HTTP/2, the only protocol between services.
const H2: &[u8] = b"h2";
/// Interval at which the files are read.
const RELOAD_INTERVAL: Duration = Duration::from_secs(2);

/// Default prefix of URI names that contain a role.
pub const DEFAULT_SPIFFE_PREFIX: &str = "spiffe://hapa/";

/// Settings of certificates.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Certificates")]
#[group(id = "tls")]
pub struct TlsConfig {
    /// PEM file with this process's certificate and its chain. With it the mesh port accepts only TLS 1.3, and services
    /// authenticate with certificates instead of MESH_TOKEN.
    #[arg(long, env = "TLS_CERT_FILE")]
    pub tls_cert_file: Option<PathBuf>,
    /// PEM file with the private key of TLS_CERT_FILE.
    #[arg(long, env = "TLS_KEY_FILE")]
    pub tls_key_file: Option<PathBuf>,
    /// PEM file with the certificate authorities of the mesh.
    #[arg(long, env = "TLS_CA_FILE")]
    pub tls_ca_file: Option<PathBuf>,
    /// Prefix of URI names in certificates whose last segment is a role, such as spiffe://hapa/ns/hapa/sa/. Other URI
    /// names are ignored.
    #[arg(long, env = "TLS_SPIFFE_PREFIX", default_value = DEFAULT_SPIFFE_PREFIX)]
    pub tls_spiffe_prefix: String,
}

/// The certificate files.
#[derive(Clone, Debug)]
pub struct TlsFiles {
    /// The certificate and its chain.
    pub certificate: PathBuf,
    /// The private key.
    pub key: PathBuf,
    /// The certificate authorities.
    pub authority: PathBuf,
}

impl TlsConfig {
    /// All three files, or none. Fails if only some are set.
    pub fn files(&self) -> Result<Option<TlsFiles>, ConfigError> {
        let set = [&self.tls_cert_file, &self.tls_key_file, &self.tls_ca_file];
        match set.map(Clone::clone) {
            [None, None, None] => Ok(None),
            [Some(certificate), Some(key), Some(authority)] => {
                Ok(Some(TlsFiles { certificate, key, authority }))
            }
            [certificate, key, _] => {
                let names = ["TLS_CERT_FILE", "TLS_KEY_FILE", "TLS_CA_FILE"];
                let missing = [certificate.is_none(), key.is_none(), true];
                let name = names.into_iter().zip(missing).find(|(_, missing)| *missing);
                let problem =
                    "is missing: set all of TLS_CERT_FILE, TLS_KEY_FILE and TLS_CA_FILE, or none";
                Err(ConfigError::new(name.map_or("TLS_CA_FILE", |(name, _)| name), problem))
            }
        }
    }
}

/// Checks that all addresses have the scheme https:// if certificates are configured, otherwise http://. Each setting may
/// contain several addresses, separated by commas.
pub fn check_schemes(
    config: &TlsConfig,
    addresses: &[(&'static str, &Option<String>)],
) -> Result<(), ConfigError> {
    let (scheme, state) = match config.files()? {
        Some(_) => ("https://", "is set"),
        None => ("http://", "is not set"),
    };
    let fits =
        |address: &str| address.is_empty() || address.split(',').all(|one| one.starts_with(scheme));
    for (name, address) in addresses {
        if !fits(address.as_deref().unwrap_or_default()) {
            let problem = format!("must begin with {scheme}, because TLS_CERT_FILE {state}");
            return Err(ConfigError::new(name, problem));
        }
    }
    Ok(())
}

/// The current certificates. Clones share them.
#[derive(Clone)]
pub struct Tls(Arc<Inner>);

struct Inner {
    files: TlsFiles,
    prefix: String,
    state: Mutex<TlsState>,
}

struct TlsState {
    loaded: Arc<LoadedFiles>,
    /// The problem of the current files.
    problem: Option<String>,
}

/// The parsed content of the files.
struct LoadedFiles {
    digest: [u8; 32],
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    authorities: Arc<RootCertStore>,
    server: Arc<ServerConfig>,
    roles: Vec<&'static str>,
    validity: Validity,
}

impl fmt::Debug for Tls {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_tuple("Tls").field(&self.0.files).finish()
    }
}

impl Tls {
    /// Reads the files.
    pub fn load(files: TlsFiles, prefix: &str) -> anyhow::Result<Tls> {
        let loaded = Arc::new(LoadedFiles::read(&files, prefix)?);
        let state = Mutex::new(TlsState { loaded, problem: None });
        Ok(Tls(Arc::new(Inner { files, prefix: prefix.to_owned(), state })))
    }

    /// The certificates in the settings; `None` if none are configured.
    pub fn from_config(config: &TlsConfig) -> anyhow::Result<Option<Tls>> {
        let Some(files) = config.files()? else { return Ok(None) };
        let invalid =
            |error: anyhow::Error| ConfigError::new("TLS_CERT_FILE", format!("{error:#}"));
        Ok(Some(Tls::load(files, &config.tls_spiffe_prefix).map_err(invalid)?))
    }

    /// The roles in this process's certificate.
    pub fn roles(&self) -> Vec<&'static str> {
        self.state().loaded.roles.clone()
    }

    /// The validity period of this process's certificate.
    pub fn validity(&self) -> Validity {
        self.state().loaded.validity
    }

    /// The roles in a peer's certificate.
    pub fn peer_roles(&self, certificate: &CertificateDer<'_>) -> Vec<&'static str> {
        names::roles(certificate, &self.0.prefix)
    }

    /// The TLS configuration of the mesh port.
    pub fn server(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.state().loaded.server)
    }

    /// The TLS configuration of a connection to a peer with one of these roles or with the host name.
    pub fn client(&self, roles: &[String]) -> anyhow::Result<ClientConfig> {
        let loaded = Arc::clone(&self.state().loaded);
        let verifier = NameOrRoleVerifier {
            chain: server_verifier(&loaded.authorities)?,
            roles: roles.to_vec(),
            prefix: self.0.prefix.clone(),
        };
        let config = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&TLS13])?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier))
            .with_client_auth_cert(loaded.chain.clone(), loaded.key.clone_key())?;
        Ok(with_h2(config))
    }

    /// Reads the files every 2 s; a background task of the server.
    pub async fn watch(self) {
        loop {
            self.reload();
            sleep(RELOAD_INTERVAL).await;
        }
    }

    /// A health check of the files and of the certificate's remaining validity.
    pub fn check(&self) -> HealthCheck {
        let tls = self.clone();
        let run = move || {
            let problem = tls.problem(OffsetDateTime::now_utc().unix_timestamp());
            async move { problem.map_or(Ok(()), Err) }
        };
        HealthCheck::new("certificates", "the mesh's certificates are not renewed", run)
    }

    /// The problem for operators, if there is one. `now` is in seconds since 1970.
    pub fn problem(&self, now: i64) -> Option<String> {
        let state = self.state();
        let validity = state.loaded.validity;
        let expiring = || {
            let remaining = validity.left(now).as_secs();
            let problem = format!("{} ends in {remaining} s", self.0.files.certificate.display());
            validity.is_ending(now).then_some(problem)
        };
        state.problem.clone().or_else(expiring)
    }

    fn reload(&self) {
        let read = LoadedFiles::read(&self.0.files, &self.0.prefix);
        let mut state = self.state();
        match read {
            Ok(loaded) => {
                if loaded.digest != state.loaded.digest {
                    tracing::info!(roles = ?loaded.roles, "certificates were replaced");
                    state.loaded = Arc::new(loaded);
                }
                state.problem = None;
            }
            Err(error) => {
                let problem = format!("{error:#}; what was read before stays in force");
                if state.problem.as_ref() != Some(&problem) {
                    tracing::warn!(problem, "certificates can't be read");
                    state.problem = Some(problem);
                }
            }
        }
        let now = OffsetDateTime::now_utc().unix_timestamp();
        let remaining = state.loaded.validity.left(now).as_secs_f64();
        metrics::gauge!("hapa_certificate_expiry_seconds").set(remaining);
    }

    fn state(&self) -> MutexGuard<'_, TlsState> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl LoadedFiles {
    fn read(files: &TlsFiles, prefix: &str) -> anyhow::Result<LoadedFiles> {
        let read = |path: &PathBuf| {
            std::fs::read(path).with_context(|| format!("reading {}", path.display()))
        };
        let texts = [read(&files.certificate)?, read(&files.key)?, read(&files.authority)?];
        let digest =
            texts.iter().fold(Sha256::new(), |sum, text| sum.chain_update(Sha256::digest(text)));
        let [certificate, key, authority] = &texts;
        let invalid = |path: &PathBuf| format!("{} contains no matching PEM", path.display());
        let chain: Vec<_> = CertificateDer::pem_slice_iter(certificate)
            .collect::<Result<_, _>>()
            .with_context(|| invalid(&files.certificate))?;
        let own = chain.first().with_context(|| invalid(&files.certificate))?;
        let (roles, validity) = (names::roles(own, prefix), Validity::parse(own));
        let validity = validity.with_context(|| invalid(&files.certificate))?;
        let key = PrivateKeyDer::from_pem_slice(key).with_context(|| invalid(&files.key))?;
        let authorities = authorities(authority).with_context(|| invalid(&files.authority))?;
        let callers =
            WebPkiClientVerifier::builder_with_provider(Arc::clone(&authorities), provider());
        let mut server = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&TLS13])?
            .with_client_cert_verifier(callers.build()?)
            .with_single_cert(chain.clone(), key.clone_key())
            .with_context(|| format!("{} is not the certificate's key", files.key.display()))?;
        server.alpn_protocols = vec![H2.to_vec()];
        // With a ticket a client could resume a session of an old certificate.
        server.send_tls13_tickets = 0;
        let (server, digest) = (Arc::new(server), digest.finalize().into());
        Ok(LoadedFiles { digest, chain, key, authorities, server, roles, validity })
    }
}

/// The TLS configuration of a connection without a client certificate. It trusts the authorities in a file, or without
/// one those of the system.
pub fn trust_roots(authority: Option<&PathBuf>) -> anyhow::Result<ClientConfig> {
    let roots = if let Some(file) = authority {
        let text = std::fs::read(file).with_context(|| format!("reading {}", file.display()))?;
        authorities(&text).with_context(|| format!("{} contains no certificate", file.display()))?
    } else {
        let mut roots = RootCertStore::empty();
        roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        Arc::new(roots)
    };
    let config = ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(with_h2(config))
}

fn with_h2(mut config: ClientConfig) -> ClientConfig {
    config.alpn_protocols = vec![H2.to_vec()];
    config.resumption = rustls::client::Resumption::disabled();
    config
}

/// Whether the peer has negotiated HTTP/2.
pub fn negotiated_h2(protocol: Option<&[u8]>) -> bool {
    protocol == Some(H2)
}

fn authorities(text: &[u8]) -> anyhow::Result<Arc<RootCertStore>> {
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(text) {
        roots.add(certificate?)?;
    }
    anyhow::ensure!(!roots.is_empty(), "no certificate");
    Ok(Arc::new(roots))
}

fn server_verifier(roots: &Arc<RootCertStore>) -> anyhow::Result<Arc<WebPkiServerVerifier>> {
    let builder = WebPkiServerVerifier::builder_with_provider(Arc::clone(roots), provider());
    Ok(builder.build()?)
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

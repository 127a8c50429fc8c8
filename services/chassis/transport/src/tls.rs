//! TLS of the mesh port and of what this process dials: one certificate for both ends, from files
//! that may be replaced at any time.
//!
//! Files are read every few seconds. New ones count for new connections; files that don't fit
//! together change nothing and are complained of. Connections end with age, so that all come to
//! the new ones.

pub mod names;
mod verify;

use std::fmt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::Context as _;
use clap::Args;
use hapa_core::config::Wrong;
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

use self::verify::ByNameOrRole;

pub use self::names::Validity;

/// All that is spoken inside.
const H2: &[u8] = b"h2";
/// Between two looks at the files.
const LOOK: Duration = Duration::from_secs(2);

/// What names of roles begin with, where nothing else is set.
pub const PREFIX: &str = "spiffe://hapa/";

/// Settings of certificates.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Certificates")]
#[group(id = "tls")]
pub struct TlsConfig {
    /// This process's certificate and what leads from it to the authority, as PEM. With it the mesh
    /// port speaks TLS 1.3 alone, and certificates prove who is a service, in place of MESH_TOKEN.
    #[arg(long, env = "TLS_CERT_FILE")]
    pub tls_cert_file: Option<PathBuf>,
    /// The key of that certificate, as PEM.
    #[arg(long, env = "TLS_KEY_FILE")]
    pub tls_key_file: Option<PathBuf>,
    /// The authorities whose certificates are believed, as PEM.
    #[arg(long, env = "TLS_CA_FILE")]
    pub tls_ca_file: Option<PathBuf>,
    /// What URI names of certificates begin with that end with a role, such as
    /// spiffe://hapa/ns/hapa/sa/; others prove nothing.
    #[arg(long, env = "TLS_SPIFFE_PREFIX", default_value = PREFIX)]
    pub tls_spiffe_prefix: String,
}

/// The three files.
#[derive(Clone, Debug)]
pub struct Files {
    /// The certificate and its chain.
    pub certificate: PathBuf,
    /// Its key.
    pub key: PathBuf,
    /// The authorities.
    pub authority: PathBuf,
}

impl TlsConfig {
    /// All three files, or none; a part of them is a mistake.
    pub fn files(&self) -> Result<Option<Files>, Wrong> {
        let set = [&self.tls_cert_file, &self.tls_key_file, &self.tls_ca_file];
        match set.map(Clone::clone) {
            [None, None, None] => Ok(None),
            [Some(certificate), Some(key), Some(authority)] => {
                Ok(Some(Files { certificate, key, authority }))
            }
            [certificate, key, _] => {
                let names = ["TLS_CERT_FILE", "TLS_KEY_FILE", "TLS_CA_FILE"];
                let missing = [certificate.is_none(), key.is_none(), true];
                let name = names.into_iter().zip(missing).find(|(_, missing)| *missing);
                let words =
                    "is needed beside the other two of TLS_CERT_FILE, TLS_KEY_FILE and TLS_CA_FILE";
                Err(Wrong::new(name.map_or("TLS_CA_FILE", |(name, _)| name), words))
            }
        }
    }
}

/// Certificates and plain addresses don't go together: whoever set one meant both. Each setting may
/// name several addresses, with commas between.
pub fn check_schemes(
    config: &TlsConfig,
    addresses: &[(&'static str, &Option<String>)],
) -> Result<(), Wrong> {
    let (scheme, why) = match config.files()? {
        Some(_) => ("https://", "is set"),
        None => ("http://", "is not set"),
    };
    let fits =
        |address: &str| address.is_empty() || address.split(',').all(|one| one.starts_with(scheme));
    for (name, address) in addresses {
        if !fits(address.as_deref().unwrap_or_default()) {
            let words = format!("must begin with {scheme}, since TLS_CERT_FILE {why}");
            return Err(Wrong::new(name, words));
        }
    }
    Ok(())
}

/// The certificates in force. Clones are one.
#[derive(Clone)]
pub struct Tls(Arc<Inner>);

struct Inner {
    files: Files,
    prefix: String,
    known: Mutex<Known>,
}

struct Known {
    loaded: Arc<Loaded>,
    /// What is wrong with the files as they are now.
    problem: Option<String>,
}

/// One reading of the files.
struct Loaded {
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
    pub fn load(files: Files, prefix: &str) -> anyhow::Result<Tls> {
        let loaded = Arc::new(Loaded::read(&files, prefix)?);
        let known = Mutex::new(Known { loaded, problem: None });
        Ok(Tls(Arc::new(Inner { files, prefix: prefix.to_owned(), known })))
    }

    /// The certificates that settings name; none where they name none.
    pub fn of(config: &TlsConfig) -> anyhow::Result<Option<Tls>> {
        let Some(files) = config.files()? else { return Ok(None) };
        let wrong = |error: anyhow::Error| Wrong::new("TLS_CERT_FILE", format!("{error:#}"));
        Ok(Some(Tls::load(files, &config.tls_spiffe_prefix).map_err(wrong)?))
    }

    /// What this process's own certificate proves.
    pub fn roles(&self) -> Vec<&'static str> {
        self.known().loaded.roles.clone()
    }

    /// How long its own certificate holds.
    pub fn validity(&self) -> Validity {
        self.known().loaded.validity
    }

    /// What whoever holds this certificate may claim to be.
    pub fn proven(&self, certificate: &CertificateDer<'_>) -> Vec<&'static str> {
        names::roles(certificate, &self.0.prefix)
    }

    pub fn server(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.known().loaded.server)
    }

    /// For dialling whoever has one of these roles, or the name that is dialled.
    pub fn client(&self, roles: &[String]) -> anyhow::Result<ClientConfig> {
        let loaded = Arc::clone(&self.known().loaded);
        let verifier = ByNameOrRole {
            chain: server_verifier(&loaded.authorities)?,
            roles: roles.to_vec(),
            prefix: self.0.prefix.clone(),
        };
        let config = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&TLS13])?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier))
            .with_client_auth_cert(loaded.chain.clone(), loaded.key.clone_key())?;
        Ok(speaking_h2(config))
    }

    /// Looks at the files again and again; the task of a server.
    pub async fn watch(self) {
        loop {
            self.look();
            sleep(LOOK).await;
        }
    }

    /// Whether the files are good, and the certificate is not about to end.
    pub fn check(&self) -> HealthCheck {
        let tls = self.clone();
        let run = move || {
            let problem = tls.problem(OffsetDateTime::now_utc().unix_timestamp());
            async move { problem.map_or(Ok(()), Err) }
        };
        HealthCheck::new("certificates", "the mesh's certificates are not renewed", run)
    }

    /// What an operator has to know of them.
    pub fn problem(&self, now: i64) -> Option<String> {
        let known = self.known();
        let validity = known.loaded.validity;
        let ending = || {
            let left = validity.left(now).as_secs();
            let words = format!("{} ends in {left} s", self.0.files.certificate.display());
            validity.is_ending(now).then_some(words)
        };
        known.problem.clone().or_else(ending)
    }

    fn look(&self) {
        let read = Loaded::read(&self.0.files, &self.0.prefix);
        let mut known = self.known();
        match read {
            Ok(loaded) => {
                if loaded.digest != known.loaded.digest {
                    tracing::info!(roles = ?loaded.roles, "certificates were replaced");
                    known.loaded = Arc::new(loaded);
                }
                known.problem = None;
            }
            Err(error) => {
                let words = format!("{error:#}; what was read before stays in force");
                if known.problem.as_ref() != Some(&words) {
                    tracing::warn!(why = words, "certificates can't be read");
                    known.problem = Some(words);
                }
            }
        }
        let now = OffsetDateTime::now_utc().unix_timestamp();
        let left = known.loaded.validity.left(now).as_secs_f64();
        metrics::gauge!("hapa_certificate_expiry_seconds").set(left);
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.0.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Loaded {
    fn read(files: &Files, prefix: &str) -> anyhow::Result<Loaded> {
        let read = |path: &PathBuf| {
            std::fs::read(path).with_context(|| format!("reading {}", path.display()))
        };
        let texts = [read(&files.certificate)?, read(&files.key)?, read(&files.authority)?];
        let digest =
            texts.iter().fold(Sha256::new(), |sum, text| sum.chain_update(Sha256::digest(text)));
        let [certificate, key, authority] = &texts;
        let holds = |path: &PathBuf| format!("{} holds no PEM that fits", path.display());
        let chain: Vec<_> = CertificateDer::pem_slice_iter(certificate)
            .collect::<Result<_, _>>()
            .with_context(|| holds(&files.certificate))?;
        let own = chain.first().with_context(|| holds(&files.certificate))?;
        let (roles, validity) = (names::roles(own, prefix), Validity::of(own));
        let validity = validity.with_context(|| holds(&files.certificate))?;
        let key = PrivateKeyDer::from_pem_slice(key).with_context(|| holds(&files.key))?;
        let authorities = authorities(authority).with_context(|| holds(&files.authority))?;
        let callers =
            WebPkiClientVerifier::builder_with_provider(Arc::clone(&authorities), provider());
        let mut server = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&TLS13])?
            .with_client_cert_verifier(callers.build()?)
            .with_single_cert(chain.clone(), key.clone_key())
            .with_context(|| format!("{} is not its key", files.key.display()))?;
        server.alpn_protocols = vec![H2.to_vec()];
        // A ticket would bring an old certificate back.
        server.send_tls13_tickets = 0;
        let (server, digest) = (Arc::new(server), digest.finalize().into());
        Ok(Loaded { digest, chain, key, authorities, server, roles, validity })
    }
}

/// For dialling without a certificate, whoever the authorities in a file vouch for; with no file
/// those of this machine.
pub fn believing(authority: Option<&PathBuf>) -> anyhow::Result<ClientConfig> {
    let roots = if let Some(file) = authority {
        let text = std::fs::read(file).with_context(|| format!("reading {}", file.display()))?;
        authorities(&text).with_context(|| format!("{} holds no certificate", file.display()))?
    } else {
        let mut roots = RootCertStore::empty();
        roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        Arc::new(roots)
    };
    let config = ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(speaking_h2(config))
}

fn speaking_h2(mut config: ClientConfig) -> ClientConfig {
    config.alpn_protocols = vec![H2.to_vec()];
    config.resumption = rustls::client::Resumption::disabled();
    config
}

/// Whether the other end agreed to speak HTTP/2.
pub fn speaks_h2(protocol: Option<&[u8]>) -> bool {
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

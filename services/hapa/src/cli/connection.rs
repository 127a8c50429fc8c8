//! The connection of a command to the mesh, and its credential.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use hapa_core::access::SERVICE_ROLES;
use hapa_transport::balancer::BalancedChannel;
use hapa_transport::connect::TransportSecurity;
use hapa_transport::peer::MESH_TOKEN;
use hapa_transport::tls::{DEFAULT_SPIFFE_PREFIX, Tls, TlsFiles, trust_roots};
use secrecy::{ExposeSecret as _, SecretString};
use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::{Request, Status};

use crate::cli::{CliError, session_file};

/// Prefix of every key; an access token never starts with it.
const KEY_PREFIX: &str = "hapa_";

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// The address of the mesh, its trust roots, and the local data directory.
#[derive(clap::Args, Clone, Debug)]
#[command(next_help_heading = "Connection")]
pub(super) struct ServerAddress {
    /// URL of the mesh or its gateway, http:// or https://.
    #[arg(long, env = "HAPA_ADDRESS", default_value = "http://127.0.0.1:50051")]
    address: String,
    /// Directory of the credentials: the secrets of a mesh on this machine, and the session of
    /// `hapa session login`.
    #[arg(long, env = "DATA_DIR", default_value = "data")]
    data_dir: PathBuf,
    /// PEM file of the certificate authorities for an https:// address; default: those of this machine.
    #[arg(long, env = "HAPA_CA_FILE", value_name = "FILE")]
    ca_file: Option<PathBuf>,
    /// PEM file of the client certificate. With mutual TLS, an operator's certificate replaces every other
    /// credential.
    #[arg(
        long,
        env = "HAPA_CERT_FILE",
        value_name = "FILE",
        requires = "key_file",
        requires = "ca_file"
    )]
    cert_file: Option<PathBuf>,
    /// PEM file of the client certificate's private key.
    #[arg(long, env = "HAPA_KEY_FILE", value_name = "FILE", requires = "cert_file")]
    key_file: Option<PathBuf>,
    /// Prefix of the URI names in service certificates. With a client certificate, a server is accepted under
    /// any address if its URI name is this prefix and a role of the mesh.
    #[arg(long, env = "TLS_SPIFFE_PREFIX", default_value = DEFAULT_SPIFFE_PREFIX)]
    tls_spiffe_prefix: String,
}

/// The address of the mesh and the credential of the caller.
#[derive(clap::Args, Clone, Debug)]
#[command(next_help_heading = "Connection")]
pub(super) struct ConnectionArgs {
    #[command(flatten)]
    server: ServerAddress,
    /// API key or access token to present; takes precedence over --as-me. Default: the credential in DATA_DIR.
    #[arg(long, env = "HAPA_API_KEY", hide_env_values = true)]
    api_key: Option<SecretString>,
    /// Call as the user of `hapa session login`, with the session in DATA_DIR/session.
    #[arg(long)]
    as_me: bool,
    /// Mesh token, for an operator without a key; default: DATA_DIR/mesh-token.
    #[arg(long, env = "MESH_TOKEN", hide_env_values = true)]
    mesh_token: Option<SecretString>,
}

/// A channel that adds its credential to every call.
pub(super) type Connection = InterceptedService<BalancedChannel, CallCredential>;

/// One metadata entry for every call, or none.
#[derive(Clone)]
pub(super) struct CallCredential(Option<(&'static str, MetadataValue<Ascii>)>);

impl CallCredential {
    const NONE: CallCredential = CallCredential(None);

    fn new(name: &'static str, secret: &str) -> Result<Self, CliError> {
        let value = secret.trim().parse();
        let mut value: MetadataValue<Ascii> = value.map_err(|_| {
            anyhow::anyhow!("the credential holds characters other than visible ASCII")
        })?;
        value.set_sensitive(true);
        Ok(CallCredential(Some((name, value))))
    }

    /// A key, recognised by its prefix, or else an access token.
    fn key_or_token(secret: &str) -> Result<Self, CliError> {
        match secret.trim() {
            key if key.starts_with(KEY_PREFIX) => CallCredential::new("x-api-key", key),
            token => CallCredential::new("authorization", &format!("Bearer {token}")),
        }
    }
}

impl Interceptor for CallCredential {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some((name, value)) = &self.0 {
            request.metadata_mut().insert(*name, value.clone());
        }
        Ok(request)
    }
}

impl ServerAddress {
    /// Connects without a credential, for calls whose message carries one.
    pub(super) async fn connect_unauthenticated(&self) -> Result<Connection, CliError> {
        self.connect(CallCredential::NONE).await
    }

    /// Connects with an access token.
    pub(super) async fn connect_with_token(&self, token: &str) -> Result<Connection, CliError> {
        self.connect(CallCredential::key_or_token(token)?).await
    }

    /// The file in which a login stores its session.
    pub(super) fn session_file(&self) -> PathBuf {
        self.data_dir.join("session")
    }

    async fn connect(&self, credential: CallCredential) -> Result<Connection, CliError> {
        let channel = BalancedChannel::new(&self.address, self.security()?, CONNECT_TIMEOUT)?;
        let context = || {
            format!("no mesh answers at {}; start one with `make run` or `hapa all`", self.address)
        };
        // The status message is the cause; the code adds nothing.
        let connected = channel.connect().await;
        connected
            .map_err(|status| anyhow::anyhow!("{}", status.message()))
            .with_context(context)?;
        Ok(InterceptedService::new(channel, credential))
    }

    fn security(&self) -> anyhow::Result<TransportSecurity> {
        if !self.address.starts_with("https://") {
            return Ok(TransportSecurity::Plaintext);
        }
        match (&self.cert_file, &self.key_file, &self.ca_file) {
            (Some(certificate), Some(key), Some(authority)) => {
                let (certificate, key) = (certificate.clone(), key.clone());
                let files = TlsFiles { certificate, key, authority: authority.clone() };
                let roles = SERVICE_ROLES.iter().map(|&role| role.to_owned()).collect();
                Ok(TransportSecurity::MutualTls(Tls::load(files, &self.tls_spiffe_prefix)?, roles))
            }
            (_, _, authority) => {
                Ok(TransportSecurity::ServerTls(Arc::new(trust_roots(authority.as_ref())?)))
            }
        }
    }
}

impl ConnectionArgs {
    /// Connects as a user: with the explicit credential, else the development key in DATA_DIR.
    pub(super) async fn connect_as_user(&self) -> Result<Connection, CliError> {
        let credential = match self.explicit_credential().await? {
            Some(credential) => credential,
            None => self.credential_file("x-api-key", "dev-key", "set HAPA_API_KEY")?,
        };
        self.server.connect(credential).await
    }

    /// Connects as an operator: with the explicit credential, else MESH_TOKEN, else the client certificate, else
    /// the mesh token in DATA_DIR.
    pub(super) async fn connect_as_operator(&self) -> Result<Connection, CliError> {
        let credential = match (self.explicit_credential().await?, &self.mesh_token) {
            (Some(credential), _) => credential,
            (None, Some(token)) => CallCredential::new(MESH_TOKEN, token.expose_secret())?,
            (None, None) if self.server.cert_file.is_some() => CallCredential::NONE,
            (None, None) => {
                let advice = "set HAPA_API_KEY or MESH_TOKEN, pass --as-me";
                self.credential_file(MESH_TOKEN, "mesh-token", advice)?
            }
        };
        self.server.connect(credential).await
    }

    /// Connects with the key in a file.
    pub(super) async fn connect_with_key_file(&self, file: &Path) -> Result<Connection, CliError> {
        let text = std::fs::read_to_string(file);
        let key = text.with_context(|| format!("cannot read {}", file.display()))?;
        self.server.connect(CallCredential::key_or_token(&key)?).await
    }

    /// Whether the credential belongs to a user; the mesh token belongs to none.
    pub(super) fn has_identity(&self) -> bool {
        self.as_me || self.explicit_key().is_some()
    }

    /// HAPA_API_KEY; an empty variable counts as not set.
    fn explicit_key(&self) -> Option<&str> {
        let key = self.api_key.as_ref().map(|key| key.expose_secret().trim());
        key.filter(|key| !key.is_empty())
    }

    /// HAPA_API_KEY, or with --as-me the session in DATA_DIR.
    async fn explicit_credential(&self) -> Result<Option<CallCredential>, CliError> {
        match self.explicit_key() {
            Some(key) => {
                if self.as_me {
                    let mut stderr = anstream::stderr();
                    writeln!(
                        stderr,
                        "note: HAPA_API_KEY is set and takes precedence over --as-me"
                    )?;
                }
                CallCredential::key_or_token(key).map(Some)
            }
            None if self.as_me => {
                let session = session_file::load_fresh(&self.server).await?;
                CallCredential::key_or_token(&session.access_token).map(Some)
            }
            None => Ok(None),
        }
    }

    fn credential_file(
        &self,
        name: &'static str,
        file: &str,
        advice: &str,
    ) -> Result<CallCredential, CliError> {
        let file = self.server.data_dir.join(file);
        let context = || {
            format!("no credential: {advice}, or set DATA_DIR so that {} exists", file.display())
        };
        CallCredential::new(name, &std::fs::read_to_string(&file).with_context(context)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(secret: &str) -> (&'static str, String) {
        let (name, value) = CallCredential::key_or_token(secret).unwrap().0.unwrap();
        (name, value.to_str().unwrap().to_owned())
    }

    #[test]
    fn a_key_is_distinguished_from_an_access_token() {
        assert_eq!(entry("hapa_abc\n"), ("x-api-key", "hapa_abc".to_owned()));
        assert_eq!(entry("eyJ.a.b"), ("authorization", "Bearer eyJ.a.b".to_owned()));
    }
}

//! How a command reaches the mesh, and with which credential.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use hapa_core::access::SERVICES;
use hapa_transport::balancer::Balanced;
use hapa_transport::connect::Secure;
use hapa_transport::peer::MESH_TOKEN;
use hapa_transport::tls::{Files, PREFIX, Tls, believing};
use secrecy::{ExposeSecret as _, SecretString};
use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::{Request, Status};

use crate::cli::{Failure, session};

/// How every text of a key begins; an access token never does.
const KEY_PREFIX: &str = "hapa_";

/// How long it may take to connect.
const PATIENCE: Duration = Duration::from_secs(5);

/// Where the mesh is, and where this machine keeps what it knows of it.
#[derive(clap::Args, Clone, Debug)]
#[command(next_help_heading = "Connection")]
#[group(id = "place_args")]
pub(super) struct Place {
    /// The mesh.
    #[arg(long, env = "HAPA_ADDRESS", default_value = "http://127.0.0.1:50051")]
    address: String,
    /// Where a mesh on this machine keeps its secrets, and a login its session.
    #[arg(long, env = "DATA_DIR", default_value = "data")]
    data_dir: PathBuf,
    /// The authorities, as PEM, that vouch for an https:// address; default: those of this machine.
    #[arg(long, env = "HAPA_CA_FILE", value_name = "FILE")]
    ca_file: Option<PathBuf>,
    /// The certificate to show, as PEM: an operator's needs no other credential where certificates
    /// are in force.
    #[arg(
        long,
        env = "HAPA_CERT_FILE",
        value_name = "FILE",
        requires = "key_file",
        requires = "ca_file"
    )]
    cert_file: Option<PathBuf>,
    /// The key of that certificate, as PEM.
    #[arg(long, env = "HAPA_KEY_FILE", value_name = "FILE", requires = "cert_file")]
    key_file: Option<PathBuf>,
    /// What URI names of certificates begin with: whoever has a role of the mesh by one is believed
    /// under any address, where a certificate is shown.
    #[arg(long, env = "TLS_SPIFFE_PREFIX", default_value = PREFIX)]
    tls_spiffe_prefix: String,
}

/// Where the mesh is and who asks.
#[derive(clap::Args, Clone, Debug)]
#[command(next_help_heading = "Connection")]
#[group(id = "connection_args")]
pub(super) struct Args {
    #[command(flatten)]
    place: Place,
    /// The key to present, or an access token; wins over --as-me; default: what DATA_DIR holds.
    #[arg(long, env = "HAPA_API_KEY", hide_env_values = true)]
    api_key: Option<SecretString>,
    /// Ask as the user whom `hapa session login` logged in: with the session in DATA_DIR/session.
    #[arg(long)]
    as_me: bool,
    /// The mesh token, for an operator who has no key yet; default: DATA_DIR/mesh-token.
    #[arg(long, env = "MESH_TOKEN", hide_env_values = true)]
    mesh_token: Option<SecretString>,
}

/// A channel that presents its credential.
pub(super) type Connection = InterceptedService<Balanced, Credential>;

/// One metadata entry on every call, or none.
#[derive(Clone)]
pub(super) struct Credential(Option<(&'static str, MetadataValue<Ascii>)>);

impl Credential {
    const NONE: Credential = Credential(None);

    fn new(name: &'static str, text: &str) -> Result<Self, Failure> {
        let value = text.trim().parse();
        let mut value: MetadataValue<Ascii> =
            value.map_err(|_| anyhow::anyhow!("the credential is not plain text"))?;
        value.set_sensitive(true);
        Ok(Credential(Some((name, value))))
    }

    /// A key by its prefix, an access token else.
    fn presented(text: &str) -> Result<Self, Failure> {
        match text.trim() {
            key if key.starts_with(KEY_PREFIX) => Credential::new("x-api-key", key),
            token => Credential::new("authorization", &format!("Bearer {token}")),
        }
    }
}

impl Interceptor for Credential {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some((name, value)) = &self.0 {
            request.metadata_mut().insert(*name, value.clone());
        }
        Ok(request)
    }
}

impl Place {
    /// Without a credential, for calls that bring their own.
    pub(super) async fn as_nobody(&self) -> Result<Connection, Failure> {
        self.connect(Credential::NONE).await
    }

    /// With an access token.
    pub(super) async fn as_session(&self, access_token: &str) -> Result<Connection, Failure> {
        self.connect(Credential::presented(access_token)?).await
    }

    /// Where a login keeps its session.
    pub(super) fn session_file(&self) -> PathBuf {
        self.data_dir.join("session")
    }

    async fn connect(&self, credential: Credential) -> Result<Connection, Failure> {
        let channel = Balanced::new(&self.address, self.secure()?, PATIENCE)?;
        let words =
            || format!("no mesh answers at {}; `make run` or `hapa all` starts one", self.address);
        // The words of the status are the cause; its code says nothing more.
        let connected = channel.connect().await;
        connected.map_err(|status| anyhow::anyhow!("{}", status.message())).with_context(words)?;
        Ok(InterceptedService::new(channel, credential))
    }

    fn secure(&self) -> anyhow::Result<Secure> {
        if !self.address.starts_with("https://") {
            return Ok(Secure::No);
        }
        match (&self.cert_file, &self.key_file, &self.ca_file) {
            (Some(certificate), Some(key), Some(authority)) => {
                let (certificate, key) = (certificate.clone(), key.clone());
                let files = Files { certificate, key, authority: authority.clone() };
                let roles = SERVICES.iter().map(|&role| role.to_owned()).collect();
                Ok(Secure::Mutual(Tls::load(files, &self.tls_spiffe_prefix)?, roles))
            }
            (_, _, authority) => Ok(Secure::Believing(Arc::new(believing(authority.as_ref())?))),
        }
    }
}

impl Args {
    /// As a user: with the given key, else the session where that is asked for, else the
    /// development key.
    pub(super) async fn as_user(&self) -> Result<Connection, Failure> {
        let credential = match self.given().await? {
            Some(credential) => credential,
            None => self.kept("x-api-key", "dev-key", "HAPA_API_KEY")?,
        };
        self.place.connect(credential).await
    }

    /// As an operator: with the given key, else the session where that is asked for, else the mesh
    /// token.
    pub(super) async fn as_operator(&self) -> Result<Connection, Failure> {
        let credential = match (self.given().await?, &self.mesh_token) {
            (Some(credential), _) => credential,
            (None, Some(token)) => Credential::new(MESH_TOKEN, token.expose_secret())?,
            // The certificate says who asks.
            (None, None) if self.place.cert_file.is_some() => Credential::NONE,
            (None, None) => {
                self.kept(MESH_TOKEN, "mesh-token", "HAPA_API_KEY or MESH_TOKEN, pass --as-me")?
            }
        };
        self.place.connect(credential).await
    }

    /// With the key in a file.
    pub(super) async fn as_holder(&self, file: &Path) -> Result<Connection, Failure> {
        let text = std::fs::read_to_string(file);
        let key = text.with_context(|| format!("reading {}", file.display()))?;
        self.place.connect(Credential::presented(&key)?).await
    }

    /// Whether someone in particular asks: the mesh token is nobody's.
    pub(super) fn has_me(&self) -> bool {
        self.as_me || self.key().is_some()
    }

    /// The key or token that was set; a variable that is there but empty sets nothing.
    fn key(&self) -> Option<&str> {
        let key = self.api_key.as_ref().map(|key| key.expose_secret().trim());
        key.filter(|key| !key.is_empty())
    }

    async fn given(&self) -> Result<Option<Credential>, Failure> {
        match self.key() {
            Some(key) => {
                if self.as_me {
                    let mut notes = anstream::stderr();
                    writeln!(notes, "note: HAPA_API_KEY is set, and wins over --as-me")?;
                }
                Credential::presented(key).map(Some)
            }
            None if self.as_me => {
                let session = session::kept::fresh(&self.place).await?;
                Credential::presented(&session.access_token).map(Some)
            }
            None => Ok(None),
        }
    }

    fn kept(&self, name: &'static str, file: &str, setting: &str) -> Result<Credential, Failure> {
        let file = self.place.data_dir.join(file);
        let missing =
            || format!("no credential: set {setting}, or run where {} is", file.display());
        Credential::new(name, &std::fs::read_to_string(&file).with_context(missing)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(text: &str) -> (&'static str, String) {
        let (name, value) = Credential::presented(text).unwrap().0.unwrap();
        (name, value.to_str().unwrap().to_owned())
    }

    #[test]
    fn a_key_is_told_from_an_access_token() {
        assert_eq!(entry("hapa_abc\n"), ("x-api-key", "hapa_abc".to_owned()));
        assert_eq!(entry("eyJ.a.b"), ("authorization", "Bearer eyJ.a.b".to_owned()));
    }
}

//! How a command reaches the mesh, and with which credential.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use hapa_chassis::peer::MESH_TOKEN;
use secrecy::{ExposeSecret as _, SecretString};
use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status};

use crate::cli::Failure;

/// Where the mesh is and who asks.
#[derive(clap::Args, Clone, Debug)]
#[command(next_help_heading = "Connection")]
#[group(id = "connection_args")]
pub(super) struct Args {
    /// The mesh.
    #[arg(long, env = "HAPA_ADDRESS", default_value = "http://127.0.0.1:50051")]
    address: String,
    /// The key to present; default: what DATA_DIR holds.
    #[arg(long, env = "HAPA_API_KEY", hide_env_values = true)]
    api_key: Option<SecretString>,
    /// The mesh token, for an operator who has no key yet; default: DATA_DIR/mesh-token.
    #[arg(long, env = "MESH_TOKEN", hide_env_values = true)]
    mesh_token: Option<SecretString>,
    /// Where a mesh on this machine keeps its secrets.
    #[arg(long, env = "DATA_DIR", default_value = "data")]
    data_dir: PathBuf,
}

/// A channel that presents its credential.
pub(super) type Connection = InterceptedService<Channel, Credential>;

/// One metadata entry on every call.
#[derive(Clone)]
pub(super) struct Credential {
    name: &'static str,
    value: MetadataValue<Ascii>,
}

impl Credential {
    fn new(name: &'static str, secret: &SecretString) -> Result<Self, Failure> {
        let value = secret.expose_secret().trim().parse();
        let mut value: MetadataValue<Ascii> =
            value.map_err(|_| anyhow::anyhow!("the credential is not plain text"))?;
        value.set_sensitive(true);
        Ok(Credential { name, value })
    }
}

impl Interceptor for Credential {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        request.metadata_mut().insert(self.name, self.value.clone());
        Ok(request)
    }
}

impl Args {
    /// As a user: with the given key, else the development key.
    pub(super) async fn as_user(&self) -> Result<Connection, Failure> {
        let credential = match &self.api_key {
            Some(key) => Credential::new("x-api-key", key)?,
            None => self.kept("x-api-key", "dev-key", "HAPA_API_KEY")?,
        };
        self.connect(credential).await
    }

    /// As an operator: with the given key, else the mesh token.
    pub(super) async fn as_operator(&self) -> Result<Connection, Failure> {
        let credential = match (&self.api_key, &self.mesh_token) {
            (Some(key), _) => Credential::new("x-api-key", key)?,
            (None, Some(token)) => Credential::new(MESH_TOKEN, token)?,
            (None, None) => self.kept(MESH_TOKEN, "mesh-token", "HAPA_API_KEY or MESH_TOKEN")?,
        };
        self.connect(credential).await
    }

    /// With the key in a file.
    pub(super) async fn as_holder(&self, file: &Path) -> Result<Connection, Failure> {
        let text = std::fs::read_to_string(file);
        let key = text.with_context(|| format!("reading {}", file.display()))?;
        self.connect(Credential::new("x-api-key", &key.into())?).await
    }

    fn kept(&self, name: &'static str, file: &str, setting: &str) -> Result<Credential, Failure> {
        let file = self.data_dir.join(file);
        let missing =
            || format!("no credential: set {setting}, or run where {} is", file.display());
        let text = std::fs::read_to_string(&file).with_context(missing)?;
        Credential::new(name, &text.into())
    }

    async fn connect(&self, credential: Credential) -> Result<Connection, Failure> {
        let endpoint = Endpoint::from_shared(self.address.clone())
            .with_context(|| format!("{} is not an address like http://host:port", self.address))?;
        let channel =
            endpoint.connect_timeout(Duration::from_secs(5)).tcp_nodelay(true).connect().await;
        let words =
            || format!("no mesh answers at {}; `make run` or `hapa all` starts one", self.address);
        Ok(InterceptedService::new(channel.with_context(words)?, credential))
    }
}

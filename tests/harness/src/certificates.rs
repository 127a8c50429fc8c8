//! A mesh with certificates: each role has a port of its own in this process, with certificates that
//! `infra/certs` creates.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use hapa::{Roles, run};
use hapa_engine_sim::Engine;
use hapa_server::Listeners;
use hapa_transport::balancer::BalancedChannel;
use hapa_transport::connect::TransportSecurity;
use hapa_transport::tls::{Tls, TlsFiles};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use tempfile::TempDir;
use tokio::net::{TcpListener, TcpStream};
use tokio::process::Command;
use tokio::task::JoinSet;
use tokio_rustls::{TlsAcceptor, TlsConnector};
use tokio_util::sync::CancellationToken;

use crate::gateway::Gateway;
use crate::test_mesh::{reqwest_client, roles};
use crate::tools::{Metrics, root, within};

/// The roles.
const ROLES: [&str; 4] = ["auth", "codegen", "errors", "analytics"];

/// Time limit of a connection on a busy machine.
const WAIT_TIMEOUT: Duration = Duration::from_secs(30);

/// An authority with certificates for every role. Dropping it removes them.
#[derive(Debug)]
pub struct Certificates {
    folder: TempDir,
    /// The script's option for the names in the certificates.
    names: &'static [(&'static str, &'static str)],
}

impl Certificates {
    /// Creates an authority; its certificates contain DNS names, URIs and the addresses of loopback.
    pub async fn make() -> Certificates {
        Certificates::named(&[]).await
    }

    /// Creates an authority; its certificates contain only a URI.
    pub async fn make_spiffe() -> Certificates {
        Certificates::named(&[("SPIFFE_ONLY", "1")]).await
    }

    async fn named(names: &'static [(&'static str, &'static str)]) -> Certificates {
        let folder = tempfile::tempdir().expect("a folder for the test");
        let made = Certificates { folder, names };
        made.renew().await;
        made
    }

    /// Replaces the certificates by new ones of the same authority.
    pub async fn renew(&self) {
        let mut script = Command::new(root().join("infra/certs"));
        script.arg(self.folder.path()).envs(self.names.iter().copied());
        let done = within("certificates", script.kill_on_drop(true).output());
        let done = done.await.expect("infra/certs runs");
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    }

    /// Makes these authorities, and no others, the trusted ones of every certificate holder.
    pub fn trust(&self, authorities: &[&Certificates]) {
        let pem = |of: &&Certificates| std::fs::read_to_string(of.authority()).expect("a file");
        let bundle: String = authorities.iter().map(pem).collect();
        for role in self.roles() {
            let file = self.files(&role).authority;
            std::fs::write(file, &bundle).expect("a file can be written");
        }
    }

    /// Replaces the certificates of every role by those of another authority. The previous ones are moved to
    /// `kept`.
    pub fn trade(&self, others: &Certificates, kept: &Path) {
        for role in self.roles() {
            let (own, new) = (self.files(&role), others.files(&role));
            std::fs::create_dir_all(kept.join(&role)).expect("a folder");
            for (own, new) in [(own.certificate, new.certificate), (own.key, new.key)] {
                let name = own.file_name().expect("it has a name");
                std::fs::copy(&own, kept.join(&role).join(name)).expect("it can be kept");
                std::fs::copy(new, own).expect("it can be replaced");
            }
        }
    }

    fn roles(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.folder.path()).expect("a folder");
        let folders = entries.map(|entry| entry.expect("an entry")).filter(|e| e.path().is_dir());
        folders.map(|entry| entry.file_name().into_string().expect("a role")).collect()
    }

    /// The files of a role.
    pub fn files(&self, role: &str) -> TlsFiles {
        let folder = self.folder.path().join(role);
        let [certificate, key, authority] =
            ["tls.crt", "tls.key", "ca.crt"].map(|f| folder.join(f));
        TlsFiles { certificate, key, authority }
    }

    /// The certificate of the authority.
    pub fn authority(&self) -> PathBuf {
        self.folder.path().join("ca.crt")
    }

    /// The settings that give a process the certificate of a role.
    pub fn settings(&self, role: &str) -> [(&'static str, String); 3] {
        let files = self.files(role);
        let text = |path: &Path| path.display().to_string();
        [
            ("TLS_CERT_FILE", text(&files.certificate)),
            ("TLS_KEY_FILE", text(&files.key)),
            ("TLS_CA_FILE", text(&files.authority)),
        ]
    }

    /// A TLS connector with a role's certificate, for calls on the byte level.
    pub fn connector(&self, role: &str) -> TlsConnector {
        let files = self.files(role);
        let read = |path| {
            CertificateDer::pem_file_iter(path)
                .expect("a file")
                .map(|one| one.expect("a certificate"))
        };
        let mut trusted = RootCertStore::empty();
        trusted.add_parsable_certificates(read(files.authority));
        let key = PrivateKeyDer::from_pem_file(files.key).expect("a key");
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config =
            ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
        let config = config.expect("TLS").with_root_certificates(trusted);
        let own = read(files.certificate).collect();
        let mut config = config.with_client_auth_cert(own, key).expect("a key and its certificate");
        config.alpn_protocols = vec![b"h2".to_vec()];
        TlsConnector::from(Arc::new(config))
    }

    /// A port with TLS and a role's certificate in front of a plain one. It is open until the tasks are
    /// dropped.
    pub async fn in_front_of(&self, behind: SocketAddr, role: &str) -> (SocketAddr, JoinSet<()>) {
        let files = self.files(role);
        let chain = CertificateDer::pem_file_iter(files.certificate).expect("a file");
        let chain = chain.map(|one| one.expect("a certificate")).collect();
        let key = PrivateKeyDer::from_pem_file(files.key).expect("a key");
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config =
            ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
        let config = config.expect("TLS").with_no_client_auth().with_single_cert(chain, key);
        let mut config = config.expect("a key and its certificate");
        config.alpn_protocols = vec![b"h2".to_vec()];
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("a bound port");
        let mut serving = JoinSet::new();
        serving.spawn(async move {
            let mut open = JoinSet::new();
            while let Ok((socket, _)) = listener.accept().await {
                let acceptor = acceptor.clone();
                open.spawn(async move {
                    let mut outer = acceptor.accept(socket).await?;
                    let mut inner = TcpStream::connect(behind).await?;
                    tokio::io::copy_bidirectional(&mut outer, &mut inner).await
                });
            }
        });
        (address, serving)
    }

    /// A channel to `address` that presents a role's certificate.
    pub fn dial(&self, role: &str, address: SocketAddr) -> BalancedChannel {
        dial(self.files(role), address)
    }
}

/// A channel to `address` that presents these files, and trusts any service of the mesh.
pub fn dial(files: TlsFiles, address: SocketAddr) -> BalancedChannel {
    let tls = Tls::load(files, "spiffe://hapa/").expect("certificates");
    let secure = TransportSecurity::MutualTls(tls, ROLES.map(str::to_owned).to_vec());
    BalancedChannel::new(&format!("https://{address}"), secure, WAIT_TIMEOUT).expect("an address")
}

/// A mesh with certificates: each role has a port of its own in this process.
#[derive(Debug)]
pub struct MtlsCluster {
    /// The certificates of all roles.
    pub certificates: Certificates,
    /// The engine behind code generation.
    pub engine: Engine,
    places: Vec<(&'static str, SocketAddr, SocketAddr)>,
    shutdown: CancellationToken,
    running: JoinSet<anyhow::Result<()>>,
    _folder: TempDir,
}

impl MtlsCluster {
    /// Starts every role with these flags.
    pub async fn start(flags: &[&str]) -> MtlsCluster {
        MtlsCluster::start_with(Certificates::make().await, flags).await
    }

    /// Starts every role with these certificates and flags.
    pub async fn start_with(certificates: Certificates, flags: &[&str]) -> MtlsCluster {
        let engine = Engine::start();
        let folder = tempfile::tempdir().expect("a folder for the test");
        let mut prepared = Vec::new();
        for role in ROLES {
            let data = folder.path().join(role);
            let always = [
                "hapa".to_owned(),
                "--port=0".to_owned(),
                "--metrics-port=0".to_owned(),
                "--log-level=off".to_owned(),
                "--cache-ttl=0".to_owned(),
                format!("--data-dir={}", data.display()),
                format!("--ai-model-endpoint={}", engine.url()),
            ];
            let own = certificates.settings(role).map(|(name, value)| {
                format!("--{}={value}", name.to_lowercase().replace('_', "-"))
            });
            let flags = flags.iter().map(|&flag| flag.to_owned());
            let roles = roles(always.into_iter().chain(own).chain(flags));
            let listeners = Listeners::bind(&roles.server).await.expect("free ports");
            prepared.push((role, roles, listeners));
        }
        let place = |(role, _, listeners): &(&'static str, Roles, Listeners)| {
            let mesh = listeners.mesh.local_addr().expect("a bound port");
            (*role, mesh, listeners.metrics.local_addr().expect("a bound port"))
        };
        let places: Vec<_> = prepared.iter().map(place).collect();
        let (shutdown, mut running) = (CancellationToken::new(), JoinSet::new());
        for (role, roles, listeners) in prepared {
            let roles = alone(role, roles, &places);
            running.spawn(run(roles, listeners, None, shutdown.clone().cancelled_owned()));
        }
        MtlsCluster { certificates, engine, places, shutdown, running, _folder: folder }
    }

    /// The gRPC address of a role.
    pub fn mesh(&self, role: &str) -> SocketAddr {
        self.place(role).0
    }

    /// A channel to one role that presents another role's certificate.
    pub fn dial(&self, by: &str, to: &str) -> BalancedChannel {
        self.certificates.dial(by, self.mesh(to))
    }

    /// Starts a gateway with its own certificate towards the mesh, and with these settings.
    pub async fn gateway(&self, more: &[(&str, &str)]) -> Gateway {
        let own = self.certificates.settings("gateway");
        let places = ROLES
            .map(|role| (format!("{}_ADDRESS", role.to_uppercase()), self.mesh(role)))
            .map(|(name, mesh)| (name, format!("https://{mesh}")));
        let own = own.iter().map(|(name, value)| (*name, value.as_str()));
        let places = places.iter().map(|(name, value)| (name.as_str(), value.as_str()));
        let settings: Vec<_> = own.chain(places).chain(more.iter().copied()).collect();
        Gateway::with(&settings).await
    }

    /// A page of a role's metrics port.
    pub async fn page(&self, role: &str, path: &str) -> String {
        let url = format!("http://{}{path}", self.place(role).1);
        let reply = within(path, reqwest_client().get(url).send()).await.expect("the port listens");
        within(path, reply.text()).await.expect("text")
    }

    /// The present metrics of all roles together.
    pub async fn metrics(&self) -> Metrics {
        Metrics(self.page("auth", "/metrics").await)
    }

    /// Stops every role, and waits until all have stopped.
    pub async fn finish(mut self) {
        self.shutdown.cancel();
        while let Some(done) = within("a role to end", self.running.join_next()).await {
            done.expect("it did not panic").expect("it ended cleanly");
        }
    }

    fn place(&self, role: &str) -> (SocketAddr, SocketAddr) {
        let found = self.places.iter().find(|(known, ..)| *known == role);
        found.map(|(_, mesh, metrics)| (*mesh, *metrics)).expect("a role that serves")
    }
}

/// Starts one role with the addresses of the others.
fn alone(role: &str, all: Roles, places: &[(&'static str, SocketAddr, SocketAddr)]) -> Roles {
    let at = |name: &str| {
        let found = places.iter().find(|(known, ..)| *known == name && name != role);
        found.map(|(_, mesh, _)| format!("https://{mesh}"))
    };
    let mut server = all.server;
    server.auth_address = at("auth");
    server.errors_address = at("errors");
    server.analytics_address = at("analytics");
    Roles {
        server,
        auth: all.auth.filter(|_| role == "auth"),
        codegen: all.codegen.filter(|_| role == "codegen"),
        errors: all.errors.filter(|_| role == "errors"),
        analytics: all.analytics.filter(|_| role == "analytics"),
        settings: Vec::new(),
    }
}

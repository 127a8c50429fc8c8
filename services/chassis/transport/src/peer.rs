//! Authenticated channels to other services. A channel connects on first use and reconnects after a failure. Callers
//! must set a timeout for each call, because a call may try several replicas.

use std::net::SocketAddr;
use std::time::Duration;

use hapa_core::config::ConfigError;
use hapa_proto::analytics::v1::analytics_service_client::AnalyticsServiceClient;
use hapa_proto::auth::v1::auth_service_client::AuthServiceClient;
use hapa_proto::errors::v1::error_tracking_service_client::ErrorTrackingServiceClient;
use hmac::{Hmac, KeyInit as _, Mac as _};
use secrecy::{ExposeSecret as _, SecretString};
use sha2::Sha256;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::{Request, Status};

use crate::balancer::BalancedChannel;
use crate::connect::TransportSecurity;
use crate::tls::Tls;
use crate::tracing_channel::TracingChannel;

/// Metadata key of the mesh token, which authenticates services.
pub const MESH_TOKEN: &str = "x-mesh-token";

/// The gateway's `x-mesh-token` for reports of its own errors. It is derived from the mesh token, so that services need
/// no setting for it. The mesh token cannot be computed from it.
pub fn gateway_token(mesh_token: &SecretString) -> SecretString {
    // HMAC accepts keys of any length, so this does not fail.
    let mac = Hmac::<Sha256>::new_from_slice(mesh_token.expose_secret().as_bytes());
    let mac = mac.map(|mac| mac.chain_update("hapa gateway").finalize().into_bytes());
    mac.map(hex::encode).unwrap_or_default().into()
}

/// Maximum duration of one attempt to connect to a replica.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);

/// A channel that authenticates this process as a service.
pub type PeerChannel = InterceptedService<TracingChannel<BalancedChannel>, MeshToken>;

/// How services authenticate to each other.
#[derive(Clone, Debug)]
pub enum ServiceAuth {
    /// The mesh token, and during its replacement a second one that is accepted but never sent.
    Token(SecretString, Option<SecretString>),
    /// Certificates. Tokens are neither sent nor accepted.
    Certificates(Tls),
}

/// A client of the auth service.
pub type AuthClient = AuthServiceClient<PeerChannel>;
/// A client of the analytics service.
pub type AnalyticsClient = AnalyticsServiceClient<PeerChannel>;
/// A client of the errors service.
pub type ErrorsClient = ErrorTrackingServiceClient<PeerChannel>;

impl ServiceAuth {
    /// The certificates, if services authenticate with them.
    pub fn tls(&self) -> Option<Tls> {
        match self {
            ServiceAuth::Token(..) => None,
            ServiceAuth::Certificates(tls) => Some(tls.clone()),
        }
    }
}

/// Adds the mesh token to every call, if services authenticate with it.
#[derive(Clone, Debug)]
pub struct MeshToken(Option<MetadataValue<Ascii>>);

impl Interceptor for MeshToken {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(token) = &self.0 {
            request.metadata_mut().insert(MESH_TOKEN, token.clone());
        }
        Ok(request)
    }
}

/// A channel to `address` that sends the mesh token.
pub fn token_channel(address: &str, token: &SecretString) -> anyhow::Result<PeerChannel> {
    authenticated_channel(address, &ServiceAuth::Token(token.clone(), None), &[])
        .map(|(channel, _)| channel)
}

/// An authenticated channel to a peer with one of these roles at `address`, and its balancer, whose background task
/// follows the addresses.
pub fn authenticated_channel(
    address: &str,
    proof: &ServiceAuth,
    roles: &[&str],
) -> anyhow::Result<(PeerChannel, BalancedChannel)> {
    let (secure, token) = match proof {
        ServiceAuth::Token(token, _) => (TransportSecurity::Plaintext, Some(token)),
        ServiceAuth::Certificates(tls) => {
            let roles = roles.iter().map(|&role| role.to_owned()).collect();
            (TransportSecurity::MutualTls(tls.clone(), roles), None)
        }
    };
    let parse = |token: &SecretString| {
        let token: Result<MetadataValue<Ascii>, _> = token.expose_secret().parse();
        let problem = "must be ASCII text without leading and trailing spaces";
        let mut token = token.map_err(|_| ConfigError::new("MESH_TOKEN", problem))?;
        token.set_sensitive(true);
        Ok::<_, ConfigError>(token)
    };
    let token = MeshToken(token.map(parse).transpose()?);
    let balanced = BalancedChannel::new(address, secure, CONNECT_TIMEOUT)?;
    let traced = TracingChannel::new(balanced.clone(), balanced.authority());
    Ok((InterceptedService::new(traced, token), balanced))
}

/// A plaintext channel without authentication to `address`, such as `http://auth:50051`.
pub fn plain_channel(address: &str) -> anyhow::Result<BalancedChannel> {
    BalancedChannel::new(address, TransportSecurity::Plaintext, CONNECT_TIMEOUT)
}

/// The address at which a process can connect to its own listener: loopback for an unspecified address.
pub fn loopback_if_unspecified(mut address: SocketAddr) -> SocketAddr {
    if address.ip().is_unspecified() {
        address.set_ip(if address.is_ipv4() {
            [127, 0, 0, 1].into()
        } else {
            [0, 0, 0, 0, 0, 0, 0, 1].into()
        });
    }
    address
}

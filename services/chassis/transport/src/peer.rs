//! Channels to other services of the mesh. They connect when they are first used, and again after
//! a loss; callers bound each call, because each replica of a name may be tried for a while.

use std::net::SocketAddr;
use std::time::Duration;

use hapa_core::config::Wrong;
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

use crate::balancer::Balanced;
use crate::connect::Secure;
use crate::tls::Tls;
use crate::tracing_channel::Traced;

/// The metadata key by which a service proves that it is one.
pub const MESH_TOKEN: &str = "x-mesh-token";

/// What the gateway shows as `x-mesh-token` when it reports its refusals. Derived from the mesh token, so
/// that services know it without a setting; the mesh token can't be computed from it.
pub fn gateway_token(mesh_token: &SecretString) -> SecretString {
    // HMAC takes a key of any length.
    let mac = Hmac::<Sha256>::new_from_slice(mesh_token.expose_secret().as_bytes());
    let mac = mac.map(|mac| mac.chain_update("hapa gateway").finalize().into_bytes());
    mac.map(hex::encode).unwrap_or_default().into()
}

/// How long one replica may take to connect.
const PATIENCE: Duration = Duration::from_secs(1);

/// A channel that proves to be a service's.
pub type Wire = InterceptedService<Traced<Balanced>, MeshToken>;

/// By what a service proves that it is one, and others prove it here.
#[derive(Clone, Debug)]
pub enum Proof {
    /// The mesh token, and another that is accepted and never sent, while one takes the other's place.
    Token(SecretString, Option<SecretString>),
    /// Certificates; no token is sent and none counts.
    Certificates(Tls),
}

/// A client of the auth service that proves to be a service itself.
pub type AuthClient = AuthServiceClient<Wire>;
/// A client of the analytics service.
pub type AnalyticsClient = AnalyticsServiceClient<Wire>;
/// A client of the errors service.
pub type ErrorsClient = ErrorTrackingServiceClient<Wire>;

impl Proof {
    /// The certificates, where they are it.
    pub fn tls(&self) -> Option<Tls> {
        match self {
            Proof::Token(..) => None,
            Proof::Certificates(tls) => Some(tls.clone()),
        }
    }
}

/// The mesh token on every call, where a token proves anything.
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

/// A connection of its own to `address`, with the mesh token on every call.
pub fn wire(address: &str, token: &SecretString) -> anyhow::Result<Wire> {
    proving(address, &Proof::Token(token.clone(), None), &[]).map(|(wire, _)| wire)
}

/// A connection of its own to who has one of these roles at `address`, and what keeps up with the
/// replicas there.
pub fn proving(address: &str, proof: &Proof, roles: &[&str]) -> anyhow::Result<(Wire, Balanced)> {
    let (secure, token) = match proof {
        Proof::Token(token, _) => (Secure::No, Some(token)),
        Proof::Certificates(tls) => {
            let roles = roles.iter().map(|&role| role.to_owned()).collect();
            (Secure::Mutual(tls.clone(), roles), None)
        }
    };
    let read = |token: &SecretString| {
        let token: Result<MetadataValue<Ascii>, _> = token.expose_secret().parse();
        let words = "must be plain text without spaces around";
        let mut token = token.map_err(|_| Wrong::new("MESH_TOKEN", words))?;
        token.set_sensitive(true);
        Ok::<_, Wrong>(token)
    };
    let token = MeshToken(token.map(read).transpose()?);
    let balanced = Balanced::new(address, secure, PATIENCE)?;
    let traced = Traced::new(balanced.clone(), balanced.place());
    Ok((InterceptedService::new(traced, token), balanced))
}

/// A plain channel for unary calls to `address`, such as `http://auth:50051`.
pub fn channel(address: &str) -> anyhow::Result<Balanced> {
    Balanced::new(address, Secure::No, PATIENCE)
}

/// The address by which a process reaches its own listener.
pub fn dialable(mut address: SocketAddr) -> SocketAddr {
    if address.ip().is_unspecified() {
        address.set_ip(if address.is_ipv4() {
            [127, 0, 0, 1].into()
        } else {
            [0, 0, 0, 0, 0, 0, 0, 1].into()
        });
    }
    address
}

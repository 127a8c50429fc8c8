//! Channels to other services of the mesh. They connect when they are first used, and again after
//! a loss; callers bound each call, because a lazy channel queues what it can't send yet.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::Context as _;
use hapa_proto::analytics::v1::analytics_service_client::AnalyticsServiceClient;
use hapa_proto::auth::v1::auth_service_client::AuthServiceClient;
use hapa_proto::errors::v1::error_tracking_service_client::ErrorTrackingServiceClient;
use secrecy::{ExposeSecret as _, SecretString};
use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status};

use crate::config::Wrong;
use crate::trace::Traced;

/// The metadata key by which a service proves that it is one.
pub const MESH_TOKEN: &str = "x-mesh-token";

/// A channel that proves to be a service's.
pub type Wire = InterceptedService<Traced<Channel>, MeshToken>;

/// A client of the auth service that proves to be a service itself.
pub type AuthClient = AuthServiceClient<Wire>;
/// A client of the analytics service.
pub type AnalyticsClient = AnalyticsServiceClient<Wire>;
/// A client of the errors service.
pub type ErrorsClient = ErrorTrackingServiceClient<Wire>;

/// The mesh token on every call.
#[derive(Clone, Debug)]
pub struct MeshToken(MetadataValue<Ascii>);

impl Interceptor for MeshToken {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        request.metadata_mut().insert(MESH_TOKEN, self.0.clone());
        Ok(request)
    }
}

/// A connection of its own to `address`, with the mesh token on every call.
pub fn wire(address: &str, token: &SecretString) -> anyhow::Result<Wire> {
    let mut token: MetadataValue<Ascii> = token
        .expose_secret()
        .parse()
        .map_err(|_| Wrong::new("MESH_TOKEN", "must be plain text without spaces around"))?;
    token.set_sensitive(true);
    let place = address.split_once("://").map_or(address, |(_, place)| place);
    let traced = Traced::new(channel(address)?, place.trim_end_matches('/'));
    Ok(InterceptedService::new(traced, MeshToken(token)))
}

/// A channel for unary calls to `address`, such as `http://auth:50051`.
pub fn channel(address: &str) -> anyhow::Result<Channel> {
    Ok(endpoint(address)?.connect_lazy())
}

/// The bounds of such a channel.
pub(crate) fn endpoint(address: &str) -> anyhow::Result<Endpoint> {
    let endpoint = Endpoint::from_shared(address.to_owned());
    let endpoint =
        endpoint.with_context(|| format!("{address} is not an address like http://host:port"))?;
    Ok(endpoint
        .connect_timeout(Duration::from_secs(1))
        .tcp_nodelay(true)
        .http2_keep_alive_interval(Duration::from_secs(20))
        .keep_alive_timeout(Duration::from_secs(5))
        .keep_alive_while_idle(true))
}

/// The address by which a process reaches its own listener.
pub(crate) fn dialable(mut address: SocketAddr) -> SocketAddr {
    if address.ip().is_unspecified() {
        address.set_ip(if address.is_ipv4() {
            [127, 0, 0, 1].into()
        } else {
            [0, 0, 0, 0, 0, 0, 0, 1].into()
        });
    }
    address
}

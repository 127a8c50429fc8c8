//! Channels to other services of the mesh. They connect when they are first used, and again after
//! a loss; callers bound each call, because a lazy channel queues what it can't send yet.

use std::time::Duration;

use anyhow::Context as _;
use tonic::transport::{Channel, Endpoint};

/// The metadata key by which a service proves that it is one.
pub const MESH_TOKEN: &str = "x-mesh-token";

/// A channel for unary calls to `address`, such as `http://auth:50051`.
pub fn channel(address: &str) -> anyhow::Result<Channel> {
    let endpoint = Endpoint::from_shared(address.to_owned());
    let endpoint =
        endpoint.with_context(|| format!("{address} is not an address like http://host:port"))?;
    Ok(endpoint
        .connect_timeout(Duration::from_secs(1))
        .tcp_nodelay(true)
        .http2_keep_alive_interval(Duration::from_secs(20))
        .keep_alive_timeout(Duration::from_secs(5))
        .keep_alive_while_idle(true)
        .connect_lazy())
}

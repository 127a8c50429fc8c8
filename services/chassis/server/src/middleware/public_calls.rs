//! Separate pools for calls that need no credential. Open anonymous calls take no capacity from callers with a
//! credential, and one network can't exhaust a pool.

use std::net::IpAddr;
use std::sync::Arc;

use hapa_core::access::{Access, Rpc};
use ipnet::IpNet;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::network_limit::{NetworkLimit, NetworkPermit};

/// A pool is divided into this many shares, of which one network may hold one.
const NETWORK_SHARE_COUNT: usize = 4;
/// Calls that are answered at once, used by probes and load balancers. Long streams must not keep them out.
const SHORT_RPCS: &[&str] =
    &["/grpc.health.v1.Health/Check", "/hapa.system.v1.SystemService/GetHealth"];

/// The pools of one server.
#[derive(Debug)]
pub(crate) struct PublicCalls {
    short: Pool,
    /// Health watches and reflection.
    streams: Pool,
    /// Logins and refreshes.
    logins: Pool,
}

#[derive(Debug)]
struct Pool {
    calls: Arc<Semaphore>,
    networks: NetworkLimit,
}

/// A permit of a pool, released when it is dropped.
#[derive(Debug)]
pub(crate) struct PublicPermit {
    _call: OwnedSemaphorePermit,
    _network: NetworkPermit,
}

impl PublicCalls {
    /// Three pools of `size` calls each.
    pub(crate) fn new(size: u32, trusted_proxies: &[IpNet]) -> Self {
        let size = size as usize;
        let pool = || Pool {
            calls: Arc::new(Semaphore::new(size)),
            networks: NetworkLimit::new((size / NETWORK_SHARE_COUNT).max(1), trusted_proxies),
        };
        PublicCalls { short: pool(), streams: pool(), logins: pool() }
    }

    /// A permit for one call; `None` if its pool, or the share of its network, is exhausted.
    pub(crate) fn enter(&self, rpc: &Rpc, address: IpAddr) -> Option<PublicPermit> {
        let pool = match rpc.access {
            Access::Login => &self.logins,
            _ if SHORT_RPCS.contains(&rpc.path) => &self.short,
            _ => &self.streams,
        };
        let network = pool.networks.enter(address)?;
        let call = Arc::clone(&pool.calls).try_acquire_owned().ok()?;
        Some(PublicPermit { _call: call, _network: network })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    static WATCH: Rpc = Rpc::new("/grpc.health.v1.Health/Watch", Access::NoAuth);
    static CHECK: Rpc = Rpc::new("/grpc.health.v1.Health/Check", Access::NoAuth);
    static LOGIN: Rpc = Rpc::new("/hapa.auth.v1.SessionService/CreateSession", Access::Login);

    #[test]
    fn long_streams_block_neither_probes_nor_logins_nor_other_networks() {
        let calls = PublicCalls::new(8, &["127.0.0.0/8".parse().unwrap()]);
        let enter = |rpc, address: &str| calls.enter(rpc, address.parse().unwrap());
        let ones: Vec<_> = (0..8).filter_map(|_| enter(&WATCH, "198.51.100.1")).collect();
        assert_eq!(ones.len(), 2, "a quarter for one network");
        let others: Vec<_> = (0..8).filter_map(|_| enter(&WATCH, "127.0.0.1")).collect();
        assert_eq!(others.len(), 6, "the rest for a trusted proxy, which has no limit of its own");
        assert!(enter(&CHECK, "127.0.0.1").is_some());
        assert!(enter(&LOGIN, "198.51.100.1").is_some());
        drop(ones);
        assert!(enter(&WATCH, "198.51.100.1").is_some());
    }
}

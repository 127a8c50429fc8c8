//! A limit for each client network: one IPv4 address, or the IPv6 /64 from which one client can choose addresses.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex, PoisonError};

use ipnet::IpNet;

/// The permits that each network holds; networks without one are not in the map.
type PermitCounts = Arc<Mutex<HashMap<IpAddr, usize>>>;

/// Limits the permits that each network may hold.
#[derive(Debug)]
pub(crate) struct NetworkLimit {
    max: usize,
    trusted: Arc<[IpNet]>,
    counts: PermitCounts,
}

/// A permit of a network, released when it is dropped. `None`: the network has no limit.
#[derive(Debug)]
pub(crate) struct NetworkPermit(Option<(IpAddr, PermitCounts)>);

impl NetworkLimit {
    /// At most `max` permits for each network; 0: no limit. Trusted proxies forward many clients, so they have no limit.
    pub(crate) fn new(max: usize, trusted_proxies: &[IpNet]) -> Self {
        NetworkLimit { max, trusted: trusted_proxies.into(), counts: PermitCounts::default() }
    }

    /// A permit for the network of this address; `None` if the network has reached its limit.
    pub(crate) fn enter(&self, address: IpAddr) -> Option<NetworkPermit> {
        let address = address.to_canonical();
        if self.max == 0 || self.trusted.iter().any(|net| net.contains(&address)) {
            return Some(NetworkPermit(None));
        }
        let network = network(address);
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        let count = counts.entry(network).or_default();
        if *count >= self.max {
            return None;
        }
        *count += 1;
        Some(NetworkPermit(Some((network, Arc::clone(&self.counts)))))
    }
}

impl Drop for NetworkPermit {
    fn drop(&mut self) {
        let Some((network, counts)) = self.0.take() else { return };
        let mut counts = counts.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = counts.get_mut(&network) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&network);
            }
        }
    }
}

fn network(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() >> 64 << 64).into(),
        v4 @ IpAddr::V4(_) => v4,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_network_has_a_limit_of_its_own_and_trusted_proxies_have_none() {
        let limit = NetworkLimit::new(2, &["127.0.0.0/8".parse().unwrap()]);
        let enter = |address: &str| limit.enter(address.parse().unwrap());
        let first = [enter("198.51.100.1"), enter("198.51.100.1")];
        assert!(first.iter().all(Option::is_some));
        assert!(enter("198.51.100.1").is_none());
        assert!(enter("::ffff:198.51.100.1").is_none(), "the same address, mapped to IPv6");
        assert!(enter("198.51.100.2").is_some());
        let second = [enter("2001:db8:0:1::1"), enter("2001:db8:0:1::2")];
        assert!(second.iter().all(Option::is_some));
        assert!(enter("2001:db8:0:1:ffff::3").is_none(), "a client can choose from its /64");
        assert!(enter("2001:db8:0:2::1").is_some());
        let proxied: Vec<_> = (0..10).map(|_| enter("127.0.0.1")).collect();
        assert!(proxied.iter().all(Option::is_some));
        drop((first, second, proxied));
        assert!(limit.counts.lock().unwrap().is_empty(), "a network without permits is removed");
    }
}

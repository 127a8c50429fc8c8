//! A bound for each client network: an address, or of IPv6 the /64 that one client can choose from.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex, PoisonError};

use ipnet::IpNet;

/// Networks that hold something now, with how much.
type Open = Arc<Mutex<HashMap<IpAddr, usize>>>;

/// How much each network may hold.
#[derive(Debug)]
pub(crate) struct NetworkLimit {
    max: usize,
    trusted: Arc<[IpNet]>,
    open: Open,
}

/// What a network holds until this is dropped.
#[derive(Debug)]
pub(crate) struct NetworkPermit(Option<(IpAddr, Open)>);

impl NetworkLimit {
    /// At most so much for each network, 0: no bound. Trusted proxies act for many and have none.
    pub(crate) fn new(max: usize, trusted_proxies: &[IpNet]) -> Self {
        NetworkLimit { max, trusted: trusted_proxies.into(), open: Open::default() }
    }

    /// One more for the network of this address; `None` where it has all that it may.
    pub(crate) fn enter(&self, address: IpAddr) -> Option<NetworkPermit> {
        let address = address.to_canonical();
        if self.max == 0 || self.trusted.iter().any(|net| net.contains(&address)) {
            return Some(NetworkPermit(None));
        }
        let network = network(address);
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let count = open.entry(network).or_default();
        if *count >= self.max {
            return None;
        }
        *count += 1;
        Some(NetworkPermit(Some((network, Arc::clone(&self.open)))))
    }
}

impl Drop for NetworkPermit {
    fn drop(&mut self) {
        let Some((network, open)) = self.0.take() else { return };
        let mut open = open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = open.get_mut(&network) {
            *count -= 1;
            if *count == 0 {
                open.remove(&network);
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
    fn each_network_has_a_bound_of_its_own_and_proxies_have_none() {
        let limit = NetworkLimit::new(2, &["127.0.0.0/8".parse().unwrap()]);
        let enter = |address: &str| limit.enter(address.parse().unwrap());
        let first = [enter("198.51.100.1"), enter("198.51.100.1")];
        assert!(first.iter().all(Option::is_some));
        assert!(enter("198.51.100.1").is_none());
        assert!(enter("::ffff:198.51.100.1").is_none(), "the same address in IPv6's words");
        assert!(enter("198.51.100.2").is_some());
        let second = [enter("2001:db8:0:1::1"), enter("2001:db8:0:1::2")];
        assert!(second.iter().all(Option::is_some));
        assert!(enter("2001:db8:0:1:ffff::3").is_none(), "a client can choose from its /64");
        assert!(enter("2001:db8:0:2::1").is_some());
        let proxied: Vec<_> = (0..10).map(|_| enter("127.0.0.1")).collect();
        assert!(proxied.iter().all(Option::is_some));
        drop((first, second, proxied));
        assert!(limit.open.lock().unwrap().is_empty(), "nothing is kept of networks that left");
    }
}

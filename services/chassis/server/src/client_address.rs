//! The address of the client behind a connection and its proxies.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use ipnet::IpNet;

/// The address of the other end of a connection.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PeerAddress(pub(crate) IpAddr);

/// The service roles of the client certificate of a connection.
#[derive(Clone, Debug)]
pub(crate) struct CertificateRoles(pub(crate) Arc<[&'static str]>);

/// The address of the client. A trusted proxy appends the address of its own client to x-forwarded-for, so the last
/// entry that is not a trusted proxy is the client. The header of any other peer is ignored.
pub(crate) fn client_address<B>(request: &http::Request<B>, trusted: &[IpNet]) -> IpAddr {
    let peer = request
        .extensions()
        .get::<PeerAddress>()
        .map_or(Ipv4Addr::UNSPECIFIED.into(), |peer| peer.0);
    let is_trusted = |address: &IpAddr| trusted.iter().any(|net| net.contains(address));
    let mut client = peer.to_canonical();
    let headers = request.headers().get_all("x-forwarded-for").iter().rev();
    let entries = headers.filter_map(|value| value.to_str().ok()).flat_map(|text| text.rsplit(','));
    for entry in entries {
        if !is_trusted(&client) {
            break;
        }
        let Ok(address) = entry.trim().parse::<IpAddr>() else { break };
        client = address.to_canonical();
    }
    client
}

#[cfg(test)]
mod tests {
    use super::*;

    fn client(peer: &str, forwarded: &[&str]) -> String {
        let mut request = http::Request::new(());
        request.extensions_mut().insert(PeerAddress(peer.parse().unwrap()));
        for value in forwarded {
            request.headers_mut().append("x-forwarded-for", value.parse().unwrap());
        }
        client_address(&request, &["127.0.0.0/8".parse().unwrap(), "10.0.0.0/8".parse().unwrap()])
            .to_string()
    }

    #[test]
    fn only_the_entries_of_trusted_proxies_name_the_client() {
        assert_eq!(client("203.0.113.7", &["198.51.100.1"]), "203.0.113.7");
        assert_eq!(client("127.0.0.1", &[]), "127.0.0.1");
        assert_eq!(client("127.0.0.1", &["198.51.100.1"]), "198.51.100.1");
        assert_eq!(client("127.0.0.1", &["6.6.6.6, 198.51.100.1, 10.1.2.3"]), "198.51.100.1");
        assert_eq!(client("::ffff:127.0.0.1", &["6.6.6.6", "198.51.100.1"]), "198.51.100.1");
        assert_eq!(client("127.0.0.1", &["6.6.6.6, nonsense"]), "127.0.0.1");
    }
}

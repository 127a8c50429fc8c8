//! The address of the client behind a connection and its proxies.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use ipnet::IpNet;

/// The other end of a connection.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Peer(pub(crate) IpAddr);

/// What the certificate at the other end of a connection proves.
#[derive(Clone, Debug)]
pub(crate) struct Proven(pub(crate) Arc<[&'static str]>);

/// Where a request came from. A trusted proxy appends whom it heard to x-forwarded-for, so the last
/// entry that no trusted proxy made is the client; anyone else's header is inert.
pub(crate) fn origin(request: &http::Request<axum::body::Body>, trusted: &[IpNet]) -> IpAddr {
    let peer =
        request.extensions().get::<Peer>().map_or(Ipv4Addr::UNSPECIFIED.into(), |peer| peer.0);
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
    use axum::body::Body;

    use super::*;

    fn from(peer: &str, forwarded: &[&str]) -> String {
        let mut request = http::Request::new(Body::empty());
        request.extensions_mut().insert(Peer(peer.parse().unwrap()));
        for value in forwarded {
            request.headers_mut().append("x-forwarded-for", value.parse().unwrap());
        }
        origin(&request, &["127.0.0.0/8".parse().unwrap(), "10.0.0.0/8".parse().unwrap()])
            .to_string()
    }

    #[test]
    fn only_trusted_proxies_are_believed_about_where_a_call_came_from() {
        assert_eq!(from("203.0.113.7", &["198.51.100.1"]), "203.0.113.7");
        assert_eq!(from("127.0.0.1", &[]), "127.0.0.1");
        assert_eq!(from("127.0.0.1", &["198.51.100.1"]), "198.51.100.1");
        assert_eq!(from("127.0.0.1", &["6.6.6.6, 198.51.100.1, 10.1.2.3"]), "198.51.100.1");
        assert_eq!(from("::ffff:127.0.0.1", &["6.6.6.6", "198.51.100.1"]), "198.51.100.1");
        assert_eq!(from("127.0.0.1", &["6.6.6.6, nonsense"]), "127.0.0.1");
    }
}

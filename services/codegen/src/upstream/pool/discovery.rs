//! Engine discovery: parses AI_MODEL_ENDPOINT, a list of base URLs and of DNS names with an engine at
//! each address.

use std::collections::BTreeSet;
use std::net::SocketAddr;

use crate::upstream::engine::{BaseUrl, Engine, EngineOptions};

/// Maximum number of engines of one mesh.
pub(super) const MAX_ENDPOINTS: usize = 256;
/// Prefix of a DNS source, such as `dns+http://engines:8000/v1`.
const DNS_PREFIX: &str = "dns+";

/// One entry of the setting.
#[derive(Clone, Debug)]
pub(crate) struct EngineSource {
    /// The base URL.
    url: String,
    /// Appended to `host:port` in endpoint names: the path, unless it is `/v1`.
    suffix: String,
    pub(super) host: String,
    pub(super) port: u16,
    /// Every address of the DNS name is a separate engine.
    pub(super) is_dns: bool,
}

impl EngineSource {
    /// Parses the setting. Error texts are appended to the setting's name.
    pub(crate) fn parse_list(setting: &str) -> Result<Vec<EngineSource>, String> {
        let parts = setting.split(',').map(str::trim).filter(|text| !text.is_empty());
        let mut sources: Vec<EngineSource> = Vec::new();
        for text in parts {
            let source = EngineSource::parse(text)?;
            if !sources.iter().any(|other| other.is_same_engine(&source)) {
                sources.push(source);
            }
        }
        match sources.len() {
            0 => Err("must name at least one engine".to_owned()),
            1..=MAX_ENDPOINTS => Ok(sources),
            many => Err(format!("must name at most {MAX_ENDPOINTS} engines; it names {many}")),
        }
    }

    fn parse(text: &str) -> Result<EngineSource, String> {
        let (is_dns, url) = text.strip_prefix(DNS_PREFIX).map_or((false, text), |url| (true, url));
        let base = BaseUrl::parse(url)?;
        let base = base.configured();
        let is_http = matches!(base.scheme(), "http" | "https");
        match (base.host_str(), base.port_or_known_default()) {
            (Some(host), Some(port)) if is_http => Ok(EngineSource {
                url: url.trim_end_matches('/').to_owned(),
                suffix: base.path().trim_end_matches('/').replacen("/v1", "", 1),
                host: host.to_owned(),
                port,
                is_dns,
            }),
            _ => Err("must begin with http://, https://, dns+http:// or dns+https://".to_owned()),
        }
    }

    /// Whether both entries name the same engine, such as with and without `/v1`.
    fn is_same_engine(&self, other: &EngineSource) -> bool {
        self.is_dns == other.is_dns && self.endpoint_name(None) == other.endpoint_name(None)
    }

    /// Name of the engine at the URL itself, or at one address of its DNS name.
    pub(super) fn endpoint_name(&self, address: Option<SocketAddr>) -> String {
        let (port, suffix) = (self.port, &self.suffix);
        match address {
            Some(address) => format!("{}{suffix}", SocketAddr::new(address.ip(), port)),
            None => format!("{}:{port}{suffix}", self.host),
        }
    }

    /// The client of the engine that `endpoint_name` names.
    pub(crate) fn build_engine(
        &self,
        address: Option<SocketAddr>,
        options: &EngineOptions,
    ) -> anyhow::Result<Engine> {
        Engine::new(&self.url, address.map(|address| (self.host.as_str(), address)), options)
    }
}

/// The addresses of a DNS lookup, deduplicated, at most `MAX_ENDPOINTS`.
pub(super) fn unique_addresses(
    addresses: impl IntoIterator<Item = SocketAddr>,
) -> BTreeSet<SocketAddr> {
    addresses.into_iter().collect::<BTreeSet<_>>().into_iter().take(MAX_ENDPOINTS).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_of_urls_and_names_is_parsed_and_deduplicated() {
        let sources =
            EngineSource::parse_list("http://a:1/v1/, dns+https://b/v1,http://a:1/v1,http://a:1")
                .unwrap();
        let parsed: Vec<_> =
            sources.iter().map(|one| (one.url.as_str(), one.port, one.is_dns)).collect();
        assert_eq!(parsed, [("http://a:1/v1", 1, false), ("https://b/v1", 443, true)]);
    }

    #[test]
    fn the_name_of_an_endpoint_has_neither_operation_nor_query() {
        for (setting, name) in [
            ("http://a:1/v1/chat/completions", "a:1"),
            ("http://a:1/completions/", "a:1"),
            ("http://a:1/proxy/v1?api-version=7", "a:1/proxy"),
        ] {
            let sources = EngineSource::parse_list(setting).unwrap();
            assert_eq!(sources[0].endpoint_name(None), name);
        }
    }

    #[test]
    fn an_invalid_list_of_engines_is_rejected_with_a_reason() {
        let many: Vec<_> = (1..=257).map(|port| format!("http://a:{port}/v1")).collect();
        for (setting, words) in [
            ("", "must name at least one engine"),
            ("nowhere", "is not a URL"),
            ("ftp://a/v1", "must begin with"),
            (&many.join(","), "must name at most 256"),
        ] {
            let error = EngineSource::parse_list(setting).unwrap_err();
            assert!(error.contains(words), "{error}");
        }
    }
}

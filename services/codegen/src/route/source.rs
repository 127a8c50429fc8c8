//! Where engines are, as AI_MODEL_ENDPOINT says: base URLs, or names that stand for several addresses.

use std::collections::BTreeSet;
use std::net::SocketAddr;

use reqwest::Url;

use crate::engine::{Engine, EngineAccess};

/// Most engines that a mesh asks.
pub(super) const MOST: usize = 256;
/// Such as `dns+http://engines:8000/v1`.
const BY_NAME: &str = "dns+";

/// One part of the setting.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Source {
    /// The base URL.
    url: String,
    /// What it is called: `host:port`, and the path where that is another than `/v1`.
    suffix: String,
    pub(super) host: String,
    pub(super) port: u16,
    /// Whether every address of the name is an engine of its own.
    pub(super) by_name: bool,
}

impl Source {
    /// Reads the setting; its words go behind the setting's name.
    pub(crate) fn read(setting: &str) -> Result<Vec<Source>, String> {
        let parts = setting.split(',').map(str::trim).filter(|text| !text.is_empty());
        let mut sources: Vec<Source> = Vec::new();
        for text in parts {
            let source = Source::read_one(text)?;
            if !sources.contains(&source) {
                sources.push(source);
            }
        }
        match sources.len() {
            0 => Err("names no engine".to_owned()),
            1..=MOST => Ok(sources),
            many => Err(format!("may name {MOST} engines and names {many}")),
        }
    }

    fn read_one(text: &str) -> Result<Source, String> {
        let (by_name, url) = text.strip_prefix(BY_NAME).map_or((false, text), |url| (true, url));
        let base: Url = url.parse().map_err(|error| format!("is not a URL: {error}"))?;
        let known = matches!(base.scheme(), "http" | "https");
        match (base.host_str(), base.port_or_known_default()) {
            (Some(host), Some(port)) if known => Ok(Source {
                url: url.trim_end_matches('/').to_owned(),
                suffix: base.path().trim_end_matches('/').replacen("/v1", "", 1),
                host: host.to_owned(),
                port,
                by_name,
            }),
            _ => Err("must begin with http://, https://, dns+http:// or dns+https://".to_owned()),
        }
    }

    /// What the engine is called that is at the URL itself, or at an address of its name.
    pub(super) fn name(&self, address: Option<SocketAddr>) -> String {
        let (port, suffix) = (self.port, &self.suffix);
        match address {
            Some(address) => format!("{}{suffix}", SocketAddr::new(address.ip(), port)),
            None => format!("{}:{port}{suffix}", self.host),
        }
    }

    /// That engine.
    pub(super) fn engine(
        &self,
        address: Option<SocketAddr>,
        access: &EngineAccess,
    ) -> anyhow::Result<Engine> {
        Engine::new(&self.url, address.map(|address| (self.host.as_str(), address)), access)
    }
}

/// What a look-up brought, without repeats and bounded.
pub(super) fn distinct(addresses: impl IntoIterator<Item = SocketAddr>) -> BTreeSet<SocketAddr> {
    addresses.into_iter().collect::<BTreeSet<_>>().into_iter().take(MOST).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_of_urls_and_names_is_read_and_repeats_are_one() {
        let read = Source::read("http://a:1/v1/, dns+https://b/v1,http://a:1/v1,").unwrap();
        let shown: Vec<_> =
            read.iter().map(|one| (one.url.as_str(), one.port, one.by_name)).collect();
        assert_eq!(shown, [("http://a:1/v1", 1, false), ("https://b/v1", 443, true)]);
    }

    #[test]
    fn what_is_no_list_of_engines_is_refused_in_words() {
        let many: Vec<_> = (1..=257).map(|port| format!("http://a:{port}/v1")).collect();
        for (setting, words) in [
            ("", "names no engine"),
            ("nowhere", "is not a URL"),
            ("ftp://a/v1", "must begin with"),
            (&many.join(","), "may name 256"),
        ] {
            let said = Source::read(setting).unwrap_err();
            assert!(said.contains(words), "{said}");
        }
    }
}

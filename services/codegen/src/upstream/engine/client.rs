//! The HTTP clients of one engine. An engine may close an idle connection at the moment when a request is
//! sent on it. Such a request is sent once more, over a new connection.

use std::net::SocketAddr;
use std::sync::OnceLock;
use std::time::Duration;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use hapa_core::config::ConfigError;
use reqwest::header::{
    ACCEPT, AUTHORIZATION, CONTENT_TYPE, HOST, HeaderMap, HeaderName, HeaderValue,
};
use reqwest::{Client, ClientBuilder, RequestBuilder, Response, Url, redirect};
use secrecy::{ExposeSecret as _, SecretString};

use crate::upstream::engine::{EngineError, EngineOptions, TransportError};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// Below the 5 s after which uvicorn, which vLLM runs on, closes idle connections.
const POOL_IDLE_TIMEOUT: Duration = Duration::from_secs(4);
/// Azure's header for keys, beside `Authorization`.
const AZURE_KEY_HEADER: HeaderName = HeaderName::from_static("api-key");
const AZURE_DOMAINS: [&str; 3] =
    [".openai.azure.com", ".cognitiveservices.azure.com", ".services.ai.azure.com"];

#[derive(Clone, Debug)]
pub(super) struct HttpClients {
    pooled: Client,
    /// Opens a connection for each request. Built when it is first needed, because that takes time.
    fresh: OnceLock<Client>,
    settings: ClientSettings,
}

#[derive(Clone, Debug)]
struct ClientSettings {
    headers: HeaderMap,
    /// Overrides the DNS lookup of a host name.
    address: Option<(String, SocketAddr)>,
}

impl HttpClients {
    /// For the engine at this base URL.
    pub(super) fn new(
        base: &Url,
        address: Option<(&str, SocketAddr)>,
        options: &EngineOptions,
    ) -> anyhow::Result<HttpClients> {
        // Fails only if another server of this process has installed it before.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let headers = match &options.key {
            Some(key) => key_headers(base, key)?,
            None => HeaderMap::new(),
        };
        let address = address.map(|(name, address)| (name.to_owned(), address));
        let settings = ClientSettings { headers, address };
        let pooled = settings.builder().pool_idle_timeout(POOL_IDLE_TIMEOUT).build()?;
        Ok(HttpClients { pooled, fresh: OnceLock::new(), settings })
    }

    pub(super) fn get(&self, url: Url) -> RequestBuilder {
        self.pooled.get(url)
    }

    /// Sends a request. If the connection closes before any byte of a response, sends it once more over a new
    /// connection.
    pub(super) async fn send(&self, request: RequestBuilder) -> reqwest::Result<Response> {
        let (client, request) = request.build_split();
        let request = request?;
        let again = request.try_clone();
        let result = client.execute(request).await;
        match (result, again) {
            (Err(error), Some(again)) if is_closed(&error) => match self.fresh() {
                Some(fresh) => fresh.execute(again).await,
                None => Err(error),
            },
            (result, _) => result,
        }
    }

    fn fresh(&self) -> Option<&Client> {
        if self.fresh.get().is_none() {
            let built = self.settings.builder().pool_max_idle_per_host(0).build().ok()?;
            let _ = self.fresh.set(built);
        }
        self.fresh.get()
    }
}

impl ClientSettings {
    fn builder(&self) -> ClientBuilder {
        let http = match &self.address {
            // The name stays in the Host header and in the certificate check.
            Some((name, address)) => Client::builder().resolve(name, *address),
            None => Client::builder(),
        };
        http.default_headers(self.headers.clone())
            .connect_timeout(CONNECT_TIMEOUT)
            .tcp_nodelay(true)
            // Neither a redirect nor a proxy from the environment may send prompts elsewhere.
            .redirect(redirect::Policy::none())
            .no_proxy()
            .referer(false)
    }
}

/// The headers of requests for which no client adds any.
pub(super) fn request_headers(base: &Url, options: &EngineOptions) -> anyhow::Result<HeaderMap> {
    let mut headers = match &options.key {
        Some(key) => key_headers(base, key)?,
        None => HeaderMap::new(),
    };
    let host = base.host_str().unwrap_or_default();
    let host = match base.port() {
        Some(port) => format!("{host}:{port}"),
        None => host.to_owned(),
    };
    headers.insert(HOST, HeaderValue::try_from(host)?);
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    headers.insert(ACCEPT, HeaderValue::from_static("*/*"));
    if !base.username().is_empty() || base.password().is_some() {
        let decode = |text| percent_encoding::percent_decode_str(text).decode_utf8_lossy();
        let (user, password) =
            (decode(base.username()), decode(base.password().unwrap_or_default()));
        let text = BASE64_STANDARD.encode(format!("{user}:{password}"));
        let mut value = HeaderValue::try_from(format!("Basic {text}"))?;
        value.set_sensitive(true);
        headers.insert(AUTHORIZATION, value);
    }
    Ok(headers)
}

fn key_headers(base: &Url, key: &SecretString) -> Result<HeaderMap, ConfigError> {
    let value = |text: &str| {
        let value = HeaderValue::from_str(text);
        let mut value = value.map_err(|_| {
            ConfigError::new("AI_MODEL_API_KEY", "must not contain line ends or control characters")
        })?;
        value.set_sensitive(true);
        Ok::<_, ConfigError>(value)
    };
    let mut headers = HeaderMap::new();
    headers.insert(AUTHORIZATION, value(&format!("Bearer {}", key.expose_secret()))?);
    let host = base.host_str().unwrap_or_default();
    if AZURE_DOMAINS.iter().any(|domain| host.ends_with(domain)) {
        headers.insert(AZURE_KEY_HEADER, value(key.expose_secret())?);
    }
    Ok(headers)
}

fn is_closed(error: &reqwest::Error) -> bool {
    EngineError::from(error) == EngineError::Unreachable(TransportError::Closed)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(url: &str, key: &str) -> Result<HeaderMap, ConfigError> {
        key_headers(&url.parse().unwrap(), &SecretString::from(key))
    }

    #[test]
    fn azure_receives_the_key_in_its_own_header_too() {
        for (url, expected) in [
            ("https://x.openai.azure.com/openai/v1", Some("k")),
            ("https://x.cognitiveservices.azure.com/v1", Some("k")),
            ("https://openai.azure.com.example/v1", None),
            ("http://127.0.0.1:8002/v1", None),
        ] {
            let headers = headers(url, "k").unwrap();
            let key = headers.get(AZURE_KEY_HEADER).map(|value| value.to_str().unwrap());
            assert_eq!(key, expected, "{url}");
            assert_eq!(headers[AUTHORIZATION], "Bearer k");
        }
    }

    #[test]
    fn a_key_that_no_header_can_contain_names_its_setting() {
        let error = headers("http://h/v1", "a\nb").unwrap_err().to_string();
        assert!(error.contains("AI_MODEL_API_KEY") && !error.contains("a\nb"), "{error}");
    }
}

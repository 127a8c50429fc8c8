//! Caches the public keys (JWKS) of the OpenID Connect provider.
//!
//! Invariants: one fetch at a time, which continues if its caller is dropped. Once there are keys, no
//! caller can cause more than one fetch a minute. Keys older than a day are not used.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, anyhow, ensure};
use jsonwebtoken::{Algorithm, DecodingKey};
use reqwest::{Client, Url, redirect};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_util::task::TaskTracker;

use crate::error::Error;
use crate::oidc::secure_url;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// For a whole fetch: discovery document and key set.
const FETCH_TIMEOUT: Duration = Duration::from_secs(5);
const MAX_RESPONSE_BYTES: usize = 1024 * 1024;
/// Age of the keys at which they are fetched again in the background, while they are still used.
const REFRESH_INTERVAL_SECONDS: u64 = 3_600;
/// Age at which keys are not used.
const MAX_KEY_AGE_SECONDS: u64 = 86_400;
/// Minimum time between two fetches.
const MIN_FETCH_INTERVAL_SECONDS: u64 = 60;
/// Minimum time between two fetches if there are no usable keys.
const MIN_RETRY_INTERVAL_SECONDS: u64 = 1;

/// The key cache. Keys are fetched on demand.
pub(super) struct JwksCache {
    fetcher: Arc<JwksFetcher>,
    /// Fetches whose caller may be gone. They end by themselves, within seconds.
    tasks: TaskTracker,
}

impl JwksCache {
    /// The cache for one issuer. Without `jwks_url`, the discovery document names the key set.
    pub(super) fn new(issuer: &str, jwks_url: Option<Url>) -> anyhow::Result<JwksCache> {
        // Fails only if another server in this process has installed it.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let http = Client::builder()
            .connect_timeout(CONNECT_TIMEOUT)
            .redirect(redirect::Policy::none())
            .no_proxy()
            .referer(false)
            .build()?;
        let fetcher = JwksFetcher {
            http,
            issuer: issuer.to_owned(),
            jwks_url,
            fetch_lock: tokio::sync::Mutex::default(),
            state: Mutex::default(),
        };
        Ok(JwksCache { fetcher: Arc::new(fetcher), tasks: TaskTracker::new() })
    }

    /// The key with this id and algorithm. `None` if the provider has no such key.
    pub(super) async fn find(
        &self,
        kid: Option<&str>,
        algorithm: Algorithm,
        now: i64,
    ) -> Result<Option<DecodingKey>, Error> {
        let mut state = self.fetcher.state().clone();
        if !state.is_younger_than(MAX_KEY_AGE_SECONDS, now) {
            state = self.state_after_fetch(now).await;
            if !state.is_younger_than(MAX_KEY_AGE_SECONDS, now) {
                return Err(Error::OidcUnavailable(anyhow!("no usable keys")));
            }
        } else if !state.is_younger_than(REFRESH_INTERVAL_SECONDS, now) && state.is_fetch_due(now) {
            self.spawn_fetch(now);
        }
        if let Some(key) = state.find(kid, algorithm) {
            return Ok(Some(key));
        }
        // The provider may have rotated its keys.
        let state = self.state_after_fetch(now).await;
        match state.find(kid, algorithm) {
            None if state.has_failed => {
                Err(Error::OidcUnavailable(anyhow!("unknown key, and the last fetch failed")))
            }
            found => Ok(found),
        }
    }

    /// The state after a fetch, if one is due.
    async fn state_after_fetch(&self, now: i64) -> JwksState {
        // Fails only if the runtime shuts down.
        let _ = self.spawn_fetch(now).await;
        self.fetcher.state().clone()
    }

    fn spawn_fetch(&self, now: i64) -> JoinHandle<()> {
        let fetcher = Arc::clone(&self.fetcher);
        self.tasks.spawn(async move { fetcher.fetch_if_due(now).await })
    }
}

/// The cached keys, and the outcome of the fetches.
#[derive(Clone, Default)]
struct JwksState {
    keys: Arc<Vec<VerificationKey>>,
    /// When the keys were fetched, in seconds since 1970.
    fetched_at: Option<i64>,
    /// When the last fetch began, in seconds since 1970.
    attempted_at: Option<i64>,
    /// Number of fetches that have ended.
    attempt_count: u64,
    /// Whether the last fetch failed.
    has_failed: bool,
}

impl JwksState {
    fn is_younger_than(&self, seconds: u64, now: i64) -> bool {
        self.fetched_at.is_some_and(|fetched_at| now.abs_diff(fetched_at) < seconds)
    }

    fn is_fetch_due(&self, now: i64) -> bool {
        let interval = if self.is_younger_than(MAX_KEY_AGE_SECONDS, now) {
            MIN_FETCH_INTERVAL_SECONDS
        } else {
            MIN_RETRY_INTERVAL_SECONDS
        };
        self.attempted_at.is_none_or(|attempted_at| now.abs_diff(attempted_at) >= interval)
    }

    /// A token may omit the key id if the provider has one key only: OpenID Connect Core 1.0, section
    /// 10.1.
    fn find(&self, kid: Option<&str>, algorithm: Algorithm) -> Option<DecodingKey> {
        let has_kid = |key: &&VerificationKey| match kid {
            Some(kid) => key.kid.as_deref() == Some(kid),
            None => self.keys.len() == 1,
        };
        let mut candidates = self.keys.iter().filter(|key| key.algorithm == algorithm);
        candidates.find(has_kid).map(|key| key.public.clone())
    }
}

/// Fetches the keys into the shared state.
struct JwksFetcher {
    http: Client,
    issuer: String,
    jwks_url: Option<Url>,
    fetch_lock: tokio::sync::Mutex<()>,
    state: Mutex<JwksState>,
}

#[derive(Deserialize)]
struct DiscoveryDocument {
    issuer: String,
    jwks_uri: String,
}

#[derive(Deserialize)]
struct JwkSet {
    keys: Vec<serde_json::Value>,
}

impl JwksFetcher {
    fn state(&self) -> MutexGuard<'_, JwksState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn fetch_if_due(&self, now: i64) {
        let attempt_count = self.state().attempt_count;
        let _guard = self.fetch_lock.lock().await;
        {
            let mut state = self.state();
            // Another caller has fetched while this one waited for the lock.
            if state.attempt_count != attempt_count || !state.is_fetch_due(now) {
                return;
            }
            state.attempted_at = Some(now);
        }
        let result = timeout(FETCH_TIMEOUT, self.fetch()).await;
        let result = result.unwrap_or_else(|_| Err(anyhow!("no response within 5 s")));
        let mut state = self.state();
        state.attempt_count += 1;
        state.has_failed = result.is_err();
        match result {
            Ok(keys) => {
                state.keys = Arc::new(keys);
                state.fetched_at = Some(now);
            }
            Err(error) => {
                let cause = format!("{error:#}");
                tracing::warn!(cause, "cannot fetch the keys of the identity provider");
            }
        }
    }

    async fn fetch(&self) -> anyhow::Result<Vec<VerificationKey>> {
        let url = match &self.jwks_url {
            Some(url) => url.clone(),
            None => self.discover().await.context("discovery document")?,
        };
        let set: JwkSet = self.get(url).await.context("key set")?;
        let keys: Vec<_> = set.keys.into_iter().filter_map(VerificationKey::from_json).collect();
        ensure!(!keys.is_empty(), "the key set has no key for RS256, ES256 or EdDSA");
        Ok(keys)
    }

    async fn discover(&self) -> anyhow::Result<Url> {
        let base = self.issuer.trim_end_matches('/');
        let url = format!("{base}/.well-known/openid-configuration").parse()?;
        let document: DiscoveryDocument = self.get(url).await?;
        ensure!(document.issuer == self.issuer, "has another issuer");
        secure_url(&document.jwks_uri).map_err(|problem| anyhow!("jwks_uri {problem}"))
    }

    async fn get<T: DeserializeOwned>(&self, url: Url) -> anyhow::Result<T> {
        let mut response = self.http.get(url).send().await.map_err(|error| without_url(&error))?;
        ensure!(response.status().is_success(), "answered {}", response.status());
        let mut body = Vec::new();
        while let Some(bytes) = response.chunk().await.map_err(|error| without_url(&error))? {
            ensure!(body.len() + bytes.len() <= MAX_RESPONSE_BYTES, "larger than 1 MiB");
            body.extend_from_slice(&bytes);
        }
        // The errors of serde_json are dropped, because they repeat parts of the response.
        serde_json::from_slice(&body)
            .map_err(|error| anyhow!("invalid at line {}, column {}", error.line(), error.column()))
    }
}

/// The kind of a connection error, without the URL that reqwest adds to it.
fn without_url(error: &reqwest::Error) -> anyhow::Error {
    let problem = match () {
        () if error.is_timeout() => "no response in time",
        () if error.is_connect() => "cannot connect",
        () => "the connection broke",
    };
    anyhow!(problem)
}

/// A public key that verifies signatures of one algorithm.
struct VerificationKey {
    kid: Option<String>,
    algorithm: Algorithm,
    public: DecodingKey,
}

/// A JSON Web Key (RFC 7517).
#[derive(Deserialize)]
struct Jwk {
    kty: String,
    kid: Option<String>,
    #[serde(rename = "use")]
    purpose: Option<String>,
    alg: Option<String>,
    crv: Option<String>,
    n: Option<String>,
    e: Option<String>,
    x: Option<String>,
    y: Option<String>,
}

impl VerificationKey {
    /// `None` for a key of another purpose or type, which a key set may hold.
    fn from_json(value: serde_json::Value) -> Option<VerificationKey> {
        let jwk: Jwk = serde_json::from_value(value).ok()?;
        let (algorithm, name, key) = match (jwk.kty.as_str(), jwk.crv.as_deref()) {
            ("RSA", _) => {
                let key = DecodingKey::from_rsa_components(&jwk.n?, &jwk.e?);
                (Algorithm::RS256, "RS256", key)
            }
            ("EC", Some("P-256")) => {
                let key = DecodingKey::from_ec_components(&jwk.x?, &jwk.y?);
                (Algorithm::ES256, "ES256", key)
            }
            ("OKP", Some("Ed25519")) => {
                (Algorithm::EdDSA, "EdDSA", DecodingKey::from_ed_components(&jwk.x?))
            }
            _ => return None,
        };
        let is_for_signatures = jwk.purpose.is_none_or(|purpose| purpose == "sig");
        let has_algorithm = jwk.alg.is_none_or(|alg| alg == name);
        let public = key.ok()?;
        (is_for_signatures && has_algorithm).then_some(VerificationKey {
            kid: jwk.kid,
            algorithm,
            public,
        })
    }
}

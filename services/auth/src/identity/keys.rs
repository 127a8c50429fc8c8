//! The keys of an identity provider, as it published them last.
//!
//! Kept true: one fetch at a time, which goes on when its caller leaves; no caller can make fetches
//! more frequent than one a minute once there are keys; keys older than a day are not trusted.

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
use crate::identity::secure_url;

const CONNECT_PATIENCE: Duration = Duration::from_secs(2);
/// For all of a fetch.
const PATIENCE: Duration = Duration::from_secs(5);
const LARGEST_REPLY: usize = 1024 * 1024;
/// Seconds after which keys are fetched anew while they still serve.
const FRESH: u64 = 3_600;
/// Seconds after which keys serve no more.
const LIFE: u64 = 86_400;
/// Seconds between two fetches.
const PAUSE: u64 = 60;
/// The same where there are no keys to go on with.
const PAUSE_WITHOUT: u64 = 1;

/// The keys, fetched when they are asked for.
pub(super) struct Keys {
    provider: Arc<Provider>,
    /// For fetches that nobody may be waiting for. They end by themselves, within seconds.
    tasks: TaskTracker,
}

impl Keys {
    /// Of an issuer, whose document says where they are unless it is known.
    pub(super) fn new(issuer: &str, jwks_url: Option<Url>) -> anyhow::Result<Keys> {
        // Fails only where another server of this process has done it.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let http = Client::builder()
            .connect_timeout(CONNECT_PATIENCE)
            .redirect(redirect::Policy::none())
            .no_proxy()
            .referer(false)
            .build()?;
        let provider = Provider {
            http,
            issuer: issuer.to_owned(),
            jwks_url,
            turn: tokio::sync::Mutex::default(),
            known: Mutex::default(),
        };
        Ok(Keys { provider: Arc::new(provider), tasks: TaskTracker::new() })
    }

    /// The key of this id, for this algorithm; none where the provider has no such key.
    pub(super) async fn find(
        &self,
        kid: Option<&str>,
        algorithm: Algorithm,
        now: i64,
    ) -> Result<Option<DecodingKey>, Error> {
        let mut known = self.provider.known().clone();
        if !known.is_younger_than(LIFE, now) {
            known = self.fetched(now).await;
            if !known.is_younger_than(LIFE, now) {
                return Err(Error::Provider(anyhow!("its keys are not known")));
            }
        } else if !known.is_younger_than(FRESH, now) && known.is_due(now) {
            self.fetch(now);
        }
        if let Some(key) = known.find(kid, algorithm) {
            return Ok(Some(key));
        }
        // It may sign with a new one.
        let known = self.fetched(now).await;
        match known.find(kid, algorithm) {
            None if known.failed => Err(Error::Provider(anyhow!("its keys may have changed"))),
            found => Ok(found),
        }
    }

    /// What is known after a fetch, if one is due.
    async fn fetched(&self, now: i64) -> Known {
        // Fails where the runtime ends.
        let _ = self.fetch(now).await;
        self.provider.known().clone()
    }

    fn fetch(&self, now: i64) -> JoinHandle<()> {
        let provider = Arc::clone(&self.provider);
        self.tasks.spawn(async move { provider.fetch_in_turn(now).await })
    }
}

#[derive(Clone, Default)]
struct Known {
    keys: Arc<Vec<Key>>,
    /// When the keys came.
    fetched: Option<i64>,
    /// When the last fetch began.
    tried: Option<i64>,
    /// How many fetches have ended.
    tries: u64,
    /// How the last one ended.
    failed: bool,
}

impl Known {
    fn is_younger_than(&self, seconds: u64, now: i64) -> bool {
        self.fetched.is_some_and(|fetched| now.abs_diff(fetched) < seconds)
    }

    fn is_due(&self, now: i64) -> bool {
        let pause = if self.is_younger_than(LIFE, now) { PAUSE } else { PAUSE_WITHOUT };
        self.tried.is_none_or(|tried| now.abs_diff(tried) >= pause)
    }

    /// A token may leave out the id where there is one key only: OpenID Connect Core 1.0, 10.1.
    fn find(&self, kid: Option<&str>, algorithm: Algorithm) -> Option<DecodingKey> {
        let is_it = |key: &&Key| match kid {
            Some(kid) => key.kid.as_deref() == Some(kid),
            None => self.keys.len() == 1,
        };
        let mut fitting = self.keys.iter().filter(|key| key.algorithm == algorithm);
        fitting.find(is_it).map(|key| key.public.clone())
    }
}

struct Provider {
    http: Client,
    issuer: String,
    jwks_url: Option<Url>,
    turn: tokio::sync::Mutex<()>,
    known: Mutex<Known>,
}

#[derive(Deserialize)]
struct Discovery {
    issuer: String,
    jwks_uri: String,
}

#[derive(Deserialize)]
struct KeySet {
    keys: Vec<serde_json::Value>,
}

impl Provider {
    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn fetch_in_turn(&self, now: i64) {
        let tries = self.known().tries;
        let _turn = self.turn.lock().await;
        {
            let mut known = self.known();
            // Another has fetched while this one waited.
            if known.tries != tries || !known.is_due(now) {
                return;
            }
            known.tried = Some(now);
        }
        let fetched = timeout(PATIENCE, self.fetch()).await;
        let fetched = fetched.unwrap_or_else(|_| Err(anyhow!("no answer in time")));
        let mut known = self.known();
        known.tries += 1;
        known.failed = fetched.is_err();
        match fetched {
            Ok(keys) => {
                known.keys = Arc::new(keys);
                known.fetched = Some(now);
            }
            Err(error) => {
                let cause = format!("{error:#}");
                tracing::warn!(cause, "the identity provider's keys can't be fetched");
            }
        }
    }

    async fn fetch(&self) -> anyhow::Result<Vec<Key>> {
        let url = match &self.jwks_url {
            Some(url) => url.clone(),
            None => self.discover().await.context("its discovery document")?,
        };
        let set: KeySet = self.get(url).await.context("its key set")?;
        let keys: Vec<_> = set.keys.into_iter().filter_map(Key::read).collect();
        ensure!(!keys.is_empty(), "its key set has no key for RS256, ES256 or EdDSA");
        Ok(keys)
    }

    async fn discover(&self) -> anyhow::Result<Url> {
        let base = self.issuer.trim_end_matches('/');
        let url = format!("{base}/.well-known/openid-configuration").parse()?;
        let found: Discovery = self.get(url).await?;
        ensure!(found.issuer == self.issuer, "is of another issuer");
        secure_url(&found.jwks_uri).map_err(|problem| anyhow!("jwks_uri {problem}"))
    }

    async fn get<T: DeserializeOwned>(&self, url: Url) -> anyhow::Result<T> {
        let mut response = self.http.get(url).send().await.map_err(|error| broken(&error))?;
        ensure!(response.status().is_success(), "answered {}", response.status());
        let mut body = Vec::new();
        while let Some(bytes) = response.chunk().await.map_err(|error| broken(&error))? {
            ensure!(body.len() + bytes.len() <= LARGEST_REPLY, "is over 1 MiB");
            body.extend_from_slice(&bytes);
        }
        // serde quotes what it can't read.
        serde_json::from_slice(&body).map_err(|error| {
            anyhow!("can't be read, at line {}, column {}", error.line(), error.column())
        })
    }
}

/// A connection that broke, without its URL.
fn broken(error: &reqwest::Error) -> anyhow::Error {
    let how = match () {
        () if error.is_timeout() => "no answer in time",
        () if error.is_connect() => "it can't be connected to",
        () => "the connection broke",
    };
    anyhow!(how)
}

struct Key {
    kid: Option<String>,
    algorithm: Algorithm,
    public: DecodingKey,
}

/// A public key as RFC 7517 writes it.
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

impl Key {
    /// None where it is a key for something else: a set may hold such.
    fn read(value: serde_json::Value) -> Option<Key> {
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
        let signs = jwk.purpose.is_none_or(|purpose| purpose == "sig");
        let fits = jwk.alg.is_none_or(|alg| alg == name);
        let public = key.ok()?;
        (signs && fits).then_some(Key { kid: jwk.kid, algorithm, public })
    }
}

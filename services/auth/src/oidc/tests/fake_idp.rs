//! A fake OpenID Connect provider: signing keys, and an HTTP server that publishes them.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use base64::Engine as _;
use base64::prelude::BASE64_URL_SAFE_NO_PAD as BASE64;
use ring::rand::SystemRandom;
use ring::signature::{
    ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, Ed25519KeyPair, KeyPair as _,
};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;
use tokio::task::JoinSet;

use super::oidc_verifier;
use crate::oidc::OidcVerifier;

/// A signing key of the provider.
pub(super) enum TestSigner {
    Ed25519(Ed25519KeyPair),
    P256(EcdsaKeyPair),
}

impl TestSigner {
    pub(super) fn ed25519() -> Self {
        let key = Ed25519KeyPair::generate_pkcs8(&SystemRandom::new()).unwrap();
        TestSigner::Ed25519(Ed25519KeyPair::from_pkcs8(key.as_ref()).unwrap())
    }

    pub(super) fn p256() -> Self {
        let (algorithm, random) = (&ECDSA_P256_SHA256_FIXED_SIGNING, SystemRandom::new());
        let key = EcdsaKeyPair::generate_pkcs8(algorithm, &random).unwrap();
        TestSigner::P256(EcdsaKeyPair::from_pkcs8(algorithm, key.as_ref(), &random).unwrap())
    }

    pub(super) fn jwk(&self, kid: &str) -> Value {
        match self {
            TestSigner::Ed25519(key) => json!({
                "kty": "OKP", "crv": "Ed25519", "kid": kid, "use": "sig",
                "x": BASE64.encode(key.public_key()),
            }),
            TestSigner::P256(key) => {
                let point = key.public_key().as_ref();
                json!({
                    "kty": "EC", "crv": "P-256", "kid": kid, "alg": "ES256",
                    "x": BASE64.encode(&point[1..33]), "y": BASE64.encode(&point[33..]),
                })
            }
        }
    }

    pub(super) fn sign(&self, kid: &str, claims: &Value) -> String {
        let alg = if matches!(self, TestSigner::Ed25519(_)) { "EdDSA" } else { "ES256" };
        self.sign_with(&json!({ "alg": alg, "kid": kid, "typ": "JWT" }), claims)
    }

    pub(super) fn sign_with(&self, header: &Value, claims: &Value) -> String {
        let encode = |value: &Value| BASE64.encode(value.to_string());
        let message = format!("{}.{}", encode(header), encode(claims));
        let signature = match self {
            TestSigner::Ed25519(key) => BASE64.encode(key.sign(message.as_bytes())),
            TestSigner::P256(key) => {
                BASE64.encode(key.sign(&SystemRandom::new(), message.as_bytes()).unwrap())
            }
        };
        format!("{message}.{signature}")
    }
}

/// A minimal HTTP/1.1 server with a discovery document and a key set.
pub(super) struct FakeIdp {
    pub(super) url: String,
    pub(super) responses: Arc<Mutex<CannedResponses>>,
    key_fetches: Arc<AtomicUsize>,
    _task: JoinSet<()>,
}

#[derive(Default)]
pub(super) struct CannedResponses {
    pub(super) discovery: Value,
    pub(super) keys: Value,
    pub(super) status: u16,
    pub(super) delay: Duration,
}

impl FakeIdp {
    pub(super) async fn start(keys: Vec<Value>) -> FakeIdp {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let discovery = json!({ "issuer": url, "jwks_uri": format!("{url}/keys") });
        let keys = json!({ "keys": keys });
        let responses = CannedResponses { discovery, keys, status: 200, delay: Duration::ZERO };
        let (responses, key_fetches) =
            (Arc::new(Mutex::new(responses)), Arc::new(AtomicUsize::new(0)));
        let mut task = JoinSet::new();
        let (served, counted) = (responses.clone(), key_fetches.clone());
        task.spawn(async move {
            loop {
                let (mut socket, _) = listener.accept().await.unwrap();
                let mut request = Vec::new();
                while !request.ends_with(b"\r\n\r\n") {
                    request.push(socket.read_u8().await.unwrap());
                }
                let is_keys = request.starts_with(b"GET /keys ");
                counted.fetch_add(usize::from(is_keys), Ordering::Relaxed);
                let (reply, delay) = {
                    let responses = served.lock().unwrap();
                    let body =
                        if is_keys { &responses.keys } else { &responses.discovery }.to_string();
                    let (status, length) = (responses.status, body.len());
                    let head = "location: /keys\r\nconnection: close\r\ncontent-length";
                    let reply = format!("HTTP/1.1 {status} X\r\n{head}: {length}\r\n\r\n{body}");
                    (reply, responses.delay)
                };
                tokio::time::sleep(delay).await;
                let _ = socket.write_all(reply.as_bytes()).await;
            }
        });
        FakeIdp { url, responses, key_fetches, _task: task }
    }

    pub(super) fn set(&self, change: impl FnOnce(&mut CannedResponses)) {
        change(&mut self.responses.lock().unwrap());
    }

    pub(super) fn key_fetch_count(&self) -> usize {
        self.key_fetches.load(Ordering::Relaxed)
    }

    /// A verifier that fetches keys from this provider, and whose issuer is another URL.
    pub(super) fn verifier(&self) -> OidcVerifier {
        oidc_verifier(&["--oidc-jwks-url", &format!("{}/keys", self.url)])
    }
}

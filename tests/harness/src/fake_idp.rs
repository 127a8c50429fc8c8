//! A fake identity provider on loopback: it publishes its keys, and signs ID tokens.

use std::time::{SystemTime, UNIX_EPOCH};

use base64::Engine as _;
use base64::prelude::BASE64_URL_SAFE_NO_PAD as BASE64;
use ring::rand::SystemRandom;
use ring::signature::{Ed25519KeyPair, KeyPair as _};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

/// A running identity provider. Dropping it stops it.
#[derive(Debug)]
pub struct FakeIdp {
    /// The value for OIDC_ISSUER.
    pub issuer: String,
    key: Ed25519KeyPair,
    _serving: JoinSet<()>,
}

impl FakeIdp {
    /// Starts an identity provider with a new key.
    pub async fn start() -> FakeIdp {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("a bound port");
        let issuer = format!("http://{address}");
        let pkcs8 = Ed25519KeyPair::generate_pkcs8(&SystemRandom::new()).expect("a key");
        let key = Ed25519KeyPair::from_pkcs8(pkcs8.as_ref()).expect("a key");
        let public = BASE64.encode(key.public_key());
        let keys = json!({ "keys": [
            { "kty": "OKP", "crv": "Ed25519", "alg": "EdDSA", "use": "sig", "kid": "k", "x": public },
        ]});
        let about = json!({ "issuer": issuer, "jwks_uri": format!("{issuer}/keys") });
        let mut serving = JoinSet::new();
        serving.spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                answer(stream, &keys, &about).await;
            }
        });
        FakeIdp { issuer, key, _serving: serving }
    }

    /// An ID token for `hapa` with these claims besides the usual ones.
    pub fn vouch(&self, claims: &Value) -> String {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("a clock").as_secs();
        let mut all = json!({ "iss": self.issuer, "aud": "hapa", "iat": now, "exp": now + 300 });
        for (name, value) in claims.as_object().into_iter().flatten() {
            all[name] = value.clone();
        }
        let part = |value: &Value| BASE64.encode(value.to_string());
        let head = json!({ "alg": "EdDSA", "typ": "JWT", "kid": "k" });
        let text = format!("{}.{}", part(&head), part(&all));
        let signature = BASE64.encode(self.key.sign(text.as_bytes()));
        format!("{text}.{signature}")
    }
}

async fn answer(mut stream: TcpStream, keys: &Value, about: &Value) {
    let mut request = vec![0; 4_096];
    let Ok(read) = stream.read(&mut request).await else { return };
    let body = if request[..read].starts_with(b"GET /keys") { keys } else { about }.to_string();
    let head = format!(
        "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\nconnection: close\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    let _ = stream.write_all((head + &body).as_bytes()).await;
}

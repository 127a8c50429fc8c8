//! ID tokens of a fake identity provider on a loopback port, signed with keys of the tests.

mod fake_idp;

use std::sync::LazyLock;
use std::time::Duration;

use base64::Engine as _;
use base64::prelude::BASE64_URL_SAFE_NO_PAD as BASE64;
use clap::Parser;
use jsonwebtoken::EncodingKey;
use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::oidc::tests::fake_idp::{FakeIdp, TestSigner};

const NOW: i64 = 1_800_000_000;
const ISSUER: &str = "https://login.example.com";
/// A test key, made once with `openssl genrsa`; its private half was thrown away.
const RSA_MODULUS: &str = "\
    ojoV9liJ1pqD2jr5BBouNlyfGNEyJaG2dpa5gCeXgLaKYsjdm7xUroL_ftJiO4gDuvtuHKkNChpgWJdaV9WzUPK1QlMx\
    UHHhL0DpzZljeeZkJxpyTxxfqASZvD-Qqj-xnb3-tv5H7QA13fhRaa7MHgXcl35ErZOCozw47AZGX0R9bjFSi9BOypr1\
    dKRGB24SG73b5U1MZQuU28S5VHNsoJGxnlAalTDN_EH68p3eYwtSai9c0Yf6S5A8gWarHbCSPEuMvBrpbhZkGAowH0Of\
    lauIvWpW7fMKwHTf873fvnMEUWM9TLA5ClGBH-fHKB2sxvrW1CcI8id5AIRd22gTTQ";
/// Signed once with that key: RS256, rsa-1, the claims of `claims` from NOW for 300 s.
const RSA_TOKEN: &str = "\
    eyJhbGciOiJSUzI1NiIsInR5cCI6IkpXVCIsImtpZCI6InJzYS0xIn0.eyJpc3MiOiJodHRwczovL2xvZ2luLmV4YW1w\
    bGUuY29tIiwic3ViIjoidS0xIiwiYXVkIjoiaGFwYSIsImlhdCI6MTgwMDAwMDAwMCwiZXhwIjoxODAwMDAwMzAwLCJl\
    bWFpbCI6ImFkYUBleGFtcGxlLmNvbSIsIm5hbWUiOiJBZGEifQ.L6VZJY9Zc5yRk7VgUi-XEWjtR156IKXOyEZZaxzJ5\
    op7bFy51wSGYuBscAlIWT3QZYhKG6yl5-LDZTHajv91OMyGXhSn2uoiayZFHMaOfa64u7XK1t9pC8Qa_NQddP4w0vu9S\
    6yS5Y-eg9cYweL6-81OerZYx24Trk7d0YCHkQGDNWZ3EmhOw8irqPu-wKTNJSKUm6rrO-DaGEucSjUuEmhxNd8xh9mt9\
    IT39DTE2Ja6tW_sMsISIxGno2Puzio2BTDR_LAsuBVkeoX8Fw2W2oiTT4B0TzLOvsLuF7OQQgs12FHw8_JwCkixOeA_B\
    yuhBWYZsHJCssn31pyNkkkrmQ";

#[derive(Parser)]
struct OidcCli {
    #[command(flatten)]
    oidc: OidcConfig,
}

fn config(arguments: &[&str]) -> OidcConfig {
    OidcCli::try_parse_from([&["test"], arguments].concat()).unwrap().oidc
}

fn oidc_verifier(arguments: &[&str]) -> OidcVerifier {
    let base = ["--oidc-issuer", ISSUER, "--oidc-audience", "hapa"];
    OidcVerifier::new(&config(&[&base, arguments].concat())).unwrap().unwrap()
}

fn claims() -> Value {
    json!({
        "iss": ISSUER, "sub": "u-1", "aud": "hapa", "iat": NOW, "exp": NOW + 300,
        "email": "Ada@Example.com", "name": "Ada",
    })
}

fn claims_with(name: &str, value: Value) -> Value {
    let mut claims = claims();
    claims[name] = value;
    claims
}

fn ada_identity() -> VerifiedIdentity {
    let [subject, email, name] = ["u-1", "ada@example.com", "Ada"].map(str::to_owned);
    VerifiedIdentity { subject, email, email_verified: false, name }
}

#[tokio::test]
async fn tokens_signed_with_each_key_type_are_verified() {
    let (ed, ec) = (TestSigner::ed25519(), TestSigner::p256());
    let rsa = json!({ "kty": "RSA", "kid": "rsa-1", "n": RSA_MODULUS, "e": "AQAB", "use": "sig" });
    let odd = json!({ "kty": "EC", "crv": "secp256k1", "kid": "odd", "x": "", "y": "" });
    let idp = FakeIdp::start(vec![odd, ed.jwk("ed-1"), ec.jwk("ec-1"), rsa]).await;
    let verifier = idp.verifier();
    for token in [&ed.sign("ed-1", &claims()), &ec.sign("ec-1", &claims()), RSA_TOKEN] {
        assert_eq!(verifier.verify(token, NOW).await.unwrap(), ada_identity());
    }
    let (message, signature) = RSA_TOKEN.rsplit_once('.').unwrap();
    let cut = format!("{message}.{}", &signature[4..]);
    assert!(matches!(verifier.verify(&cut, NOW).await, Err(Error::InvalidLogin)));
    assert_eq!(idp.key_fetch_count(), 1);
}

#[tokio::test]
async fn the_key_set_is_found_by_discovery() {
    let ed = TestSigner::ed25519();
    let idp = FakeIdp::start(vec![ed.jwk("1")]).await;
    let issuer = ["--oidc-issuer", &idp.url, "--oidc-audience", "hapa"];
    let new_verifier = || OidcVerifier::new(&config(&issuer)).unwrap().unwrap();
    let token = ed.sign("1", &claims_with("iss", json!(idp.url)));
    assert_eq!(new_verifier().verify(&token, NOW).await.unwrap(), ada_identity());
    // Reaches the fake provider too, but is not a loopback address.
    let elsewhere = format!("{}/keys", idp.url.replace("127.0.0.1", "0.0.0.0"));
    for (field, value) in [("issuer", ISSUER), ("jwks_uri", &elsewhere)] {
        let discovery = json!({ "issuer": idp.url, "jwks_uri": format!("{}/keys", idp.url) });
        idp.set(|responses| responses.discovery = discovery);
        idp.set(|responses| responses.discovery[field] = json!(value));
        assert!(
            matches!(new_verifier().verify(&token, NOW).await, Err(Error::OidcUnavailable(_))),
            "{field}"
        );
    }
}

#[tokio::test]
async fn every_wrong_claim_is_rejected() {
    let ed = TestSigner::ed25519();
    let idp = FakeIdp::start(vec![ed.jwk("1")]).await;
    let verifier = idp.verifier();
    let wrong = [
        ("iss", json!("https://login.example.com/")),
        ("iss", Value::Null),
        ("aud", json!("other")),
        ("aud", json!([])),
        ("aud", json!(["hapa", "other"])),
        ("aud", Value::Null),
        ("exp", json!(NOW - 60)),
        ("exp", Value::Null),
        ("iat", json!(NOW + 61)),
        ("iat", Value::Null),
        ("nbf", json!(NOW + 61)),
        ("sub", json!("")),
        ("email", Value::Null),
        ("email", json!("nobody")),
        ("email", json!("a@b@c")),
        ("email", json!("a b@c")),
        ("email_verified", json!(false)),
        ("email_verified", json!("false")),
    ];
    for (name, value) in wrong {
        let result = verifier.verify(&ed.sign("1", &claims_with(name, value.clone())), NOW).await;
        assert!(matches!(result, Err(Error::InvalidLogin)), "{name} is {value}");
    }
}

#[tokio::test]
async fn claims_at_the_limits_are_accepted() {
    let ed = TestSigner::ed25519();
    let idp = FakeIdp::start(vec![ed.jwk("1")]).await;
    let verifier = idp.verifier();
    let authorized = |audiences| {
        let mut claims = claims_with("aud", audiences);
        claims["azp"] = json!("hapa");
        claims
    };
    let foreign = ed.sign("1", &authorized(json!(["other", "third"])));
    assert!(matches!(verifier.verify(&foreign, NOW).await, Err(Error::InvalidLogin)));
    let right = [
        authorized(json!(["other", "hapa"])),
        claims_with("aud", json!(["hapa"])),
        claims_with("exp", json!(NOW - 59)),
        claims_with("iat", json!(NOW + 60)),
    ];
    for claims in right {
        assert_eq!(
            verifier.verify(&ed.sign("1", &claims), NOW).await.unwrap(),
            ada_identity(),
            "{claims}"
        );
    }
    for verified in [json!("true"), json!(true)] {
        let claims = claims_with("email_verified", verified);
        let identity = verifier.verify(&ed.sign("1", &claims), NOW).await.unwrap();
        assert_eq!(identity, VerifiedIdentity { email_verified: true, ..ada_identity() });
    }
    let claims = claims_with("name", json!("\n"));
    let nameless = verifier.verify(&ed.sign("1", &claims), NOW).await.unwrap().name;
    assert_eq!(nameless, "ada@example.com");
}

#[tokio::test]
async fn a_token_cannot_choose_how_it_is_verified() {
    let (ed, ec) = (TestSigner::ed25519(), TestSigner::p256());
    let oct = json!({ "kty": "oct", "kid": "oct", "k": BASE64.encode("x"), "alg": "HS256" });
    let mut encryption_key = ed.jwk("enc");
    encryption_key["use"] = json!("enc");
    let mut key_agreement_key = ed.jwk("other");
    key_agreement_key["alg"] = json!("ECDH-ES");
    let keys = vec![ed.jwk("ed"), ec.jwk("ec"), oct, encryption_key, key_agreement_key];
    let idp = FakeIdp::start(keys).await;
    let verifier = idp.verifier();
    let public = EncodingKey::from_secret(ed.jwk("ed")["x"].as_str().unwrap().as_bytes());
    let sign_hs256 = |kid| jws::sign(Algorithm::HS256, kid, &claims(), &public).unwrap();
    let genuine = ed.sign("ed", &claims());
    let (message, _) = genuine.rsplit_once('.').unwrap();
    let payload = message.split_once('.').unwrap().1;
    let none = BASE64.encode(r#"{"alg":"none","kid":"ed"}"#);
    let forged = [
        sign_hs256("ed"),
        sign_hs256("oct"),
        format!("{none}.{payload}."),
        format!("{message}."),
        ed.sign("ec", &claims()),
        ec.sign("ed", &claims()),
        ed.sign("enc", &claims()),
        ed.sign("other", &claims()),
        TestSigner::ed25519().sign("ed", &claims()),
        ed.sign_with(&json!({ "alg": "ES256", "kid": "ed" }), &claims()),
        ed.sign_with(&json!({ "alg": "EdDSA", "kid": "ed", "crit": ["x"] }), &claims()),
        ed.sign_with(&json!({ "alg": "EdDSA", "kid": "ed", "typ": "at+jwt" }), &claims()),
        ed.sign_with(&json!({ "alg": "EdDSA" }), &claims()),
        ed.sign("ed", &claims_with("more", json!("x".repeat(MAX_ID_TOKEN_BYTES)))),
    ];
    for token in forged {
        let refused = verifier.verify(&token, NOW).await.unwrap_err();
        assert!(matches!(refused, Error::InvalidLogin), "{token}: {refused}");
    }
    assert_eq!(verifier.verify(&genuine, NOW).await.unwrap(), ada_identity());
}

#[tokio::test]
async fn only_verified_addresses_of_the_listed_domains_are_accepted() {
    let ed = TestSigner::ed25519();
    let idp = FakeIdp::start(vec![ed.jwk("1")]).await;
    let keys = format!("{}/keys", idp.url);
    let domains = ["--oidc-jwks-url", &keys, "--oidc-email-domains", " Example.com,other.org"];
    let verifier = oidc_verifier(&domains);
    let verify = async |email: &str| {
        let mut claims = claims_with("email", json!(email));
        claims["email_verified"] = json!(true);
        verifier.verify(&ed.sign("1", &claims), NOW).await.is_ok()
    };
    assert!(verify("ada@EXAMPLE.com").await);
    assert!(!verify("ada@sub.example.com").await);
    assert!(!verify("ada@example.com.evil.org").await);
    assert!(!verify("ada@evilexample.com").await);
    for unverified in [json!(false), json!(null), json!("yes"), json!(1), json!({}), json!("True")]
    {
        let claims = claims_with("email_verified", unverified.clone());
        let result = verifier.verify(&ed.sign("1", &claims), NOW).await;
        assert!(matches!(result, Err(Error::InvalidLogin)), "{unverified}");
    }
    let refused = verifier.verify(&ed.sign("1", &claims()), NOW).await;
    assert!(
        matches!(refused, Err(Error::InvalidLogin)),
        "the token does not say whether the address is verified"
    );
    let textual = claims_with("email_verified", json!("true"));
    assert!(verifier.verify(&ed.sign("1", &textual), NOW).await.is_ok());
}

#[tokio::test]
async fn a_new_key_is_fetched_and_an_unknown_one_causes_one_fetch_a_minute() {
    let (old, new) = (TestSigner::ed25519(), TestSigner::p256());
    let idp = FakeIdp::start(vec![old.jwk("old")]).await;
    let verifier = idp.verifier();
    // A token may omit the key id while there is one key.
    let token = old.sign_with(&json!({ "alg": "EdDSA" }), &claims());
    assert!(verifier.verify(&token, NOW).await.is_ok());
    idp.set(|responses| responses.keys = json!({ "keys": [new.jwk("new")] }));
    let token = new.sign("new", &claims());
    for _ in 0..3 {
        assert!(matches!(verifier.verify(&token, NOW + 59).await, Err(Error::InvalidLogin)));
    }
    assert_eq!(idp.key_fetch_count(), 1);
    assert!(verifier.verify(&token, NOW + 60).await.is_ok());
    let removed_key = verifier.verify(&old.sign("old", &claims()), NOW + 61).await;
    assert!(matches!(removed_key, Err(Error::InvalidLogin)));
    assert_eq!(idp.key_fetch_count(), 2);
}

#[tokio::test]
async fn cached_keys_are_used_for_a_day_while_the_provider_is_unreachable() {
    let ed = TestSigner::ed25519();
    let idp = FakeIdp::start(vec![ed.jwk("1")]).await;
    let verifier = idp.verifier();
    let token = ed.sign("1", &claims_with("exp", json!(NOW + 200_000)));
    let other = ed.sign("2", &claims_with("exp", json!(NOW + 200_000)));
    assert!(verifier.verify(&token, NOW).await.is_ok());
    idp.set(|responses| responses.status = 503);
    assert!(verifier.verify(&token, NOW + 3_600).await.is_ok());
    // Waits for the fetch in the background, which may serve this caller too.
    let unknown = verifier.verify(&other, NOW + 3_600).await;
    assert!(matches!(unknown, Err(Error::OidcUnavailable(_))));
    assert_eq!(idp.key_fetch_count(), 2);
    assert!(verifier.verify(&token, NOW + 86_399).await.is_ok());
    let refused = verifier.verify(&token, NOW + 86_400).await.unwrap_err();
    assert!(matches!(refused, Error::OidcUnavailable(_)));
    let status = tonic::Status::from(refused);
    assert_eq!(status.code(), tonic::Code::Unavailable);
    assert_eq!(status.message(), "the identity provider is unreachable; try again");
    idp.set(|responses| responses.status = 200);
    assert!(verifier.verify(&token, NOW + 86_401).await.is_ok());
}

#[tokio::test]
async fn concurrent_callers_share_one_fetch_which_outlives_a_dropped_caller() {
    let ed = TestSigner::ed25519();
    let idp = FakeIdp::start(vec![ed.jwk("1")]).await;
    idp.set(|responses| responses.delay = Duration::from_millis(100));
    let verifier = idp.verifier();
    let token = ed.sign("1", &claims());
    let left = tokio::time::timeout(Duration::from_millis(20), verifier.verify(&token, NOW)).await;
    assert!(left.is_err());
    let callers = (0..20).map(|_| verifier.verify(&token, NOW));
    for verified in futures_util::future::join_all(callers).await {
        assert_eq!(verified.unwrap(), ada_identity());
    }
    assert_eq!(idp.key_fetch_count(), 1);
}

#[tokio::test]
async fn callers_that_waited_for_a_failed_fetch_do_not_start_another() {
    let ed = TestSigner::ed25519();
    let idp = FakeIdp::start(vec![ed.jwk("1")]).await;
    idp.set(|responses| (responses.status, responses.delay) = (503, Duration::from_millis(100)));
    let (verifier, token) = (idp.verifier(), ed.sign("1", &claims()));
    let callers = (0..20).map(|second| verifier.verify(&token, NOW + second));
    for refused in futures_util::future::join_all(callers).await {
        assert!(matches!(refused, Err(Error::OidcUnavailable(_))));
    }
    assert_eq!(idp.key_fetch_count(), 1);
}

#[tokio::test]
async fn invalid_responses_of_the_provider_are_not_a_key_set() {
    let ed = TestSigner::ed25519();
    let idp = FakeIdp::start(vec![ed.jwk("1")]).await;
    let token = ed.sign("1", &claims());
    let good = idp.responses.lock().unwrap().keys.clone();
    let mut large = good.clone();
    large["padding"] = json!("x".repeat(1024 * 1024));
    let answers =
        [(200, json!({})), (200, json!({ "keys": [] })), (302, good.clone()), (200, large)];
    for (status, keys) in answers {
        idp.set(|responses| (responses.status, responses.keys) = (status, keys));
        let refused = idp.verifier().verify(&token, NOW).await;
        assert!(matches!(refused, Err(Error::OidcUnavailable(_))), "{status}");
    }
    assert!(idp.key_fetch_count() >= 4);
}

#[test]
fn a_rejection_is_one_fixed_sentence() {
    let status = tonic::Status::from(Error::InvalidLogin);
    assert_eq!(status.code(), tonic::Code::Unauthenticated);
    assert_eq!(hapa_core::rpc_error::published_code(&status).unwrap().0, "E4003");
    let message =
        "the login is invalid: check the email address and the password, or request a new ID token";
    assert_eq!(status.message(), message);
}

#[tokio::test]
async fn invalid_settings_are_rejected_by_name() {
    assert!(OidcVerifier::new(&config(&[])).unwrap().is_none());
    assert!(OidcVerifier::new(&config(&["--oidc-issuer", ""])).unwrap().is_none());
    let refused = |arguments: &[&str]| {
        let base = ["--oidc-issuer", ISSUER, "--oidc-audience", "hapa"];
        let arguments = if arguments[0] == "--oidc-issuer" {
            arguments.to_vec()
        } else {
            [&base, arguments].concat()
        };
        let error = OidcVerifier::new(&config(&arguments)).err().unwrap();
        error.downcast::<ConfigError>().unwrap().name
    };
    for url in [
        "login",
        "http://login.example.com",
        "https://u:p@x.org",
        "https://x.org#f",
        "ftp://localhost",
    ] {
        assert_eq!(refused(&["--oidc-issuer", url]), "OIDC_ISSUER");
        assert_eq!(refused(&["--oidc-jwks-url", url]), "OIDC_JWKS_URL");
    }
    assert_eq!(refused(&["--oidc-issuer", "https://x.org?q"]), "OIDC_ISSUER");
    assert_eq!(refused(&["--oidc-issuer", ISSUER]), "OIDC_AUDIENCE");
    assert_eq!(refused(&["--oidc-scopes", "codegen:generate,auth:admin"]), "OIDC_SCOPES");
    assert_eq!(refused(&["--oidc-scopes", "codegen:all"]), "OIDC_SCOPES");
    assert_eq!(refused(&["--oidc-email-domains", "@example.com"]), "OIDC_EMAIL_DOMAINS");
    for url in ["http://localhost:1/x", "http://127.0.0.1", "http://[::1]:5/", "https://x.org/a?b"]
    {
        assert!(secure_url(url).is_ok(), "{url}");
    }
    assert!(secure_url("http://localhost.example.com").is_err());
    let defaults = ["codegen:generate", "codegen:complete", "errors:read", "analytics:read"];
    assert_eq!(oidc_verifier(&[]).scopes(), defaults);
    assert_eq!(oidc_verifier(&["--oidc-scopes", ""]).scopes(), &[] as &[String]);
}

/// Shared by all cases, because each HTTP client reads the machine's certificates.
static UNREACHABLE_PROVIDER: LazyLock<OidcVerifier> = LazyLock::new(|| oidc_verifier(&[]));

proptest! {
    #[test]
    fn arbitrary_text_is_not_an_id_token_and_never_panics(text in "(\\PC{0,80}|([A-Za-z0-9_-]{0,30}\\.){0,3})") {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let refused = runtime.block_on(UNREACHABLE_PROVIDER.verify(&text, NOW));
        prop_assert!(matches!(refused, Err(Error::InvalidLogin)));
    }

    #[test]
    fn an_email_domain_is_what_follows_the_only_at_sign(email in "\\PC{0,40}") {
        if let Some(domain) = email_domain(&email) {
            prop_assert_eq!(email.matches('@').count(), 1);
            prop_assert!(email.ends_with(domain) && !domain.is_empty());
        }
    }
}

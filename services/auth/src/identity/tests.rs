//! A provider on this machine, whose keys the test has.

mod provider;

use std::sync::LazyLock;
use std::time::Duration;

use base64::Engine as _;
use base64::prelude::BASE64_URL_SAFE_NO_PAD as BASE64;
use clap::Parser;
use jsonwebtoken::EncodingKey;
use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::identity::tests::provider::{Provider, Signer};

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
struct Settings {
    #[command(flatten)]
    identity: IdentityConfig,
}

fn config(arguments: &[&str]) -> IdentityConfig {
    Settings::try_parse_from([&["test"], arguments].concat()).unwrap().identity
}

fn identity(arguments: &[&str]) -> Identity {
    let base = ["--oidc-issuer", ISSUER, "--oidc-audience", "hapa"];
    Identity::new(&config(&[&base, arguments].concat())).unwrap().unwrap()
}

fn claims() -> Value {
    json!({
        "iss": ISSUER, "sub": "u-1", "aud": "hapa", "iat": NOW, "exp": NOW + 300,
        "email": "Ada@Example.com", "name": "Ada",
    })
}

fn with(name: &str, value: Value) -> Value {
    let mut claims = claims();
    claims[name] = value;
    claims
}

fn ada() -> Person {
    let [subject, email, name] = ["u-1", "ada@example.com", "Ada"].map(str::to_owned);
    Person { subject, email, email_verified: false, name }
}

#[tokio::test]
async fn people_are_known_by_keys_of_each_type() {
    let (ed, ec) = (Signer::ed(), Signer::ec());
    let rsa = json!({ "kty": "RSA", "kid": "rsa-1", "n": RSA_MODULUS, "e": "AQAB", "use": "sig" });
    let odd = json!({ "kty": "EC", "crv": "secp256k1", "kid": "odd", "x": "", "y": "" });
    let provider = Provider::start(vec![odd, ed.jwk("ed-1"), ec.jwk("ec-1"), rsa]).await;
    let identity = provider.identity();
    for token in [&ed.sign("ed-1", &claims()), &ec.sign("ec-1", &claims()), RSA_TOKEN] {
        assert_eq!(identity.verify(token, NOW).await.unwrap(), ada());
    }
    let (message, signature) = RSA_TOKEN.rsplit_once('.').unwrap();
    let cut = format!("{message}.{}", &signature[4..]);
    assert!(matches!(identity.verify(&cut, NOW).await, Err(Error::BadProof)));
    assert_eq!(provider.fetches(), 1);
}

#[tokio::test]
async fn the_keys_are_found_by_discovery() {
    let ed = Signer::ed();
    let provider = Provider::start(vec![ed.jwk("1")]).await;
    let issuer = ["--oidc-issuer", &provider.url, "--oidc-audience", "hapa"];
    let found = || Identity::new(&config(&issuer)).unwrap().unwrap();
    let token = ed.sign("1", &with("iss", json!(provider.url)));
    assert_eq!(found().verify(&token, NOW).await.unwrap(), ada());
    // Leads here too, but is not what this machine calls itself.
    let elsewhere = format!("{}/keys", provider.url.replace("127.0.0.1", "0.0.0.0"));
    for (field, value) in [("issuer", ISSUER), ("jwks_uri", &elsewhere)] {
        let discovery =
            json!({ "issuer": provider.url, "jwks_uri": format!("{}/keys", provider.url) });
        provider.set(|pages| pages.discovery = discovery);
        provider.set(|pages| pages.discovery[field] = json!(value));
        assert!(matches!(found().verify(&token, NOW).await, Err(Error::Provider(_))), "{field}");
    }
}

#[tokio::test]
async fn every_wrong_claim_is_refused() {
    let ed = Signer::ed();
    let provider = Provider::start(vec![ed.jwk("1")]).await;
    let identity = provider.identity();
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
        let verified = identity.verify(&ed.sign("1", &with(name, value.clone())), NOW).await;
        assert!(matches!(verified, Err(Error::BadProof)), "{name} is {value}");
    }
}

#[tokio::test]
async fn what_is_just_right_passes() {
    let ed = Signer::ed();
    let provider = Provider::start(vec![ed.jwk("1")]).await;
    let identity = provider.identity();
    let authorized = |audiences| {
        let mut claims = with("aud", audiences);
        claims["azp"] = json!("hapa");
        claims
    };
    let foreign = ed.sign("1", &authorized(json!(["other", "third"])));
    assert!(matches!(identity.verify(&foreign, NOW).await, Err(Error::BadProof)));
    let right = [
        authorized(json!(["other", "hapa"])),
        with("aud", json!(["hapa"])),
        with("exp", json!(NOW - 59)),
        with("iat", json!(NOW + 60)),
    ];
    for claims in right {
        assert_eq!(identity.verify(&ed.sign("1", &claims), NOW).await.unwrap(), ada(), "{claims}");
    }
    for verified in [json!("true"), json!(true)] {
        let claims = with("email_verified", verified);
        let person = identity.verify(&ed.sign("1", &claims), NOW).await.unwrap();
        assert_eq!(person, Person { email_verified: true, ..ada() });
    }
    let claims = with("name", json!("\n"));
    let nameless = identity.verify(&ed.sign("1", &claims), NOW).await.unwrap().name;
    assert_eq!(nameless, "ada@example.com");
}

#[tokio::test]
async fn a_token_can_not_choose_how_it_is_checked() {
    let (ed, ec) = (Signer::ed(), Signer::ec());
    let oct = json!({ "kty": "oct", "kid": "oct", "k": BASE64.encode("x"), "alg": "HS256" });
    let mut for_secrets = ed.jwk("enc");
    for_secrets["use"] = json!("enc");
    let mut for_another = ed.jwk("other");
    for_another["alg"] = json!("ECDH-ES");
    let keys = vec![ed.jwk("ed"), ec.jwk("ec"), oct, for_secrets, for_another];
    let provider = Provider::start(keys).await;
    let identity = provider.identity();
    let public = EncodingKey::from_secret(ed.jwk("ed")["x"].as_str().unwrap().as_bytes());
    let seal = |kid| jws::seal(Algorithm::HS256, kid, &claims(), &public).unwrap();
    let genuine = ed.sign("ed", &claims());
    let (message, _) = genuine.rsplit_once('.').unwrap();
    let payload = message.split_once('.').unwrap().1;
    let none = BASE64.encode(r#"{"alg":"none","kid":"ed"}"#);
    let forged = [
        seal("ed"),
        seal("oct"),
        format!("{none}.{payload}."),
        format!("{message}."),
        ed.sign("ec", &claims()),
        ec.sign("ed", &claims()),
        ed.sign("enc", &claims()),
        ed.sign("other", &claims()),
        Signer::ed().sign("ed", &claims()),
        ed.sign_with(&json!({ "alg": "ES256", "kid": "ed" }), &claims()),
        ed.sign_with(&json!({ "alg": "EdDSA", "kid": "ed", "crit": ["x"] }), &claims()),
        ed.sign_with(&json!({ "alg": "EdDSA", "kid": "ed", "typ": "at+jwt" }), &claims()),
        ed.sign_with(&json!({ "alg": "EdDSA" }), &claims()),
        ed.sign("ed", &with("more", json!("x".repeat(LONGEST)))),
    ];
    for token in forged {
        let refused = identity.verify(&token, NOW).await.unwrap_err();
        assert!(matches!(refused, Error::BadProof), "{token}: {refused}");
    }
    assert_eq!(identity.verify(&genuine, NOW).await.unwrap(), ada());
}

#[tokio::test]
async fn only_addresses_of_the_listed_domains_are_let_in() {
    let ed = Signer::ed();
    let provider = Provider::start(vec![ed.jwk("1")]).await;
    let keys = format!("{}/keys", provider.url);
    let domains = ["--oidc-jwks-url", &keys, "--oidc-email-domains", " Example.com,other.org"];
    let identity = identity(&domains);
    let verify = async |email: &str| {
        let mut claims = with("email", json!(email));
        claims["email_verified"] = json!(true);
        identity.verify(&ed.sign("1", &claims), NOW).await.is_ok()
    };
    assert!(verify("ada@EXAMPLE.com").await);
    assert!(!verify("ada@sub.example.com").await);
    assert!(!verify("ada@example.com.evil.org").await);
    assert!(!verify("ada@evilexample.com").await);
    for unverified in [json!(false), json!(null), json!("yes"), json!(1), json!({}), json!("True")]
    {
        let claims = with("email_verified", unverified.clone());
        let verified = identity.verify(&ed.sign("1", &claims), NOW).await;
        assert!(matches!(verified, Err(Error::BadProof)), "{unverified}");
    }
    let refused = identity.verify(&ed.sign("1", &claims()), NOW).await;
    assert!(matches!(refused, Err(Error::BadProof)), "nothing is said of the address");
    let textual = with("email_verified", json!("true"));
    assert!(identity.verify(&ed.sign("1", &textual), NOW).await.is_ok());
}

#[tokio::test]
async fn a_new_key_is_found_and_an_unknown_one_asks_once_a_minute() {
    let (old, new) = (Signer::ed(), Signer::ec());
    let provider = Provider::start(vec![old.jwk("old")]).await;
    let identity = provider.identity();
    // A token may leave out the id while there is one key.
    let token = old.sign_with(&json!({ "alg": "EdDSA" }), &claims());
    assert!(identity.verify(&token, NOW).await.is_ok());
    provider.set(|pages| pages.keys = json!({ "keys": [new.jwk("new")] }));
    let token = new.sign("new", &claims());
    for _ in 0..3 {
        assert!(matches!(identity.verify(&token, NOW + 59).await, Err(Error::BadProof)));
    }
    assert_eq!(provider.fetches(), 1);
    assert!(identity.verify(&token, NOW + 60).await.is_ok());
    let gone = identity.verify(&old.sign("old", &claims()), NOW + 61).await;
    assert!(matches!(gone, Err(Error::BadProof)));
    assert_eq!(provider.fetches(), 2);
}

#[tokio::test]
async fn old_keys_serve_for_a_day_while_the_provider_is_away() {
    let ed = Signer::ed();
    let provider = Provider::start(vec![ed.jwk("1")]).await;
    let identity = provider.identity();
    let token = ed.sign("1", &with("exp", json!(NOW + 200_000)));
    let other = ed.sign("2", &with("exp", json!(NOW + 200_000)));
    assert!(identity.verify(&token, NOW).await.is_ok());
    provider.set(|pages| pages.status = 503);
    assert!(identity.verify(&token, NOW + 3_600).await.is_ok());
    // Waits for the fetch in the background, which may be this key's.
    let unknown = identity.verify(&other, NOW + 3_600).await;
    assert!(matches!(unknown, Err(Error::Provider(_))));
    assert_eq!(provider.fetches(), 2);
    assert!(identity.verify(&token, NOW + 86_399).await.is_ok());
    let refused = identity.verify(&token, NOW + 86_400).await.unwrap_err();
    assert!(matches!(refused, Error::Provider(_)));
    let status = tonic::Status::from(refused);
    assert_eq!(status.code(), tonic::Code::Unavailable);
    assert_eq!(status.message(), "the identity provider can't be asked at the moment; try again");
    provider.set(|pages| pages.status = 200);
    assert!(identity.verify(&token, NOW + 86_401).await.is_ok());
}

#[tokio::test]
async fn many_callers_share_one_fetch_and_one_who_leaves_does_not_end_it() {
    let ed = Signer::ed();
    let provider = Provider::start(vec![ed.jwk("1")]).await;
    provider.set(|pages| pages.delay = Duration::from_millis(100));
    let identity = provider.identity();
    let token = ed.sign("1", &claims());
    let left = tokio::time::timeout(Duration::from_millis(20), identity.verify(&token, NOW)).await;
    assert!(left.is_err());
    let callers = (0..20).map(|_| identity.verify(&token, NOW));
    for verified in futures_util::future::join_all(callers).await {
        assert_eq!(verified.unwrap(), ada());
    }
    assert_eq!(provider.fetches(), 1);
}

#[tokio::test]
async fn who_waited_for_a_fetch_that_failed_does_not_begin_another() {
    let ed = Signer::ed();
    let provider = Provider::start(vec![ed.jwk("1")]).await;
    provider.set(|pages| (pages.status, pages.delay) = (503, Duration::from_millis(100)));
    let (identity, token) = (provider.identity(), ed.sign("1", &claims()));
    let callers = (0..20).map(|second| identity.verify(&token, NOW + second));
    for refused in futures_util::future::join_all(callers).await {
        assert!(matches!(refused, Err(Error::Provider(_))));
    }
    assert_eq!(provider.fetches(), 1);
}

#[tokio::test]
async fn what_a_provider_should_not_answer_is_no_key_set() {
    let ed = Signer::ed();
    let provider = Provider::start(vec![ed.jwk("1")]).await;
    let token = ed.sign("1", &claims());
    let good = provider.pages.lock().unwrap().keys.clone();
    let mut large = good.clone();
    large["padding"] = json!("x".repeat(1024 * 1024));
    let answers =
        [(200, json!({})), (200, json!({ "keys": [] })), (302, good.clone()), (200, large)];
    for (status, keys) in answers {
        provider.set(|pages| (pages.status, pages.keys) = (status, keys));
        let refused = provider.identity().verify(&token, NOW).await;
        assert!(matches!(refused, Err(Error::Provider(_))), "{status}");
    }
    assert!(provider.fetches() >= 4);
}

#[test]
fn a_refusal_is_one_fixed_sentence() {
    let status = tonic::Status::from(Error::BadProof);
    assert_eq!(status.code(), tonic::Code::Unauthenticated);
    assert_eq!(hapa_core::rpc_error::read(&status).unwrap().0, "E4003");
    let words =
        "this login is not valid: check the address and the password, or get a new ID token";
    assert_eq!(status.message(), words);
}

#[tokio::test]
async fn wrong_settings_are_refused_by_name() {
    assert!(Identity::new(&config(&[])).unwrap().is_none());
    assert!(Identity::new(&config(&["--oidc-issuer", ""])).unwrap().is_none());
    let refused = |arguments: &[&str]| {
        let base = ["--oidc-issuer", ISSUER, "--oidc-audience", "hapa"];
        let arguments = if arguments[0] == "--oidc-issuer" {
            arguments.to_vec()
        } else {
            [&base, arguments].concat()
        };
        let error = Identity::new(&config(&arguments)).err().unwrap();
        error.downcast::<Wrong>().unwrap().name
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
    assert_eq!(identity(&[]).scopes(), defaults);
    assert_eq!(identity(&["--oidc-scopes", ""]).scopes(), &[] as &[String]);
}

/// One for all: its client reads the certificates of the machine.
static UNREACHED: LazyLock<Identity> = LazyLock::new(|| identity(&[]));

proptest! {
    #[test]
    fn made_up_text_is_no_id_token_and_never_panics(text in "(\\PC{0,80}|([A-Za-z0-9_-]{0,30}\\.){0,3})") {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let refused = runtime.block_on(UNREACHED.verify(&text, NOW));
        prop_assert!(matches!(refused, Err(Error::BadProof)));
    }

    #[test]
    fn a_domain_is_what_follows_the_only_at(email in "\\PC{0,40}") {
        if let Some(domain) = domain(&email) {
            prop_assert_eq!(email.matches('@').count(), 1);
            prop_assert!(email.ends_with(domain) && !domain.is_empty());
        }
    }
}

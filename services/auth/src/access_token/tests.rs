//! Access tokens: claims, forgery, key files and key replacement.

use base64::Engine as _;
use base64::prelude::{BASE64_STANDARD, BASE64_URL_SAFE_NO_PAD};
use proptest::prelude::*;
use ring::rand::SystemRandom;
use ring::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair};
use serde_json::{Value, json};

use super::*;

const NOW: i64 = 1_800_000_000;
const SECRET: &str = "q8Zt0rW3mXv7Kc1Ly5Nb9Hd2Jf6Gp4Sa";

fn claims() -> AccessTokenClaims {
    AccessTokenClaims {
        user_id: "usr_1".to_owned(),
        session_id: "ses_1".to_owned(),
        token_id: "t1".to_owned(),
        issue_time: NOW,
        expire_time: NOW + 900,
    }
}

fn hs256_tokens() -> AccessTokens {
    AccessTokens::new(SigningKey::from_secret(&SecretString::from(SECRET)), Vec::new())
}

fn other_key() -> SigningKey {
    SigningKey::from_secret(&SecretString::from("another secret of 32 characters."))
}

fn pem(label: &str, der: &[u8]) -> String {
    format!("-----BEGIN {label}-----\n{}\n-----END {label}-----\n", BASE64_STANDARD.encode(der))
}

fn key_from_pem(text: &str) -> Result<SigningKey, ConfigError> {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("key.pem");
    std::fs::write(&file, text).unwrap();
    SigningKey::from_file("SESSION_KEY_FILE", &file)
}

fn tokens_from_pem(text: &str) -> Result<AccessTokens, ConfigError> {
    Ok(AccessTokens::new(key_from_pem(text)?, Vec::new()))
}

/// As `openssl genpkey -algorithm ed25519` writes it: RFC 8410, 10.3.
fn openssl_key() -> String {
    pem(
        "PRIVATE KEY",
        &[&hex::decode("302e020100300506032b657004220420").unwrap()[..], &[7; 32]].concat(),
    )
}

fn ed25519_tokens() -> AccessTokens {
    tokens_from_pem(&openssl_key()).unwrap()
}

fn payload() -> Value {
    json!({
        "iss": "hapa", "aud": "hapa", "sub": "usr_1", "sid": "ses_1",
        "iat": NOW, "nbf": NOW, "exp": NOW + 900, "jti": "t1",
    })
}

fn sign_payload(tokens: &AccessTokens, payload: &Value) -> String {
    jws::sign(
        tokens.keys().current.algorithm,
        &tokens.keys().current.kid,
        payload,
        &tokens.keys().current.encoding_key,
    )
    .unwrap()
}

fn encode_part(value: &Value) -> String {
    BASE64_URL_SAFE_NO_PAD.encode(value.to_string())
}

#[test]
fn replaced_keys_are_rejected_and_the_new_ones_accepted() {
    let (tokens, other) = (hs256_tokens(), AccessTokens::new(other_key(), Vec::new()));
    let before = tokens.issue(&claims()).unwrap();
    tokens.replace(&other);
    assert_eq!(tokens.verify(before.expose_secret(), NOW), None);
    let after = tokens.issue(&claims()).unwrap();
    assert_eq!(other.verify(after.expose_secret(), NOW), Some(claims()));
    // Both are accepted while one replaces the other.
    let old = SigningKey::from_secret(&SecretString::from(SECRET));
    tokens.replace(&AccessTokens::new(other_key(), vec![old]));
    for text in [before, after] {
        assert_eq!(tokens.verify(text.expose_secret(), NOW), Some(claims()));
    }
}

#[test]
fn an_issued_token_is_valid_until_it_expires() {
    for tokens in [hs256_tokens(), ed25519_tokens()] {
        let text = tokens.issue(&claims()).unwrap();
        let text = text.expose_secret();
        assert_eq!(tokens.verify(text, NOW), Some(claims()));
        assert_eq!(tokens.verify(text, NOW + 899), Some(claims()));
        assert_eq!(tokens.verify(text, NOW + 900), None);
        // The clock of a replica may be behind the clock of the issuer.
        assert_eq!(tokens.verify(text, NOW - 60), Some(claims()));
        assert_eq!(tokens.verify(text, NOW - 61), None);
        assert_eq!(tokens.keys().current.kid.len(), 8);
    }
}

#[test]
fn every_claim_is_required_and_checked() {
    let tokens = hs256_tokens();
    assert!(tokens.verify(&sign_payload(&tokens, &payload()), NOW).is_some());
    for claim in ["iss", "aud", "sub", "sid", "iat", "nbf", "exp", "jti"] {
        let mut without = payload();
        without.as_object_mut().unwrap().remove(claim);
        assert_eq!(
            tokens.verify(&sign_payload(&tokens, &without), NOW),
            None,
            "{claim} is missing"
        );
    }
    let wrong = [
        ("iss", json!("hapa ")),
        ("aud", json!("other")),
        ("aud", json!(["hapa", "other"])),
        ("exp", json!(NOW)),
        ("exp", json!("9999999999")),
        ("exp", json!(null)),
        ("nbf", json!(NOW + 61)),
        ("iat", json!(NOW + 61)),
    ];
    for (claim, value) in wrong {
        let mut payload = payload();
        payload[claim] = value.clone();
        assert_eq!(
            tokens.verify(&sign_payload(&tokens, &payload), NOW),
            None,
            "{claim} is {value}"
        );
    }
}

#[test]
fn a_changed_payload_or_signature_is_rejected() {
    for tokens in [hs256_tokens(), ed25519_tokens()] {
        let text = sign_payload(&tokens, &payload());
        let [header, _, signature] = text.split('.').collect::<Vec<_>>()[..] else { panic!() };
        let mut other = payload();
        other["sub"] = json!("usr_2");
        assert_eq!(
            tokens.verify(&format!("{header}.{}.{signature}", encode_part(&other)), NOW),
            None
        );
        let without = text.rsplit_once('.').unwrap().0;
        for ending in ["", ".", ".AAAA", ".AAAA.AAAA"] {
            assert_eq!(tokens.verify(&format!("{without}{ending}"), NOW), None);
        }
        assert_eq!(tokens.verify(&format!("{text}="), NOW), None);
    }
}

#[test]
fn no_algorithm_but_the_configured_one_is_accepted() {
    let (by_secret, by_key) = (hs256_tokens(), ed25519_tokens());
    for tokens in [&by_secret, &by_key] {
        for alg in ["none", "None", "HS384", "HS512", "RS256", "PS256", "ES256", ""] {
            let header =
                encode_part(&json!({ "alg": alg, "typ": "JWT", "kid": tokens.keys().current.kid }));
            let message = format!("{header}.{}", encode_part(&payload()));
            for signature in ["", "AAAA"] {
                assert_eq!(tokens.verify(&format!("{message}.{signature}"), NOW), None, "{alg}");
            }
        }
    }
    // The public key is not secret, so it must not be accepted as an HS256 secret.
    let keys = by_key.keys();
    let public = keys.current.decoding_key.try_get_as_bytes().unwrap();
    for secret in [public.to_vec(), pem("PUBLIC KEY", public).into_bytes()] {
        let key = EncodingKey::from_secret(&secret);
        let forged =
            jws::sign(Algorithm::HS256, &by_key.keys().current.kid, &payload(), &key).unwrap();
        assert_eq!(by_key.verify(&forged, NOW), None);
    }
    let foreign = jws::sign(
        Algorithm::EdDSA,
        &by_secret.keys().current.kid,
        &payload(),
        &by_key.keys().current.encoding_key,
    );
    assert_eq!(by_secret.verify(&foreign.unwrap(), NOW), None);
}

#[test]
fn neither_the_bare_secret_nor_another_key_signs_tokens() {
    let tokens = hs256_tokens();
    let bare = EncodingKey::from_secret(SECRET.as_bytes());
    let forged =
        jws::sign(Algorithm::HS256, &tokens.keys().current.kid, &payload(), &bare).unwrap();
    assert_eq!(tokens.verify(&forged, NOW), None);
    let other = AccessTokens::new(other_key(), Vec::new());
    assert_ne!(other.keys().current.kid, tokens.keys().current.kid);
    assert_eq!(tokens.verify(&sign_payload(&other, &payload()), NOW), None);
    let renamed =
        jws::sign(Algorithm::HS256, "00000000", &payload(), &tokens.keys().current.encoding_key)
            .unwrap();
    assert_eq!(tokens.verify(&renamed, NOW), None, "the kid is unknown");
}

#[test]
fn headers_without_a_key_id_or_with_critical_parts_or_another_type_are_rejected() {
    let tokens = hs256_tokens();
    let keys = tokens.keys();
    let derived = keys.current.decoding_key.try_get_as_bytes().unwrap();
    let signed = |header: Value| {
        let message = format!("{}.{}", encode_part(&header), encode_part(&payload()));
        let key = hmac::Key::new(hmac::HMAC_SHA256, derived);
        let signature = hmac::sign(&key, message.as_bytes());
        format!("{message}.{}", BASE64_URL_SAFE_NO_PAD.encode(signature))
    };
    let kid = &keys.current.kid;
    assert!(tokens.verify(&signed(json!({ "alg": "HS256", "kid": kid })), NOW).is_some());
    for header in [
        json!({ "alg": "HS256" }),
        json!({ "alg": "HS256", "kid": kid, "crit": ["exp"] }),
        json!({ "alg": "HS256", "kid": kid, "typ": "at+jwt" }),
    ] {
        assert_eq!(tokens.verify(&signed(header.clone()), NOW), None, "{header}");
    }
}

#[test]
fn a_token_over_8192_bytes_is_rejected() {
    let tokens = hs256_tokens();
    let long = |length| {
        let claims = AccessTokenClaims { user_id: "x".repeat(length), ..claims() };
        tokens.issue(&claims).unwrap().expose_secret().to_owned()
    };
    assert!(tokens.verify(&long(5_000), NOW).is_some());
    assert!(tokens.verify(&long(6_200), NOW).is_none());
}

#[test]
fn a_key_file_holds_an_ed25519_key_and_nothing_else() {
    let generated = Ed25519KeyPair::generate_pkcs8(&SystemRandom::new()).unwrap();
    assert!(tokens_from_pem(&pem("PRIVATE KEY", generated.as_ref())).is_ok());
    let p256 = EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &SystemRandom::new());
    let refused = [
        String::new(),
        "not a key".to_owned(),
        pem("PRIVATE KEY", b"not a key"),
        pem("RSA PRIVATE KEY", generated.as_ref()),
        pem("PRIVATE KEY", p256.unwrap().as_ref()),
    ];
    for text in refused {
        assert_eq!(tokens_from_pem(&text).err().unwrap().name, "SESSION_KEY_FILE");
    }
    let missing = SigningKey::from_file("SESSION_KEY_FILE_PREVIOUS", Path::new("/nowhere"));
    assert_eq!(missing.err().unwrap().name, "SESSION_KEY_FILE_PREVIOUS");
}

#[test]
fn while_a_key_is_replaced_tokens_of_both_are_valid_and_new_ones_use_the_current_key() {
    let file = key_from_pem(&openssl_key()).unwrap();
    let (old, new) = (AccessTokens::new(other_key(), Vec::new()), hs256_tokens());
    let both = AccessTokens::new(
        SigningKey::from_secret(&SecretString::from(SECRET)),
        vec![other_key(), file],
    );
    let issued =
        |tokens: &AccessTokens| tokens.issue(&claims()).unwrap().expose_secret().to_owned();
    for tokens in [&old, &new, &ed25519_tokens()] {
        assert_eq!(both.verify(&issued(tokens), NOW), Some(claims()));
    }
    assert_eq!(new.verify(&issued(&both), NOW), Some(claims()));
    assert_eq!(old.verify(&issued(&both), NOW), None);
    // The id of one key does not make the signature of another valid.
    let renamed = jws::sign(
        Algorithm::HS256,
        &old.keys().current.kid,
        &payload(),
        &new.keys().current.encoding_key,
    )
    .unwrap();
    assert_eq!(both.verify(&renamed, NOW), None);
}

proptest! {
    #[test]
    fn arbitrary_text_is_not_a_token_and_never_panics(text in "\\PC{0,80}") {
        prop_assert_eq!(hs256_tokens().verify(&text, NOW), None);
    }

    #[test]
    fn arbitrary_parts_are_not_a_token_and_never_panic(
        parts in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..60), 2..5),
    ) {
        let parts: Vec<_> = parts.iter().map(|part| BASE64_URL_SAFE_NO_PAD.encode(part)).collect();
        prop_assert_eq!(ed25519_tokens().verify(&parts.join("."), NOW), None);
    }

    #[test]
    fn a_token_with_any_character_changed_is_rejected(at in 0_usize..10_000, to in "[A-Za-z0-9_.-]") {
        for tokens in [hs256_tokens(), ed25519_tokens()] {
            let text = sign_payload(&tokens, &payload());
            let at = at % text.len();
            let mut changed = text.clone();
            changed.replace_range(at..=at, &to);
            prop_assert_eq!(tokens.verify(&changed, NOW).is_some(), changed == text);
        }
    }

    #[test]
    fn any_times_are_checked_without_overflow(issue_time in any::<i64>(), expire_time in any::<i64>(), now in any::<i64>()) {
        let tokens = hs256_tokens();
        let text = tokens.issue(&AccessTokenClaims { issue_time, expire_time, ..claims() }).unwrap();
        let is_valid = issue_time.saturating_sub(60) <= now && now < expire_time;
        prop_assert_eq!(tokens.verify(text.expose_secret(), now).is_some(), is_valid);
    }
}

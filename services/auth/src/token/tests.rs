//! What an access token must withstand.

use base64::Engine as _;
use base64::prelude::{BASE64_STANDARD, BASE64_URL_SAFE_NO_PAD};
use proptest::prelude::*;
use ring::rand::SystemRandom;
use ring::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair};
use serde_json::{Value, json};

use super::*;

const NOW: i64 = 1_800_000_000;
const SECRET: &str = "q8Zt0rW3mXv7Kc1Ly5Nb9Hd2Jf6Gp4Sa";

fn claims() -> Claims {
    Claims {
        user_id: "usr_1".to_owned(),
        session_id: "ses_1".to_owned(),
        token_id: "t1".to_owned(),
        issue_time: NOW,
        expire_time: NOW + 900,
    }
}

fn secret_tokens() -> Tokens {
    Tokens::new(Pair::of_secret(&SecretString::from(SECRET)), Vec::new())
}

fn another() -> Pair {
    Pair::of_secret(&SecretString::from("another secret of 32 characters."))
}

fn pem(label: &str, der: &[u8]) -> String {
    format!("-----BEGIN {label}-----\n{}\n-----END {label}-----\n", BASE64_STANDARD.encode(der))
}

fn pair_with(text: &str) -> Result<Pair, Wrong> {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("key.pem");
    std::fs::write(&file, text).unwrap();
    Pair::of_file("SESSION_KEY_FILE", &file)
}

fn tokens_with(text: &str) -> Result<Tokens, Wrong> {
    Ok(Tokens::new(pair_with(text)?, Vec::new()))
}

/// As `openssl genpkey -algorithm ed25519` writes it: RFC 8410, 10.3.
fn openssl_key() -> String {
    pem(
        "PRIVATE KEY",
        &[&hex::decode("302e020100300506032b657004220420").unwrap()[..], &[7; 32]].concat(),
    )
}

fn key_tokens() -> Tokens {
    tokens_with(&openssl_key()).unwrap()
}

fn payload() -> Value {
    json!({
        "iss": "hapa", "aud": "hapa", "sub": "usr_1", "sid": "ses_1",
        "iat": NOW, "nbf": NOW, "exp": NOW + 900, "jti": "t1",
    })
}

fn sealed(tokens: &Tokens, payload: &Value) -> String {
    jws::seal(
        tokens.pairs().own.algorithm,
        &tokens.pairs().own.kid,
        payload,
        &tokens.pairs().own.signing,
    )
    .unwrap()
}

fn part(value: &Value) -> String {
    BASE64_URL_SAFE_NO_PAD.encode(value.to_string())
}

#[test]
fn keys_that_are_replaced_count_no_more_and_the_new_ones_do() {
    let (tokens, other) = (secret_tokens(), Tokens::new(another(), Vec::new()));
    let before = tokens.issue(&claims()).unwrap();
    tokens.replace(&other);
    assert_eq!(tokens.verify(before.expose_secret(), NOW), None);
    let after = tokens.issue(&claims()).unwrap();
    assert_eq!(other.verify(after.expose_secret(), NOW), Some(claims()));
    // Both count while one takes the other's place.
    let old = Pair::of_secret(&SecretString::from(SECRET));
    tokens.replace(&Tokens::new(another(), vec![old]));
    for text in [before, after] {
        assert_eq!(tokens.verify(text.expose_secret(), NOW), Some(claims()));
    }
}

#[test]
fn what_was_issued_is_known_again_until_it_expires() {
    for tokens in [secret_tokens(), key_tokens()] {
        let text = tokens.issue(&claims()).unwrap();
        let text = text.expose_secret();
        assert_eq!(tokens.verify(text, NOW), Some(claims()));
        assert_eq!(tokens.verify(text, NOW + 899), Some(claims()));
        assert_eq!(tokens.verify(text, NOW + 900), None);
        // A replica's clock may be behind that of the issuer.
        assert_eq!(tokens.verify(text, NOW - 60), Some(claims()));
        assert_eq!(tokens.verify(text, NOW - 61), None);
        assert_eq!(tokens.pairs().own.kid.len(), 8);
    }
}

#[test]
fn every_claim_is_required_and_checked() {
    let tokens = secret_tokens();
    assert!(tokens.verify(&sealed(&tokens, &payload()), NOW).is_some());
    for claim in ["iss", "aud", "sub", "sid", "iat", "nbf", "exp", "jti"] {
        let mut without = payload();
        without.as_object_mut().unwrap().remove(claim);
        assert_eq!(tokens.verify(&sealed(&tokens, &without), NOW), None, "{claim} is gone");
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
        assert_eq!(tokens.verify(&sealed(&tokens, &payload), NOW), None, "{claim} is {value}");
    }
}

#[test]
fn a_changed_payload_or_signature_is_refused() {
    for tokens in [secret_tokens(), key_tokens()] {
        let text = sealed(&tokens, &payload());
        let [header, _, signature] = text.split('.').collect::<Vec<_>>()[..] else { panic!() };
        let mut other = payload();
        other["sub"] = json!("usr_2");
        assert_eq!(tokens.verify(&format!("{header}.{}.{signature}", part(&other)), NOW), None);
        let without = text.rsplit_once('.').unwrap().0;
        for ending in ["", ".", ".AAAA", ".AAAA.AAAA"] {
            assert_eq!(tokens.verify(&format!("{without}{ending}"), NOW), None);
        }
        assert_eq!(tokens.verify(&format!("{text}="), NOW), None);
    }
}

#[test]
fn no_algorithm_but_the_configured_one_is_taken() {
    let (by_secret, by_key) = (secret_tokens(), key_tokens());
    for tokens in [&by_secret, &by_key] {
        for alg in ["none", "None", "HS384", "HS512", "RS256", "PS256", "ES256", ""] {
            let header = part(&json!({ "alg": alg, "typ": "JWT", "kid": tokens.pairs().own.kid }));
            let message = format!("{header}.{}", part(&payload()));
            for signature in ["", "AAAA"] {
                assert_eq!(tokens.verify(&format!("{message}.{signature}"), NOW), None, "{alg}");
            }
        }
    }
    // The public key, which anyone may know, taken for a shared secret.
    let keys = by_key.pairs();
    let public = keys.own.verifying.try_get_as_bytes().unwrap();
    for secret in [public.to_vec(), pem("PUBLIC KEY", public).into_bytes()] {
        let key = EncodingKey::from_secret(&secret);
        let forged =
            jws::seal(Algorithm::HS256, &by_key.pairs().own.kid, &payload(), &key).unwrap();
        assert_eq!(by_key.verify(&forged, NOW), None);
    }
    let foreign = jws::seal(
        Algorithm::EdDSA,
        &by_secret.pairs().own.kid,
        &payload(),
        &by_key.pairs().own.signing,
    );
    assert_eq!(by_secret.verify(&foreign.unwrap(), NOW), None);
}

#[test]
fn neither_the_bare_secret_nor_another_key_signs_tokens() {
    let tokens = secret_tokens();
    let bare = EncodingKey::from_secret(SECRET.as_bytes());
    let forged = jws::seal(Algorithm::HS256, &tokens.pairs().own.kid, &payload(), &bare).unwrap();
    assert_eq!(tokens.verify(&forged, NOW), None);
    let other = Tokens::new(another(), Vec::new());
    assert_ne!(other.pairs().own.kid, tokens.pairs().own.kid);
    assert_eq!(tokens.verify(&sealed(&other, &payload()), NOW), None);
    let renamed =
        jws::seal(Algorithm::HS256, "00000000", &payload(), &tokens.pairs().own.signing).unwrap();
    assert_eq!(tokens.verify(&renamed, NOW), None, "the kid is unknown");
}

#[test]
fn headers_that_ask_for_more_are_refused() {
    let tokens = secret_tokens();
    let keys = tokens.pairs();
    let derived = keys.own.verifying.try_get_as_bytes().unwrap();
    let signed = |header: Value| {
        let message = format!("{}.{}", part(&header), part(&payload()));
        let key = hmac::Key::new(hmac::HMAC_SHA256, derived);
        let signature = hmac::sign(&key, message.as_bytes());
        format!("{message}.{}", BASE64_URL_SAFE_NO_PAD.encode(signature))
    };
    let kid = &keys.own.kid;
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
fn a_token_over_8192_bytes_is_not_read() {
    let tokens = secret_tokens();
    let long = |length| {
        let claims = Claims { user_id: "x".repeat(length), ..claims() };
        tokens.issue(&claims).unwrap().expose_secret().to_owned()
    };
    assert!(tokens.verify(&long(5_000), NOW).is_some());
    assert!(tokens.verify(&long(6_200), NOW).is_none());
}

#[test]
fn a_key_file_holds_an_ed25519_key_and_nothing_else() {
    let generated = Ed25519KeyPair::generate_pkcs8(&SystemRandom::new()).unwrap();
    assert!(tokens_with(&pem("PRIVATE KEY", generated.as_ref())).is_ok());
    let p256 = EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &SystemRandom::new());
    let refused = [
        String::new(),
        "not a key".to_owned(),
        pem("PRIVATE KEY", b"not a key"),
        pem("RSA PRIVATE KEY", generated.as_ref()),
        pem("PRIVATE KEY", p256.unwrap().as_ref()),
    ];
    for text in refused {
        assert_eq!(tokens_with(&text).err().unwrap().name, "SESSION_KEY_FILE");
    }
    let missing = Pair::of_file("SESSION_KEY_FILE_ALSO", Path::new("/nowhere"));
    assert_eq!(missing.err().unwrap().name, "SESSION_KEY_FILE_ALSO");
}

#[test]
fn while_one_key_takes_anothers_place_tokens_of_both_hold_and_new_ones_are_of_its_own() {
    let file = pair_with(&openssl_key()).unwrap();
    let (old, new) = (Tokens::new(another(), Vec::new()), secret_tokens());
    let both = Tokens::new(Pair::of_secret(&SecretString::from(SECRET)), vec![another(), file]);
    let issued = |tokens: &Tokens| tokens.issue(&claims()).unwrap().expose_secret().to_owned();
    for tokens in [&old, &new, &key_tokens()] {
        assert_eq!(both.verify(&issued(tokens), NOW), Some(claims()));
    }
    assert_eq!(new.verify(&issued(&both), NOW), Some(claims()));
    assert_eq!(old.verify(&issued(&both), NOW), None);
    // A name of one key does not make another one's signature count.
    let renamed =
        jws::seal(Algorithm::HS256, &old.pairs().own.kid, &payload(), &new.pairs().own.signing)
            .unwrap();
    assert_eq!(both.verify(&renamed, NOW), None);
}

proptest! {
    #[test]
    fn made_up_text_is_no_token_and_never_panics(text in "\\PC{0,80}") {
        prop_assert_eq!(secret_tokens().verify(&text, NOW), None);
    }

    #[test]
    fn made_up_parts_are_no_token_and_never_panic(
        parts in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..60), 2..5),
    ) {
        let parts: Vec<_> = parts.iter().map(|part| BASE64_URL_SAFE_NO_PAD.encode(part)).collect();
        prop_assert_eq!(key_tokens().verify(&parts.join("."), NOW), None);
    }

    #[test]
    fn a_token_with_any_character_changed_is_refused(at in 0_usize..10_000, to in "[A-Za-z0-9_.-]") {
        for tokens in [secret_tokens(), key_tokens()] {
            let text = sealed(&tokens, &payload());
            let at = at % text.len();
            let mut changed = text.clone();
            changed.replace_range(at..=at, &to);
            prop_assert_eq!(tokens.verify(&changed, NOW).is_some(), changed == text);
        }
    }

    #[test]
    fn any_time_is_survived(issue_time in any::<i64>(), expire_time in any::<i64>(), now in any::<i64>()) {
        let tokens = secret_tokens();
        let text = tokens.issue(&Claims { issue_time, expire_time, ..claims() }).unwrap();
        let holds = issue_time.saturating_sub(60) <= now && now < expire_time;
        prop_assert_eq!(tokens.verify(text.expose_secret(), now).is_some(), holds);
    }
}

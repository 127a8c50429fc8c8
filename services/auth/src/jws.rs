//! Signs and verifies JSON Web Signatures (RFC 7515) with jsonwebtoken, on the cryptography of ring.
//!
//! Invariant: a token is verified with one key and the one algorithm of that key. The token's own header
//! can only cause a rejection. The caller must check the claims.

use jsonwebtoken::crypto::{CryptoProvider, JwtSigner, JwtVerifier, KeyUtils};
use jsonwebtoken::errors::{Error, ErrorKind};
use jsonwebtoken::signature::{Error as SignatureError, Signer, Verifier};
use jsonwebtoken::{
    Algorithm, DecodingKey, DecodingKeyKind, EncodingKey, Header, Validation, decode, decode_header,
};
use ring::hmac;
use ring::signature::{
    ECDSA_P256_SHA256_FIXED, ED25519, Ed25519KeyPair, RSA_PKCS1_2048_8192_SHA256,
    RsaPublicKeyComponents, UnparsedPublicKey, VerificationAlgorithm,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Maximum clock skew between the issuer and this process, in seconds.
pub(crate) const MAX_CLOCK_SKEW_SECONDS: i64 = 60;

static RING_PROVIDER: CryptoProvider = CryptoProvider {
    signer_factory: |algorithm, key| new_signer(*algorithm, key),
    verifier_factory: |algorithm, key| new_verifier(*algorithm, key),
    // Needed for conversions from and to JWKs only, which this crate does not use.
    key_utils: KeyUtils {
        rsa_pub_components_from_private_key: |_| unsupported(),
        rsa_pub_components_from_public_key: |_| unsupported(),
        ec_pub_components_from_private_key: |_, _| unsupported(),
        ed_pub_components_from_private_key: |_, _| unsupported(),
        compute_digest: |_, _| unsupported(),
    },
};

/// Installs ring as the cryptography of jsonwebtoken. Must be called before every other function here.
pub(crate) fn install_crypto_provider() {
    // Fails only if another server in this process has installed it.
    let _ = RING_PROVIDER.install_default();
}

/// Signs claims. The header names the key by its id.
pub(crate) fn sign(
    algorithm: Algorithm,
    kid: &str,
    claims: &impl Serialize,
    key: &EncodingKey,
) -> Result<String, Error> {
    let header = Header { kid: Some(kid.to_owned()), ..Header::new(algorithm) };
    jsonwebtoken::encode(&header, claims, key)
}

/// The unverified header of a token, or the reason why the token is rejected.
pub(crate) fn parse_header(token: &str) -> Result<Header, &'static str> {
    let header = decode_header(token).map_err(|_| "not a signed token")?;
    if header.crit.is_some() {
        return Err("critical header parameters");
    }
    // Other types, such as at+jwt, serve other purposes: RFC 8725, section 3.11.
    if header.typ.as_ref().is_some_and(|typ| !typ.eq_ignore_ascii_case("JWT")) {
        return Err("wrong token type");
    }
    Ok(header)
}

/// The claims of a token whose signature this key verifies.
pub(crate) fn verify<T: DeserializeOwned>(
    token: &str,
    algorithm: Algorithm,
    key: &DecodingKey,
) -> Result<T, &'static str> {
    let mut validation = Validation::new(algorithm);
    validation.required_spec_claims.clear();
    validation.validate_exp = false;
    validation.validate_aud = false;
    let token_data = decode(token, key, &validation).map_err(|error| match error.kind() {
        ErrorKind::InvalidSignature => "invalid signature",
        ErrorKind::InvalidAlgorithm => "algorithm does not match the key",
        _ => "unreadable claims",
    })?;
    Ok(token_data.claims)
}

struct RingSigner {
    algorithm: Algorithm,
    key: EncodingKey,
}

impl Signer<Vec<u8>> for RingSigner {
    fn try_sign(&self, message: &[u8]) -> Result<Vec<u8>, SignatureError> {
        let key = self.key.as_bytes();
        match self.algorithm {
            Algorithm::HS256 => {
                let key = hmac::Key::new(hmac::HMAC_SHA256, key);
                Ok(hmac::sign(&key, message).as_ref().to_vec())
            }
            Algorithm::EdDSA => {
                let key_pair = Ed25519KeyPair::from_pkcs8_maybe_unchecked(key);
                Ok(key_pair.map_err(|_| SignatureError::new())?.sign(message).as_ref().to_vec())
            }
            _ => Err(SignatureError::new()),
        }
    }
}

impl JwtSigner for RingSigner {
    fn algorithm(&self) -> Algorithm {
        self.algorithm
    }
}

fn new_signer(algorithm: Algorithm, key: &EncodingKey) -> Result<Box<dyn JwtSigner>, Error> {
    let is_supported = matches!(algorithm, Algorithm::HS256 | Algorithm::EdDSA);
    if !is_supported || key.family() != algorithm.family() {
        return unsupported();
    }
    Ok(Box::new(RingSigner { algorithm, key: key.clone() }))
}

struct RingVerifier {
    algorithm: Algorithm,
    key: DecodingKey,
}

impl Verifier<Vec<u8>> for RingVerifier {
    fn verify(&self, message: &[u8], signature: &Vec<u8>) -> Result<(), SignatureError> {
        let verify_public = |algorithm: &'static dyn VerificationAlgorithm, key: &[u8]| {
            UnparsedPublicKey::new(algorithm, key).verify(message, signature)
        };
        let verified = match (self.algorithm, self.key.kind()) {
            (Algorithm::HS256, DecodingKeyKind::SecretOrDer(key)) => {
                hmac::verify(&hmac::Key::new(hmac::HMAC_SHA256, key), message, signature)
            }
            (Algorithm::EdDSA, DecodingKeyKind::SecretOrDer(key)) => verify_public(&ED25519, key),
            (Algorithm::ES256, DecodingKeyKind::SecretOrDer(key)) => {
                verify_public(&ECDSA_P256_SHA256_FIXED, key)
            }
            (Algorithm::RS256, DecodingKeyKind::RsaModulusExponent { n, e }) => {
                let key = RsaPublicKeyComponents { n, e };
                key.verify(&RSA_PKCS1_2048_8192_SHA256, message, signature)
            }
            _ => return Err(SignatureError::new()),
        };
        verified.map_err(|_| SignatureError::new())
    }
}

impl JwtVerifier for RingVerifier {
    fn algorithm(&self) -> Algorithm {
        self.algorithm
    }
}

fn new_verifier(algorithm: Algorithm, key: &DecodingKey) -> Result<Box<dyn JwtVerifier>, Error> {
    if key.family() != algorithm.family() {
        return Err(ErrorKind::InvalidAlgorithm.into());
    }
    Ok(Box::new(RingVerifier { algorithm, key: key.clone() }))
}

fn unsupported<T>() -> Result<T, Error> {
    Err(ErrorKind::UnsupportedAlgorithm.into())
}

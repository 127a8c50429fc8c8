//! Verifies the ID tokens of an OpenID Connect provider (OpenID Connect Core 1.0).
//!
//! Invariants: the type of the key chooses the algorithm, never the token and never a shared secret. A
//! rejection does not tell the caller its reason. No token is logged.

mod jwks;
#[cfg(test)]
mod tests;

use std::net::IpAddr;

use hapa_core::access::SCOPES;
use hapa_core::config::ConfigError;
use jsonwebtoken::Algorithm;
use reqwest::Url;
use serde::Deserialize;

use crate::error::Error;
use crate::jws::{self, MAX_CLOCK_SKEW_SECONDS};
use crate::oidc::jwks::JwksCache;
use crate::validation::{MAX_NAME_LEN, email_domain};

const MAX_ID_TOKEN_BYTES: usize = 16 * 1024;
/// OpenID Connect Core 1.0, section 2.
const MAX_SUBJECT_BYTES: usize = 255;

/// Settings of the OpenID Connect provider.
#[derive(clap::Args, Clone, Debug)]
#[command(next_help_heading = "Auth")]
#[group(id = "oidc")]
pub struct OidcConfig {
    /// Issuer URL of the OpenID Connect provider whose ID tokens log users in, exactly as in its tokens:
    /// https://login.example.com. If unset, users log in with passwords only.
    #[arg(long, env = "OIDC_ISSUER")]
    pub oidc_issuer: Option<String>,
    /// Client id that ID tokens must have as their audience; required with OIDC_ISSUER.
    #[arg(long, env = "OIDC_AUDIENCE")]
    pub oidc_audience: Option<String>,
    /// URL of the provider's key set (JWKS). If unset, its discovery document names it.
    #[arg(long, env = "OIDC_JWKS_URL")]
    pub oidc_jwks_url: Option<String>,
    /// Scopes of a user that is created at the first login with an ID token, comma-separated; must not
    /// include auth:admin.
    #[arg(
        long,
        env = "OIDC_SCOPES",
        value_delimiter = ',',
        default_value = "codegen:generate,codegen:complete,errors:read,analytics:read"
    )]
    pub oidc_scopes: Vec<String>,
    /// Email domains whose verified addresses (`email_verified: true`) may log in with an ID token,
    /// comma-separated. If unset, every domain may.
    #[arg(long, env = "OIDC_EMAIL_DOMAINS", value_delimiter = ',')]
    pub oidc_email_domains: Vec<String>,
}

/// The identity in a verified ID token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct VerifiedIdentity {
    /// The provider's id of the user. Unlike an email address, it is never reassigned.
    pub(crate) subject: String,
    /// In lower case.
    pub(crate) email: String,
    /// Whether the provider has verified the address. Some providers let users set any address.
    pub(crate) email_verified: bool,
    /// The email address if the token has no name.
    pub(crate) name: String,
}

/// Verifies ID tokens of one provider.
pub(crate) struct OidcVerifier {
    issuer: String,
    audience: String,
    scopes: Vec<String>,
    domains: Vec<String>,
    keys: JwksCache,
}

#[derive(Deserialize)]
struct IdTokenClaims {
    iss: String,
    sub: String,
    aud: AudienceClaim,
    azp: Option<String>,
    exp: i64,
    iat: i64,
    nbf: Option<i64>,
    email: Option<String>,
    email_verified: Option<serde_json::Value>,
    name: Option<String>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum AudienceClaim {
    One(String),
    Many(Vec<String>),
}

impl OidcVerifier {
    /// `None` if OIDC_ISSUER is not set.
    pub(crate) fn new(config: &OidcConfig) -> anyhow::Result<Option<OidcVerifier>> {
        let non_empty = |text: &Option<String>| text.clone().filter(|text| !text.is_empty());
        let Some(issuer) = non_empty(&config.oidc_issuer) else { return Ok(None) };
        let url =
            |name, text: &str| secure_url(text).map_err(|problem| ConfigError::new(name, problem));
        if url("OIDC_ISSUER", &issuer)?.query().is_some() {
            return Err(ConfigError::new("OIDC_ISSUER", "must not have a query").into());
        }
        let audience = non_empty(&config.oidc_audience)
            .ok_or_else(|| ConfigError::new("OIDC_AUDIENCE", "must be set with OIDC_ISSUER"))?;
        let jwks_url = non_empty(&config.oidc_jwks_url).map(|text| url("OIDC_JWKS_URL", &text));
        jws::install_crypto_provider();
        Ok(Some(OidcVerifier {
            keys: JwksCache::new(&issuer, jwks_url.transpose()?)?,
            issuer,
            audience,
            scopes: parse_scopes(&config.oidc_scopes)?,
            domains: parse_domains(&config.oidc_email_domains)?,
        }))
    }

    /// The issuer URL of the provider.
    pub(crate) fn issuer(&self) -> &str {
        &self.issuer
    }

    /// Scopes of a user that is created at the first login.
    pub(crate) fn scopes(&self) -> &[String] {
        &self.scopes
    }

    /// The identity in an ID token, if the token is valid. `now` is in seconds since 1970.
    pub(crate) async fn verify(&self, id_token: &str, now: i64) -> Result<VerifiedIdentity, Error> {
        let reject = |reason: &'static str| {
            tracing::info!(reason, "rejected an ID token");
            Error::InvalidLogin
        };
        if id_token.len() > MAX_ID_TOKEN_BYTES {
            return Err(reject("larger than 16 KiB"));
        }
        let header = jws::parse_header(id_token).map_err(reject)?;
        if !matches!(header.alg, Algorithm::RS256 | Algorithm::ES256 | Algorithm::EdDSA) {
            return Err(reject("algorithm is none of RS256, ES256 and EdDSA"));
        }
        let key = self.keys.find(header.kid.as_deref(), header.alg, now).await?;
        let key = key.ok_or_else(|| reject("unknown key"))?;
        let claims: IdTokenClaims = jws::verify(id_token, header.alg, &key).map_err(reject)?;
        self.check_claims(&claims, now).map_err(reject)?;
        self.verified_identity(claims).map_err(reject)
    }

    fn check_claims(&self, claims: &IdTokenClaims, now: i64) -> Result<(), &'static str> {
        let is_audience = |text: &String| *text == self.audience;
        let has_audience = match &claims.aud {
            AudienceClaim::One(one) => is_audience(one),
            AudienceClaim::Many(audiences) => {
                let is_authorized =
                    audiences.len() == 1 || claims.azp.as_ref().is_some_and(is_audience);
                audiences.iter().any(is_audience) && is_authorized
            }
        };
        let latest_start = now.saturating_add(MAX_CLOCK_SKEW_SECONDS);
        if claims.iss != self.issuer {
            Err("wrong issuer")
        } else if !has_audience {
            Err("wrong audience")
        } else if claims.exp <= now.saturating_sub(MAX_CLOCK_SKEW_SECONDS) {
            Err("expired")
        } else if claims.iat > latest_start
            || claims.nbf.is_some_and(|not_before| not_before > latest_start)
        {
            Err("issued in the future")
        } else {
            Ok(())
        }
    }

    fn verified_identity(&self, claims: IdTokenClaims) -> Result<VerifiedIdentity, &'static str> {
        let subject = claims.sub;
        let subject_length = 1..=MAX_SUBJECT_BYTES;
        if !subject_length.contains(&subject.len()) || subject.chars().any(char::is_control) {
            return Err("invalid subject");
        }
        let email = claims.email.ok_or("no email address")?.to_lowercase();
        let domain = email_domain(&email).ok_or("invalid email address")?;
        // Some providers write the flag as a string.
        let email_verified = claims.email_verified.as_ref().map(|is| *is == true || *is == "true");
        if email_verified == Some(false) {
            return Err("email address is not verified");
        }
        // An unverified address does not prove its domain.
        if !self.domains.is_empty() && email_verified != Some(true) {
            return Err("email address is not verified, which OIDC_EMAIL_DOMAINS requires");
        }
        if !self.domains.is_empty() && !self.domains.iter().any(|allowed| allowed == domain) {
            return Err("email domain is not allowed");
        }
        let name = claims.name.unwrap_or_default();
        let name: String =
            name.trim().chars().filter(|char| !char.is_control()).take(MAX_NAME_LEN).collect();
        let name = if name.is_empty() { email.clone() } else { name };
        let email_verified = email_verified.unwrap_or(false);
        Ok(VerifiedIdentity { subject, email, email_verified, name })
    }
}

/// Parses a URL that must be https, or http to a loopback address. Any other http response could be forged on
/// the network.
fn secure_url(text: &str) -> Result<Url, &'static str> {
    let url: Url = text.parse().map_err(|_| "is not a URL")?;
    let host = url.host_str().unwrap_or_default();
    let ip = host.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>();
    let is_loopback = host == "localhost" || ip.is_ok_and(|ip| ip.is_loopback());
    if url.scheme() != "https" && !(url.scheme() == "http" && is_loopback) {
        return Err("must begin with https://; http:// is allowed for loopback addresses only");
    }
    if !url.username().is_empty() || url.password().is_some() || url.fragment().is_some() {
        return Err("must not have a user, a password or a fragment");
    }
    Ok(url)
}

fn parse_scopes(values: &[String]) -> Result<Vec<String>, ConfigError> {
    const NAME: &str = "OIDC_SCOPES";
    let scopes: Vec<_> = non_empty_items(values).collect();
    if scopes.iter().any(|scope| scope == "auth:admin") {
        return Err(ConfigError::new(
            NAME,
            "must not include auth:admin, which only an admin grants",
        ));
    }
    match scopes.iter().find(|scope| !SCOPES.contains(&scope.as_str())) {
        None => Ok(scopes),
        Some(unknown) => {
            let valid = SCOPES.join(", ");
            let problem = format!("has the unknown scope {unknown:?}; valid scopes are {valid}");
            Err(ConfigError::new(NAME, problem))
        }
    }
}

fn parse_domains(values: &[String]) -> Result<Vec<String>, ConfigError> {
    let domains: Vec<_> = non_empty_items(values).map(|domain| domain.to_lowercase()).collect();
    match domains.iter().find(|domain| domain.contains('@') || domain.contains('*')) {
        None => Ok(domains),
        Some(invalid) => {
            Err(ConfigError::new("OIDC_EMAIL_DOMAINS", format!("{invalid:?} is not a domain")))
        }
    }
}

fn non_empty_items(values: &[String]) -> impl Iterator<Item = String> {
    values.iter().map(|value| value.trim().to_owned()).filter(|value| !value.is_empty())
}

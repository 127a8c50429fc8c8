//! People whom a company's identity provider knows: its ID tokens (OpenID Connect Core 1.0), checked.
//!
//! Kept true: the key's own type chooses the algorithm, never the token and never a shared secret;
//! who is refused does not learn why; no token is ever logged.

mod keys;
#[cfg(test)]
mod tests;

use std::net::IpAddr;

use hapa_core::access::SCOPES;
use hapa_core::config::Wrong;
use jsonwebtoken::Algorithm;
use reqwest::Url;
use serde::Deserialize;

use crate::error::Error;
use crate::identity::keys::Keys;
use crate::jws::{self, LEEWAY};

const LONGEST: usize = 16 * 1024;
/// As the specification has it.
const LONGEST_SUBJECT: usize = 255;
const LONGEST_NAME: usize = 100;
const LONGEST_EMAIL: usize = 254;

/// Settings of the identity provider.
#[derive(clap::Args, Clone, Debug)]
#[command(next_help_heading = "Auth")]
#[group(id = "identity")]
pub struct IdentityConfig {
    /// The identity provider (OpenID Connect) whose ID tokens log users in, exactly as it names
    /// itself: https://login.example.com; without one passwords alone do.
    #[arg(long, env = "OIDC_ISSUER")]
    pub oidc_issuer: Option<String>,
    /// The client id that its ID tokens must be for; required beside OIDC_ISSUER.
    #[arg(long, env = "OIDC_AUDIENCE")]
    pub oidc_audience: Option<String>,
    /// Where its keys are; default: where its discovery document says.
    #[arg(long, env = "OIDC_JWKS_URL")]
    pub oidc_jwks_url: Option<String>,
    /// What a user may do who logs in with it for the first time, comma-separated; not auth:admin.
    #[arg(
        long,
        env = "OIDC_SCOPES",
        value_delimiter = ',',
        default_value = "codegen:generate,codegen:complete,errors:read,analytics:read"
    )]
    pub oidc_scopes: Vec<String>,
    /// Only verified addresses (`email_verified: true`) of these domains are let in, comma-separated;
    /// default: all that it vouches for.
    #[arg(long, env = "OIDC_EMAIL_DOMAINS", value_delimiter = ',')]
    pub oidc_email_domains: Vec<String>,
}

/// Someone whom the provider vouches for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Person {
    /// The provider's id for them: unlike the address it never passes to another.
    pub(crate) subject: String,
    /// In lower case.
    pub(crate) email: String,
    /// Whether the provider says that the address is theirs. Some let anyone set any.
    pub(crate) email_verified: bool,
    /// The address where the provider tells no name.
    pub(crate) name: String,
}

/// An identity provider.
pub(crate) struct Identity {
    issuer: String,
    audience: String,
    scopes: Vec<String>,
    domains: Vec<String>,
    keys: Keys,
}

#[derive(Deserialize)]
struct Claims {
    iss: String,
    sub: String,
    aud: Audiences,
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
enum Audiences {
    One(String),
    Several(Vec<String>),
}

impl Identity {
    /// None where the settings name no provider.
    pub(crate) fn new(config: &IdentityConfig) -> anyhow::Result<Option<Identity>> {
        let set = |text: &Option<String>| text.clone().filter(|text| !text.is_empty());
        let Some(issuer) = set(&config.oidc_issuer) else { return Ok(None) };
        let url = |name, text: &str| secure_url(text).map_err(|problem| Wrong::new(name, problem));
        if url("OIDC_ISSUER", &issuer)?.query().is_some() {
            return Err(Wrong::new("OIDC_ISSUER", "must not have a query").into());
        }
        let audience = set(&config.oidc_audience)
            .ok_or_else(|| Wrong::new("OIDC_AUDIENCE", "must be set beside OIDC_ISSUER"))?;
        let jwks_url = set(&config.oidc_jwks_url).map(|text| url("OIDC_JWKS_URL", &text));
        jws::install();
        Ok(Some(Identity {
            keys: Keys::new(&issuer, jwks_url.transpose()?)?,
            issuer,
            audience,
            scopes: scopes(&config.oidc_scopes)?,
            domains: domains(&config.oidc_email_domains)?,
        }))
    }

    /// Its name.
    pub(crate) fn issuer(&self) -> &str {
        &self.issuer
    }

    /// What a user may do who logs in for the first time.
    pub(crate) fn scopes(&self) -> &[String] {
        &self.scopes
    }

    /// Who presents this ID token. `now` is in seconds since 1970.
    pub(crate) async fn verify(&self, id_token: &str, now: i64) -> Result<Person, Error> {
        let refused = |reason: &'static str| {
            tracing::info!(reason, "an ID token was refused");
            Error::BadProof
        };
        if id_token.len() > LONGEST {
            return Err(refused("it is over 16 KiB"));
        }
        let header = jws::header(id_token).map_err(refused)?;
        if !matches!(header.alg, Algorithm::RS256 | Algorithm::ES256 | Algorithm::EdDSA) {
            return Err(refused("its algorithm is none of RS256, ES256 and EdDSA"));
        }
        let key = self.keys.find(header.kid.as_deref(), header.alg, now).await?;
        let key = key.ok_or_else(|| refused("the provider has no such key"))?;
        let claims: Claims = jws::open(id_token, header.alg, &key).map_err(refused)?;
        self.check(&claims, now).map_err(refused)?;
        self.person(claims).map_err(refused)
    }

    fn check(&self, claims: &Claims, now: i64) -> Result<(), &'static str> {
        let is_us = |text: &String| *text == self.audience;
        let is_for_us = match &claims.aud {
            Audiences::One(one) => is_us(one),
            Audiences::Several(several) => {
                let is_authorized = several.len() == 1 || claims.azp.as_ref().is_some_and(is_us);
                several.iter().any(is_us) && is_authorized
            }
        };
        let latest = now.saturating_add(LEEWAY);
        if claims.iss != self.issuer {
            Err("it is of another issuer")
        } else if !is_for_us {
            Err("it is for another audience")
        } else if claims.exp <= now.saturating_sub(LEEWAY) {
            Err("it has expired")
        } else if claims.iat > latest || claims.nbf.is_some_and(|begin| begin > latest) {
            Err("it is from the future")
        } else {
            Ok(())
        }
    }

    fn person(&self, claims: Claims) -> Result<Person, &'static str> {
        let subject = claims.sub;
        let subject_length = 1..=LONGEST_SUBJECT;
        if !subject_length.contains(&subject.len()) || subject.chars().any(char::is_control) {
            return Err("its subject is none");
        }
        let email = claims.email.ok_or("it has no address")?.to_lowercase();
        let domain = domain(&email).ok_or("its address is none")?;
        // Some providers write it as text.
        let email_verified = claims.email_verified.as_ref().map(|is| *is == true || *is == "true");
        if email_verified == Some(false) {
            return Err("its address is not verified");
        }
        // An unverified address proves no domain.
        if !self.domains.is_empty() && email_verified != Some(true) {
            return Err("its address is not verified, which OIDC_EMAIL_DOMAINS requires");
        }
        if !self.domains.is_empty() && !self.domains.iter().any(|allowed| allowed == domain) {
            return Err("its address is of another domain");
        }
        let name = claims.name.unwrap_or_default();
        let name: String =
            name.trim().chars().filter(|char| !char.is_control()).take(LONGEST_NAME).collect();
        let name = if name.is_empty() { email.clone() } else { name };
        let email_verified = email_verified.unwrap_or(false);
        Ok(Person { subject, email, email_verified, name })
    }
}

/// The domain of an address, none where it can't be one.
fn domain(email: &str) -> Option<&str> {
    let (local, domain) = email.split_once('@')?;
    let is_odd = |char: char| char == '@' || char.is_control() || char.is_whitespace();
    let is_one = !local.is_empty() && !domain.is_empty() && !domain.contains('@');
    (is_one && email.len() <= LONGEST_EMAIL && !local.chars().chain(domain.chars()).any(is_odd))
        .then_some(domain)
}

/// An address that nobody on the way can answer for: https, or http on this machine.
fn secure_url(text: &str) -> Result<Url, &'static str> {
    let url: Url = text.parse().map_err(|_| "is not a URL")?;
    let host = url.host_str().unwrap_or_default();
    let ip = host.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>();
    let is_here = host == "localhost" || ip.is_ok_and(|ip| ip.is_loopback());
    if url.scheme() != "https" && !(url.scheme() == "http" && is_here) {
        return Err("must begin with https://; http:// is for this machine alone");
    }
    if !url.username().is_empty() || url.password().is_some() || url.fragment().is_some() {
        return Err("must be without a user, a password and a fragment");
    }
    Ok(url)
}

fn scopes(set: &[String]) -> Result<Vec<String>, Wrong> {
    const NAME: &str = "OIDC_SCOPES";
    let scopes: Vec<_> = words(set).collect();
    if scopes.iter().any(|scope| scope == "auth:admin") {
        return Err(Wrong::new(NAME, "must not have auth:admin: an admin gives that"));
    }
    match scopes.iter().find(|scope| !SCOPES.contains(&scope.as_str())) {
        None => Ok(scopes),
        Some(unknown) => {
            let known = SCOPES.join(", ");
            let problem = format!("has the unknown scope {unknown:?}; known are {known}");
            Err(Wrong::new(NAME, problem))
        }
    }
}

fn domains(set: &[String]) -> Result<Vec<String>, Wrong> {
    let domains: Vec<_> = words(set).map(|domain| domain.to_lowercase()).collect();
    match domains.iter().find(|domain| domain.contains('@') || domain.contains('*')) {
        None => Ok(domains),
        Some(odd) => Err(Wrong::new("OIDC_EMAIL_DOMAINS", format!("{odd:?} is not a domain"))),
    }
}

fn words(set: &[String]) -> impl Iterator<Item = String> {
    set.iter().map(|word| word.trim().to_owned()).filter(|word| !word.is_empty())
}

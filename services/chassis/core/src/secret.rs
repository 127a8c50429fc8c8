//! Secrets: the required strength of configured ones, and the generation of default ones. Each generated secret is
//! written once to a file in DATA_DIR that only its owner can read.

use std::collections::HashSet;
use std::fs::{self, OpenOptions};
use std::io::{ErrorKind, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use anyhow::Context as _;
use secrecy::{ExposeSecret as _, SecretString};

use crate::config::ConfigError;

/// Name of the file in DATA_DIR that contains a generated mesh token.
pub const MESH_TOKEN_FILE: &str = "mesh-token";

/// Minimum length of a secret, in characters.
const MIN_SECRET_LEN: usize = 32;
/// Minimum number of distinct characters of a secret that is hard to guess.
const MIN_DISTINCT_COUNT: usize = 10;
/// Parts of secrets from examples, in lower case.
const EXAMPLE_PARTS: &[&str] = &[
    "changeme",
    "change-me",
    "change_me",
    "change-this",
    "your-secret",
    "your_secret",
    "secret-key",
    "secret_key",
    "replace-me",
    "replaceme",
    "placeholder",
    "default",
    "password",
    "example",
    "insecure",
    "development",
    "letmein",
    "qwerty",
];

/// The required strength of a secret.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Strength {
    /// At least 32 characters.
    Long,
    /// At least 32 characters, no part of an example, and no repetition.
    HardToGuess,
}

/// Validates a configured secret. An empty secret counts as not configured; a weak one is an error.
pub fn validate_configured<'a>(
    name: &'static str,
    secret: Option<&'a SecretString>,
    strength: Strength,
) -> Result<Option<&'a SecretString>, ConfigError> {
    let secret = secret.filter(|secret| !secret.expose_secret().is_empty());
    let problem = secret.and_then(|secret| weakness(secret.expose_secret(), strength));
    problem.map_or(Ok(secret), |problem| Err(ConfigError::new(name, problem)))
}

fn weakness(secret: &str, strength: Strength) -> Option<String> {
    let characters: Vec<_> = secret.chars().collect();
    if characters.len() < MIN_SECRET_LEN {
        return Some(format!("must have at least {MIN_SECRET_LEN} characters"));
    }
    if strength == Strength::Long {
        return None;
    }
    let lower = secret.to_lowercase();
    if let Some(known) = EXAMPLE_PARTS.iter().find(|known| lower.contains(**known)) {
        return Some(format!("contains {known:?}: generate one with `openssl rand -hex 32`"));
    }
    let distinct = characters.iter().collect::<HashSet<_>>().len();
    if distinct < MIN_DISTINCT_COUNT || repeats(&characters) {
        return Some("repeats itself: generate one with `openssl rand -hex 32`".to_owned());
    }
    None
}

/// Whether the text is a repetition of one part; the last copy may be truncated.
fn repeats(characters: &[char]) -> bool {
    let is_period =
        |length: usize| characters[length..].iter().zip(characters).all(|(a, b)| a == b);
    (1..=characters.len() / 2).any(is_period)
}

/// The configured secret, else the one in `file`, else a new one that is written to `file`.
pub fn load_or_generate(set: Option<&SecretString>, file: &Path) -> anyhow::Result<SecretString> {
    if let Some(secret) = set.filter(|secret| !secret.expose_secret().is_empty()) {
        return Ok(secret.clone());
    }
    match read(file)? {
        Some(secret) => Ok(secret),
        None => generate(file),
    }
}

/// The configured secret, else the one in `file`, if there is any.
pub fn load_if_exists(
    set: Option<&SecretString>,
    file: &Path,
) -> anyhow::Result<Option<SecretString>> {
    set.map_or_else(|| read(file), |secret| Ok(Some(secret.clone())))
}

fn read(file: &Path) -> anyhow::Result<Option<SecretString>> {
    match fs::read_to_string(file) {
        Ok(text) if text.trim().len() >= MIN_SECRET_LEN => {
            Ok(Some(SecretString::from(text.trim())))
        }
        Ok(_) => {
            anyhow::bail!("{} contains no secret; remove it to generate one", file.display())
        }
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| format!("reading {}", file.display())),
    }
}

fn generate(file: &Path) -> anyhow::Result<SecretString> {
    if let Some(folder) = file.parent() {
        fs::create_dir_all(folder).with_context(|| format!("creating {}", folder.display()))?;
    }
    let secret = hex::encode(rand::random::<[u8; 32]>());
    // Written to a temporary file and linked into place: if two processes start at the same time, one secret wins, and
    // no process reads a partial file.
    let temporary = file.with_extension(format!("new-{}", std::process::id()));
    let mut new =
        OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
    new.write_all(secret.as_bytes())?;
    new.sync_all()?;
    let linked = fs::hard_link(&temporary, file);
    fs::remove_file(&temporary)?;
    match linked {
        Ok(()) => Ok(SecretString::from(secret)),
        Err(error) if error.kind() == ErrorKind::AlreadyExists => {
            read(file)?.context("the secret that another process has just generated is missing")
        }
        Err(error) => Err(error).with_context(|| format!("writing {}", file.display())),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SECRET: &str = "q8Zt0rW3mXv7Kc1Ly5Nb9Hd2Jf6Gp4Sa";

    #[test]
    fn a_guessable_secret_is_rejected_if_it_must_be_hard_to_guess() {
        use Strength::{HardToGuess, Long};
        for strength in [Long, HardToGuess] {
            assert!(weakness(&SECRET[1..], strength).unwrap().contains("32 characters"));
            assert_eq!(weakness(SECRET, strength), None);
        }
        for known in EXAMPLE_PARTS {
            let text = format!("{SECRET}{}", known.to_uppercase());
            assert!(weakness(&text, HardToGuess).unwrap().contains(known));
            assert_eq!(weakness(&text, Long), None);
        }
        let repeated = ["a".repeat(32), "changeme".repeat(4), "123456789".repeat(4)];
        for text in repeated.into_iter().chain(["1234567890".repeat(4), SECRET.repeat(2)]) {
            assert!(weakness(&text, HardToGuess).is_some(), "{text}");
        }
        assert!(weakness(&"é".repeat(32), HardToGuess).unwrap().contains("repeats"));
    }

    #[test]
    fn an_empty_secret_counts_as_not_configured() {
        let empty = SecretString::from("");
        assert!(validate_configured("X", Some(&empty), Strength::HardToGuess).unwrap().is_none());
        assert!(validate_configured("X", None, Strength::HardToGuess).unwrap().is_none());
    }

    proptest! {
        #[test]
        fn a_secret_from_openssl_is_never_rejected(bytes: [u8; 32]) {
            use base64::Engine as _;
            // Few distinct bytes come from a shrinking test, never from a generator.
            prop_assume!(bytes.iter().collect::<HashSet<_>>().len() > 20);
            let base64 = base64::prelude::BASE64_STANDARD.encode(bytes);
            let rejected = [hex::encode(bytes), base64].map(|text| {
                weakness(&text, Strength::HardToGuess)
                    // Base64 contains one of the words once in millions.
                    .filter(|problem| problem.contains("repeats"))
            });
            prop_assert_eq!(rejected, [None, None]);
        }

        #[test]
        fn a_repetition_is_always_rejected(part in "\\PC{1,40}", times in 2_usize..40, cut in 0_usize..40) {
            let mut text: Vec<char> = part.repeat(times).chars().collect();
            text.truncate((text.len() - cut.min(part.chars().count() - 1)).max(1));
            let text: String = text.into_iter().collect();
            // At least two complete copies must remain.
            prop_assume!(text.chars().count() >= 2 * part.chars().count());
            prop_assert!(weakness(&text, Strength::HardToGuess).is_some());
        }

        #[test]
        fn a_part_of_an_example_is_rejected_at_any_position(at in 0_usize..=32, word in 0..EXAMPLE_PARTS.len()) {
            let text = format!("{}{}{}", &SECRET[..at], EXAMPLE_PARTS[word], &SECRET[at..]);
            prop_assert!(weakness(&text, Strength::HardToGuess).is_some());
            prop_assert!(weakness(&text, Strength::Long).is_none());
        }
    }
}

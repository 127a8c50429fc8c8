//! Secrets: what is asked of those that an operator sets, and those that embedded defaults make for
//! themselves, each in a file under the data folder, readable by its owner alone, written once.

use std::collections::HashSet;
use std::fs::{self, OpenOptions};
use std::io::{ErrorKind, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use anyhow::Context as _;
use secrecy::{ExposeSecret as _, SecretString};

use crate::config::Wrong;

/// Where DATA_DIR keeps a mesh token that was made.
pub const MESH_TOKEN_FILE: &str = "mesh-token";

/// Fewest characters of a secret that an operator sets.
const SHORTEST: usize = 32;
/// Fewest different characters of one that is hard to guess.
const FEWEST_DISTINCT: usize = 10;
/// Parts of secrets that stand in examples, in lower case.
const WELL_KNOWN: &[&str] = &[
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

/// What is asked of a secret.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Strength {
    /// 32 characters.
    Long,
    /// That, no part of an example, and no repetition.
    HardToGuess,
}

/// A secret that is set, and not to nothing; refused where it is too weak.
pub fn set<'a>(
    name: &'static str,
    secret: Option<&'a SecretString>,
    strength: Strength,
) -> Result<Option<&'a SecretString>, Wrong> {
    let secret = secret.filter(|secret| !secret.expose_secret().is_empty());
    let problem = secret.and_then(|secret| weakness(secret.expose_secret(), strength));
    problem.map_or(Ok(secret), |problem| Err(Wrong::new(name, problem)))
}

fn weakness(secret: &str, strength: Strength) -> Option<String> {
    let characters: Vec<_> = secret.chars().collect();
    if characters.len() < SHORTEST {
        return Some(format!("needs {SHORTEST} characters or more"));
    }
    if strength == Strength::Long {
        return None;
    }
    let lower = secret.to_lowercase();
    if let Some(known) = WELL_KNOWN.iter().find(|known| lower.contains(**known)) {
        return Some(format!("has {known:?} in it: make one with `openssl rand -hex 32`"));
    }
    let distinct = characters.iter().collect::<HashSet<_>>().len();
    if distinct < FEWEST_DISTINCT || repeats(&characters) {
        return Some("repeats itself: make one with `openssl rand -hex 32`".to_owned());
    }
    None
}

/// Whether it is one part again and again, the last time perhaps cut short.
fn repeats(characters: &[char]) -> bool {
    let is_period =
        |length: usize| characters[length..].iter().zip(characters).all(|(a, b)| a == b);
    (1..=characters.len() / 2).any(is_period)
}

/// The secret that was set, else the one in `file`, else a new one that `file` keeps.
pub fn set_or_kept(set: Option<&SecretString>, file: &Path) -> anyhow::Result<SecretString> {
    if let Some(secret) = set.filter(|secret| !secret.expose_secret().is_empty()) {
        return Ok(secret.clone());
    }
    match read(file)? {
        Some(secret) => Ok(secret),
        None => make(file),
    }
}

/// The secret that was set, else the one in `file`, if there is any.
pub fn set_or_found(
    set: Option<&SecretString>,
    file: &Path,
) -> anyhow::Result<Option<SecretString>> {
    set.map_or_else(|| read(file), |secret| Ok(Some(secret.clone())))
}

fn read(file: &Path) -> anyhow::Result<Option<SecretString>> {
    match fs::read_to_string(file) {
        Ok(text) if text.trim().len() >= SHORTEST => Ok(Some(SecretString::from(text.trim()))),
        Ok(_) => anyhow::bail!("{} holds no secret; remove it to have one made", file.display()),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| format!("reading {}", file.display())),
    }
}

fn make(file: &Path) -> anyhow::Result<SecretString> {
    if let Some(folder) = file.parent() {
        fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))?;
    }
    let secret = hex::encode(rand::random::<[u8; 32]>());
    // Written aside and linked into place: of two that start together one wins, and nobody reads
    // a half-written file.
    let aside = file.with_extension(format!("new-{}", std::process::id()));
    let mut new =
        OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&aside)?;
    new.write_all(secret.as_bytes())?;
    new.sync_all()?;
    let linked = fs::hard_link(&aside, file);
    fs::remove_file(&aside)?;
    match linked {
        Ok(()) => Ok(SecretString::from(secret)),
        Err(error) if error.kind() == ErrorKind::AlreadyExists => {
            read(file)?.context("the secret that was just made is gone")
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
    fn a_secret_that_could_be_guessed_is_refused_where_it_matters() {
        use Strength::{HardToGuess, Long};
        for strength in [Long, HardToGuess] {
            assert!(weakness(&SECRET[1..], strength).unwrap().contains("32 characters"));
            assert_eq!(weakness(SECRET, strength), None);
        }
        for known in WELL_KNOWN {
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
    fn what_is_set_to_nothing_is_not_set() {
        let empty = SecretString::from("");
        assert!(set("X", Some(&empty), Strength::HardToGuess).unwrap().is_none());
        assert!(set("X", None, Strength::HardToGuess).unwrap().is_none());
    }

    proptest! {
        #[test]
        fn what_openssl_makes_is_never_refused(bytes: [u8; 32]) {
            use base64::Engine as _;
            // All bytes alike or two in turn: what no generator makes, and a shrinking test does.
            prop_assume!(bytes.iter().collect::<HashSet<_>>().len() > 20);
            let base64 = base64::prelude::BASE64_STANDARD.encode(bytes);
            let refused = [hex::encode(bytes), base64].map(|text| {
                weakness(&text, Strength::HardToGuess)
                    // A word in base64 comes once in millions.
                    .filter(|problem| problem.contains("repeats"))
            });
            prop_assert_eq!(refused, [None, None]);
        }

        #[test]
        fn what_repeats_is_always_refused(part in "\\PC{1,40}", times in 2_usize..40, cut in 0_usize..40) {
            let mut text: Vec<char> = part.repeat(times).chars().collect();
            text.truncate((text.len() - cut.min(part.chars().count() - 1)).max(1));
            let text: String = text.into_iter().collect();
            // Where it is cut, two whole parts must be left.
            prop_assume!(text.chars().count() >= 2 * part.chars().count());
            prop_assert!(weakness(&text, Strength::HardToGuess).is_some());
        }

        #[test]
        fn a_known_word_is_refused_wherever_it_stands(at in 0_usize..=32, word in 0..WELL_KNOWN.len()) {
            let text = format!("{}{}{}", &SECRET[..at], WELL_KNOWN[word], &SECRET[at..]);
            prop_assert!(weakness(&text, Strength::HardToGuess).is_some());
            prop_assert!(weakness(&text, Strength::Long).is_none());
        }
    }
}

//! Secrets that embedded defaults make for themselves: a file under the data folder, readable by its
//! owner alone, written once.

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

/// A secret that is set, and not to nothing; refused where it is too short.
pub fn set<'a>(
    name: &'static str,
    secret: Option<&'a SecretString>,
) -> Result<Option<&'a SecretString>, Wrong> {
    let secret = secret.filter(|secret| !secret.expose_secret().is_empty());
    if secret.is_some_and(|secret| secret.expose_secret().chars().count() < SHORTEST) {
        return Err(Wrong::new(name, format!("needs {SHORTEST} characters or more")));
    }
    Ok(secret)
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

//! The session that `hapa session login` stores: one private file, renewed under a lock.
//!
//! A refresh token works once, and its second use revokes the session. The lock prevents two commands that start
//! together from using the same refresh token.

use std::fs::{File, OpenOptions};
use std::io::ErrorKind;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, anyhow};
use hapa_proto::auth::v1::session_service_client::SessionServiceClient;
use hapa_proto::auth::v1::{RefreshSessionRequest, Session};
use prost_types::Timestamp;
use serde::{Deserialize, Serialize};
use tonic::Code;

use crate::cli::connection::ServerAddress;
use crate::cli::{CliError, file_mode, time_args};

/// An access token with a shorter remaining life is renewed before use.
const MIN_REMAINING_SECONDS: i64 = 60;

/// The content of the session file.
#[derive(Deserialize, Serialize)]
pub(super) struct SavedSession {
    pub(super) session_id: String,
    pub(super) user_id: String,
    pub(super) access_token: String,
    refresh_token: String,
    /// Expiry of the access token, RFC 3339.
    expire_time: String,
}

/// The tokens in the reply to a login or a refresh.
pub(super) struct TokenPair {
    pub(super) session: Option<Session>,
    pub(super) access_token: String,
    pub(super) refresh_token: String,
    /// Life of the access token in seconds.
    pub(super) expires_in: u32,
}

/// Exclusive access to the session file, until dropped.
pub(super) struct LockedSessionFile {
    path: PathBuf,
    _lock: File,
}

impl LockedSessionFile {
    /// Waits for the lock; creates the folder where it is missing.
    pub(super) fn lock(path: PathBuf) -> anyhow::Result<LockedSessionFile> {
        if let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
            let context = || format!("cannot create {}", folder.display());
            std::fs::create_dir_all(folder).with_context(context)?;
        }
        let lock_path = path.with_extension("lock");
        let context = || format!("cannot lock {}", lock_path.display());
        let lock = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&lock_path)
            .with_context(context)?;
        lock.lock().with_context(context)?;
        Ok(LockedSessionFile { path, _lock: lock })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// `None` if there is no session.
    pub(super) fn read(&self) -> anyhow::Result<Option<SavedSession>> {
        let path = self.path.display();
        let text = match std::fs::read_to_string(&self.path) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            text => text.with_context(|| format!("cannot read {path}"))?,
        };
        let session = serde_json::from_str(&text);
        session
            .map(Some)
            .map_err(|_| anyhow!("{path} holds no session; create one with `hapa session login`"))
    }

    pub(super) fn write(&self, tokens: TokenPair) -> anyhow::Result<SavedSession> {
        let session = tokens.session.context("the mesh returned no session")?;
        let saved = SavedSession {
            session_id: session.session_id,
            user_id: session.user_id,
            access_token: tokens.access_token,
            refresh_token: tokens.refresh_token,
            expire_time: time_args::seconds_from_now(i64::from(tokens.expires_in)).to_string(),
        };
        file_mode::write_private(&self.path, &serde_json::to_string(&saved)?)?;
        Ok(saved)
    }

    pub(super) fn remove(self) -> anyhow::Result<()> {
        std::fs::remove_file(&self.path)
            .with_context(|| format!("cannot remove {}", self.path.display()))
    }

    /// Returns the session with a fresh access token, renewed if necessary; `None` if the session ended.
    pub(super) async fn renew(
        &self,
        session: SavedSession,
        server: &ServerAddress,
    ) -> Result<Option<SavedSession>, CliError> {
        if session.is_fresh() {
            return Ok(Some(session));
        }
        let mut client = SessionServiceClient::new(server.connect_unauthenticated().await?);
        let request = RefreshSessionRequest { refresh_token: session.refresh_token };
        let reply = match client.refresh_session(request).await {
            Err(status) if status.code() == Code::Unauthenticated => return Ok(None),
            reply => reply?.into_inner(),
        };
        // Stored before use: the previous refresh token is void from here on.
        let renewed = self.write(TokenPair {
            session: reply.session,
            access_token: reply.access_token,
            refresh_token: reply.refresh_token,
            expires_in: reply.expires_in,
        })?;
        Ok(Some(renewed))
    }
}

impl SavedSession {
    fn is_fresh(&self) -> bool {
        let end = self.expire_time.parse::<Timestamp>();
        end.is_ok_and(|end| {
            end.seconds - time_args::seconds_from_now(0).seconds >= MIN_REMAINING_SECONDS
        })
    }
}

/// Loads the stored session with a fresh access token.
pub(super) async fn load_fresh(server: &ServerAddress) -> Result<SavedSession, CliError> {
    let path = server.session_file();
    let missing =
        || anyhow!("not logged in: {} is missing; run `hapa session login`", path.display());
    if !path.exists() {
        return Err(missing().into());
    }
    let file = LockedSessionFile::lock(path.clone())?;
    let session = file.read()?.ok_or_else(missing)?;
    let renewed = file.renew(session, server).await?;
    renewed.ok_or_else(|| {
        anyhow!("the session in {} ended; run `hapa session login`", path.display()).into()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens(expires_in: u32) -> TokenPair {
        let session = Session { session_id: "ses_1".to_owned(), ..Session::default() };
        let (access_token, refresh_token) = ("access".to_owned(), "refresh".to_owned());
        TokenPair { session: Some(session), access_token, refresh_token, expires_in }
    }

    #[test]
    fn a_stored_session_is_read_back_until_it_is_removed() {
        let folder = std::env::temp_dir().join(format!("hapa-session-{}", std::process::id()));
        let file = LockedSessionFile::lock(folder.join("session")).unwrap();
        assert!(file.read().unwrap().is_none());
        file.write(tokens(900)).unwrap();
        let session = file.read().unwrap().unwrap();
        assert_eq!(
            (session.session_id.as_str(), session.access_token.as_str()),
            ("ses_1", "access")
        );
        assert!(session.is_fresh());
        assert!(!file.write(tokens(59)).unwrap().is_fresh());
        file.remove().unwrap();
        std::fs::remove_dir_all(folder).unwrap();
    }
}

//! The session that a login keeps: one file, private, renewed by one process at a time. A refresh
//! token works once, and one that comes twice ends the session: two commands that start together
//! must not both trade it.

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

use crate::cli::{Failure, connection, moment, private};

/// An access token that lives shorter than this is renewed first, in seconds.
const TOO_SHORT: i64 = 60;

/// What the file holds.
#[derive(Deserialize, Serialize)]
pub(in crate::cli) struct Kept {
    pub(in crate::cli) session_id: String,
    pub(in crate::cli) user_id: String,
    pub(in crate::cli) access_token: String,
    refresh_token: String,
    /// When the access token ends, RFC 3339.
    expire_time: String,
}

/// What a login and a refresh give.
pub(super) struct Pair {
    pub(super) session: Option<Session>,
    pub(super) access_token: String,
    pub(super) refresh_token: String,
    pub(super) expires_in: u32,
}

/// Nobody else reads or writes the file while this lives.
pub(super) struct Locked {
    file: PathBuf,
    _lock: File,
}

impl Locked {
    pub(super) fn take(file: PathBuf) -> anyhow::Result<Locked> {
        if let Some(folder) = file.parent().filter(|folder| !folder.as_os_str().is_empty()) {
            let words = || format!("making {}", folder.display());
            std::fs::create_dir_all(folder).with_context(words)?;
        }
        let path = file.with_extension("lock");
        let words = || format!("locking {}", path.display());
        let lock =
            OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(&path);
        let lock = lock.with_context(words)?;
        lock.lock().with_context(words)?;
        Ok(Locked { file, _lock: lock })
    }

    pub(super) fn file(&self) -> &Path {
        &self.file
    }

    /// None where nobody is logged in.
    pub(super) fn read(&self) -> anyhow::Result<Option<Kept>> {
        let file = self.file.display();
        let text = match std::fs::read_to_string(&self.file) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            text => text.with_context(|| format!("reading {file}"))?,
        };
        let kept = serde_json::from_str(&text);
        kept.map(Some).map_err(|_| anyhow!("{file} holds no session; `hapa session login` does"))
    }

    pub(super) fn write(&self, pair: Pair) -> anyhow::Result<Kept> {
        let session = pair.session.context("the mesh answered without the session")?;
        let kept = Kept {
            session_id: session.session_id,
            user_id: session.user_id,
            access_token: pair.access_token,
            refresh_token: pair.refresh_token,
            expire_time: moment::from_now(i64::from(pair.expires_in)).to_string(),
        };
        private::write(&self.file, &serde_json::to_string(&kept)?)?;
        Ok(kept)
    }

    pub(super) fn remove(self) -> anyhow::Result<()> {
        std::fs::remove_file(&self.file)
            .with_context(|| format!("removing {}", self.file.display()))
    }

    /// The session with an access token that lives long enough, renewed where that needs it; none
    /// where it has ended.
    pub(super) async fn renewed(
        &self,
        kept: Kept,
        place: &connection::Place,
    ) -> Result<Option<Kept>, Failure> {
        if kept.lives() {
            return Ok(Some(kept));
        }
        let mut client = SessionServiceClient::new(place.as_nobody().await?);
        let request = RefreshSessionRequest { refresh_token: kept.refresh_token };
        let reply = match client.refresh_session(request).await {
            Err(status) if status.code() == Code::Unauthenticated => return Ok(None),
            reply => reply?.into_inner(),
        };
        // Kept before anyone uses it: the token that was traded is worthless now.
        let kept = self.write(Pair {
            session: reply.session,
            access_token: reply.access_token,
            refresh_token: reply.refresh_token,
            expires_in: reply.expires_in,
        })?;
        Ok(Some(kept))
    }
}

impl Kept {
    fn lives(&self) -> bool {
        let end = self.expire_time.parse::<Timestamp>();
        end.is_ok_and(|end| end.seconds - moment::from_now(0).seconds >= TOO_SHORT)
    }
}

/// The kept session with an access token that lives long enough.
pub(in crate::cli) async fn fresh(place: &connection::Place) -> Result<Kept, Failure> {
    let file = place.session_file();
    let nobody = || anyhow!("nobody is logged in: `hapa session login` makes {}", file.display());
    if !file.exists() {
        return Err(nobody().into());
    }
    let locked = Locked::take(file.clone())?;
    let kept = locked.read()?.ok_or_else(nobody)?;
    let ended = "has ended: `hapa session login` makes a new one";
    let renewed = locked.renewed(kept, place).await?;
    renewed.ok_or_else(|| anyhow!("the session in {} {ended}", file.display()).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(expires_in: u32) -> Pair {
        let session = Session { session_id: "ses_1".to_owned(), ..Session::default() };
        let (access_token, refresh_token) = ("access".to_owned(), "refresh".to_owned());
        Pair { session: Some(session), access_token, refresh_token, expires_in }
    }

    #[test]
    fn what_was_kept_is_read_again_until_it_is_removed() {
        let folder = std::env::temp_dir().join(format!("hapa-kept-{}", std::process::id()));
        let locked = Locked::take(folder.join("session")).unwrap();
        assert!(locked.read().unwrap().is_none());
        locked.write(pair(900)).unwrap();
        let kept = locked.read().unwrap().unwrap();
        assert_eq!((kept.session_id.as_str(), kept.access_token.as_str()), ("ses_1", "access"));
        assert!(kept.lives());
        assert!(!locked.write(pair(59)).unwrap().lives());
        locked.remove().unwrap();
        std::fs::remove_dir_all(folder).unwrap();
    }
}

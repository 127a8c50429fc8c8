//! Limits for password logins, as login handlers see them. The server counts the attempts.

use std::fmt;
use std::sync::Arc;

use futures_util::future::BoxFuture;
use tonic::{Extensions, Status};

use crate::rpc_error::RpcError;

type Begin = dyn Fn(&str) -> BoxFuture<'static, Result<PasswordAttempt, RpcError>> + Send + Sync;

/// Counts wrong passwords per account from the network of one call. The server adds it to the extensions of each
/// request to an RPC that issues credentials.
#[derive(Clone)]
pub struct PasswordAttempts(Arc<Begin>);

/// One attempt with the password of an account. Attempts for the same account from the same network run one after the
/// other, so that parallel attempts cannot exceed the limit.
pub struct PasswordAttempt {
    /// Counts the password as wrong when polled. Holds the permit of the attempt until it is dropped.
    record_wrong: BoxFuture<'static, ()>,
}

impl PasswordAttempts {
    /// A counter from the function that begins an attempt for an e-mail address.
    pub fn new(
        begin: impl Fn(&str) -> BoxFuture<'static, Result<PasswordAttempt, RpcError>>
        + Send
        + Sync
        + 'static,
    ) -> Self {
        PasswordAttempts(Arc::new(begin))
    }

    /// The counter in the extensions of a request. Fails with E5004 if there is none.
    pub fn from_extensions(extensions: &Extensions) -> Result<PasswordAttempts, Status> {
        let found = extensions.get::<PasswordAttempts>().cloned();
        found.ok_or_else(|| RpcError::internal("a login ran without the server's admission").into())
    }

    /// Begins an attempt, before the password is hashed. Fails with E4004 after 10 wrong passwords for the account from
    /// this network within a minute.
    pub async fn begin(&self, email: &str) -> Result<PasswordAttempt, RpcError> {
        (self.0)(email).await
    }
}

impl PasswordAttempt {
    /// An attempt that `record_wrong` counts as failed; dropping the future ends the attempt.
    pub fn new(record_wrong: BoxFuture<'static, ()>) -> Self {
        PasswordAttempt { record_wrong }
    }

    /// Counts the password as wrong.
    pub async fn record_wrong_password(self) {
        self.record_wrong.await;
    }
}

impl fmt::Debug for PasswordAttempts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PasswordAttempts")
    }
}

impl fmt::Debug for PasswordAttempt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PasswordAttempt")
    }
}

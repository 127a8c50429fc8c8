//! Passwords: kept as argon2id in PHC strings, which hold salt and parameters.
//!
//! Kept true: at most two are worked on at once, so that logins can take neither all memory nor all
//! cores; and to check one takes the same time whether or not there is anything to check it against.

use std::sync::Arc;
use std::time::Duration;

use argon2::password_hash::{Error as HashError, PasswordHasher as _, PasswordVerifier as _};
use argon2::{Algorithm, Argon2, Params, Version};
use secrecy::{ExposeSecret as _, SecretString};
use tokio::sync::Semaphore;
use tokio::task::spawn_blocking;
use tokio::time::timeout;

use crate::error::Error;

/// OWASP's parameters for argon2id, as are the two below:
/// <https://cheatsheetseries.owasp.org/cheatsheets/Password_Storage_Cheat_Sheet.html#argon2id>
const MEMORY_KIB: u32 = 19_456;
const PASSES: u32 = 2;
const LANES: u32 = 1;
/// One takes about 17 ms of a core.
const AT_ONCE: usize = 2;
/// Longest wait for a turn.
const PATIENCE: Duration = Duration::from_secs(2);
/// A random salt and a random hash, which no known password has, with the parameters above.
const NOBODY: &str = "$argon2id$v=19$m=19456,t=2,p=1$A8ijUWUhpSExSMYdAIkbNg$DLwF7b2ErG3W9eqDfGlfBZo2DKBvQri27ACWHOYMfrU";

/// Hashes passwords and checks them.
#[derive(Clone, Debug)]
pub(crate) struct Passwords {
    turns: Arc<Semaphore>,
}

impl Passwords {
    pub(crate) fn new() -> Self {
        Passwords { turns: Arc::new(Semaphore::new(AT_ONCE)) }
    }

    /// What may be stored of a password.
    pub(crate) async fn hash(&self, password: &SecretString) -> Result<String, Error> {
        let password = password.clone();
        self.work(move || {
            let params = Params::new(MEMORY_KIB, PASSES, LANES, None)?;
            let argon2 = Argon2::new(Algorithm::Argon2id, Version::V0x13, params);
            Ok(argon2.hash_password(password.expose_secret().as_bytes())?.to_string())
        })
        .await
    }

    /// Whether a password is the one behind the hash; without a hash it is not, which takes as long.
    pub(crate) async fn verify(
        &self,
        password: &SecretString,
        hash: Option<&str>,
    ) -> Result<bool, Error> {
        let (password, is_anyone) = (password.clone(), hash.is_some());
        let hash = hash.unwrap_or(NOBODY).to_owned();
        let verified = self.work(move || {
            let password = password.expose_secret().as_bytes();
            match Argon2::default().verify_password(password, hash.as_str()) {
                Ok(()) => Ok(true),
                Err(HashError::PasswordInvalid) => Ok(false),
                Err(error) => Err(error.into()),
            }
        });
        Ok(verified.await? && is_anyone)
    }

    /// The turn ends with the work, also where the caller has stopped waiting.
    async fn work<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> anyhow::Result<T> + Send + 'static,
    ) -> Result<T, Error> {
        let turn = timeout(PATIENCE, Arc::clone(&self.turns).acquire_owned());
        let turn = turn.await.map_err(|_| Error::Busy)?.map_err(anyhow::Error::from)?;
        let done = spawn_blocking(move || {
            let done = work();
            drop(turn);
            done
        });
        Ok(done.await.map_err(anyhow::Error::from)??)
    }
}

#[cfg(test)]
mod tests {
    use argon2::password_hash::phc::PasswordHash;
    use proptest::prelude::*;
    use tokio::runtime::Runtime;

    use super::*;

    fn secret(text: &str) -> SecretString {
        SecretString::from(text)
    }

    #[tokio::test]
    async fn a_password_is_known_again_and_another_is_not() {
        let passwords = Passwords::new();
        let hash = passwords.hash(&secret("correct horse battery")).await.unwrap();
        assert!(hash.starts_with("$argon2id$v=19$m=19456,t=2,p=1$"), "{hash}");
        assert!(passwords.verify(&secret("correct horse battery"), Some(&hash)).await.unwrap());
        assert!(!passwords.verify(&secret("correct horse"), Some(&hash)).await.unwrap());
        let again = passwords.hash(&secret("correct horse battery")).await.unwrap();
        assert_ne!(hash, again, "the salt is the same");
    }

    #[tokio::test]
    async fn nobody_has_a_password_and_checking_it_costs_the_same() {
        let nobody = PasswordHash::new(NOBODY).unwrap();
        let params = Params::try_from(&nobody).unwrap();
        let costs = (params.m_cost(), params.t_cost(), params.p_cost());
        assert_eq!(costs, (MEMORY_KIB, PASSES, LANES));
        assert_eq!(nobody.algorithm.as_str(), "argon2id");
        assert!(!Passwords::new().verify(&secret(""), None).await.unwrap());
        let hash = Some("not a hash");
        let broken = Passwords::new().verify(&secret("x"), hash).await;
        assert!(matches!(broken, Err(Error::Internal(_))));
    }

    #[tokio::test]
    async fn who_waits_too_long_for_a_turn_is_told_to_come_back() {
        let passwords = Passwords::new();
        let taken = passwords.turns.clone().acquire_many_owned(2).await.unwrap();
        let refused = passwords.verify(&secret("x"), None).await.unwrap_err();
        assert!(matches!(refused, Error::Busy));
        let status = tonic::Status::from(refused);
        assert_eq!(hapa_chassis::status::read(&status).unwrap().0, "E5005");
        assert_eq!(status.metadata().get("retry-after").unwrap(), "1");
        drop(taken);
    }

    #[tokio::test]
    async fn a_caller_who_left_keeps_the_turn_until_the_work_is_done() {
        let passwords = Passwords::new();
        let (end, ended) = std::sync::mpsc::channel::<()>();
        let work = passwords.work(move || Ok(ended.recv()?));
        assert!(timeout(Duration::from_millis(20), work).await.is_err());
        assert_eq!(passwords.turns.available_permits(), 1);
        end.send(()).unwrap();
        let all = timeout(Duration::from_secs(30), passwords.turns.acquire_many(2)).await;
        assert!(all.unwrap().is_ok());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn a_made_up_hash_is_an_error_or_no_match_and_never_panics(hash in "(\\$argon2id)?\\PC{0,60}") {
            let verified = Runtime::new().unwrap().block_on(
                Passwords::new().verify(&secret("x"), Some(&hash)));
            prop_assert!(!matches!(verified, Ok(true)));
        }
    }
}

//! Passwords: stored as argon2id in PHC strings, which hold salt and parameters.
//!
//! Invariants: at most `AT_ONCE` hashes run at a time, each in a buffer that the next hash reuses, so
//! that logins can take neither all memory nor all cores; at most `MAX_WAITING` callers wait; and a
//! check takes the same time whether or not there is a hash to check against.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use argon2::password_hash::phc::{Output, ParamsString, PasswordHash, Salt};
use argon2::{Algorithm, Argon2, Block, Params, Version};
use secrecy::{ExposeSecret as _, SecretString};
use tokio::sync::Semaphore;
use tokio::task::spawn_blocking;
use tokio::time::timeout;
use zeroize::Zeroize as _;

use crate::error::Error;

/// OWASP's parameters for argon2id, as are the two below:
/// <https://cheatsheetseries.owasp.org/cheatsheets/Password_Storage_Cheat_Sheet.html#argon2id>
const MEMORY_KIB: u32 = 19_456;
const PASSES: u32 = 2;
const LANES: u32 = 1;
/// One takes about 17 ms of a core, and 19 MiB.
const AT_ONCE: usize = 2;
/// Callers that may wait for a turn: about half a second of work. The next one gets E5005 at once.
const MAX_WAITING: usize = 64;
/// Longest wait for a turn.
const PATIENCE: Duration = Duration::from_secs(2);
/// A random salt and a random hash, which no known password has, with the parameters above.
const NOBODY: &str = "$argon2id$v=19$m=19456,t=2,p=1$A8ijUWUhpSExSMYdAIkbNg$DLwF7b2ErG3W9eqDfGlfBZo2DKBvQri27ACWHOYMfrU";

/// Hashes passwords and checks them. Clones share turns and buffers.
#[derive(Clone, Debug)]
pub(crate) struct Passwords {
    /// One permit for each caller, waiting or running.
    places: Arc<Semaphore>,
    /// One permit for each hash that runs.
    turns: Arc<Semaphore>,
    buffers: Buffers,
}

/// The working memory of hashes that have ended, for the next ones. It is never freed: an allocator
/// keeps freed blocks of this size in an arena of each thread, and there are many blocking threads.
#[derive(Clone, Debug, Default)]
struct Buffers(Arc<Mutex<Vec<Vec<Block>>>>);

/// The working memory of one hash. Dropping it wipes it and returns it.
struct Buffer {
    blocks: Vec<Block>,
    buffers: Buffers,
}

impl Buffers {
    fn take(&self) -> Buffer {
        let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let blocks = kept.unwrap_or_else(|| vec![Block::new(); MEMORY_KIB as usize]);
        Buffer { blocks, buffers: self.clone() }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        for block in &mut self.blocks {
            block.zeroize();
        }
        let blocks = std::mem::take(&mut self.blocks);
        self.buffers.0.lock().unwrap_or_else(PoisonError::into_inner).push(blocks);
    }
}

impl Passwords {
    pub(crate) fn new() -> Self {
        Passwords {
            places: Arc::new(Semaphore::new(AT_ONCE + MAX_WAITING)),
            turns: Arc::new(Semaphore::new(AT_ONCE)),
            buffers: Buffers::default(),
        }
    }

    /// What may be stored of a password.
    pub(crate) async fn hash(&self, password: &SecretString) -> Result<String, Error> {
        let password = password.clone();
        self.work(move |blocks| {
            let params = Params::new(MEMORY_KIB, PASSES, LANES, None)?;
            let mut hash = PasswordHash {
                algorithm: Algorithm::Argon2id.ident(),
                version: Some(Version::V0x13.into()),
                params: ParamsString::try_from(&params)?,
                salt: Some(Salt::generate()),
                hash: None,
            };
            hash.hash = Some(digest(&hash, params, Params::DEFAULT_OUTPUT_LEN, &password, blocks)?);
            Ok(hash.to_string())
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
        let verified = self.work(move |blocks| {
            let hash = PasswordHash::new(&hash)?;
            let params = Params::try_from(&hash)?;
            let expected = hash.hash.context("a stored password hash has no digest")?;
            // Compared in constant time.
            Ok(digest(&hash, params, expected.len(), &password, blocks)? == expected)
        });
        Ok(verified.await? && is_anyone)
    }

    /// Runs `work` on a blocking thread when its turn comes. Place, turn and buffer are released when
    /// the work ends, also where the caller has stopped waiting; a caller that leaves before its turn
    /// releases its place at once.
    async fn work<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut [Block]) -> anyhow::Result<T> + Send + 'static,
    ) -> Result<T, Error> {
        let place = Arc::clone(&self.places).try_acquire_owned().map_err(|_| Error::Busy)?;
        let turn = timeout(PATIENCE, Arc::clone(&self.turns).acquire_owned());
        let turn = turn.await.map_err(|_| Error::Busy)?.map_err(anyhow::Error::from)?;
        let buffers = self.buffers.clone();
        let done = spawn_blocking(move || {
            let mut buffer = buffers.take();
            let done = work(&mut buffer.blocks);
            // The buffer first: whoever gets the turn finds it.
            drop(buffer);
            drop((turn, place));
            done
        });
        Ok(done.await.map_err(anyhow::Error::from)??)
    }
}

/// The digest of a password under a hash's algorithm, version and salt.
fn digest(
    hash: &PasswordHash,
    params: Params,
    length: usize,
    password: &SecretString,
    blocks: &mut [Block],
) -> anyhow::Result<Output> {
    ensure!(
        params.block_count() <= blocks.len(),
        "a stored password hash asks for more memory than {MEMORY_KIB} KiB"
    );
    let algorithm = Algorithm::try_from(hash.algorithm.as_str())?;
    let version = hash.version.map(Version::try_from).transpose()?.unwrap_or_default();
    let salt = hash.salt.as_ref().context("a stored password hash has no salt")?;
    let argon2 = Argon2::new(algorithm, version, params);
    let mut digest = [0; Output::MAX_LENGTH];
    let digest = digest.get_mut(..length).context("a stored password hash is too long")?;
    argon2.hash_password_into_with_memory(
        password.expose_secret().as_bytes(),
        salt,
        digest,
        blocks,
    )?;
    Ok(Output::new(digest)?)
}

#[cfg(test)]
mod tests {
    use argon2::PasswordHasher as _;
    use futures_util::FutureExt as _;
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
    async fn a_hash_with_other_parameters_is_known_where_it_needs_no_more_memory() {
        let passwords = Passwords::new();
        let small = Params::new(4_096, 2, 4, Some(24)).unwrap();
        let small = Argon2::new(Algorithm::Argon2id, Version::V0x13, small);
        let hash = small.hash_password_with_salt(b"password", b"somesalt").unwrap().to_string();
        assert!(passwords.verify(&secret("password"), Some(&hash)).await.unwrap());
        assert!(!passwords.verify(&secret("passwort"), Some(&hash)).await.unwrap());
        let large = "$argon2id$v=19$m=65536,t=2,p=1$c29tZXNhbHQ$CTFhFdXPJO1aFaMaO6Mm5c8y7cJHAph8ArZWb2GRPPc";
        let refused = passwords.verify(&secret("password"), Some(large)).await;
        assert!(matches!(refused, Err(Error::Internal(_))), "{refused:?}");
    }

    #[tokio::test]
    async fn hashes_at_once_share_few_buffers_which_hold_nothing_afterwards() {
        let passwords = Passwords::new();
        let checks = (0..AT_ONCE + MAX_WAITING).map(|_| {
            let passwords = passwords.clone();
            async move { passwords.verify(&secret("x"), None).await }
        });
        for checked in futures_util::future::join_all(checks).await {
            assert!(matches!(checked, Ok(false) | Err(Error::Busy)), "{checked:?}");
        }
        let kept = passwords.buffers.0.lock().unwrap();
        assert!((1..=AT_ONCE).contains(&kept.len()), "{} buffers", kept.len());
        let words = kept.iter().flatten().flat_map(AsRef::<[u64]>::as_ref);
        assert!(words.copied().all(|word| word == 0), "a buffer was not wiped");
    }

    #[tokio::test]
    async fn work_that_panics_gives_back_its_turn_and_its_buffer() {
        let passwords = Passwords::new();
        let failed = passwords.work::<()>(|_| panic!("on purpose")).await;
        assert!(matches!(failed, Err(Error::Internal(_))));
        assert_eq!(passwords.turns.available_permits(), AT_ONCE);
        assert_eq!(passwords.places.available_permits(), AT_ONCE + MAX_WAITING);
        assert_eq!(passwords.buffers.0.lock().unwrap().len(), 1);
    }

    #[tokio::test]
    async fn who_waits_too_long_for_a_turn_is_told_to_come_back() {
        let passwords = Passwords::new();
        let taken = passwords.turns.clone().acquire_many_owned(2).await.unwrap();
        let refused = passwords.verify(&secret("x"), None).await.unwrap_err();
        assert!(matches!(refused, Error::Busy));
        let status = tonic::Status::from(refused);
        assert_eq!(hapa_core::rpc_error::read(&status).unwrap().0, "E5005");
        assert_eq!(status.metadata().get("retry-after").unwrap(), "1");
        drop(taken);
    }

    #[tokio::test]
    async fn beyond_those_that_may_wait_a_caller_is_refused_at_once_and_who_leaves_makes_room() {
        let passwords = Passwords::new();
        let taken = passwords.turns.clone().acquire_many_owned(2).await.unwrap();
        let running = passwords.places.clone().acquire_many_owned(2).await.unwrap();
        let password = secret("x");
        let mut waiting: Vec<_> =
            (0..MAX_WAITING).map(|_| Box::pin(passwords.verify(&password, None))).collect();
        for caller in &mut waiting {
            assert!(caller.now_or_never().is_none(), "it has a turn");
        }
        let refused = passwords.hash(&password).now_or_never().expect("refused at once");
        assert!(matches!(refused, Err(Error::Busy)));
        drop(waiting.pop());
        let mut next = Box::pin(passwords.verify(&password, None));
        assert!((&mut next).now_or_never().is_none(), "the place of the one that left is free");
        drop((waiting, taken, running));
        assert!(!next.await.unwrap());
    }

    #[tokio::test]
    async fn a_caller_who_left_keeps_the_turn_until_the_work_is_done() {
        let passwords = Passwords::new();
        let (end, ended) = std::sync::mpsc::channel::<()>();
        let work = passwords.work(move |_| Ok(ended.recv()?));
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

//! Hashes and verifies passwords with argon2id. Hashes are PHC strings, which hold salt and parameters.
//!
//! Invariants: at most `MAX_CONCURRENT_HASHES` hashes run at a time, each in a pooled buffer, so that
//! logins exhaust neither memory nor cores. At most `MAX_WAITING_CALLERS` callers wait. Verification
//! takes the same time with and without a stored hash.

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

/// This and the next two are OWASP's parameters for argon2id:
/// <https://cheatsheetseries.owasp.org/cheatsheets/Password_Storage_Cheat_Sheet.html#argon2id>
const MEMORY_KIB: u32 = 19_456;
const ITERATIONS: u32 = 2;
const PARALLELISM: u32 = 1;
/// One hash takes about 17 ms of a core, and 19 MiB.
const MAX_CONCURRENT_HASHES: usize = 2;
/// Callers that may wait for a permit: about half a second of work. The next one gets E5005 at once.
const MAX_WAITING_CALLERS: usize = 64;
/// Maximum wait for a permit.
const QUEUE_TIMEOUT: Duration = Duration::from_secs(2);
/// Verified if a user has no hash: random salt and digest, which no known password has, with the
/// parameters above.
const DUMMY_HASH: &str = "$argon2id$v=19$m=19456,t=2,p=1$A8ijUWUhpSExSMYdAIkbNg$DLwF7b2ErG3W9eqDfGlfBZo2DKBvQri27ACWHOYMfrU";

/// Hashes and verifies passwords. Clones share permits and buffers.
#[derive(Clone, Debug)]
pub(crate) struct PasswordHasher {
    /// One permit for each caller that waits or hashes.
    queue_slots: Arc<Semaphore>,
    /// One permit for each hash in progress.
    hash_permits: Arc<Semaphore>,
    buffer_pool: BufferPool,
}

/// The working memory of finished hashes, reused by later ones. It is never freed: an allocator keeps
/// freed blocks of this size in an arena of each thread, and there are many blocking threads.
#[derive(Clone, Debug, Default)]
struct BufferPool(Arc<Mutex<Vec<Vec<Block>>>>);

/// The working memory of one hash. Dropping it wipes it and returns it to the pool.
struct PooledBuffer {
    blocks: Vec<Block>,
    pool: BufferPool,
}

impl BufferPool {
    fn acquire(&self) -> PooledBuffer {
        let pooled = self.0.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let blocks = pooled.unwrap_or_else(|| vec![Block::new(); MEMORY_KIB as usize]);
        PooledBuffer { blocks, pool: self.clone() }
    }
}

impl Drop for PooledBuffer {
    fn drop(&mut self) {
        for block in &mut self.blocks {
            block.zeroize();
        }
        let blocks = std::mem::take(&mut self.blocks);
        self.pool.0.lock().unwrap_or_else(PoisonError::into_inner).push(blocks);
    }
}

impl PasswordHasher {
    pub(crate) fn new() -> Self {
        PasswordHasher {
            queue_slots: Arc::new(Semaphore::new(MAX_CONCURRENT_HASHES + MAX_WAITING_CALLERS)),
            hash_permits: Arc::new(Semaphore::new(MAX_CONCURRENT_HASHES)),
            buffer_pool: BufferPool::default(),
        }
    }

    /// Hashes a password with a new salt, as a PHC string.
    pub(crate) async fn hash(&self, password: &SecretString) -> Result<String, Error> {
        let password = password.clone();
        self.run_blocking(move |blocks| {
            let params = Params::new(MEMORY_KIB, ITERATIONS, PARALLELISM, None)?;
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

    /// Whether a password matches a hash. Without a hash the result is `false`, after the same time.
    pub(crate) async fn verify(
        &self,
        password: &SecretString,
        hash: Option<&str>,
    ) -> Result<bool, Error> {
        let (password, has_hash) = (password.clone(), hash.is_some());
        let hash = hash.unwrap_or(DUMMY_HASH).to_owned();
        let verified = self.run_blocking(move |blocks| {
            let hash = PasswordHash::new(&hash)?;
            let params = Params::try_from(&hash)?;
            let expected = hash.hash.context("a stored password hash has no digest")?;
            // Compared in constant time.
            Ok(digest(&hash, params, expected.len(), &password, blocks)? == expected)
        });
        Ok(verified.await? && has_hash)
    }

    /// Runs `work` on a blocking thread once a permit is free. Queue slot, permit and buffer are
    /// released when the work ends, even if the caller is gone. A caller that is dropped before it has
    /// a permit releases its queue slot at once.
    async fn run_blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut [Block]) -> anyhow::Result<T> + Send + 'static,
    ) -> Result<T, Error> {
        let queue_slot =
            Arc::clone(&self.queue_slots).try_acquire_owned().map_err(|_| Error::Overloaded)?;
        let permit = timeout(QUEUE_TIMEOUT, Arc::clone(&self.hash_permits).acquire_owned());
        let permit = permit.await.map_err(|_| Error::Overloaded)?.map_err(anyhow::Error::from)?;
        let buffer_pool = self.buffer_pool.clone();
        let result = spawn_blocking(move || {
            let mut buffer = buffer_pool.acquire();
            let result = work(&mut buffer.blocks);
            // The buffer is returned first, so that the next permit holder finds it in the pool.
            drop(buffer);
            drop((permit, queue_slot));
            result
        });
        Ok(result.await.map_err(anyhow::Error::from)??)
    }
}

/// The digest of a password under the algorithm, version and salt of a hash.
fn digest(
    hash: &PasswordHash,
    params: Params,
    length: usize,
    password: &SecretString,
    blocks: &mut [Block],
) -> anyhow::Result<Output> {
    ensure!(
        params.block_count() <= blocks.len(),
        "a stored password hash needs more memory than {MEMORY_KIB} KiB"
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
    async fn a_password_verifies_against_its_hash_and_another_does_not() {
        let passwords = PasswordHasher::new();
        let hash = passwords.hash(&secret("correct horse battery")).await.unwrap();
        assert!(hash.starts_with("$argon2id$v=19$m=19456,t=2,p=1$"), "{hash}");
        assert!(passwords.verify(&secret("correct horse battery"), Some(&hash)).await.unwrap());
        assert!(!passwords.verify(&secret("correct horse"), Some(&hash)).await.unwrap());
        let again = passwords.hash(&secret("correct horse battery")).await.unwrap();
        assert_ne!(hash, again, "the salt is the same");
    }

    #[tokio::test]
    async fn verification_without_a_hash_costs_the_same_and_fails() {
        let dummy = PasswordHash::new(DUMMY_HASH).unwrap();
        let params = Params::try_from(&dummy).unwrap();
        let costs = (params.m_cost(), params.t_cost(), params.p_cost());
        assert_eq!(costs, (MEMORY_KIB, ITERATIONS, PARALLELISM));
        assert_eq!(dummy.algorithm.as_str(), "argon2id");
        assert!(!PasswordHasher::new().verify(&secret(""), None).await.unwrap());
        let hash = Some("not a hash");
        let broken = PasswordHasher::new().verify(&secret("x"), hash).await;
        assert!(matches!(broken, Err(Error::Internal(_))));
    }

    #[tokio::test]
    async fn a_hash_with_other_parameters_verifies_if_it_needs_no_more_memory() {
        let passwords = PasswordHasher::new();
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
    async fn concurrent_hashes_share_few_buffers_which_are_wiped_afterwards() {
        let passwords = PasswordHasher::new();
        let checks = (0..MAX_CONCURRENT_HASHES + MAX_WAITING_CALLERS).map(|_| {
            let passwords = passwords.clone();
            async move { passwords.verify(&secret("x"), None).await }
        });
        for checked in futures_util::future::join_all(checks).await {
            assert!(matches!(checked, Ok(false) | Err(Error::Overloaded)), "{checked:?}");
        }
        let pooled = passwords.buffer_pool.0.lock().unwrap();
        assert!((1..=MAX_CONCURRENT_HASHES).contains(&pooled.len()), "{} buffers", pooled.len());
        let words = pooled.iter().flatten().flat_map(AsRef::<[u64]>::as_ref);
        assert!(words.copied().all(|word| word == 0), "a buffer was not wiped");
    }

    #[tokio::test]
    async fn work_that_panics_releases_its_permit_and_its_buffer() {
        let passwords = PasswordHasher::new();
        let failed = passwords.run_blocking::<()>(|_| panic!("on purpose")).await;
        assert!(matches!(failed, Err(Error::Internal(_))));
        assert_eq!(passwords.hash_permits.available_permits(), MAX_CONCURRENT_HASHES);
        assert_eq!(
            passwords.queue_slots.available_permits(),
            MAX_CONCURRENT_HASHES + MAX_WAITING_CALLERS
        );
        assert_eq!(passwords.buffer_pool.0.lock().unwrap().len(), 1);
    }

    #[tokio::test]
    async fn a_caller_that_waits_too_long_for_a_permit_gets_a_retry_delay() {
        let passwords = PasswordHasher::new();
        let held_permits = passwords.hash_permits.clone().acquire_many_owned(2).await.unwrap();
        let refused = passwords.verify(&secret("x"), None).await.unwrap_err();
        assert!(matches!(refused, Error::Overloaded));
        let status = tonic::Status::from(refused);
        assert_eq!(hapa_core::rpc_error::published_code(&status).unwrap().0, "E5005");
        assert_eq!(status.metadata().get("retry-after").unwrap(), "1");
        drop(held_permits);
    }

    #[tokio::test]
    async fn a_full_queue_refuses_at_once_and_a_dropped_caller_frees_its_slot() {
        let passwords = PasswordHasher::new();
        let held_permits = passwords.hash_permits.clone().acquire_many_owned(2).await.unwrap();
        let running = passwords.queue_slots.clone().acquire_many_owned(2).await.unwrap();
        let password = secret("x");
        let mut waiting: Vec<_> =
            (0..MAX_WAITING_CALLERS).map(|_| Box::pin(passwords.verify(&password, None))).collect();
        for caller in &mut waiting {
            assert!(caller.now_or_never().is_none(), "it has a permit");
        }
        let refused = passwords.hash(&password).now_or_never().expect("refused at once");
        assert!(matches!(refused, Err(Error::Overloaded)));
        drop(waiting.pop());
        let mut next = Box::pin(passwords.verify(&password, None));
        assert!((&mut next).now_or_never().is_none(), "the slot of the dropped caller is not free");
        drop((waiting, held_permits, running));
        assert!(!next.await.unwrap());
    }

    #[tokio::test]
    async fn a_dropped_caller_holds_its_permit_until_the_work_is_done() {
        let passwords = PasswordHasher::new();
        let (end, ended) = std::sync::mpsc::channel::<()>();
        let work = passwords.run_blocking(move |_| Ok(ended.recv()?));
        assert!(timeout(Duration::from_millis(20), work).await.is_err());
        assert_eq!(passwords.hash_permits.available_permits(), 1);
        end.send(()).unwrap();
        let all = timeout(Duration::from_secs(30), passwords.hash_permits.acquire_many(2)).await;
        assert!(all.unwrap().is_ok());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn an_arbitrary_hash_is_an_error_or_no_match_and_never_panics(hash in "(\\$argon2id)?\\PC{0,60}") {
            let verified = Runtime::new().unwrap().block_on(
                PasswordHasher::new().verify(&secret("x"), Some(&hash)));
            prop_assert!(!matches!(verified, Ok(true)));
        }
    }
}

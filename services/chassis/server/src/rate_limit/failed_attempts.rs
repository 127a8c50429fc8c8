//! Failed authentication attempts, counted per client network and, for passwords, per account.
//!
//! Invariant: a valid credential is never rejected because of failed attempts of others. The credentials of a network
//! over its limit are still verified; only invalid ones are rejected with E4004. Lanes limit the cost of such a
//! network: a few lookups at a time, or one password check. The exception is a single account: from one network its
//! password may be tried 10 times a minute, even if the next password would be right.

use std::net::{IpAddr, Ipv6Addr};
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt as _;
use hapa_core::password_attempts::{PasswordAttempt, PasswordAttempts};
use hapa_core::rpc_error::{ErrorCode, RpcError};
use sha2::{Digest as _, Sha256};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;

use crate::rate_limit::{Limiter, Rate};

const WINDOW_PERIOD: Duration = Duration::from_mins(1);
/// Method name of the limiter for attempts per network.
const NETWORK_METHOD: &str = "Authentication";
/// Method name of the limiter for wrong passwords per account.
const ACCOUNT_METHOD: &str = "PasswordLogin";
/// Maximum number of wrong passwords for one account from one network in a minute.
pub(crate) const MAX_WRONG_PASSWORDS: u32 = 10;
/// Number of lanes. Networks, or accounts, with the same hash share one.
const LANE_COUNT: usize = 64;
/// Maximum number of concurrent lookups for one network over its limit.
const MAX_LOOKUPS_PER_LANE: usize = 16;
/// Maximum wait for a lane.
const LANE_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a wrong password of a network over its limit occupies its lane: at most one guess per second.
pub const WRONG_PASSWORD_DELAY: Duration = Duration::from_secs(1);

/// Counts failed attempts, in this process or in a shared Redis.
#[derive(Clone, Debug)]
pub struct FailedAttempts {
    limiter: Arc<Limiter>,
    by_network: Rate,
    lookups: Lanes,
    logins: Lanes,
    accounts: Lanes,
}

/// A client network over its limit, with the time until it may fail again.
#[derive(Clone, Copy, Debug)]
pub struct OverLimit {
    retry_after: Duration,
}

impl OverLimit {
    /// The error for an invalid credential from such a network.
    pub fn refusal(self, network: &str) -> RpcError {
        let message = "too many failed attempts to authenticate from this address; wait, or send a valid credential";
        RpcError::new(ErrorCode::RateLimited, message).retry_after(self.retry_after).quota(network)
    }
}

impl FailedAttempts {
    /// Admits `limit` failed attempts per network and minute; 0: no limit.
    pub fn new(limiter: Arc<Limiter>, limit: u32) -> Self {
        FailedAttempts {
            limiter,
            by_network: Rate::new(limit, WINDOW_PERIOD),
            lookups: Lanes::new(MAX_LOOKUPS_PER_LANE),
            logins: Lanes::new(1),
            accounts: Lanes::new(1),
        }
    }

    /// Whether a network is over its limit.
    pub async fn over_limit(&self, network: &str) -> Option<OverLimit> {
        let decision = self.limiter.peek(network, NETWORK_METHOD, self.by_network).await;
        decision?.retry_after.map(|retry_after| OverLimit { retry_after })
    }

    /// Counts one failed attempt.
    pub async fn record_failure(&self, network: &str) {
        self.limiter.decide(network, NETWORK_METHOD, self.by_network).await;
    }

    /// A permit to look up a credential of a network over its limit.
    pub async fn lookup_lane(&self, network: &str) -> Result<OwnedSemaphorePermit, RpcError> {
        self.lookups.enter(network).await
    }

    /// A permit to check a password of a network over its limit.
    pub async fn login_lane(&self, network: &str) -> Result<OwnedSemaphorePermit, RpcError> {
        self.logins.enter(network).await
    }
}

impl FailedAttempts {
    /// Counts wrong passwords per account from `network`, for login handlers.
    pub fn password_attempts(&self, network: Arc<str>) -> PasswordAttempts {
        let attempts = self.clone();
        PasswordAttempts::new(move |email| {
            let (attempts, network) = (attempts.clone(), Arc::clone(&network));
            // A digest, so that neither Redis nor error messages contain e-mail addresses.
            let account = Sha256::digest(email.trim().to_lowercase());
            let subject = format!("login:{}:{network}", hex::encode(&account[..12]));
            async move { attempts.begin_password(subject).await }.boxed()
        })
    }

    async fn begin_password(self, subject: String) -> Result<PasswordAttempt, RpcError> {
        let lane = self.accounts.enter(&subject).await?;
        let is_limited = self.by_network.is_limited();
        let rate = Rate::new(if is_limited { MAX_WRONG_PASSWORDS } else { 0 }, WINDOW_PERIOD);
        let decision = self.limiter.peek(&subject, ACCOUNT_METHOD, rate).await;
        if let Some(wait) = decision.and_then(|decision| decision.retry_after) {
            let message = "too many wrong passwords for this account from this address; wait";
            return Err(RpcError::new(ErrorCode::RateLimited, message).retry_after(wait));
        }
        let limiter = self.limiter;
        let record_wrong = async move {
            limiter.decide(&subject, ACCOUNT_METHOD, rate).await;
            drop(lane);
        };
        Ok(PasswordAttempt::new(record_wrong.boxed()))
    }
}

/// Semaphores by the hash of a name. They limit the concurrency per name with bounded memory.
#[derive(Clone, Debug)]
struct Lanes(Arc<[Arc<Semaphore>]>);

impl Lanes {
    fn new(max_concurrent: usize) -> Self {
        Lanes((0..LANE_COUNT).map(|_| Arc::new(Semaphore::new(max_concurrent))).collect())
    }

    async fn enter(&self, name: &str) -> Result<OwnedSemaphorePermit, RpcError> {
        let hash = crc32fast::hash(name.as_bytes()) as usize;
        let permit = Arc::clone(&self.0[hash % self.0.len()]).acquire_owned();
        if let Ok(Ok(permit)) = timeout(LANE_TIMEOUT, permit).await {
            return Ok(permit);
        }
        let message = "too many concurrent attempts to authenticate; try again shortly";
        Err(RpcError::new(ErrorCode::Overloaded, message).retry_after(Duration::from_secs(1)))
    }
}

/// The network for which attempts are counted: an IPv4 address, or the /64 of an IPv6 address, which is the smallest
/// network that a provider assigns to a customer.
pub fn network(address: IpAddr) -> String {
    match address.to_canonical() {
        IpAddr::V4(address) => format!("address:{address}"),
        IpAddr::V6(address) => {
            let network = Ipv6Addr::from_bits(address.to_bits() & !u128::from(u64::MAX));
            format!("address:{network}/64")
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::rate_limit::MemoryLimiter;

    fn attempts(limit: u32) -> FailedAttempts {
        FailedAttempts::new(Arc::new(Limiter::Memory(MemoryLimiter::default())), limit)
    }

    fn network_of(text: &str) -> String {
        network(text.parse().unwrap())
    }

    #[test]
    fn attempts_are_counted_per_ipv4_address_and_per_ipv6_64() {
        assert_eq!(network_of("203.0.113.7"), "address:203.0.113.7");
        assert_eq!(network_of("::ffff:203.0.113.7"), "address:203.0.113.7");
        assert_eq!(network_of("2001:db8:1:2:3:4:5:6"), "address:2001:db8:1:2::/64");
        assert_ne!(network_of("2001:db8:1:2::1"), network_of("2001:db8:1:3::1"));
        assert_ne!(network_of("203.0.113.7"), network_of("203.0.113.8"));
    }

    proptest! {
        #[test]
        fn addresses_of_one_64_are_counted_together(prefix: u64, one: u64, other: u64) {
            let prefix = u128::from(prefix | 1 << 63) << 64;
            let [one, other] = [one, other].map(|host| network(Ipv6Addr::from_bits(prefix | u128::from(host)).into()));
            prop_assert_eq!(one, other);
        }
    }

    #[tokio::test]
    async fn only_the_network_that_failed_too_often_is_over_its_limit() {
        let attempts = attempts(3);
        for _ in 0..3 {
            assert!(attempts.over_limit("address:a").await.is_none());
            attempts.record_failure("address:a").await;
        }
        let over = attempts.over_limit("address:a").await.unwrap();
        assert_eq!(over.refusal("address:a").code(), ErrorCode::RateLimited);
        assert!(attempts.over_limit("address:b").await.is_none());
    }

    #[tokio::test]
    async fn parallel_attempts_for_one_account_do_not_exceed_its_limit() {
        let attempts = attempts(60).password_attempts("address:a".into());
        let parallel = (0..40).map(|_| {
            let attempts = attempts.clone();
            async move {
                let Ok(attempt) = attempts.begin("Kim@example.com ").await else { return 0 };
                tokio::task::yield_now().await;
                attempt.record_wrong_password().await;
                1
            }
        });
        let wrong: u32 = futures_util::future::join_all(parallel).await.into_iter().sum();
        assert_eq!(wrong, MAX_WRONG_PASSWORDS);
        let rejected = attempts.begin("kim@example.com").await.unwrap_err();
        assert_eq!(rejected.code(), ErrorCode::RateLimited);
        assert!(attempts.begin("lee@example.com").await.is_ok());
    }
}

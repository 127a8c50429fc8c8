//! Failed attempts to authenticate, counted per client network and, for passwords, per account.
//!
//! Invariant: a valid credential is never refused because of others' failed attempts. A network over its
//! limit is still asked what it presents; only what turns out wrong is refused with E4004. What the
//! attempts of such a network may cost is bounded by lanes: a few checks at a time, or one for
//! passwords. The exception is one account: its password may be tried a few times a minute from one
//! network, and no more, even if the next password would be right.

use std::net::{IpAddr, Ipv6Addr};
use std::sync::Arc;
use std::time::Duration;

use hapa_core::rpc_error::{ErrorCode, Fault};
use sha2::{Digest as _, Sha256};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;
use tonic::{Extensions, Status};

use crate::rate_limit::{Limiter, Rate};

const WINDOW: Duration = Duration::from_mins(1);
/// The methods under which the limiter counts.
const BY_NETWORK: &str = "Authentication";
const BY_ACCOUNT: &str = "PasswordLogin";
/// Wrong passwords for one account from one network in a minute.
pub const MAX_WRONG_PASSWORDS: u32 = 10;
/// Lanes are shared by networks, or accounts, with the same hash, so that their number has a bound.
const LANES: usize = 64;
/// Credentials of one over-limit network that are looked up at the same time.
const LOOKUPS_PER_LANE: usize = 16;
/// Longest wait for a lane.
const LANE_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a wrong password of an over-limit network occupies its lane: at most one guess a second.
pub const WRONG_PASSWORD_PAUSE: Duration = Duration::from_secs(1);

/// The failed attempts that this process, or all replicas with a shared Redis, know of.
#[derive(Clone, Debug)]
pub struct Attempts {
    limiter: Arc<Limiter>,
    by_network: Rate,
    lookups: Lanes,
    logins: Lanes,
    accounts: Lanes,
}

/// A client network over its limit; when it may fail again.
#[derive(Clone, Copy, Debug)]
pub struct OverLimit {
    retry_after: Duration,
}

impl OverLimit {
    /// The refusal of a wrong credential from such a network.
    pub fn refusal(self, network: &str) -> Fault {
        let words = "too many failed attempts to authenticate from this address; wait, or present a valid credential";
        Fault::new(ErrorCode::RateLimited, words).retry_after(self.retry_after).quota(network)
    }
}

impl Attempts {
    /// `limit` failed attempts per network and minute; 0: no limit.
    pub fn new(limiter: Arc<Limiter>, limit: u32) -> Self {
        Attempts {
            limiter,
            by_network: Rate::new(limit, WINDOW),
            lookups: Lanes::new(LOOKUPS_PER_LANE),
            logins: Lanes::new(1),
            accounts: Lanes::new(1),
        }
    }

    /// Whether a network has failed too often.
    pub async fn over_limit(&self, network: &str) -> Option<OverLimit> {
        let decision = self.limiter.peek(network, BY_NETWORK, self.by_network).await;
        decision?.retry_after.map(|retry_after| OverLimit { retry_after })
    }

    /// Counts one failed attempt.
    pub async fn record_failure(&self, network: &str) {
        self.limiter.decide(network, BY_NETWORK, self.by_network).await;
    }

    /// A turn to look up a credential of an over-limit network.
    pub async fn lookup_lane(&self, network: &str) -> Result<OwnedSemaphorePermit, Fault> {
        self.lookups.enter(network).await
    }

    /// A turn to log in from an over-limit network.
    pub async fn login_lane(&self, network: &str) -> Result<OwnedSemaphorePermit, Fault> {
        self.logins.enter(network).await
    }
}

/// For the handler of a login: counts wrong passwords of one account from the call's network. In the
/// extensions of each request that needs no credential because it is how to get one.
#[derive(Clone, Debug)]
pub struct PasswordAttempts {
    attempts: Attempts,
    network: Arc<str>,
}

/// One try of an account's password. Tries of the same account from the same network wait for each
/// other, so that parallel tries do not pass the limit together.
#[derive(Debug)]
pub struct PasswordAttempt {
    limiter: Arc<Limiter>,
    subject: String,
    rate: Rate,
    _lane: OwnedSemaphorePermit,
}

impl PasswordAttempts {
    pub fn new(attempts: Attempts, network: Arc<str>) -> Self {
        PasswordAttempts { attempts, network }
    }

    /// Those of the call that a request belongs to.
    pub fn of(extensions: &Extensions) -> Result<PasswordAttempts, Status> {
        let found = extensions.get::<PasswordAttempts>().cloned();
        found.ok_or_else(|| Fault::internal("a login ran outside of admission").into())
    }

    /// Begins a try, before the password is hashed. E4004 where the account's password was wrong
    /// [`MAX_WRONG_PASSWORDS`] times within a minute from this network.
    pub async fn begin(&self, email: &str) -> Result<PasswordAttempt, Fault> {
        // A digest: neither the limiter's Redis nor its messages hold addresses.
        let account = Sha256::digest(email.trim().to_lowercase());
        let subject = format!("login:{}:{}", hex::encode(&account[..12]), self.network);
        let lane = self.attempts.accounts.enter(&subject).await?;
        let limiter = Arc::clone(&self.attempts.limiter);
        let is_limited = self.attempts.by_network.is_limited();
        let rate = Rate::new(if is_limited { MAX_WRONG_PASSWORDS } else { 0 }, WINDOW);
        let decision = limiter.peek(&subject, BY_ACCOUNT, rate).await;
        if let Some(wait) = decision.and_then(|decision| decision.retry_after) {
            let words = "too many wrong passwords for this account from this address; wait";
            return Err(Fault::new(ErrorCode::RateLimited, words).retry_after(wait));
        }
        Ok(PasswordAttempt { limiter, subject, rate, _lane: lane })
    }
}

impl PasswordAttempt {
    /// Counts the password as wrong.
    pub async fn record_wrong_password(self) {
        self.limiter.decide(&self.subject, BY_ACCOUNT, self.rate).await;
    }
}

/// Semaphores by the hash of a name: a bound on what happens at once for one name, and on memory.
#[derive(Clone, Debug)]
struct Lanes(Arc<[Arc<Semaphore>]>);

impl Lanes {
    fn new(at_once: usize) -> Self {
        Lanes((0..LANES).map(|_| Arc::new(Semaphore::new(at_once))).collect())
    }

    async fn enter(&self, name: &str) -> Result<OwnedSemaphorePermit, Fault> {
        let hash = crc32fast::hash(name.as_bytes()) as usize;
        let turn = Arc::clone(&self.0[hash % self.0.len()]).acquire_owned();
        if let Ok(Ok(permit)) = timeout(LANE_TIMEOUT, turn).await {
            return Ok(permit);
        }
        let words = "too many attempts to authenticate at the moment; try again shortly";
        Err(Fault::new(ErrorCode::Overloaded, words).retry_after(Duration::from_secs(1)))
    }
}

/// What attempts are counted for: an IPv4 address, or the /64 of an IPv6 address, which is what one
/// customer of a provider has at least.
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
    use crate::rate_limit::Memory;

    fn attempts(limit: u32) -> Attempts {
        Attempts::new(Arc::new(Limiter::Memory(Memory::default())), limit)
    }

    fn of(text: &str) -> String {
        network(text.parse().unwrap())
    }

    #[test]
    fn an_ipv6_client_is_its_64_and_an_ipv4_client_its_address() {
        assert_eq!(of("203.0.113.7"), "address:203.0.113.7");
        assert_eq!(of("::ffff:203.0.113.7"), "address:203.0.113.7");
        assert_eq!(of("2001:db8:1:2:3:4:5:6"), "address:2001:db8:1:2::/64");
        assert_ne!(of("2001:db8:1:2::1"), of("2001:db8:1:3::1"));
        assert_ne!(of("203.0.113.7"), of("203.0.113.8"));
    }

    proptest! {
        #[test]
        fn addresses_of_one_64_count_together(prefix: u64, one: u64, other: u64) {
            let prefix = u128::from(prefix | 1 << 63) << 64;
            let [one, other] = [one, other].map(|host| network(Ipv6Addr::from_bits(prefix | u128::from(host)).into()));
            prop_assert_eq!(one, other);
        }
    }

    #[tokio::test]
    async fn a_network_is_over_its_limit_after_as_many_failures_and_no_other_is() {
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
    async fn parallel_tries_of_one_account_do_not_pass_its_limit_together() {
        let attempts = PasswordAttempts::new(attempts(60), "address:a".into());
        let tries = (0..40).map(|_| {
            let attempts = attempts.clone();
            async move {
                let Ok(attempt) = attempts.begin("Kim@example.com ").await else { return 0 };
                tokio::task::yield_now().await;
                attempt.record_wrong_password().await;
                1
            }
        });
        let wrong: u32 = futures_util::future::join_all(tries).await.into_iter().sum();
        assert_eq!(wrong, MAX_WRONG_PASSWORDS);
        let refused = attempts.begin("kim@example.com").await.unwrap_err();
        assert_eq!(refused.code(), ErrorCode::RateLimited);
        assert!(attempts.begin("lee@example.com").await.is_ok());
    }
}

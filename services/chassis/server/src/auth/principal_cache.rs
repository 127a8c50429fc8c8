//! Who presented a credential: asked of auth, and remembered for as long as auth would say the same.
//!
//! Auth tells every change as it happens (`WatchRevocations`). An answer is worth something while it
//! is young and auth has been heard since, or else for 5 s; an answer that left auth before a change
//! which concerns it is dead on arrival, however late it comes.

mod auth_link;
mod revocation_state;
mod stats;

use std::fmt;
use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicUsize, Ordering};
use std::time::Duration;

use futures_util::{StreamExt as _, stream};
use hapa_core::key_format::{self, KeyDigest};
use hapa_core::rpc_error::{ErrorCode, Fault, read};
use hapa_core::timestamps::{micros, now};
use hapa_proto::auth::v1::{AuthenticateRequest, Principal, Revocation, WatchRevocationsRequest};
use hapa_transport::peer::AuthClient;
use moka::future::Cache;
use sha2::{Digest as _, Sha256};
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status};

use self::auth_link::{Link, PATIENCE};
use self::revocation_state::Truth;
use self::stats::Counts;

/// The longest that an answer is worth anything while auth is not heard.
const TRUSTED: Duration = Duration::from_secs(5);
/// The longest while it is; auth sees a key's use when it is asked, so this bounds how old "last
/// used" can be (60 s, with the time that auth takes to write it).
const REMEMBERED: Duration = Duration::from_secs(45);
/// Most credentials remembered.
const MOST_REMEMBERED: u64 = 100_000;
/// Auth gives a sign of life four times a second.
const SILENCE: Duration = Duration::from_secs(3);
/// How exactly a credential ends at its time, and how soon after a change calls in progress are
/// looked at.
const TICK: Duration = Duration::from_millis(250);
/// Callers that are looked at together then.
const AT_ONCE: usize = 64;
/// Longest access token.
const LONGEST_TOKEN: usize = 8_192;

/// A caller, for as long as what auth said of it holds.
#[derive(Debug)]
pub struct Caller {
    /// Whom limits count: a key, or the user of a session.
    pub subject: Arc<str>,
    /// What auth said.
    pub principal: Arc<Principal>,
    /// Fires when calls in progress must end.
    pub ended: CancellationToken,
    presented: Presented,
    /// In microseconds since 1970; `NEVER`.
    expires: AtomicI64,
    asked: Instant,
    generation: i64,
    /// To be asked for again.
    stale: AtomicBool,
    /// Calls in progress.
    calls: AtomicUsize,
}

const NEVER: i64 = i64::MAX;

/// A call in progress. While it is, changes and the clock find its caller, even when the cache has
/// forgotten it.
#[derive(Debug)]
pub(crate) struct Ongoing(Arc<Caller>);

impl Ongoing {
    pub(crate) fn begin(caller: Arc<Caller>) -> Self {
        caller.calls.fetch_add(1, Ordering::AcqRel);
        Ongoing(caller)
    }
}

impl Deref for Ongoing {
    type Target = Caller;

    fn deref(&self) -> &Caller {
        &self.0
    }
}

impl Drop for Ongoing {
    fn drop(&mut self) {
        self.0.calls.fetch_sub(1, Ordering::AcqRel);
    }
}

/// What auth said about a credential.
#[derive(Clone, Debug)]
enum Known {
    Caller(Arc<Caller>),
    Refused(ErrorCode, Instant),
}

/// A presented credential.
#[derive(Clone)]
pub enum Presented {
    /// What a key digests to: its text goes no further.
    Key(KeyDigest),
    /// An access token, which auth has to read.
    Session(Arc<str>),
}

impl fmt::Debug for Presented {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Presented::Key(_) => "Key",
            Presented::Session(_) => "Session",
        })
    }
}

impl Presented {
    /// None where the text can be neither a key nor a token.
    pub fn read(text: &str, may_be_token: bool) -> Option<Presented> {
        if let Some(digest) = key_format::digest(text) {
            return Some(Presented::Key(digest));
        }
        let is_token = may_be_token
            && text.len() <= LONGEST_TOKEN
            && text.bytes().filter(|byte| *byte == b'.').count() == 2;
        is_token.then(|| Presented::Session(text.into()))
    }

    fn name(&self) -> KeyDigest {
        match self {
            Presented::Key(digest) => *digest,
            Presented::Session(token) => Sha256::digest(&**token).into(),
        }
    }

    fn request(&self) -> AuthenticateRequest {
        let mut request = AuthenticateRequest::default();
        match self {
            Presented::Key(digest) => request.credential_digest = digest.into(),
            Presented::Session(token) => request.session_token = token.to_string(),
        }
        request
    }
}

/// Everyone who called lately.
#[derive(Clone)]
pub struct Callers {
    auth: AuthClient,
    known: Cache<KeyDigest, Known>,
    truth: Arc<Truth>,
    link: Arc<Link>,
    counts: Arc<Counts>,
}

impl Callers {
    /// Asks this auth service.
    pub fn new(auth: AuthClient) -> Self {
        let known = Cache::builder().max_capacity(MOST_REMEMBERED).time_to_live(REMEMBERED).build();
        let (truth, link) = (Arc::new(Truth::new()), Arc::new(Link::new()));
        Callers { auth, known, truth, link, counts: Arc::new(Counts::new()) }
    }

    /// Who presented it, where that is known without asking.
    pub async fn known(&self, presented: &Presented) -> Option<Arc<Caller>> {
        match self.known.get(&presented.name()).await {
            Some(Known::Caller(caller)) if self.truth.holds(&caller) => {
                self.counts.hit();
                Some(caller)
            }
            _ => None,
        }
    }

    /// What auth has just said against it: the same credential, shown again and again, costs neither
    /// a lookup nor another failed attempt.
    pub(crate) async fn refused(&self, presented: &Presented) -> Option<Fault> {
        match self.known.get(&presented.name()).await {
            Some(Known::Refused(code, asked)) if asked.elapsed() < TRUSTED => Some(refusal(code)),
            _ => None,
        }
    }

    /// Who presented it. A wrong one is E4003, an ended one E4007, and where auth can't be asked
    /// E5003: never a pass, and never "wrong".
    ///
    /// Who asks for the same at once shares one answer, so no caller's own deadline bounds it: a call
    /// whose time is up is dropped, and the next in line asks.
    pub async fn find(&self, presented: &Presented) -> Result<Arc<Caller>, Fault> {
        let name = presented.name();
        // An answer can be overtaken by a change while it comes; the next one knows of it.
        for _ in 0..3 {
            if let Some(known) = self.known.get(&name).await {
                match known {
                    Known::Caller(caller) if self.truth.holds(&caller) => return Ok(caller),
                    Known::Refused(code, asked) if asked.elapsed() < TRUSTED => {
                        return Err(refusal(code));
                    }
                    Known::Caller(_) | Known::Refused(..) => self.known.invalidate(&name).await,
                }
            }
            let asked = self.known.try_get_with(name, self.ask(presented)).await;
            let known = asked.map_err(|status| {
                let words = "credentials can't be checked at the moment; try again";
                Fault::new(ErrorCode::DatabaseError, words).because(&*status)
            })?;
            match known {
                Known::Caller(caller) if self.truth.holds(&caller) => return Ok(caller),
                Known::Caller(caller) if caller.has_expired() => {
                    return Err(refusal(ErrorCode::KeyEnded));
                }
                Known::Caller(_) => {}
                Known::Refused(code, _) => return Err(refusal(code)),
            }
        }
        let words = "this credential is changing at the moment; try again";
        Err(Fault::new(ErrorCode::DatabaseError, words))
    }

    async fn ask(&self, presented: &Presented) -> Result<Known, Status> {
        self.counts.miss();
        let asked = Instant::now();
        // Around the whole call: a lazy channel also queues.
        let authenticate = || {
            let (mut auth, request) = (self.auth.clone(), presented.request());
            async move { auth.authenticate(request).await }
        };
        match self.link.ask(authenticate).await {
            Ok(reply) => {
                let reply = reply.into_inner();
                let principal = reply.principal;
                let principal = principal.ok_or_else(|| Status::internal("auth named nobody"))?;
                let caller = Caller::new(presented.clone(), principal, reply.generation, asked);
                Ok(Known::Caller(self.truth.admit(caller)))
            }
            Err(status) if status.code() == Code::Unauthenticated => match read(&status) {
                Some((code, _)) if code == "E4007" => {
                    Ok(Known::Refused(ErrorCode::KeyEnded, asked))
                }
                // about our own token, and no word about the key
                _ => Err(status),
            },
            Err(status) if status.code() == Code::NotFound => {
                Ok(Known::Refused(ErrorCode::BadKey, asked))
            }
            Err(status) => Err(status),
        }
    }

    /// Hears every change for as long as the server runs.
    pub(crate) async fn watch(self, auth: AuthClient) {
        let mut pause = Duration::ZERO;
        loop {
            let heard = self.hear(auth.clone()).await;
            metrics::gauge!("hapa_revocation_link_up").set(0.0);
            // Spread, so that the replicas don't come back as one.
            pause = if heard { Duration::ZERO } else { (pause * 2).min(Duration::from_secs(1)) };
            pause += Duration::from_millis(rand::random_range(20..100));
            sleep(pause).await;
        }
    }

    /// Hears until the link is lost; whether anything was heard.
    async fn hear(&self, mut auth: AuthClient) -> bool {
        let request = WatchRevocationsRequest { after_generation: self.truth.generation() };
        let Ok(Ok(reply)) = timeout(PATIENCE, auth.watch_revocations(request)).await else {
            return false;
        };
        let (mut messages, mut heard) = (reply.into_inner(), false);
        while let Ok(Ok(Some(message))) = timeout(SILENCE, messages.message()).await {
            self.truth.apply(message);
            self.link.heard();
            metrics::gauge!("hapa_revocation_link_up").set(1.0);
            heard = true;
        }
        heard
    }

    /// Counts how long auth gives no sign of life, for as long as the server runs.
    pub(crate) async fn count_silence(self) {
        self.link.count().await;
    }

    /// Ends calls whose credential's time is up, for as long as the server runs.
    pub(crate) async fn expire(self) {
        loop {
            sleep(TICK).await;
            for caller in self.truth.alive() {
                if caller.has_expired() {
                    caller.ended.cancel();
                }
            }
        }
    }

    /// Asks again about calls in progress that a change left alone, for as long as the server runs:
    /// their credential may end sooner now, or what ended it may be among changes that were missed.
    pub(crate) async fn follow(self) {
        loop {
            sleep(TICK).await;
            let doubtful = stream::iter(self.truth.doubtful());
            doubtful.for_each_concurrent(AT_ONCE, |caller| self.look_after(caller)).await;
        }
    }

    async fn look_after(&self, caller: Arc<Caller>) {
        match self.find(&caller.presented).await {
            Ok(now) if !narrows(&caller.principal, &now.principal) => {
                caller.expires.store(now.expires.load(Ordering::Acquire), Ordering::Release);
            }
            Err(fault) if fault.code() == ErrorCode::DatabaseError => self.truth.doubt(&caller),
            _ => caller.ended.cancel(),
        }
    }
}

/// Whether something was taken away.
fn narrows(before: &Principal, now: &Principal) -> bool {
    let lacks = |before: &[String], now: &[String]| before.iter().any(|one| !now.contains(one));
    let (models, now_models) = (&before.allowed_models, &now.allowed_models);
    // No list of models is all of them.
    lacks(&before.scopes, &now.scopes)
        || (!now_models.is_empty() && (models.is_empty() || lacks(models, now_models)))
}

impl Caller {
    fn new(presented: Presented, principal: Principal, generation: i64, asked: Instant) -> Self {
        let subject = if principal.key_id.is_empty() {
            format!("user:{}", principal.owner)
        } else {
            format!("key:{}", principal.key_id)
        };
        Caller {
            subject: subject.into(),
            expires: AtomicI64::new(principal.expire_time.as_ref().map_or(NEVER, micros)),
            principal: Arc::new(principal),
            ended: CancellationToken::new(),
            presented,
            asked,
            generation,
            stale: AtomicBool::new(false),
            calls: AtomicUsize::new(0),
        }
    }

    fn has_expired(&self) -> bool {
        self.expires.load(Ordering::Acquire) <= now()
    }

    fn concerns(&self, change: &Revocation) -> bool {
        let principal = &self.principal;
        let same = |named: &str, own: &str| !named.is_empty() && named == own;
        self.generation < change.generation
            && (same(&change.key_id, &principal.key_id)
                || same(&change.session_id, &principal.session_id)
                || same(&change.owner, &principal.owner))
    }

    fn suffer(&self, change: &Revocation) {
        self.stale.store(true, Ordering::Release);
        if change.ends_calls {
            self.ended.cancel();
        }
    }
}

fn refusal(code: ErrorCode) -> Fault {
    match code {
        ErrorCode::BadKey => unknown(),
        _ => ended(),
    }
}

/// No such credential.
pub(crate) fn unknown() -> Fault {
    Fault::new(ErrorCode::BadKey, "this API key or token is not known; check it for typos")
}

/// The credential is no more.
pub(crate) fn ended() -> Fault {
    let words = "this API key or session has expired or was revoked; ask for a new one";
    Fault::new(ErrorCode::KeyEnded, words)
}

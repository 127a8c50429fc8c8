//! Who presented a credential: asked of auth, and remembered for as long as auth would say the same.
//!
//! Auth tells every change as it happens (`WatchRevocations`). An answer is worth something while it
//! is young and auth has been heard since, or else for 5 s; an answer that left auth before a change
//! which concerns it is dead on arrival, however late it comes.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, SystemTime};

use hapa_proto::auth::v1::{
    AuthenticateRequest, Principal, Revocation, WatchRevocationsRequest, WatchRevocationsResponse,
};
use moka::future::Cache;
use sha2::{Digest as _, Sha256};
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status};

use crate::deadline::left;
use crate::key_text::{self, KeyDigest};
use crate::peer::AuthClient;
use crate::status::{ErrorCode, Fault, read};

/// The longest that an answer is worth anything while auth is not heard.
const TRUSTED: Duration = Duration::from_secs(5);
/// The longest while it is; auth sees a key's use when it is asked, so this bounds how old "last
/// used" can be (60 s, with the time that auth takes to write it).
const REMEMBERED: Duration = Duration::from_secs(45);
/// Most credentials remembered.
const MOST_REMEMBERED: u64 = 100_000;
/// Auth answers in a millisecond; past this it is as good as down.
const PATIENCE: Duration = Duration::from_secs(2);
/// Auth gives a sign of life every second.
const SILENCE: Duration = Duration::from_secs(3);
/// For as long changes are kept in mind, for answers that are still on their way.
const LATE: Duration = Duration::from_secs(30);
const MOST_RECENT: usize = 10_000;
/// How exactly a credential ends at its time.
const TICK: Duration = Duration::from_millis(250);
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
    expires: Option<SystemTime>,
    asked: Instant,
    generation: i64,
    /// To be asked for again.
    stale: AtomicBool,
}

/// What auth said about a credential.
#[derive(Clone, Debug)]
enum Known {
    Caller(Arc<Caller>),
    Refused(ErrorCode, Instant),
}

/// A presented credential.
pub enum Presented {
    /// What a key digests to: its text goes no further.
    Key(KeyDigest),
    /// An access token, which auth has to read.
    Session(String),
}

impl Presented {
    /// None where the text can be neither a key nor a token.
    pub fn read(text: &str, may_be_token: bool) -> Option<Presented> {
        if let Some(digest) = key_text::digest(text) {
            return Some(Presented::Key(digest));
        }
        let is_token = may_be_token
            && text.len() <= LONGEST_TOKEN
            && text.bytes().filter(|byte| *byte == b'.').count() == 2;
        is_token.then(|| Presented::Session(text.to_owned()))
    }

    fn name(&self) -> KeyDigest {
        match self {
            Presented::Key(digest) => *digest,
            Presented::Session(token) => Sha256::digest(token).into(),
        }
    }

    fn request(&self) -> AuthenticateRequest {
        let mut request = AuthenticateRequest::default();
        match self {
            Presented::Key(digest) => request.credential_digest = digest.into(),
            Presented::Session(token) => request.session_token.clone_from(token),
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
}

impl Callers {
    /// Asks this auth service.
    pub fn new(auth: AuthClient) -> Self {
        let known = Cache::builder().max_capacity(MOST_REMEMBERED).time_to_live(REMEMBERED).build();
        Callers { auth, known, truth: Arc::new(Truth::new()) }
    }

    /// Who presented it, where that is known without asking.
    pub async fn known(&self, presented: &Presented) -> Option<Arc<Caller>> {
        match self.known.get(&presented.name()).await {
            Some(Known::Caller(caller)) if self.truth.holds(&caller) => Some(caller),
            _ => None,
        }
    }

    /// Who presented it. A wrong one is E4003, an ended one E4007, and where auth can't be asked
    /// E5003: never a pass, and never "wrong".
    pub async fn find(
        &self,
        presented: &Presented,
        deadline: Option<Instant>,
    ) -> Result<Arc<Caller>, Fault> {
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
            let asked = self.known.try_get_with(name, self.ask(presented, deadline)).await;
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

    async fn ask(&self, presented: &Presented, deadline: Option<Instant>) -> Result<Known, Status> {
        let (mut auth, asked) = (self.auth.clone(), Instant::now());
        // Around the whole call: a lazy channel also queues.
        let reply = timeout(left(deadline, PATIENCE), auth.authenticate(presented.request())).await;
        match reply.map_err(|_| Status::deadline_exceeded("auth did not answer"))? {
            Ok(reply) => {
                let reply = reply.into_inner();
                let principal = reply.principal;
                let principal = principal.ok_or_else(|| Status::internal("auth named nobody"))?;
                Ok(Known::Caller(self.truth.admit(principal, reply.generation, asked)))
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
            metrics::gauge!("hapa_revocation_link_up").set(1.0);
            heard = true;
        }
        heard
    }

    /// Ends calls whose credential's time is up, for as long as the server runs.
    pub(crate) async fn expire(self) {
        loop {
            sleep(TICK).await;
            let now = SystemTime::now();
            for caller in self.truth.state().alive() {
                if caller.expires.is_some_and(|end| end <= now) {
                    caller.ended.cancel();
                }
            }
        }
    }
}

impl Caller {
    fn has_expired(&self) -> bool {
        self.expires.is_some_and(|end| end <= SystemTime::now())
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

/// What is known of changes, and every caller that one may concern.
struct Truth {
    begin: Instant,
    /// When auth was last heard, in microseconds from the begin; 0: not yet.
    heard: AtomicU64,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    generation: i64,
    /// Answers of an earlier generation are worthless.
    floor: i64,
    recent: VecDeque<(Instant, Revocation)>,
    callers: Vec<Weak<Caller>>,
    crowded: usize,
}

impl State {
    fn alive(&self) -> Vec<Arc<Caller>> {
        self.callers.iter().filter_map(Weak::upgrade).collect()
    }
}

impl Truth {
    fn new() -> Self {
        Truth { begin: Instant::now(), heard: AtomicU64::new(0), state: Mutex::default() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn generation(&self) -> i64 {
        self.state().generation
    }

    /// Whether auth would say the same now.
    fn holds(&self, caller: &Caller) -> bool {
        let now = Instant::now();
        let heard = match self.heard.load(Ordering::Acquire) {
            0 => caller.asked,
            micros => (self.begin + Duration::from_micros(micros)).max(caller.asked),
        };
        !caller.stale.load(Ordering::Acquire)
            && !caller.has_expired()
            && now.saturating_duration_since(heard) < TRUSTED
            && now.saturating_duration_since(caller.asked) < REMEMBERED
    }

    /// Notes an answer, together with all that has changed since it left auth.
    fn admit(&self, principal: Principal, generation: i64, asked: Instant) -> Arc<Caller> {
        let subject = if principal.key_id.is_empty() {
            format!("user:{}", principal.owner)
        } else {
            format!("key:{}", principal.key_id)
        };
        let mut state = self.state();
        let caller = Arc::new(Caller {
            subject: subject.into(),
            expires: principal.expire_time.and_then(|time| time.try_into().ok()),
            principal: Arc::new(principal),
            ended: CancellationToken::new(),
            asked,
            generation,
            stale: AtomicBool::new(generation < state.floor),
        });
        for (_, change) in state.recent.iter().filter(|(_, change)| caller.concerns(change)) {
            caller.suffer(change);
        }
        state.callers.push(Arc::downgrade(&caller));
        if state.callers.len() > state.crowded {
            state.callers.retain(|caller| caller.strong_count() > 0);
            state.crowded = (state.callers.len() * 2).max(1_024);
        }
        caller
    }

    fn apply(&self, message: WatchRevocationsResponse) {
        let now = Instant::now();
        let mut state = self.state();
        let callers = if message.reset || !message.revocations.is_empty() {
            state.alive()
        } else {
            Vec::new()
        };
        if message.reset {
            state.floor = message.generation;
            for caller in callers.iter().filter(|caller| caller.generation < message.generation) {
                caller.stale.store(true, Ordering::Release);
            }
        }
        for change in message.revocations {
            for caller in callers.iter().filter(|caller| caller.concerns(&change)) {
                caller.suffer(&change);
            }
            state.recent.push_back((now, change));
        }
        state.generation = message.generation;
        while let Some((at, change)) = state.recent.front() {
            let late = now.saturating_duration_since(*at) > LATE;
            if !late && state.recent.len() <= MOST_RECENT {
                break;
            }
            // What is forgotten early must not be forgotten by a late answer.
            if !late {
                state.floor = state.floor.max(change.generation);
            }
            state.recent.pop_front();
        }
        let heard = u64::try_from((now - self.begin).as_micros()).unwrap_or(u64::MAX);
        self.heard.store(heard.max(1), Ordering::Release);
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

#[cfg(test)]
mod tests {
    use super::*;

    fn principal(key_id: &str) -> Principal {
        let owner = "tenant".to_owned();
        Principal { key_id: key_id.to_owned(), owner, ..Principal::default() }
    }

    fn told(generation: i64, revocations: Vec<Revocation>) -> WatchRevocationsResponse {
        WatchRevocationsResponse { generation, revocations, reset: false }
    }

    fn end_of(key_id: &str, generation: i64) -> Revocation {
        let key_id = key_id.to_owned();
        Revocation { generation, key_id, ends_calls: true, ..Revocation::default() }
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_is_worth_5_s_alone_and_longer_while_auth_is_heard() {
        let truth = Truth::new();
        let caller = truth.admit(principal("a"), 1, Instant::now());
        tokio::time::advance(Duration::from_millis(4_900)).await;
        assert!(truth.holds(&caller));
        tokio::time::advance(Duration::from_millis(200)).await;
        assert!(!truth.holds(&caller));
        truth.apply(told(1, Vec::new()));
        assert!(truth.holds(&caller));
        for _ in 0..40 {
            tokio::time::advance(Duration::from_secs(1)).await;
            truth.apply(told(1, Vec::new()));
        }
        assert!(!truth.holds(&caller), "it is remembered for 45 s at most");
    }

    #[tokio::test]
    async fn a_revocation_ends_its_key_and_no_other() {
        let truth = Truth::new();
        let (a, b) = (
            truth.admit(principal("a"), 1, Instant::now()),
            truth.admit(principal("b"), 1, Instant::now()),
        );
        truth.apply(told(2, vec![end_of("a", 2)]));
        assert!(!truth.holds(&a) && a.ended.is_cancelled());
        assert!(truth.holds(&b) && !b.ended.is_cancelled());
        let owners = Revocation { generation: 3, owner: "tenant".to_owned(), ..end_of("", 3) };
        truth.apply(told(3, vec![owners]));
        assert!(!truth.holds(&b) && b.ended.is_cancelled());
    }

    #[tokio::test]
    async fn a_late_answer_cannot_bring_a_dead_key_back() {
        let truth = Truth::new();
        truth.apply(told(7, vec![end_of("a", 7)]));
        let late = truth.admit(principal("a"), 6, Instant::now());
        assert!(!truth.holds(&late) && late.ended.is_cancelled());
        let fresh = truth.admit(principal("a"), 7, Instant::now());
        assert!(truth.holds(&fresh) && !fresh.ended.is_cancelled());
    }

    #[tokio::test]
    async fn what_is_forgotten_in_a_flood_still_counts() {
        let truth = Truth::new();
        let many = i64::try_from(MOST_RECENT).unwrap() + 5;
        let flood = (1..=many).map(|number| end_of(&format!("k{number}"), number)).collect();
        truth.apply(told(many, flood));
        let late = truth.admit(principal("k1"), 0, Instant::now());
        assert!(!truth.holds(&late));
        assert!(truth.holds(&truth.admit(principal("k1"), many, Instant::now())));
    }

    #[tokio::test]
    async fn after_a_reset_every_earlier_answer_is_asked_for_again() {
        let truth = Truth::new();
        let caller = truth.admit(principal("a"), 3, Instant::now());
        truth.apply(WatchRevocationsResponse { reset: true, ..told(9, Vec::new()) });
        assert!(!truth.holds(&caller) && !caller.ended.is_cancelled());
        assert!(!truth.holds(&truth.admit(principal("a"), 8, Instant::now())));
        assert!(truth.holds(&truth.admit(principal("a"), 9, Instant::now())));
    }
}

//! Tokens that callers may use: reserved before the engine is asked, and settled when a generation
//! ends, however it ends. The settlement is made by dropping the lease, so no end can forget it.
//!
//! A process that is killed drops nothing. So auth knows for each reservation what it may have used by
//! now, and books that when the lease ends: reports run ahead of use by up to `AHEAD` tokens, so that
//! auth knows of tokens before the caller has them.

use std::time::Duration;

use hapa_core::call::Call;
use hapa_core::rpc_error::read;
use hapa_core::service::ServiceSpec;
use hapa_proto::auth::v1::{ReserveTokensRequest, SettleTokensRequest, Settlement};
use hapa_transport::peer::AuthClient;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;
use tonic::Status;
use uuid::Uuid;

use crate::error::Error;
use crate::watch::prompt_tokens;

/// Auth answers in milliseconds; past this it is as good as down.
const PATIENCE: Duration = Duration::from_secs(5);
/// Settlements that wait; when auth is away for longer, leases expire by themselves.
const WAITING: usize = 10_000;
const TOGETHER: usize = 500;
/// Between two batches.
const GATHERING: Duration = Duration::from_millis(50);
/// How long one batch is tried.
const TRYING: Duration = Duration::from_mins(1);
/// Beyond the longest generation a lease lives on for as long again, within these bounds: so that
/// what a lost replica held comes back soon where generations are short.
const SHORTEST_MARGIN: Duration = Duration::from_secs(2);
const LONGEST_MARGIN: Duration = Duration::from_mins(1);
/// Largest reservation that auth accepts.
const MAX_RESERVATION: i64 = 10_000_000;
/// Tokens that a report is ahead of use; the next is due when half of them are used. At the pace of
/// batches, about ten a second, this covers generations of up to some 600 tokens a second.
const AHEAD: i64 = 128;
const LEDGER: &str = "hapa_ledger_tokens_total";
const GAP: &str = "hapa_ledger_gap_tokens";

#[derive(Clone)]
pub(crate) struct Budgets {
    auth: AuthClient,
    entries: mpsc::Sender<Entry>,
    lease_seconds: u32,
}

/// What a generation can use.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Estimate {
    /// About as many tokens as the prompt has, as `Lease::count` gets them before the engine says.
    pub(crate) prompt: i64,
    /// The most that the prompt can have.
    pub(crate) most_prompt: i64,
    /// The most that all answers can have.
    pub(crate) most_answer: i64,
}

/// What auth is told.
enum Entry {
    /// Of a generation that has ended.
    Ended(Settlement),
    /// What one that runs may have used by its next report.
    Running(Settlement),
}

/// Tokens of a generation. Dropping it settles what was counted.
pub(crate) struct Lease {
    settlement: Option<Settlement>,
    /// The most that is booked.
    reserved: i64,
    /// What the last count claimed above that.
    excess: i64,
    /// Where auth holds a reservation.
    reports: Option<Reports>,
    entries: mpsc::Sender<Entry>,
}

/// What auth knows of a generation that runs.
struct Reports {
    /// It may have used so many tokens.
    told: i64,
    /// Reports are so far ahead of what was counted.
    ahead: i64,
}

impl Budgets {
    /// Settles in the background until the server ends, and what is left then.
    pub(crate) fn new(auth: AuthClient, spec: &mut ServiceSpec, longest: Duration) -> Self {
        let (entries, waiting) = mpsc::channel(WAITING);
        let settling = auth.clone();
        spec.spawn_until(|end| settle(settling, waiting, end));
        let lease = longest + longest.clamp(SHORTEST_MARGIN, LONGEST_MARGIN);
        let lease_seconds = u32::try_from(lease.as_secs()).unwrap_or(86_400);
        Budgets { auth, entries, lease_seconds: lease_seconds.min(86_400) }
    }

    /// Reserves tokens where the caller has a budget; none where nobody pays.
    pub(crate) async fn reserve(
        &self,
        call: &Call,
        estimate: Estimate,
    ) -> Result<Option<Lease>, Error> {
        let Some(caller) = &call.principal else { return Ok(None) };
        let settlement = Settlement {
            lease_id: Uuid::now_v7().to_string(),
            key_id: caller.key_id.clone(),
            user_id: caller.user_id.clone(),
            tokens: 0,
        };
        let mut lease = Lease::new(settlement.clone(), estimate, self.entries.clone());
        if caller.has_token_budget {
            let reports = Reports::new(estimate, lease.reserved);
            let request = ReserveTokensRequest {
                lease_id: settlement.lease_id,
                key_id: settlement.key_id,
                user_id: settlement.user_id,
                tokens: lease.reserved,
                lease_seconds: self.lease_seconds,
                used_tokens: reports.told,
            };
            // The lease exists before the answer: a caller who leaves now gives back what may be held.
            lease.reports = Some(reports);
            let mut auth = self.auth.clone();
            let left = call
                .deadline
                .map_or(PATIENCE, |at| PATIENCE.min(at.saturating_duration_since(Instant::now())));
            let reply = timeout(left, auth.reserve_tokens(request)).await;
            let reply = reply.unwrap_or_else(|_| Err(Status::deadline_exceeded("no answer")));
            return match reply {
                Ok(_) => Ok(Some(lease)),
                Err(status) => {
                    // Nothing is held after an answer; without one nobody knows.
                    if read(&status).is_some() {
                        lease.forget();
                    }
                    Err(told(status))
                }
            };
        }
        Ok(Some(lease))
    }
}

impl Estimate {
    /// Of a request with this body, whose answers can have so many tokens.
    pub(crate) fn of(body: &[u8], most_answer: i64) -> Estimate {
        Estimate {
            prompt: prompt_tokens(body).into(),
            most_prompt: most_prompt_tokens(body),
            most_answer,
        }
    }

    fn most(self) -> i64 {
        self.most_prompt.saturating_add(self.most_answer).clamp(1, MAX_RESERVATION)
    }
}

/// The most tokens that a prompt of this body has, template and all. Letters and blanks make tokens of
/// three bytes and more on average; a digit or a sign can be a token of its own, as can each byte of a
/// rare character.
fn most_prompt_tokens(body: &[u8]) -> i64 {
    let is_word = |byte: &&u8| byte.is_ascii_alphabetic() || **byte == b' ';
    let words = body.iter().filter(is_word).count();
    i64::try_from(words / 3 + (body.len() - words)).unwrap_or(i64::MAX)
}

impl Reports {
    fn new(estimate: Estimate, reserved: i64) -> Reports {
        let unsure = (estimate.most_prompt - estimate.prompt).max(0);
        let ahead = unsure.saturating_add(AHEAD);
        Reports { told: estimate.prompt.saturating_add(ahead).min(reserved), ahead }
    }

    /// What to tell next, if it is due now.
    fn due(&self, used: i64, reserved: i64) -> Option<i64> {
        let next = used.saturating_add(self.ahead).min(reserved);
        let is_due = next - self.told >= AHEAD / 2 || next == reserved;
        (is_due && next > self.told).then_some(next)
    }
}

/// What auth says is for the caller, where it says it in published words.
fn told(status: Status) -> Error {
    match read(&status) {
        Some((code, _)) if matches!(code.as_str(), "E4007" | "E4008") => {
            let details = status.details().to_vec().into();
            let mut own = Status::with_details(status.code(), status.message(), details);
            if let Some(wait) = status.metadata().get("retry-after") {
                own.metadata_mut().insert("retry-after", wait.clone());
            }
            Error::Told(Box::new(own))
        }
        _ => Error::Budget(Box::new(status)),
    }
}

impl Lease {
    fn new(settlement: Settlement, estimate: Estimate, entries: mpsc::Sender<Entry>) -> Lease {
        let (settlement, reserved) = (Some(settlement), estimate.most());
        Lease { settlement, reserved, excess: 0, reports: None, entries }
    }

    /// So much was used, as far as is known until now. What an engine claims above the reservation
    /// can't have been used: it is counted apart and never booked.
    pub(crate) fn count(&mut self, tokens: i64) {
        let Some(settlement) = &mut self.settlement else { return };
        settlement.tokens = tokens.clamp(0, self.reserved);
        self.excess = (tokens - settlement.tokens).max(0);
        let Some(reports) = &mut self.reports else { return };
        let Some(next) = reports.due(settlement.tokens, self.reserved) else { return };
        // Reports leave room for settlements, which come only once.
        if self.entries.capacity() < WAITING / 2 {
            return;
        }
        let report = Settlement { tokens: next, ..settlement.clone() };
        if self.entries.try_send(Entry::Running(report)).is_ok() {
            reports.told = next;
        }
    }

    fn forget(mut self) {
        self.settlement = None;
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let Some(settlement) = self.settlement.take() else { return };
        let tokens = settlement.tokens;
        metrics::gauge!(GAP).increment(measure(tokens.saturating_add(self.excess)));
        if self.excess > 0 {
            tracing::warn!(excess = self.excess, "an engine claims more tokens than it could use");
            metrics::counter!(LEDGER, "outcome" => "excess").increment(self.excess.unsigned_abs());
        }
        if self.entries.try_send(Entry::Ended(settlement)).is_err() {
            metrics::counter!("hapa_token_settlements_dropped_total").increment(1);
            lost(tokens);
        }
    }
}

/// These were used and nobody will book them: they stay in the gap.
fn lost(tokens: i64) {
    metrics::counter!(LEDGER, "outcome" => "lost").increment(tokens.unsigned_abs());
}

fn booked(tokens: i64) {
    metrics::counter!(LEDGER, "outcome" => "booked").increment(tokens.unsigned_abs());
    metrics::gauge!(GAP).decrement(measure(tokens));
}

#[expect(clippy::cast_precision_loss, reason = "exact up to 2^53")]
fn measure(tokens: i64) -> f64 {
    tokens as f64
}

async fn settle(auth: AuthClient, mut waiting: mpsc::Receiver<Entry>, end: CancellationToken) {
    let mut entries = Vec::with_capacity(TOGETHER);
    loop {
        tokio::select! {
            biased;
            received = waiting.recv_many(&mut entries, TOGETHER) => if received == 0 { return },
            () = end.cancelled() => return,
        }
        let (batch, running) = sorted(&mut entries);
        let from = Instant::now();
        let mut pause = Duration::from_millis(50);
        loop {
            let request =
                SettleTokensRequest { settlements: batch.clone(), running: running.clone() };
            let reply = timeout(PATIENCE, auth.clone().settle_tokens(request)).await;
            let error = match reply {
                Ok(Ok(_)) => {
                    booked(batch.iter().map(|one| one.tokens).sum());
                    break;
                }
                Ok(Err(status)) => status.message().to_owned(),
                Err(_) => "no answer".to_owned(),
            };
            if end.is_cancelled() || from.elapsed() > TRYING {
                let count = batch.len() as u64;
                tracing::warn!(count, error, "used tokens could not be booked");
                metrics::counter!("hapa_token_settlements_dropped_total").increment(count);
                lost(batch.iter().map(|one| one.tokens).sum());
                break;
            }
            sleep(pause).await;
            pause = (pause * 2).min(Duration::from_secs(2));
        }
        // Under load settlements come together: a commit for each would cost more than its answer.
        let _ = timeout(GATHERING, end.cancelled()).await;
    }
}

/// Settlements, and reports of generations that still run.
fn sorted(entries: &mut Vec<Entry>) -> (Vec<Settlement>, Vec<Settlement>) {
    let (mut ended, mut running) = (Vec::new(), Vec::new());
    for entry in entries.drain(..) {
        match entry {
            Entry::Ended(settlement) => ended.push(settlement),
            Entry::Running(report) => running.push(report),
        }
    }
    (ended, running)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ESTIMATE: Estimate = Estimate { prompt: 100, most_prompt: 150, most_answer: 1_000 };

    fn lease(estimate: Estimate) -> (Lease, mpsc::Receiver<Entry>) {
        let (entries, told) = mpsc::channel(WAITING);
        let mut lease = Lease::new(Settlement::default(), estimate, entries);
        lease.reports = Some(Reports::new(estimate, lease.reserved));
        (lease, told)
    }

    /// What was reported meanwhile, and what was settled.
    fn told(entries: &mut mpsc::Receiver<Entry>) -> (Vec<i64>, Vec<i64>) {
        let mut all = Vec::new();
        while let Ok(entry) = entries.try_recv() {
            all.push(entry);
        }
        let (ended, running) = sorted(&mut all);
        let tokens = |list: Vec<Settlement>| list.iter().map(|one| one.tokens).collect();
        (tokens(running), tokens(ended))
    }

    #[test]
    fn reports_are_few_and_ahead_of_what_was_used_and_the_end_settles_what_was() {
        let (mut lease, mut entries) = lease(ESTIMATE);
        assert_eq!(lease.reports.as_ref().unwrap().told, 150 + AHEAD);
        for answered in 0..=200 {
            lease.count(100 + answered);
        }
        let (reports, settled) = told(&mut entries);
        assert_eq!((reports, settled), (vec![342, 406, 470], Vec::new()));
        drop(lease);
        assert_eq!(told(&mut entries), (Vec::new(), vec![300]));
    }

    #[test]
    fn what_an_engine_claims_above_the_reservation_is_neither_reported_nor_settled() {
        let (mut lease, mut entries) = lease(Estimate { most_answer: 10, ..ESTIMATE });
        assert_eq!(lease.reports.as_ref().unwrap().told, 160, "no more than is reserved");
        lease.count(4_000_000_000);
        assert_eq!((lease.reserved, lease.excess), (160, 4_000_000_000 - 160));
        lease.count(i64::MAX);
        drop(lease);
        assert_eq!(told(&mut entries), (Vec::new(), vec![160]));

        let (mut lease, mut entries) = self::lease(ESTIMATE);
        lease.count(i64::MIN);
        drop(lease);
        assert_eq!(told(&mut entries), (Vec::new(), vec![0]));
    }

    #[test]
    fn reports_leave_room_for_settlements() {
        let (mut lease, mut entries) = lease(ESTIMATE);
        while lease.entries.capacity() >= WAITING / 2 {
            lease.entries.try_send(Entry::Running(Settlement::default())).unwrap();
        }
        lease.count(500);
        let left = lease.entries.capacity();
        assert_eq!(left, WAITING / 2 - 1, "it was reported all the same");
        assert!(told(&mut entries).1.is_empty());
        // It is made up for as soon as there is room.
        lease.count(501);
        assert_eq!(told(&mut entries).0, [679]);
    }

    #[test]
    fn a_prompt_is_not_reserved_for_less_than_models_make_of_it() {
        assert_eq!(most_prompt_tokens(b"plain words of a prompt "), 8);
        assert_eq!(most_prompt_tokens("0123456789".repeat(100).as_bytes()), 1_000);
        assert_eq!(most_prompt_tokens("{}();".repeat(10).as_bytes()), 50);
        assert_eq!(most_prompt_tokens("\u{1f980}".as_bytes()), 4);
        let code = b"def add(left, right):\n    return left + right\n";
        assert!((15..=30).contains(&most_prompt_tokens(code)), "{}", most_prompt_tokens(code));
    }

    proptest! {
        #[test]
        fn auth_always_knows_of_at_least_what_was_used(
            prompt in 0..5_000_i64,
            unsure in 0..5_000_i64,
            most_answer in 0..5_000_i64,
            steps in prop::collection::vec(0..AHEAD / 2, 0..200),
        ) {
            let estimate = Estimate { prompt, most_prompt: prompt + unsure, most_answer };
            let (mut lease, mut entries) = lease(estimate);
            let (mut used, mut known) = (prompt, lease.reports.as_ref().unwrap().told);
            for step in steps {
                // Auth has every report before the next tokens come.
                known = known.max(told(&mut entries).0.into_iter().max().unwrap_or_default());
                used = (used + step).min(lease.reserved);
                prop_assert!(used <= known, "{used} were used and {known} are known");
                prop_assert!(known <= lease.reserved);
                lease.count(used);
            }
            lease.count(used);
            drop(lease);
            prop_assert_eq!(told(&mut entries).1, vec![used]);
        }
    }
}

//! Token budgets: tokens are reserved at the auth service before a generation starts, and settled when it
//! ends. Dropping the lease settles it, so every way to end a generation does.
//!
//! A killed process drops nothing. Therefore auth keeps, for each reservation, the tokens that may have
//! been used so far, and books them when the lease expires. Reports run ahead of use by up to
//! `REPORT_LEAD_TOKENS`, so auth counts tokens before the client receives them.

use std::time::Duration;

use hapa_core::call::Call;
use hapa_core::rpc_error::published_code;
use hapa_core::service::ServiceSpec;
use hapa_proto::auth::v1::{ReserveTokensRequest, SettleTokensRequest, Settlement};
use hapa_transport::peer::AuthClient;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;
use tonic::Status;
use uuid::Uuid;

use crate::error::Error;

/// Mean of code, English and Korean.
const BYTES_PER_TOKEN: usize = 4;
/// Auth answers in milliseconds; after this timeout it counts as down.
const AUTH_TIMEOUT: Duration = Duration::from_secs(5);
/// Maximum number of queued entries. Beyond it settlements are lost, and the leases expire.
const QUEUE_CAPACITY: usize = 10_000;
const MAX_BATCH_SIZE: usize = 500;
/// Between two batches, which arrive as one transaction each.
const BATCH_INTERVAL: Duration = Duration::from_millis(50);
/// How long one batch is retried.
const SETTLE_TIMEOUT: Duration = Duration::from_mins(1);
/// A lease outlives the maximum duration of a generation by a margin. The margin equals that duration,
/// within these limits, so that reservations of a lost replica expire soon if generations are short.
const MIN_LEASE_MARGIN: Duration = Duration::from_secs(2);
const MAX_LEASE_MARGIN: Duration = Duration::from_mins(1);
/// Maximum reservation that auth accepts, in tokens.
const MAX_RESERVATION: i64 = 10_000_000;
/// Lead of a report over the use, in tokens. The next report is due when half of it is used. With about
/// ten batches a second, this covers generations of up to some 600 tokens a second.
const REPORT_LEAD_TOKENS: i64 = 128;
const LEDGER: &str = "hapa_ledger_tokens_total";
const GAP: &str = "hapa_ledger_gap_tokens";

#[derive(Clone)]
pub(crate) struct Budgets {
    auth: AuthClient,
    entries: mpsc::Sender<LedgerEntry>,
    lease_seconds: u32,
}

/// The tokens that a generation may use.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Estimate {
    /// Estimated prompt tokens, as passed to `Lease::record_usage` until the engine reports its own count.
    pub(crate) prompt: i64,
    /// Maximum prompt tokens.
    pub(crate) max_prompt: i64,
    /// Maximum tokens of all responses together.
    pub(crate) max_response: i64,
}

/// An entry of the queue to auth.
enum LedgerEntry {
    /// The tokens used by a generation that has ended.
    Settlement(Settlement),
    /// The tokens that a running generation may have used by its next report.
    Report(Settlement),
}

/// The reservation of one generation. Dropping it settles the recorded usage.
pub(crate) struct Lease {
    settlement: Option<Settlement>,
    /// Upper limit of the settlement.
    reserved: i64,
    /// Tokens above that limit in the last recorded usage.
    excess: i64,
    /// `None` if auth holds no reservation.
    reports: Option<UsageReports>,
    entries: mpsc::Sender<LedgerEntry>,
}

/// Progress reports of a running generation.
struct UsageReports {
    /// Tokens that may have been used, according to the last report.
    reported: i64,
    /// Lead of a report over the recorded usage, in tokens.
    lead: i64,
}

impl Budgets {
    /// Spawns the settler, which runs until the server ends and then settles the rest.
    pub(crate) fn new(auth: AuthClient, spec: &mut ServiceSpec, longest: Duration) -> Self {
        let (entries, waiting) = mpsc::channel(QUEUE_CAPACITY);
        let settling = auth.clone();
        spec.spawn_until(|end| run_settler(settling, waiting, end));
        let lease = longest + longest.clamp(MIN_LEASE_MARGIN, MAX_LEASE_MARGIN);
        let lease_seconds = u32::try_from(lease.as_secs()).unwrap_or(86_400);
        Budgets { auth, entries, lease_seconds: lease_seconds.min(86_400) }
    }

    /// Reserves tokens if the caller has a budget. `None` for a call without a caller.
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
            let reports = UsageReports::new(estimate, lease.reserved);
            let request = ReserveTokensRequest {
                lease_id: settlement.lease_id,
                key_id: settlement.key_id,
                user_id: settlement.user_id,
                tokens: lease.reserved,
                lease_seconds: self.lease_seconds,
                used_tokens: reports.reported,
            };
            // The lease exists before the reply, so a call cancelled now still releases its reservation.
            lease.reports = Some(reports);
            let mut auth = self.auth.clone();
            let left = call.deadline.map_or(AUTH_TIMEOUT, |at| {
                AUTH_TIMEOUT.min(at.saturating_duration_since(Instant::now()))
            });
            let reply = timeout(left, auth.reserve_tokens(request)).await;
            let reply = reply.unwrap_or_else(|_| Err(Status::deadline_exceeded("no answer")));
            return match reply {
                Ok(_) => Ok(Some(lease)),
                Err(status) => {
                    // A rejection by auth reserves nothing. Without a reply, the reservation may exist.
                    if published_code(&status).is_some() {
                        lease.discard();
                    }
                    Err(reservation_error(status))
                }
            };
        }
        Ok(Some(lease))
    }
}

impl Estimate {
    /// For a request with this body and this maximum number of response tokens.
    pub(crate) fn for_body(body: &[u8], max_response: i64) -> Estimate {
        Estimate {
            prompt: estimate_prompt_tokens(body).into(),
            max_prompt: max_prompt_tokens(body),
            max_response,
        }
    }

    fn reservation(self) -> i64 {
        self.max_prompt.saturating_add(self.max_response).clamp(1, MAX_RESERVATION)
    }
}

/// Estimated prompt tokens of a body, until the engine reports its own count.
pub(crate) fn estimate_prompt_tokens(body: &[u8]) -> u32 {
    u32::try_from(body.len() / BYTES_PER_TOKEN).unwrap_or(u32::MAX)
}

/// Maximum prompt tokens for a body, including the chat template. Letters and spaces average at least
/// three bytes per token. A digit, a sign or a byte of a rare character may be a token of its own.
fn max_prompt_tokens(body: &[u8]) -> i64 {
    let is_word = |byte: &&u8| byte.is_ascii_alphabetic() || **byte == b' ';
    let word_bytes = body.iter().filter(is_word).count();
    i64::try_from(word_bytes / 3 + (body.len() - word_bytes)).unwrap_or(i64::MAX)
}

impl UsageReports {
    fn new(estimate: Estimate, reserved: i64) -> UsageReports {
        let uncertainty = (estimate.max_prompt - estimate.prompt).max(0);
        let lead = uncertainty.saturating_add(REPORT_LEAD_TOKENS);
        UsageReports { reported: estimate.prompt.saturating_add(lead).min(reserved), lead }
    }

    /// The next report, if it is due.
    fn next_due(&self, used: i64, reserved: i64) -> Option<i64> {
        let next = used.saturating_add(self.lead).min(reserved);
        let is_due = next - self.reported >= REPORT_LEAD_TOKENS / 2 || next == reserved;
        (is_due && next > self.reported).then_some(next)
    }
}

/// Passes on the codes of exhausted budgets; any other error means that auth is unavailable.
fn reservation_error(status: Status) -> Error {
    match published_code(&status) {
        Some((code, _)) if matches!(code.as_str(), "E4007" | "E4008") => {
            let details = status.details().to_vec().into();
            let mut passed_on = Status::with_details(status.code(), status.message(), details);
            if let Some(wait) = status.metadata().get("retry-after") {
                passed_on.metadata_mut().insert("retry-after", wait.clone());
            }
            Error::Upstream(Box::new(passed_on))
        }
        _ => Error::BudgetUnavailable(Box::new(status)),
    }
}

impl Lease {
    fn new(
        settlement: Settlement,
        estimate: Estimate,
        entries: mpsc::Sender<LedgerEntry>,
    ) -> Lease {
        let (settlement, reserved) = (Some(settlement), estimate.reservation());
        Lease { settlement, reserved, excess: 0, reports: None, entries }
    }

    /// Records the tokens used so far. Tokens above the reservation cannot have been used: they are
    /// counted separately and never booked.
    pub(crate) fn record_usage(&mut self, tokens: i64) {
        let Some(settlement) = &mut self.settlement else { return };
        settlement.tokens = tokens.clamp(0, self.reserved);
        self.excess = (tokens - settlement.tokens).max(0);
        let Some(reports) = &mut self.reports else { return };
        let Some(next) = reports.next_due(settlement.tokens, self.reserved) else { return };
        // Reports leave room in the queue for settlements, which are sent only once.
        if self.entries.capacity() < QUEUE_CAPACITY / 2 {
            return;
        }
        let report = Settlement { tokens: next, ..settlement.clone() };
        if self.entries.try_send(LedgerEntry::Report(report)).is_ok() {
            reports.reported = next;
        }
    }

    fn discard(mut self) {
        self.settlement = None;
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let Some(settlement) = self.settlement.take() else { return };
        let tokens = settlement.tokens;
        metrics::gauge!(GAP).increment(gauge_value(tokens.saturating_add(self.excess)));
        if self.excess > 0 {
            tracing::warn!(
                excess = self.excess,
                "an engine reports more tokens than were reserved; the excess is not booked"
            );
            metrics::counter!(LEDGER, "outcome" => "excess").increment(self.excess.unsigned_abs());
        }
        if self.entries.try_send(LedgerEntry::Settlement(settlement)).is_err() {
            metrics::counter!("hapa_token_settlements_dropped_total").increment(1);
            count_lost(tokens);
        }
    }
}

/// Counts used tokens that will never be booked. They remain in the gap metric.
fn count_lost(tokens: i64) {
    metrics::counter!(LEDGER, "outcome" => "lost").increment(tokens.unsigned_abs());
}

fn count_booked(tokens: i64) {
    metrics::counter!(LEDGER, "outcome" => "booked").increment(tokens.unsigned_abs());
    metrics::gauge!(GAP).decrement(gauge_value(tokens));
}

#[expect(clippy::cast_precision_loss, reason = "exact up to 2^53")]
fn gauge_value(tokens: i64) -> f64 {
    tokens as f64
}

async fn run_settler(
    auth: AuthClient,
    mut waiting: mpsc::Receiver<LedgerEntry>,
    end: CancellationToken,
) {
    let mut entries = Vec::with_capacity(MAX_BATCH_SIZE);
    loop {
        tokio::select! {
            biased;
            received = waiting.recv_many(&mut entries, MAX_BATCH_SIZE) => if received == 0 { return },
            () = end.cancelled() => return,
        }
        let (batch, running) = partition(&mut entries);
        let from = Instant::now();
        let mut pause = Duration::from_millis(50);
        loop {
            let request =
                SettleTokensRequest { settlements: batch.clone(), running: running.clone() };
            let reply = timeout(AUTH_TIMEOUT, auth.clone().settle_tokens(request)).await;
            let error = match reply {
                Ok(Ok(_)) => {
                    count_booked(batch.iter().map(|entry| entry.tokens).sum());
                    break;
                }
                Ok(Err(status)) => status.message().to_owned(),
                Err(_) => "no answer".to_owned(),
            };
            if end.is_cancelled() || from.elapsed() > SETTLE_TIMEOUT {
                let count = batch.len() as u64;
                tracing::warn!(
                    count,
                    error,
                    "used tokens lost: auth did not accept their settlement in time"
                );
                metrics::counter!("hapa_token_settlements_dropped_total").increment(count);
                count_lost(batch.iter().map(|entry| entry.tokens).sum());
                break;
            }
            sleep(pause).await;
            pause = (pause * 2).min(Duration::from_secs(2));
        }
        // Batches settlements under load, because a commit for each would cost more than the reply.
        let _ = timeout(BATCH_INTERVAL, end.cancelled()).await;
    }
}

/// Splits entries into settlements and reports.
fn partition(entries: &mut Vec<LedgerEntry>) -> (Vec<Settlement>, Vec<Settlement>) {
    let (mut ended, mut running) = (Vec::new(), Vec::new());
    for entry in entries.drain(..) {
        match entry {
            LedgerEntry::Settlement(settlement) => ended.push(settlement),
            LedgerEntry::Report(report) => running.push(report),
        }
    }
    (ended, running)
}

#[cfg(test)]
mod tests;

//! Tokens that callers may use: reserved before the engine is asked, and settled when a generation
//! ends, however it ends. The settlement is made by dropping the lease, so no end can forget it.

use std::time::Duration;

use hapa_chassis::peer::AuthClient;
use hapa_chassis::status::read;
use hapa_chassis::{Call, Server};
use hapa_proto::auth::v1::{ReserveTokensRequest, SettleTokensRequest, Settlement};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;
use tonic::Status;
use uuid::Uuid;

use crate::error::Error;

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
/// What auth takes as the use of one generation, whatever an engine says.
const MOST_USED: i64 = 100_000_000;
const LEDGER: &str = "hapa_ledger_tokens_total";
const GAP: &str = "hapa_ledger_gap_tokens";

#[derive(Clone)]
pub(crate) struct Budgets {
    auth: AuthClient,
    settlements: mpsc::Sender<Settlement>,
    lease_seconds: u32,
}

/// Tokens of a generation. Dropping it settles what was counted.
pub(crate) struct Lease {
    settlement: Option<Settlement>,
    settlements: mpsc::Sender<Settlement>,
}

impl Budgets {
    /// Settles in the background until the server ends, and what is left then.
    pub(crate) fn new(server: &Server, longest: Duration) -> anyhow::Result<Self> {
        let auth = server.auth()?;
        let (settlements, waiting) = mpsc::channel(WAITING);
        let settling = auth.clone();
        server.spawn_to_end(|end| settle(settling, waiting, end));
        let lease = longest + longest.clamp(SHORTEST_MARGIN, LONGEST_MARGIN);
        let lease_seconds = u32::try_from(lease.as_secs()).unwrap_or(86_400);
        Ok(Budgets { auth, settlements, lease_seconds: lease_seconds.min(86_400) })
    }

    /// Reserves tokens where the caller has a budget; none where nobody pays.
    pub(crate) async fn reserve(&self, call: &Call, tokens: i64) -> Result<Option<Lease>, Error> {
        let Some(caller) = &call.principal else { return Ok(None) };
        let settlement = Settlement {
            lease_id: Uuid::now_v7().to_string(),
            key_id: caller.key_id.clone(),
            user_id: caller.user_id.clone(),
            tokens: 0,
        };
        if caller.has_token_budget {
            let request = ReserveTokensRequest {
                lease_id: settlement.lease_id.clone(),
                key_id: settlement.key_id.clone(),
                user_id: settlement.user_id.clone(),
                tokens: tokens.clamp(1, 10_000_000),
                lease_seconds: self.lease_seconds,
            };
            // Made before the answer is awaited: a caller who leaves now gives back what may be held.
            let lease = self.lease(settlement);
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
        Ok(Some(self.lease(settlement)))
    }

    fn lease(&self, settlement: Settlement) -> Lease {
        Lease { settlement: Some(settlement), settlements: self.settlements.clone() }
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
    /// So much was used, as far as is known until now.
    pub(crate) fn count(&mut self, tokens: i64) {
        if let Some(settlement) = &mut self.settlement {
            settlement.tokens = tokens.clamp(0, MOST_USED);
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
        metrics::gauge!(GAP).increment(measure(tokens));
        if self.settlements.try_send(settlement).is_err() {
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

async fn settle(auth: AuthClient, mut waiting: mpsc::Receiver<Settlement>, end: CancellationToken) {
    let mut batch = Vec::with_capacity(TOGETHER);
    loop {
        tokio::select! {
            biased;
            received = waiting.recv_many(&mut batch, TOGETHER) => if received == 0 { return },
            () = end.cancelled() => return,
        }
        let from = Instant::now();
        let mut pause = Duration::from_millis(50);
        loop {
            let request = SettleTokensRequest { settlements: batch.clone() };
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
        batch.clear();
        // Under load settlements come together: a commit for each would cost more than its answer.
        let _ = timeout(GATHERING, end.cancelled()).await;
    }
}

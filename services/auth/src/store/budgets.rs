//! Token budgets: tokens used, and tokens reserved by generations in progress.
//!
//! Invariant: usage rows are always locked in the order of payer and period, so that transactions
//! cannot deadlock.

use std::collections::BTreeMap;

use hapa_core::timestamps::{DAY, day};
use hapa_proto::auth::v1::{Settlement, TokenUsage};
use hapa_store::sql::SqlText;
use sqlx::any::AnyRow;
use sqlx::{AnyConnection, Row as _};

use crate::calendar::month_of;
use crate::error::Error;
use crate::store::Store;

/// Expired leases that one transaction releases.
const RELEASE_BATCH_SIZE: i64 = 500;
/// How long a settled or released lease is kept after its expiry, in microseconds, to recognise a late
/// settlement.
const CLOSED_LEASE_RETENTION_PERIOD: i64 = 2 * DAY;

/// A reservation of tokens for one generation.
#[derive(Clone, Debug)]
pub(crate) struct TokenLease {
    pub(crate) id: String,
    pub(crate) key_id: String,
    pub(crate) user_id: String,
    pub(crate) tokens: i64,
    /// Usage to book if the lease expires without a further report.
    pub(crate) reported_tokens: i64,
    pub(crate) expire_time: i64,
}

/// The budget that has no tokens left.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ExhaustedBudget {
    /// `key:<key_id>` or `user:<user_id>`.
    pub(crate) payer: String,
    pub(crate) is_monthly: bool,
}

/// Changes to usage rows, by payer and period.
type UsageDeltas = BTreeMap<(String, String), UsageDelta>;

/// The change to one usage row, in tokens.
#[derive(Clone, Copy, Default)]
struct UsageDelta {
    used: i64,
    reserved: i64,
}

impl Store {
    /// Reserves tokens, or returns the exhausted budget. A budget admits a reservation as long as it
    /// has one token left.
    pub(crate) async fn reserve(
        &self,
        lease: TokenLease,
        now: i64,
    ) -> Result<Result<(), ExhaustedBudget>, Error> {
        let transaction = self.db.transaction(move |connection| {
            Box::pin(async move {
                let today = day(now);
                let limits = budget_limits(connection, &lease, &today).await?;
                insert_lease(connection, &lease, &today).await?;
                for ((payer, period), limit) in limits {
                    let is_monthly = period.len() == 7;
                    let update = sqlx::query(
                        "INSERT INTO token_usage (payer, period, used, reserved)
                         VALUES ($1, $2, 0, $3)
                         ON CONFLICT (payer, period)
                         DO UPDATE SET reserved = token_usage.reserved + $3
                         WHERE $4 = 0 OR token_usage.used + token_usage.reserved < $4",
                    )
                    .bind(payer.clone())
                    .bind(period)
                    .bind(lease.tokens)
                    .bind(limit);
                    if update.execute(&mut *connection).await?.rows_affected() == 0 {
                        // An error rolls the transaction back.
                        return Err(Error::BudgetExhausted(ExhaustedBudget { payer, is_monthly }));
                    }
                }
                Ok(())
            })
        });
        match transaction.await {
            Ok(()) => Ok(Ok(())),
            Err(Error::BudgetExhausted(budget)) => Ok(Err(budget)),
            Err(error) => Err(error),
        }
    }

    /// Books the tokens of finished generations, and records what running generations may have used
    /// so far. A lease that is settled already stays as it is.
    pub(crate) async fn settle(
        &self,
        settlements: Vec<Settlement>,
        running: Vec<Settlement>,
        now: i64,
    ) -> Result<(), Error> {
        self.db
            .transaction(move |connection| {
                Box::pin(async move {
                    let mut deltas = UsageDeltas::new();
                    let finals = settlements.into_iter().map(|settlement| (settlement, true));
                    let running = running.into_iter().map(|report| (report, false));
                    let mut settlements: Vec<_> = finals.chain(running).collect();
                    // Leases are locked in one order, so that transactions cannot deadlock.
                    settlements.sort_by(|(a, _), (b, _)| a.lease_id.cmp(&b.lease_id));
                    for (settlement, is_final) in settlements {
                        if !is_final {
                            record_reported_usage(connection, settlement).await?;
                            continue;
                        }
                        let settled = settle_lease(connection, &settlement, now).await?;
                        let Some(SettledLease { day, used, released }) = settled else { continue };
                        let payers = payers(&settlement.key_id, &settlement.user_id);
                        add_delta(
                            &mut deltas,
                            payers,
                            &day,
                            UsageDelta { used, reserved: -released },
                        );
                    }
                    apply_deltas(connection, deltas).await
                })
            })
            .await
    }

    /// Releases leases that expired unsettled: books the last reported usage and returns the rest of
    /// the reservation. Returns whether more may be left.
    pub(crate) async fn release_expired_leases(&self, now: i64) -> Result<bool, Error> {
        self.db
            .transaction(move |connection| {
                Box::pin(async move {
                    let rows = sqlx::query(
                        "UPDATE token_leases SET state = 1
                         WHERE lease_id IN
                           (SELECT lease_id FROM token_leases
                            WHERE state = 0 AND expire_time <= $1 ORDER BY lease_id LIMIT $2)
                         RETURNING key_id, user_id, tokens, used, day",
                    );
                    let rows =
                        rows.bind(now).bind(RELEASE_BATCH_SIZE).fetch_all(&mut *connection).await?;
                    let mut deltas = UsageDeltas::new();
                    for row in &rows {
                        let (key_id, user_id): (&str, &str) =
                            (row.try_get("key_id")?, row.try_get("user_id")?);
                        let (tokens, used, day): (i64, i64, &str) =
                            (row.try_get("tokens")?, row.try_get("used")?, row.try_get("day")?);
                        add_delta(
                            &mut deltas,
                            payers(key_id, user_id),
                            day,
                            UsageDelta { used, reserved: -tokens },
                        );
                    }
                    apply_deltas(connection, deltas).await?;
                    // A settlement may arrive late, but not by days.
                    let delete = sqlx::query(
                        "DELETE FROM token_leases WHERE state <> 0 AND expire_time < $1",
                    );
                    delete.bind(now - CLOSED_LEASE_RETENTION_PERIOD).execute(connection).await?;
                    Ok::<_, Error>(
                        i64::try_from(rows.len())
                            .is_ok_and(|released| released == RELEASE_BATCH_SIZE),
                    )
                })
            })
            .await
    }

    /// The token usage of each payer, in the order of `payers`.
    pub(crate) async fn token_usage(
        &self,
        payers: &[String],
        now: i64,
    ) -> Result<Vec<TokenUsage>, Error> {
        token_usage(&mut *self.db.reader.acquire().await?, payers, now).await
    }
}

/// The token usage of one payer.
pub(super) async fn token_usage_of(
    connection: &mut AnyConnection,
    payer: String,
    now: i64,
) -> Result<TokenUsage, Error> {
    Ok(token_usage(connection, &[payer], now).await?.into_iter().next().unwrap_or_default())
}

async fn token_usage(
    connection: &mut AnyConnection,
    payers: &[String],
    now: i64,
) -> Result<Vec<TokenUsage>, Error> {
    if payers.is_empty() {
        return Ok(Vec::new());
    }
    let text = SqlText::new("SELECT * FROM token_usage WHERE period IN ($1, $2) AND payer IN (");
    let text = text.places(3, payers.len()).with(")");
    let today = day(now);
    let mut rows = sqlx::query(text).bind(today.clone()).bind(month_of(&today).to_owned());
    for payer in payers {
        rows = rows.bind(payer.clone());
    }
    let rows = rows.fetch_all(connection).await?;
    let mut usage_by_payer: BTreeMap<String, TokenUsage> = BTreeMap::new();
    for row in &rows {
        add_usage_row(row, &today, &mut usage_by_payer)?;
    }
    Ok(payers.iter().map(|payer| usage_by_payer.get(payer).copied().unwrap_or_default()).collect())
}

fn add_usage_row(
    row: &AnyRow,
    today: &str,
    usage_by_payer: &mut BTreeMap<String, TokenUsage>,
) -> Result<(), Error> {
    let usage = usage_by_payer.entry(row.try_get("payer")?).or_default();
    let (period, used): (&str, i64) = (row.try_get("period")?, row.try_get("used")?);
    if period == today {
        usage.day_tokens = used;
    } else {
        usage.month_tokens = used;
        // The monthly row, because a reservation may last past midnight.
        usage.reserved_tokens = row.try_get("reserved")?;
    }
    Ok(())
}

/// Token limits by payer and period, in lock order; 0 means unlimited.
async fn budget_limits(
    connection: &mut AnyConnection,
    lease: &TokenLease,
    today: &str,
) -> Result<BTreeMap<(String, String), i64>, Error> {
    let mut limits = BTreeMap::new();
    let tables = [
        (
            "key",
            &lease.key_id,
            "SELECT day_budget, month_budget FROM keys WHERE key_id = $1 AND revoke_time IS NULL",
        ),
        ("user", &lease.user_id, "SELECT day_budget, month_budget FROM users WHERE user_id = $1"),
    ];
    for (kind, id, text) in tables.into_iter().filter(|(_, id, _)| !id.is_empty()) {
        let row = sqlx::query(text).bind(id.clone()).fetch_optional(&mut *connection).await?;
        let row = row.ok_or(Error::ExpiredOrRevoked)?;
        let payer = format!("{kind}:{id}");
        limits.insert((payer.clone(), today.to_owned()), row.try_get("day_budget")?);
        limits.insert((payer, month_of(today).to_owned()), row.try_get("month_budget")?);
    }
    Ok(limits)
}

async fn insert_lease(
    connection: &mut AnyConnection,
    lease: &TokenLease,
    day: &str,
) -> Result<(), Error> {
    let insert = sqlx::query(
        "INSERT INTO token_leases (lease_id, key_id, user_id, tokens, day, state, expire_time, used)
         VALUES ($1, $2, $3, $4, $5, 0, $6, $7) ON CONFLICT DO NOTHING",
    )
    .bind(lease.id.clone())
    .bind(lease.key_id.clone())
    .bind(lease.user_id.clone())
    .bind(lease.tokens)
    .bind(day.to_owned())
    .bind(lease.expire_time)
    .bind(lease.reported_tokens.min(lease.tokens));
    if insert.execute(connection).await?.rows_affected() == 0 {
        return Err(Error::LeaseTaken);
    }
    Ok(())
}

/// Records what a running generation may have used so far, at most its reservation.
async fn record_reported_usage(
    connection: &mut AnyConnection,
    report: Settlement,
) -> Result<(), Error> {
    let update = sqlx::query(
        "UPDATE token_leases SET used = CASE WHEN tokens < $2 THEN tokens ELSE $2 END
         WHERE lease_id = $1 AND state = 0 AND used < $2",
    );
    update.bind(report.lease_id).bind(report.tokens).execute(connection).await?;
    Ok(())
}

/// What the settlement of a lease changes in the budgets.
struct SettledLease {
    /// The UTC day whose budgets are charged.
    day: String,
    /// Tokens to book: the usage, less what the expiry of the lease has booked already.
    used: i64,
    /// Reserved tokens to return.
    released: i64,
}

/// Settles a lease. `None` if it was settled before.
async fn settle_lease(
    connection: &mut AnyConnection,
    settlement: &Settlement,
    now: i64,
) -> Result<Option<SettledLease>, Error> {
    // A lease that was never reserved is recorded too, so that it cannot be booked twice.
    let insert = sqlx::query(
        "INSERT INTO token_leases (lease_id, key_id, user_id, tokens, day, state, expire_time)
         VALUES ($1, $2, $3, 0, $4, 2, $5) ON CONFLICT DO NOTHING",
    )
    .bind(settlement.lease_id.clone())
    .bind(settlement.key_id.clone())
    .bind(settlement.user_id.clone())
    .bind(day(now))
    .bind(now);
    if insert.execute(&mut *connection).await?.rows_affected() > 0 {
        return Ok(Some(SettledLease { day: day(now), used: settlement.tokens, released: 0 }));
    }
    let row = sqlx::query("SELECT tokens, used, day, state FROM token_leases WHERE lease_id = $1");
    let row = row.bind(settlement.lease_id.clone()).fetch_one(&mut *connection).await?;
    let (tokens, booked, day, state): (i64, i64, String, i64) =
        (row.try_get("tokens")?, row.try_get("used")?, row.try_get("day")?, row.try_get("state")?);
    // If no row changes, a concurrent transaction has settled or released the lease. `used` is fixed
    // once the state is not 0.
    let update = sqlx::query(
        "UPDATE token_leases SET state = 2 WHERE lease_id = $1 AND state = $2 AND state <> 2",
    );
    let update = update.bind(settlement.lease_id.clone()).bind(state).execute(connection).await?;
    if update.rows_affected() > 0 {
        // An engine may report more tokens than the generation could use.
        let used = settlement.tokens.min(tokens);
        let (used, released) = if state == 0 { (used, tokens) } else { (used - booked, 0) };
        return Ok(Some(SettledLease { day, used, released }));
    }
    if state == 2 { Ok(None) } else { Err(Error::LeaseTaken) }
}

fn payers(key_id: &str, user_id: &str) -> Vec<String> {
    let payers = [("key", key_id), ("user", user_id)];
    let payers = payers.into_iter().filter(|(_, id)| !id.is_empty());
    payers.map(|(kind, id)| format!("{kind}:{id}")).collect()
}

fn add_delta(
    deltas: &mut UsageDeltas,
    payers: Vec<String>,
    day: &str,
    UsageDelta { used, reserved }: UsageDelta,
) {
    for payer in payers {
        for period in [day, month_of(day)] {
            let delta = deltas.entry((payer.clone(), period.to_owned())).or_default();
            delta.used += used;
            delta.reserved += reserved;
        }
    }
}

async fn apply_deltas(connection: &mut AnyConnection, deltas: UsageDeltas) -> Result<(), Error> {
    for ((payer, period), UsageDelta { used, reserved }) in deltas {
        let update = sqlx::query(
            "INSERT INTO token_usage (payer, period, used, reserved) VALUES ($1, $2, $3, 0)
             ON CONFLICT (payer, period)
             DO UPDATE SET used = token_usage.used + $3, reserved = token_usage.reserved + $4",
        );
        update.bind(payer).bind(period).bind(used).bind(reserved).execute(&mut *connection).await?;
    }
    Ok(())
}

//! Token budgets: what was used, and what is held by generations that have not ended.
//!
//! Rows of usage are always locked in the order of payer and period, so that no two transactions
//! wait for each other.

use std::collections::BTreeMap;

use hapa_core::timestamps::{DAY, day};
use hapa_proto::auth::v1::{Settlement, TokenUsage};
use hapa_store::sql::SqlText;
use sqlx::any::AnyRow;
use sqlx::{AnyConnection, Row as _};

use crate::error::Error;
use crate::store::Store;
use crate::times::month_of;

/// Unsettled leases that are ended at once.
const CHUNK: i64 = 500;

/// Tokens to be held.
#[derive(Clone, Debug)]
pub(crate) struct Lease {
    pub(crate) id: String,
    pub(crate) key_id: String,
    pub(crate) user_id: String,
    pub(crate) tokens: i64,
    /// Booked where nothing else is ever reported.
    pub(crate) used: i64,
    pub(crate) expire_time: i64,
}

/// A budget that is used up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Used {
    /// key:… or user:…
    pub(crate) payer: String,
    pub(crate) is_month: bool,
}

/// By payer and period: tokens used, tokens held.
type Bookings = BTreeMap<(String, String), (i64, i64)>;

impl Store {
    /// Holds tokens, or says which budget is used up. Passes as long as anything is left.
    pub(crate) async fn reserve(&self, lease: Lease, now: i64) -> Result<Result<(), Used>, Error> {
        let done = self.db.transaction(move |connection| {
            Box::pin(async move {
                let today = day(now);
                let limits = limits(connection, &lease, &today).await?;
                insert_lease(connection, &lease, &today).await?;
                for ((payer, period), limit) in limits {
                    let is_month = period.len() == 7;
                    let update = sqlx::query(
                        "INSERT INTO token_usage (payer, period, used, reserved) VALUES ($1, $2, 0, $3)
                         ON CONFLICT (payer, period) DO UPDATE SET reserved = token_usage.reserved + $3
                         WHERE $4 = 0 OR token_usage.used + token_usage.reserved < $4",
                    )
                    .bind(payer.clone())
                    .bind(period)
                    .bind(lease.tokens)
                    .bind(limit);
                    if update.execute(&mut *connection).await?.rows_affected() == 0 {
                        // An error, so that all of it is undone.
                        return Err(Error::UsedUp(Used { payer, is_month }));
                    }
                }
                Ok(())
            })
        });
        match done.await {
            Ok(()) => Ok(Ok(())),
            Err(Error::UsedUp(used)) => Ok(Err(used)),
            Err(error) => Err(error),
        }
    }

    /// Books what was used, and notes what generations that still run may have used. A lease that is
    /// settled already is left alone.
    pub(crate) async fn settle(
        &self,
        settlements: Vec<Settlement>,
        running: Vec<Settlement>,
        now: i64,
    ) -> Result<(), Error> {
        self.db
            .transaction(move |connection| {
                Box::pin(async move {
                    let mut bookings = Bookings::new();
                    let ended = settlements.into_iter().map(|settlement| (settlement, true));
                    let running = running.into_iter().map(|report| (report, false));
                    let mut all: Vec<_> = ended.chain(running).collect();
                    // One order for both, so that no two transactions wait for each other.
                    all.sort_by(|(a, _), (b, _)| a.lease_id.cmp(&b.lease_id));
                    for (settlement, has_ended) in all {
                        if !has_ended {
                            note_used(connection, settlement).await?;
                            continue;
                        }
                        let closed = close_lease(connection, &settlement, now).await?;
                        let Some(Closed { day, used, held }) = closed else { continue };
                        let payers = payers(&settlement.key_id, &settlement.user_id);
                        book(&mut bookings, payers, &day, (used, -held));
                    }
                    write(connection, bookings).await
                })
            })
            .await
    }

    /// Ends leases that were never settled: books what was reported last, and gives back the rest.
    /// Whether there may be more.
    pub(crate) async fn end_expired(&self, now: i64) -> Result<bool, Error> {
        self.db
            .transaction(move |connection| {
                Box::pin(async move {
                    let rows = sqlx::query(
                        "UPDATE token_leases SET state = 1
                         WHERE lease_id IN (SELECT lease_id FROM token_leases
                                            WHERE state = 0 AND expire_time <= $1 ORDER BY lease_id LIMIT $2)
                         RETURNING key_id, user_id, tokens, used, day",
                    );
                    let rows = rows.bind(now).bind(CHUNK).fetch_all(&mut *connection).await?;
                    let mut bookings = Bookings::new();
                    for row in &rows {
                        let (key_id, user_id): (&str, &str) =
                            (row.try_get("key_id")?, row.try_get("user_id")?);
                        let (tokens, used, day): (i64, i64, &str) =
                            (row.try_get("tokens")?, row.try_get("used")?, row.try_get("day")?);
                        book(&mut bookings, payers(key_id, user_id), day, (used, -tokens));
                    }
                    write(connection, bookings).await?;
                    // A settlement may come late, but not by days.
                    let forget = sqlx::query(
                        "DELETE FROM token_leases WHERE state <> 0 AND expire_time < $1",
                    );
                    forget.bind(now - 2 * DAY).execute(connection).await?;
                    Ok::<_, Error>(i64::try_from(rows.len()).is_ok_and(|found| found == CHUNK))
                })
            })
            .await
    }

    /// What payers have used, in the order in which they were asked for.
    pub(crate) async fn usage(
        &self,
        payers: &[String],
        now: i64,
    ) -> Result<Vec<TokenUsage>, Error> {
        usage(&mut *self.db.reader.acquire().await?, payers, now).await
    }
}

/// What one payer has used.
pub(super) async fn usage_of(
    connection: &mut AnyConnection,
    payer: String,
    now: i64,
) -> Result<TokenUsage, Error> {
    Ok(usage(connection, &[payer], now).await?.into_iter().next().unwrap_or_default())
}

async fn usage(
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
    let mut found: BTreeMap<String, TokenUsage> = BTreeMap::new();
    for row in &rows {
        add(row, &today, &mut found)?;
    }
    Ok(payers.iter().map(|payer| found.get(payer).copied().unwrap_or_default()).collect())
}

fn add(row: &AnyRow, today: &str, found: &mut BTreeMap<String, TokenUsage>) -> Result<(), Error> {
    let usage = found.entry(row.try_get("payer")?).or_default();
    let (period, used): (&str, i64) = (row.try_get("period")?, row.try_get("used")?);
    if period == today {
        usage.day_tokens = used;
    } else {
        usage.month_tokens = used;
        // Held across midnight too.
        usage.reserved_tokens = row.try_get("reserved")?;
    }
    Ok(())
}

/// By payer and period: the limit, 0 for none. In the order in which rows are locked.
async fn limits(
    connection: &mut AnyConnection,
    lease: &Lease,
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
        let row = row.ok_or(Error::Ended)?;
        let payer = format!("{kind}:{id}");
        limits.insert((payer.clone(), today.to_owned()), row.try_get("day_budget")?);
        limits.insert((payer, month_of(today).to_owned()), row.try_get("month_budget")?);
    }
    Ok(limits)
}

async fn insert_lease(
    connection: &mut AnyConnection,
    lease: &Lease,
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
    .bind(lease.used.min(lease.tokens));
    if insert.execute(connection).await?.rows_affected() == 0 {
        return Err(Error::LeaseTaken);
    }
    Ok(())
}

/// Notes what a generation may have used so far, within its reservation.
async fn note_used(connection: &mut AnyConnection, report: Settlement) -> Result<(), Error> {
    let update = sqlx::query(
        "UPDATE token_leases SET used = CASE WHEN tokens < $2 THEN tokens ELSE $2 END
         WHERE lease_id = $1 AND state = 0 AND used < $2",
    );
    update.bind(report.lease_id).bind(report.tokens).execute(connection).await?;
    Ok(())
}

/// What a settlement changes.
struct Closed {
    /// The day that pays.
    day: String,
    /// To be booked: what was used, less what the end of the lease has booked.
    used: i64,
    /// To be given back.
    held: i64,
}

/// Settles a lease; none where it was settled before.
async fn close_lease(
    connection: &mut AnyConnection,
    settlement: &Settlement,
    now: i64,
) -> Result<Option<Closed>, Error> {
    // One that was never reserved is noted all the same, so that it can't be booked twice.
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
        return Ok(Some(Closed { day: day(now), used: settlement.tokens, held: 0 }));
    }
    let row = sqlx::query("SELECT tokens, used, day, state FROM token_leases WHERE lease_id = $1");
    let row = row.bind(settlement.lease_id.clone()).fetch_one(&mut *connection).await?;
    let (tokens, booked, day, state): (i64, i64, String, i64) =
        (row.try_get("tokens")?, row.try_get("used")?, row.try_get("day")?, row.try_get("state")?);
    // Whoever else looked at the same state has settled it, or ended it, when none changes here. `used`
    // does not change once the state is not 0.
    let update = sqlx::query(
        "UPDATE token_leases SET state = 2 WHERE lease_id = $1 AND state = $2 AND state <> 2",
    );
    let update = update.bind(settlement.lease_id.clone()).bind(state).execute(connection).await?;
    if update.rows_affected() > 0 {
        // An engine may claim more than the generation could use.
        let used = settlement.tokens.min(tokens);
        let (used, held) = if state == 0 { (used, tokens) } else { (used - booked, 0) };
        return Ok(Some(Closed { day, used, held }));
    }
    if state == 2 { Ok(None) } else { Err(Error::LeaseTaken) }
}

fn payers(key_id: &str, user_id: &str) -> Vec<String> {
    let payers = [("key", key_id), ("user", user_id)];
    let payers = payers.into_iter().filter(|(_, id)| !id.is_empty());
    payers.map(|(kind, id)| format!("{kind}:{id}")).collect()
}

fn book(bookings: &mut Bookings, payers: Vec<String>, day: &str, (used, held): (i64, i64)) {
    for payer in payers {
        for period in [day, month_of(day)] {
            let booking = bookings.entry((payer.clone(), period.to_owned())).or_default();
            booking.0 += used;
            booking.1 += held;
        }
    }
}

async fn write(connection: &mut AnyConnection, bookings: Bookings) -> Result<(), Error> {
    for ((payer, period), (used, held)) in bookings {
        let update = sqlx::query(
            "INSERT INTO token_usage (payer, period, used, reserved) VALUES ($1, $2, $3, 0)
             ON CONFLICT (payer, period)
             DO UPDATE SET used = token_usage.used + $3, reserved = token_usage.reserved + $4",
        );
        update.bind(payer).bind(period).bind(used).bind(held).execute(&mut *connection).await?;
    }
    Ok(())
}

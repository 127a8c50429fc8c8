//! The only SQL of this service, here and in the modules below. One method is one statement or one
//! transaction.
//!
//! Invariant: a change and its audit entries are one transaction, which locks the head of the audit
//! log first. Entries are therefore numbered in commit order, and a reader of the log misses none.

mod audit;
mod budgets;
mod idempotency;
mod key_secrets;
mod keys;
mod pepper_fingerprints;
mod sessions;
mod users;

use std::sync::Arc;

use futures_util::future::BoxFuture;
use hapa_core::call::Call;
use hapa_core::timestamps::now;
use hapa_proto::auth::v1::TokenBudget;
use hapa_store::database::{Db, MigrationStep};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sqlx::any::AnyRow;
use sqlx::{AnyConnection, Row as _};
use tokio::sync::Notify;

use crate::error::Error;

pub(crate) use audit::AuditFilter;
pub(crate) use budgets::{ExhaustedBudget, TokenLease};
pub(crate) use idempotency::ChangeRequest;
pub(crate) use key_secrets::NewSecret;
pub(crate) use keys::{ExpiryChange, KeyChanges, KeyFilter, KeyWithOwner};
pub(crate) use sessions::{ActiveSession, NewSession, RefreshExpiry, RefreshOutcome};
pub(crate) use users::{NewUser, UserChanges, UserRef};

pub(crate) const MIGRATIONS: &[MigrationStep] = &[
    (1, "keys", include_str!("../migrations/0001_keys.sql")),
    (2, "people", include_str!("../migrations/0002_people.sql")),
    (3, "reported tokens", include_str!("../migrations/0003_reported_tokens.sql")),
    (4, "pepper", include_str!("../migrations/0004_pepper.sql")),
    (5, "idempotency", include_str!("../migrations/0005_idempotency.sql")),
];

#[derive(Clone, Debug)]
pub(crate) struct Store {
    db: Db,
    /// Wakes the change feed, so that the other replicas learn of a change without delay.
    change_notify: Arc<Notify>,
}

/// The caller that makes a change, its address, and the time of the change.
#[derive(Clone, Debug)]
pub(crate) struct AuditContext {
    pub(crate) time: i64,
    actor: String,
    owner: String,
    address: String,
    request_id: String,
}

impl AuditContext {
    pub(crate) fn from_call(call: &Call) -> Self {
        AuditContext {
            time: now(),
            actor: call.actor(),
            owner: call.principal.as_ref().map(|caller| caller.owner.clone()).unwrap_or_default(),
            address: call.address.to_string(),
            request_id: call.request_id.to_string(),
        }
    }

    /// IP address of the client.
    pub(crate) fn address(&self) -> &str {
        &self.address
    }
}

/// What the credential caches of the services must do after a change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CacheEffect {
    None = 0,
    /// Authenticate the credential again.
    Invalidate = 1,
    /// Authenticate again and end calls in progress, because a permission was withdrawn.
    EndCalls = 2,
}

/// One audit log entry before it is numbered and combined with its [`AuditContext`].
pub(crate) struct AuditEvent {
    action: &'static str,
    subject: String,
    detail: Value,
    effect: CacheEffect,
}

impl AuditEvent {
    fn new(action: &'static str, subject: String, detail: Value, effect: CacheEffect) -> Self {
        AuditEvent { action, subject, detail, effect }
    }
}

/// The result of an audited transaction, with the events to append to the audit log.
type Audited<T> = Result<(T, Vec<AuditEvent>), Error>;

impl Store {
    pub(crate) fn new(db: Db) -> Self {
        Store { db, change_notify: Arc::new(Notify::new()) }
    }

    /// Runs `work` and appends its events to the audit log in one transaction.
    async fn audited_transaction<T: Send + 'static>(
        &self,
        context: AuditContext,
        work: impl for<'t> FnOnce(&'t mut AnyConnection) -> BoxFuture<'t, Audited<T>> + Send + 'static,
    ) -> Result<T, Error> {
        let done = self.db.transaction(move |connection| {
            Box::pin(async move {
                let head = audit::lock_head(connection).await?;
                let (done, events) = work(connection).await?;
                audit::append_events(connection, head, &context, &events).await?;
                Ok::<_, Error>(done)
            })
        });
        let done = done.await?;
        self.change_notify.notify_one();
        Ok(done)
    }
}

/// The audit detail of an update: the changed fields alone.
fn detail_of_changes(fields: impl IntoIterator<Item = (&'static str, Option<Value>)>) -> Value {
    let set = |(name, value): (&str, Option<Value>)| Some((name.to_owned(), value?));
    Value::Object(fields.into_iter().filter_map(set).collect())
}

fn token_budget_from_row(row: &AnyRow) -> Result<Option<TokenBudget>, Error> {
    let budget = TokenBudget {
        per_day: row.try_get("day_budget")?,
        per_month: row.try_get("month_budget")?,
    };
    Ok(Some(budget).filter(|budget| *budget != TokenBudget::default()))
}

fn to_json(value: &impl Serialize) -> Result<String, Error> {
    Ok(serde_json::to_string(value).map_err(anyhow::Error::from)?)
}

fn from_json<T: for<'a> Deserialize<'a>>(text: &str) -> Result<T, Error> {
    Ok(serde_json::from_str(text).map_err(anyhow::Error::from)?)
}

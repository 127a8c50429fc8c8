//! The only SQL of this service, here and in the rooms below: one method is one statement or one
//! transaction.
//!
//! A change and its audit entries are one transaction, which locks the head of the log first: so
//! entries are numbered in the order of commits, and who reads the log misses none.

mod audit;
mod budgets;
mod idempotency;
mod keys;
mod peppers;
mod sessions;
mod users;

use std::sync::Arc;

use futures_util::future::BoxFuture;
use hapa_core::call::Call;
use hapa_core::timestamps::now;
use hapa_proto::auth::v1::TokenBudget;
use hapa_store::database::{Db, Step};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sqlx::any::AnyRow;
use sqlx::{AnyConnection, Row as _};
use tokio::sync::Notify;

use crate::error::Error;

pub(crate) use audit::Entries;
pub(crate) use budgets::{Lease, Used};
pub(crate) use idempotency::Attempt;
pub(crate) use keys::{Changes, End, Filter, Known, NewText};
pub(crate) use sessions::{Ends, Live, NewSession, Refreshed};
pub(crate) use users::{NewUser, UserChanges, Who};

pub(crate) const MIGRATIONS: &[Step] = &[
    (1, "keys", include_str!("../migrations/0001_keys.sql")),
    (2, "people", include_str!("../migrations/0002_people.sql")),
    (3, "reported tokens", include_str!("../migrations/0003_reported_tokens.sql")),
    (4, "pepper", include_str!("../migrations/0004_pepper.sql")),
    (5, "idempotency", include_str!("../migrations/0005_idempotency.sql")),
];

#[derive(Clone, Debug)]
pub(crate) struct Store {
    db: Db,
    /// Wakes who tells other replicas.
    changed: Arc<Notify>,
}

/// Who changes something, from where, and when.
#[derive(Clone, Debug)]
pub(crate) struct By {
    pub(crate) time: i64,
    actor: String,
    owner: String,
    address: String,
    request_id: String,
}

impl By {
    pub(crate) fn of(call: &Call) -> Self {
        By {
            time: now(),
            actor: call.actor(),
            owner: call.principal.as_ref().map(|caller| caller.owner.clone()).unwrap_or_default(),
            address: call.address.to_string(),
            request_id: call.request_id.to_string(),
        }
    }

    /// The address alone.
    pub(crate) fn address(&self) -> &str {
        &self.address
    }
}

/// What a change means to caches of credentials.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Effect {
    None = 0,
    /// Ask again.
    Changed = 1,
    /// And end calls in progress: something was taken away.
    Ended = 2,
}

/// One line of the audit log, without who and when.
pub(crate) struct Note {
    action: &'static str,
    subject: String,
    detail: Value,
    effect: Effect,
}

impl Note {
    fn new(action: &'static str, subject: String, detail: Value, effect: Effect) -> Self {
        Note { action, subject, detail, effect }
    }
}

/// What a transaction gives, and what it did.
type Done<T> = Result<(T, Vec<Note>), Error>;

impl Store {
    pub(crate) fn new(db: Db) -> Self {
        Store { db, changed: Arc::new(Notify::new()) }
    }

    /// Does something and writes down what was done, both or neither.
    async fn change<T: Send + 'static>(
        &self,
        by: By,
        work: impl for<'t> FnOnce(&'t mut AnyConnection) -> BoxFuture<'t, Done<T>> + Send + 'static,
    ) -> Result<T, Error> {
        let done = self.db.transaction(move |connection| {
            Box::pin(async move {
                let head = audit::lock_head(connection).await?;
                let (done, notes) = work(connection).await?;
                audit::append(connection, head, &by, &notes).await?;
                Ok::<_, Error>(done)
            })
        });
        let done = done.await?;
        self.changed.notify_one();
        Ok(done)
    }
}

fn budget(row: &AnyRow) -> Result<Option<TokenBudget>, Error> {
    let budget = TokenBudget {
        per_day: row.try_get("day_budget")?,
        per_month: row.try_get("month_budget")?,
    };
    Ok(Some(budget).filter(|budget| *budget != TokenBudget::default()))
}

fn json(value: &impl Serialize) -> Result<String, Error> {
    Ok(serde_json::to_string(value).map_err(anyhow::Error::from)?)
}

fn from_json<T: for<'a> Deserialize<'a>>(text: &str) -> Result<T, Error> {
    Ok(serde_json::from_str(text).map_err(anyhow::Error::from)?)
}

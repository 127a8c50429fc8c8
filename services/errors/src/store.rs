//! The only SQL of this service, here and in the rooms below: one method is one statement or one
//! transaction.
//!
//! Whatever changes anything locks the head first. So occurrences are numbered in the order of
//! commits, who reads them by their numbers misses none, and what is counted is exact.

mod incidents;
mod occurrences;
mod owned;
mod patterns;
mod purge;
mod report;
mod rows;

use std::sync::Arc;

use hapa_store::change_feed::Log;
use hapa_store::database::{Db, Step};
use sqlx::any::AnyRow;
use sqlx::{AnyConnection, Row as _};
use tokio::sync::Notify;

use crate::error::Error;

pub(crate) use incidents::{Change, Filter, Pattern, RESOLVED};
pub(crate) use patterns::{Ranked, Window};
pub(crate) use purge::Limits;
pub(crate) use report::{Batch, New};

pub(crate) const MIGRATIONS: &[Step] = &[
    (1, "occurrences", include_str!("../migrations/0001_occurrences.sql")),
    (2, "days", include_str!("../migrations/0002_days.sql")),
    (3, "met", include_str!("../migrations/0003_met.sql")),
    (4, "owners", include_str!("../migrations/0004_owners.sql")),
];

#[derive(Clone, Debug)]
pub(crate) struct Store {
    db: Db,
    /// Wakes who tells what is new.
    changed: Arc<Notify>,
}

/// Where the store is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Head {
    /// The number of the last occurrence.
    pub(crate) sequence: i64,
    /// How many are kept.
    pub(crate) total: i64,
    /// When old ones were last removed; 0: never.
    pub(crate) cleanup_time: i64,
}

impl Store {
    pub(crate) fn new(db: Db) -> Self {
        Store { db, changed: Arc::new(Notify::new()) }
    }

    pub(crate) async fn head(&self) -> Result<Head, Error> {
        let row = sqlx::query("SELECT sequence, total, cleanup_time FROM error_head WHERE id = 1");
        head(&row.fetch_one(&self.db.reader).await?)
    }
}

/// Occurrences, as they are stored.
impl Log for Store {
    type Error = Error;

    async fn last(&self) -> Result<i64, Error> {
        Ok(self.head().await?.sequence)
    }

    async fn added(&self) {
        self.changed.notified().await;
    }
}

/// From here on nobody else changes anything until this transaction ends.
async fn lock_head(connection: &mut AnyConnection) -> Result<Head, Error> {
    let row = sqlx::query(
        "UPDATE error_head SET sequence = sequence WHERE id = 1
         RETURNING sequence, total, cleanup_time",
    );
    head(&row.fetch_one(connection).await?)
}

async fn set_head(connection: &mut AnyConnection, head: Head) -> Result<(), Error> {
    let update = sqlx::query(
        "UPDATE error_head SET sequence = $1, total = $2, cleanup_time = $3 WHERE id = 1",
    );
    let update = update.bind(head.sequence).bind(head.total).bind(head.cleanup_time);
    update.execute(connection).await?;
    Ok(())
}

fn head(row: &AnyRow) -> Result<Head, Error> {
    Ok(Head {
        sequence: row.try_get("sequence")?,
        total: row.try_get("total")?,
        cleanup_time: row.try_get("cleanup_time")?,
    })
}

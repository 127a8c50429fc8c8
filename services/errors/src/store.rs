//! The only SQL of this service, in this file and its submodules. One method is one statement or
//! one transaction.
//!
//! Every writing transaction locks the head row first. Sequence numbers therefore follow the commit
//! order, readers that page by sequence number miss no occurrence, and all counts are exact.

mod bulk_sql;
mod error_groups;
mod group_counts;
mod ingest;
mod occurrences;
mod owner_groups;
mod purge;

use std::sync::Arc;

use hapa_store::change_feed::ChangeSource;
use hapa_store::database::{Db, MigrationStep};
use sqlx::any::AnyRow;
use sqlx::{AnyConnection, Row as _};
use tokio::sync::Notify;

use crate::error::Error;

pub(crate) use error_groups::{ErrorGroup, IncidentFilter, RESOLVED, StatusChange};
pub(crate) use group_counts::{ComparisonWindow, GroupFrequency};
pub(crate) use ingest::{NewOccurrence, OccurrenceBatch};
pub(crate) use purge::RetentionCutoffs;

pub(crate) const MIGRATIONS: &[MigrationStep] = &[
    (1, "occurrences", include_str!("../migrations/0001_occurrences.sql")),
    (2, "days", include_str!("../migrations/0002_days.sql")),
    (3, "met", include_str!("../migrations/0003_met.sql")),
    (4, "owners", include_str!("../migrations/0004_owners.sql")),
];

#[derive(Clone, Debug)]
pub(crate) struct Store {
    db: Db,
    /// Notifies the change feed of this process about new occurrences.
    changed: Arc<Notify>,
}

/// The head row: the state of the whole store.
#[derive(Clone, Copy, Debug)]
pub(crate) struct StoreHead {
    /// The sequence number of the last occurrence.
    pub(crate) sequence: i64,
    /// The number of stored occurrences.
    pub(crate) total: i64,
    /// Time of the last completed purge. 0: never.
    pub(crate) cleanup_time: i64,
}

impl Store {
    pub(crate) fn new(db: Db) -> Self {
        Store { db, changed: Arc::new(Notify::new()) }
    }

    pub(crate) async fn head(&self) -> Result<StoreHead, Error> {
        let row = sqlx::query("SELECT sequence, total, cleanup_time FROM error_head WHERE id = 1");
        read_head(&row.fetch_one(&self.db.reader).await?)
    }
}

impl ChangeSource for Store {
    type Error = Error;

    async fn last(&self) -> Result<i64, Error> {
        Ok(self.head().await?.sequence)
    }

    async fn added(&self) {
        self.changed.notified().await;
    }
}

/// Locks the head row, and with it all writes, until the transaction ends.
async fn lock_head(connection: &mut AnyConnection) -> Result<StoreHead, Error> {
    let row = sqlx::query(
        "UPDATE error_head SET sequence = sequence WHERE id = 1
         RETURNING sequence, total, cleanup_time",
    );
    read_head(&row.fetch_one(connection).await?)
}

async fn write_head(connection: &mut AnyConnection, head: StoreHead) -> Result<(), Error> {
    let update = sqlx::query(
        "UPDATE error_head SET sequence = $1, total = $2, cleanup_time = $3 WHERE id = 1",
    );
    let update = update.bind(head.sequence).bind(head.total).bind(head.cleanup_time);
    update.execute(connection).await?;
    Ok(())
}

fn read_head(row: &AnyRow) -> Result<StoreHead, Error> {
    Ok(StoreHead {
        sequence: row.try_get("sequence")?,
        total: row.try_get("total")?,
        cleanup_time: row.try_get("cleanup_time")?,
    })
}

//! The only SQL of this service, in this file and its submodules. One method is one statement or
//! one transaction.
//!
//! One transaction writes events and their aggregates. All writers lock rows in one order: events,
//! then days of usage, then rollups, each by key. Writers therefore cannot deadlock.

mod events;
mod group_commit;
mod purge;
mod rollups;
mod usage;

use std::sync::Arc;

use hapa_store::database::{Db, MigrationStep};

use crate::store::group_commit::GroupCommit;

pub(crate) use purge::run_purge;
pub(crate) use rollups::RollupFilter;
pub(crate) use usage::{UsageDimension, UsageFilter, UsageGroup};

pub(crate) const MIGRATIONS: &[MigrationStep] = &[
    (1, "events", include_str!("../migrations/0001_events.sql")),
    (2, "reasoning", include_str!("../migrations/0002_reasoning.sql")),
];

#[derive(Clone, Debug)]
pub(crate) struct Store {
    db: Db,
    retention_days: u32,
    group_commit: Arc<GroupCommit>,
}

impl Store {
    pub(crate) fn new(db: Db, retention_days: u32) -> Self {
        let group_commit = Arc::new(GroupCommit::new(db.engine()));
        Store { db, retention_days, group_commit }
    }
}

/// Splits rows into chunks with power-of-two sizes, at most `max`. Few different sizes mean few
/// statement texts, so that all of them stay prepared.
fn power_of_two_chunks<T>(mut rows: &[T], max: usize) -> impl Iterator<Item = &[T]> {
    std::iter::from_fn(move || {
        let size = (0..=max.ilog2()).rev().map(|power| 1 << power);
        let (chunk, rest) = rows.split_at(size.into_iter().find(|size| *size <= rows.len())?);
        rows = rest;
        Some(chunk)
    })
}

#[cfg(test)]
mod tests;

//! The only SQL of this service, here and in the rooms below: one method is one statement or one
//! transaction.
//!
//! Events and their sums are written together, and locked in one order by all who write: events,
//! then days of usage, then rollups, each by their keys. So writers wait for each other and never
//! in a circle.

mod events;
mod line;
mod purge;
mod rollups;
mod usage;

use std::sync::Arc;

use hapa_store::database::{Db, Step};

use crate::store::line::Line;

pub(crate) use purge::purge;
pub(crate) use rollups::Which;
pub(crate) use usage::{By, Total, Usage};

pub(crate) const MIGRATIONS: &[Step] =
    &[(1, "events", include_str!("../migrations/0001_events.sql"))];

#[derive(Clone, Debug)]
pub(crate) struct Store {
    db: Db,
    /// How long events are kept, in days.
    retention_days: u32,
    line: Arc<Line>,
}

impl Store {
    pub(crate) fn new(db: Db, retention_days: u32) -> Self {
        let line = Arc::new(Line::new(db.engine()));
        Store { db, retention_days, line }
    }
}

/// Cuts rows into portions whose sizes are powers of two, `most` at most: so their statements have
/// few texts, and every one stays prepared.
fn portions<T>(mut rows: &[T], most: usize) -> impl Iterator<Item = &[T]> {
    std::iter::from_fn(move || {
        let size = (0..=most.ilog2()).rev().map(|power| 1 << power);
        let (portion, rest) = rows.split_at(size.into_iter().find(|size| *size <= rows.len())?);
        rows = rest;
        Some(portion)
    })
}

#[cfg(test)]
mod tests;

//! Many rows by few statements, within the parameters that both engines take.

use hapa_store::sql::{Placeholder, SqlText};
use sqlx::AnyConnection;
use sqlx::any::AnyRow;

use crate::error::Error;

/// SQLite takes 32,766 parameters and PostgreSQL 65,535.
const MOST: usize = 12_000;

/// What stands in one place of a row.
#[derive(Clone, Copy, Debug)]
pub(super) enum Cell<'a> {
    Text(&'a str),
    Number(i64),
}

/// What stands before the rows and behind them.
pub(super) type Around = (&'static str, &'static str);

/// Runs a statement with rows of so many cells in it, and returns what it returns.
pub(super) async fn many(
    connection: &mut AnyConnection,
    (before, behind): Around,
    columns: usize,
    cells: &[Cell<'_>],
) -> Result<Vec<AnyRow>, Error> {
    let placeholder = Placeholder::of(connection.backend_name());
    let mut found = Vec::new();
    for chunk in cells.chunks(MOST / columns * columns) {
        let sql = SqlText::new(before).with(" ");
        let sql = sql.rows(placeholder, chunk.len() / columns, columns, "").with(" ").with(behind);
        // Each number of rows is a statement of its own: kept, they would push out the others.
        let mut query = sqlx::query(sql).persistent(false);
        for cell in chunk {
            query = match *cell {
                Cell::Text(text) => query.bind(text),
                Cell::Number(number) => query.bind(number),
            };
        }
        found.extend(query.fetch_all(&mut *connection).await?);
    }
    Ok(found)
}

/// Runs a statement with a list in it: `… IN ($1, $2, …) …`.
pub(super) async fn among(
    connection: &mut AnyConnection,
    around: Around,
    cells: &[Cell<'_>],
) -> Result<Vec<AnyRow>, Error> {
    let mut found = Vec::new();
    for chunk in cells.chunks(MOST) {
        found.extend(many(connection, around, chunk.len(), chunk).await?);
    }
    Ok(found)
}

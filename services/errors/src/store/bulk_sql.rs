//! Bulk statements: many rows per statement, within the parameter limits of both database engines.

use hapa_store::sql::{Placeholder, SqlText};
use sqlx::AnyConnection;
use sqlx::any::AnyRow;

use crate::error::Error;

/// Parameters of one statement. SQLite accepts 32,766, PostgreSQL 65,535.
const MAX_PARAMETERS: usize = 12_000;

/// The value of one parameter.
#[derive(Clone, Copy, Debug)]
pub(super) enum SqlValue<'a> {
    Text(&'a str),
    Number(i64),
}

/// The SQL before and after the rows of a statement.
pub(super) type SqlAffixes = (&'static str, &'static str);

/// Executes a statement with rows of `columns` values each, and collects the rows that it returns.
pub(super) async fn execute_rows(
    connection: &mut AnyConnection,
    (prefix, suffix): SqlAffixes,
    columns: usize,
    values: &[SqlValue<'_>],
) -> Result<Vec<AnyRow>, Error> {
    let placeholder = Placeholder::for_backend(connection.backend_name());
    let mut results = Vec::new();
    for chunk in values.chunks(MAX_PARAMETERS / columns * columns) {
        let sql = SqlText::new(prefix).with(" ");
        let sql = sql.rows(placeholder, chunk.len() / columns, columns, "").with(" ").with(suffix);
        // Every row count is a different statement. Caching them would evict the other prepared
        // statements.
        let mut query = sqlx::query(sql).persistent(false);
        for value in chunk {
            query = match *value {
                SqlValue::Text(text) => query.bind(text),
                SqlValue::Number(number) => query.bind(number),
            };
        }
        results.extend(query.fetch_all(&mut *connection).await?);
    }
    Ok(results)
}

/// Executes a statement with a list: `… IN ($1, $2, …) …`.
pub(super) async fn execute_in_list(
    connection: &mut AnyConnection,
    affixes: SqlAffixes,
    values: &[SqlValue<'_>],
) -> Result<Vec<AnyRow>, Error> {
    let mut results = Vec::new();
    for chunk in values.chunks(MAX_PARAMETERS) {
        results.extend(execute_rows(connection, affixes, chunk.len(), chunk).await?);
    }
    Ok(results)
}

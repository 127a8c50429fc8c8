//! SQLite's own look at a file, before it is used.

use std::path::Path;
use std::time::Duration;

use sqlx::sqlite::SqliteConnectOptions;
use sqlx::{ConnectOptions as _, Connection as _, Error, Executor as _, Row as _};

/// Larger files are not read as a whole at every start: SQLite reads about 1 GiB in a second.
const MAX_FILE_LEN: u64 = 64 * 1024 * 1024;

/// What SQLite finds wrong with the file, by its own words, which name tables and pages.
pub(super) async fn quick_check(file: &Path) -> Result<Option<String>, Error> {
    if !std::fs::metadata(file).is_ok_and(|about| about.len() <= MAX_FILE_LEN) {
        return Ok(None);
    }
    let options = SqliteConnectOptions::new().filename(file).busy_timeout(Duration::from_secs(1));
    let mut connection = options.disable_statement_logging().connect().await?;
    let found: String = connection.fetch_one("PRAGMA quick_check(1)").await?.try_get(0)?;
    // It was read, and that is all: whether it closes well says the next one who opens it.
    drop(connection.close().await);
    Ok((found != "ok").then_some(found))
}

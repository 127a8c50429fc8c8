//! SQLite's own consistency check of a file, before the service uses it.

use std::path::Path;
use std::time::Duration;

use sqlx::sqlite::SqliteConnectOptions;
use sqlx::{ConnectOptions as _, Connection as _, Error, Executor as _, Row as _};

/// Maximum size of a file that is checked, in bytes. SQLite reads about 1 GiB per second.
const MAX_FILE_LEN: u64 = 64 * 1024 * 1024;

/// The first problem that SQLite finds, in SQLite's words, which name tables and pages.
pub(super) async fn quick_check(file: &Path) -> Result<Option<String>, Error> {
    if !std::fs::metadata(file).is_ok_and(|metadata| metadata.len() <= MAX_FILE_LEN) {
        return Ok(None);
    }
    let options = SqliteConnectOptions::new().filename(file).busy_timeout(Duration::from_secs(1));
    let mut connection = options.disable_statement_logging().connect().await?;
    let found: String = connection.fetch_one("PRAGMA quick_check(1)").await?.try_get(0)?;
    // The connection only reads, so an error on close does not matter.
    drop(connection.close().await);
    Ok((found != "ok").then_some(found))
}

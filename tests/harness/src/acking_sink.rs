//! A sink of usage events that stores them as analytics must: committed before the acknowledgement, and each
//! id once. It also counts repeated deliveries.

use std::collections::HashSet;
use std::path::Path;
use std::time::Duration;

use hapa_proto::analytics::v1::UsageEvent;
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePool, SqlitePoolOptions};
use sqlx::{Executor as _, Row as _};
use tokio::net::TcpListener;
use tonic::Status;

use crate::fake_analytics::{Service, serve};

/// Stores usage events in a SQLite file before it acknowledges them.
#[derive(Clone, Debug)]
pub struct AckingSink(SqlitePool);

impl AckingSink {
    /// Opens its file.
    pub async fn open(path: &Path) -> AckingSink {
        let options = SqliteConnectOptions::new()
            .filename(path)
            .create_if_missing(true)
            .journal_mode(SqliteJournalMode::Wal)
            .busy_timeout(Duration::from_secs(30));
        let pool = SqlitePoolOptions::new().max_connections(1).connect_with(options);
        let pool = pool.await.expect("a file");
        let table = "CREATE TABLE IF NOT EXISTS kept (event_id TEXT PRIMARY KEY, times INTEGER)";
        pool.execute(table).await.expect("a table");
        AckingSink(pool)
    }

    /// Receives events until it is killed.
    pub async fn serve(self, listener: TcpListener) {
        serve(listener, Service::Keeping(self)).await;
    }

    pub(crate) async fn keep(&self, events: Vec<UsageEvent>) -> Result<(), Status> {
        let lost = |error: sqlx::Error| Status::unavailable(error.to_string());
        let mut transaction = self.0.begin_with("BEGIN IMMEDIATE").await.map_err(lost)?;
        for event in events {
            let insert =
                "INSERT INTO kept VALUES (?, 1) ON CONFLICT DO UPDATE SET times = times + 1";
            let insert = sqlx::query(insert).bind(event.event_id);
            insert.execute(&mut *transaction).await.map_err(lost)?;
        }
        transaction.commit().await.map_err(lost)
    }

    /// The ids of the stored events.
    pub async fn ids(&self) -> HashSet<String> {
        let rows = self.0.fetch_all("SELECT event_id FROM kept").await.expect("rows");
        rows.iter().map(|row| row.get(0)).collect()
    }

    /// The number of stored events, and the number of deliveries.
    pub async fn counts(&self) -> (usize, usize) {
        let row = self.0.fetch_one("SELECT count(*), coalesce(sum(times), 0) FROM kept").await;
        let row = row.expect("a row");
        let count = |place| usize::try_from(row.get::<i64, _>(place)).expect("a count");
        (count(0), count(1))
    }
}

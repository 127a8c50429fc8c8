//! Fingerprints of the peppers under which stored credentials are valid.

use hapa_core::timestamps::now;
use sqlx::Row as _;

use crate::error::Error;
use crate::store::Store;

impl Store {
    /// Whether the store has never been changed: its audit log has no entry.
    pub(crate) async fn is_unused(&self) -> Result<bool, Error> {
        Ok(self.generation().await? == 0)
    }

    /// The fingerprints recorded at the last start; none in a store that is older than their recording.
    pub(crate) async fn pepper_fingerprints(&self) -> Result<Vec<String>, Error> {
        let rows = sqlx::query("SELECT fingerprint FROM pepper_fingerprints");
        let rows = rows.fetch_all(&self.db.reader).await?;
        Ok(rows.iter().map(|row| row.try_get(0)).collect::<Result<_, _>>()?)
    }

    /// Replaces the recorded fingerprints by these.
    pub(crate) async fn record_pepper_fingerprints(
        &self,
        fingerprints: Vec<String>,
    ) -> Result<(), Error> {
        let time = now();
        let recorded = self.db.transaction(move |connection| {
            Box::pin(async move {
                sqlx::query("DELETE FROM pepper_fingerprints").execute(&mut *connection).await?;
                for fingerprint in fingerprints {
                    // Another replica may record the same fingerprint at the same time.
                    let insert = sqlx::query(
                        "INSERT INTO pepper_fingerprints (fingerprint, record_time) VALUES ($1, $2)
                         ON CONFLICT (fingerprint) DO UPDATE SET record_time = $2",
                    );
                    insert.bind(fingerprint).bind(time).execute(&mut *connection).await?;
                }
                Ok::<_, Error>(())
            })
        });
        recorded.await
    }
}

//! Which peppers stored credentials count under, by their fingerprints.

use hapa_core::timestamps::now;
use sqlx::Row as _;

use crate::error::Error;
use crate::store::Store;

impl Store {
    /// Whether nothing was ever changed here: the audit log has no entry.
    pub(crate) async fn is_new(&self) -> Result<bool, Error> {
        Ok(self.generation().await? == 0)
    }

    /// Those that were in force when auth started last; none in a store from before they were recorded.
    pub(crate) async fn pepper_fingerprints(&self) -> Result<Vec<String>, Error> {
        let rows = sqlx::query("SELECT fingerprint FROM pepper_fingerprints");
        let rows = rows.fetch_all(&self.db.reader).await?;
        Ok(rows.iter().map(|row| row.try_get(0)).collect::<Result<_, _>>()?)
    }

    /// Records these in place of what was recorded.
    pub(crate) async fn record_pepper_fingerprints(&self, all: Vec<String>) -> Result<(), Error> {
        let time = now();
        let recorded = self.db.transaction(move |connection| {
            Box::pin(async move {
                sqlx::query("DELETE FROM pepper_fingerprints").execute(&mut *connection).await?;
                for fingerprint in all {
                    // Another replica may record the same at this moment.
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

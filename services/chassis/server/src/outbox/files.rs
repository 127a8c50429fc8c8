//! Outboxes of other or ended processes, opened read-only.

use std::path::{Path, PathBuf};

use hapa_proto::analytics::v1::UsageEvent;
use hapa_proto::errors::v1::Occurrence;
use prost::Message as _;

use super::priority::EventKind;
use super::store;

/// The number of events in an outbox.
pub async fn count_events(outbox: &Path) -> anyhow::Result<u64> {
    store::count_events(outbox).await
}

/// The first outbox in DATA_DIR with an event of a call that had a credential. Calls between services leave events
/// too, also in a mesh without users.
pub async fn find_with_user_events(data_dir: &Path) -> Option<PathBuf> {
    let entries = std::fs::read_dir(data_dir).into_iter().flatten().flatten();
    for outbox in entries.map(|entry| entry.path()).filter(|path| is_outbox_file(path)) {
        // An outbox that can't be read counts as empty.
        let bodies = store::oldest_events(&outbox).await.unwrap_or_default();
        if bodies.iter().any(|(kind, body)| has_owner(*kind, body)) {
            return Some(outbox);
        }
    }
    None
}

fn has_owner(kind: EventKind, body: &[u8]) -> bool {
    match kind {
        EventKind::Usage => UsageEvent::decode(body).is_ok_and(|event| !event.owner.is_empty()),
        EventKind::Occurrence => {
            Occurrence::decode(body).is_ok_and(|event| !event.owner.is_empty())
        }
    }
}

/// Whether a path is one of an outbox: a folder `outbox-*`, or a file `spool-*.db` of an earlier version.
pub fn is_outbox_file(path: &Path) -> bool {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    store::is_sqlite_file(path) || (name.starts_with("outbox-") && path.is_dir())
}

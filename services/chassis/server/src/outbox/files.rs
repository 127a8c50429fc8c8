//! Outbox files of other or ended processes, opened read-only.

use std::path::{Path, PathBuf};

use hapa_proto::analytics::v1::UsageEvent;
use hapa_proto::errors::v1::Occurrence;
use prost::Message as _;

use super::encoded_event::EventKind;
use super::store;

/// The number of events in an outbox file.
pub async fn count_events(file: &Path) -> anyhow::Result<u64> {
    store::count_events(file).await
}

/// The first outbox file in a folder with an event of a call that had a credential. Calls between services leave
/// events too, also in a mesh without users.
pub async fn find_with_user_events(folder: &Path) -> Option<PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    for file in entries.map(|entry| entry.path()).filter(|path| is_outbox_file(path)) {
        // A file that can't be read counts as empty.
        let bodies = store::oldest_events(&file).await.unwrap_or_default();
        if bodies.iter().any(|(kind, body)| has_owner(*kind, body)) {
            return Some(file);
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

/// Whether a file name is one of an outbox: `spool-*.db`.
pub fn is_outbox_file(path: &Path) -> bool {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    name.starts_with("spool-") && path.extension().is_some_and(|extension| extension == "db")
}

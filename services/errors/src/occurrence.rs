//! Takes occurrences in: checked as a whole, without secrets, under the name of who reports them.

use hapa_core::call::Call;
use hapa_core::redaction::scrub;
use hapa_core::timestamps::{micros, now};
use hapa_core::violations::Violations;
use hapa_proto::errors::v1::Occurrence;

use crate::check;
use crate::fingerprint::fingerprint;
use crate::store::{Batch, New};

/// The longest text that is kept.
const LONGEST: usize = 2_000;

/// What a caller reports, ready to be stored.
pub(crate) fn batch(
    call: &Call,
    occurrences: Vec<Occurrence>,
    tracked: bool,
) -> Result<Batch, Violations> {
    let now = now();
    check::batch(&occurrences, now)?;
    let new = |mut occurrence: Occurrence| {
        // Services say who called them. Everyone else speaks for itself alone.
        if !call.is_mesh {
            occurrence.actor = call.actor();
            let owner = call.principal.as_ref().map(|caller| caller.owner.clone());
            occurrence.owner = owner.unwrap_or_default();
        }
        occurrence.message = scrubbed(&occurrence.message);
        occurrence.causes = occurrence.causes.iter().map(|cause| scrubbed(cause)).collect();
        New {
            fingerprint: fingerprint(&occurrence),
            time: occurrence.time.as_ref().map_or(now, micros),
            occurrence,
        }
    };
    Ok(Batch { now, tracked, news: occurrences.into_iter().map(new).collect() })
}

/// A text as it may be kept.
fn scrubbed(text: &str) -> String {
    // A zero byte ends a text of PostgreSQL's.
    scrub(&text.replace('\0', ""), LONGEST)
}
